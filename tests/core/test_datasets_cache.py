"""The decoded cache: the bytes that decoding gives, whoever builds it, dies building it, or damages it."""

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
def made(tmp_path_factory):
    """Three images of three sizes in three formats, with labels: gray, of a palette, and of 4 bits."""
    root, rng = tmp_path_factory.mktemp("made") / "own", np.random.default_rng(0)
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
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "own")


@pytest.fixture
def plain(root):
    return open_dataset("folder", root, "train")


@pytest.fixture
def kept(plain, tmp_path) -> DecodedDataset:
    sets, _ = cache.prepare(str(tmp_path / "deep/cache"), {"images": plain})
    return sets["images"]


def assert_same(one: Dataset, other: Dataset) -> None:
    for i in range(len(other)):
        for mine, theirs in zip(one.read(i), other.read(i), strict=True):
            assert mine.dtype == np.uint8
            np.testing.assert_array_equal(mine, theirs)


def files(kept: DecodedDataset) -> set[str]:
    return {path.name for path in kept.folder.iterdir()}


def undecodable(monkeypatch) -> None:
    """From here on no image can be decoded."""

    def fail(path):
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr(base, "read_image", fail)
    monkeypatch.setattr(base, "read_label", fail)


def in_a_process(work) -> int:
    """Do something in a fork of this process; return its exit code."""
    process = FORK.Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def test_cold_and_warm_are_what_decoding_gives(plain, kept, monkeypatch):
    assert len(plain) == 4
    assert_same(kept, plain)
    expected = [plain.read(i) for i in range(4)]
    assert files(kept) == {kept.cache_file(i).name for i in range(4)}
    undecodable(monkeypatch)
    for i in range(4):
        for mine, theirs in zip(kept.read(i), expected[i], strict=True):
            np.testing.assert_array_equal(mine, theirs)
            assert not mine.flags.writeable
    assert kept.identity == plain.identity


