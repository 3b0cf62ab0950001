"""Downloads from a store: complete files only, each once, resumed after a kill, and every failure logged."""

import contextlib
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
from servers import Bucket, Proxy, every_third

from ocrnet.cloud import pull
from ocrnet.cloud.cache import BLOCK, Cache
from ocrnet.config import Backbone, Cloud, Config, Data
from ocrnet.train.setup import find_resume
from ocrnet.utils import log
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.urls import parse
from ocrnet.weights import checkpoint

pytestmark = pytest.mark.usefixtures("short_pauses")

FILES = {f"images/{kind}/{i}.png": bytes([i]) * (100 + 40 * i) for kind in ("train", "val") for i in range(5)}


@pytest.fixture
def dataset(sdk_bucket) -> Bucket:
    return fill(sdk_bucket)


def fill(bucket: Bucket) -> Bucket:
    for name, content in FILES.items():
        bucket.put(f"data/{name}", content)
    return bucket


def config(bucket: Bucket | None, cache: Path, path: str = "data", *, data: Data | None = None, **cloud) -> Config:
    cloud = Cloud(**{"cache_dir": str(cache), "timeout": 2, "retries": 4} | cloud)
    return Config(data_url=bucket.url(path) if bucket else path, cloud=cloud, data=data or Data())


def download(cfg: Config) -> dict[str, bytes]:
    """Download the dataset; return its files by name."""
    return files(Path(pull.download_dataset(cfg).data.dataset_dir))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def count_gets(proxy: Proxy, name: str = "images/") -> int:
    return sum(method == "GET" and name in path and "prefix=" not in path for method, path in proxy.requests)


