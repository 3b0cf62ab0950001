"""Runs that live in an object store: killed, and begun again on an empty machine with the same command."""

import re
import shutil
import signal

import pytest
from commands import assert_identical_runs, run, start, wait_for
from servers import SECRETS, every_third

from ocrnet.weights import checkpoint

LAST = "checkpoint/OCRNet_hrnet_seg_w6_28_rank0.safetensors"
SETTINGS = (
    "total_step=28", "save_interval=3", "log_interval=4", "eval_interval=14", "num_workers=0", "data.crop_size=[64,64]",
    "backbone.width=6", "backbone.blocks=1", "backbone.modules=[1,1,1]", "ocr_head.channels=16",
    "ocr_head.key_channels=8", "keep_checkpoint=2", "tensorboard=False", "eval_samples=1",
)  # fmt: skip


def command(place, machine, *flags: str, script: str = "train.py", **settings) -> list[str]:
    """Return a command as ModelArts would run it; all that is this machine's own lies in the folder ``machine``."""
    chosen = dict(setting.split("=") for setting in SETTINGS)
    settings = chosen | {"cloud.cache_dir": machine / "cache", "cloud.timeout": 5, **settings}
    return [script, "--config", "config/ocrnet/config_ocrnet_hrw18_8k.yml", "--device_target", "CPU",
            "--enable_modelarts", "True", "--data_url", place.url("data"), "--train_url", place.url("runs/one"),
            "--save_dir", str(machine / "out"), "--init_method=tcp://job:6666", "--rank", "0", *flags,
            "--set", *(f"{key}={value}" for key, value in settings.items())]  # fmt: skip


def put_dataset(place, cityscapes) -> None:
    for path in cityscapes.rglob("*"):
        if path.is_file():
            place.put(f"data/{path.relative_to(cityscapes)}", path.read_bytes())


def assert_nothing_secret(machine, *texts: str) -> None:
    texts = [*texts, *(path.read_bytes().decode(errors="replace") for path in machine.rglob("*") if path.is_file())]
    for secret in SECRETS.values():
        assert not any(secret in text for text in texts)


@pytest.fixture(scope="session")
def whole(cityscapes, tmp_path_factory):
    """The run never stopped, and without any store."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run("train.py", "--config", "config/ocrnet/config_ocrnet_hrw18_8k.yml", "--device_target", "CPU",
        "--save_dir", folder, "--set", f"data.dataset_dir={cityscapes}", *SETTINGS)  # fmt: skip
    return folder


def test_a_killed_run_goes_on_in_an_empty_machine(place, proxy, cityscapes, whole, tmp_path):
    put_dataset(place, cityscapes)
    third = every_third("GET", "PUT")
    late = re.compile(r"w6_(1[5-9]|2\d)_rank0")  # so that the store never has the end of the first start
    proxy.fault = lambda method, path: "fail" if method == "PUT" and late.search(path) else third(method, path)
    first, second = tmp_path / "first", tmp_path / "second"
    process = start(*command(place, first))
    said = wait_for(process, f"uploaded {place.url('runs/one/checkpoint/OCRNet_hrnet_seg_w6_')}")
    process.send_signal(signal.SIGKILL)
    more, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "retrying in" in said
    assert "(failures so far: 1)" in said
    assert_nothing_secret(first, said, more, errors)
    proxy.heal()
    shutil.rmtree(first)
    found = run(*command(place, second))
    assert "enable_modelarts: ignored: --init_method, --rank" in found.stdout
    assert "resume: auto, because of enable_modelarts with train_url" in found.stdout
    step = int(re.search(r"resume: from .*, step (\d+)\n", found.stdout)[1])
    assert 0 < step < 28
    assert f"w6_{step}_rank0.safetensors (2.4 MiB) is downloaded to {second / 'out'}" in found.stdout
    assert_identical_runs(second / "out", whole)
    assert_nothing_secret(second, found.stdout, found.stderr)
    # What is in the store is what is here, the record of the first start included.
    for name in (LAST, "config.yml", "metrics.jsonl", "starts.jsonl", "curves.png"):
        assert place.get(f"runs/one/{name}") == (second / "out" / name).read_bytes(), name
    assert (second / "out/starts.jsonl").read_text().count("\n") == 2
    assert "(failures so far: 1)" in place.get("runs/one/logs/train.log").decode()
    assert len([name for name in place.names("runs/one/checkpoint") if "best" not in name]) == 2


def test_a_run_that_cannot_push_says_so_and_the_next_start_makes_up_for_it(bucket, proxy, cityscapes, tmp_path):
    put_dataset(bucket, cityscapes)
    proxy.fault = lambda method, path: "fail" if method == "PUT" and "checkpoint" in path else None
    argv = command(bucket, tmp_path, **{"total_step": 100_000, "keep_checkpoint": 1, "cloud.push_timeout": 1})
    process = start(*argv)
    wait_for(process, "w6_9_rank0")
    process.terminate()
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 2, said + errors
    assert "stopped after step" in said
    assert f"error: not uploaded to {bucket.url('runs/one')} within 1 s (cloud.push_timeout): checkpoint/" in errors
    saved = checkpoint.steps(tmp_path / "out/checkpoint")
    assert len(saved) >= 3  # nothing went, though one alone is to be kept
    proxy.heal()
    process = start(*argv)
    # Whichever is the newest when the upload starts: the next checkpoint follows within a tenth of a second.
    said = wait_for(process, f"uploaded {bucket.url('runs/one/checkpoint/')}")
    process.terminate()
    more, errors = process.communicate(timeout=60)
    assert process.returncode == 143, said + more + errors
    (last,) = checkpoint.steps(tmp_path / "out/checkpoint")
    assert bucket.get(f"runs/one/checkpoint/{last.name}") == last.read_bytes()
    assert len([name for name in bucket.names("runs/one/checkpoint") if "best" not in name]) == 1


def test_an_evaluation_takes_its_checkpoint_from_a_store_and_leaves_its_results_there(
    bucket, cityscapes, whole, tmp_path
):
    put_dataset(bucket, cityscapes)
    for path in (whole / "checkpoint").iterdir():
        bucket.put(f"runs/one/checkpoint/{path.name}", path.read_bytes())
    argv = command(bucket, tmp_path, "--ckpt_url", bucket.url("runs/one"), "--visualize", "True", script="eval.py")
    found = run(*argv)
    assert f"checkpoint: {tmp_path}/cache/one-" in found.stdout
    assert "w6_28_rank0" in found.stdout
    names = {name.removeprefix("runs/one/") for name in bucket.names("runs/one/")}
    assert {"eval.jsonl", "logs/eval.log"} <= names
    assert sum(name.startswith("visualize/") for name in names) == 3
    assert bucket.get("runs/one/eval.jsonl") == (tmp_path / "out/eval.jsonl").read_bytes()
    assert_nothing_secret(tmp_path, found.stdout, found.stderr)
