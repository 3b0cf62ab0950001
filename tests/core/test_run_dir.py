"""The run folder: only rank 0 writes, each start is recorded, and a resume removes the rows that it writes again."""

import json
import logging
import subprocess
from pathlib import Path

import pytest
import yaml

from ocrnet.config import Config, as_dict
from ocrnet.tracking import run_dir as run_module
from ocrnet.tracking.run_dir import Run, core_versions, git_commit
from ocrnet.utils import log
from ocrnet.utils.errors import OcrnetError

logger = logging.getLogger("ocrnet.tests")


def test_log_lines_and_metric_rows_are_written(tmp_path, capsys):
    log.open_console()
    run = Run(tmp_path / "out")
    run.open_log()
    logger.info("hello")
    run.record({"step": 1, "loss": 0.1})
    assert capsys.readouterr().out == "hello\n"
    assert run.log.read_text().endswith(" hello\n")
    assert json.loads(run.metrics.read_text()) == {"step": 1, "loss": 0.1}
    with pytest.raises(ValueError, match="JSON"):
        run.record({"loss": float("nan")})


def test_other_ranks_write_nothing(tmp_path, capsys):
    log.open_console()
    log.set_rank(1, first_of_machine=False)
    run = Run(tmp_path / "out", rank=1)
    run.open_log()
    logger.info("hello")
    run.record({"step": 1})
    run.begin(Config(), {})
    run.truncate_metrics(step=0, evaluated_step=0)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OcrnetError, match=r"save_dir '.*file' cannot be used"):
        Run(tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    run = Run(tmp_path)
    run.metrics.symlink_to("/dev/full")
    with pytest.raises(OcrnetError, match=r"metrics\.jsonl' cannot be written: No space left"):
        run.record({"step": 1})


def test_an_evaluation_has_separate_files(tmp_path):
    run = Run(tmp_path, name="eval")
    run.record({"step": 1})
    assert [p.name for p in tmp_path.glob("*.jsonl")] == ["eval.jsonl"]
    assert not run.checkpoints.exists()


def test_each_start_is_recorded(tmp_path):
    run = Run(tmp_path)
    for _ in range(2):
        run.begin(Config(seed=5), core_versions())
    assert yaml.safe_load((tmp_path / "config.yml").read_text()) == as_dict(Config(seed=5))
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert starts[0].keys() == {"time", "command", "commit", "versions"}
    assert {"ocrnet", "python", "numpy", "opencv-python-headless"} <= starts[0]["versions"].keys()


def test_rows_after_a_step_and_an_unfinished_row_are_removed(tmp_path):
    run = Run(tmp_path)
    run.truncate_metrics(step=3, evaluated_step=0)  # metrics.jsonl does not exist yet
    for kind, step in (("train", 2), ("eval", 2), ("train", 4), ("train", 3), ("eval", 3)):
        run.record({"kind": kind, "step": step})
    with run.metrics.open("a") as file:
        file.write('{"step": 1, "lo')
    run.truncate_metrics(step=3, evaluated_step=2)  # stopped between step 3 and its evaluation
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 2), ("eval", 2), ("train", 3)]


def test_the_commit_is_that_of_the_source_tree(tmp_path, monkeypatch):
    package = tmp_path / "ocrnet/tracking"
    package.mkdir(parents=True)
    monkeypatch.setattr(run_module, "__file__", str(package / "run_dir.py"))
    assert git_commit() is None
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert git_commit() == head.stdout.strip()
    assert Path(run_module.__file__).parent == package
