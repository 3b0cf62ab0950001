from pathlib import Path

import pytest


@pytest.fixture
def fixture() -> Path:
    """Return the folder with the outputs of the authors' own code."""
    return Path(__file__).parents[1] / "data/official_w6"
