"""Weights of every family, read from files, give the logits of the family's own network."""

import dataclasses
import json
import pickle
import struct

import numpy as np
import pytest
import safetensors.numpy
import torch
from family_nets import (
    Authors,
    Classifier,
    HRNet,
    Mindcv,
    MindSpore,
    Mmseg,
    Nvidia,
    Openseg,
    OpensegInplace,
    Paddle,
    PaddleHRNet,
    fill,
)

import ocrnet
from ocrnet import architecture, weights
from ocrnet.architecture import Arch
from ocrnet.cli.main import main
from ocrnet.config import Config
from ocrnet.distributed.launcher import World
from ocrnet.engines.factory import open_engine
from ocrnet.weights import checkpoint, ckpt

SIZES = [(72, 104), (65, 97)]  # an even size, where sizes of branches become odd, and an odd size
OPENSEG = {"data": {"mean": [0.406, 0.456, 0.485], "std": [0.225, 0.224, 0.229]}}
PADDLE = {"data": {"mean": [0.5] * 3, "std": [0.5] * 3}}


def save_torch(state, path):
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)


def save_authors(state, path):
    torch.save({f"model.{name}": x for name, x in state.items()} | {"loss.criterion.weight": torch.ones(19)}, path)


def save_mmseg(state, path):
    torch.save({"meta": {"mmseg_version": "1.2.2"}, "state_dict": state, "optimizer": {}}, path)


def save_safetensors(state, path):
    safetensors.numpy.save_file({k: v.numpy() for k, v in state.items()}, path, metadata={"format": "pt"})


def save_paddle(state, path):
    arrays = {name: x.numpy() for name, x in state.items()}
    path.write_bytes(pickle.dumps(arrays | {"StructuredToParameterName@@": dict.fromkeys(arrays, "w")}, protocol=2))


class PaddleTensor:
    """Is pickled as paddle.save pickles a tensor outside a plain state dict."""

    def __init__(self, name, array):
        self.pair = name, array

    def __reduce__(self):
        return tuple, (self.pair,)


def save_paddle_pairs(state, path):
    tensors = {name: PaddleTensor(f"p_{name}", x.numpy()) for name, x in state.items()}
    path.write_bytes(pickle.dumps({"model_state": tensors, "epoch": 3}, protocol=4))


def save_ckpt(state, path):
    arrays = {name: x.numpy() for name, x in state.items()}
    moments = {f"moments.{name}": array for name, array in list(arrays.items())[:5]}
    ckpt.write(path, arrays | moments | {"global_step": np.array(7), "learning_rate": np.zeros(9, np.float32)})


# The family's network; its width, blocks, modules, classes, channels, keys; how its files are saved; our metadata.
FAMILIES = {
    "hrnet": (Authors, (6, 1, (1, 2, 1), 5, 16, 8), save_authors, "a.pth", {}),
    "openseg": (Openseg, (4, 2, (1, 1, 1), 4, 12, 6), save_torch, "a.pth", OPENSEG),
    "openseg_inplace": (OpensegInplace, (4, 1, (1, 1, 2), 3, 16, 8), save_torch, "a.pth", OPENSEG),
    "nvidia": (Nvidia, (5, 1, (1, 1, 1), 7, 16, 8), save_torch, "a.pth", {}),
    "mmseg": (Mmseg, (6, 1, (1, 1, 1), 2, 16, 8), save_mmseg, "a.pth", {}),
    "mmseg safetensors": (Mmseg, (4, 1, (1, 1, 1), 19, 16, 8), save_safetensors, "a.bin", {}),
    "paddleseg": (Paddle, (4, 1, (1, 2, 1), 6, 16, 8), save_paddle, "a.pdparams", PADDLE),
    "paddleseg pairs": (Paddle, (5, 2, (2, 1, 1), 4, 8, 12), save_paddle_pairs, "a.pdparams", PADDLE),
    "mindspore": (MindSpore, (4, 1, (1, 1, 1), 5, 16, 256), save_ckpt, "a.ckpt", {}),
}
LEFT_OUT = {"nvidia": "scale_attn (", "mindspore": "classifier (2)", "hrnet": "loss (1)"}
BGR = ("openseg", "openseg_inplace")


