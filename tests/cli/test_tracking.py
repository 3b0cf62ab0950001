"""The metrics and samples that a run logs to MLflow, and to W&B if it is installed, read back from their files."""

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ocrnet.config import Config
from ocrnet.tracking.run_dir import Run

BLOCK = 32768  # bytes in a block of a .wandb file


@pytest.fixture
def services(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # without a database
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-secret-token")
    monkeypatch.setenv("WANDB_MODE", "offline")
    return ["mlflow", *(["wandb"] if importlib.util.find_spec("wandb") else [])]


def train(folder: Path, names: list[str], steps: range, *, fresh: bool) -> None:
    """Log what a run logs in these steps."""
    run = Run(folder)
    run.truncate_metrics(step=steps[0] - 1, evaluated_step=steps[0] - 1)
    run.begin(Config(seed=5), {})
    run.open_services(names, project="streets", run_name="", fresh=fresh)
    for step in steps:
        run.record({"kind": "train", "step": step, "loss": 1 / step, "learning_rate": 0.1})
        if step % 2 == 0:
            run.sample("a", step, np.zeros((4, 4, 3), np.uint8))
            run.record({"kind": "eval", "step": step, "mean_iou": step / 10})
    run.close("finished")


def test_a_resumed_run_continues_the_same_tracked_run(services, tmp_path):
    folder = tmp_path / "myrun"
    train(folder, services, range(1, 5), fresh=True)
    train(folder, services, range(3, 7), fresh=False)  # resumes from step 2, so steps 3 and 4 are logged again
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    check_mlflow(logged)
    if "wandb" in services:
        check_wandb(folder, logged)
    texts = [*folder.rglob("*.yml"), *folder.rglob("*.log"), *folder.rglob("*.json*")]
    assert not any("a-secret-token" in path.read_text() for path in texts)


def check_mlflow(logged: list[dict]) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("streets").experiment_id])
    assert (run.info.run_name, run.info.status) == ("myrun", "FINISHED")
    assert run.data.params["seed"] == "5"
    for kind, name in (("train", "loss"), ("train", "learning_rate"), ("eval", "mean_iou")):
        history = client.get_metric_history(run.info.run_id, f"{kind}/{name}")
        expected = [(row["step"], row[name]) for row in logged if row["kind"] == kind]
        points = sorted((point.step, point.value) for point in history)
        assert [step for step, _ in points] == [step for step, _ in expected]
        assert points[-1] == expected[-1]
    folders = [item.path for item in client.list_artifacts(run.info.run_id, "samples")]
    assert folders == ["samples/step_2", "samples/step_4", "samples/step_6"]


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yield the records of a .wandb file: 7 bytes of header, then LevelDB's log format."""
    data, offset, record = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        if BLOCK - offset % BLOCK < 7:  # no header fits into the rest of a block
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        record += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a complete record, or its last part
            yield record
            record = b""


def check_wandb(folder: Path, logged: list[dict]) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1  # the same id
    losses = []
    for path in files:
        for data in wandb_records(path):
            record = Record()
            record.ParseFromString(data)
            values = {(item.key or item.nested_key[0]): item.value_json for item in record.history.item}
            if "train/loss" in values:
                losses.append((int(values["_step"]), float(values["train/loss"])))
    expected = [(row["step"], row["loss"]) for row in logged if row["kind"] == "train"]
    assert [step for step, _ in losses] == [step for step, _ in expected]
    assert losses[-1] == pytest.approx(expected[-1])
