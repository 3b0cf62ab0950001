"""Runs interrupted by signals, kills or errors: the same command resumes and ends like an uninterrupted run."""

import os
import random
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
from commands import assert_identical_runs, run, start, wait_for

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
    settings = dict(pair.split("=") for pair in pairs)  # a later value of a key overrides an earlier one
    return ["train.py", "--config", config, "--device_target", "CPU", "--save_dir", str(folder),
            "--resume_ckpt", "auto", "--set", *("=".join(pair) for pair in settings.items())]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(cityscapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(*command(cityscapes, folder))
    return folder


@pytest.mark.parametrize(
    ("signum", "status"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.long),
    ],
)
def test_a_run_stopped_by_a_signal_resumes_to_the_same_result(cityscapes, tmp_path, uninterrupted, signum, status):
    process = start(*command(cityscapes, tmp_path / "out"))
    wait_for(process, "step 4/14")
    os.killpg(process.pid, signum)  # to the worker processes too, as a terminal or a scheduler sends it
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, output + errors
    assert "stopped after step" in output
    assert "Traceback" not in errors
    run(*command(cityscapes, tmp_path / "out"))
    assert_identical_runs(tmp_path / "out", uninterrupted)


def test_a_run_killed_at_random_moments_resumes_to_the_same_result(cityscapes, tmp_path, uninterrupted):
    rng = random.Random(5)
    folder = tmp_path / "out"
    killed = 0
    for attempt in range(4):
        process = start(*command(cityscapes, folder))
        # The first kill comes right after a save between two log lines; the others at a random time after the start.
        wait_for(process, "w6_3_rank0" if attempt == 0 else "network:")
        time.sleep(0 if attempt == 0 else rng.uniform(0, 1.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 2
    run(*command(cityscapes, folder))
    assert_identical_runs(folder, uninterrupted)
    assert not list((folder / "checkpoint").glob(".*"))


def test_a_run_folder_in_use_is_refused(cityscapes, tmp_path):
    process = start(*command(cityscapes, tmp_path / "out", steps=100_000))
    wait_for(process, "step 4/")
    result = run(*command(cityscapes, tmp_path / "out", steps=100_000), ok=False, seconds=60)
    assert result.returncode == 2
    assert f"is in use by another run (process {process.pid} on " in result.stderr
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_run_continues_after_its_stdout_is_closed(cityscapes, tmp_path, uninterrupted):
    process = start(*command(cityscapes, tmp_path / "out"))
    wait_for(process, "step 4/14")
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert_identical_runs(tmp_path / "out", uninterrupted)
    assert "step 12/14" in (tmp_path / "out/logs/train.log").read_text()


def test_a_killed_dataloader_worker_ends_the_run_with_an_error(cityscapes, tmp_path):
    process = start(*command(cityscapes, tmp_path / "out", steps=100_000))
    wait_for(process, "step 4/")
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    workers[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith(f"error: loader worker {workers[0].pid} was killed by SIGKILL")


def test_on_error_skip_replaces_damaged_images_up_to_a_limit(cityscapes, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(cityscapes, data)
    victim = sorted((data / "leftImg8bit/train").rglob("*.png"))[2]
    victim.write_bytes(victim.read_bytes()[:500])
    result = run(*command(data, tmp_path / "out", "data.on_error=skip"))
    warning = f"warning: unreadable image, replaced by another image: {victim}"
    assert result.stdout.count(warning) == 1
    assert (tmp_path / "out/logs/train.log").read_text().count(f" {warning}") == 1
    assert checkpoint.load(tmp_path / "out" / LAST).meta["progress"]["unreadable"][0].startswith(str(victim))
    second = sorted((data / "leftImg8bit/train").rglob("*.png"))[4]
    second.write_bytes(b"")
    result = run(*command(data, tmp_path / "more", "data.on_error=skip"), ok=False)
    assert result.returncode == 2
    assert "2 of 6 training images are unreadable" in result.stderr


def test_a_run_ended_by_a_damaged_image_resumes_after_the_image_is_repaired(cityscapes, tmp_path, uninterrupted):
    data = tmp_path / "data"
    shutil.copytree(cityscapes, data)
    stream = TrainStream(open_dataset("cityscapes", data, "train"), Data(), seed=1234, channels=1, dropout=0.0)
    victim = data / f"leftImg8bit/train/{stream.name(5)}_leftImg8bit.png"  # step 3 has samples 4 and 5
    assert stream.name(5) not in map(stream.name, range(4))
    intact = victim.read_bytes()
    victim.write_bytes(intact[:500])
    result = run(*command(data, tmp_path / "out"), ok=False)
    assert result.returncode == 2
    assert f"{victim} is truncated" in result.stderr
    assert "step 2 is saved; resume from it with --resume_ckpt auto" in result.stderr
    victim.write_bytes(intact)
    saved = checkpoint.newest_valid(tmp_path / "out/checkpoint").checkpoint
    assert saved is not None
    assert saved.meta["step"] == 2
    run(*command(data, tmp_path / "out"))
    assert_identical_runs(tmp_path / "out", uninterrupted)


def test_a_run_folder_removed_during_the_run_is_recreated(cityscapes, tmp_path):
    process = start(*command(cityscapes, tmp_path / "out", steps=100_000))
    wait_for(process, "step 4/")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    wait_for(process, "step 24/")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 143, output + errors
    assert checkpoint.newest_valid(tmp_path / "out/checkpoint").checkpoint is not None


def test_weights_that_are_not_finite_end_the_run_and_the_images_are_logged(cityscapes, tmp_path, uninterrupted):
    good = checkpoint.load(uninterrupted / LAST)
    poisoned = good.tensors | {"cls_head.bias": np.full_like(good.tensors["cls_head.bias"], np.inf)}
    file = tmp_path / "poisoned.safetensors"
    checkpoint.save(file, poisoned, good.meta | {"step": 3, "progress": good.meta["progress"] | {"step": 3}})
    argv = command(cityscapes, tmp_path / "out", "max_skipped=2")
    argv[argv.index("auto")] = str(file)
    result = run(*argv, ok=False)
    assert result.returncode == 2
    assert "2 steps in a row had a loss or gradient that is not finite" in result.stderr
    assert result.stdout.count("the step is skipped; images: demo/demo_0000") == 2
    assert not list((tmp_path / "out").rglob("*.safetensors"))
