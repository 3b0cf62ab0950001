"""The commands of the original implementation on MindSpore: train, kill, resume, evaluate."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT, SMALL, rows, run

from ocrnet.weights import checkpoint

W32 = "config/ocrnet/config_ocrnet_hrw32_16k.yml"
LAST = "checkpoint/OCRNet_hrnet_seg_w32_8_rank0.safetensors"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="MindSpore and mpirun are in the lock for Linux"),
]


def command(cityscapes, folder, *more: str) -> list[str]:
    small = [pair for pair in SMALL if pair.partition("=")[0] not in ("total_step", "save_interval", "eval_interval",
                                                                      "num_workers", "data.crop_size")]  # fmt: skip
    return ["train.py", "--config", W32, "--device_target", "CPU", "--engine", "mindspore", "--mix", "True",
            "--save_dir", str(folder), "--resume_ckpt", "auto", "--log_interval", "2",
            "--set", f"data.dataset_dir={cityscapes}", "data.crop_size=[64,128]", "total_step=8", "save_interval=3",
            "eval_interval=8", "num_workers=1", *small, *more]  # fmt: skip


def test_a_killed_run_resumes_to_the_same_result_and_both_engines_evaluate_it(cityscapes, tmp_path):
    run(*command(cityscapes, tmp_path / "whole"))
    killed = command(cityscapes, tmp_path / "killed", "run_eval=False")
    process = subprocess.Popen(
        [sys.executable, *killed], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    assert any("step 4/8" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    result = run(*killed)
    assert ", step 3" in result.stdout
    actual, expected = checkpoint.load(tmp_path / "killed" / LAST), checkpoint.load(tmp_path / "whole" / LAST)
    assert actual.tensors.keys() == expected.tensors.keys()
    assert "scaler/scale" in actual.tensors
    for name, array in expected.tensors.items():
        np.testing.assert_array_equal(actual.tensors[name], array, err_msg=name)
    *steps, evaluation = rows(tmp_path / "whole")
    assert rows(tmp_path / "killed") == steps
    evaluate = ["eval.py", "--config", W32, "--device_target", "CPU", "--mix", "True", "--save_dir", tmp_path / "eval"]
    data = ["--set", f"data.dataset_dir={cityscapes}", "num_workers=1"]
    path = (tmp_path / "killed" / LAST).with_suffix(".ckpt")  # the suffix that the original README uses
    for engine in ("mindspore", "torch"):
        output = run(*evaluate, "--engine", engine, "--checkpoint_path", path, *data).stdout
        assert f"engine: {engine} " in output
        assert f"checkpoint: {path}" in output
    on_mindspore, on_torch = (json.loads(line) for line in (tmp_path / "eval/eval.jsonl").read_text().splitlines())
    assert on_mindspore["mean_iou"] == evaluation["mean_iou"]
    # PyTorch uses bfloat16 and MindSpore float16.
    assert on_torch["mean_iou"] == pytest.approx(on_mindspore["mean_iou"], abs=0.01)
