"""Every benchmark script runs at toy size. The measured values are not meaningful at this size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = {
    "cpu.py": ["--width", "8", "--train_size", "64", "128", "--predict_size", "64", "128", "--rounds", "1"],
    "pipeline.py": ["--size", "128", "256", "--crop_size", "64", "128", "--images", "2", "--rounds", "1"],
    "memory.py": ["--width", "8", "--size", "64", "128"],
    "loss.py": ["--size", "256", "512", "--rounds", "1"],
    "gpu.py": ["--device_target", "CPU", "--toy"],
    "export.py": ["--quick"],
    "predict_large.py": ["--size", "300", "400", "--frame", "64", "96", "--frames", "4", "--max_memory", "0.1"],
    "serve.py": ["--quick"],
    "growth.py": ["--toy", "--calls", "1"],
    "scaling.py": ["--device_target", "CPU", "--width", "6", "--size", "64", "128", "--steps", "1", "--rounds", "1"],
}


@pytest.mark.long  # starts many processes, each of which imports the framework
@pytest.mark.parametrize("script", CASES)
def test_a_script_runs_and_writes_its_measurements(script, tmp_path):
    output = tmp_path / "report.json"
    command = [sys.executable, f"benchmarks/{script}", *CASES[script], "--out", str(output)]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert completed.returncode == 0, completed.stderr
    report = json.loads(output.read_text())
    assert {"versions", "commit"} <= report.keys()
    measurements = [value for value in _values(report) if isinstance(value, float)]
    assert len(measurements) >= 3
    assert all(value >= 0 for value in measurements)


def _values(node: object):
    children = node if isinstance(node, list) else None
    if isinstance(node, dict):  # it may be negative at toy size, where more work can take less time
        children = [value for key, value in node.items() if key != "measured_exponent"]
    if children is None:
        yield node
        return
    for child in children:
        yield from _values(child)
