"""Runs with an object store: a killed run resumes on an empty machine with the same command."""

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


def command(bucket, machine, *flags: str, script: str = "train.py", **settings) -> list[str]:
    """Return a command as ModelArts runs it; the folder ``machine`` holds all local files."""
    defaults = dict(setting.split("=") for setting in SETTINGS)
    settings = defaults | {"cloud.cache_dir": machine / "cache", "cloud.timeout": 5, **settings}
    return [script, "--config", "config/ocrnet/config_ocrnet_hrw18_8k.yml", "--device_target", "CPU",
            "--enable_modelarts", "True", "--data_url", bucket.url("data"), "--train_url", bucket.url("runs/one"),
            "--save_dir", str(machine / "out"), "--init_method=tcp://job:6666", "--rank", "0", *flags,
            "--set", *(f"{key}={value}" for key, value in settings.items())]  # fmt: skip


def put_dataset(bucket, cityscapes) -> None:
    for path in cityscapes.rglob("*"):
        if path.is_file():
            bucket.put(f"data/{path.relative_to(cityscapes)}", path.read_bytes())


def assert_nothing_secret(machine, *texts: str) -> None:
    texts = [*texts, *(path.read_bytes().decode(errors="replace") for path in machine.rglob("*") if path.is_file())]
    for secret in SECRETS.values():
        assert not any(secret in text for text in texts)


@pytest.fixture(scope="session")
def uninterrupted(cityscapes, tmp_path_factory):
    """Return the folder of an uninterrupted run without a store."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run("train.py", "--config", "config/ocrnet/config_ocrnet_hrw18_8k.yml", "--device_target", "CPU",
        "--save_dir", folder, "--set", f"data.dataset_dir={cityscapes}", *SETTINGS)  # fmt: skip
    return folder


def test_a_killed_run_resumes_on_an_empty_machine(sdk_bucket, proxy, cityscapes, uninterrupted, tmp_path):
    put_dataset(sdk_bucket, cityscapes)
    fail_third = every_third("GET", "PUT")
    late_checkpoint = re.compile(r"w6_(1[5-9]|2\d)_rank0")

    def failure(method: str, path: str) -> str | None:
        """Fail every third request, and all uploads of the last checkpoints, so that the store never gets them."""
        return "fail" if method == "PUT" and late_checkpoint.search(path) else fail_third(method, path)

    proxy.failure = failure
    first, second = tmp_path / "first", tmp_path / "second"
    process = start(*command(sdk_bucket, first))
    output = wait_for(process, f"uploaded {sdk_bucket.url('runs/one/checkpoint/OCRNet_hrnet_seg_w6_')}")
    process.send_signal(signal.SIGKILL)
    more, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "retrying in" in output
    assert "(failures so far: 1)" in output
    assert_nothing_secret(first, output, more, errors)
    proxy.heal()
    shutil.rmtree(first)
    result = run(*command(sdk_bucket, second))
    assert "enable_modelarts: ignored: --init_method, --rank" in result.stdout
    assert "resume: auto, because of enable_modelarts with train_url" in result.stdout
    step = int(re.search(r"resume: from .*, step (\d+)\n", result.stdout)[1])
    assert 0 < step < 28
    assert f"w6_{step}_rank0.safetensors (2.4 MiB) is downloaded to {second / 'out'}" in result.stdout
    assert_identical_runs(second / "out", uninterrupted)
    assert_nothing_secret(second, result.stdout, result.stderr)
    # The store holds the same files as this machine, which include the metrics of the first start.
    for name in (LAST, "config.yml", "metrics.jsonl", "starts.jsonl", "curves.png"):
        assert sdk_bucket.get(f"runs/one/{name}") == (second / "out" / name).read_bytes(), name
    assert (second / "out/starts.jsonl").read_text().count("\n") == 2
    assert "(failures so far: 1)" in sdk_bucket.get("runs/one/logs/train.log").decode()
    assert len([name for name in sdk_bucket.names("runs/one/checkpoint") if "best" not in name]) == 2


def test_failed_uploads_are_reported_and_repeated_by_the_next_start(bucket, proxy, cityscapes, tmp_path):
    put_dataset(bucket, cityscapes)
    proxy.failure = lambda method, path: "fail" if method == "PUT" and "checkpoint" in path else None
    argv = command(bucket, tmp_path, **{"total_step": 100_000, "keep_checkpoint": 1, "cloud.push_timeout": 1})
    process = start(*argv)
    wait_for(process, "w6_9_rank0")
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2, output + errors
    assert "stopped after step" in output
    assert f"error: not uploaded to {bucket.url('runs/one')} within 1 s (cloud.push_timeout): checkpoint/" in errors
    saved = checkpoint.steps(tmp_path / "out/checkpoint")
    assert len(saved) >= 3  # keep_checkpoint is 1, but nothing was uploaded
    proxy.heal()
    process = start(*argv)
    # The upload may be of any checkpoint, because the next one follows within a tenth of a second.
    output = wait_for(process, f"uploaded {bucket.url('runs/one/checkpoint/')}")
    process.terminate()
    more, errors = process.communicate(timeout=60)
    assert process.returncode == 143, output + more + errors
    (last,) = checkpoint.steps(tmp_path / "out/checkpoint")
    assert bucket.get(f"runs/one/checkpoint/{last.name}") == last.read_bytes()
    assert len([name for name in bucket.names("runs/one/checkpoint") if "best" not in name]) == 1


def test_an_evaluation_downloads_its_checkpoint_and_uploads_its_results(bucket, cityscapes, uninterrupted, tmp_path):
    put_dataset(bucket, cityscapes)
    for path in (uninterrupted / "checkpoint").iterdir():
        bucket.put(f"runs/one/checkpoint/{path.name}", path.read_bytes())
    argv = command(bucket, tmp_path, "--ckpt_url", bucket.url("runs/one"), "--visualize", "True", script="eval.py")
    result = run(*argv)
    assert f"checkpoint: {tmp_path}/cache/one-" in result.stdout
    assert "w6_28_rank0" in result.stdout
    names = {name.removeprefix("runs/one/") for name in bucket.names("runs/one/")}
    assert {"eval.jsonl", "logs/eval.log"} <= names
    assert sum(name.startswith("visualize/") for name in names) == 3
    assert bucket.get("runs/one/eval.jsonl") == (tmp_path / "out/eval.jsonl").read_bytes()
    assert_nothing_secret(tmp_path, result.stdout, result.stderr)
