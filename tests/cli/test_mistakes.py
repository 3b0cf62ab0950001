"""Wrong inputs end with exit status 2 and one error on stderr that names them."""

import shutil

import numpy as np
import pytest
from commands import SMALL, run

from ocrnet.data.image_io import write_png

W48 = "config/ocrnet/config_ocrnet_hrw48_16k.yml"
CPU = ("--device_target", "CPU")


def run_failing(*argv, status=2) -> str:
    result = run(*argv, ok=False)
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr


def test_the_error_of_an_unedited_dataset_dir_names_the_key(tmp_path):
    stderr = run_failing("train.py", "--config", W48, *CPU, "--save_dir", tmp_path / "out")
    assert "your cityscapes" in stderr
    assert "config/cityscapes.yml" in stderr
    assert "--set data.dataset_dir=" in stderr
    assert not (tmp_path / "out").exists()


def test_device_target_gpu_without_a_gpu_is_an_error(cityscapes, tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    stderr = run_failing("train.py", "--config", W48, "--device_target", "GPU", "--save_dir", tmp_path / "out",
                         "--set", f"data.dataset_dir={cityscapes}", *SMALL)  # fmt: skip
    assert "sees no GPU" in stderr
    assert not (tmp_path / "out").exists()


def test_wrong_checkpoints_are_refused(w48_run, cityscapes, tmp_path):
    intact = w48_run / "checkpoint" / "OCRNet_hrnet_seg_w48_4_rank0.safetensors"
    cut, altered = tmp_path / "cut.safetensors", tmp_path / "altered.safetensors"
    content = intact.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    altered.write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])
    dataset = ("--set", f"data.dataset_dir={cityscapes}", f"save_dir={tmp_path / 'out'}")
    for path in (cut, altered):
        assert str(path) in run_failing("eval.py", "--config", W48, *CPU, "--checkpoint_path", path, *dataset)
        assert "truncated or altered" in run_failing(
            "train.py", "--config", W48, *CPU, "--resume_ckpt", path, *dataset, *SMALL
        )
    wrong_width = run_failing(
        "train.py", "--config", W48.replace("48", "32"), *CPU, "--resume_ckpt", intact, *dataset, *SMALL
    )
    assert "width 32" in wrong_width
    shorter = run_failing(
        "train.py", "--config", W48, *CPU, "--resume_ckpt", intact, *dataset, *SMALL[1:], "total_step=3"
    )
    assert "has 4 steps, but total_step is 3" in shorter
    missing = run_failing(
        "train.py", "--config", W48, *CPU, "--resume_ckpt", tmp_path / "no.safetensors", *dataset, *SMALL
    )
    assert "no.safetensors does not exist" in missing
    assert not (tmp_path / "out").exists()


def test_the_error_of_a_damaged_training_image_names_it(cityscapes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(cityscapes, data)
    damaged = next((data / "leftImg8bit/train").rglob("*.png"))
    damaged.write_bytes(damaged.read_bytes()[:500])
    for workers in (0, 2):
        stderr = run_failing("train.py", "--config", W48, *CPU, "--save_dir", tmp_path / f"out{workers}",
                             "--set", f"data.dataset_dir={data}", *SMALL[:2], *SMALL[4:], "eval_interval=4",
                             f"num_workers={workers}")  # fmt: skip
        assert damaged.name in stderr


def test_weights_for_other_classes_are_not_scored(w48_run, tmp_path):
    for split in ("train", "val"):
        write_png(tmp_path / f"own/images/{split}/a.png", np.zeros((64, 64, 3), np.uint8))
        write_png(tmp_path / f"own/labels/{split}/a.png", np.zeros((64, 64), np.uint8))
    (tmp_path / "own/classes.yml").write_text("[road, sky]")
    stderr = run_failing("eval.py", "--config", W48, *CPU, "--checkpoint_path", w48_run, "--save_dir", tmp_path / "out",
                         "--set", "data.name=folder", f"data.dataset_dir={tmp_path / 'own'}", "num_classes=2",
                         "data.class_weights=none")  # fmt: skip
    assert "19 classes" in stderr
