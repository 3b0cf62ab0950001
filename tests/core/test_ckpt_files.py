"""MindSpore .ckpt files, read and written without MindSpore: format, damage, tensor names, network."""

import zlib

import numpy as np
import pytest

from ocrnet import architecture, weights
from ocrnet.architecture import Arch
from ocrnet.config import Backbone, Config, OcrHead, as_dict
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint, ckpt, mindspore

ARCH = Arch(width=4, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8)
PUBLIC_ARCH = Arch(**{**ARCH.__dict__, "variant": "mindspore"})
ATTENTION = "ocr_head.object_context_block.self_att"


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def record(tag, kind, dims, content):
    """Encode a record by hand, following only the protobuf definition."""
    shape = b"".join(b"\x08" + varint(dim) for dim in dims)
    return field(1, field(1, tag.encode()) + field(2, shape + field(2, kind.encode()) + field(3, content)))


def reversed_names():
    """Return {canonical name: name in the public MindSpore OCRNet}, by inverting our table."""
    owners = {ours: theirs for theirs, ours in mindspore.FAMILY.heads.items()}
    names = {}
    for name in architecture.shapes(PUBLIC_ARCH):
        owner, _, part = mindspore.cell_name(name).rpartition(".")
        if architecture.is_backbone(name):
            names[name] = f"backbone.{owner}.{part}".replace(".downsample.", ".down_sample.")
        elif name not in ("conv3x3_ocr.0.bias", "aux_head.0.bias"):
            names[name] = f"{owners[name.rpartition('.')[0]]}.{part}"
    return names


@pytest.fixture
def state():
    return architecture.init(ARCH, 3)


@pytest.fixture
def public_ocrnet():
    """The tensors of a checkpoint of the public MindSpore OCRNet: weights, ImageNet classifier, optimizer state."""
    state = architecture.init(PUBLIC_ARCH, 3)
    named = {theirs: state[ours] for ours, theirs in reversed_names().items()}
    named["backbone.classifier.weight"] = np.zeros((10, 20), np.float32)
    named["backbone.incre_modules.0.0.down_sample.1.moving_mean"] = np.zeros(128, np.float32)
    named["backbone.downsample_modules.2.0.weight"] = np.zeros((4, 4, 3, 3), np.float32)
    named["backbone.final_layer.1.gamma"] = np.zeros(8, np.float32)
    named |= {f"moments.{name}": array for name, array in list(named.items())[:9]}
    named |= {"global_step": np.zeros(1, np.int32), "scale_sense": np.array(2.0**16, np.float32)}
    named |= {"learning_rate": np.zeros(20, np.float32), "momentum": np.array(0.9, np.float32)}
    named |= {name: np.array(0, np.int32) for name in ("current_iterator_step", "last_overflow_iterator_step")}
    return named


def equal(loaded, expected):
    return loaded.keys() == expected.keys() and all(
        loaded[name].dtype == expected[name].dtype.newbyteorder("=")
        and loaded[name].shape == expected[name].shape
        and loaded[name].tobytes() == expected[name].astype(expected[name].dtype.newbyteorder("<")).tobytes()
        for name in expected
    )


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [*ckpt.DTYPES.values(), ">f4", ">i8"])
def test_round_trip(tmp_path, dtype, shape):
    array = (np.arange(np.prod(shape, dtype=int)).reshape(shape) * 3 - 1).astype(dtype)
    ckpt.write(tmp_path / "new" / "a.ckpt", {"x": array, "views": np.ones((3, 4), dtype).T[::2]})
    loaded = ckpt.read(tmp_path / "new" / "a.ckpt")
    assert equal(loaded, {"x": array, "views": np.ones((2, 3), dtype)})
    loaded["x"] += loaded["x"]  # loaded arrays are writable, as training needs
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]


def test_written_bytes_follow_the_format(tmp_path):
    array = np.arange(200, dtype=np.float32).reshape(2, 100)
    ckpt.write(tmp_path / "a.ckpt", {"a.b": array, "scalar": np.array(3, np.int64)})
    expected = record("a.b", "Float32", (2, 100), array.tobytes()) + record("scalar", "Int64", (), b"\3" + bytes(7))
    assert (tmp_path / "a.ckpt").read_bytes() == expected


