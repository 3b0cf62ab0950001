"""The single-device commands of the original implementation, with a dataset path and only a few steps."""

import json
import re

import numpy as np
import pytest
import yaml
from commands import SMALL, run

from ocrnet import architecture, weights
from ocrnet.architecture import Arch
from ocrnet.config import Config, as_dict
from ocrnet.weights import checkpoint

W32 = "config/ocrnet/config_ocrnet_hrw32_16k.yml"
W48 = "config/ocrnet/config_ocrnet_hrw48_16k.yml"


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_writes_checkpoints_config_metrics_and_log(w48_run):
    names = sorted(p.name for p in (w48_run / "checkpoint").iterdir())
    assert names == [f"OCRNet_hrnet_seg_w48_{tag}_rank0.safetensors" for tag in ("2", "4", "best")]
    resolved = yaml.safe_load((w48_run / "config.yml").read_text())
    assert resolved.keys() == as_dict(Config()).keys()
    assert (resolved["total_step"], resolved["backbone"]["width"], resolved["num_classes"]) == (4, 48, 19)
    (start,) = rows(w48_run / "starts.jsonl")
    assert start["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", start["commit"])
    assert {"ocrnet", "python", "numpy", "torch"} <= start["versions"].keys()
    assert start["command"][0] == "train.py"
    metrics = rows(w48_run / "metrics.jsonl")
    assert [(row["kind"], row["step"]) for row in metrics] == [("train", 4), ("eval", 4)]
    assert all(np.isfinite(row["loss"]) for row in metrics if row["kind"] == "train")
    log = (w48_run / "logs" / "train.log").read_text()
    for expected in (
        "network: OCRNet-HRNet-W48",
        "mix: ",
        "warmup_step: 0 instead of 500",
        "eta",
        "img/s",
        "mem",
    ):
        assert expected in log, expected


def test_eval_of_a_w48_checkpoint_with_the_w32_config(w48_run, cityscapes, tmp_path):
    """An example of the original README; its .ckpt path selects the .safetensors file in the same folder."""
    path = w48_run / "checkpoint" / "OCRNet_hrnet_seg_w48_4_rank0.ckpt"
    result = run("eval.py", "--config", W32, "--device_target", "CPU", "--mix", "True", "--checkpoint_path", path,
                 "--save_dir", tmp_path / "out",
                 "--set", f"data.dataset_dir={cityscapes}", "num_workers=0")  # fmt: skip
    assert "width: the config has 32" in result.stdout
    assert "has 48; the file takes precedence" in result.stdout
    assert "OCRNet_hrnet_seg_w48_4_rank0.safetensors" in result.stdout
    assert "mIoU" in result.stdout
    (row,) = rows(tmp_path / "out" / "eval.jsonl")
    during_training = rows(w48_run / "metrics.jsonl")[-1]
    assert row["mean_iou"] == during_training["mean_iou"]


def test_eval_with_multi_scale_flip_and_visualize(w48_run, cityscapes, tmp_path):
    result = run("eval.py", "--config", W48, "--device_target", "CPU", "--ckpt_path", w48_run, "--multi_scale", "True",
                 "--flip", "True", "--visualize", "True", "--save_dir", tmp_path,
                 "--set", f"data.dataset_dir={cityscapes}", "eval.slide=[64,128]")  # fmt: skip
    assert "scales: [0.5, 0.75, 1.0, 1.25, 1.5, 1.75], flip: True, windows of 64x128" in result.stdout
    assert len(list((tmp_path / "visualize").glob("*.png"))) == 3


def test_w32_trains_on_one_device(cityscapes, tmp_path):
    run("train.py", "--config", W32, "--device_target", "CPU", "--mix", "True", "--save_dir", tmp_path / "out",
        "--set", f"data.dataset_dir={cityscapes}", *SMALL)  # fmt: skip
    assert (tmp_path / "out/checkpoint/OCRNet_hrnet_seg_w32_4_rank0.safetensors").is_file()


