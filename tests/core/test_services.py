"""Trackers: they get the rows of metrics.jsonl, and a run neither waits for a tracker nor ends because of one.

The tracker is a stand-in called wandb; tests/cli/test_tracking.py has the real ones.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from ocrnet.config import Config
from ocrnet.distributed.launcher import World
from ocrnet.tracking.run_dir import Run
from ocrnet.tracking.services import client
from ocrnet.train import setup
from ocrnet.train.trainer import Progress
from ocrnet.utils.errors import OcrnetError

STAND_IN = """
import json, os, time

def record_call(**call):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")
    if os.environ.get("HANGS_IN") == list(call)[0]:
        time.sleep(float(os.environ.get("HANGS_FOR", 60)))
    if os.environ.get("FAILS_IN") == list(call)[0]:
        raise RuntimeError("no route to " + os.environ["WANDB_API_KEY"])

class Run:
    dir, url, offline = "files", "https://example.com/run", False
    def log(self, values, step): record_call(log=values, step=step)
    def finish(self, exit_code): record_call(finish=exit_code)

def init(**arguments):
    record_call(init=arguments["id"], config=arguments["config"], name=arguments["name"])
    return Run()

def Settings(**arguments): return arguments
def Image(path): return path
"""


@pytest.fixture
def calls(tmp_path, monkeypatch) -> Path:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/wandb.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-key")
    return tmp_path / "calls"


def read(calls: Path) -> list[dict]:
    return [json.loads(line) for line in calls.read_text().splitlines()]


def start(folder: Path, *, fresh: bool = True) -> Run:
    run = Run(folder)
    run.begin(Config(seed=5), {})
    run.open_log()
    run.open_services(["wandb"], project="p", run_name="", fresh=fresh)
    return run


def row(step: int, kind: str = "train") -> dict:
    return {"kind": kind, "step": step, "loss": step / 2, "skipped": 0, "nothing": None}


def test_metrics_and_samples_reach_the_tracker(calls, tmp_path, caplog):
    run = start(tmp_path / "myrun")
    run.record(row(1))
    run.sample("a/b", 1, np.zeros((4, 4, 3), np.uint8))
    run.close("finished")
    began, first, sample, end = read(calls)
    assert (began["name"], began["config"]["seed"], began["config"]["data.flip"]) == ("myrun", 5, True)
    assert first == {"log": {"train/loss": 0.5}, "step": 1}
    assert sample == {"log": {"samples/a_b": str(tmp_path / "myrun/samples/step_1/a_b.png")}, "step": 1}
    assert end == {"finish": 0}
    assert "wandb: run https://example.com/run" in caplog.messages
    assert "wandb: run https://example.com/run" in run.log.read_text()
    assert "a-secret-key" not in "".join(p.read_text() for p in (tmp_path / "myrun").rglob("*.[jly]*"))


def test_a_resumed_run_continues_its_tracker_run_without_duplicate_rows(calls, tmp_path):
    run = start(tmp_path / "myrun")
    for step in (1, 2, 3):
        run.record(row(step))
    run.record(row(3, "eval"))
    run.close("stopped")
    run = start(tmp_path / "myrun", fresh=False)  # from step 1
    for step in (2, 3, 4):
        run.record(row(step))
    run.record(row(3, "eval"))
    run.close("finished")
    recorded = read(calls)
    assert [call["step"] for call in recorded if "log" in call] == [1, 2, 3, 3, 4]
    ids = [call["init"] for call in recorded if "init" in call]
    start(tmp_path / "myrun", fresh=True).close("failed")  # another run in the same folder
    assert ids[0] == ids[1] != read(calls)[-2]["init"]
    assert read(calls)[-1] == {"finish": 1}


def test_a_tracker_that_fails_is_reported_once_and_switched_off(calls, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FAILS_IN", "log")
    run = start(tmp_path / "myrun")
    for step in range(1, 6):
        run.record(row(step))
        time.sleep(0.2)
    run.close("finished")
    assert caplog.text.count("RuntimeError: no route to ***; switched off, metrics.jsonl has all data") == 1
    assert len(run.metrics.read_text().splitlines()) == 5
    assert "a-secret-key" not in run.log.with_name("wandb.log").read_text()


def test_a_tracker_that_stalls_is_reported_once_and_never_waited_for(calls, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HANGS_IN", "log")
    monkeypatch.setattr(client, "SILENT_SECONDS", 0.5)
    run = start(tmp_path / "myrun")
    began = time.monotonic()
    for step in range(1, 5):
        run.record(row(step))
    assert time.monotonic() - began < 0.3
    time.sleep(0.6)
    run.record(row(5))
    run.record(row(6))
    run.close("finished")
    assert time.monotonic() - began < 3
    assert caplog.text.count("wandb: no reply for 0 s; switched off") == 1


def test_a_full_pipe_counts_as_a_stalled_tracker(calls, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HANGS_IN", "log")
    run = start(tmp_path / "myrun")

    def record() -> None:
        for step in range(4000):
            run.record(row(step))
        run.close("finished")

    recording = threading.Thread(target=record, daemon=True)
    recording.start()
    recording.join(5)
    blocked = recording.is_alive()
    if blocked:
        for process in psutil.Process().children():  # killing the process of the tracker ends the wait
            process.kill()
    assert not blocked
    assert caplog.text.count("wandb: it no longer accepts data; switched off") == 1


def test_the_end_of_a_run_waits_a_bounded_time(calls, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HANGS_IN", "finish")
    monkeypatch.setattr(client, "FINISH_SECONDS", 0.5)
    run = start(tmp_path / "myrun")
    run.record(row(1))
    began = time.monotonic()
    run.close("finished")
    assert time.monotonic() - began < 3
    assert "wandb: not all data was sent within 0 s" in caplog.text


def test_a_tracker_that_cannot_start_ends_a_fresh_run_but_not_a_resumed_one(calls, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FAILS_IN", "init")
    message = r"trackers: wandb cannot start: RuntimeError: no route to \*\*\*; work offline"
    with pytest.raises(OcrnetError, match=message):
        start(tmp_path / "myrun")
    run = start(tmp_path / "myrun", fresh=False)
    run.close("finished")
    assert caplog.text.count("RuntimeError: no route to ***; metrics.jsonl has all data") == 1


def test_training_starts_the_trackers_of_its_config(calls, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "modules")
    cfg = Config(save_dir=str(tmp_path / "myrun"), trackers=("wandb",), run_name="first")
    engine = SimpleNamespace(world=World(), startup_messages=())
    setup._open_folder(cfg, engine, Progress(), {}).close("finished")
    assert [call.get("name", "end") for call in read(calls)] == ["first", "end"]


def test_the_rows_of_a_killed_run_reach_the_tracker(calls, tmp_path, monkeypatch):
    """The process of the run gets SIGKILL; the process of the tracker notices, finishes with status 1, and ends."""
    monkeypatch.setenv("HANGS_IN", "log")
    monkeypatch.setenv("HANGS_FOR", "0.5")  # the run has ended before the tracker replies
    run_process = os.fork()
    if run_process == 0:
        with contextlib.suppress(BaseException):
            start(tmp_path / "myrun").record(row(1))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(run_process, 0)
    end = time.monotonic() + 20
    while len(read(calls)) < 3 and time.monotonic() < end:
        time.sleep(0.1)
    assert read(calls)[1:] == [{"log": {"train/loss": 0.5}, "step": 1}, {"finish": 1}]


def test_other_ranks_start_no_tracker(calls, tmp_path):
    Run(tmp_path, rank=1).open_services(["wandb"], project="p", run_name="", fresh=True)
    assert not calls.exists()


def test_a_missing_tracker_package_is_reported_with_its_install_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    os.mkdir(tmp_path / "wandb")  # wandb writes its files to a folder of this name
    with pytest.raises(OcrnetError, match="wandb is not installed: pip install wandb"):
        client.check(["wandb"])
    cfg = Config(save_dir=str(tmp_path / "myrun"), trackers=("wandb",))
    engine = SimpleNamespace(world=World(), startup_messages=())
    with pytest.raises(OcrnetError, match="wandb is not installed"):
        setup._open_folder(cfg, engine, Progress(), {})
    assert not (tmp_path / "myrun").exists()
