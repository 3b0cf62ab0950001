"""Weights of other implementations in eval, predict and train, converted or not."""

import json
import pickle

import pytest
import safetensors.numpy
from commands import ROOT, SMALL
from family_nets import Classifier, Paddle, fill

from ocrnet.cli.main import main

W48 = str(ROOT / "config/ocrnet/config_ocrnet_hrw48_16k.yml")


@pytest.fixture
def paddle(tmp_path):
    state = fill(Paddle(4, 1, (1, 1, 1), 19, 8, 4)).state_dict()
    (tmp_path / "model.pdparams").write_bytes(pickle.dumps({name: x.numpy() for name, x in state.items()}, 4))
    return tmp_path / "model.pdparams"


def test_eval_and_predict_with_paddleseg_weights(paddle, cityscapes, tmp_path, capsys):
    converted = tmp_path / "converted.safetensors"
    assert main(["convert", "--input", str(paddle), "--output", str(converted)]) == 0
    scores = []
    for path in (paddle, converted):
        argv = ["eval", "--config", W48, "--device_target", "CPU", "--checkpoint_path", str(path)]
        argv += ["--save_dir", str(tmp_path / path.stem), "--set", f"data.dataset_dir={cityscapes}"]
        assert main(argv) == 0
        output = capsys.readouterr().out
        assert ("family: PaddleSeg; align_corners False" in output) == (path is paddle)
        assert "variant: the config has hrnet" in output
        assert "data.mean and data.std: the config has [0.485, 0.456, 0.406]" in output
        assert "[0.5, 0.5, 0.5]" in output or path is converted
        rows = (tmp_path / path.stem / "eval.jsonl").read_text().splitlines()
        scores.append(json.loads(rows[-1])["mean_iou"])
    assert scores[0] == scores[1]
    image = str(next((cityscapes / "leftImg8bit/val").rglob("*.png")))
    argv = ["predict", image, "--checkpoint_path", str(paddle), "--device_target", "CPU"]
    assert main([*argv, "--output", str(tmp_path / "out")]) == 0
    assert "7 biases folded" in capsys.readouterr().out


@pytest.fixture
def timm(tmp_path):
    state = fill(Classifier(48, 1, (1, 1, 1))).state_dict()
    weights = tmp_path / "timm.safetensors"
    safetensors.numpy.save_file({name: x.numpy() for name, x in state.items()}, weights, metadata={"format": "pt"})
    return weights


def test_convert_of_a_backbone_prints_each_line_once(timm, tmp_path, capsys):
    output = tmp_path / "backbone.safetensors"
    assert main(["convert", "--input", str(timm), "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["input:", "family:", "265", "it", "backbone:", "wrote"]
    assert lines[4] == "backbone: HRNet-W48, 1 blocks, modules [1, 1, 1], without heads"


def test_training_starts_from_a_timm_backbone(timm, cityscapes, tmp_path, capsys):
    argv = ["train", "--config", W48, "--device_target", "CPU", "--save_dir", str(tmp_path / "out")]
    argv += ["--run_eval", "False"]
    small = [setting for setting in SMALL if "_step" not in setting and "_interval" not in setting]
    argv += ["--set", f"data.dataset_dir={cityscapes}", *small, "total_step=1"]
    argv += ["backbone.pretrained=True", f"backbone.backbone_ckpt={timm}"]
    assert main(argv) == 0
    output = capsys.readouterr().out
    assert "tensors loaded" in output
    assert "trained with nearest-neighbor resizing between branches" in output