def test_a_resumed_run_ends_like_an_uninterrupted_one(w48_run, cityscapes, tmp_path):
    middle = tmp_path / "middle.safetensors"
    stored = checkpoint.load(w48_run / "checkpoint/OCRNet_hrnet_seg_w48_2_rank0.safetensors")
    checkpoint.save(middle, stored.tensors, stored.meta | {"versions": stored.meta["versions"] | {"threads": "64"}})
    weights.write_ckpt(middle.with_suffix(".ckpt"), stored.tensors, {})
    result = run("train.py", "--config", W48, "--device_target", "CPU", "--mix", "True", "--save_dir", tmp_path / "out",
                 "--resume_ckpt", middle.with_suffix(".ckpt"), "--set", f"data.dataset_dir={cityscapes}",
                 "save_mindspore_ckpt=True", *SMALL)  # fmt: skip
    assert (
        f"{middle.with_suffix('.ckpt')} holds only weights: {middle.name} in the same folder is used instead"
        in result.stdout
    )
    assert f"resume: from {middle}, step 2" in result.stdout
    assert ", was 64; losses and scores may differ in their last digits" in result.stdout
    name = "OCRNet_hrnet_seg_w48_4_rank0.safetensors"
    uninterrupted = checkpoint.load(w48_run / "checkpoint" / name)
    resumed = checkpoint.load(tmp_path / "out/checkpoint" / name)
    assert uninterrupted.tensors.keys() == resumed.tensors.keys()
    for key, array in uninterrupted.tensors.items():
        np.testing.assert_array_equal(array, resumed.tensors[key], err_msg=key)
    assert resumed.meta["progress"] == uninterrupted.meta["progress"]
    for_mindspore = weights.read((tmp_path / "out/checkpoint" / name).with_suffix(".ckpt"))
    assert for_mindspore.arch == weights.read(tmp_path / "out/checkpoint" / name).arch
    assert all(np.array_equal(array, uninterrupted.tensors[key]) for key, array in for_mindspore.tensors.items())


def test_auto_resume_removes_the_metrics_after_the_restored_step(cityscapes, tmp_path):
    def train(*more):
        return run("train.py", "--config", W48, "--device_target", "CPU", "--save_dir", tmp_path / "out",
                   "--log_interval", "1", *more, "--set", f"data.dataset_dir={cityscapes}", *SMALL)  # fmt: skip

    assert "starting from step 0" in train("--resume_ckpt", "auto").stdout
    before = rows(tmp_path / "out/metrics.jsonl")
    last = tmp_path / "out/checkpoint/OCRNet_hrnet_seg_w48_4_rank0.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    result = train("--resume_ckpt", "auto")
    assert "resume: skipped: " in result.stdout
    assert "truncated" in result.stdout
    after = rows(tmp_path / "out/metrics.jsonl")
    timings = {"images_per_second", "seconds_per_step", "data_seconds_per_step", "memory_bytes"}

    def untimed(table):
        return [{k: v for k, v in row.items() if k not in timings} for row in table]

    assert untimed(after) == untimed(before)


def test_a_run_folder_with_checkpoints_is_not_overwritten(w48_run, cityscapes):
    result = run("train.py", "--config", W48, "--device_target", "CPU", "--save_dir", w48_run,
                 "--set", f"data.dataset_dir={cityscapes}", *SMALL, ok=False)  # fmt: skip
    assert result.returncode == 2
    assert "--resume_ckpt auto" in result.stderr


@pytest.mark.parametrize("command", ["train", "eval"])
def test_console_command_and_script_print_the_same_help(command):
    script = run(f"{command}.py", "--help").stdout
    assert script == run("-m", "ocrnet", command, "--help").stdout
    assert "--config" in script


def test_a_run_starts_from_imagenet_weights(cityscapes, tmp_path):
    torch = pytest.importorskip("torch")
    arch = Arch(width=32, blocks=1, modules=(1, 1, 1))
    backbone = {
        n: torch.from_numpy(a) + 1 for n, a in architecture.init(arch, 7).items() if architecture.is_backbone(n)
    }
    file = tmp_path / "hrnet_w32.pth"
    torch.save(backbone | {"classifier.weight": torch.zeros(10, 4), "bn1.num_batches_tracked": torch.tensor(3)}, file)
    argv = ("train.py", "--config", W32, "--device_target", "CPU", "--lr_init", "1e-6", "--save_dir", tmp_path / "out",
            "--set", f"data.dataset_dir={cityscapes}", "backbone.pretrained=True", *SMALL)  # fmt: skip
    result = run(*argv, f"backbone.backbone_ckpt={file}")
    assert f"{len(backbone)} tensors loaded from {file}, 0 missing, 1 not used (classifier)" in result.stdout
    saved = checkpoint.load(tmp_path / "out/checkpoint/OCRNet_hrnet_seg_w32_4_rank0.safetensors").tensors
    np.testing.assert_allclose(saved["conv1.weight"], backbone["conv1.weight"].numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("width", "name", "message"),
    [(48, "hrnet.pth", "does not match backbone.width 48"), (32, "no.pth", "no.pth' does not exist")],
)
def test_wrong_imagenet_weights_are_refused(cityscapes, tmp_path, width, name, message):
    torch = pytest.importorskip("torch")
    state = architecture.init(Arch(width=32, blocks=1, modules=(1, 1, 1)), 7)
    torch.save({n: torch.from_numpy(a) for n, a in state.items()}, tmp_path / "hrnet.pth")
    result = run("train.py", "--config", W32, "--device_target", "CPU", "--save_dir", tmp_path / "out",
                 "--set", f"data.dataset_dir={cityscapes}", "backbone.pretrained=True", f"backbone.width={width}",
                 f"backbone.backbone_ckpt={tmp_path / name}", *SMALL, ok=False)  # fmt: skip
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