def multipart(bucket: Bucket, name: str, content: bytes) -> None:
    """Upload an object in parts, so that its ETag is not an MD5."""
    key = {"Bucket": bucket.name, "Key": name}
    upload = bucket.direct.create_multipart_upload(**key)["UploadId"]
    etag = bucket.direct.upload_part(**key, UploadId=upload, PartNumber=1, Body=content)["ETag"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
    bucket.direct.complete_multipart_upload(**key, UploadId=upload, MultipartUpload=parts)


def test_a_folder_is_downloaded_once_and_changed_files_again(bucket, proxy, tmp_path, caplog):
    cfg = config(fill(bucket), tmp_path)
    assert download(cfg) == FILES
    assert count_gets(proxy) == len(FILES)
    caplog.clear()
    assert download(cfg) == FILES
    assert count_gets(proxy) == len(FILES)
    assert "all 10 files are already in" in caplog.text
    bucket.put("data/images/val/0.png", b"x" * 100)  # the same size as before
    bucket.direct.delete_object(Bucket=bucket.name, Key="data/images/val/1.png")
    (tmp_path / Path(pull.download_dataset(cfg).data.dataset_dir) / "images/train/0.png").write_bytes(b"cut")
    downloaded = download(cfg)
    changed = FILES | {"images/val/0.png": b"x" * 100}
    del changed["images/val/1.png"]
    assert downloaded == changed


def test_a_download_succeeds_when_every_third_request_fails(dataset, proxy, tmp_path, caplog):
    proxy.failure = every_third("GET")
    assert download(config(dataset, tmp_path)) == FILES
    assert sum("retrying in" in line for line in caplog.messages) == len(proxy.failures) >= 4


@pytest.mark.parametrize("kind", ["stall", "short", "flip"])
def test_a_failed_request_is_logged_and_retried(dataset, proxy, tmp_path, kind, caplog):
    proxy.failure = lambda method, path: kind if "train/3.png" in path and len(proxy.failures) < 2 else None
    assert download(config(dataset, tmp_path)) == FILES
    assert len([line for line in caplog.messages if "data/images/train/3.png: " in line and "retrying in" in line]) == 2


@pytest.mark.parametrize("kind", ["stall", "short", "flip", "fail"])
def test_an_incomplete_download_leaves_no_file(dataset, proxy, tmp_path, kind):
    proxy.failure = lambda method, path: kind if "train/3.png" in path else None
    with pytest.raises(OcrnetError, match=rf"{dataset.url('data/images/train/3.png')}: .* \(2 tries\)"):
        download(config(dataset, tmp_path, retries=1))
    proxy.heal()
    cache = Cache(parse("data_url", dataset.url("data")), Cloud(cache_dir=str(tmp_path))).folder
    cached = {name: content for name, content in files(cache).items() if not name.endswith(".part")}
    assert cached.items() <= FILES.items()
    assert "images/train/3.png" not in cached
    before = count_gets(proxy)
    assert download(config(dataset, tmp_path)) == FILES
    assert count_gets(proxy) - before == len(FILES) - len(cached)


def test_a_listing_with_a_wrong_size_is_an_error(dataset, proxy, tmp_path):
    proxy.failure = lambda method, path: "grow" if method == "GET" and "prefix=" in path else None
    with pytest.raises(OcrnetError, match=r"images/train/0\.png: expected 101 bytes, got 100 \(2 tries\)"):
        download(config(dataset, tmp_path, retries=1))
    assert not list(tmp_path.rglob("train/0.png"))


def test_without_an_md5_the_size_is_checked_twice_and_logged(sdk_bucket, proxy, tmp_path, caplog):
    multipart(sdk_bucket, "data/big.bin", b"z" * 1000)
    sdk_bucket.put("data/small.bin", b"y")
    downloaded = download(config(sdk_bucket, tmp_path / "a"))
    assert {name: len(content) for name, content in downloaded.items()} == {"big.bin": 1000, "small.bin": 1}
    assert "1 files were verified by size only" in caplog.text
    proxy.failure = lambda method, path: "grow" if method == "HEAD" else None
    with pytest.raises(OcrnetError, match=r"lists 1,000 bytes, but the object has 1,001 bytes"):
        download(config(sdk_bucket, tmp_path / "b", retries=0))


def test_the_checksums_in_sha256sums_are_verified(bucket, proxy, tmp_path, caplog):
    content = b"z" * 1000
    multipart(bucket, "data/big.bin", content)
    bucket.put("data/small.bin", b"y")
    good = f"{hashlib.sha256(content).hexdigest()}  ./big.bin\n"
    bucket.put("data/SHA256SUMS", good.encode())
    assert download(config(bucket, tmp_path / "a")) == {"big.bin": content, "small.bin": b"y"}
    assert "downloaded in" in caplog.text
    assert "by size only" not in caplog.text
    proxy.failure = lambda method, path: "flip" if "big.bin" in path else None
    with pytest.raises(OcrnetError, match=r"big\.bin: the download has the SHA256"):
        download(config(bucket, tmp_path / "b", retries=0))
    proxy.heal()
    bucket.put("data/SHA256SUMS", good.replace("big", "gone").encode())
    with pytest.raises(OcrnetError, match=r"SHA256SUMS names 'gone\.bin', which is missing"):
        download(config(bucket, tmp_path / "c"))


def _download_in_process(cfg: Config, output: str) -> None:
    with open(output, "a", buffering=1) as file, contextlib.redirect_stdout(file):
        log.open_console()
        pull.download_dataset(cfg)


def start_download(cfg: Config, output: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=_download_in_process, args=(cfg, str(output)))
    process.start()
    return process


def test_a_killed_download_resumes_within_a_file(sdk_bucket, proxy, tmp_path):
    content = np.random.default_rng(0).bytes(2 * BLOCK + 1000)
    sdk_bucket.put("data/big.bin", content)
    sdk_bucket.put("data/small.bin", b"y" * 10)
    proxy.failure = lambda method, path: "stall" if count_gets(proxy, "big.bin") == 3 else None
    cfg = config(sdk_bucket, tmp_path, timeout=60)
    process = start_download(cfg, tmp_path / "log")
    while count_gets(proxy, "big.bin") < 3:
        assert process.exitcode is None
        process.join(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    parts = list(tmp_path.rglob(".big.bin.*.part"))
    assert [path.stat().st_size for path in parts] == [2 * BLOCK]
    assert not list(tmp_path.rglob("big.bin"))
    proxy.heal()
    assert download(cfg) == {"big.bin": content, "small.bin": b"y" * 10}
    assert count_gets(proxy, "big.bin") == 4
    assert count_gets(proxy, "small.bin") == 1
    assert not list(tmp_path.rglob("*.part"))


def test_one_process_per_machine_downloads_and_the_others_wait(bucket, proxy, tmp_path):
    proxy.failure = lambda method, path: "stall" if "images/val/4.png" in path and not proxy.healed.is_set() else None
    cfg = config(fill(bucket), tmp_path / "cache", timeout=60, retries=1)
    processes = [start_download(cfg, tmp_path / f"log{i}") for i in range(2)]
    while not any("another process on this machine" in text for text in map(read, sorted(tmp_path.glob("log*")))):
        assert all(process.exitcode is None for process in processes)
        processes[0].join(0.1)
    proxy.heal()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert count_gets(proxy) == len(FILES) + len(proxy.failures)
    assert download(cfg) == FILES


def test_the_rank_that_downloads_logs_it(bucket, proxy, tmp_path, capsys):
    proxy.failure = lambda method, path: "fail" if "train/3.png" in path and not proxy.failures else None
    cfg = config(fill(bucket), tmp_path)
    log.set_rank(1, first_of_machine=False)
    log.open_console()
    pull.download_dataset(cfg)
    retry, summary = capsys.readouterr().out.splitlines()
    assert retry.startswith(f"rank 1: warning: {bucket.url('data/images/train/3.png')}: ")
    assert summary.startswith(f"rank 1: {bucket.url('data')}: 10 of 10 files")
    pull.download_dataset(cfg)
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
def test_a_tar_is_unpacked_once(bucket, proxy, tmp_path, name, mode, caplog):
    bucket.put(f"sets/{name}", make_tar({f"Cityscapes/{n}": content for n, content in FILES.items()}, mode))
    cfg = config(bucket, tmp_path, f"sets/{name}")
    assert download(cfg) == FILES
    assert not list(tmp_path.rglob(name))  # the archive itself is not kept
    assert "already unpacked in" not in caplog.text
    assert download(cfg) == FILES
    assert "already unpacked in" in caplog.text
    assert count_gets(proxy, name) == 1
    bucket.put(f"sets/{name}", make_tar({"Cityscapes/images/new.png": b"new"}, mode))
    assert download(cfg) == {"images/new.png": b"new"}


def test_tars_in_a_folder_are_unpacked_together(bucket, tmp_path):
    bucket.put("sets/a.tar", make_tar({"leftImg8bit/x": b"1"}, "w"))
    bucket.put("sets/b.tgz", make_tar({"gtFine/x": b"2"}, "w:gz"))
    sums = "".join(f"{hashlib.sha256(bucket.get(f'sets/{n}')).hexdigest()}  {n}\n" for n in ("a.tar", "b.tgz"))
    bucket.put("sets/SHA256SUMS", sums.encode())
    assert download(config(bucket, tmp_path, "sets")) == {"leftImg8bit/x": b"1", "gtFine/x": b"2"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_tar({"../outside": b"x"}, "w"), "outside the destination"),
        (make_tar({"a": b"x" * 20_000}, "w")[:10_000], "unexpected end of data"),
        (b"no tar at all", "file could not be opened successfully|invalid header|truncated header"),
    ],
)
def test_an_unsafe_or_damaged_tar_is_refused(bucket, tmp_path, content, message):
    bucket.put("set.tar", content)
    with pytest.raises(OcrnetError, match=rf"set\.tar cannot be unpacked: .*({message})"):
        download(config(bucket, tmp_path / "cache", "set.tar"))
    assert not list(tmp_path.rglob("outside"))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.endswith(".unpacked")]


