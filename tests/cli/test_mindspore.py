"""The seed's commands on its own framework: train, kill, resume, evaluate, on one card and under mpirun and msrun."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, SMALL, run
from safetensors.numpy import load_file

from ocrnet import checkpoint
from ocrnet.config import Config, as_dict
from ocrnet.loop import Progress

W32 = "config/ocrnet/config_ocrnet_hrw32_16k.yml"
LAST = "checkpoint/OCRNet_hrnet_seg_w32_8_rank0.safetensors"
TIMINGS = {"images_per_second", "seconds_per_step", "data_seconds_per_step", "memory_bytes"}
long = pytest.mark.skipif(not os.environ.get("OCRNET_TEST_LONG"), reason="slow: make test-long")
GOLDEN = ROOT / "tests/data/golden"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MindSpore and mpirun are in the lock for Linux")


def command(cityscapes, folder, *more: str) -> list[str]:
    small = [pair for pair in SMALL if pair.partition("=")[0] not in ("total_step", "save_interval", "eval_interval",
                                                                     "num_workers", "data.crop_size")]  # fmt: skip
    return ["train.py", "--config", W32, "--device_target", "CPU", "--engine", "mindspore", "--mix", "True",
            "--save_dir", str(folder), "--resume_ckpt", "auto", "--log_interval", "2",
            "--set", f"data.dataset_dir={cityscapes}", "data.crop_size=[64,128]", "total_step=8", "save_interval=3",
            "eval_interval=8", "num_workers=1", *small, *more]  # fmt: skip


def rows(folder):
    table = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in table]


def test_kill_9_resume_and_evaluation(cityscapes, tmp_path):
    run(*command(cityscapes, tmp_path / "whole"))
    process = subprocess.Popen(
        [sys.executable, *command(cityscapes, tmp_path / "killed")], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    assert any("step 4/8" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    found = run(*command(cityscapes, tmp_path / "killed"))
    assert ", step 3" in found.stdout
    mine, theirs = checkpoint.load(tmp_path / "killed" / LAST), checkpoint.load(tmp_path / "whole" / LAST)
    assert mine.tensors.keys() == theirs.tensors.keys()
    assert "scaler/scale" in mine.tensors
    for name, array in theirs.tensors.items():
        np.testing.assert_array_equal(mine.tensors[name], array, err_msg=name)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    evaluate = ["eval.py", "--config", W32, "--device_target", "CPU", "--mix", "True", "--save_dir", tmp_path / "eval"]
    data = ["--set", f"data.dataset_dir={cityscapes}", "num_workers=1"]
    path = (tmp_path / "killed" / LAST).with_suffix(".ckpt")  # as the seed's page has it
    for engine in ("mindspore", "torch"):
        said = run(*evaluate, "--engine", engine, "--checkpoint_path", path, *data).stdout
        assert f"engine: {engine} " in said
        assert f"checkpoint: {path}" in said
    on_mindspore, on_torch = (json.loads(line) for line in (tmp_path / "eval/eval.jsonl").read_text().splitlines())
    assert on_mindspore["mean_iou"] == rows(tmp_path / "whole")[-1]["mean_iou"]
    assert on_torch["mean_iou"] == pytest.approx(on_mindspore["mean_iou"], abs=0.01)  # bfloat16 there, float16 here


def launched(launcher: str, folder: Path, *argv) -> subprocess.CompletedProcess:
    """Run a command of the project's on two ranks."""
    before = {
        "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", "--merge-stderr-to-stdout", "python"],
        "msrun": ["msrun", "--worker_num=2", "--local_worker_num=2", f"--master_port={free_port()}", "--join=True",
                  f"--log_dir={folder / 'msrun'}"],
    }[launcher]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        [*before, *map(str, argv)], cwd=ROOT, env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    logs = "".join(path.read_text() for path in sorted((folder / "msrun").glob("*.log")))
    assert found.returncode == 0, found.stdout + found.stderr + logs
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a checkpoint of trained weights at step 0: from fresh ones rounding differences grow tenfold a step."""
    path = tmp_path_factory.mktemp("trained") / "start.safetensors"
    meta = {"config": as_dict(Config()), "step": 0, "progress": dataclasses.asdict(Progress()), "versions": {}}
    checkpoint.save(path, load_file(GOLDEN / "start.safetensors"), meta)
    return path


def twenty_steps(trained, folder, batch_size, *more) -> list:
    return ["train.py", "--config", W32, "--device_target", "CPU", "--engine", "mindspore", "--run_eval", "False",
            "--save_dir", folder, "--resume_ckpt", trained, "--log_interval", "1", "--lr_init", "1e-3",
            "--batch_size", batch_size, "--set", f"data.dataset_dir={GOLDEN}", "data.crop_size=[64,96]",
            "total_step=20", "warmup_step=0", "num_workers=0", "backbone.width=4", "backbone.blocks=1",
            "backbone.modules=[1,1,1]", "ocr_head.channels=16", "ocr_head.key_channels=8", *more]  # fmt: skip


def apart(folder, other) -> tuple[float, float]:
    """Return the largest relative differences of the losses, and of the weights after the last step."""
    losses = [np.array([row["loss"] for row in rows(run_folder)]) for run_folder in (folder, other)]
    assert len(losses[0]) == 20
    name = "checkpoint/OCRNet_hrnet_seg_w4_20_rank0.safetensors"
    a, b = (checkpoint.load(run_folder / name).tensors for run_folder in (folder, other))
    weights = [np.linalg.norm(a[n] - b[n]) / max(np.linalg.norm(b[n]), 1e-3) for n in b if "/" not in n]
    return np.abs(losses[0] / losses[1] - 1).max(), max(weights)


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "out"
    run(*twenty_steps(trained, folder, 2))
    return folder


@pytest.mark.parametrize("launcher", ["mpirun", "msrun"])
def test_two_ranks_of_batch_1_are_one_of_batch_2(launcher, trained, alone, tmp_path):
    found = launched(launcher, tmp_path, *twenty_steps(trained, tmp_path / "out", 1))
    losses, tensors = apart(tmp_path / "out", alone)
    assert losses < 1e-4
    assert tensors < 1e-4
    if launcher == "mpirun":
        assert found.stdout.count("x 2 cards), 20 steps") == 1  # one rank speaks


@long
def test_local_batch_norms_are_another_number(trained, alone, tmp_path):
    """The negative control of the bounds."""
    launched("mpirun", tmp_path, *twenty_steps(trained, tmp_path / "out", 1, "norm=local"))
    assert max(apart(tmp_path / "out", alone)) > 1e-3


def test_two_ranks_evaluate_three_images_to_the_digits_of_one(trained, cityscapes, tmp_path):
    def command(folder):
        return ["eval.py", "--config", W32, "--device_target", "CPU", "--engine", "mindspore", "--mix", "True",
                "--checkpoint_path", trained, "--save_dir", folder,
                "--set", f"data.dataset_dir={cityscapes}", "num_workers=1"]  # fmt: skip

    run(*command(tmp_path / "one"))
    found = launched("mpirun", tmp_path, *command(tmp_path / "two"))
    one, two = (json.loads((tmp_path / name / "eval.jsonl").read_text()) for name in ("one", "two"))
    assert one == two
    assert found.stdout.count("always answering") == 1
