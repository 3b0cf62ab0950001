"""The cache of decoded pairs: it returns the same arrays as decoding, also after crashes, damage and concurrent use."""

import errno
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
import zlib
from collections import namedtuple

import cv2
import numpy as np
import pytest
from PIL import Image

from ocrnet.config import Data
from ocrnet.data import sampler
from ocrnet.data.datasets import base, cache, open_dataset
from ocrnet.data.datasets.base import Dataset
from ocrnet.data.datasets.cache import HEADER, TEMPORARY_SUFFIX, CacheError, DecodedDataset
from ocrnet.data.image_io import write_png
from ocrnet.data.sampler import TrainStream
from ocrnet.utils.errors import OcrnetError

SIZES = ((48, 64), (33, 70), (64, 41))
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def source_root(tmp_path_factory):
    """Three images of three sizes in three formats, with labels: gray, of a palette, and of 4 bits."""
    root, rng = tmp_path_factory.mktemp("source") / "own", np.random.default_rng(0)
    labels = [rng.integers(0, 3, size, np.uint8) for size in SIZES]
    for i, size in enumerate(SIZES):
        write_png(root / f"images/train/{i}.png", rng.integers(0, 256, (*size, 3), np.uint8))
        write_png(root / f"labels/train/{i}.png", labels[i])
    with Image.open(root / "images/train/1.png") as image:
        image.save(root / "images/train/1.jpg")
        image.convert("LA").save(root / "images/train/1.png")
    (root / "images/train/1.png").rename(root / "images/train/3.png")
    shutil.copy(root / "labels/train/1.png", root / "labels/train/3.png")
    palette = Image.fromarray(labels[1], "P")
    palette.putpalette(range(200, 209))
    palette.save(root / "labels/train/1.png")
    palette.save(root / "labels/train/3.png", bits=4)
    (root / "classes.yml").write_text("[road, sky, {name: cat, id: 2}]")
    return root


@pytest.fixture
def root(source_root, tmp_path):
    return shutil.copytree(source_root, tmp_path / "own")


@pytest.fixture
def uncached(root):
    return open_dataset("folder", root, "train")


@pytest.fixture
def cached(uncached, tmp_path) -> DecodedDataset:
    return cache.prepare(str(tmp_path / "deep/cache"), {"images": uncached})["images"]


def assert_same(one: Dataset, other: Dataset) -> None:
    for i in range(len(other)):
        for mine, theirs in zip(one.read(i), other.read(i), strict=True):
            assert mine.dtype == np.uint8
            np.testing.assert_array_equal(mine, theirs)


def files(cached: DecodedDataset) -> set[str]:
    return {path.name for path in cached.folder.iterdir()}


def forbid_decoding(monkeypatch) -> None:
    """Make every later decoding of an image or label fail."""

    def fail(path):
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr(base, "read_image", fail)
    monkeypatch.setattr(base, "read_label", fail)


def run_in_fork(work) -> int:
    """Call ``work`` in a fork of this process; return its exit code."""
    process = FORK.Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def test_a_cold_and_a_warm_cache_equal_decoding(uncached, cached, monkeypatch):
    assert len(uncached) == 4
    assert_same(cached, uncached)
    expected = [uncached.read(i) for i in range(4)]
    assert files(cached) == {cached.cache_file(i).name for i in range(4)}
    forbid_decoding(monkeypatch)
    for i in range(4):
        for mine, theirs in zip(cached.read(i), expected[i], strict=True):
            np.testing.assert_array_equal(mine, theirs)
            assert not mine.flags.writeable
    assert cached.identity == uncached.identity