def test_other_content_that_mindspore_writes_is_read(tmp_path):
    content = record("half", "BFloat16", (3,), bytes.fromhex("c03f 00c0 807f"))
    content += record("old scalar", "Float32", (0,), bytes(4)) + record("note", "str", (0,), "hé".encode("utf-32-le"))
    (tmp_path / "a.ckpt").write_bytes(content + b"crc_num" + zlib.crc32(content).to_bytes(10, "big"))
    loaded = ckpt.read(tmp_path / "a.ckpt")
    assert loaded["half"].dtype == np.float32
    assert loaded["half"].tolist() == [1.5, -2.0, np.inf]
    assert (loaded["old scalar"].shape, loaded["note"].item()) == ((), "hé")


def test_large_tensors_are_written_as_slices_with_one_tag(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt, "SLICE", 100)
    arrays = {"a": np.arange(60, dtype=np.float32).reshape(3, 20), "b": np.arange(25, dtype=np.float32)}
    ckpt.write(tmp_path / "a.ckpt", arrays)
    parts = [arrays["a"].tobytes()[begin : begin + 100] for begin in (0, 100, 200)]
    expected = b"".join(record("a", "Float32", (3, 20), part) for part in parts)
    assert (tmp_path / "a.ckpt").read_bytes().startswith(expected)
    assert equal(ckpt.read(tmp_path / "a.ckpt"), arrays)
    (tmp_path / "a.ckpt").write_bytes(expected[: -len(record("a", "Float32", (3, 20), parts[-1]))])
    with pytest.raises(OcrnetError, match=r"'a' Float32 \(3, 20\) has 200 bytes"):
        ckpt.read(tmp_path / "a.ckpt")


def test_unsupported_tensors_are_not_written(tmp_path):
    for array in (np.zeros(2, complex), np.array("text"), np.zeros((0, 3), np.float32)):
        with pytest.raises(ValueError, match=r"'x' .* cannot be stored in a \.ckpt file"):
            ckpt.write(tmp_path / "a.ckpt", {"x": array})
    assert not list(tmp_path.iterdir())


