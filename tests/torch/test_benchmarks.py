"""The benchmark scripts at toy size, so that they cannot rot; what they measure here means nothing."""

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


@pytest.mark.long  # many processes, each of which imports the framework
@pytest.mark.parametrize("script", CASES)
def test_a_script_runs_and_leaves_its_figures(script, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, f"benchmarks/{script}", *CASES[script], "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert {"versions", "commit"} <= report.keys()
    figures = [value for value in _numbers(report) if isinstance(value, float)]
    assert len(figures) >= 3
    assert all(value >= 0 for value in figures)


def _numbers(node: object):
    children = node if isinstance(node, list) else None
    if isinstance(node, dict):  # at toy size more work may take less time
        children = [value for key, value in node.items() if key != "measured_exponent"]
    if children is None:
        yield node
        return
    for child in children:
        yield from _numbers(child)
