"""Running the project's real commands from a test.

Importing PyTorch is most of a small command's time. So what runs to its end is forked from one process that has
imported it: a process of its own, with the command's arguments, folder and environment. What needs the start itself,
or is interrupted, goes by `start`; MindSpore cannot be forked.
"""

import atexit
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from ocrnet.weights import checkpoint

ROOT = Path(__file__).parents[2]

# What makes a shipped config small enough for a test: a few steps of small crops, a shallow network.
SMALL = (
    "total_step=4", "save_interval=2", "eval_interval=4", "num_workers=0", "data.crop_size=[64,64]",
    "backbone.blocks=1", "backbone.modules=[1,1,1]", "ocr_head.channels=16", "ocr_head.key_channels=8",
)  # fmt: skip

TIMINGS = {"images_per_second", "seconds_per_step", "data_seconds_per_step", "memory_bytes"}


def rows(folder: Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl, without what is measured."""
    table = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in table]


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "ocrnet.cli", "ocrnet.tracking.plots", "ocrnet.engines.torch.engine"])


def run(*argv: str | Path, cwd: Path = ROOT, ok: bool = True, seconds: float = 600) -> subprocess.CompletedProcess:
    """Run a command of the project's for at most ``seconds``, from its root; ``ok`` asserts success."""
    words = list(map(str, argv))
    if words[0] == "-c" or any("mindspore" in word for word in words):
        found = subprocess.run(
            [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False
        )
    else:
        found = _forked(words, cwd, seconds)
    if ok:
        assert found.returncode == 0, found.stdout + found.stderr
    return found


def _forked(words: list[str], cwd: Path, seconds: float) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/stdout", f"{folder}/stderr"]
        process = FORKS.Process(target=_become, args=(words, str(cwd), dict(os.environ), files))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
        texts = [Path(file).read_text() for file in files]
    return subprocess.CompletedProcess(words, process.exitcode, *texts)


def _become(words: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    """Become the command: ``words`` as they follow ``python``, with its output in ``files``."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing's own end leaves out


def start(*argv: str) -> subprocess.Popen:
    """Start a command of the project's, with what it starts in a session of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


WAIT_SECONDS = 300  # for a line that does not come


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Read what a process says up to a line with ``text``, and return it."""
    said = ""
    watchdog = threading.Timer(WAIT_SECONDS, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            said += line
            if text in line:
                return said
    finally:
        watchdog.cancel()
    raise AssertionError(f"ended without saying {text!r}: {said}{process.stderr.read()}")


def assert_same_end(folder: Path, whole: Path) -> None:
    """Compare the last checkpoint and the measurements of two runs, bit for bit."""
    last = checkpoint.steps(whole / "checkpoint")[-1]
    mine, theirs = checkpoint.load(folder / "checkpoint" / last.name), checkpoint.load(last)
    assert mine.tensors.keys() == theirs.tensors.keys()
    for name, array in theirs.tensors.items():
        np.testing.assert_array_equal(mine.tensors[name], array, err_msg=name)
    assert mine.meta["progress"] == theirs.meta["progress"]
    assert rows(folder) == rows(whole)
