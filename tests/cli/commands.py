"""Running the project's real commands from a test."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from ocrnet import checkpoint

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


def run(*argv: str | Path, cwd: Path = ROOT, ok: bool = True) -> subprocess.CompletedProcess:
    """Run a command of the project's, from its root; ``ok`` asserts success."""
    found = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    if ok:
        assert found.returncode == 0, found.stdout + found.stderr
    return found


def start(*argv: str) -> subprocess.Popen:
    """Start a command of the project's, with what it starts in a session of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Read what a process says up to a line with ``text``, and return it."""
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
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
