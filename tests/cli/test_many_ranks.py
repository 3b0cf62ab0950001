"""Runs on two ranks, started by mpirun, msrun and torchrun: they match one rank, and a failure of one ends all."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from commands import ROOT, rows, run
from safetensors.numpy import load_file

from ocrnet.config import Config, as_dict
from ocrnet.train.trainer import Progress
from ocrnet.weights import checkpoint

W32 = "config/ocrnet/config_ocrnet_hrw32_16k.yml"
GOLDEN = ROOT / "tests/data/golden"
BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
LAST = "checkpoint/OCRNet_hrnet_seg_w4_{}_rank0.safetensors"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MindSpore and mpirun are in the lock for Linux")


def launcher(name: str, folder: Path) -> list[str]:
    """Return the command prefix that starts two ranks of a command."""
    return {
        "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", "--merge-stderr-to-stdout", "python"],
        "msrun": ["msrun", "--worker_num=2", "--local_worker_num=2", f"--master_port={free_port()}", "--join=True",
                  f"--log_dir={folder / 'msrun'}"],
        "torchrun": ["torchrun", "--standalone", "--nproc_per_node=2"],
        "torchrun, elastic": ["torchrun", "--standalone", "--nproc_per_node=2", "--max-restarts=1"],
    }[name]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(name: str, folder: Path, *argv, ok: bool = True) -> subprocess.CompletedProcess:
    """Run a command of the project on two ranks to its end; assert that it succeeds, or fails when not ``ok``."""
    result = subprocess.run(
        [*launcher(name, folder), *map(str, argv)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    logs = "".join(path.read_text() for path in sorted((folder / "msrun").glob("*.log")))
    assert (result.returncode == 0) is ok, result.stdout + result.stderr + logs
    return result


def start(name: str, folder: Path, *argv) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher(name, folder), *map(str, argv)], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def rank_process(process: subprocess.Popen, rank: int) -> psutil.Process:
    """Return the main process of a rank, not one of its dataloader workers."""
    for child in psutil.Process(process.pid).children(recursive=True):
        env = child.environ()
        names = [env.get(name) for name in ("RANK", "OMPI_COMM_WORLD_RANK", "MS_NODE_ID")]
        if str(rank) in names and "train.py" in child.cmdline() and "train.py" not in child.parent().cmdline()[:3]:
            return child
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def start_checkpoint(tmp_path_factory) -> Path:
    """Return a checkpoint of trained weights at step 0: from initial weights, rounding errors grow tenfold a step."""
    path = tmp_path_factory.mktemp("trained") / "start.safetensors"
    meta = {"config": as_dict(Config()), "step": 0, "progress": dataclasses.asdict(Progress()), "versions": {}}
    checkpoint.save(path, load_file(GOLDEN / "start.safetensors"), meta)
    return path


def training(engine: str, resume: Path | str, folder: Path, batch_size: int, *more: str, data: Path = GOLDEN) -> list:
    """Return the command that trains a small network for 20 steps; settings in ``more`` override the others."""
    pairs = (f"data.dataset_dir={data}", "data.crop_size=[64,96]", "total_step=20", "warmup_step=0", "num_workers=0",
             "backbone.width=4", "backbone.blocks=1", "backbone.modules=[1,1,1]", "ocr_head.channels=16",
             "ocr_head.key_channels=8", *more)  # fmt: skip
    settings = dict(pair.split("=") for pair in pairs)
    return ["train.py", "--config", W32, "--device_target", "CPU", "--engine", engine, "--run_eval", "False",
            "--save_dir", folder, "--resume_ckpt", resume, "--log_interval", "1", "--lr_init", "1e-3",
            "--batch_size", batch_size, "--set", *("=".join(pair) for pair in settings.items())]  # fmt: skip


def relative_differences(folder: Path, other: Path) -> tuple[float, float]:
    """Return the largest relative difference of the losses, and that of the weights after step 20."""
    losses = [np.array([row["loss"] for row in rows(run_folder)]) for run_folder in (folder, other)]
    assert len(losses[0]) == 20
    a, b = (checkpoint.load(run_folder / LAST.format(20)).tensors for run_folder in (folder, other))
    weights = [np.linalg.norm(a[n] - b[n]) / max(np.linalg.norm(b[n]), 1e-3) for n in b if "/" not in n]
    return np.abs(losses[0] / losses[1] - 1).max(), max(weights)


@pytest.fixture(scope="module")
def single_rank_run(start_checkpoint, tmp_path_factory) -> Path:
    """Return the folder of a run of one rank with batch size 2 on PyTorch, the reference for both engines."""
    folder = tmp_path_factory.mktemp("single_rank") / "out"
    run(*training("torch", start_checkpoint, folder, 2))
    return folder


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("torch", "mpirun"),
        ("torch", "torchrun"),
        ("mindspore", "mpirun"),
        pytest.param("mindspore", "msrun", marks=pytest.mark.long),
    ],
)
def test_two_ranks_of_batch_1_match_one_rank_of_batch_2(engine, name, start_checkpoint, single_rank_run, tmp_path):
    result = launch(name, tmp_path, *training(engine, start_checkpoint, tmp_path / "out", 1))
    losses, tensors = relative_differences(tmp_path / "out", single_rank_run)
    assert losses < 1e-4
    assert tensors < 1e-4
    if name != "msrun":
        assert result.stdout.count("x 2 ranks), 20 steps") == 1  # only one rank logs


@pytest.mark.parametrize("engine", ["torch", pytest.param("mindspore", marks=pytest.mark.long)])
def test_batch_norm_of_each_rank_exceeds_the_bounds(engine, start_checkpoint, single_rank_run, tmp_path):
    """Negative control: without synchronized batch norm the result differs by more than the bounds above."""
    launch("mpirun", tmp_path, *training(engine, start_checkpoint, tmp_path / "out", 1, "norm=local"))
    assert max(relative_differences(tmp_path / "out", single_rank_run)) > 1e-3


def test_one_rank_resumes_a_run_of_two_ranks(start_checkpoint, single_rank_run, tmp_path):
    folder = tmp_path / "out"
    launch("torchrun", tmp_path, *training("torch", start_checkpoint, folder, 1, "save_interval=10"))
    (folder / LAST.format(20)).unlink()
    result = run(*training("torch", "auto", folder, 2))
    assert "resume: the number of ranks is 1, was 2: the global batch is the same" in result.stdout
    assert max(relative_differences(folder, single_rank_run)) < 1e-4


@pytest.mark.parametrize(
    ("engine", "name", "images"),
    [
        ("torch", "torchrun", 3),
        pytest.param("torch", "mpirun", 1, marks=pytest.mark.long),
        ("mindspore", "mpirun", 3),
        pytest.param("mindspore", "msrun", 3, marks=pytest.mark.long),
    ],
)
def test_two_ranks_score_any_number_of_images_like_one_rank(engine, name, images, start_checkpoint, tmp_path):
    run("-m", "ocrnet", "synthetic", tmp_path / "data", "--train", "1", "--val", images, "--test", "1",
        "--size", "96", "192")  # fmt: skip

    def command(folder: Path) -> list:
        return ["eval.py", "--config", W32, "--device_target", "CPU", "--engine", engine, "--mix", "True",
                "--checkpoint_path", start_checkpoint, "--save_dir", folder,
                "--set", f"data.dataset_dir={tmp_path / 'data'}", "num_workers=1"]  # fmt: skip

    run(*command(tmp_path / "one"))
    result = launch(name, tmp_path, *command(tmp_path / "two"))
    one, two = (json.loads((tmp_path / name / "eval.jsonl").read_text()) for name in ("one", "two"))
    one["versions"].pop("threads", None), two["versions"].pop("threads", None)
    assert one == two
    assert result.stdout.count("always predicting") == 1


def read_until(process: subprocess.Popen, text: str) -> list[str]:
    """Return a run's output lines up to the first that contains ``text``."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"never printed {text!r}:\n{''.join(lines)}")


