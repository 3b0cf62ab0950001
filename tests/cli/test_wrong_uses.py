"""Wrong flags, configs and files: each ends with exit status 2 and an error that names the value and the remedy."""

import shutil

import numpy as np
import pytest
import safetensors.numpy
from commands import ROOT

from ocrnet.cli.main import main
from ocrnet.data.image_io import write_png

W48 = str(ROOT / "config/ocrnet/config_ocrnet_hrw48_16k.yml")
FIXTURE = "tests/data/official_w6/state_dict.pth"
OWN = str(ROOT / "config/own.yml")
SUBMIT = ["submit", "--config", W48, "--checkpoint_path", "train.py"]
EXPORT = ["export", "--checkpoint_path", "train.py", "--output"]

# Arguments after `ocrnet train --config W48 --device_target CPU --save_dir OUT`, and the parts of the error.
FLAGS = [
    (["--bacth_size", "2"], ["'--bacth_size'", "did you mean '--batch_size'"]),
    (["--batch_size", "0"], ["batch_size", "at least 1"]),
    (["--batch_size", "two"], ["batch_size is 'two'", "whole number"]),
    (["--batch_size", "2.5"], ["batch_size", "whole number"]),
    (["--mix", "maybe"], ["mix", "True or False"]),
    (["--mix"], ["--mix", "expected"]),
    (["--device_target", "TPU"], ["device_target is 'TPU'", "CPU, GPU, Ascend"]),
    (["--engine", "tensorflow"], ["engine is 'tensorflow'", "auto, torch, mindspore"]),
    (["--engine", "torch", "--device_target", "Ascend"], ["--engine torch does not run on Ascend"]),
    (["--seed", "-1"], ["seed", "at least 0"]),
    (["--seed", "1", "--seed", "2"], ["--seed is given twice", "keep one"]),
    (["--lr_init", "fast"], ["lr_init is 'fast'", "number"]),
    (["--lr_init", "nan"], ["lr_init"]),
    (["--lr_init", "1e-9"], ["end_lr", "above lr_init"]),
    (["--save_dir", ""], ["--save_dir is empty"]),
    (["stray"], ["unexpected argument 'stray'"]),
    (["--set"], ["--set needs KEY=VALUE"]),
    (["--norm", "local"], ["unknown flag '--norm'", "--set norm=VALUE"]),
    (["--set", "loss_scale=1e50"], ["loss_scale is 1e+50", "from 1 to 2147483648"]),
    (["--set", "data.crop_size=[64]"], ["data.crop_size", "2"]),
    (["--set", "data.crop_size=[16,16]"], ["data.crop_size", "at least 32"]),
    (["--set", "data.crop_siez=[64,64]"], ["unknown key 'data.crop_siez'", "did you mean 'data.crop_size'"]),
    (["--set", "crop_size=[64,64]"], ["unknown key 'crop_size'", "data.crop_size"]),
    (["--set", "data.scale_range=[2.0,0.5]"], ["data.scale_range", "low <= high"]),
    (["--set", "total_step=10", "warmup_step=20"], ["warmup_step 20 is more than total_step 10"]),
    (["--set", "clip_grad=0"], ["clip_grad 0", "none"]),
    (["--set", "loss.aux=0", "loss.ocr=0"], ["loss.aux and loss.ocr are both 0"]),
    (["--set", "data.class_weights=[1,2]"], ["data.class_weights has 2 values", "num_classes is 19"]),
    (["--set", "num_classes=7", "data.class_weights=none"], ["num_classes is 7", "has 19 classes"]),
    (["--set", "backbone.pretrained=True"], ["backbone.backbone_ckpt", "download"]),
    (["--set", "data.ignore_label=7"], ["data.ignore_label: 7", "'road'"]),
    (["--set", "data.name=citysacpes"], ["data.name", "cityscapes"]),
    (["--set", "ocr_head.variant=mmsegmentation"], ["ocr_head.variant", "mmseg"]),
    (["--set", "img_ratios=[1.0]"], ["img_ratios", "eval.scales"]),
    (["--set", "optimizer.nesterov=True", "optimizer.momentum=0"], ["optimizer.nesterov needs optimizer.momentum"]),
    (["--resume_ckpt", "nowhere.safetensors"], ["nowhere.safetensors", "does not exist"]),
    (["--resume_ckpt", ""], ["--resume_ckpt is empty"]),
    (["--multi_scale", "True"], ["unknown flag '--multi_scale'"]),
]  # fmt: skip