def image(size):
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, *size), dtype=np.float32))


def largest_difference(actual, expected):
    return float(np.abs(actual - expected.numpy()).max() / expected.abs().max())


@pytest.fixture(params=FAMILIES)
def saved(request, tmp_path):
    network, sizes, save, name, meta = FAMILIES[request.param]
    net = fill(network(*sizes))
    save(net.state_dict(), tmp_path / name)
    return request.param, net, sizes, tmp_path / name, meta


@torch.no_grad()
def test_logits_equal_those_of_the_familys_network(saved, tmp_path, capsys):
    family, net, sizes, path, meta = saved
    variant = family.split()[0]
    keys = ("width", "blocks", "modules", "num_classes", "channels", "key_channels")
    arch = Arch(**dict(zip(keys, sizes, strict=True)), variant=variant)
    found = weights.read(path)
    assert found.arch == arch
    assert found.meta == ({"config": meta} if meta else {})
    assert main(["convert", "--input", str(path), "--output", str(tmp_path / "ours.safetensors")]) == 0
    report = capsys.readouterr().out
    total = len(architecture.shapes(arch))
    assert f"{total} tensors loaded, 0 missing, 0 unexpected" in report
    assert LEFT_OUT.get(family, "") in report
    assert f"align_corners {arch.rule.align_corners}" in report
    assert ("7 biases folded" in report) == (variant in ("openseg", "openseg_inplace", "paddleseg"))
    assert ("2 biases that the family lacks are 0" in report) == (variant in ("mmseg", "mindspore"))
    direct, converted = ocrnet.load(path), ocrnet.load(tmp_path / "ours.safetensors")
    assert converted.arch == arch
    for size in SIZES:
        x = image(size)
        expected = net(x.flip(1) if family in BGR else x)
        for ours, theirs in zip(direct.logits(x.numpy()), expected, strict=True):
            assert ours.shape == tuple(theirs.shape)
            assert largest_difference(ours, theirs) < 1e-5
        for one, other in zip(direct.logits(x.numpy()), converted.logits(x.numpy()), strict=True):
            np.testing.assert_array_equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["nvidia", "mmseg", "paddleseg"])
def test_the_authors_layer_rules_give_other_logits(variant, tmp_path):
    """The negative control: a family with the authors' shapes gives other logits with the authors' rules."""
    network, sizes, save, name, _ = FAMILIES[variant]
    net = fill(network(*sizes))
    save(net.state_dict(), tmp_path / name)
    found = weights.read(tmp_path / name)
    engine = open_engine(Config(device_target="CPU"), dataclasses.replace(found.arch, variant="hrnet"), world=World())
    engine.restore(found.tensors, 0)
    x = image(SIZES[0])
    assert largest_difference(engine.logits(x.numpy())[1], net(x)[1]) > 1e-3


def test_the_checkpoint_records_its_source(saved, tmp_path):
    _, _, _, path, meta = saved
    main(["convert", "--input", str(path), "--output", str(tmp_path / "ours.safetensors")])
    metadata = checkpoint.read_meta(tmp_path / "ours.safetensors")
    assert metadata["source"]["file"] == path.name
    assert len(metadata["source"]["sha256"]) == 64
    assert metadata["config"].get("data") == meta.get("data")


