"""Running the project's real commands from a test."""

import json
import subprocess
import sys
from pathlib import Path

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