# The content of a config file c.yml, and the parts of the error.
YAMLS = [
    ("batch_size: 2\nbatch_size: 4\n", ["batch_size", "twice"]),
    ("bacth_size: 2\n", ["unknown key 'bacth_size'", "did you mean 'batch_size'"]),
    ("batch_size: [1\n", ["c.yml", "line"]),
    ("- a\n- b\n", ["c.yml"]),
    ("data: cityscapes\n", ["data"]),
    ("__BASE__: missing.yml\n", ["missing.yml", "does not exist"]),
    ("__BASE__: c.yml\n", ["c.yml", "itself"]),
    ("mix: 'yes'\n", ["mix is 'yes'", "True or False"]),
    ("total_step: 1e3.5\n", ["total_step", "whole number"]),
]


def assert_error(capsys, argv: list[str], *parts: str) -> None:
    assert main(argv) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert "Traceback" not in stderr
    for part in parts:
        assert part in stderr, stderr


@pytest.mark.parametrize(("argv", "parts"), FLAGS, ids=[" ".join(argv) for argv, _ in FLAGS])
def test_a_wrong_flag_is_refused(capsys, cityscapes, tmp_path, argv, parts):
    defaults = {"--config": W48, "--device_target": "CPU", "--save_dir": str(tmp_path / "out")}
    required = [word for flag, value in defaults.items() if flag not in argv for word in (flag, value)]
    assert_error(capsys, ["train", *required, "--set", f"data.dataset_dir={cityscapes}", *argv], *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "parts"), YAMLS, ids=[text.splitlines()[0] for text, _ in YAMLS])
