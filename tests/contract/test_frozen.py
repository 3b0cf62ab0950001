"""The run folder, checkpoint and ONNX file of commit 6f9cdcc load, resume, evaluate and predict as they did then."""

import json
import shutil

import frozen
import numpy as np
import pytest
from commands import run

EXPECTED = json.loads((frozen.FROZEN / "expected.json").read_text())
# These losses change by 2e-7 with another thread count, by 8e-7 with the other engine, by 2e-5 with a momentum of 0.89.
RTOL = 5e-6
ENGINES = ["torch", pytest.param("mindspore", marks=pytest.mark.mindspore)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_frozen_run_resumes(engine, tmp_path):
    tensors, losses, scores = frozen.resume(tmp_path, engine, run)
    np.testing.assert_allclose(losses, EXPECTED["losses"], rtol=RTOL)
    assert scores == pytest.approx(EXPECTED["scores"]["resumed"], abs=1e-4)
    assert all(np.isfinite(array).all() for array in tensors.values())


def test_another_momentum_exceeds_the_tolerance(tmp_path):
    _, losses, _ = frozen.resume(tmp_path, "torch", run, "optimizer.momentum=0.89")
    assert np.abs(losses / EXPECTED["losses"] - 1).max() > RTOL


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [".safetensors", ".ckpt"])
def test_a_frozen_checkpoint_scores_the_same(engine, name, tmp_path):
    (stored,) = (frozen.RUN / "checkpoint").glob(f"*{name}")
    checkpoint = shutil.copy(stored, tmp_path)  # without the other file, which could be read instead
    assert frozen.evaluate(tmp_path, engine, checkpoint, run) == pytest.approx(EXPECTED["scores"]["run"], abs=1e-4)


def test_a_frozen_checkpoint_scores_the_same_at_several_scales(tmp_path):
    scores = frozen.evaluate(tmp_path, "torch", frozen.RUN, run, "--multi_scale", "True", "--flip", "True")
    assert scores == pytest.approx(EXPECTED["scores"]["run, scales and flip"], abs=1e-4)


def test_a_frozen_onnx_file_scores_the_same(tmp_path):
    assert frozen.evaluate(tmp_path, "torch", frozen.ONNX, run) == pytest.approx(EXPECTED["scores"]["onnx"], abs=1e-4)


@pytest.mark.parametrize("path", [frozen.RUN, frozen.ONNX], ids=["run", "onnx"])
def test_the_python_api_gives_the_frozen_probabilities(path):
    found = frozen.probabilities(path, "torch")[:, ::16, ::16]
    np.testing.assert_allclose(found, EXPECTED["probabilities"], atol=1e-5)
