"""`ocrnet.load` opens our checkpoints and the authors' files from Python."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import ocrnet
from ocrnet import architecture, config
from ocrnet.architecture import Arch
from ocrnet.config import Backbone, Config, Data, OcrHead
from ocrnet.distributed.launcher import World
from ocrnet.engines.factory import open_engine
from ocrnet.engines.tta import make_passes
from ocrnet.weights import checkpoint

FIXTURE = Path(__file__).parents[1] / "data/official_w6"
ARCH = Arch(width=4, blocks=1, modules=(1, 2, 1), num_classes=7, channels=16, key_channels=8, align_corners=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    cfg = Config(
        backbone=Backbone(width=4, blocks=1, modules=(1, 2, 1)),
        ocr_head=OcrHead(channels=16, key_channels=8, align_corners=False),
        data=Data(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1)),
    )
    path = tmp_path_factory.mktemp("saved") / "x.safetensors"
    tensors = architecture.init(ARCH, 5)
    tensors["bn1.running_mean"] += 0.1
    checkpoint.save(path, tensors, {"config": config.as_dict(cfg), "step": 3})
    return path


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)


def test_the_architecture_and_normalization_come_from_the_file(saved, image):
    model = ocrnet.load(saved, device_target="CPU")
    assert model.arch == ARCH
    cfg = Config(device_target="CPU", data=Data(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1)))
    engine = open_engine(cfg, ARCH, world=World())
    engine.restore(checkpoint.load(saved).tensors, 0)
    passes = make_passes(cfg.eval, (70, 90))
    expected = engine.predict(image[None], passes, ("probabilities",))["probabilities"][0]
    np.testing.assert_array_equal(model.probabilities(image), expected)
    np.testing.assert_array_equal(model.predict(image), expected.argmax(axis=0))
    other = open_engine(dataclasses.replace(cfg, data=Data()), ARCH, world=World())
    other.restore(checkpoint.load(saved).tensors, 0)
    assert np.abs(other.predict(image[None], passes, ("probabilities",))["probabilities"][0] - expected).max() > 1e-3


def test_scales_flip_and_windows_change_the_probabilities(saved, image):
    model = ocrnet.load(saved)
    for options in ({"scales": (0.5, 1.5)}, {"flip": True}, {"slide": (48, 48)}):
        actual = model.probabilities(image, **options)
        assert actual.shape == (7, 70, 90)
        np.testing.assert_allclose(actual.sum(axis=0), 1, rtol=1e-5)
        assert np.abs(actual - model.probabilities(image)).max() > 1e-4


def test_the_authors_file_gives_the_authors_logits():
    model = ocrnet.load(FIXTURE / "state_dict.pth", device_target="CPU")
    assert (model.arch.width, model.arch.channels, model.arch.key_channels) == (6, 48, 24)
    for case in ("case_a", "case_b"):
        expected = torch.load(FIXTURE / f"{case}.pth", weights_only=True)
        aux, ocr = model.logits(expected["x"].numpy())
        np.testing.assert_allclose(aux, expected["aux"].numpy(), atol=1e-5)
        np.testing.assert_allclose(ocr, expected["ocr"].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "invalid_image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((1, 8, 8, 3), np.uint8)]
)
def test_an_image_of_another_shape_or_dtype_is_rejected(saved, invalid_image):
    with pytest.raises(ocrnet.OcrnetError, match="uint8 H,W,3"):
        ocrnet.load(saved).predict(invalid_image)


def test_a_file_without_an_ocrnet_is_rejected(tmp_path):
    path = tmp_path / "no.pth"
    torch.save({"fc.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ocrnet.OcrnetError, match=r"no\.pth: .*not from an OCRNet"):
        ocrnet.load(path)