@pytest.mark.parametrize("base_size", [None, (40, 80)])
def test_samples_are_the_same_and_nothing_writes_into_the_cache(plain, kept, base_size):
    for scale_range in ((0.5, 2.0), (1.0, 1.0)):
        data = Data(crop_size=(32, 32), base_size=base_size, scale_range=scale_range)
        one, other = (TrainStream(d, data, seed=3, channels=8, dropout=0.1) for d in (plain, kept))
        for number in range(16):
            for mine, theirs in zip(one[number], other[number], strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_evaluation_gets_arrays_of_its_own(plain, kept):
    for workers in (0, 2):
        for i, image, label in sampler.val_stream(kept, sampler.World(), workers):
            assert image.flags.writeable
            assert label.flags.writeable
            image[:] = label[:] = 7
            np.testing.assert_array_equal(kept.read(i)[0], plain.read(i)[0])


def test_a_changed_source_is_decoded_anew_in_its_place(root, plain, kept):
    assert_same(kept, plain)
    before = files(kept)
    image = root / "images/train/0.png"
    for path, array in ((image, np.full((48, 64, 3), 9, np.uint8)), (root / "labels/train/2.png", np.ones(SIZES[2]))):
        stat = path.stat()
        write_png(path, array.astype(np.uint8))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert_same(kept, plain)
    assert (kept.read(0)[0] == 9).all()
    assert (kept.read(2)[1] == 1).all()
    assert files(kept) == before
    size = image.stat().st_size  # the same size and another time; then the same time and another size
    image.write_bytes(image.read_bytes() + b"trailing")
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert image.stat().st_size != size
    assert_same(kept, plain)


def test_what_changes_while_it_is_read_is_not_kept(root, kept, monkeypatch):
    read = base.read_image

    def and_touch(path):
        image = read(path)
        os.utime(path, ns=(1, 1))
        return image

    monkeypatch.setattr(base, "read_image", and_touch)
    kept.read(0)
    assert files(kept) == set()


def test_other_classes_or_another_decoder_have_files_of_their_own(root, plain, kept, monkeypatch):
    assert_same(kept, plain)
    write_png(root / "labels/train/0.png", np.full((48, 64), 9, np.uint8))
    other = DecodedDataset(open_dataset("folder", root, "train", ignore_label=9), kept.folder)
    assert (other.read(0)[1] == 255).all()
    with pytest.raises(OcrnetError, match="holds the unknown id 9"):
        kept.read(0)
    place = kept.cache_file(0)
    monkeypatch.setattr(cv2, "__version__", "99")
    assert kept.cache_file(0) not in (place, other.cache_file(0))


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
def test_a_damaged_file_is_said_and_made_anew(plain, kept, damage, capfd):
    kept.read(2)
    good = kept.cache_file(2).read_bytes()
    kept.cache_file(2).write_bytes(DAMAGES[damage](good))
    assert_same(kept, plain)
    said = capfd.readouterr().err
    assert said == f"cache: {kept.cache_file(2)} is damaged; {kept.path(2)} is decoded again\n"
    assert kept.cache_file(2).read_bytes() == good
    assert_same(kept, plain)
    assert capfd.readouterr().err == ""


def test_a_checksum_is_compared_once_by_all_forked_processes(plain, kept, monkeypatch):
    assert_same(kept, plain)
    compared = FORK.Value("i", 0)

    def count(data, value=0):
        compared.value += 1
        return crc32(data, value)

    crc32 = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", count)
    monkeypatch.setattr(base, "read_image", None)
    assert in_a_process(lambda: [kept.read(i) for i in range(4)]) == 0
    assert compared.value == 4
    for i in range(4):
        kept.read(i)
    assert compared.value == 4
    again = pickle.loads(pickle.dumps(kept))  # as another way of starting processes does
    again.read(0)
    again.read(0)
    assert compared.value == 5


def test_many_processes_build_at_once(plain, kept):
    processes = [FORK.Process(target=assert_same, args=(kept, plain)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert files(kept) == {kept.cache_file(i).name for i in range(4)}


def test_a_process_killed_in_the_middle_of_writing_leaves_no_pair(plain, kept):
    def die_writing():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER + 1000, HEADER + 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # by the kernel, as with SIGKILL, once so much is written
        kept.read(1)

    assert in_a_process(die_writing) == -signal.SIGXFSZ
    (left,) = kept.folder.iterdir()
    assert left.name.endswith(TEMPORARY_SUFFIX)
    assert left.stat().st_size == HEADER + 1000
    cache.prepare(str(kept.folder), {"images": plain})
    assert left.exists()  # somebody may be writing it
    os.utime(left, (0, time.time() - cache.STALE_SECONDS - 1))
    _, lines = cache.prepare(str(kept.folder), {"images": plain})
    assert lines[0].startswith(f"cache: 0 of 4 pairs are cached in {kept.folder}; the others need about ")
    assert not left.exists()
    assert_same(kept, plain)
    assert_same(kept, plain)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_an_error_that_no_setting_passes_over(kept, monkeypatch):
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        CacheError, match=rf"{kept.cache_file(0)} cannot be written: No space left on device; .*remove the key"
    ):
        kept.read(0)
    assert files(kept) == set()
    samples = TrainStream(kept, Data(crop_size=(32, 32), on_error="skip"), seed=3, channels=8, dropout=0.1)
    monkeypatch.undo()
    for i in {0, 1, 2, 3} - {samples.index(0)}:  # all others could take its place
        kept.read(i)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CacheError):
        samples[0]


def test_an_unreadable_image_is_passed_over_as_without_a_cache(root, plain, kept):
    (root / "images/train/2.png").write_bytes(b"no picture")
    with pytest.raises(OcrnetError, match=r"2\.png is damaged or not an image"):
        kept.read(2)
    (root / "images/train/0.png").unlink()
    with pytest.raises(OcrnetError, match=r"0\.png does not exist"):
        kept.read(0)
    data = Data(crop_size=(32, 32), on_error="skip")
    one, other = (TrainStream(d, data, seed=3, channels=8, dropout=0.1) for d in (plain, kept))
    for number in range(8):
        np.testing.assert_array_equal(one[number].image, other[number].image)
        assert one[number].unreadable == other[number].unreadable


def test_without_labels_it_says_what_decoding_says(root, tmp_path):
    kept = DecodedDataset(open_dataset("folder", root, "train", labels=False), tmp_path / "cache")
    with pytest.raises(OcrnetError, match="was opened without a label"):
        kept.read(0)
    assert kept.image(0).shape == (*SIZES[0], 3)


def test_the_room_is_looked_at_at_the_start(root, plain, tmp_path, monkeypatch):
    usage, folder = namedtuple("usage", "free"), tmp_path / "cache"
    needed = sum(HEADER + 4 * h * w for h, w in (*SIZES, SIZES[1]))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(needed - 1))
    with pytest.raises(
        CacheError, match=r"needs 40\.5 KiB for 4 decoded pairs, but 40\.5 KiB are free; free some space"
    ):
        cache.prepare(str(folder), {"images": plain})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(needed))
    sets, lines = cache.prepare(str(folder), {"images": plain})
    assert lines[0].endswith("the others need about 40.5 KiB; 40.5 KiB are free")
    sets["images"].read(0)
    assert "cache: 1 of 4 pairs" in cache.prepare(str(folder), {"images": plain})[1][0]
    assert_same(sets["images"], plain)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0))
    assert cache.prepare(str(folder), sets)[1] == [f"cache: 4 of 4 pairs are cached in {folder}"]
    (root / "images/train/0.png").write_bytes(b"no picture")  # told where it is read, not here
    monkeypatch.undo()
    cache.prepare(str(tmp_path / "other"), {"images": plain})


def test_a_folder_that_cannot_be_used_is_named(plain, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/deeper"):
        with pytest.raises(CacheError, match=rf"data\.cache_dir: {folder} cannot be used: .*remove the key"):
            cache.prepare(str(folder), {"images": plain})


def test_a_folder_removed_under_the_run_is_made_again(plain, kept):
    assert_same(kept, plain)
    image, _ = kept.read(0)
    shutil.rmtree(kept.folder)
    np.testing.assert_array_equal(image, plain.read(0)[0])
    assert_same(kept, plain)
    assert len(files(kept)) == 4


def test_without_the_setting_nothing_changes(plain):
    for folder in (None, ""):
        sets, lines = cache.prepare(folder, {"images": plain})
        assert sets == {"images": plain}
        assert lines == []