GOOD = record("a", "Float32", (2,), bytes(8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello", "not a MindSpore checkpoint"),
        (b"\xd8\x5e\x3a\x7f" + bytes(40), "encrypted MindSpore checkpoint"),
        (b"\xd9\x5e\x3a\x7f" + bytes(40), "encrypted MindSpore checkpoint"),
        (b"\n", "ends within the length"),
        (b"\n" + b"\xff" * 11, "not a valid number"),
        (b"\n\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "claims 9,223,372,036,854,775,807 bytes"),
        (GOOD + b"\n\x05\n", f"record at byte {len(GOOD)} claims 5 bytes and is truncated"),
        (GOOD + b"\0", "unexpected data follows the tensors"),
        (GOOD + b"crc_num" + bytes(9), "unexpected data follows the tensors"),
        (GOOD + b"crc_num" + bytes(10), "CRC-32"),
        (field(1, b"\xff"), "does not parse"),
        (field(1, b""), "not a named tensor"),
        (field(1, field(1, b"a")), "not a named tensor"),
        (field(1, field(1, b"a") + field(2, field(2, b"Float32"))), "not a named tensor"),
        (field(1, field(1, b"map") + field(3, b"")), "not a named tensor"),
        (field(1, field(1, b"\xff\xfe") + field(2, field(2, b"Int8") + field(3, b"x"))), "does not parse"),
        (record("a", "Float32", (2,), bytes(7)), r"'a' Float32 \(2,\) has 7 bytes"),
        (record("a", "Float32", (3,), bytes(8)), r"'a' Float32 \(3,\) has 8 bytes"),
        (record("a", "Float32", (0,), b""), r"'a' Float32 \(\) has 0 bytes"),
        (record("a", "Float32", (2**63, 2), bytes(8)), "has 8 bytes"),
        (record("a", "Float32", (2**64 - 1, 2**64 - 2), bytes(8)), r"\(-1, -2\) has 8 bytes"),
        (record("a", "Int4", (2,), b"x"), "'a' is Int4, which this version cannot read"),
        (GOOD + record("b", "Int8", (1,), b"x") + GOOD, "'a' occurs twice"),
        (record("a", "Int8", (2,), b"x") + record("a", "UInt8", (2,), b"x"), "different shapes or types"),
        (record("a", "Int8", (2,), b"x") + record("a", "Int8", (1, 2), b"x"), "different shapes or types"),
        (record("a", "str", (0,), b"\xff\xff\xff\xff"), "does not decode"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(tmp_path, content, message):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    for read in (ckpt.read, weights.read):
        with pytest.raises(OcrnetError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(OcrnetError, match=r"none\.ckpt.*No such file"):
        ckpt.read(tmp_path / "none.ckpt")
    with pytest.raises(OcrnetError, match=r"none\.ckpt.*No such file"):
        weights.read(tmp_path / "none.ckpt")


def test_cell_names_map_to_canonical_names_and_back():
    for variant in architecture.VARIANTS:
        names = list(architecture.shapes(Arch(variant=variant)))
        cells = [mindspore.cell_name(name) for name in names]
        assert [mindspore.canonical_name(name) for name in cells] == names
        assert len(set(cells)) == len(names)
    assert mindspore.cell_name("layer1.0.bn3.running_var") == "layer1.0.bn3.moving_variance"
    assert mindspore.cell_name("stage2.0.fuse_layers.0.1.1.weight") == "stage2.0.fuse_layers.0.1.1.gamma"
    assert mindspore.cell_name("stage2.0.fuse_layers.0.1.0.weight") == "stage2.0.fuse_layers.0.1.0.weight"
    assert mindspore.cell_name("aux_head.0.bias") == "aux_head.0.bias"
    assert mindspore.cell_name("aux_head.1.bias") == "aux_head.1.beta"


def test_our_own_file_stores_its_network(tmp_path, state):
    path = tmp_path / "a.ckpt"
    head = OcrHead(channels=16, key_channels=8, variant="mmseg", align_corners=True)
    meta = {
        "config": as_dict(Config(backbone=Backbone(width=4), ocr_head=head)),
        "step": 7,
        "classes": {"names": ["é"]},
    }
    weights.write_ckpt(path, state | {"momentum/conv1.weight": state["conv1.weight"]}, meta)
    loaded = weights.read(path)
    assert equal(loaded.tensors, state)
    assert loaded.arch == Arch(**{**ARCH.__dict__, "variant": "mmseg", "align_corners": True})
    assert {key: loaded.meta[key] for key in meta} == meta


def test_our_names_without_metadata_mean_the_authors_network(tmp_path, state):
    cells = {mindspore.cell_name(name): array for name, array in state.items()}
    ckpt.write(tmp_path / "a.bin", cells | {"epoch_num": np.array(3), "moments.conv1.weight": np.ones(3)})
    loaded = weights.read(tmp_path / "a.bin")  # recognized by its content, not by its file name
    assert (loaded.arch, loaded.meta) == (ARCH, {})
    assert equal(loaded.tensors, state)


def write_files(tmp_path, state, public_ocrnet):
    weights.write_ckpt(tmp_path / "own.ckpt", state, {"config": {}})
    ckpt.write(tmp_path / "bare.ckpt", {mindspore.cell_name(name): array for name, array in state.items()})
    named = {name: array for name, array in public_ocrnet.items() if name in reversed_names().values()}
    ckpt.write(tmp_path / "public_ocrnet.ckpt", named)
    return [tmp_path / f"{name}.ckpt" for name in ("own", "bare", "public_ocrnet")]


def test_truncated_files_are_refused(tmp_path, state, public_ocrnet):
    for path in write_files(tmp_path, state, public_ocrnet):
        good = path.read_bytes()
        weights.read(path)
        for length in {*(len(good) * i // 50 for i in range(50)), *range(1, 12), len(good) - 1}:
            path.write_bytes(good[:length])
            with pytest.raises(OcrnetError, match=path.name):
                weights.read(path)


def test_files_truncated_between_two_tensors_are_refused(tmp_path, state, public_ocrnet):
    for path in write_files(tmp_path, state, public_ocrnet):
        good, ends = path.read_bytes(), [0]
        for name, array in ckpt.read(path).items():
            ends.append(ends[-1] + len(next(ckpt._records(name, array))))
        assert ends.pop() == len(good)
        for end in (*ends[:2], *ends[2:-1:17], ends[-1]):
            path.write_bytes(good[:end])
            with pytest.raises(OcrnetError, match=path.name):
                weights.read(path)


def test_a_flipped_bit_in_our_own_file_is_detected(tmp_path, state):
    """Only our own files always have a checksum; in other files, the CRC is optional."""
    path = tmp_path / "own.ckpt"
    weights.write_ckpt(path, state, {"config": {}})
    good = path.read_bytes()
    middle = good.index(b"bn1.gamma")
    places = [*range(24), *range(middle - 20, middle + 30), *range(len(good) - 4, len(good))]
    undetected = []
    for place in places:
        for bit in range(8) if place < 24 else (0, 5):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            path.write_bytes(bad)
            try:
                weights.read(path)
            except OcrnetError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                undetected.append((place, bit))
    assert undetected == []


@pytest.mark.parametrize("tag", [b"\ttag", b"\x1a", b"", "é".encode("latin1")])
def test_a_renamed_tensor_is_refused(tmp_path, state, tag):
    path = tmp_path / "bare.ckpt"
    ckpt.write(path, {mindspore.cell_name(name): array for name, array in state.items()})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x09bn1.gamma", bytes([9]) + tag.ljust(9, b"x"), 1))
    with pytest.raises(OcrnetError, match=r"bare\.ckpt"):
        weights.read(path)


def test_the_public_mindspore_ocrnet_is_read(tmp_path, public_ocrnet):
    ckpt.write(tmp_path / "a.ckpt", public_ocrnet)
    loaded = weights.read(tmp_path / "a.ckpt")
    expected = architecture.init(PUBLIC_ARCH, 3)
    zeros = {"conv3x3_ocr.0.bias": np.zeros(16, np.float32), "aux_head.0.bias": np.zeros(60, np.float32)}
    assert (loaded.arch, loaded.meta) == (PUBLIC_ARCH, {})
    assert equal(loaded.tensors, expected | zeros)


# Copied from the sources named in ocrnet/weights/mindspore.py, and checked against Cells built from them.
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.conv1.weight", "conv1.weight"),
        ("backbone.bn2.moving_variance", "bn2.running_var"),
        ("backbone.layer1.0.down_sample.0.weight", "layer1.0.downsample.0.weight"),
        ("backbone.layer1.0.down_sample.1.gamma", "layer1.0.downsample.1.weight"),
        ("backbone.transition1.0.1.beta", "transition1.0.1.bias"),
        ("backbone.transition1.1.0.0.weight", "transition1.1.0.0.weight"),
        ("backbone.stage3.0.branches.2.0.bn1.moving_mean", "stage3.0.branches.2.0.bn1.running_mean"),
        ("backbone.stage4.0.fuse_layers.3.0.2.1.gamma", "stage4.0.fuse_layers.3.0.2.1.weight"),
        ("fcn_head.convs.0.conv.0.weight", "aux_head.0.weight"),
        ("fcn_head.convs.0.conv.1.moving_mean", "aux_head.1.running_mean"),
        ("fcn_head.conv_seg.bias", "aux_head.3.bias"),
        ("ocr_head.bottleneck.conv.0.weight", "conv3x3_ocr.0.weight"),
        ("ocr_head.bottleneck.conv.1.gamma", "conv3x3_ocr.1.weight"),
        ("ocr_head.conv_seg.weight", "cls_head.weight"),
        ("ocr_head.object_context_block.bottleneck.conv.0.weight", f"{architecture.BOTTLENECK}.0.weight"),
        ("ocr_head.object_context_block.bottleneck.conv.1.beta", f"{architecture.BOTTLENECK}.1.0.bias"),
        (f"{ATTENTION}.query_project.0.conv.0.weight", f"{architecture.BLOCK}.f_pixel.0.weight"),
        (f"{ATTENTION}.query_project.1.conv.1.gamma", f"{architecture.BLOCK}.f_pixel.3.0.weight"),
        (f"{ATTENTION}.key_project.0.conv.1.beta", f"{architecture.BLOCK}.f_object.1.0.bias"),
        (f"{ATTENTION}.key_project.1.conv.0.weight", f"{architecture.BLOCK}.f_object.2.weight"),
        (f"{ATTENTION}.value_project.conv.0.weight", f"{architecture.BLOCK}.f_down.0.weight"),
        (f"{ATTENTION}.out_project.conv.1.moving_variance", f"{architecture.BLOCK}.f_up.1.0.running_var"),
    ],
)
def test_names_of_the_public_mindspore_ocrnet_are_mapped(theirs, ours):
    one = np.zeros(1, np.float32)
    assert ours in mindspore.FAMILY.canonical({theirs: one}).tensors
    assert ours in architecture.shapes(PUBLIC_ARCH)


@pytest.mark.parametrize("name", ["ocr_head.extra.weight", "fcn_head.conv_cat.conv.0.weight", "neck.x", "moment"])
def test_an_unknown_name_is_refused(tmp_path, public_ocrnet, name):
    ckpt.write(tmp_path / "a.ckpt", public_ocrnet | {name: np.zeros(1, np.float32)})
    with pytest.raises(OcrnetError, match=rf"a\.ckpt: .*1 unexpected: {name}"):
        weights.read(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("backbone.conv9.weight", r"1 unexpected: conv9\.weight"),
        ("backbone.cls_head.weight", r"1 unexpected: backbone\.cls_head\.weight"),
    ],
)
def test_an_unknown_name_in_the_backbone_is_refused(tmp_path, public_ocrnet, name, message):
    ckpt.write(tmp_path / "a.ckpt", public_ocrnet | {name: np.zeros(1, np.float32)})
    with pytest.raises(OcrnetError, match=rf"a\.ckpt: .*{message}"):
        weights.read(tmp_path / "a.ckpt")


def test_one_tensor_under_two_names_is_refused(tmp_path, state):
    cells = {mindspore.cell_name(name): array for name, array in state.items()}
    ckpt.write(tmp_path / "a.ckpt", cells | {"bn1.weight": cells["bn1.gamma"]})
    with pytest.raises(OcrnetError, match=r"a\.ckpt: .*two tensors for 'bn1\.weight'"):
        weights.read(tmp_path / "a.ckpt")


def test_an_unexpected_tensor_in_our_namespace_is_refused(tmp_path, state):
    cells = {mindspore.cell_name(name): array for name, array in state.items()}
    ckpt.write(tmp_path / "a.ckpt", cells | {"ocrnet/meta": np.zeros(3)})
    with pytest.raises(OcrnetError, match=r"a\.ckpt: .*1 unexpected: ocrnet/meta"):
        weights.read(tmp_path / "a.ckpt")


def test_a_file_of_another_network_is_refused(tmp_path):
    ckpt.write(tmp_path / "a.ckpt", {"fc.weight": np.zeros((3, 3), np.float32)})
    with pytest.raises(OcrnetError, match=r"a\.ckpt: .*not from an OCRNet"):
        weights.read(tmp_path / "a.ckpt")


def test_a_safetensors_file_with_a_ckpt_name_is_read(tmp_path, state):
    checkpoint.save(tmp_path / "a.ckpt", state, {"config": {}})
    assert weights.read(tmp_path / "a.ckpt").arch == ARCH


def test_a_backbone_is_read_from_mindcv_or_from_a_whole_network(tmp_path, state, public_ocrnet, caplog):
    backbone = {name: array for name, array in state.items() if architecture.is_backbone(name)}
    mindcv = {mindspore.cell_name(name).replace(".downsample.", ".down_sample."): a for name, a in backbone.items()}
    assert "layer1.0.down_sample.1.gamma" in mindcv
    beyond = {"classifier.bias": np.zeros(9, np.float32), "incre_modules.0.0.bn1.gamma": np.zeros(9, np.float32)}
    ckpt.write(tmp_path / "mindcv.ckpt", mindcv | beyond)
    ckpt.write(tmp_path / "public_ocrnet.ckpt", public_ocrnet)
    weights.write_ckpt(tmp_path / "own.ckpt", state, {})
    for name in ("mindcv", "public_ocrnet", "own"):
        caplog.clear()
        assert equal(weights.read_backbone(tmp_path / f"{name}.ckpt", ARCH), backbone)
        (report,) = caplog.messages
        assert "0 missing" in report
        if name == "mindcv":
            assert "2 not used (classifier, incre_modules)" in report
    mindcv.pop("bn1.beta")
    ckpt.write(tmp_path / "mindcv.ckpt", mindcv)
    with pytest.raises(OcrnetError, match=r"mindcv\.ckpt' does not match .* 1 missing \(bn1\.bias\)"):
        weights.read_backbone(tmp_path / "mindcv.ckpt", ARCH)