def test_a_full_disk_is_an_error_and_a_smaller_download_then_succeeds(bucket, tmp_path):
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
            download(config(bucket, small, "set"))
        bucket.put("full.tar.gz", make_tar({"x": b"x" * 100_000, "y": b"y" * 600_000}, "w:gz"))
        with pytest.raises(
            OcrnetError, match=r"full\.tar\.gz cannot be unpacked in .*: No space left on device; free some space"
        ):
            download(config(bucket, small, "full.tar.gz"))
        for path in small.glob("*.unpacking/*"):
            path.unlink()
        bucket.put("full.tar.gz", make_tar({"x": b"x" * 100_000}, "w:gz"))
        assert download(config(bucket, small, "full.tar.gz")) == {"x": b"x" * 100_000}
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_file_above_the_size_limit_of_the_process_is_an_error(bucket, tmp_path):
    bucket.put("set/a", b"a" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OcrnetError, match=r"set-\w+/.* cannot be written: File too large; free some space there"):
            download(config(bucket, tmp_path, "set"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert download(config(bucket, tmp_path, "set")) == {"a": b"a" * 100_000}


def test_missing_objects_and_buckets_are_errors(sdk_bucket, tmp_path):
    with pytest.raises(OcrnetError, match="the folder is empty"):
        download(config(sdk_bucket, tmp_path, "nowhere"))
    with pytest.raises(OcrnetError, match="object not found"):
        download(config(sdk_bucket, tmp_path, "nowhere.tar"))
    sdk_bucket.name = "no-such-bucket"
    for name in ("data", "data.tar"):
        with pytest.raises(
            OcrnetError, match=rf"data_url \w+://no-such-bucket/{name}: .*(does not exist|NoSuchBucket)"
        ):
            download(config(sdk_bucket, tmp_path, name))


def test_a_path_is_used_in_place_and_a_file_url_is_copied(tmp_path, caplog):
    for name, content in FILES.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    cfg = pull.download_dataset(config(None, tmp_path / "cache", str(tmp_path / "set")))
    assert cfg.data.dataset_dir == str(tmp_path / "set")
    assert "is used in place" in caplog.messages[0]
    cfg = pull.download_dataset(config(None, tmp_path / "cache", f"file://{tmp_path}/set"))
    assert Path(cfg.data.dataset_dir).is_relative_to(tmp_path / "cache")
    assert files(Path(cfg.data.dataset_dir)) == FILES
    with pytest.raises(OcrnetError, match="the folder does not exist"):
        pull.download_dataset(config(None, tmp_path / "cache", str(tmp_path / "nowhere")))


def test_dataset_dir_selects_a_subfolder_or_is_reported_as_ignored(tmp_path, caplog):
    (tmp_path / "set/half/images").mkdir(parents=True)
    (tmp_path / "set/other").mkdir()
    url = str(tmp_path / "set")
    cfg = pull.download_dataset(config(None, tmp_path, url, data=Data(dataset_dir="half")))
    assert cfg.data.dataset_dir == f"{url}/half"
    cfg = pull.download_dataset(config(None, tmp_path, url, data=Data(dataset_dir="/elsewhere")))
    assert cfg.data.dataset_dir == url
    assert "/elsewhere is ignored" in caplog.messages[-1]


def test_invalid_object_names_are_refused(tmp_path):
    cache = Cache(parse("data_url", "s3://bucket/x"), Cloud(cache_dir=str(tmp_path)))
    for name in ("../x", "/x", "a//b", "a/./b", "a\0b"):
        with pytest.raises(OcrnetError, match="which is not a valid file name"):
            cache.target(name)
    assert json.dumps(str(cache.target("a/b"))) == json.dumps(str(cache.folder / "a/b"))


# Weights: ckpt_url.


def save_checkpoint(folder: Path, step: int) -> Path:
    path = folder / checkpoint.file_name(6, step)
    checkpoint.save(path, {"weight": np.full(3, step, np.float32)}, {"step": step})
    return path


def test_ckpt_url_names_a_file_or_a_folder_with_checkpoints(sdk_bucket, tmp_path):
    for step in (3, 12):
        sdk_bucket.put(f"run/checkpoint/{checkpoint.file_name(6, step)}", save_checkpoint(tmp_path, step).read_bytes())
    sdk_bucket.put("run/old/" + checkpoint.file_name(6, 99), b"in another folder")
    sdk_bucket.put("zoo/hrnet.pth", b"weights")
    cloud = Cloud(cache_dir=str(tmp_path / "cache"), timeout=1, retries=1)

    def fetch(path: str) -> Path:
        return pull.download_weights(Config(ckpt_url=sdk_bucket.url(path), cloud=cloud))

    assert checkpoint.load(fetch("run")).meta["step"] == 12
    assert checkpoint.load(fetch(f"run/checkpoint/{checkpoint.file_name(6, 3)}")).meta["step"] == 3
    assert fetch("zoo").read_bytes() == fetch("zoo/hrnet.pth").read_bytes() == b"weights"
    with pytest.raises(OcrnetError, match="object not found; check the name"):
        fetch("zoo/hrnet.ckpt")
    sdk_bucket.put("zoo/other.ckpt", b"")
    with pytest.raises(OcrnetError, match=r"expected exactly one weights file, found: hrnet\.pth, other\.ckpt"):
        fetch("zoo")


def test_ckpt_url_gives_the_start_of_a_run_or_the_weights_of_the_backbone(tmp_path, caplog):
    run_checkpoint = save_checkpoint(tmp_path, 3)
    cfg = Config(ckpt_url=str(run_checkpoint), save_dir=str(tmp_path / "out"), total_step=10)
    assert pull.apply_ckpt_url(cfg, "auto") == (cfg, run_checkpoint)
    assert "the run starts from it if it has no checkpoint of its own" in caplog.messages[0]
    with pytest.raises(OcrnetError, match="both name a checkpoint; keep one"):
        pull.apply_ckpt_url(cfg, "some/file")
    backbone_weights = tmp_path / "hrnet.pth"
    backbone_weights.write_bytes(b"weights")
    changed, begin_from = pull.apply_ckpt_url(Config(ckpt_url=str(backbone_weights)), None)
    assert begin_from is None
    assert (changed.backbone.pretrained, changed.backbone.backbone_ckpt) == (True, str(backbone_weights))
    both = Config(ckpt_url=str(backbone_weights), backbone=Backbone(backbone_ckpt="x.pth"))
    with pytest.raises(OcrnetError, match="both name the backbone's weights; keep one"):
        pull.apply_ckpt_url(both, None)


@pytest.mark.parametrize("resume_from", ["auto", None])
def test_a_checkpoint_of_the_run_takes_precedence_over_ckpt_url(tmp_path, resume_from):
    cfg = Config(save_dir=str(tmp_path / "out"), total_step=10)
    weights = tmp_path / checkpoint.file_name(6, 3)
    checkpoint.save(weights, {"weight": np.zeros(3, np.float32)}, {"step": 3, "config": {}})
    assert find_resume(cfg, resume_from, weights).meta["step"] == 3
    own_checkpoint = tmp_path / "out/checkpoint" / checkpoint.file_name(6, 5)
    checkpoint.save(own_checkpoint, {"weight": np.zeros(3, np.float32)}, {"step": 5, "config": {}})
    if resume_from:
        assert find_resume(cfg, resume_from, weights).meta["step"] == 5
    else:
        with pytest.raises(OcrnetError, match="holds checkpoints of an earlier run"):
            find_resume(cfg, resume_from, weights)