@torch.no_grad()
def test_predictions_normalize_as_the_family_does(tmp_path):
    image_array = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    scaled = torch.from_numpy(image_array).permute(2, 0, 1)[None] / 255
    for family, mean, std in (
        ("paddleseg", [0.5] * 3, [0.5] * 3),
        ("openseg", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ):
        network, sizes, save, name, _ = FAMILIES[family]
        net = fill(network(*sizes))
        save(net.state_dict(), tmp_path / name)
        x = scaled.flip(1) if family in BGR else scaled
        logits = net((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[1]
        align_corners = architecture.VARIANTS[family].align_corners
        full = torch.nn.functional.interpolate(logits, (64, 96), mode="bilinear", align_corners=align_corners)
        found = ocrnet.load(tmp_path / name).probabilities(image_array)
        assert np.abs(found - full.softmax(1)[0].numpy()).max() < 1e-4


BACKBONES = {
    "authors.pth": (Classifier, save_torch, "(classifier, downsamp_modules, final_layer, incre_modules)"),
    "timm.safetensors": (Classifier, save_safetensors, "nearest-neighbor"),
    "bare.pth": (HRNet, save_torch, "0 not used"),
    "mindcv.ckpt": (Mindcv, save_ckpt, "(classifier, downsample_modules, final_layer, global_step"),
    "ssld.pdparams": (PaddleHRNet, save_paddle, "PaddleSeg"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_are_read_and_converted(name, tmp_path, capsys, caplog):
    network, save, message = BACKBONES[name]
    net = fill(network(4, 1, (1, 2, 1)))
    save(net.state_dict(), tmp_path / name)
    arch = Arch(width=4, blocks=1, modules=(1, 2, 1), num_classes=5, channels=16, key_channels=8)
    found = weights.read_backbone(tmp_path / name, arch)
    (report,) = caplog.messages
    assert message in report
    assert set(found) == {key for key in architecture.shapes(arch) if architecture.is_backbone(key)}
    if name != "ssld.pdparams":  # its names differ; the test of logits above compares its values
        reference = {k: v.numpy() for k, v in net.state_dict().items()}
        ours = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        for key, array in reference.items():
            owner, _, part = key.replace("down_sample", "downsample").rpartition(".")
            if (canonical := f"{owner}.{ours.get(part, part)}") in found:
                np.testing.assert_array_equal(found.pop(canonical), array)
        assert not found
    output = tmp_path / "ours.safetensors"
    assert main(["convert", "--input", str(tmp_path / name), "--output", str(output)]) == 0
    assert "a backbone, for --set backbone.pretrained=True" in capsys.readouterr().out
    again = weights.read_backbone(output, arch)
    first = weights.read_backbone(tmp_path / name, arch)
    assert all(np.array_equal(again[key], first[key]) for key in first)
    assert main(["predict", "docs/pictures", "--checkpoint_path", str(output)]) == 2  # it has no heads
    assert "not from an OCRNet" in capsys.readouterr().err


def test_the_authors_weights_give_the_authors_outputs(tmp_path, fixture):
    output = tmp_path / "ours.safetensors"
    assert main(["convert", "--input", str(fixture / "state_dict.pth"), "--output", str(output)]) == 0
    model = ocrnet.load(output, engine="torch")
    for case in ("case_a", "case_b"):
        expected = torch.load(fixture / f"{case}.pth", weights_only=True)
        aux, ocr = model.logits(expected["x"].numpy())
        np.testing.assert_allclose(aux, expected["aux"].numpy(), atol=1e-5)
        np.testing.assert_allclose(ocr, expected["ocr"].numpy(), atol=1e-5)


def test_the_converted_file_is_kept(tmp_path):
    """A run that saves a checkpoint removes the .ckpt file of the same name; here that file is the input."""
    network, sizes, save, _, _ = FAMILIES["mindspore"]
    save(fill(network(*sizes)).state_dict(), tmp_path / "net.ckpt")
    content = (tmp_path / "net.ckpt").read_bytes()
    argv = ["convert", "--input", str(tmp_path / "net.ckpt"), "--output", str(tmp_path / "net.safetensors")]
    assert main(argv) == 0
    assert (tmp_path / "net.ckpt").read_bytes() == content
    assert main(argv) == 2  # an existing output is not overwritten either


# Missing and unexpected tensors.


def convert_altered(tmp_path, missing, unexpected=()):
    """Save mmseg weights without some tensors and with others; return the arguments of the convert command."""
    network, sizes, save, name, _ = FAMILIES["mmseg"]
    state = fill(network(*sizes)).state_dict()
    for key in missing:
        del state[key]
    save(state | {key: torch.zeros(2) for key in unexpected}, tmp_path / name)
    return ["convert", "--input", str(tmp_path / name), "--output", str(tmp_path / "ours.safetensors")]


def test_missing_tensors_are_an_error_unless_allowed(tmp_path, capsys):
    missing = ["decode_head.1.conv_seg.weight", "backbone.stage3.0.branches.1.0.bn2.running_var"]
    argv = convert_altered(tmp_path, missing)
    assert main(argv) == 2
    assert "cls_head.weight" in capsys.readouterr().err
    assert not (tmp_path / "ours.safetensors").exists()
    assert main([*argv, "--allow_partial"]) == 0
    output = capsys.readouterr().out
    assert "2 missing, 0 unexpected" in output
    assert "stage3.0.branches.1.0.bn2.running_var, cls_head.weight" in output
    found = weights.read(tmp_path / "ours.safetensors")
    assert (found.arch.num_classes, found.arch.variant) == (2, "mmseg")
    fresh = architecture.init(found.arch, 0)
    np.testing.assert_array_equal(found.tensors["cls_head.weight"], fresh["cls_head.weight"])


def test_unexpected_tensors_are_an_error_unless_allowed(tmp_path, capsys):
    argv = convert_altered(tmp_path, [], ["auxiliary_head.conv_seg.weight"])
    assert main(argv) == 2
    assert "1 unexpected: auxiliary_head.conv_seg.weight" in capsys.readouterr().err
    assert main([*argv, "--allow_partial", "True"]) == 0
    assert "unexpected, left out: auxiliary_head.conv_seg.weight" in capsys.readouterr().out


# Conversion to other implementations.


@pytest.mark.parametrize("family", ["hrnet", "mmseg", "mindspore"])
def test_converting_there_and_back_keeps_every_tensor(family, tmp_path, capsys):
    network, sizes, save, name, _ = FAMILIES[family]
    net = fill(network(*sizes))
    state = net.state_dict()
    save(state, tmp_path / name)
    output = tmp_path / f"back{'.ckpt' if family == 'mindspore' else '.pth'}"
    assert main(["convert", "--input", str(tmp_path / name), "--output", str(output), "--to", family]) == 0
    if family == "mindspore":
        found = {key: torch.from_numpy(array) for key, array in ckpt.read(output).items()}
        state = {
            key: x
            for key, x in state.items()
            if not key.startswith(("backbone.incre", "backbone.downsample_m", "backbone.final", "backbone.class"))
        }
    else:
        found = torch.load(output, weights_only=True)
        found = (
            found["state_dict"] if family == "mmseg" else {key.removeprefix("model."): x for key, x in found.items()}
        )
    assert list(found) == list(state) or set(found) == set(state)
    for key, x in state.items():
        assert (found[key].dtype, found[key].shape) == (x.dtype, x.shape)
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(found[key], x), key
    if family == "hrnet":  # strict, as in the authors' own loader
        net.load_state_dict(found)
    assert "names of" in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize("family", ["mmseg", "mindspore"])
def test_biases_are_folded_for_families_without_them(family, tmp_path):
    network, sizes, *_ = FAMILIES[family]
    keys = ("width", "blocks", "modules", "num_classes", "channels", "key_channels")
    arch = Arch(**dict(zip(keys, sizes, strict=True)), variant=family)
    rng = np.random.default_rng(1)
    state = {}
    for name, array in architecture.init(arch, 3).items():
        state[name] = array + rng.uniform(0, 0.3, array.shape).astype(np.float32) * (array.ndim == 1)
    assert np.abs(state["conv3x3_ocr.0.bias"]).min() > 0
    meta = {"config": {"ocr_head": {"variant": family, "align_corners": None}}}
    checkpoint.save(tmp_path / "ours.safetensors", state, meta)
    output = tmp_path / ("theirs.ckpt" if family == "mindspore" else "theirs.pth")
    argv = ["convert", "--input", str(tmp_path / "ours.safetensors"), "--output", str(output), "--to", family]
    assert main(argv) == 0
    net = fill(network(*sizes))
    if family == "mindspore":
        named = {key: torch.from_numpy(array) for key, array in ckpt.read(output).items()}
    else:
        named = torch.load(output, weights_only=True)["state_dict"]
    assert not net.load_state_dict(named, strict=False).unexpected_keys
    x = image(SIZES[0])
    for ours, theirs in zip(ocrnet.load(tmp_path / "ours.safetensors").logits(x.numpy()), net(x), strict=True):
        assert largest_difference(ours, theirs) < 1e-5


NOT_CONVERTIBLE = [
    ("hrnet", "mmseg", "align_corners False"),
    ("hrnet", "mindspore", "eps 0.0001"),
    ("mmseg", "hrnet", "branches are resized twice"),
    ("mmseg", "mindspore", "3x3 bottleneck"),
    ("mindspore", "hrnet", "3x3 bottleneck"),
    ("mindspore", "mmseg", "nearest-neighbor"),
    ("paddleseg", "hrnet", "pad (0, 1)"),
    ("paddleseg", "mmseg", "pad (0, 1)"),
    ("openseg", "hrnet", "3x3 auxiliary head"),
    ("openseg_inplace", "hrnet", "leaky ReLU"),
    ("nvidia", "mmseg", "branches are resized twice"),
]


@pytest.mark.parametrize(("family", "to", "reason"), NOT_CONVERTIBLE)
def test_networks_that_another_family_cannot_express_are_rejected(family, to, reason, tmp_path, capsys):
    network, sizes, save, name, _ = FAMILIES[family]
    save(fill(network(*sizes)).state_dict(), tmp_path / name)
    output = tmp_path / ("out.ckpt" if to == "mindspore" else "out.pth")
    assert main(["convert", "--input", str(tmp_path / name), "--output", str(output), "--to", to]) == 2
    assert reason in capsys.readouterr().err
    assert not output.exists()


@torch.no_grad()
def test_nvidias_network_converts_to_the_authors_code_with_a_setting(tmp_path, capsys):
    network, sizes, save, name, _ = FAMILIES["nvidia"]
    save(fill(network(*sizes)).state_dict(), tmp_path / name)
    output = tmp_path / "out.pth"
    assert main(["convert", "--input", str(tmp_path / name), "--output", str(output), "--to", "hrnet"]) == 0
    assert "set MODEL.ALIGN_CORNERS: False" in capsys.readouterr().out
    assert weights.read(output).arch.num_classes == 7


def test_half_precision_is_read(tmp_path):
    network, sizes, save, name, _ = FAMILIES["mmseg"]
    state = {key: x.half() if x.is_floating_point() else x for key, x in fill(network(*sizes)).state_dict().items()}
    save(state, tmp_path / name)
    found = weights.read(tmp_path / name)
    assert {array.dtype for array in found.tensors.values()} == {np.dtype(np.float32)}
    bfloat = {key: x.bfloat16() if x.is_floating_point() else x for key, x in state.items()}
    save(bfloat, tmp_path / name)
    assert weights.read(tmp_path / name).arch == found.arch


def test_safetensors_of_a_dtype_that_numpy_lacks_are_rejected(tmp_path, capsys):
    header = json.dumps({"conv1.weight": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    assert (
        main(["convert", "--input", str(tmp_path / "a.safetensors"), "--output", str(tmp_path / "b.safetensors")]) == 2
    )
    assert "a.safetensors" in capsys.readouterr().err
