"""Weights from our own files; incomplete files and files of other networks are refused with their path."""

import numpy as np
import pytest

from ocrnet import architecture, weights
from ocrnet.architecture import Arch
from ocrnet.config import Backbone, Config, OcrHead, as_dict
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint, hrnet

ARCH = Arch(width=4, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8)


@pytest.fixture
def state():
    return architecture.init(ARCH, 3)


def saved(path, tensors, **config):
    checkpoint.save(path, tensors, {"config": config, "step": 0})
    return path


def test_our_checkpoint_stores_its_network(tmp_path, state):
    head = OcrHead(channels=16, key_channels=8, variant="mmseg", align_corners=True)
    cfg = as_dict(Config(backbone=Backbone(width=4), ocr_head=head))
    loaded = weights.read(
        saved(tmp_path / "a.safetensors", state | {"momentum/conv1.weight": state["conv1.weight"]}, **cfg)
    )
    assert loaded.arch == Arch(**{**ARCH.__dict__, "variant": "mmseg", "align_corners": True})
    assert "momentum/conv1.weight" in loaded.tensors
    assert loaded.meta["step"] == 0


def test_an_incomplete_checkpoint_is_refused(tmp_path, state):
    del state["stage3.0.branches.1.0.bn2.weight"]
    with pytest.raises(OcrnetError, match=r"1 missing: stage3\.0\.branches\.1\.0\.bn2\.weight"):
        weights.read(saved(tmp_path / "a.safetensors", state))


def test_files_of_other_networks_are_refused(tmp_path):
    with pytest.raises(OcrnetError, match=r"b\.safetensors: .*not from an OCRNet"):
        weights.read(saved(tmp_path / "b.safetensors", {"fc.weight": np.zeros((3, 3), np.float32)}))
    (tmp_path / "c.bin").write_bytes(b"hello, world, I am no weights file")
    with pytest.raises(OcrnetError, match=r"c\.bin"):
        weights.read(tmp_path / "c.bin")
    with pytest.raises(OcrnetError, match=r"nowhere\.safetensors"):
        weights.read(tmp_path / "nowhere.safetensors")


def test_only_the_backbone_is_loaded_and_the_rest_is_counted(tmp_path, state, caplog):
    path = saved(tmp_path / "a.safetensors", state)
    loaded = weights.read_backbone(path, ARCH)
    assert set(loaded) == {name for name in state if architecture.is_backbone(name)}
    unused = len(state) - len(loaded)
    assert f"{len(loaded)} tensors loaded from {path}, 0 missing, {unused} not used" in caplog.text
    assert "cls_head" in caplog.text


def test_a_backbone_that_does_not_fit_is_refused(tmp_path, state):
    path = saved(tmp_path / "a.safetensors", state)
    with pytest.raises(OcrnetError, match=r"does not match backbone\.width 6: .* with another shape"):
        weights.read_backbone(path, Arch(width=6, blocks=1, modules=(1, 1, 1)))
    with pytest.raises(OcrnetError, match=r"1 missing|missing"):
        weights.read_backbone(path, Arch(width=4, blocks=2, modules=(1, 1, 1)))
    with pytest.raises(OcrnetError, match=r"backbone\.backbone_ckpt: '.*none\.pth' does not exist"):
        weights.read_backbone(tmp_path / "none.pth", ARCH)


def test_wrapper_prefixes_are_removed_and_counters_are_dropped():
    one = np.zeros(1, np.float32)
    names = ["module.model.conv1.weight", "model.bn1.weight", "bn1.bias"]
    dropped = ["model.bn1.num_batches_tracked", "loss.criterion.weight", "module.loss.criterion.weight"]
    loaded = hrnet.FAMILY.canonical(dict.fromkeys([*names, *dropped], one))
    assert set(loaded.tensors) == {"conv1.weight", "bn1.weight", "bn1.bias"}
