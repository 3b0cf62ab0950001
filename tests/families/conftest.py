from pathlib import Path

import pytest


@pytest.fixture
def fixture() -> Path:
    """Return the folder of what the authors' own code computed."""
    return Path(__file__).parents[1] / "data/official_w6"
