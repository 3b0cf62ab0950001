"""Our code, which does not use MindSpore, and MindSpore read each other's `.ckpt` files."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from ocrnet import architecture, weights
from ocrnet.architecture import Arch
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import ckpt, mindspore

ARCH = Arch(width=4, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8)
NUMBERS = {"Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64", "Float16", "Float32", "Float64"}


class Cell(nn.Cell):
    """A convolution and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, has_bias=True)
        self.bn1 = nn.BatchNorm2d(4)


def arrays() -> dict[str, np.ndarray]:
    found = {"bool": np.array([True, False, True])}
    for kind in NUMBERS:
        found[kind] = np.array([[0, 1], [2, 100]], ckpt.DTYPES[kind])
        found[f"{kind}, no axis"] = np.array(7, ckpt.DTYPES[kind])
    return found | {"special": np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)}


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape, found[name].tobytes())
        == (expected[name].dtype, expected[name].shape, expected[name].tobytes())
        for name in expected
    )


def loaded(path):
    return {name: parameter.asnumpy() for name, parameter in ms.load_checkpoint(str(path)).items()}


def test_mindspore_reads_what_we_write(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt, "SLICE", 16)  # so that larger tensors are written in slices
    ckpt.write(tmp_path / "a.ckpt", arrays())
    assert equal(loaded(tmp_path / "a.ckpt"), arrays())


@pytest.mark.parametrize("crc", [False, True])
def test_we_read_what_mindspore_writes(tmp_path, crc):
    listed = [{"name": name, "data": ms.Tensor(array)} for name, array in arrays().items()]
    half = ms.Tensor([1.5, -2.0, 3e38], ms.bfloat16)
    appended = {"epoch_num": 3, "note": "hé"}
    path = tmp_path / "a.ckpt"
    ms.save_checkpoint(
        [*listed, {"name": "half", "data": half}], str(path), crc_check=crc, append_dict=appended, format="ckpt"
    )
    found = ckpt.read(path)
    expected = half.astype(ms.float32).asnumpy()
    assert found.pop("half").tobytes() == expected.tobytes()
    assert (found.pop("epoch_num").item(), found.pop("note").item()) == (3, "hé")
    assert equal(found, arrays())


def test_we_read_slices_that_mindspore_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(ms.train.serialization, "SLICE_SIZE", 1)  # KiB
    array = np.arange(3000, dtype=np.float32).reshape(30, 100)
    ms.save_checkpoint([{"name": "x", "data": ms.Tensor(array)}], str(tmp_path / "a.ckpt"))
    assert (tmp_path / "a.ckpt").read_bytes().count(b"Float32") == 12
    assert equal(ckpt.read(tmp_path / "a.ckpt"), {"x": array})


def test_cell_name_gives_mindspores_parameter_names(tmp_path):
    cell = Cell()
    ms.save_checkpoint(cell, str(tmp_path / "a.ckpt"))
    assert set(ckpt.read(tmp_path / "a.ckpt")) == {
        mindspore.cell_name(f"{owner}.{part}")
        for owner, parts in {"conv1": ("weight", "bias"), "bn1": mindspore.NORM_PARTS}.items()
        for part in parts
    }


def test_mindspore_ignores_our_metadata_entry(tmp_path):
    state = architecture.init(ARCH, 3)
    weights.write_ckpt(tmp_path / "a.ckpt", state, {"config": {}})
    assert (tmp_path / "a.ckpt").stat().st_mode & 0o200  # unlike MindSpore's files, which are read-only
    parameters = ms.load_checkpoint(str(tmp_path / "a.ckpt"))
    own = {mindspore.canonical_name(n): p.asnumpy() for n, p in parameters.items() if n != weights.DOCUMENT}
    assert equal(own, state)
    cell = Cell()
    cell.conv1.weight.set_data(ms.Tensor(np.zeros((4, 3, 3, 3), np.float32)))
    few = {name: parameters[name] for name in (weights.DOCUMENT,)}
    few |= {name: ms.Parameter(ms.Tensor(p.asnumpy() + 1), name=name) for name, p in cell.parameters_dict().items()}
    missing, unused = ms.load_param_into_net(cell, few)
    assert (missing, unused) == ([], [weights.DOCUMENT])
    assert (cell.conv1.weight.asnumpy() == 1).all()


def test_encrypted_files_are_rejected_by_name(tmp_path):
    path = tmp_path / "a.ckpt"
    for mode in ("AES-GCM", "AES-CBC", "SM4-CBC"):
        data = [{"name": "x", "data": ms.Tensor(np.zeros(3, np.float32))}]
        ms.save_checkpoint(data, str(path), enc_key=b"0123456789abcdef", enc_mode=mode)
        with pytest.raises(OcrnetError, match=r"a\.ckpt is an encrypted MindSpore checkpoint"):
            weights.read(path)
