"""PyTorch weights files of both formats and with the usual wrappers are read without running code in them."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ocrnet import architecture, weights
from ocrnet.architecture import Arch
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights.pth import read

FIXTURE = Path(__file__).parents[1] / "data/official_w6/state_dict.pth"
ARCH = Arch(width=4, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in architecture.init(ARCH, 3).items()}


def test_the_authors_file_is_read(tmp_path):
    found = weights.read(FIXTURE)
    assert found.arch == Arch(width=6, channels=48, key_channels=24)
    assert found.meta == {}
    original = torch.load(FIXTURE, weights_only=True)
    np.testing.assert_array_equal(found.tensors["conv1.weight"], original["conv1.weight"].numpy())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_wrappers_prefixes_and_both_formats_are_read(tmp_path, state, zipped, wrapper, prefix):
    content = {prefix + name: tensor for name, tensor in state.items()}
    content |= {prefix + "bn1.num_batches_tracked": torch.tensor(7)}
    content = {wrapper: content, "epoch": 3} if wrapper else content
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = weights.read(tmp_path / "a.pth")
    assert found.arch == ARCH
    assert all(np.array_equal(found.tensors[name], tensor.numpy()) for name, tensor in state.items())


def test_the_legacy_format_with_a_newer_pickle_protocol_is_rejected_with_a_remedy(tmp_path, state):
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False, pickle_protocol=4)
    with pytest.raises(OcrnetError, match=r"save only its state dict: torch\.save"):
        weights.read(tmp_path / "a.pth")


def test_the_backbone_of_an_imagenet_file_is_read(tmp_path, state, caplog):
    backbone = {name: tensor for name, tensor in state.items() if architecture.is_backbone(name)}
    head = {"incre_modules.0.0.conv1.weight": torch.zeros(2, 2), "classifier.weight": torch.zeros(10, 2)}
    torch.save(backbone | head, tmp_path / "a.pth")
    found = weights.read_backbone(tmp_path / "a.pth", ARCH)
    assert set(found) == set(backbone)
    assert "0 missing, 2 not used (classifier, incre_modules)" in caplog.text
    backbone.pop("layer1.0.conv1.weight")
    torch.save(backbone, tmp_path / "a.pth")
    with pytest.raises(OcrnetError, match=r"1 missing \(layer1\.0\.conv1\.weight\)"):
        weights.read_backbone(tmp_path / "a.pth", ARCH)


class Malicious:
    """Creates a folder when it is unpickled without restrictions."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_file_is_not_run(tmp_path, state, zipped):
    target, path = tmp_path / "owned", tmp_path / "a.pth"
    torch.save(state | {"extra": Malicious(str(target))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(OcrnetError, match=r"a\.pth' .* could run code, so it is refused"):
        weights.read(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # control: an unrestricted load does run it
    assert target.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_rejected(tmp_path, state, zipped, part):
    path = tmp_path / "a.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(OcrnetError, match=r"a\.pth"):
        weights.read(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], torch.zeros(3)])
def test_a_file_without_a_state_dict_is_rejected(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(OcrnetError, match="holds no state dict"):
        read(tmp_path / "a.pth")
