"""Helpers that run the project's commands as processes.

Importing PyTorch takes most of the time of a small command. So `run` forks each command from a server process that has
imported it already; the fork gets the command's arguments, working directory and environment. `start` starts a new
interpreter, for commands that a test interrupts. MindSpore cannot be forked, so its commands get a new interpreter too.
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

# Settings that make a shipped config small enough for a test: a few steps of small crops, a shallow network.
SMALL = (
    "total_step=4", "save_interval=2", "eval_interval=4", "num_workers=0", "data.crop_size=[64,64]",
    "backbone.blocks=1", "backbone.modules=[1,1,1]", "ocr_head.channels=16", "ocr_head.key_channels=8",
)  # fmt: skip

TIMINGS = {"images_per_second", "seconds_per_step", "data_seconds_per_step", "memory_bytes"}


def rows(folder: Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl without measured times and memory."""
    table = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in table]


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "ocrnet.cli", "ocrnet.tracking.plots", "ocrnet.engines.torch.engine"])


def run(*argv: str | Path, cwd: Path = ROOT, ok: bool = True, seconds: float = 600) -> subprocess.CompletedProcess:
    """Run a command of the project in ``cwd`` for at most ``seconds``; with ``ok``, assert exit status 0."""
    words = list(map(str, argv))
    if words[0] == "-c" or any("mindspore" in word for word in words):
        result = subprocess.run(
            [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False
        )
    else:
        result = _run_forked(words, cwd, seconds)
    if ok:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def _run_forked(argv: list[str], cwd: Path, seconds: float) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/stdout", f"{folder}/stderr"]
        process = FORKSERVER.Process(target=_exec, args=(argv, str(cwd), dict(os.environ), files))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
        texts = [Path(path).read_text() for path in files]
    return subprocess.CompletedProcess(argv, process.exitcode, *texts)


def _exec(argv: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    """Run ``python`` with the arguments ``argv`` in this process; write stdout and stderr to ``files``."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a process without calling them


def start(*argv: str) -> subprocess.Popen:
    """Start a command of the project in a new session, so that a test can signal it and all its children."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


WAIT_SECONDS = 300  # how long wait_for waits before it kills the process


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Read the output of a process up to a line with ``text``, and return it."""
    output = ""
    watchdog = threading.Timer(WAIT_SECONDS, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            output += line
            if text in line:
                return output
    finally:
        watchdog.cancel()
    raise AssertionError(f"ended without printing {text!r}: {output}{process.stderr.read()}")


def assert_identical_runs(folder: Path, reference: Path) -> None:
    """Assert that the last checkpoints and the metrics of two runs are equal, bit for bit."""
    last = checkpoint.steps(reference / "checkpoint")[-1]
    actual, expected = checkpoint.load(folder / "checkpoint" / last.name), checkpoint.load(last)
    assert actual.tensors.keys() == expected.tensors.keys()
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(actual.tensors[name], array, err_msg=name)
    assert actual.meta["progress"] == expected.meta["progress"]
    assert rows(folder) == rows(reference)
