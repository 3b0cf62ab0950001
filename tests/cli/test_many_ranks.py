"""Several ranks, started as people start them: the numbers of one rank, and an end for all where one ends."""

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
    """Return the words that start two ranks of what follows them."""
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


def launched(name: str, folder: Path, *argv, ok: bool = True) -> subprocess.CompletedProcess:
    """Run a command of the project's on two ranks."""
    found = subprocess.run(
        [*launcher(name, folder), *map(str, argv)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    logs = "".join(path.read_text() for path in sorted((folder / "msrun").glob("*.log")))
    assert (found.returncode == 0) is ok, found.stdout + found.stderr + logs
    return found


def start(name: str, folder: Path, *argv) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher(name, folder), *map(str, argv)], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def rank_of(process: subprocess.Popen, rank: int) -> psutil.Process:
    """Return the process of a rank, not one of its loader's workers."""
    for child in psutil.Process(process.pid).children(recursive=True):
        env = child.environ()
        names = [env.get(name) for name in ("RANK", "OMPI_COMM_WORLD_RANK", "MS_NODE_ID")]
        if str(rank) in names and "train.py" in child.cmdline() and "train.py" not in child.parent().cmdline()[:3]:
            return child
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return a checkpoint of trained weights at step 0: from fresh ones rounding differences grow tenfold a step."""
    path = tmp_path_factory.mktemp("trained") / "start.safetensors"
    meta = {"config": as_dict(Config()), "step": 0, "progress": dataclasses.asdict(Progress()), "versions": {}}
    checkpoint.save(path, load_file(GOLDEN / "start.safetensors"), meta)
    return path


def training(engine: str, resume: Path | str, folder: Path, batch_size: int, *more: str, data: Path = GOLDEN) -> list:
    """Return the command of twenty steps of a small network; of ``more`` settings, the last of a key holds."""
    pairs = (f"data.dataset_dir={data}", "data.crop_size=[64,96]", "total_step=20", "warmup_step=0", "num_workers=0",
             "backbone.width=4", "backbone.blocks=1", "backbone.modules=[1,1,1]", "ocr_head.channels=16",
             "ocr_head.key_channels=8", *more)  # fmt: skip
    settings = dict(pair.split("=") for pair in pairs)
    return ["train.py", "--config", W32, "--device_target", "CPU", "--engine", engine, "--run_eval", "False",
            "--save_dir", folder, "--resume_ckpt", resume, "--log_interval", "1", "--lr_init", "1e-3",
            "--batch_size", batch_size, "--set", *("=".join(pair) for pair in settings.items())]  # fmt: skip


def apart(folder: Path, other: Path) -> tuple[float, float]:
    """Return the largest relative differences of the losses, and of the weights after the last step."""
    losses = [np.array([row["loss"] for row in rows(run_folder)]) for run_folder in (folder, other)]
    assert len(losses[0]) == 20
    a, b = (checkpoint.load(run_folder / LAST.format(20)).tensors for run_folder in (folder, other))
    weights = [np.linalg.norm(a[n] - b[n]) / max(np.linalg.norm(b[n]), 1e-3) for n in b if "/" not in n]
    return np.abs(losses[0] / losses[1] - 1).max(), max(weights)


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory) -> Path:
    """Return the folder of one rank's run with batch 2: PyTorch's, of which MindSpore's is as near."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    run(*training("torch", trained, folder, 2))
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
def test_two_ranks_of_batch_1_are_one_of_batch_2(engine, name, trained, alone, tmp_path):
    found = launched(name, tmp_path, *training(engine, trained, tmp_path / "out", 1))
    losses, tensors = apart(tmp_path / "out", alone)
    assert losses < 1e-4
    assert tensors < 1e-4
    if name != "msrun":
        assert found.stdout.count("x 2 ranks), 20 steps") == 1  # one rank speaks


@pytest.mark.parametrize("engine", ["torch", pytest.param("mindspore", marks=pytest.mark.long)])
def test_local_batch_norms_are_another_number(engine, trained, alone, tmp_path):
    """The negative control of the bounds."""
    launched("mpirun", tmp_path, *training(engine, trained, tmp_path / "out", 1, "norm=local"))
    assert max(apart(tmp_path / "out", alone)) > 1e-3


def test_one_rank_goes_on_where_two_were(trained, alone, tmp_path):
    folder = tmp_path / "out"
    launched("torchrun", tmp_path, *training("torch", trained, folder, 1, "save_interval=10"))
    (folder / LAST.format(20)).unlink()
    found = run(*training("torch", "auto", folder, 2))
    assert "resume: the number of ranks is 1, was 2: the global batch is the same" in found.stdout
    assert max(apart(folder, alone)) < 1e-4


@pytest.mark.parametrize(
    ("engine", "name", "images"),
    [
        ("torch", "torchrun", 3),
        pytest.param("torch", "mpirun", 1, marks=pytest.mark.long),
        ("mindspore", "mpirun", 3),
        pytest.param("mindspore", "msrun", 3, marks=pytest.mark.long),
    ],
)
def test_two_ranks_evaluate_any_number_of_images_to_the_digits_of_one(engine, name, images, trained, tmp_path):
    run("-m", "ocrnet", "synthetic", tmp_path / "data", "--train", "1", "--val", images, "--test", "1",
        "--size", "96", "192")  # fmt: skip

    def command(folder: Path) -> list:
        return ["eval.py", "--config", W32, "--device_target", "CPU", "--engine", engine, "--mix", "True",
                "--checkpoint_path", trained, "--save_dir", folder,
                "--set", f"data.dataset_dir={tmp_path / 'data'}", "num_workers=1"]  # fmt: skip

    run(*command(tmp_path / "one"))
    found = launched(name, tmp_path, *command(tmp_path / "two"))
    one, two = (json.loads((tmp_path / name / "eval.jsonl").read_text()) for name in ("one", "two"))
    one["versions"].pop("threads", None), two["versions"].pop("threads", None)
    assert one == two
    assert found.stdout.count("always predicting") == 1


def read_until(process: subprocess.Popen, words: str) -> list[str]:
    """Return a run's lines up to the first that holds ``words``."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError(f"never said {words!r}:\n{''.join(lines)}")


def long_training(trained: Path, folder: Path) -> list:
    return training("torch", trained, folder, 1, "save_interval=3", "num_workers=1", "total_step=40")


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    launched("torchrun", folder, *long_training(trained, folder))
    return folder


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_killed_rank_comes_back_and_ends_bit_for_bit(victim, trained, undisturbed, tmp_path):
    process = start("torchrun, elastic", tmp_path, *long_training(trained, tmp_path / "out"))
    read_until(process, "step 8/40")
    rank_of(process, victim).kill()
    family = psutil.Process(process.pid).children(recursive=True)
    try:
        said = process.communicate(timeout=200)[0]
    finally:
        for one in [process, *family]:  # ranks that wait for a dead one
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    assert process.returncode == 0, said
    assert "--resume_ckpt auto is implied" in said
    assert rows(tmp_path / "out") == rows(undisturbed)
    mine, theirs = (checkpoint.load(folder / LAST.format(40)).tensors for folder in (tmp_path / "out", undisturbed))
    for name, array in theirs.items():
        np.testing.assert_array_equal(mine[name], array, err_msg=name)


def end_of(process: subprocess.Popen, within: float) -> tuple[int, str]:
    """Return status and output of a run that must end in time, and leave no process behind."""
    family = psutil.Process(process.pid).children(recursive=True)
    begun = time.monotonic()
    said = process.communicate(timeout=within + 60)[0]
    assert time.monotonic() - begun < within, said
    assert not psutil.wait_procs(family, timeout=5)[1], said
    return process.returncode, said


@pytest.fixture
def running(trained, tmp_path) -> Iterator:
    """Return a function that starts a long run of two ranks and waits for its eighth step."""
    started = []

    def begin(name: str, *more: str, engine: str = "torch") -> subprocess.Popen:
        process = start(name, tmp_path, *training(engine, trained, tmp_path / "out", 1, "total_step=100000", *more))
        started.append(process)
        read_until(process, "step 8/100000")
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("name", ["mpirun", pytest.param("torchrun", marks=pytest.mark.long)])
def test_a_killed_rank_ends_the_run_within_seconds(name, running):
    process = running(name, "num_workers=1")
    rank_of(process, 1).kill()
    status, said = end_of(process, within=40)
    assert status not in (0, None), said


@pytest.mark.parametrize(
    ("engine", "patience", "why"),
    [
        ("torch", 5, "rank 0: another rank did not take part in a collective within 5 s (rank_timeout)"),
        pytest.param("mindspore", 60, "slower than 60 s (rank_timeout); step", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_hangs_ends_the_run_within_rank_timeout(engine, patience, why, running):
    process = running("mpirun", f"rank_timeout={patience}", engine=engine)
    rank_of(process, 1).send_signal(signal.SIGSTOP)
    status, said = end_of(process, within=patience + 55)
    assert status not in (0, None)
    assert why in said


@pytest.mark.parametrize("name", ["torchrun", "mpirun"])
def test_a_stop_request_stops_all_ranks_with_a_checkpoint(name, running, tmp_path):
    """To one rank; and to mpirun, which passes SIGUSR1 on (on SIGTERM it leaves its ranks no time to save)."""
    process = running(name)
    if name == "torchrun":
        rank_of(process, 1).terminate()
    else:
        process.send_signal(signal.SIGUSR1)
    _, said = end_of(process, within=40)
    assert "resume with --resume_ckpt auto" in said
    found = checkpoint.newest_valid(tmp_path / "out/checkpoint").checkpoint
    assert found.meta["step"] >= 8


@pytest.mark.parametrize("name", ["mpirun", pytest.param("torchrun", marks=pytest.mark.long)])
def test_ranks_whose_launcher_was_killed_stop_with_a_checkpoint(name, running, tmp_path):
    process = running(name)
    ranks = [rank_of(process, number) for number in (0, 1)]
    process.kill()
    assert not psutil.wait_procs(ranks, timeout=40)[1]
    assert checkpoint.newest_valid(tmp_path / "out/checkpoint").checkpoint.meta["step"] >= 8


@pytest.mark.parametrize("what", ["batch_size", pytest.param("validation images", marks=pytest.mark.long)])
def test_ranks_that_were_not_given_the_same_are_refused(what, trained, tmp_path):
    """A score over a part of the images, or steps of other sizes, would look like what was asked for."""
    common = f"--config {W32} --device_target CPU --engine torch --save_dir {tmp_path / 'out'} --set num_workers=0"
    if what == "batch_size":
        own = f"train.py {common} data.dataset_dir={GOLDEN} run_eval=False total_step=2 batch_size=$((R + 1))"
    else:
        run(
            "-m",
            "ocrnet",
            "synthetic",
            tmp_path / "0",
            "--train",
            "1",
            "--val",
            "2",
            "--test",
            "1",
            "--size",
            "64",
            "96",
        )
        shutil.copytree(tmp_path / "0", tmp_path / "1")
        for kind in ("leftImg8bit", "gtFine"):
            for path in (tmp_path / "1" / kind / "val").glob("*/*_000001_*"):
                path.unlink()
        own = f"eval.py {common} data.dataset_dir={tmp_path}/$R --checkpoint_path {trained}"
    shell = f"R=$OMPI_COMM_WORLD_RANK; exec python {own}"
    mpirun = [*launcher("mpirun", tmp_path)[:-1], "bash", "-c", shell]
    found = subprocess.run(mpirun, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=200, check=False)
    assert found.returncode != 0
    assert f"the ranks do not have the same {what} (rank 0: " in found.stdout + found.stderr
    assert "mIoU" not in found.stdout


@pytest.mark.parametrize("name", ["torchrun", pytest.param("mpirun", marks=pytest.mark.long)])
def test_a_failing_rank_is_heard_once_and_ends_all(name, trained, tmp_path):
    data = tmp_path / "data"
    run("-m", "ocrnet", "synthetic", data, "--train", "4", "--val", "1", "--test", "1", "--size", "96", "192")
    broken = sorted(data.glob("leftImg8bit/train/*/*.png"))[2]
    broken.write_bytes(broken.read_bytes()[:200])
    found = launched(name, tmp_path, *training("torch", trained, tmp_path / "out", 1, data=data), ok=False)
    said = found.stdout + found.stderr
    assert said.count(f"{broken}") == 1, said
    assert str(ROOT / "ocrnet") not in said  # no traceback of ours; torchrun gives its own
