"""Data from a store: whole or not at all, once, taken up where a killed pull was, and every failure told."""

import hashlib
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from servers import Place, Proxy, every_third

from ocrnet.cloud import pull
from ocrnet.cloud.cache import BLOCK, Cache, Speaker
from ocrnet.config import Backbone, Cloud, Config, Data
from ocrnet.distributed.launcher import World
from ocrnet.train.setup import find_resume
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.urls import parse
from ocrnet.weights import checkpoint

pytestmark = pytest.mark.usefixtures("quick")

FILES = {f"images/{kind}/{i}.png": bytes([i]) * (100 + 40 * i) for kind in ("train", "val") for i in range(5)}


@pytest.fixture
def dataset(place) -> Place:
    return filled(place)


def filled(place: Place) -> Place:
    for name, content in FILES.items():
        place.put(f"data/{name}", content)
    return place


def config(place: Place | None, cache: Path, path: str = "data", *, data: Data | None = None, **cloud) -> Config:
    cloud = Cloud(**{"cache_dir": str(cache), "timeout": 2, "retries": 4} | cloud)
    return Config(data_url=place.url(path) if place else path, cloud=cloud, data=data or Data())


def pulled(cfg: Config) -> tuple[dict[str, bytes], list[str]]:
    """Pull; return the files that a dataset would be read from, and all that was said."""
    said: list[str] = []
    cfg, notes = pull.download_dataset(cfg, said.append)
    return files(Path(cfg.data.dataset_dir)), [*said, *notes]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def gets(proxy: Proxy, name: str = "images/") -> int:
    return sum(method == "GET" and name in path and "prefix=" not in path for method, path in proxy.seen)


