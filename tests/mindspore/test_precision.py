"""Mixed precision: the float16 computation of each level, and the dynamic and fixed loss scale."""

import dataclasses

import numpy as np
import pytest

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.config import Config, Data, check
from ocrnet.data.sampler import Sample
from ocrnet.distributed.launcher import World
from ocrnet.engines.factory import open_engine
from ocrnet.engines.mindspore.device import choose_precision
from ocrnet.utils.errors import OcrnetError

ARCH = Arch(width=4, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8)
CONFIG = Config(
    engine="mindspore",
    device_target="CPU",
    ms_mode="pynative",
    num_classes=5,
    total_step=50,
    warmup_step=0,
    num_workers=0,
    data=Data(crop_size=(64, 96)),
)


class Stream:
    channels = 16

    def __getitem__(self, number):
        rng = np.random.default_rng(number)
        label = rng.integers(0, 5, (64, 96)).astype(np.uint8)
        return Sample(rng.integers(0, 256, (64, 96, 3), np.uint8), label, np.ones(16, bool))


def open_small(**changes):
    engine = open_engine(dataclasses.replace(CONFIG, **changes), ARCH, world=World(), stream=Stream())
    engine.restore(architecture.init(ARCH, 1), 0)
    return engine


@pytest.fixture(scope="module")
def float32_losses():
    return open_small().train(1).loss


@pytest.mark.parametrize(
    "level", [pytest.param("O1", marks=pytest.mark.long), "O2", pytest.param("O3", marks=pytest.mark.long)]
)
def test_the_losses_of_a_level_are_near_those_of_float32_but_differ(float32_losses, level):
    engine = open_small(mix=True, amp_level=level, loss_scale=128.0)
    found = engine.train(1)
    assert found.finite.all()
    np.testing.assert_allclose(found.loss, float32_losses, rtol=5e-3)
    assert np.abs(found.loss / float32_losses - 1).max() > 1e-6
    assert {array.dtype for array in engine.state().values()} == {np.dtype(np.float32)}


def test_mix_without_a_level_selects_o2_and_logs_the_reason():
    chosen = choose_precision("CPU", dataclasses.replace(CONFIG, mix=True))
    assert (chosen.level, chosen.scaled) == ("O2", True)
    assert "no bfloat16 convolution on CPU" in chosen.text
    assert "no bfloat16" not in choose_precision("Ascend", dataclasses.replace(CONFIG, mix=True)).text
    assert not choose_precision("CPU", CONFIG).scaled


def test_a_level_without_mix_is_rejected():
    with pytest.raises(OcrnetError, match="amp_level O2 has no effect"):
        check(dataclasses.replace(CONFIG, amp_level="O2"))


def test_an_overflow_halves_the_scale_and_the_scale_is_part_of_the_state():
    engine = open_small(mix=True)
    huge = {"scaler/scale": np.array(2.0**100, np.float32), "scaler/good_steps": np.array(5)}
    engine.restore(engine.state() | huge, 0)
    before = engine.state()
    assert not engine.train(1).finite.any()
    state = engine.state()
    assert state["scaler/scale"] == 2.0**99
    assert state["scaler/good_steps"] == 0
    assert all(np.array_equal(state[name], before[name]) for name in state if "scaler" not in name)


def test_two_thousand_good_steps_double_the_scale():
    engine = open_small(mix=True)
    almost = {"scaler/scale": np.array(8.0, np.float32), "scaler/good_steps": np.array(1998)}
    engine.restore(engine.state() | almost, 0)
    assert engine.train(1).finite.all()
    assert (engine.state()["scaler/scale"], engine.state()["scaler/good_steps"]) == (8.0, 1999)
    assert engine.train(1).finite.all()
    assert (engine.state()["scaler/scale"], engine.state()["scaler/good_steps"]) == (16.0, 0)


def test_the_scale_does_not_change_the_gradient():
    """Momentum after one step is the gradient; a scale that is a power of two adds no rounding."""
    momenta = []
    for scale in (1.0, 1024.0):
        engine = open_small(mix=True, amp_level="O1", loss_scale=scale)
        engine.train(1)
        momenta.append(np.concatenate([a.ravel() for n, a in engine.state().items() if n.startswith("momentum/")]))
    assert np.linalg.norm(momenta[0] - momenta[1]) < 2e-2 * np.linalg.norm(momenta[0])
