"""Fixtures of the command tests: a dataset in Cityscapes layout, written by `ocrnet synthetic`, and a finished run."""

from pathlib import Path

import pytest
from commands import SMALL, run


@pytest.fixture(scope="session")
def cityscapes(tmp_path_factory) -> Path:
    """Return a dataset folder in Cityscapes layout: 6 train, 3 val and 1 test images of 96x192."""
    root = tmp_path_factory.mktemp("cityscapes") / "data"
    run("-m", "ocrnet", "synthetic", root, "--train", "6", "--val", "3", "--test", "1", "--size", "96", "192")
    return root


@pytest.fixture(scope="session")
def w48_run(cityscapes, tmp_path_factory) -> Path:
    """Return the folder of a finished run of the original HRNet-W48 config, with `SMALL` settings."""
    folder = tmp_path_factory.mktemp("w48") / "output"
    config = "config/ocrnet/config_ocrnet_hrw48_16k.yml"
    run("train.py", "--config", config, "--device_target", "CPU", "--mix", "True", "--save_dir", folder,
        "--set", f"data.dataset_dir={cityscapes}", *SMALL)  # fmt: skip
    return folder