def multipart(place: Place, name: str, content: bytes) -> None:
    """Put an object in parts, so that its ETag is no MD5."""
    where = {"Bucket": place.bucket, "Key": name}
    upload = place.direct.create_multipart_upload(**where)["UploadId"]
    etag = place.direct.upload_part(**where, UploadId=upload, PartNumber=1, Body=content)["ETag"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
    place.direct.complete_multipart_upload(**where, UploadId=upload, MultipartUpload=parts)


def test_a_folder_is_pulled_once_and_what_changed_again(bucket, proxy, tmp_path):
    cfg = config(filled(bucket), tmp_path)
    assert pulled(cfg)[0] == FILES
    assert gets(proxy) == len(FILES)
    found, said = pulled(cfg)
    assert found == FILES
    assert gets(proxy) == len(FILES)
    assert any("all 10 files are already in" in line for line in said)
    bucket.put("data/images/val/0.png", b"x" * 100)  # as long as before
    bucket.direct.delete_object(Bucket=bucket.bucket, Key="data/images/val/1.png")
    (tmp_path / Path(pull.download_dataset(cfg, print)[0].data.dataset_dir) / "images/train/0.png").write_bytes(b"cut")
    found, _ = pulled(cfg)
    changed = FILES | {"images/val/0.png": b"x" * 100}
    del changed["images/val/1.png"]
    assert found == changed


def test_a_server_that_fails_every_third_request(dataset, proxy, tmp_path):
    proxy.fault = every_third("GET")
    found, said = pulled(config(dataset, tmp_path))
    assert found == FILES
    assert sum("retrying in" in line for line in said) == len(proxy.faults) >= 4


@pytest.mark.parametrize("kind", ["stall", "short", "flip"])
def test_a_request_that_goes_wrong_is_told_and_made_again(dataset, proxy, tmp_path, kind):
    proxy.fault = lambda method, path: kind if "train/3.png" in path and len(proxy.faults) < 2 else None
    found, said = pulled(config(dataset, tmp_path))
    assert found == FILES
    assert len([line for line in said if "data/images/train/3.png: " in line and "retrying in" in line]) == 2


@pytest.mark.parametrize("kind", ["stall", "short", "flip", "fail"])
def test_what_never_comes_whole_is_no_file(dataset, proxy, tmp_path, kind):
    proxy.fault = lambda method, path: kind if "train/3.png" in path else None
    with pytest.raises(OcrnetError, match=rf"{dataset.url('data/images/train/3.png')}: .* \(2 tries\)"):
        pulled(config(dataset, tmp_path, retries=1))
    proxy.heal()
    kept = Cache(parse("data_url", dataset.url("data")), Cloud(cache_dir=str(tmp_path)), print).folder
    there = {name: content for name, content in files(kept).items() if not name.endswith(".part")}
    assert there.items() <= FILES.items()
    assert "images/train/3.png" not in there
    before = gets(proxy)
    assert pulled(config(dataset, tmp_path))[0] == FILES
    assert gets(proxy) - before == len(FILES) - len(there)


def test_a_listing_that_lies_about_a_size(dataset, proxy, tmp_path):
    proxy.fault = lambda method, path: "grow" if method == "GET" and "prefix=" in path else None
    with pytest.raises(OcrnetError, match=r"images/train/0\.png: expected 101 bytes, got 100 \(2 tries\)"):
        pulled(config(dataset, tmp_path, retries=1))
    assert not list(tmp_path.rglob("train/0.png"))


def test_without_an_md5_the_size_is_asked_twice_and_said(place, proxy, tmp_path):
    multipart(place, "data/big.bin", b"z" * 1000)
    place.put("data/small.bin", b"y")
    found, said = pulled(config(place, tmp_path / "a"))
    assert {name: len(content) for name, content in found.items()} == {"big.bin": 1000, "small.bin": 1}
    assert any("1 files were verified by size only" in line for line in said)
    proxy.fault = lambda method, path: "grow" if method == "HEAD" else None
    with pytest.raises(OcrnetError, match=r"lists 1,000 bytes, but the object has 1,001 bytes"):
        pulled(config(place, tmp_path / "b", retries=0))


def test_checksums_beside_the_data_are_used(bucket, proxy, tmp_path):
    content = b"z" * 1000
    multipart(bucket, "data/big.bin", content)
    bucket.put("data/small.bin", b"y")
    good = f"{hashlib.sha256(content).hexdigest()}  ./big.bin\n"
    bucket.put("data/SHA256SUMS", good.encode())
    found, said = pulled(config(bucket, tmp_path / "a"))
    assert found == {"big.bin": content, "small.bin": b"y"}
    assert not any("by size only" in line for line in said)
    proxy.fault = lambda method, path: "flip" if "big.bin" in path else None
    with pytest.raises(OcrnetError, match=r"big\.bin: the download has the SHA256"):
        pulled(config(bucket, tmp_path / "b", retries=0))
    proxy.heal()
    bucket.put("data/SHA256SUMS", good.replace("big", "gone").encode())
    with pytest.raises(OcrnetError, match=r"SHA256SUMS names 'gone\.bin', which is missing"):
        pulled(config(bucket, tmp_path / "c"))


def _pull_in_a_process(cfg: Config, said: str) -> None:
    with open(said, "a", buffering=1) as file:
        pull.download_dataset(cfg, lambda line: print(line, file=file))


def start(cfg: Config, said: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=_pull_in_a_process, args=(cfg, str(said)))
    process.start()
    return process


def test_a_killed_pull_is_taken_up_within_a_file(place, proxy, tmp_path):
    content = np.random.default_rng(0).bytes(2 * BLOCK + 1000)
    place.put("data/big.bin", content)
    place.put("data/small.bin", b"y" * 10)
    proxy.fault = lambda method, path: "stall" if gets(proxy, "big.bin") == 3 else None
    cfg = config(place, tmp_path, timeout=60)
    process = start(cfg, tmp_path / "said")
    while gets(proxy, "big.bin") < 3:
        assert process.exitcode is None
        process.join(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    parts = list(tmp_path.rglob(".big.bin.*.part"))
    assert [path.stat().st_size for path in parts] == [2 * BLOCK]
    assert not list(tmp_path.rglob("big.bin"))
    proxy.heal()
    assert pulled(cfg)[0] == {"big.bin": content, "small.bin": b"y" * 10}
    assert gets(proxy, "big.bin") == 4
    assert gets(proxy, "small.bin") == 1
    assert not list(tmp_path.rglob("*.part"))


def test_one_process_of_a_machine_pulls_and_the_others_wait(bucket, proxy, tmp_path):
    proxy.fault = lambda method, path: "stall" if "images/val/4.png" in path and not proxy.healed.is_set() else None
    cfg = config(filled(bucket), tmp_path / "cache", timeout=60, retries=1)
    processes = [start(cfg, tmp_path / f"said{i}") for i in range(2)]
    while not any("another process on this machine" in text for text in map(read, sorted(tmp_path.glob("said*")))):
        assert all(process.exitcode is None for process in processes)
        processes[0].join(0.1)
    proxy.heal()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert gets(proxy) == len(FILES) + len(proxy.faults)
    assert pulled(cfg)[0] == FILES


def test_whichever_rank_does_the_work_tells(bucket, tmp_path, capsys):
    cfg = config(filled(bucket), tmp_path)
    second = Speaker(World(1, 2, 1, "torchrun"))
    pull.download_dataset(cfg, second)
    assert f"rank 1: {bucket.url('data')}: 10 of 10 files" in capsys.readouterr().out
    pull.download_dataset(cfg, second)
    assert capsys.readouterr().out == ""


def read(path: Path) -> str:
    return path.read_text()


def make_tar(contents: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(("name", "mode"), [("set.tar", "w"), ("set.tar.gz", "w:gz")])
def test_a_tar_is_unpacked_once(bucket, proxy, tmp_path, name, mode):
    bucket.put(f"sets/{name}", make_tar({f"Cityscapes/{n}": content for n, content in FILES.items()}, mode))
    cfg = config(bucket, tmp_path, f"sets/{name}")
    assert pulled(cfg)[0] == FILES
    assert not list(tmp_path.rglob(name))  # the disk is for the data
    found, said = pulled(cfg)
    assert found == FILES
    assert any("already unpacked in" in line for line in said)
    assert gets(proxy, name) == 1
    bucket.put(f"sets/{name}", make_tar({"Cityscapes/images/new.png": b"new"}, mode))
    assert pulled(cfg)[0] == {"images/new.png": b"new"}


def test_tars_in_a_folder_are_unpacked_together(bucket, tmp_path):
    bucket.put("sets/a.tar", make_tar({"leftImg8bit/x": b"1"}, "w"))
    bucket.put("sets/b.tgz", make_tar({"gtFine/x": b"2"}, "w:gz"))
    sums = "".join(f"{hashlib.sha256(bucket.get(f'sets/{n}')).hexdigest()}  {n}\n" for n in ("a.tar", "b.tgz"))
    bucket.put("sets/SHA256SUMS", sums.encode())
    assert pulled(config(bucket, tmp_path, "sets"))[0] == {"leftImg8bit/x": b"1", "gtFine/x": b"2"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_tar({"../outside": b"x"}, "w"), "outside the destination"),
        (make_tar({"a": b"x" * 20_000}, "w")[:10_000], "unexpected end of data"),
        (b"no tar at all", "file could not be opened successfully|invalid header|truncated header"),
    ],
)
def test_a_tar_that_cannot_be_trusted_is_no_dataset(bucket, tmp_path, content, message):
    bucket.put("set.tar", content)
    with pytest.raises(OcrnetError, match=rf"set\.tar cannot be unpacked: .*({message})"):
        pulled(config(bucket, tmp_path / "cache", "set.tar"))
    assert not list(tmp_path.rglob("outside"))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.endswith(".unpacked")]


