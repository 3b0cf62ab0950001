"""Real runs of the real commands, on a Cityscapes tree made by `ocrnet synthetic`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What makes a shipped config small enough for a test: a few steps of small crops, a shallow network.
SMALL = (
    "total_step=4", "save_interval=2", "eval_interval=4", "num_workers=0", "data.crop_size=[64,64]",
    "backbone.blocks=1", "backbone.modules=[1,1,1]", "ocr_head.channels=16", "ocr_head.key_channels=8",
)  # fmt: skip


def run(*argv: str | Path, cwd: Path = ROOT, ok: bool = True) -> subprocess.CompletedProcess:
    """Run a command of the project's, from its root; ``ok`` asserts success."""
    found = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    if ok:
        assert found.returncode == 0, found.stdout + found.stderr
    return found


@pytest.fixture(scope="session")
def cityscapes(tmp_path_factory) -> Path:
    """Return a Cityscapes tree: 6 train, 3 val, 1 test scenes of 96x192."""
    root = tmp_path_factory.mktemp("cityscapes") / "data"
    run("-m", "ocrnet", "synthetic", root, "--train", "6", "--val", "3", "--test", "1", "--size", "96", "192")
    return root


@pytest.fixture(scope="session")
def w48_run(cityscapes, tmp_path_factory) -> Path:
    """Return the folder of a finished run of the seed's hrw48 config, made small."""
    folder = tmp_path_factory.mktemp("w48") / "output"
    config = "config/ocrnet/config_ocrnet_hrw48_16k.yml"
    run("train.py", "--config", config, "--device_target", "CPU", "--mix", "True", "--save_dir", folder,
        "--set", f"data.dataset_dir={cityscapes}", *SMALL)  # fmt: skip
    return folder