def long_training(start_checkpoint: Path, folder: Path) -> list:
    return training("torch", start_checkpoint, folder, 1, "save_interval=3", "num_workers=1", "total_step=40")


@pytest.fixture(scope="module")
def uninterrupted_run(start_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    launch("torchrun", folder, *long_training(start_checkpoint, folder))
    return folder


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_killed_rank_is_restarted_and_the_run_ends_the_same(victim, start_checkpoint, uninterrupted_run, tmp_path):
    process = start("torchrun, elastic", tmp_path, *long_training(start_checkpoint, tmp_path / "out"))
    read_until(process, "step 8/40")
    rank_process(process, victim).kill()
    descendants = psutil.Process(process.pid).children(recursive=True)
    try:
        output = process.communicate(timeout=200)[0]
    finally:
        for survivor in [process, *descendants]:  # ranks that wait for a dead one
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
    assert process.returncode == 0, output
    assert "--resume_ckpt auto is implied" in output
    assert rows(tmp_path / "out") == rows(uninterrupted_run)
    folders = (tmp_path / "out", uninterrupted_run)
    actual, expected = (checkpoint.load(folder / LAST.format(40)).tensors for folder in folders)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def wait_for_exit(process: subprocess.Popen, timeout: float) -> tuple[int, str]:
    """Return exit status and output of a run, which must end within `timeout` seconds and leave no process."""
    descendants = psutil.Process(process.pid).children(recursive=True)
    started = time.monotonic()
    output = process.communicate(timeout=timeout + 60)[0]
    assert time.monotonic() - started < timeout, output
    assert not psutil.wait_procs(descendants, timeout=5)[1], output
    return process.returncode, output


@pytest.fixture
def start_run(start_checkpoint, tmp_path) -> Iterator:
    """Return a function that starts a long run on two ranks and returns after step 8."""
    processes = []

    def start_one(name: str, *more: str, engine: str = "torch") -> subprocess.Popen:
        command = training(engine, start_checkpoint, tmp_path / "out", 1, "total_step=100000", *more)
        process = start(name, tmp_path, *command)
        processes.append(process)
        read_until(process, "step 8/100000")
        return process

    yield start_one
    for process in processes:
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("name", ["mpirun", pytest.param("torchrun", marks=pytest.mark.long)])
def test_a_killed_rank_ends_the_run_within_seconds(name, start_run):
    process = start_run(name, "num_workers=1")
    rank_process(process, 1).kill()
    status, output = wait_for_exit(process, timeout=40)
    assert status not in (0, None), output


@pytest.mark.parametrize(
    ("engine", "timeout", "message"),
    [
        ("torch", 5, "rank 0: another rank did not take part in a collective within 5 s (rank_timeout)"),
        pytest.param("mindspore", 60, "slower than 60 s (rank_timeout); step", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_hangs_ends_the_run_within_rank_timeout(engine, timeout, message, start_run):
    process = start_run("mpirun", f"rank_timeout={timeout}", engine=engine)
    rank_process(process, 1).send_signal(signal.SIGSTOP)
    status, output = wait_for_exit(process, timeout=timeout + 55)
    assert status not in (0, None)
    assert message in output


@pytest.mark.parametrize("name", ["torchrun", "mpirun"])
def test_a_stop_signal_saves_a_checkpoint_and_stops_all_ranks(name, start_run, tmp_path):
    """The signal goes to one rank, or to mpirun as SIGUSR1 (on SIGTERM, mpirun leaves its ranks no time to save)."""
    process = start_run(name)
    if name == "torchrun":
        rank_process(process, 1).terminate()
    else:
        process.send_signal(signal.SIGUSR1)
    _, output = wait_for_exit(process, timeout=40)
    assert "resume with --resume_ckpt auto" in output
    saved = checkpoint.newest_valid(tmp_path / "out/checkpoint").checkpoint
    assert saved.meta["step"] >= 8


@pytest.mark.parametrize("name", ["mpirun", pytest.param("torchrun", marks=pytest.mark.long)])
def test_ranks_save_a_checkpoint_and_stop_when_their_launcher_is_killed(name, start_run, tmp_path):
    process = start_run(name)
    ranks = [rank_process(process, number) for number in (0, 1)]
    process.kill()
    assert not psutil.wait_procs(ranks, timeout=40)[1]
    assert checkpoint.newest_valid(tmp_path / "out/checkpoint").checkpoint.meta["step"] >= 8


@pytest.mark.parametrize("difference", ["batch_size", pytest.param("validation images", marks=pytest.mark.long)])
def test_ranks_that_differ_in_config_or_images_are_refused(difference, start_checkpoint, tmp_path):
    """Without the check, the run would train on a wrong batch size or score a part of the images, without an error."""
    common = f"--config {W32} --device_target CPU --engine torch --save_dir {tmp_path / 'out'} --set num_workers=0"
    if difference == "batch_size":
        command = f"train.py {common} data.dataset_dir={GOLDEN} run_eval=False total_step=2 batch_size=$((R + 1))"
    else:
        run("-m", "ocrnet", "synthetic", tmp_path / "0", "--train", "1", "--val", "2", "--test", "1",
            "--size", "64", "96")  # fmt: skip
        shutil.copytree(tmp_path / "0", tmp_path / "1")
        for kind in ("leftImg8bit", "gtFine"):
            for path in (tmp_path / "1" / kind / "val").glob("*/*_000001_*"):
                path.unlink()
        command = f"eval.py {common} data.dataset_dir={tmp_path}/$R --checkpoint_path {start_checkpoint}"
    shell = f"R=$OMPI_COMM_WORLD_RANK; exec python {command}"
    mpirun = [*launcher("mpirun", tmp_path)[:-1], "bash", "-c", shell]
    result = subprocess.run(mpirun, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode != 0
    assert f"the ranks do not have the same {difference} (rank 0: " in result.stdout + result.stderr
    assert "mIoU" not in result.stdout


@pytest.mark.parametrize("name", ["torchrun", pytest.param("mpirun", marks=pytest.mark.long)])
def test_an_error_of_one_rank_is_printed_once_and_ends_all_ranks(name, start_checkpoint, tmp_path):
    data = tmp_path / "data"
    run("-m", "ocrnet", "synthetic", data, "--train", "4", "--val", "1", "--test", "1", "--size", "96", "192")
    damaged = sorted(data.glob("leftImg8bit/train/*/*.png"))[2]
    damaged.write_bytes(damaged.read_bytes()[:200])
    result = launch(name, tmp_path, *training("torch", start_checkpoint, tmp_path / "out", 1, data=data), ok=False)
    output = result.stdout + result.stderr
    assert output.count(f"{damaged}") == 1, output
    assert str(ROOT / "ocrnet") not in output  # no traceback of this package; torchrun prints its own
