"""Weights of every family on the MindSpore engine, op by op, give the logits of the family's own network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from family_nets import Authors, MindSpore, Mmseg, Nvidia, Openseg, OpensegInplace, Paddle, fill

from ocrnet import weights
from ocrnet.config import Config
from ocrnet.distributed.launcher import World
from ocrnet.engines.factory import open_engine
from ocrnet.weights.convert import convert

FIXTURE = Path(__file__).parents[1] / "data" / "official_w6"


def logits(path, x):
    found = weights.read(path)
    engine = open_engine(Config(engine="mindspore", device_target="CPU", ms_mode="pynative"), found.arch, world=World())
    engine.restore(found.tensors, 0)
    return engine.logits(x)


@torch.no_grad()
@pytest.mark.parametrize(
    "network",
    [
        *(pytest.param(family, marks=pytest.mark.long) for family in (Authors, Openseg, OpensegInplace, Nvidia)),
        Mmseg,
        Paddle,
        MindSpore,
    ],
)
def test_logits_equal_those_of_the_familys_network(network, tmp_path):
    net = fill(network(4, 1, (1, 1, 1), 3, 8, 256 if network is MindSpore else 4))
    torch.save(net.state_dict(), tmp_path / "a.pth")
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 72, 97), dtype=np.float32))
    expected = net(x.flip(1) if issubclass(network, Openseg) else x)
    for ours, theirs in zip(logits(tmp_path / "a.pth", x.numpy()), expected, strict=True):
        assert np.abs(ours - theirs.numpy()).max() < 1e-5 * theirs.abs().max()


def test_the_authors_weights_give_the_authors_outputs(tmp_path):
    convert(FIXTURE / "state_dict.pth", tmp_path / "a.safetensors")
    expected = torch.load(FIXTURE / "case_b.pth", weights_only=True)
    aux, ocr = logits(tmp_path / "a.safetensors", expected["x"].numpy())
    np.testing.assert_allclose(aux, expected["aux"].numpy(), atol=1e-5)
    np.testing.assert_allclose(ocr, expected["ocr"].numpy(), atol=1e-5)
