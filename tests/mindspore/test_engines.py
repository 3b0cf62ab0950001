"""Both engines compute the same: the logits of every variant, and whole training steps from trained weights.

From fresh weights a rounding difference grows tenfold per step. From trained weights it does not grow, so the bounds
can be tight.
"""

import dataclasses
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.config import Config, Data, Eval, Optimizer
from ocrnet.data.datasets import open_dataset
from ocrnet.data.sampler import TrainStream
from ocrnet.distributed.launcher import World
from ocrnet.engines.base import ATTENTION
from ocrnet.engines.factory import open_engine
from ocrnet.engines.tta import make_passes

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
ARCH = Arch(width=4, blocks=1, modules=(1, 1, 1), channels=16, key_channels=8)
STEPS = 20
BOUND = 1e-4


@pytest.mark.parametrize("variant", architecture.VARIANTS)
@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_the_logits_of_every_variant_agree(variant, size):
    arch = dataclasses.replace(ARCH, variant=variant)
    rng = np.random.default_rng(0)
    state = {
        name: np.abs(x) + 0.5 if architecture.is_norm(name) and name.endswith((".weight", ".running_var")) else x
        for name, x in (
            (name, rng.normal(0, 0.3, shape).astype(np.float32)) for name, shape in architecture.shapes(arch).items()
        )
    }
    x = rng.standard_normal((1, 3, *size)).astype(np.float32)
    logits = []
    for name in ("torch", "mindspore"):
        engine = open_engine(Config(engine=name, device_target="CPU", ms_mode="pynative"), arch, world=World())
        engine.restore(state, 0)
        logits.append(engine.logits(x))
    for a, b in zip(*logits, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_regions_and_relation_agree():
    image = open_dataset("cityscapes", GOLDEN, "train").read(0)[0]
    passes = make_passes(Eval(), image.shape[:2])
    outputs = []
    for name in ("torch", "mindspore"):
        engine = open_engine(Config(engine=name, device_target="CPU", ms_mode="pynative"), ARCH, world=World())
        engine.restore(load_file(GOLDEN / "start.safetensors"), 0)
        outputs.append(engine.predict(image[None], passes, ATTENTION))
    for name in ATTENTION:
        spread = np.ptp(outputs[0][name])
        assert spread > 1e-3
        np.testing.assert_allclose(outputs[0][name], outputs[1][name], rtol=0, atol=1e-3 * spread)


def config(engine, **changes):
    data = Data(dataset_dir=str(GOLDEN), crop_size=(64, 96), class_weights=tuple(np.linspace(0.5, 1.5, 19)))
    plain = {
        "batch_size": 4,
        "lr_init": 1e-3,
        "total_step": STEPS,
        "warmup_step": 0,
        "num_workers": 0,
        "num_classes": 19,
    }
    optimizer = Optimizer(weight_decay=0.05, decay=changes.pop("decay", "all"))
    cfg = Config(engine=engine, device_target="CPU", data=data, optimizer=optimizer)
    return dataclasses.replace(cfg, **(plain | changes))


def open_training(engine, **changes):
    cfg = config(engine, **changes)
    dataset = open_dataset("cityscapes", GOLDEN, "train")
    stream = TrainStream(dataset, cfg.data, seed=1, channels=ARCH.channels, dropout=0.05)
    return open_engine(cfg, ARCH, world=World(), stream=stream)


def train(engine, steps=STEPS, start=None, at=0):
    """Run ``steps`` steps from ``start`` (default: the trained weights); return the losses and the final state."""
    ms.set_context(mode=ms.GRAPH_MODE)  # another engine opened in this process may have changed it
    engine.restore(load_file(GOLDEN / "start.safetensors") if start is None else start, at)
    stats = engine.train(steps)
    assert stats.finite.all()
    return stats.loss, engine.state()


def largest_differences(a, b):
    """Return the largest relative difference of losses, and that of weights and statistics by each tensor's norm."""
    losses = np.abs(a[0] / b[0] - 1).max()
    assert a[1].keys() == b[1].keys()
    tensors = [
        np.linalg.norm(a[1][n] - b[1][n]) / max(np.linalg.norm(b[1][n]), 1e-3) for n in b[1] if "momentum" not in n
    ]
    return losses, max(tensors)


@pytest.fixture(scope="module")
def engines():
    """Open both engines once for all tests of this module, so that MindSpore compiles once."""
    return {name: open_training(name) for name in ("torch", "mindspore")}


@pytest.fixture(scope="module")
def torch_run(engines):
    return train(engines["torch"])


def test_twenty_steps_agree(engines, torch_run):
    losses, weights = largest_differences(train(engines["mindspore"]), torch_run)
    assert losses < BOUND
    assert weights < BOUND


@pytest.mark.parametrize("change", [{"decay": "no_norm"}, {"lr_init": 1.01e-3}], ids=str)
def test_a_small_change_of_the_recipe_exceeds_the_bounds(torch_run, change):
    losses, weights = largest_differences(train(open_training("torch", **change)), torch_run)
    assert max(losses, weights) > BOUND


def test_a_run_can_be_resumed_with_the_other_engine(engines, torch_run):
    """Run ten steps on one engine and ten on the other, in both orders, with the momentum in the state."""
    half = STEPS // 2
    for first, second in (("torch", "mindspore"), ("mindspore", "torch")):
        losses, state = train(engines[first], half)
        rest, end = train(engines[second], half, start=state, at=half)
        found = np.concatenate([losses, rest]), end
        assert max(largest_differences(found, torch_run)) < BOUND
    without = {name: array for name, array in state.items() if "/" not in name}
    found = train(engines["torch"], half, start=without, at=half)  # the negative control: without the momentum
    assert max(largest_differences(found, (torch_run[0][half:], torch_run[1]))) > BOUND


def test_the_first_step_from_fresh_weights_agrees(engines):
    fresh = architecture.init(ARCH, 3)
    (a, x), (b, y) = (train(engines[name], 1, start=fresh) for name in ("torch", "mindspore"))
    np.testing.assert_allclose(b, a, rtol=1e-4)
    gradient_a, gradient_b = (np.concatenate([s[n].ravel() for n in s if n.startswith("momentum/")]) for s in (x, y))
    assert np.linalg.norm(gradient_a - gradient_b) < 5e-2 * np.linalg.norm(gradient_a)