def test_a_full_disk_is_told_and_costs_nothing_that_is_there(bucket, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", small], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        bucket.put("set/a", b"a" * 100_000)
        bucket.put("set/b", b"b" * 500_000)
        with pytest.raises(
            OcrnetError, match=r"needs 585\.9 KiB in .*, but only .* KiB are free; free some space, or set cloud"
        ):
            pulled(config(bucket, small, "set"))
        bucket.put("full.tar.gz", make_tar({"x": b"x" * 100_000, "y": b"y" * 600_000}, "w:gz"))
        with pytest.raises(
            OcrnetError, match=r"full\.tar\.gz cannot be unpacked in .*: No space left on device; free some space"
        ):
            pulled(config(bucket, small, "full.tar.gz"))
        for path in small.glob("*.unpacking/*"):
            path.unlink()
        bucket.put("full.tar.gz", make_tar({"x": b"x" * 100_000}, "w:gz"))
        assert pulled(config(bucket, small, "full.tar.gz"))[0] == {"x": b"x" * 100_000}
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_file_larger_than_allowed_is_told(bucket, tmp_path):
    bucket.put("set/a", b"a" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OcrnetError, match=r"set-\w+/.* cannot be written: File too large; free some space there"):
            pulled(config(bucket, tmp_path, "set"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert pulled(config(bucket, tmp_path, "set"))[0] == {"a": b"a" * 100_000}


def test_what_is_not_there_is_told(place, tmp_path):
    with pytest.raises(OcrnetError, match="the folder is empty"):
        pulled(config(place, tmp_path, "nowhere"))
    with pytest.raises(OcrnetError, match="object not found"):
        pulled(config(place, tmp_path, "nowhere.tar"))
    place.bucket = "no-such-bucket"
    for name in ("data", "data.tar"):
        with pytest.raises(
            OcrnetError, match=rf"data_url \w+://no-such-bucket/{name}: .*(does not exist|NoSuchBucket)"
        ):
            pulled(config(place, tmp_path, name))


def test_a_path_is_used_where_it_is_and_a_file_url_is_copied(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    cfg, notes = pull.download_dataset(config(None, tmp_path / "cache", str(tmp_path / "set")), print)
    assert cfg.data.dataset_dir == str(tmp_path / "set")
    assert "is used in place" in notes[0]
    cfg, _ = pull.download_dataset(config(None, tmp_path / "cache", f"file://{tmp_path}/set"), print)
    assert Path(cfg.data.dataset_dir).is_relative_to(tmp_path / "cache")
    assert files(Path(cfg.data.dataset_dir)) == FILES
    with pytest.raises(OcrnetError, match="the folder does not exist"):
        pull.download_dataset(config(None, tmp_path / "cache", str(tmp_path / "nowhere")), print)


def test_dataset_dir_may_be_a_folder_in_the_data_or_is_said_to_be_passed_over(tmp_path):
    (tmp_path / "set/half/images").mkdir(parents=True)
    (tmp_path / "set/other").mkdir()
    url = str(tmp_path / "set")
    cfg, _ = pull.download_dataset(config(None, tmp_path, url, data=Data(dataset_dir="half")), print)
    assert cfg.data.dataset_dir == f"{url}/half"
    cfg, notes = pull.download_dataset(config(None, tmp_path, url, data=Data(dataset_dir="/elsewhere")), print)
    assert cfg.data.dataset_dir == url
    assert "/elsewhere is ignored" in notes[-1]


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    kept = Cache(parse("data_url", "s3://bucket/x"), Cloud(cache_dir=str(tmp_path)), print)
    for name in ("../x", "/x", "a//b", "a/./b", "a\0b"):
        with pytest.raises(OcrnetError, match="which is not a valid file name"):
            kept.target(name)
    assert json.dumps(str(kept.target("a/b"))) == json.dumps(str(kept.folder / "a/b"))


# Weights: ckpt_url.


def saved(folder: Path, step: int) -> Path:
    path = folder / checkpoint.file_name(6, step)
    checkpoint.save(path, {"weight": np.full(3, step, np.float32)}, {"step": step})
    return path


def test_weights_come_from_a_file_or_from_the_newest_of_a_folder(place, tmp_path):
    for step in (3, 12):
        place.put(f"run/checkpoint/{checkpoint.file_name(6, step)}", saved(tmp_path, step).read_bytes())
    place.put("run/old/" + checkpoint.file_name(6, 99), b"of another folder")
    place.put("zoo/hrnet.pth", b"weights")
    cloud = Cloud(cache_dir=str(tmp_path / "cache"), timeout=1, retries=1)

    def found(path: str) -> Path:
        return pull.download_weights(Config(ckpt_url=place.url(path), cloud=cloud), print)

    assert checkpoint.load(found("run")).meta["step"] == 12
    assert checkpoint.load(found(f"run/checkpoint/{checkpoint.file_name(6, 3)}")).meta["step"] == 3
    assert found("zoo").read_bytes() == found("zoo/hrnet.pth").read_bytes() == b"weights"
    with pytest.raises(OcrnetError, match="object not found; check the name"):
        found("zoo/hrnet.ckpt")
    place.put("zoo/other.ckpt", b"")
    with pytest.raises(OcrnetError, match=r"expected exactly one weights file, found: hrnet\.pth, other\.ckpt"):
        found("zoo")


def test_a_checkpoint_is_begun_from_and_anything_else_is_the_backbones(tmp_path):
    ours = saved(tmp_path, 3)
    cfg = Config(ckpt_url=str(ours), save_dir=str(tmp_path / "out"), total_step=10)
    same, begin_from, notes = pull.apply_ckpt_url(cfg, "auto", print)
    assert (same, begin_from) == (cfg, ours)
    assert "the run starts from it if it has no checkpoint" in notes[0]
    with pytest.raises(OcrnetError, match="both name a checkpoint; keep one"):
        pull.apply_ckpt_url(cfg, "some/file", print)
    theirs = tmp_path / "hrnet.pth"
    theirs.write_bytes(b"weights")
    changed, begin_from, _ = pull.apply_ckpt_url(Config(ckpt_url=str(theirs)), None, print)
    assert (changed.backbone.pretrained, changed.backbone.backbone_ckpt, begin_from) == (True, str(theirs), None)
    both = Config(ckpt_url=str(theirs), backbone=Backbone(backbone_ckpt="x.pth"))
    with pytest.raises(OcrnetError, match="both name the backbone's weights; keep one"):
        pull.apply_ckpt_url(both, None, print)


@pytest.mark.parametrize("resumed", ["auto", None])
def test_a_run_begins_from_ckpt_url_only_where_it_has_no_checkpoint_of_its_own(tmp_path, resumed):
    cfg = Config(save_dir=str(tmp_path / "out"), total_step=10)
    weights = tmp_path / checkpoint.file_name(6, 3)
    checkpoint.save(weights, {"weight": np.zeros(3, np.float32)}, {"step": 3, "config": {}})
    found, _ = find_resume(cfg, resumed, weights)
    assert found.meta["step"] == 3
    own = tmp_path / "out/checkpoint" / checkpoint.file_name(6, 5)
    checkpoint.save(own, {"weight": np.zeros(3, np.float32)}, {"step": 5, "config": {}})
    if resumed:
        assert find_resume(cfg, resumed, weights)[0].meta["step"] == 5
    else:
        with pytest.raises(OcrnetError, match="holds checkpoints of an earlier run"):
            find_resume(cfg, resumed, weights)
