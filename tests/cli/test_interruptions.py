"""Real processes, real signals: whatever ends a run, the same command goes on and ends like the run never stopped."""

import os
import random
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
from commands import assert_same_end, run, start, wait_for

from ocrnet.config import Data
from ocrnet.data.datasets import open_dataset
from ocrnet.data.sampler import TrainStream
from ocrnet.weights import checkpoint

LAST = "checkpoint/OCRNet_hrnet_seg_w6_14_rank0.safetensors"
SETTINGS = (
    "save_interval=3", "log_interval=4", "eval_interval=7", "num_workers=2", "data.crop_size=[64,64]",
    "backbone.width=6", "backbone.blocks=1", "backbone.modules=[1,1,1]", "ocr_head.channels=16",
    "ocr_head.key_channels=8",
)  # fmt: skip


def command(cityscapes, folder, *more: str, steps: int = 14) -> list[str]:
    config = "config/ocrnet/config_ocrnet_hrw18_8k.yml"
    pairs = (f"data.dataset_dir={cityscapes}", f"total_step={steps}", *SETTINGS, *more)
    settings = dict(pair.split("=") for pair in pairs)  # the last one of a key
    return ["train.py", "--config", config, "--device_target", "CPU", "--save_dir", str(folder),
            "--resume_ckpt", "auto", "--set", *("=".join(pair) for pair in settings.items())]  # fmt: skip


@pytest.fixture(scope="module")
def whole(cityscapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(*command(cityscapes, folder))
    return folder


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_every_process_ends_with_a_checkpoint(cityscapes, tmp_path, whole, number, status):
    process = start(*command(cityscapes, tmp_path / "out"))
    wait_for(process, "step 4/14")
    os.killpg(process.pid, number)  # as a terminal or a scheduler does: the workers too
    said, errors = process.communicate(timeout=60)
    assert process.returncode == status, said + errors
    assert "stopped after step" in said
    assert "Traceback" not in errors
    run(*command(cityscapes, tmp_path / "out"))
    assert_same_end(tmp_path / "out", whole)


def test_kill_9_at_random_moments(cityscapes, tmp_path, whole):
    moments = random.Random(5)
    folder = tmp_path / "out"
    killed = 0
    for begun in range(4):
        process = start(*command(cityscapes, folder))
        # First right after a save between two log lines, then anywhere from the start banner on.
        wait_for(process, "w6_3_rank0" if begun == 0 else "network:")
        time.sleep(0 if begun == 0 else moments.uniform(0, 1.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 2
    run(*command(cityscapes, folder))
    assert_same_end(folder, whole)
    assert not list((folder / "checkpoint").glob(".*"))


def test_a_folder_in_use_is_refused(cityscapes, tmp_path):
    process = start(*command(cityscapes, tmp_path / "out", steps=100_000))
    wait_for(process, "step 4/")
    found = run(*command(cityscapes, tmp_path / "out", steps=100_000), ok=False, seconds=60)
    assert found.returncode == 2
    assert f"is in use by another run (process {process.pid} on " in found.stderr
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_run_goes_on_where_nobody_reads_its_output(cityscapes, tmp_path, whole):
    process = start(*command(cityscapes, tmp_path / "out"))
    wait_for(process, "step 4/14")
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert_same_end(tmp_path / "out", whole)
    assert "step 12/14" in (tmp_path / "out/logs/train.log").read_text()


def test_a_killed_worker_ends_the_run_with_a_message(cityscapes, tmp_path):
    process = start(*command(cityscapes, tmp_path / "out", steps=100_000))
    wait_for(process, "step 4/")
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    workers[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith(f"error: loader worker {workers[0].pid} was killed by SIGKILL")


def test_a_broken_image_can_be_passed_over(cityscapes, tmp_path):
    broken = tmp_path / "data"
    shutil.copytree(cityscapes, broken)
    victim = sorted((broken / "leftImg8bit/train").rglob("*.png"))[2]
    victim.write_bytes(victim.read_bytes()[:500])
    found = run(*command(broken, tmp_path / "out", "data.on_error=skip"))
    assert found.stdout.count(f"replaced by another image: {victim}") == 1
    assert checkpoint.load(tmp_path / "out" / LAST).meta["progress"]["unreadable"][0].startswith(str(victim))
    second = sorted((broken / "leftImg8bit/train").rglob("*.png"))[4]
    second.write_bytes(b"")
    found = run(*command(broken, tmp_path / "more", "data.on_error=skip"), ok=False)
    assert found.returncode == 2
    assert "2 of 6 training images are unreadable" in found.stderr


def test_a_run_that_a_broken_image_ended_goes_on_once_it_is_mended(cityscapes, tmp_path, whole):
    data = tmp_path / "data"
    shutil.copytree(cityscapes, data)
    stream = TrainStream(open_dataset("cityscapes", data, "train"), Data(), seed=1234, channels=1, dropout=0.0)
    victim = data / f"leftImg8bit/train/{stream.name(5)}_leftImg8bit.png"  # samples 4 and 5 are the third step
    assert stream.name(5) not in map(stream.name, range(4))
    sound = victim.read_bytes()
    victim.write_bytes(sound[:500])
    found = run(*command(data, tmp_path / "out"), ok=False)
    assert found.returncode == 2
    assert f"{victim} is truncated" in found.stderr
    assert "step 2 is saved; resume from it with --resume_ckpt auto" in found.stderr
    victim.write_bytes(sound)
    saved = checkpoint.newest_valid(tmp_path / "out/checkpoint").checkpoint
    assert saved is not None
    assert saved.meta["step"] == 2
    run(*command(data, tmp_path / "out"))
    assert_same_end(tmp_path / "out", whole)


def test_a_run_folder_removed_under_the_run_is_made_again(cityscapes, tmp_path):
    process = start(*command(cityscapes, tmp_path / "out", steps=100_000))
    wait_for(process, "step 4/")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    wait_for(process, "step 24/")
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 143, said + errors
    assert checkpoint.newest_valid(tmp_path / "out/checkpoint").checkpoint is not None


def test_weights_that_are_not_finite_end_the_run_naming_the_images(cityscapes, tmp_path, whole):
    good = checkpoint.load(whole / LAST)
    poisoned = good.tensors | {"cls_head.bias": np.full_like(good.tensors["cls_head.bias"], np.inf)}
    file = tmp_path / "poisoned.safetensors"
    checkpoint.save(file, poisoned, good.meta | {"step": 3, "progress": good.meta["progress"] | {"step": 3}})
    argv = command(cityscapes, tmp_path / "out", "max_skipped=2")
    argv[argv.index("auto")] = str(file)
    found = run(*argv, ok=False)
    assert found.returncode == 2
    assert "2 steps in a row had a loss or gradient that is not finite" in found.stderr
    assert found.stdout.count("the step is skipped; images: demo/demo_0000") == 2
    assert not list((tmp_path / "out").rglob("*.safetensors"))
