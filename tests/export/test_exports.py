"""Exported files, run in their runtimes, match the outputs of the authors' code and of the PyTorch engine."""

import contextlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
import torch.nn.functional as F

import ocrnet
from ocrnet import architecture, config, weights
from ocrnet.cli import main
from ocrnet.config import Config, OcrHead
from ocrnet.data.image_io import write_png
from ocrnet.export.compare import draw
from ocrnet.export.runtimes.engine import resize
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint

DATA = "tests/data/official_w6"
SMALL = {"width": 6, "blocks": 1, "modules": (1, 1, 1), "num_classes": 5, "channels": 16, "key_channels": 8}


def save(path, tensors, variant="hrnet"):
    meta = {"config": config.as_dict(Config(ocr_head=OcrHead(variant=variant))), "step": 7}
    checkpoint.save(path, tensors, meta)
    return str(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save(
        tmp_path_factory.mktemp("small") / "small.safetensors", architecture.init(architecture.Arch(**SMALL), 3)
    )


@pytest.fixture(scope="module")
def small_onnx(small, tmp_path_factory):
    return export(small, tmp_path_factory.mktemp("onnx") / "small.onnx")


def export(source, output, *flags):
    status = main.main(["export", "--checkpoint_path", source, "--output", str(output), "--size", "64,96", *flags])
    assert status == 0
    return str(output)


def run_onnx(path, x):
    return onnxruntime.InferenceSession(path).run(None, {"images": x})[0]


def run_openvino(path, x):
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(path, "CPU", options)(x)[0]


def run_torchscript(path, x):
    return torch.jit.load(path)(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize(
    ("name", "run", "variant", "cases"),
    [
        ("w6.onnx", run_onnx, "hrnet", {"a": "ocr", "b": "ocr"}),
        pytest.param(
            "w6.torchscript", run_torchscript, "mmseg", {"a": "ocr_align_corners_false"}, marks=pytest.mark.long
        ),
    ],
)
def test_dynamic_files_match_the_outputs_of_the_authors(name, run, variant, cases, tmp_path):
    source = save(tmp_path / "w6.safetensors", weights.read(f"{DATA}/state_dict.pth").tensors, variant)
    flags = ("--dynamic", "True", "--input", "normalized", "--outputs", "logits")
    path = export(source, tmp_path / name, *flags)
    for case, key in cases.items():
        stored = torch.load(f"{DATA}/case_{case}.pth", weights_only=True)
        output = run(path, stored["x"].numpy())
        assert np.abs(output - stored[key].numpy()).max() < 1e-4 * stored[key].abs().max()


def test_a_dynamic_onnx_file_predicts_labels_of_any_size_and_batch(small, tmp_path):
    path, model = export(small, tmp_path / "any.onnx", "--dynamic"), ocrnet.load(small)
    for size in ((64, 96), (33, 130), (101, 47)):
        images = np.stack([draw(size, index) for index in range(2)])
        output = run_onnx(path, images)
        assert output.dtype == np.uint8
        assert (output == np.stack([model.predict(image) for image in images])).mean() > 0.999


@pytest.mark.long
def test_torch_export_matches_and_a_pickle_in_the_file_is_refused(small, tmp_path):
    path = export(small, tmp_path / "net.pt2", "--outputs", "logits", "--input", "normalized")
    x = np.random.default_rng(0).standard_normal((1, 3, 64, 96)).astype(np.float32)
    output = torch.export.load(path).module()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(output, ocrnet.load(small).logits(x)[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(OcrnetError, match=r"accepts only images of 64x96, not 32x48.*--dynamic True"):
        ocrnet.load(path).predict(draw((64, 96), 0), scales=(0.5, 1.0))
    marker = tmp_path / "ran"
    altered = insert_pickle(Path(path), tmp_path / "evil.pt2", f"open({str(marker)!r}, 'w')")
    with pytest.raises(OcrnetError, match=r"evil.pt2 is refused: .*could run code"):
        ocrnet.load(altered)
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.export.load(str(altered))  # the pickle is effective: loading it without the check runs its code
    assert marker.exists()


class Evil:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


def insert_pickle(source: Path, target: Path, code: str) -> Path:
    """Copy a .pt2 file, with a pickle that runs ``code`` instead of the first weight."""
    buffer = io.BytesIO()
    torch.save(Evil(code), buffer)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("weights_config.json"):
                tree = json.loads(content)
                first = next(iter(tree["config"].values()))
                first["use_pickle"], weight_name = True, first["path_name"]
                content = json.dumps(tree).encode()
            new.writestr(entry, content)
        names = {Path(name).name: name for name in old.namelist()}
    with zipfile.ZipFile(target) as old:
        rest = [(entry, old.read(entry)) for entry in old.infolist() if entry.filename != names[weight_name]]
    with zipfile.ZipFile(target, "w") as new:
        for entry, content in [*rest, (names[weight_name], buffer.getvalue())]:
            new.writestr(entry, content)
    return target


def test_scales_flip_and_windows_match_the_engine(small, tmp_path):
    flags = ("--dynamic", "--outputs", "logits", "--input", "normalized")
    opened, model = ocrnet.load(export(small, tmp_path / "net.onnx", *flags)), ocrnet.load(small)
    image = draw((90, 130), 1)
    for options in ({}, {"scales": (0.75, 1.25), "flip": True}, {"slide": (64, 96)}):
        np.testing.assert_allclose(
            opened.probabilities(image, **options), model.probabilities(image, **options), atol=1e-5
        )


def test_openvino_matches_at_any_size_and_the_file_holds_its_metadata(tmp_path):
    source = save(
        tmp_path / "s.safetensors", architecture.init(architecture.Arch(**SMALL, variant="paddleseg"), 3), "paddleseg"
    )
    flags = ("--precision", "float16", "--dynamic", "--outputs", "probabilities")
    path, model = export(source, tmp_path / "out/net.xml", *flags), ocrnet.load(source)
    for size in ((64, 96), (47, 101)):
        image = draw(size, 0)
        np.testing.assert_allclose(run_openvino(path, image[None])[0], model.probabilities(image), atol=2e-3)
    metadata = json.loads(openvino.Core().read_model(path).get_rt_info("ocrnet").value)
    expected = {"precision": "float16", "input": "uint8", "outputs": "probabilities", "size": None}
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["names"] == [f"class {i}" for i in range(5)]
    assert metadata["mean"] == [0.485, 0.456, 0.406]
    assert len(metadata["source"]["sha256"]) == 64
    assert metadata["source"]["step"] == 7
    assert metadata["align_corners"] is False
    assert 1e-5 < metadata["comparison"]["logits_apart"] < 1e-2
    card = (tmp_path / "out/net.xml.MODEL_CARD.md").read_text()
    for part in ("uint8 N,H,W,3", "any batch", metadata["source"]["sha256"], "| 4 | class 4 |"):
        assert part in card
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["net.bin", "net.xml", "net.xml.MODEL_CARD.md"]


def test_int8_is_calibrated_and_close_to_the_checkpoint(small, tmp_path, capsys):
    for index in range(3):
        write_png(tmp_path / f"photos/{index}.png", draw((64, 96), index))
    flags = ("--precision", "int8", "--calibration", str(tmp_path / "photos"), "--images", str(tmp_path / "photos"))
    path = export(small, tmp_path / "net.onnx", *flags)
    assert "on 3 images" in capsys.readouterr().out
    kinds = {i.type for i in onnxruntime.InferenceSession(path).get_inputs()}
    assert kinds == {"tensor(uint8)"}
    image = draw((64, 96), 0)
    assert (run_onnx(path, image[None])[0] == ocrnet.load(small).predict(image)).mean() > 0.9
    assert b"QuantizeLinear" in (tmp_path / "net.onnx").read_bytes()


def test_a_file_that_differs_from_the_checkpoint_is_not_written(small, tmp_path, capsys):
    argv = ["export", "--checkpoint_path", small, "--output", str(tmp_path / "net.torchscript"), "--size", "64,96"]
    assert main.main([*argv, "--tolerance", "0"]) == 2
    message = capsys.readouterr().err
    assert "differs too much from the checkpoint: on 2 images its logits differ by at most " in message
    assert "was not written" in message
    assert not list(tmp_path.iterdir())


def test_labels_of_windows_are_cropped_and_not_averaged(small, tmp_path):
    opened = ocrnet.load(export(small, tmp_path / "net.torchscript"))
    image, model = draw((90, 130), 1), ocrnet.load(small)
    output = opened.predict(image, slide=(64, 96))
    np.testing.assert_array_equal(output[:32, :48], model.predict(image[:64, :96])[:32, :48])
    np.testing.assert_array_equal(output[-32:, -48:], model.predict(image[-64:, -96:])[-32:, -48:])
    with pytest.raises(OcrnetError, match=r"outputs only labels.*--outputs probabilities"):
        opened.predict(image, slide=(64, 96), flip=True)
    with pytest.raises(OcrnetError, match="outputs only labels"):
        opened.probabilities(image, slide=(64, 96))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree | {"key of a later version": 1}, None),
        (lambda tree: [], "its metadata is invalid"),
        (lambda tree: {key: tree[key] for key in tree if key != "arch"}, "invalid .*'arch'"),
        (lambda tree: tree | {"names": tree["names"][:3]}, "invalid .*3 names"),
        (lambda tree: tree | {"std": "abc"}, "invalid .*must be numbers"),
        (lambda tree: tree | {"outputs": "banana"}, "invalid .*banana"),
        (lambda tree: tree | {"outputs": "logits"}, "outputs logits according to its metadata.* has the shape"),
        (lambda tree: tree | {"input": "normalized"}, "cannot be run in onnxruntime"),
    ],
)
def test_the_metadata_of_a_file_is_validated(small_onnx, tmp_path, change, message):
    model = onnx.load(small_onnx)
    (entry,) = (prop for prop in model.metadata_props if prop.key == "ocrnet")
    entry.value = json.dumps(change(json.loads(entry.value)))
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(OcrnetError, match=message) if message else contextlib.nullcontext():
        ocrnet.load(tmp_path / "other.onnx").predict(draw((64, 96), 0))


def test_a_bin_file_without_its_xml_is_not_overwritten(small, tmp_path, capsys):
    (tmp_path / "net.bin").write_text("other content")
    assert main.main(["export", "--checkpoint_path", small, "--output", str(tmp_path / "net.xml")]) == 2
    assert "net.bin exists, but its .xml file does not" in capsys.readouterr().err
    assert (tmp_path / "net.bin").read_text() == "other content"


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".torchscript", ".pt2"])
def test_the_error_of_a_damaged_file_names_it(tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(b"no network")
    path.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(OcrnetError, match=f"net{suffix} is damaged(, or loading it| or not )"):
        ocrnet.load(path)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(64, 96), (33, 20), (7, 1)])
def test_resize_matches_pytorch(align_corners, size):
    x = np.random.default_rng(0).standard_normal((3, 16, 25)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(x)[None], size, mode="bilinear", align_corners=align_corners)[0].numpy()
    np.testing.assert_allclose(resize(x, size, align_corners=align_corners), expected, atol=1e-5)
