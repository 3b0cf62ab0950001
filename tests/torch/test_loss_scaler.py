"""The dynamic loss scale is halved by a skipped step, doubled after enough finite steps, and part of the state."""

import numpy as np
import torch

from ocrnet.engines.torch import loss_scaler
from ocrnet.engines.torch.loss_scaler import LossScaler

CPU = torch.device("cpu")
FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)


def test_a_skipped_step_halves_the_scale_and_an_interval_of_finite_steps_doubles_it(monkeypatch):
    monkeypatch.setattr(loss_scaler, "INTERVAL", 3)
    scaler = LossScaler(CPU, dynamic=True)
    scaler.update(NOT_FINITE)
    assert scaler.scale == 2**15
    for step in (FINITE, FINITE, NOT_FINITE, FINITE, FINITE):
        scaler.update(step)
    assert scaler.scale == 2**14
    scaler.update(FINITE)
    assert scaler.scale == 2**15
    assert scaler.good_steps == 0


def test_the_scale_multiplies_the_loss():
    assert LossScaler(CPU, dynamic=True).scaled(torch.tensor(2.0)) == 2**17
    fixed = LossScaler(CPU, dynamic=False)
    fixed.update(NOT_FINITE)
    assert fixed.scaled(torch.tensor(2.0)) == 2
    assert fixed.state() == {}


def test_the_state_can_be_saved_and_restored():
    scaler, restored = LossScaler(CPU, dynamic=True), LossScaler(CPU, dynamic=True)
    scaler.update(NOT_FINITE)
    scaler.update(FINITE)
    restored.restore(scaler.state())
    assert restored.scale == scaler.scale
    assert restored.good_steps == 1
    assert {name: array.dtype for name, array in scaler.state().items()} == {
        "scaler/scale": np.float32,
        "scaler/good_steps": np.int64,
    }
