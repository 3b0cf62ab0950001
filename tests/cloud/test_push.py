"""Uploads to a store: a thread uploads while training continues, and unconfirmed local checkpoints are kept."""

import contextlib
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from servers import Bucket

from ocrnet.cloud import resume
from ocrnet.cloud.folder import FolderStore
from ocrnet.cloud.push import UploadContext, Uploader, check_writable
from ocrnet.config import Cloud, Config
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import Stopped
from ocrnet.weights import checkpoint

pytestmark = pytest.mark.usefixtures("short_pauses")


class Folder:
    """A run folder as the training loop writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def save(self, step: int | str) -> Path:
        """Append the metrics of a step, then write its checkpoint."""
        if isinstance(step, int):
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"kind": "train", "step": step}) + "\n")
        path = self.path / "checkpoint" / checkpoint.file_name(6, step)
        tensors = {"weight": np.full(1000, step if isinstance(step, int) else -1, np.float32)}
        checkpoint.save(path, tensors, {"step": step})
        return path

    def steps(self) -> list[int]:
        return [checkpoint.step_of(path) for path in checkpoint.steps(self.path / "checkpoint")]


@pytest.fixture(autouse=True)
def finished_uploads(proxy, monkeypatch):
    """Finish the uploads of a test before the next one, because their threads log."""
    uploaders, start = [], Uploader.start
    monkeypatch.setattr(Uploader, "start", lambda self: (uploaders.append(self), start(self)))
    yield
    proxy.heal()
    for uploader in uploaders:
        assert uploader.drain(30) == []


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "out")


def start_push(store, folder: Folder, *, keep: int = 2, **cloud) -> Uploader:
    push = Uploader(store, folder.path, Cloud(**{"timeout": 1} | cloud), keep=keep)
    push.queue_missing(store.list("checkpoint/"))
    push.start()
    return push


def stored_steps(bucket: Bucket) -> list[int]:
    return sorted(step for name in bucket.names("run/") if (step := checkpoint.step_of(name)) is not None)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_checkpoints_are_uploaded_and_pruned_locally_and_in_the_store(sdk_bucket, folder, caplog):
    push = start_push(sdk_bucket.store("run"), folder)
    for step in (1, 2, 3):
        path = folder.save(step)
        push.queue_files()
        push.queue_checkpoint(path)
        wait_until(lambda step=step: step in stored_steps(sdk_bucket))
        checkpoint.prune(path.parent, 2, push.unconfirmed())
    push.queue_checkpoint(folder.save("best"))
    assert push.drain(30) == []
    assert stored_steps(sdk_bucket) == folder.steps() == [2, 3]
    for name in sdk_bucket.names("run/"):
        assert sdk_bucket.get(name) == (folder.path / name.removeprefix("run/")).read_bytes()
    assert {name for name in sdk_bucket.names("run/") if "best" in name}
    end = f"uploaded to {sdk_bucket.url('run')}"
    assert any(line.startswith("upload: 7 files, ") and line.endswith(end) for line in caplog.messages)


@pytest.mark.parametrize("kind", ["stall", "fail"])
def test_a_failing_store_delays_no_step_and_no_checkpoint_is_deleted(sdk_bucket, proxy, folder, kind, caplog):
    push = start_push(sdk_bucket.store("run"), folder)
    proxy.failure = lambda method, path: kind
    for step in range(1, 7):
        path = folder.save(step)
        started = time.monotonic()
        push.queue_files()
        push.queue_checkpoint(path)
        checkpoint.prune(path.parent, 2, push.unconfirmed())
        assert time.monotonic() - started < 0.5
    wait_until(lambda: len(proxy.failures) > 1)
    assert folder.steps() == [1, 2, 3, 4, 5, 6]
    wait_until(lambda: "the file is kept, retrying in" in caplog.text)
    assert "accepts files again" not in caplog.text
    proxy.heal()
    assert push.drain(30) == []
    assert stored_steps(sdk_bucket) == [5, 6]  # older checkpoints are not uploaded any more
    assert checkpoint.prune(folder.path / "checkpoint", 2, push.unconfirmed())
    assert folder.steps() == [5, 6]
    assert "accepts files again" in caplog.text
    assert "tries failed" in caplog.text


def test_metrics_are_uploaded_before_their_checkpoint(bucket, proxy, folder):
    proxy.failure = lambda method, path: None if proxy.healed.is_set() or method != "PUT" else "stall"
    push = start_push(bucket.store("run", timeout=20), folder)
    for step in (1, 2):
        path = folder.save(step)
        (folder.path / "samples").mkdir(exist_ok=True)
        (folder.path / "samples/a.png").write_bytes(b"image")
        push.queue_files()
        push.queue_checkpoint(path)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3}\n')  # this later row belongs to the next checkpoint
    proxy.heal()
    assert push.drain(30) == []
    puts = [path.split("?")[0].rpartition("/")[2] for method, path in proxy.requests if method == "PUT"]
    assert puts[-4:] == ["metrics.jsonl", checkpoint.file_name(6, 2), checkpoint.file_name(6, 1), "a.png"]
    rows = [json.loads(line)["step"] for line in bucket.get("run/metrics.jsonl").splitlines()]
    assert rows == [1, 2]


def test_an_upload_with_a_wrong_size_is_not_confirmed(sdk_bucket, proxy, folder):
    proxy.failure = lambda method, path: "grow" if method == "HEAD" and "rank0" in path else None
    push = start_push(sdk_bucket.store("run"), folder, keep=1)
    push.queue_checkpoint(folder.save(1))
    push.queue_checkpoint(folder.save(2))
    wait_until(lambda: len(proxy.failures) > 2)
    assert len(push.unconfirmed()) == 2
    *names, reason = push.drain(0.2)
    assert names == [f"checkpoint/{checkpoint.file_name(6, step)}" for step in (1, 2)]
    assert "bytes were uploaded, but the object in the store has" in reason
    proxy.heal()


def test_a_refused_file_does_not_block_other_uploads(bucket, proxy, folder):
    proxy.failure = lambda method, path: "fail" if "odd" in path or "w6_2_" in path else None
    (folder.path / "odd.png").write_bytes(b"x")
    for step in (1, 2):
        folder.save(step)
    push = start_push(bucket.store("run"), folder)
    push.queue_files()
    wait_until(lambda: stored_steps(bucket) == [1] and "run/metrics.jsonl" in bucket.names("run/"))
    assert push.drain(0.2)[:-1] == [f"checkpoint/{checkpoint.file_name(6, 2)}", "odd.png"]


def test_files_left_by_an_earlier_start_are_uploaded(bucket, folder):
    for step in (1, 2, 3):
        folder.save(step)
    folder.save("best")
    second = "checkpoint/" + checkpoint.file_name(6, 2)
    bucket.put(f"run/{second}", (folder.path / second).read_bytes())
    bucket.put("run/checkpoint/" + checkpoint.file_name(6, "best"), b"another")
    push = start_push(bucket.store("run"), folder)
    assert push.drain(30) == []
    assert stored_steps(bucket) == [2, 3]
    best = "checkpoint/" + checkpoint.file_name(6, "best")
    assert bucket.get(f"run/{best}") == (folder.path / best).read_bytes()


def test_later_checkpoints_in_the_store_are_not_pruned(bucket, folder):
    other = Folder(folder.path.parent / "other")
    for step in (10, 11):
        bucket.put(f"run/checkpoint/{checkpoint.file_name(6, step)}", other.save(step).read_bytes())
    push = start_push(bucket.store("run"), folder, keep=1)
    push.queue_checkpoint(folder.save(4))
    assert push.drain(30) == []
    assert stored_steps(bucket) == [4, 10, 11]


def short_run(bucket: Bucket, folder: Folder, cloud: Cloud, error: Exception | None = None) -> None:
    """Save one checkpoint, then raise ``error`` or end normally."""
    with UploadContext(cloud) as pushing:
        push = Uploader(bucket.store("run", timeout=60), folder.path, cloud, keep=1)
        pushing.start(push)
        push.queue_checkpoint(folder.save(3))
        if error:
            raise error


def test_the_end_of_a_run_waits_for_push_timeout_and_names_the_rest(bucket, proxy, folder):
    proxy.failure = lambda method, path: "stall" if method == "PUT" else None
    started = time.monotonic()
    with pytest.raises(OcrnetError) as raised:
        short_run(bucket, folder, Cloud(push_timeout=1))
    assert 0.9 < time.monotonic() - started < 10
    name = checkpoint.file_name(6, 3)
    message = str(raised.value)
    assert f"not uploaded to {bucket.url('run')} within 1 s (cloud.push_timeout): checkpoint/{name}" in message
    assert f"all files are kept in {folder.path}; run the same command with --resume_ckpt auto to upload" in message


@pytest.mark.parametrize("error", [OcrnetError("the images are broken"), Stopped(signal.SIGTERM), None])
def test_saved_files_are_uploaded_however_a_run_ends(bucket, folder, error):
    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        short_run(bucket, folder, Cloud(), error)
    assert stored_steps(bucket) == [3]
    assert "run/metrics.jsonl" in bucket.names("run/")


def test_an_error_and_the_files_not_uploaded_are_both_reported(bucket, proxy, folder):
    proxy.failure = lambda method, path: "fail"
    with pytest.raises(OcrnetError, match=r"the images are broken; also, not uploaded to .*checkpoint/"):
        short_run(bucket, folder, Cloud(push_timeout=0), OcrnetError("the images are broken"))


def test_a_folder_store_holds_only_complete_files(folder, tmp_path, monkeypatch):
    store = FolderStore(tmp_path / "share")
    push = start_push(store, folder)
    push.queue_checkpoint(folder.save(1))
    assert push.drain(30) == []
    (name,) = [item.name for item in store.list("checkpoint/")]
    assert checkpoint.load(tmp_path / "share" / name).meta["step"] == 1
    assert not list((tmp_path / "share").rglob(".*"))


# Resuming from a store.


def upload_run(bucket: Bucket, folder: Folder, *steps: int | str) -> None:
    """Save these steps in a run folder and copy its files to the store."""
    for step in steps:
        folder.save(step)
    for path in folder.path.rglob("*"):
        if path.is_file():
            bucket.put(f"run/{path.relative_to(folder.path)}", path.read_bytes())


def download(bucket: Bucket, folder: Folder, resume_from: str | None = "auto", **cloud) -> None:
    """Prepare a run folder from the store as the start of a run does."""
    cloud = Cloud(**{"timeout": 1, "retries": 1} | cloud)
    resume.open_train_url(Config(train_url=bucket.url("run"), save_dir=str(folder.path), cloud=cloud), resume_from)


def test_the_newest_checkpoint_is_downloaded_with_its_metrics(sdk_bucket, folder, tmp_path, caplog):
    upload_run(sdk_bucket, folder, 3, 6, "best")
    new_folder = Folder(tmp_path / "new")
    (new_folder.path / "metrics.jsonl").write_text("of another start\n")
    download(sdk_bucket, new_folder)
    assert "checkpoint/" + checkpoint.file_name(6, 6) in caplog.messages[0]
    assert new_folder.steps() == [6]
    for name in ("metrics.jsonl", "checkpoint/" + checkpoint.file_name(6, "best")):
        assert (new_folder.path / name).read_bytes() == (folder.path / name).read_bytes()
    assert (new_folder.path / "metrics.jsonl.before").read_text() == "of another start\n"
    caplog.clear()
    download(sdk_bucket, new_folder)
    assert caplog.messages == []


def test_the_newer_of_the_local_and_the_stored_checkpoint_is_used(bucket, proxy, folder, tmp_path, caplog):
    upload_run(bucket, folder, 3)
    new_folder = Folder(tmp_path / "new")
    new_folder.save(6)
    download(bucket, new_folder)
    assert caplog.messages == []
    assert new_folder.steps() == [6]
    (new_folder.path / "checkpoint" / checkpoint.file_name(6, 6)).write_bytes(b"cut short")
    download(bucket, new_folder)
    assert f"{checkpoint.file_name(6, 3)} " in caplog.messages[0]
    assert new_folder.steps() == [3, 6]


def test_a_damaged_checkpoint_in_the_store_is_skipped(sdk_bucket, folder, tmp_path, caplog):
    upload_run(sdk_bucket, folder, 3, 6)
    name = f"run/checkpoint/{checkpoint.file_name(6, 6)}"
    sdk_bucket.put(name, sdk_bucket.get(name)[:-100])
    new_folder = Folder(tmp_path / "new")
    download(sdk_bucket, new_folder)
    assert caplog.messages[0].startswith(f"resume: skipped: {sdk_bucket.url(name)}: ")
    assert "truncated or altered" in caplog.messages[0]
    assert new_folder.steps() == [3]


def test_a_checkpoint_altered_in_transit_is_downloaded_again(sdk_bucket, proxy, folder, tmp_path):
    upload_run(sdk_bucket, folder, 3, 6)
    proxy.failure = lambda method, path: "flip" if "w6_6_" in path and method == "GET" and not proxy.failures else None
    new_folder = Folder(tmp_path / "new")
    download(sdk_bucket, new_folder)
    assert proxy.failures
    assert new_folder.steps() == [6]


@pytest.mark.parametrize("kind", ["fail", "stall"])
def test_an_unreachable_checkpoint_is_an_error_and_no_older_one_is_used(sdk_bucket, proxy, folder, tmp_path, kind):
    upload_run(sdk_bucket, folder, 3, 6)
    proxy.failure = lambda method, path: kind if "w6_6_" in path else None
    new_folder = Folder(tmp_path / "new")
    with pytest.raises(OcrnetError, match=r"w6_6_rank0\.safetensors: .* \(2 tries\)"):
        download(sdk_bucket, new_folder)
    assert new_folder.steps() == []


def test_a_fresh_start_over_an_earlier_run_is_refused(bucket, folder, tmp_path, caplog):
    download(bucket, Folder(tmp_path / "new"), None)
    assert caplog.messages == []
    upload_run(bucket, folder, 3)
    with pytest.raises(OcrnetError, match="holds checkpoints of an earlier run; resume from them with --resume_ckpt"):
        download(bucket, Folder(tmp_path / "new"), None)


def test_earlier_evaluation_results_are_merged(bucket, tmp_path):
    cfg = Config(train_url=bucket.url("run"), save_dir=str(tmp_path))
    bucket.put("run/eval.jsonl", b'{"step": 1}\n{"step": 2}\n')
    (tmp_path / "eval.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    resume.merge_remote_results(cfg, bucket.store("run"))
    assert [json.loads(line)["step"] for line in (tmp_path / "eval.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_an_unwritable_store_is_an_error_at_the_start(sdk_bucket, tmp_path):
    check_writable(sdk_bucket.store("run"), Cloud(timeout=1))
    assert not sdk_bucket.names("run/")
    (tmp_path / "file").touch()
    with pytest.raises(OcrnetError, match=r"train_url .*file/run: .*Not a directory"):
        check_writable(FolderStore(tmp_path / "file/run"), Cloud())
    with pytest.raises(OcrnetError, match=r"train_url /proc/run: "):
        check_writable(FolderStore(Path("/proc/run")), Cloud())
    sdk_bucket.name = "no-such-bucket"
    with pytest.raises(OcrnetError, match=r"train_url .*no-such-bucket/run: .*(does not exist|NoSuchBucket)"):
        check_writable(sdk_bucket.store("run"), Cloud(timeout=1, retries=0))
