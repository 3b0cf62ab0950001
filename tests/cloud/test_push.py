"""Results to a store: by a thread that no step waits for, and nothing local goes before the store confirmed it."""

import contextlib
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from servers import Place

from ocrnet.cloud import resume
from ocrnet.cloud.folder import FolderStore
from ocrnet.cloud.push import UploadContext, Uploader, check_writable
from ocrnet.config import Cloud, Config
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import Stopped
from ocrnet.weights import checkpoint

pytestmark = pytest.mark.usefixtures("quick")


class Folder:
    """A run's folder, as the loop writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def save(self, step: int | str) -> Path:
        """Write a checkpoint, after the row of its step."""
        if isinstance(step, int):
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"kind": "train", "step": step}) + "\n")
        path = self.path / "checkpoint" / checkpoint.file_name(6, step)
        tensors = {"weight": np.full(1000, step if isinstance(step, int) else -1, np.float32)}
        checkpoint.save(path, tensors, {"step": step})
        return path

    def steps(self) -> list[int]:
        return [checkpoint.step_of(path) for path in checkpoint.steps(self.path / "checkpoint")]


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "out")


def pusher(store, folder: Folder, *, keep: int = 2, **cloud) -> Uploader:
    push = Uploader(store, folder.path, Cloud(**{"timeout": 1} | cloud), keep=keep)
    push.queue_missing(store.list("checkpoint/"))
    push.start()
    return push


def steps(place: Place) -> list[int]:
    return sorted(step for name in place.names("run/") if (step := checkpoint.step_of(name)) is not None)


def until(found) -> None:
    end = time.monotonic() + 30
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_is_saved_is_pushed_and_pruned_on_both_sides(place, folder):
    push = pusher(place.store("run"), folder)
    for step in (1, 2, 3):
        path = folder.save(step)
        push.queue_files()
        push.queue_checkpoint(path)
        until(lambda step=step: step in steps(place))
        checkpoint.prune(path.parent, 2, push.unconfirmed())
    push.queue_checkpoint(folder.save("best"))
    said = []
    assert push.drain(30, said.append) == []
    assert steps(place) == folder.steps() == [2, 3]
    for name in place.names("run/"):
        assert place.get(name) == (folder.path / name.removeprefix("run/")).read_bytes()
    assert {name for name in place.names("run/") if "best" in name}
    end = f"uploaded to {place.url('run')}"
    assert any(line.startswith("upload: 7 files, ") and line.endswith(end) for line in said)


@pytest.mark.parametrize("kind", ["stall", "fail"])
def test_no_step_waits_and_nothing_goes_while_the_store_does_not_take_it(place, proxy, folder, kind):
    push = pusher(place.store("run"), folder)
    proxy.fault = lambda method, path: kind
    for step in range(1, 7):
        path = folder.save(step)
        begun = time.monotonic()
        push.queue_files()
        push.queue_checkpoint(path)
        checkpoint.prune(path.parent, 2, push.unconfirmed())
        assert time.monotonic() - begun < 0.5
    until(lambda: len(proxy.faults) > 1)
    assert folder.steps() == [1, 2, 3, 4, 5, 6]
    until(lambda: any("the file is kept, retrying in" in line for line in push.take_log_lines()))
    proxy.heal()
    said = []
    assert push.drain(30, said.append) == []
    assert steps(place) == [5, 6]  # older ones are of no use any more
    assert checkpoint.prune(folder.path / "checkpoint", 2, push.unconfirmed())
    assert folder.steps() == [5, 6]
    assert any("accepts files again" in line for line in said)
    assert any("tries failed" in line for line in said)


def test_the_record_goes_before_the_checkpoint_of_its_moment(bucket, proxy, folder):
    proxy.fault = lambda method, path: None if proxy.healed.is_set() or method != "PUT" else "stall"
    push = pusher(bucket.store("run", timeout=20), folder)
    for step in (1, 2):
        path = folder.save(step)
        (folder.path / "samples").mkdir(exist_ok=True)
        (folder.path / "samples/a.png").write_bytes(b"picture")
        push.queue_files()
        push.queue_checkpoint(path)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3}\n')  # of later: it belongs to the next checkpoint
    proxy.heal()
    assert push.drain(30, print) == []
    puts = [path.split("?")[0].rpartition("/")[2] for method, path in proxy.seen if method == "PUT"]
    assert puts[-4:] == ["metrics.jsonl", checkpoint.file_name(6, 2), checkpoint.file_name(6, 1), "a.png"]
    rows = [json.loads(line)["step"] for line in bucket.get("run/metrics.jsonl").splitlines()]
    assert rows == [1, 2]


def test_a_store_that_lies_about_what_it_has_is_not_believed(place, proxy, folder):
    proxy.fault = lambda method, path: "grow" if method == "HEAD" and "rank0" in path else None
    push = pusher(place.store("run"), folder, keep=1)
    push.queue_checkpoint(folder.save(1))
    push.queue_checkpoint(folder.save(2))
    until(lambda: len(proxy.faults) > 2)
    assert len(push.unconfirmed()) == 2
    *names, why = push.drain(0.2, print)
    assert names == [f"checkpoint/{checkpoint.file_name(6, step)}" for step in (1, 2)]
    assert "bytes were uploaded, but the object in the store has" in why
    proxy.heal()


def test_a_file_that_the_store_refuses_holds_nothing_up(bucket, proxy, folder):
    proxy.fault = lambda method, path: "fail" if "odd" in path or "w6_2_" in path else None
    (folder.path / "odd.png").write_bytes(b"x")
    for step in (1, 2):
        folder.save(step)
    push = pusher(bucket.store("run"), folder)
    push.queue_files()
    until(lambda: steps(bucket) == [1] and "run/metrics.jsonl" in bucket.names("run/"))
    assert push.drain(0.2, print)[:-1] == [f"checkpoint/{checkpoint.file_name(6, 2)}", "odd.png"]


def test_what_an_earlier_start_could_not_push_is_pushed_first(bucket, folder):
    for step in (1, 2, 3):
        folder.save(step)
    folder.save("best")
    second = "checkpoint/" + checkpoint.file_name(6, 2)
    bucket.put(f"run/{second}", (folder.path / second).read_bytes())
    bucket.put("run/checkpoint/" + checkpoint.file_name(6, "best"), b"another")
    push = pusher(bucket.store("run"), folder)
    assert push.drain(30, print) == []
    assert steps(bucket) == [2, 3]
    best = "checkpoint/" + checkpoint.file_name(6, "best")
    assert bucket.get(f"run/{best}") == (folder.path / best).read_bytes()


def test_a_later_run_in_the_store_is_not_pruned_by_one_begun_from_an_older_checkpoint(bucket, folder):
    other = Folder(folder.path.parent / "other")
    for step in (10, 11):
        bucket.put(f"run/checkpoint/{checkpoint.file_name(6, step)}", other.save(step).read_bytes())
    push = pusher(bucket.store("run"), folder, keep=1)
    push.queue_checkpoint(folder.save(4))
    assert push.drain(30, print) == []
    assert steps(bucket) == [4, 10, 11]


def short_run(place: Place, folder: Folder, cloud: Cloud, error: Exception | None = None) -> None:
    """Save a checkpoint, and end."""
    with UploadContext(cloud) as pushing:
        push = Uploader(place.store("run", timeout=60), folder.path, cloud, keep=1)
        pushing.start(push, print)
        push.queue_checkpoint(folder.save(3))
        if error:
            raise error


def test_the_end_waits_so_long_and_names_what_is_left(bucket, proxy, folder):
    proxy.fault = lambda method, path: "stall" if method == "PUT" else None
    begun = time.monotonic()
    with pytest.raises(OcrnetError) as told:
        short_run(bucket, folder, Cloud(push_timeout=1))
    assert 0.9 < time.monotonic() - begun < 10
    name = checkpoint.file_name(6, 3)
    assert f"not uploaded to {bucket.url('run')} within 1 s (cloud.push_timeout): checkpoint/{name}" in str(told.value)
    kept = f"all files are kept in {folder.path}; run the same command with --resume_ckpt auto to upload"
    assert kept in str(told.value)


@pytest.mark.parametrize("error", [OcrnetError("the images are broken"), Stopped(signal.SIGTERM), None])
def test_whatever_ends_a_run_what_it_saved_is_pushed(bucket, folder, error):
    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        short_run(bucket, folder, Cloud(), error)
    assert steps(bucket) == [3]
    assert "run/metrics.jsonl" in bucket.names("run/")


def test_an_error_and_what_was_not_pushed_are_both_told(bucket, proxy, folder):
    proxy.fault = lambda method, path: "fail"
    with pytest.raises(OcrnetError, match=r"the images are broken; also, not uploaded to .*checkpoint/"):
        short_run(bucket, folder, Cloud(push_timeout=0), OcrnetError("the images are broken"))


def test_a_folder_takes_results_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    store = FolderStore(tmp_path / "share")
    push = pusher(store, folder)
    push.queue_checkpoint(folder.save(1))
    assert push.drain(30, print) == []
    (name,) = [item.name for item in store.list("checkpoint/")]
    assert checkpoint.load(tmp_path / "share" / name).meta["step"] == 1
    assert not list((tmp_path / "share").rglob(".*"))


# Resuming from what was pushed.


def pushed(place: Place, folder: Folder, *saved: int | str) -> None:
    for step in saved:
        folder.save(step)
    for path in folder.path.rglob("*"):
        if path.is_file():
            place.put(f"run/{path.relative_to(folder.path)}", path.read_bytes())


def bring(place: Place, folder: Folder, resumed: str | None = "auto", **cloud) -> list[str]:
    said: list[str] = []
    cloud = Cloud(**{"timeout": 1, "retries": 1} | cloud)
    cfg = Config(train_url=place.url("run"), save_dir=str(folder.path), cloud=cloud)
    return resume.open_train_url(cfg, resumed, said.append)[2] + said


def test_the_newest_checkpoint_comes_with_its_record(place, folder, tmp_path):
    pushed(place, folder, 3, 6, "best")
    there = Folder(tmp_path / "new")
    (there.path / "metrics.jsonl").write_text("of another start\n")
    said = bring(place, there)
    assert "checkpoint/" + checkpoint.file_name(6, 6) in said[0]
    assert there.steps() == [6]
    for name in ("metrics.jsonl", "checkpoint/" + checkpoint.file_name(6, "best")):
        assert (there.path / name).read_bytes() == (folder.path / name).read_bytes()
    assert (there.path / "metrics.jsonl.before").read_text() == "of another start\n"
    assert bring(place, there) == []


def test_the_newer_of_both_sides_is_taken(bucket, proxy, folder, tmp_path):
    pushed(bucket, folder, 3)
    there = Folder(tmp_path / "new")
    there.save(6)
    assert bring(bucket, there) == []
    assert there.steps() == [6]
    (there.path / "checkpoint" / checkpoint.file_name(6, 6)).write_bytes(b"cut short")
    assert f"{checkpoint.file_name(6, 3)} " in bring(bucket, there)[0]
    assert there.steps() == [3, 6]


def test_a_damaged_checkpoint_in_the_store_is_passed_over(place, folder, tmp_path):
    pushed(place, folder, 3, 6)
    name = f"run/checkpoint/{checkpoint.file_name(6, 6)}"
    place.put(name, place.get(name)[:-100])
    there = Folder(tmp_path / "new")
    said = bring(place, there)
    assert said[0].startswith(f"resume: skipped: {place.url(name)}: ")
    assert "truncated or altered" in said[0]
    assert there.steps() == [3]


def test_what_was_altered_on_its_way_is_fetched_again(place, proxy, folder, tmp_path):
    pushed(place, folder, 3, 6)
    proxy.fault = lambda method, path: "flip" if "w6_6_" in path and method == "GET" and not proxy.faults else None
    there = Folder(tmp_path / "new")
    bring(place, there)
    assert proxy.faults
    assert there.steps() == [6]


@pytest.mark.parametrize("kind", ["fail", "stall"])
def test_a_store_that_does_not_answer_is_no_reason_to_begin_earlier(place, proxy, folder, tmp_path, kind):
    pushed(place, folder, 3, 6)
    proxy.fault = lambda method, path: kind if "w6_6_" in path else None
    there = Folder(tmp_path / "new")
    with pytest.raises(OcrnetError, match=r"w6_6_rank0\.safetensors: .* \(2 tries\)"):
        bring(place, there)
    assert there.steps() == []


def test_a_fresh_start_does_not_mix_with_an_earlier_run(bucket, folder, tmp_path):
    assert bring(bucket, Folder(tmp_path / "new"), None) == []
    pushed(bucket, folder, 3)
    with pytest.raises(OcrnetError, match="holds checkpoints of an earlier run; resume from them with --resume_ckpt"):
        bring(bucket, Folder(tmp_path / "new"), None)


def test_results_of_earlier_evaluations_stay(bucket, tmp_path):
    cfg = Config(train_url=bucket.url("run"), save_dir=str(tmp_path))
    bucket.put("run/eval.jsonl", b'{"step": 1}\n{"step": 2}\n')
    (tmp_path / "eval.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    resume.merge_remote_results(cfg, bucket.store("run"), print)
    assert [json.loads(line)["step"] for line in (tmp_path / "eval.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_whether_a_store_takes_files_is_tried_at_the_start(place, tmp_path):
    check_writable(place.store("run"), Cloud(timeout=1), print)
    assert not place.names("run/")
    (tmp_path / "file").touch()
    with pytest.raises(OcrnetError, match=r"train_url .*file/run: .*Not a directory"):
        check_writable(FolderStore(tmp_path / "file/run"), Cloud(), print)
    with pytest.raises(OcrnetError, match=r"train_url /proc/run: "):
        check_writable(FolderStore(Path("/proc/run")), Cloud(), print)
    place.bucket = "no-such-bucket"
    with pytest.raises(OcrnetError, match=r"train_url .*no-such-bucket/run: .*(does not exist|NoSuchBucket)"):
        check_writable(place.store("run"), Cloud(timeout=1, retries=0), print)
