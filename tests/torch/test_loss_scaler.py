"""The dynamic loss scale: halved by a bad step, doubled after enough good ones, kept in the state."""

import numpy as np
import torch

from ocrnet.engines.torch import loss_scaler
from ocrnet.engines.torch.loss_scaler import LossScaler

CPU = torch.device("cpu")
GOOD, BAD = torch.tensor(True), torch.tensor(False)


def test_a_bad_step_halves_and_a_row_of_good_ones_doubles(monkeypatch):
    monkeypatch.setattr(loss_scaler, "INTERVAL", 3)
    one = LossScaler(CPU, dynamic=True)
    one.update(BAD)
    assert one.scale == 2**15
    for step in (GOOD, GOOD, BAD, GOOD, GOOD):
        one.update(step)
    assert one.scale == 2**14
    one.update(GOOD)
    assert one.scale == 2**15
    assert one.good_steps == 0


def test_the_scale_multiplies_the_loss():
    assert LossScaler(CPU, dynamic=True).scaled(torch.tensor(2.0)) == 2**17
    fixed = LossScaler(CPU, dynamic=False)
    fixed.update(BAD)
    assert fixed.scaled(torch.tensor(2.0)) == 2
    assert fixed.state() == {}


def test_state_goes_out_and_in():
    one, other = LossScaler(CPU, dynamic=True), LossScaler(CPU, dynamic=True)
    one.update(BAD)
    one.update(GOOD)
    other.restore(one.state())
    assert other.scale == one.scale
    assert other.good_steps == 1
    assert {name: array.dtype for name, array in one.state().items()} == {
        "scaler/scale": np.float32,
        "scaler/good_steps": np.int64,
    }
