"""The MindSpore benchmark runs at toy size, and the public OCRNet in it has the network and recipe of ours."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_the_public_ocrnet_trains_like_ours(tmp_path):
    output = tmp_path / "report.json"
    command = [sys.executable, "benchmarks/mindspore_cpu.py", "--quick", "--out", str(output)]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert completed.returncode == 0, completed.stderr
    report = json.loads(output.read_text())
    assert {"versions", "commit", "cpu"} <= report.keys()
    public, ours = report["cases"]["public"], report["cases"]["ours"]
    for row in (public, ours):
        assert np.isfinite(row["losses"]).all()
        assert row["train"]["median_seconds"] > 0
        assert row["predict"]["median_seconds"] > 0
    np.testing.assert_allclose(public["losses"], ours["losses"], rtol=3e-5)  # another eps, resize or rate: 1e-4
    assert abs(ours["losses"][1] / ours["losses"][0] - 1) > 1e-3  # fails if the update is missing
    assert public["predicted_as_ours"] > 0.98
    assert public["parameters"] - ours["parameters"] > 11e6  # the ImageNet classifier