def test_a_wrong_config_file_is_refused(capsys, tmp_path, text, parts):
    (tmp_path / "c.yml").write_text(text)
    assert_error(capsys, ["train", "--config", str(tmp_path / "c.yml"), "--save_dir", str(tmp_path / "out")], *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], None),
        (["trian"], "did you mean 'train'"),
        (["train"], "--config is required"),
        (["train", "--config", "no.yml"], "no.yml"),
        (["train", "--config", "config"], "config"),
        (["eval", "--config", W48], "--checkpoint_path is required"),
        (["check"], "--config is required"),
        (["predict"], "required: SOURCE"),
        (["predict", "docs", "README.md", "--checkpoint_path", "train.py"], "quote a pattern, as in"),
        (["predict", "docs/*.jpg", "--checkpoint_path", "train.py"], "'docs/*.jpg' matches no images"),
        (["predict", "ftp://host/a.png", "--checkpoint_path", "train.py"], "or begin with http:// or https://"),
        (["predict", "https:///a.png", "--checkpoint_path", "train.py"], "has no host"),
        (["predict", "https://host/a.png", "--offline", "--checkpoint_path", "train.py"], "--offline: 'https://host"),
        (["predict", "docs", "--offline", "perhaps", "--checkpoint_path", "train.py"], "True or False"),
        (["predict", "docs", "--save", "overly", "--checkpoint_path", "train.py"], "did you mean 'overlay'"),
        (["predict", "docs", "--save", ",", "--checkpoint_path", "train.py"], "list one or more of overlay, indices"),
        (["submit"], "--config is required"),
        (["submit", "--config", W48], "--output is required"),
        (["submit", "--config", W48, "--output", "x.zip"], "--checkpoint_path is required"),
        ([*SUBMIT, "--output", "x.tar"], "must end in .zip"),
        ([*SUBMIT, "--output", "x.zip"], "data.dataset_dir: 'your cityscapes' does not exist"),
        (
            [*SUBMIT, "--output", "x.zip", "--set", "data.name=folder"],
            "data.name is folder, but submit supports only cityscapes",
        ),
        ([*SUBMIT, "--output", "x.zip", "--split", "vla"], "did you mean 'val'"),
        ([*SUBMIT, "--output", "x.zip", "--save_dir", "out"], "unknown flag '--save_dir'"),
        (["submit", "--verify", "no.zip"], "no.zip does not exist"),
        (["submit", "--verify", "README.md"], "README.md is damaged or not a zip"),
        (["submit", "--verify", "x.zip", "--output", "y.zip"], "--output has no effect with --verify"),
        (["submit", "--verify", "x.zip", "--flip", "True"], "no effect on submit --verify without --config"),
        (["submit", "--verify", "x.zip", "--split", "train"], "--split is 'train', but must be test or val"),
        (["predict", "no.jpg", "--checkpoint_path", "train.py"], "'no.jpg' does not exist"),
        (["predict", "config", "--checkpoint_path", "train.py"], "holds no images"),
        (
            ["predict", "docs/pictures", "--checkpoint_path", "train.py", "--output", "docs/pictures"],
            "choose another --output",
        ),
        (
            ["predict", "docs/pictures", "--checkpoint_path", "train.py", "--set", "backbone.width=32"],
            "no effect on predict",
        ),
        (["synthetic", "train.py"], "not an empty folder"),
        (["convert"], "--input is required"),
        (["convert", "--input", FIXTURE], "--output is required"),
        (["convert", "--input", "no.pth", "--output", "x.safetensors"], "no.pth does not exist"),
        (["convert", "--input", "README.md", "--output", "x.safetensors"], "README.md is not a safetensors file"),
        (["convert", "--input", "LICENSE", "--output", "x.safetensors"], "LICENSE"),
        (["convert", "--input", FIXTURE, "--output", "x.pth"], "must end in .safetensors without --to"),
        (["convert", "--input", FIXTURE, "--output", "x.safetensors", "--to", "hrnet"], "must end in .pth with --to"),
        (["convert", "--input", FIXTURE, "--output", "x.pth", "--to", "mindspore"], "must end in .ckpt with --to"),
        (["convert", "--input", FIXTURE, "--output", "x.pth", "--to", "mmsge"], "did you mean 'mmseg'"),
        (["convert", "--input", FIXTURE, "--output", "x.pth", "--to", "paddleseg"], "hrnet, mmseg, mindspore"),
        (["convert", "--input", FIXTURE, "--output", FIXTURE, "--to", "hrnet"], "exists; remove it"),
        (["convert", "--input", FIXTURE, "--output", "README.md/x.safetensors"], "cannot write"),
        (["convert", "--input", FIXTURE, "--output", "x.safetensors", "--allow_partial", "perhaps"], "True or False"),
        (["convert", "--input", FIXTURE, "--output", "x.safetensors", "--set", "seed=1"], "no effect on convert"),
        (["convert", "--input", FIXTURE, "--outptu", "x.safetensors"], "did you mean '--output'"),
        (["export"], "--checkpoint_path is required"),
        (EXPORT[:3], "--output is required"),
        ([*EXPORT, "net.xyz"], "unknown suffix; use"),
        ([*EXPORT, "net.onnx", "--format", "onxx"], "--format is 'onxx'"),
        ([*EXPORT, "net.onnx", "--format", "openvino"], "--format openvino needs the suffix .xml"),
        ([*EXPORT, "net.onnx", "--outputs", "label"], "did you mean 'labels'?"),
        ([*EXPORT, "net.onnx", "--precision", "float16"], "onnx supports float32, int8"),
        ([*EXPORT, "net.onnx", "--precision", "int8"], "--precision int8 needs --calibration"),
        ([*EXPORT, "net.onnx", "--calibration", "config"], "--calibration has no effect"),
        ([*EXPORT, "net.pt2", "--dynamic", "True"], "torch_export files have a fixed size"),
        ([*EXPORT, "net.mindir", "--input", "uint8"], "mindir supports normalized"),
        ([*EXPORT, "net.onnx", "--size", "64"], "--size is '64', but must be [height, width]"),
        ([*EXPORT, "net.onnx", "--size", "16,64"], "each at least 32"),
        ([*EXPORT, "net.onnx", "--tolerance", "little"], "--tolerance is 'little', but must be a number"),
        ([*EXPORT, "net.onnx", "--num_images", "1.5"], "--num_images is '1.5', but must be a whole number"),
        ([*EXPORT, "net.onnx", "--set", "mix=True"], "no effect on export without --config"),
        ([*EXPORT, "train.py/net.onnx"], "--output train.py/net.onnx cannot be written"),
        ([*EXPORT, "docs/net.onnx", "--checkpoint_path", "no.pth"], "--checkpoint_path is given twice"),
        ([*EXPORT, "net.onnx"], "train.py"),
        (["bench"], "--checkpoint_path"),
        (["bench", "--checkpoint_path", "no.onnx"], "no.onnx does not exist"),
        (["bench", "--checkpoint_path", "train.py", "--size", "8,8"], "--size is '8,8'"),
        (["bench", "--checkpoint_path", "train.py"], "train.py"),
    ],
)
def test_a_wrong_command_is_refused(capsys, monkeypatch, argv, part):
    monkeypatch.chdir(ROOT)
    if part is None:
        assert main(argv) == 2
        return
    assert_error(capsys, argv, part)
    assert not list(ROOT.glob("x.*"))


