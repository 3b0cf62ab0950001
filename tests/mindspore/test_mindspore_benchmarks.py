"""The MindSpore benchmark at toy size: it runs, and its rival is the network and the recipe that ours is."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_the_rival_trains_as_ours_does(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/mindspore_cpu.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {"versions", "commit", "cpu"} <= report.keys()
    rival, ours = report["cases"]["relative"], report["cases"]["ours"]
    for row in (rival, ours):
        assert np.isfinite(row["losses"]).all()
        assert row["train"]["median_seconds"] > 0
        assert row["predict"]["median_seconds"] > 0
    np.testing.assert_allclose(rival["losses"], ours["losses"], rtol=3e-5)  # another eps, resize or rate: 1e-4
    assert abs(ours["losses"][1] / ours["losses"][0] - 1) > 1e-3  # an update that is left out shows
    assert rival["predicted_as_ours"] > 0.98
    assert rival["parameters"] - ours["parameters"] > 11e6  # the ImageNet classifier
