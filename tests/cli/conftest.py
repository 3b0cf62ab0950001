"""Real runs of the real commands, on a Cityscapes tree made by `ocrnet synthetic`."""

from pathlib import Path

import pytest
from commands import SMALL, run


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