def test_weights_of_an_unknown_family_are_refused(capsys, tmp_path):
    safetensors.numpy.save_file({"fc.weight": np.zeros((3, 4), np.float32)}, tmp_path / "resnet.safetensors")
    argv = ["convert", "--input", str(tmp_path / "resnet.safetensors"), "--output", str(tmp_path / "x.safetensors")]
    assert_error(capsys, argv, "not from an OCRNet or HRNet of a known family (names: fc.weight)", "PaddleSeg")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_cannot_resume_from_converted_weights(capsys, cityscapes, tmp_path):
    weights = tmp_path / "x.safetensors"
    assert main(["convert", "--input", str(ROOT / FIXTURE), "--output", str(weights)]) == 0
    argv = ["train", "--config", W48, "--device_target", "CPU", "--save_dir", str(tmp_path / "out")]
    argv += ["--set", f"data.dataset_dir={cityscapes}", "--resume_ckpt", str(weights)]
    assert_error(capsys, argv, "has only converted weights", "backbone.backbone_ckpt=")


def write_dataset(root):
    """Write a valid dataset of the kind `folder`: two classes, one image with its label for each split."""
    for split in ("train", "val"):
        write_png(root / f"images/{split}/a.png", np.zeros((64, 64, 3), np.uint8))
        write_png(root / f"labels/{split}/a.png", np.zeros((64, 64), np.uint8))
    (root / "classes.yml").write_text("[road, sky]")


def remove_label(root):
    (root / "labels/train/a.png").unlink()


def add_label(root):
    shutil.copy(root / "labels/train/a.png", root / "labels/train/b.png")


def remove_classes(root):
    (root / "classes.yml").unlink()


def repeat_class_name(root):
    (root / "classes.yml").write_text("[road, road]")


def misspell_a_key(root):
    (root / "classes.yml").write_text("classes: [{nmae: road}]")


def remove_val(root):
    shutil.rmtree(root / "images/val")


def remove_train_image(root):
    (root / "images/train/a.png").unlink()


def use_unknown_id(root):
    write_png(root / "labels/train/a.png", np.full((64, 64), 9, np.uint8))


def write_color_label(root):
    write_png(root / "labels/train/a.png", np.zeros((64, 64, 3), np.uint8))


def truncate_image(root):
    path = root / "images/train/a.png"
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (remove_label, ["1 of 1 images have no label", "a.png"]),
        (add_label, ["1 of 2 labels have no image", "b.png"]),
        (remove_classes, ["classes.yml does not exist"]),
        (repeat_class_name, ["classes 0 and 1 have the same name, road"]),
        (misspell_a_key, ["unknown key 'nmae'", "did you mean 'name'"]),
        (remove_val, ["images/val does not exist"]),
        (remove_train_image, ["holds no images"]),
        (use_unknown_id, ["holds the unknown id 9", "a.png"]),
        (write_color_label, ["a.png has mode RGB", "one-channel PNG"]),
        (truncate_image, ["a.png is truncated"]),
    ],
)
def test_a_wrong_dataset_is_refused(capsys, tmp_path, damage, parts):
    write_dataset(tmp_path / "data")
    damage(tmp_path / "data")
    settings = ["data.crop_size=[64,64]", "num_workers=0", "backbone.blocks=1", "backbone.modules=[1,1,1]"]
    argv = ["train", "--config", OWN, "--device_target", "CPU", "--save_dir", str(tmp_path / "out")]
    assert_error(capsys, [*argv, "--set", f"data.dataset_dir={tmp_path / 'data'}", *settings], *parts)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
