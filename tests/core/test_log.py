"""Logging: which ranks print a message, what is removed from it, and how messages reach the log file of a run."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ocrnet.cli import main
from ocrnet.cloud import retry
from ocrnet.cloud.cache import Cache
from ocrnet.cloud.store import Item, StoreError
from ocrnet.config import Cloud
from ocrnet.utils import log, urls
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.log import ANY_RANK, EACH_MACHINE

logger = logging.getLogger("ocrnet.tests")

SECRET = "a-secret-key"
TIME = "%Y-%m-%d %H:%M:%S"

# A command whose first argument names the log file of its run; without it, the command has no run.
COMMAND = """
import logging, sys
from pathlib import Path
from ocrnet.cli import main
from ocrnet.utils import log

def command(argv):
    if argv:
        log.open_file(Path(argv[0]))
    for number in (1, 2):
        logging.getLogger("ocrnet.tests").info(f"message {number}")
    return 0

name, *rest = sys.argv[1:]
main.COMMANDS[name] = command
sys.exit(main.main([name, *rest]))
"""


def log_each_kind() -> None:
    logger.info("of rank 0")
    logger.info("of any rank", extra=ANY_RANK)
    logger.info("of each machine", extra=EACH_MACHINE)


def lines(path: Path) -> list[str]:
    """Return the messages of a log file without their times, whose format is checked."""
    parts = [line.split(" ", 2) for line in path.read_text(encoding="utf-8").splitlines()]
    for date, clock, _ in parts:
        time.strptime(f"{date} {clock}", TIME)
    return [message for _, _, message in parts]


# Ranks


@pytest.mark.parametrize(
    ("rank", "first_of_machine", "expected"),
    [
        (0, True, ["of rank 0", "of any rank", "of each machine"]),
        (0, False, ["of rank 0", "of any rank"]),
        (3, False, ["rank 3: of any rank"]),
        (8, True, ["rank 8: of any rank", "of each machine"]),
    ],
)
def test_the_rank_decides_what_is_printed_and_written(tmp_path, capsys, rank, first_of_machine, expected):
    log.open_console()
    log.set_rank(rank, first_of_machine=first_of_machine)
    log_each_kind()  # kept for the file
    log.open_file(tmp_path / "train.log")
    log_each_kind()
    assert capsys.readouterr().out.splitlines() == 2 * expected
    assert lines(tmp_path / "train.log") == 2 * expected


def test_a_level_follows_the_rank(capsys):
    log.open_console()
    log.set_rank(3, first_of_machine=False)
    logger.warning("slow", extra=ANY_RANK)
    logger.error("broken", extra=ANY_RANK)
    logger.error("of rank 0")
    output = capsys.readouterr()
    assert (output.out, output.err) == ("rank 3: warning: slow\n", "rank 3: error: broken\n")


def test_messages_of_download_threads_name_the_rank(tmp_path, monkeypatch, capsys):
    class UnreliableStore:
        url, fails = "s3://bucket/data", True

        def read(self, name: str, start: int, length: int) -> bytes:
            if self.fails:
                self.fails = False
                raise StoreError("no reply")
            return b"abc"

    monkeypatch.setattr(retry, "pause", lambda tries: 0.0)
    log.open_console()
    log.set_rank(3, first_of_machine=False)
    cache = Cache(urls.parse("data_url", "s3://bucket/data"), Cloud(cache_dir=str(tmp_path), retries=1))
    cache.download(UnreliableStore(), [Item("a.png", 3, "1")], {"a.png": hashlib.sha256(b"abc").hexdigest()})
    warning, summary = capsys.readouterr().out.splitlines()
    assert warning == "rank 3: warning: s3://bucket/data/a.png: no reply; retrying in 0.0 s (1 of 1)"
    assert summary.startswith("rank 3: s3://bucket/data: 1 of 1 files")


# Text


def test_credentials_and_control_characters_are_neither_printed_nor_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    log.open_console()
    for when in ("kept", "later"):
        logger.info(f"{when}: https://user:password@host/a, {SECRET} \x1b[31m\r\x9b")
        log.open_file(tmp_path / "train.log")
    try:
        raise ValueError(f"{SECRET}\x1b in https://user:password@host/b")
    except ValueError:
        logger.exception("failed")
    output = capsys.readouterr()
    first, second = (f"{when}: https://***@host/a, *** \\x1b[31m\\r\\x9b" for when in ("kept", "later"))
    assert output.out.splitlines() == [first, second]
    assert output.err.startswith("error: failed\nTraceback")
    assert "ValueError: ***\\x1b in https://***@host/b\n" in output.err
    text = (tmp_path / "train.log").read_text()
    for expected in (first, second, "error: failed\nTraceback", "ValueError: ***\\x1b in https://***@host/b\n"):
        assert text.count(expected) == 1
    for hidden in (SECRET, "password", "\x1b", "\r", "\x9b"):
        assert hidden not in output.out + output.err + text


# The log file of a run


def test_earlier_messages_reach_the_file_once_with_their_time(tmp_path):
    log.open_console()
    logger.info("before")
    kept = next(handler for handler in logging.getLogger("ocrnet").handlers if isinstance(handler, log._Buffer))
    kept._records[0].created -= 3600
    log.open_file(tmp_path / "train.log")
    logger.info("after")
    log.open_file(tmp_path / "eval.log")  # of another run in the same process
    logger.info("of the other run")
    times = [time.mktime(time.strptime(line[:19], TIME)) for line in (tmp_path / "train.log").open()]
    assert times[1] - times[0] == pytest.approx(3600, abs=5)
    assert lines(tmp_path / "train.log") == ["before", "after"]
    assert lines(tmp_path / "eval.log") == ["of the other run"]
    log.close_file()
    logger.info("without a run")
    assert lines(tmp_path / "eval.log") == ["of the other run"]


def test_only_the_latest_of_many_earlier_messages_are_kept(tmp_path):
    log.open_console()
    for number in range(1500):
        logger.info(f"message {number}")
    log.open_file(tmp_path / "train.log")
    assert lines(tmp_path / "train.log") == [f"message {number}" for number in range(500, 1500)]


def test_a_file_without_a_console_gets_messages_of_level_info(tmp_path, capsys):
    logging.getLogger("ocrnet").setLevel(logging.NOTSET)  # as in a program that imports ocrnet
    log.open_file(tmp_path / "train.log")
    logger.debug("details")
    logger.info("hello")
    assert lines(tmp_path / "train.log") == ["hello"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("removed", ["the folder", "the file"])
def test_a_removed_file_or_folder_is_created_again(tmp_path, removed):
    path = tmp_path / "out/logs/train.log"
    log.open_file(path)
    logger.info("first")
    assert lines(path) == ["first"]
    if removed == "the folder":
        shutil.rmtree(tmp_path / "out")
    else:
        path.unlink()
    logger.info("second")
    assert lines(path) == ["second"]


def test_a_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "train.log"
    path.mkdir()
    log.open_console()
    log.open_file(path)  # no message has been kept, so nothing is written yet
    with pytest.raises(OcrnetError, match=r"train\.log' cannot be written: Is a directory; free some space"):
        logger.info("hello")
    log.open_console()
    logger.info("hello")
    with pytest.raises(OcrnetError, match=r"train\.log' cannot be written: Is a directory"):
        log.open_file(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "train.log"
    path.symlink_to("/dev/full")

    def command(argv: list[str]) -> int:
        log.open_file(path)
        logger.info("hello")
        return 0

    monkeypatch.setitem(main.COMMANDS, "train", command)
    assert main.main(["train"]) == 2
    output = capsys.readouterr()
    assert output.out == "hello\n"
    assert output.err.startswith(f"error: '{path}' cannot be written: No space left on device; free some space")


# The command line


@pytest.mark.parametrize(
    ("flags", "printed"),
    [
        ([], ["info", "warning: warning"]),
        (["--quiet"], ["warning: warning"]),
        (["--verbose"], ["debug", "info", "warning: warning"]),
        (["--quiet", "--verbose"], ["warning: warning"]),
    ],
)
@pytest.mark.parametrize("flags_first", [False, True])
def test_quiet_and_verbose_select_what_is_printed_but_not_what_is_written(
    tmp_path, monkeypatch, capsys, flags, printed, flags_first
):
    def command(argv: list[str]) -> int:
        assert argv == ["--seed", "1"]
        log.open_file(tmp_path / "train.log")
        for level in ("debug", "info", "warning", "error"):
            getattr(logger, level)(level)
        print("a result")
        return 0

    monkeypatch.setitem(main.COMMANDS, "train", command)
    argv = ["train", "--seed", "1"]
    assert main.main([*flags, *argv] if flags_first else [*argv, *flags]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [*printed, "a result"]
    assert output.err == "error: error\n"
    assert lines(tmp_path / "train.log") == ["info", "warning: warning", "error: error"]


def test_each_command_prints_a_message_once(monkeypatch, capsys, tmp_path):
    def command(argv: list[str]) -> int:
        log.open_file(tmp_path / argv[0])
        logger.info(f"to {argv[0]}")
        return 0

    monkeypatch.setitem(main.COMMANDS, "train", command)
    for name in ("a.log", "b.log"):
        assert main.main(["train", name]) == 0
        assert capsys.readouterr().out == f"to {name}\n"
        assert lines(tmp_path / name) == [f"to {name}"]


def run_with_closed_stdout(*argv: str) -> tuple[int, str]:
    """Run `COMMAND` with a pipe as stdout that nothing reads; return its exit status and stderr."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *argv], stdout=write_end, stderr=-1, text=True, timeout=60, check=False
        )
    finally:
        os.close(write_end)
    return done.returncode, done.stderr


def test_a_closed_stdout_ends_a_command_without_a_run():
    assert run_with_closed_stdout("check") == (141, "")


def test_a_closed_stdout_does_not_end_a_run_with_a_log_file(tmp_path):
    assert run_with_closed_stdout("check", str(tmp_path / "run.log")) == (0, "")
    assert lines(tmp_path / "run.log") == ["message 1", "message 2"]


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_closed_stdout_does_not_end_a_run_before_its_log_file_is_open(command):
    assert run_with_closed_stdout(command) == (0, "")


def test_the_scheduler_of_msrun_logs_only_messages_of_any_rank(capsys):
    log.open_console()
    log.set_rank(0, first_of_machine=False, scheduler=True)
    log_each_kind()
    assert capsys.readouterr().out == "scheduler: of any rank\n"


def test_results_are_printed_with_quiet(capsys):
    log.open_console(log.RESULT)
    logger.info("progress")
    logger.log(log.RESULT, "mIoU 0.5")
    assert capsys.readouterr().out == "mIoU 0.5\n"
