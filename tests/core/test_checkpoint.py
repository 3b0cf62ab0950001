import json
import os

import numpy as np
import pytest
import safetensors.numpy

from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint

META = {"step": 7, "config": {"lr_init": 0.01, "name": "Zürich 🚗"}, "best": {"mean_iou": None}, "threads": 2}


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "conv1.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "momentum/conv1.weight": rng.normal(size=(4, 3, 3, 3)),
        "steps": np.array(3, np.int64),
        "flags": np.array([True, False, True]),
        "half": np.arange(5, dtype=np.float16),
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype.newbyteorder("=")
        and np.array_equal(one[name], other[name])
        and one[name].shape == other[name].shape
        for name in one
    )


def test_round_trip(tmp_path, tensors):
    path = tmp_path / "new" / "folder" / "a.safetensors"
    checkpoint.save(path, tensors, META)
    read = checkpoint.load(str(path))
    assert same(read.tensors, tensors)
    assert read.path == path
    assert {key: read.meta[key] for key in META} == META
    assert read.meta.keys() - META.keys() == {"format", "sha256"}
    assert read.meta["format"] == 1
    assert checkpoint.read_meta(path) == read.meta
    assert os.listdir(path.parent) == ["a.safetensors"]
    read.tensors["steps"] += 1  # loaded arrays are writable, as training needs


@pytest.mark.parametrize(
    "dtype", ["?", "i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", ">f4", ">i8"]
)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3), (1, 1, 1, 1)])
def test_round_trip_of_dtypes_and_shapes(tmp_path, dtype, shape):
    array = (np.arange(np.prod(shape, dtype=int)).reshape(shape) * 3 - 1).astype(dtype)
    checkpoint.save(tmp_path / "a.safetensors", {"x": array}, {})
    assert same(checkpoint.load(tmp_path / "a.safetensors").tensors, {"x": array})


def test_special_values_and_views_come_back_bit_for_bit(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {
        "special": np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32),
        "transposed": base.T,
        "strided": base[::2, ::-1],
        "broadcast": np.broadcast_to(np.float32(2), (3, 2)),
    }
    checkpoint.save(tmp_path / "a.safetensors", arrays, {})
    read = checkpoint.load(tmp_path / "a.safetensors").tensors
    assert {name: read[name].tobytes() for name in arrays} == {name: arrays[name].tobytes() for name in arrays}


def test_a_checkpoint_may_hold_no_tensors(tmp_path):
    checkpoint.save(tmp_path / "a.safetensors", {}, META)
    assert checkpoint.load(tmp_path / "a.safetensors").tensors == {}


def test_equal_content_gives_equal_bytes_and_the_digest_ignores_the_order_of_names(tmp_path, tensors):
    checkpoint.save(tmp_path / "a", tensors, META)
    checkpoint.save(tmp_path / "b", dict(reversed(tensors.items())), META)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = checkpoint.load(tmp_path / "a")
    checkpoint.save(tmp_path / "c", again.tensors, again.meta)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def test_the_file_is_plain_safetensors_with_one_json_value(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tensors, META)
    assert same(safetensors.numpy.load_file(path), tensors)
    with safetensors.safe_open(path, framework="np") as file:
        stored = file.metadata()
    assert list(stored) == ["ocrnet"]
    assert json.loads(stored["ocrnet"])["config"] == META["config"]


def test_unsupported_values_are_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="meta 'best' is not strict JSON"):
        checkpoint.save(path, {}, {"step": 1, "best": {"mean_iou": float("nan")}})
    with pytest.raises(ValueError, match="meta 'best' is not strict JSON"):
        checkpoint.save(path, {}, {"best": np.float32(1)})
    with pytest.raises(ValueError, match="tensor 'z' is complex128"):
        checkpoint.save(path, {"z": np.zeros(2, complex)}, {})
    assert os.listdir(tmp_path) == []


def test_every_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "a.safetensors"
    small = {
        "a": np.arange(3, dtype=np.float32),
        "b": np.array(1e-6),
        "e": np.zeros((0, 2), np.int8),
        "f": np.ones(2, np.int8),
    }
    checkpoint.save(path, small, {"step": 10, "lr": 1e-06, "big": 1e22, "name": 'é 🚗 "q" \\'})
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    undetected, unnamed = [], []
    for position in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            path.write_bytes(bad)
            try:
                checkpoint.load(path)
            except OcrnetError as error:
                unnamed += [] if str(path) in str(error) else [str(error)]
            else:
                undetected.append((position, bit))
    assert undetected == unnamed == []
    assert header < len(good)
    path.write_bytes(good)
    checkpoint.load(path)


def test_every_changed_byte_of_the_header_is_detected(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"a": np.zeros(2), "b": np.ones(3, np.int32)}, {})
    good = path.read_bytes()
    for position in range(8, 8 + int.from_bytes(good[:8], "little")):
        for byte in {*b'\t\n\r ",0}CFIU'} - {good[position]}:  # F64 to C64 keeps the size
            path.write_bytes(good[:position] + bytes([byte]) + good[position + 1 :])
            with pytest.raises(OcrnetError):
                checkpoint.load(path)


def test_truncated_and_lengthened_files_are_detected(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tensors, META)
    good = path.read_bytes()
    for length in [*range(12), *range(12, len(good), 13), len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(OcrnetError, match=f"{path.name} is truncated or altered: .*; use an earlier checkpoint"):
            checkpoint.load(path)
    for tail in (b"\0", b"\n", good):
        path.write_bytes(good + tail)
        with pytest.raises(OcrnetError, match="truncated or altered"):
            checkpoint.load(path)


def header_of(document):
    text = document.encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "claims 0 bytes, the file has 0"),
        (b"PK\3\4" + bytes(100), "not a safetensors file"),
        (b"\x80\x02}q\0." * 20, "not a safetensors file"),
        ((10 * 2**30).to_bytes(8, "little") + b"{" + bytes(50), "claims 10,737,418,240 bytes, the file has 59"),
        (b"\xff" * 8 + b"{}", "claims 18,446,744,073,709,551,615 bytes"),
        (header_of("{}"), "not an ocrnet checkpoint"),
        (header_of('{"__metadata__": 3}'), "not an ocrnet checkpoint"),
        (header_of('{"__metadata__": {"ocrnet": "{}"}}'), "sha256 of its metadata does not match"),
        # Nested too deeply to parse, unless MindSpore is imported: it raises the recursion limit.
        (header_of('{"a":' * 5000 + "1" + "}" * 5000), "header is not JSON|not an ocrnet checkpoint"),
    ],
)
def test_files_that_are_not_checkpoints_are_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for read in (checkpoint.load, checkpoint.read_meta):
        with pytest.raises(OcrnetError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_a_foreign_safetensors_file_is_refused_with_a_remedy(tmp_path):
    path = tmp_path / "foreign.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(OcrnetError, match="with ocrnet convert"):
        checkpoint.load(path)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {}, {})
    monkeypatch.undo()
    with pytest.raises(OcrnetError, match="has checkpoint format 2, this version reads format 1; update ocrnet"):
        checkpoint.load(path)


def test_missing_files_and_folders_are_reported(tmp_path):
    with pytest.raises(OcrnetError, match=r"cannot read checkpoint .*a\.safetensors: No such file"):
        checkpoint.load(tmp_path / "a.safetensors")
    with pytest.raises(OcrnetError, match=r"cannot read checkpoint .*: Is a directory"):
        checkpoint.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OcrnetError, match=r"cannot write checkpoint .*a\.safetensors"):
        checkpoint.save(tmp_path / "file" / "a.safetensors", {}, {})