@pytest.mark.parametrize("base_size", [None, (40, 80)])
def test_samples_are_the_same_and_do_not_change_the_cache(uncached, cached, base_size):
    for scale_range in ((0.5, 2.0), (1.0, 1.0)):
        data = Data(crop_size=(32, 32), base_size=base_size, scale_range=scale_range)
        one, other = (TrainStream(d, data, seed=3, channels=8, dropout=0.1) for d in (uncached, cached))
        for number in range(16):
            for mine, theirs in zip(one[number], other[number], strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_evaluation_gets_writable_copies(uncached, cached):
    for workers in (0, 2):
        for i, image, label in sampler.val_stream(cached, sampler.World(), workers):
            assert image.flags.writeable
            assert label.flags.writeable
            image[:] = label[:] = 7
            np.testing.assert_array_equal(cached.read(i)[0], uncached.read(i)[0])


def test_a_changed_source_is_decoded_again_into_the_same_file(root, uncached, cached):
    assert_same(cached, uncached)
    before = files(cached)
    image = root / "images/train/0.png"
    for path, array in ((image, np.full((48, 64, 3), 9, np.uint8)), (root / "labels/train/2.png", np.ones(SIZES[2]))):
        stat = path.stat()
        write_png(path, array.astype(np.uint8))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert_same(cached, uncached)
    assert (cached.read(0)[0] == 9).all()
    assert (cached.read(2)[1] == 1).all()
    assert files(cached) == before
    stat = image.stat()  # now the size changes and the time does not
    image.write_bytes(image.read_bytes() + b"trailing")
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert image.stat().st_size != stat.st_size
    assert_same(cached, uncached)


def test_a_source_that_changes_while_it_is_read_is_not_cached(root, cached, monkeypatch):
    read = base.read_image

    def read_and_touch(path):
        image = read(path)
        os.utime(path, ns=(1, 1))
        return image

    monkeypatch.setattr(base, "read_image", read_and_touch)
    cached.read(0)
    assert files(cached) == set()


def test_other_classes_or_another_decoder_use_separate_files(root, uncached, cached, monkeypatch):
    assert_same(cached, uncached)
    write_png(root / "labels/train/0.png", np.full((48, 64), 9, np.uint8))
    other = DecodedDataset(open_dataset("folder", root, "train", ignore_label=9), cached.folder)
    assert (other.read(0)[1] == 255).all()
    with pytest.raises(OcrnetError, match="holds the unknown id 9"):
        cached.read(0)
    place = cached.cache_file(0)
    monkeypatch.setattr(cv2, "__version__", "99")
    assert cached.cache_file(0) not in (place, other.cache_file(0))


DAMAGES = {
    "magic": lambda data: b"X" + data[1:],
    "checksum": lambda data: data[:15] + bytes([data[15] ^ 1]) + data[16:],
    "height": lambda data: data[:21] + bytes([data[21] ^ 1]) + data[22:],
    "source": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    "padding": lambda data: data[: HEADER - 1] + b"\1" + data[HEADER:],
    "image": lambda data: data[:999] + bytes([data[999] ^ 16]) + data[1000:],
    "label": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    "cut": lambda data: data[:-1],
    "cut in the header": lambda data: data[:20],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_reported_and_written_again(uncached, cached, damage, capfd):
    cached.read(2)
    good = cached.cache_file(2).read_bytes()
    cached.cache_file(2).write_bytes(DAMAGES[damage](good))
    assert_same(cached, uncached)
    stderr = capfd.readouterr().err
    assert stderr == f"cache: {cached.cache_file(2)} is damaged; {cached.path(2)} is decoded again\n"
    assert cached.cache_file(2).read_bytes() == good
    assert_same(cached, uncached)
    assert capfd.readouterr().err == ""


def test_a_checksum_is_compared_once_by_all_forked_processes(uncached, cached, monkeypatch):
    assert_same(cached, uncached)
    compared = FORK.Value("i", 0)

    def count(data, value=0):
        compared.value += 1
        return crc32(data, value)

    crc32 = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", count)
    monkeypatch.setattr(base, "read_image", None)
    assert run_in_fork(lambda: [cached.read(i) for i in range(4)]) == 0
    assert compared.value == 4
    for i in range(4):
        cached.read(i)
    assert compared.value == 4
    again = pickle.loads(pickle.dumps(cached))  # as processes that are spawned, not forked, get it
    again.read(0)
    again.read(0)
    assert compared.value == 5


def test_several_processes_can_build_the_cache_at_once(uncached, cached):
    processes = [FORK.Process(target=assert_same, args=(cached, uncached)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert files(cached) == {cached.cache_file(i).name for i in range(4)}


def test_a_process_killed_while_writing_leaves_no_pair(uncached, cached, caplog):
    def die_writing():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER + 1000, HEADER + 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills the process at this size, as with SIGKILL
        cached.read(1)

    assert run_in_fork(die_writing) == -signal.SIGXFSZ
    (draft,) = cached.folder.iterdir()
    assert draft.name.endswith(TEMPORARY_SUFFIX)
    assert draft.stat().st_size == HEADER + 1000
    cache.prepare(str(cached.folder), {"images": uncached})
    assert draft.exists()  # another process may be writing it
    os.utime(draft, (0, time.time() - cache.STALE_SECONDS - 1))
    caplog.clear()
    cache.prepare(str(cached.folder), {"images": uncached})
    (line,) = caplog.messages
    assert line.startswith(f"cache: 0 of 4 pairs are cached in {cached.folder}; the others need about ")
    assert not draft.exists()
    assert_same(cached, uncached)
    assert_same(cached, uncached)


def fail_disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_an_error_even_with_on_error_skip(cached, monkeypatch):
    monkeypatch.setattr(os, "replace", fail_disk_full)
    with pytest.raises(
        CacheError, match=rf"{cached.cache_file(0)} cannot be written: No space left on device; .*remove the key"
    ):
        cached.read(0)
    assert files(cached) == set()
    samples = TrainStream(cached, Data(crop_size=(32, 32), on_error="skip"), seed=3, channels=8, dropout=0.1)
    monkeypatch.undo()
    for i in {0, 1, 2, 3} - {samples.index(0)}:  # the cached samples could replace this one
        cached.read(i)
    monkeypatch.setattr(os, "replace", fail_disk_full)
    with pytest.raises(CacheError):
        samples[0]


def test_an_unreadable_image_is_skipped_as_without_a_cache(root, uncached, cached):
    (root / "images/train/2.png").write_bytes(b"no image")
    with pytest.raises(OcrnetError, match=r"2\.png is damaged or not an image"):
        cached.read(2)
    (root / "images/train/0.png").unlink()
    with pytest.raises(OcrnetError, match=r"0\.png does not exist"):
        cached.read(0)
    data = Data(crop_size=(32, 32), on_error="skip")
    one, other = (TrainStream(d, data, seed=3, channels=8, dropout=0.1) for d in (uncached, cached))
    for number in range(8):
        np.testing.assert_array_equal(one[number].image, other[number].image)
        assert one[number].unreadable == other[number].unreadable


def test_without_labels_the_error_is_that_of_decoding(root, tmp_path):
    cached = DecodedDataset(open_dataset("folder", root, "train", labels=False), tmp_path / "cache")
    with pytest.raises(OcrnetError, match="was opened without a label"):
        cached.read(0)
    assert cached.image(0).shape == (*SIZES[0], 3)


def test_free_disk_space_is_checked_at_the_start(root, uncached, tmp_path, monkeypatch, caplog):
    usage, folder = namedtuple("usage", "free"), tmp_path / "cache"
    needed = sum(HEADER + 4 * h * w for h, w in (*SIZES, SIZES[1]))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(needed - 1))
    with pytest.raises(
        CacheError, match=r"needs 40\.5 KiB for 4 decoded pairs, but 40\.5 KiB are free; free some space"
    ):
        cache.prepare(str(folder), {"images": uncached})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(needed))
    sets = cache.prepare(str(folder), {"images": uncached})
    sets["images"].read(0)
    cache.prepare(str(folder), {"images": uncached})
    assert_same(sets["images"], uncached)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0))
    cache.prepare(str(folder), sets)
    first, second, third = caplog.messages
    assert first.endswith("the others need about 40.5 KiB; 40.5 KiB are free")
    assert "cache: 1 of 4 pairs" in second
    assert third == f"cache: 4 of 4 pairs are cached in {folder}"
    (root / "images/train/0.png").write_bytes(b"no image")  # reported when it is read, not here
    monkeypatch.undo()
    cache.prepare(str(tmp_path / "other"), {"images": uncached})


def test_a_folder_that_cannot_be_used_is_named(uncached, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/deeper"):
        with pytest.raises(CacheError, match=rf"data\.cache_dir: {folder} cannot be used: .*remove the key"):
            cache.prepare(str(folder), {"images": uncached})


def test_a_folder_removed_during_the_run_is_created_again(uncached, cached):
    assert_same(cached, uncached)
    image, _ = cached.read(0)
    shutil.rmtree(cached.folder)
    np.testing.assert_array_equal(image, uncached.read(0)[0])
    assert_same(cached, uncached)
    assert len(files(cached)) == 4


def test_without_cache_dir_nothing_is_cached(uncached, caplog):
    for folder in (None, ""):
        assert cache.prepare(folder, {"images": uncached}) == {"images": uncached}
    assert caplog.messages == []
