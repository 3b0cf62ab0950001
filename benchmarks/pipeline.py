"""Measure the parts of the input pipeline on one core: reading, decoding, caching, augmenting; prints JSON.

    python benchmarks/pipeline.py [--dataset_dir FOLDER] [--out FILE]

Times are medians over rounds. In each round every option runs in turn on every pair. If the machine runs other work,
the CPU times are more reliable than the wall-clock times. Synthetic scenes are always measured. FOLDER is a Cityscapes
tree, or a folder with images/train and labels/train (CamVid), whose photos are tiled to images of the same size.
Decoders that are not installed are skipped.
"""

import argparse
import io
import math
import multiprocessing
import os
import statistics
import struct
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from common import write_report
from PIL import Image

from ocrnet.config import Data
from ocrnet.data import augment, image_io
from ocrnet.data.datasets import Dataset, open_dataset, synthetic
from ocrnet.data.datasets.cache import DecodedDataset, prepare
from ocrnet.data.sampler import TrainStream
from ocrnet.tracking.run_dir import core_versions, git_commit

REQUIRED = 150  # images per second, on 16 cores
LEVELS = (0, 1, 6, 9)
SECONDS = 3
Size = tuple[int, int]


def nothing(number: int) -> None:
    """Do nothing."""


class Option(NamedTuple):
    """A timed function of a pair's number, and an untimed function that runs before it."""

    call: Callable[[int], object]
    before: Callable[[int], None] = nothing


def time_in_turn(options: dict[str, Option], count: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median milliseconds per call of each option, in wall-clock time and in CPU time of this process."""
    clocks = (time.perf_counter, time.process_time)
    seconds: list[dict[str, list[float]]] = [{name: [] for name in options} for _ in clocks]
    for turn in range(rounds + 1):  # the first is the warm-up
        for name, option in options.items():
            taken = [0.0, 0.0]
            for number in range(count):
                option.before(number)
                started = [clock() for clock in clocks]
                option.call(number)
                taken = [sum_ + clock() - start for sum_, clock, start in zip(taken, clocks, started, strict=True)]
            if turn:
                for kind, total in zip(seconds, taken, strict=True):
                    kind[name].append(total / count)
    by_clock, by_cpu = ({name: 1e3 * statistics.median(row[name]) for name in row} for row in seconds)
    return by_clock, by_cpu


def by_opencv(data: bytes) -> np.ndarray:
    """Decode with OpenCV to BGR and convert to RGB; every version of OpenCV can do this."""
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    """Return every installed PNG decoder by name: bytes -> uint8 H,W,3 RGB."""
    found: dict[str, Callable[[bytes], np.ndarray]] = {
        "OpenCV, then BGR to RGB": by_opencv,
        "Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data))),
    }
    if hasattr(cv2, "IMREAD_COLOR_RGB"):
        rgb = cv2.IMREAD_COLOR_RGB
        found["OpenCV, RGB at once"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), rgb)
    try:
        import imagecodecs

        found["imagecodecs, libpng"], found["imagecodecs, libspng"] = imagecodecs.png_decode, imagecodecs.spng_decode
    except ImportError:
        pass
    try:
        import pyspng

        found["pyspng"] = pyspng.load
    except ImportError:
        pass
    try:
        from isal import isal_zlib

        found["isal inflates, OpenCV unfilters"] = lambda data: first_rows(data, isal_zlib.decompressobj())
    except ImportError:
        pass
    return found


def first_rows(data: bytes, inflater: object, rows: int | None = None) -> np.ndarray:
    """Decode the first rows of an 8 bit RGB PNG: inflate only these and pass them to OpenCV as an uncompressed PNG."""
    width, height = struct.unpack_from(">II", data, 16)
    rows = rows or height
    assert data[24:29] == b"\x08\x02\0\0\0", "not an 8 bit RGB PNG"
    position, packed = 8, []
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            packed.append(memoryview(data)[position + 8 : position + 8 + length])
        position += 12 + length
    raw = inflater.decompress(b"".join(packed), rows * (1 + 3 * width))  # type: ignore[attr-defined]
    header = struct.pack(">II", width, rows) + data[24:29]
    plain = b"".join((data[:8], chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw, 0)), chunk(b"IEND", b"")))
    return by_opencv(plain)


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def at_level(image: np.ndarray, level: int) -> bytes:
    """Return the image as a PNG with a compression level."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=level)
    return file.getvalue()


def rows_needed(height: int, data: Data) -> dict[str, float]:
    """Draw random crops; return the mean shares of an image's rows that they need, and up to the last needed row."""
    rng = np.random.default_rng(0)
    spans = [augment._span(height, data.crop_size[0], rng.uniform(*data.scale_range), rng)[0] for _ in range(20_000)]
    return {
        "needed": statistics.mean((span.stop - span.start) / height for span in spans),
        "up_to_the_last": statistics.mean(span.stop / height for span in spans),
    }


def drop_from_page_cache(path: Path) -> None:
    """Drop a file from the page cache of the operating system."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(dataset: Dataset, cached: DecodedDataset, data: Data) -> tuple[dict[str, Option], dict[str, bool]]:
    """Return the options of reading a pair, and by decoder whether its bytes equal ours."""
    pngs = [dataset.path(i).read_bytes() for i in range(len(dataset))]
    labels = [pair.label for pair in dataset.pairs]
    ids = [image_io.read_label(label) for label in labels]
    table, unknown = dataset.classes._index_of_id, dataset.classes._unknown.astype(bool)
    reach = round(rows_needed(ids[0].shape[0], data)["up_to_the_last"] * ids[0].shape[0])
    options, exact = {}, {}
    for name, decode in decoders().items():
        options[f"image: {name}"] = Option(lambda i, decode=decode: decode(pngs[i]))
        exact[name] = all(np.array_equal(decode(png), dataset.image(i)) for i, png in enumerate(pngs))

    def reset_compared(i: int) -> None:
        cached._verified[i] = 0

    return options | {
        "image: ours, read and checked": Option(dataset.image),
        "image: zlib inflates the rows up to the last needed, OpenCV unfilters": Option(
            lambda i: first_rows(pngs[i], zlib.decompressobj(), reach)
        ),
        "image: zlib inflates all rows, OpenCV unfilters": Option(lambda i: first_rows(pngs[i], zlib.decompressobj())),
        "image: only its checksums": Option(lambda i: image_io._check_png("", pngs[i])),
        "label: ours, read and checked": Option(lambda i: image_io.read_label(labels[i])),
        "label: OpenCV": Option(lambda i: cv2.imread(str(labels[i]), cv2.IMREAD_UNCHANGED)),
        "label: ids to class indices": Option(lambda i: dataset.classes.to_indices(ids[i], "")),
        "label: ids to class indices by NumPy": Option(lambda i: (unknown[ids[i]].any(), table[ids[i]])),
        "pair: decoded": Option(dataset.read),
        "pair: decoded and kept": Option(cached.read, lambda i: cached.cache_file(i).unlink(missing_ok=True)),
        "pair: kept, checksum compared": Option(cached.read, reset_compared),
        "pair: kept": Option(lambda i: [array.copy() for array in cached.read(i)]),
        "pair: decoded, from the disk": Option(dataset.read, lambda i: drop_from_page_cache(dataset.path(i))),
        "pair: kept, from the disk": Option(
            lambda i: [array.copy() for array in cached.read(i)], lambda i: drop_from_page_cache(cached.cache_file(i))
        ),
    }, exact  # fmt: skip


def augmenting(dataset: Dataset, data: Data) -> dict[str, Option]:
    """Return the options of computing a crop from a decoded pair."""
    pairs = [dataset.read(i) for i in range(len(dataset))]
    crops = [augment.scale_and_crop(*pair, np.random.default_rng(i), data) for i, pair in enumerate(pairs)]

    def filled(crop: np.ndarray) -> None:
        out = np.empty(crop.shape, np.uint8)
        out[:] = mean
        out[:] = crop

    mean = np.round(np.array(data.mean) * 255).astype(np.uint8)
    return {
        "augment: all": Option(lambda i: augment.train(*pairs[i], np.random.default_rng(i), data)),
        "augment: cut and resize": Option(
            lambda i: augment.scale_and_crop(*pairs[i], np.random.default_rng(i), data)
        ),
        "augment: mirror": Option(lambda i: [cv2.flip(array, 1) for array in crops[i]]),
        "augment: mirror by NumPy": Option(lambda i: [np.ascontiguousarray(array[:, ::-1]) for array in crops[i]]),
        "augment: pad to the crop": Option(lambda i: cv2.copyMakeBorder(crops[i][0], 0, 0, 0, 0, cv2.BORDER_CONSTANT)),
        "augment: fill by NumPy and copy into it": Option(lambda i: filled(crops[i][0])),
        "augment: color": Option(lambda i: augment.vary_color(crops[i][0], np.random.default_rng(i))),
    }  # fmt: skip


def measure(dataset: Dataset, cache: Path, data: Data, rounds: int) -> dict[str, object]:
    """Measure every option on a training split."""
    datasets = prepare(str(cache), {"": dataset})
    cached, count = datasets[""], len(dataset)
    plain, warm = (TrainStream(d, data, seed=1, channels=512, dropout=0.05) for d in (dataset, cached))
    read, exact = reading(dataset, cached, data)
    levels = {level: at_level(dataset.image(0), level) for level in LEVELS}
    ours = {level: Option(lambda i, png=png: by_opencv(png)) for level, png in levels.items()}
    by_clock, by_cpu = time_in_turn(
        read
        | augmenting(dataset, data)
        | {"sample: decoded": Option(plain.__getitem__), "sample: kept": Option(warm.__getitem__)}
        | {f"image: level {level}, OpenCV": option for level, option in ours.items()},
        count,
        rounds,
    )
    height, width = dataset.read(0)[1].shape
    return {
        "image_size": [height, width],
        "crop_size": list(data.crop_size),
        "png_bytes": statistics.mean(dataset.path(i).stat().st_size for i in range(count)),
        "kept_bytes": cached.cache_file(0).stat().st_size,
        "png_bytes_by_level": {str(level): len(png) for level, png in levels.items()},
        "milliseconds": by_clock,
        "cpu_milliseconds": by_cpu,
        "exact": exact,
        "rows": rows_needed(height, data),
        "at_once": {"decoded": samples_per_second(plain), "kept": samples_per_second(warm)},
    }


def samples_per_second(stream: TrainStream) -> dict[str, float]:
    """Return the samples per second of one process, and of one process per core at the same time."""
    rates = {}
    for processes in (1, os.cpu_count() or 1):
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            rates[str(processes)] = math.fsum(pool.map(Rate(stream), range(processes), chunksize=1))
    return rates


class Rate:
    """Measures the samples per second of a stream in one process."""

    def __init__(self, stream: TrainStream) -> None:
        self.stream = stream

    def __call__(self, process: int) -> float:
        """Compute samples, different ones in each process; return their number per second."""
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < SECONDS:
            self.stream[1000 * process + count]
            count += 1
        return count / (time.perf_counter() - started)


def tile_photos(folder: Path, root: Path, size: Size, count: int) -> None:
    """Write a Cityscapes tree whose images are tiled from the photos of a folder with images/train and labels/train."""
    paths = sorted((folder / "images/train").iterdir())
    rng = np.random.default_rng(0)
    for number in range(count):
        image, label = np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8)
        top = 0
        while top < size[0]:
            left, tall = 0, 0
            while left < size[1]:
                path = paths[int(rng.integers(len(paths)))]
                photo, ids = image_io.read_image(path), image_io.read_label(folder / f"labels/train/{path.stem}.png")
                part = image[top : top + ids.shape[0], left : left + ids.shape[1]]
                part[:] = photo[: part.shape[0], : part.shape[1]]
                label[top : top + ids.shape[0], left : left + ids.shape[1]] = 7 + ids[: part.shape[0], : part.shape[1]]
                left, tall = left + ids.shape[1], ids.shape[0]
            top += tall
        name = f"train/photos/{number}"
        for place, array in ((f"leftImg8bit/{name}_leftImg8bit", image), (f"gtFine/{name}_gtFine_labelIds", label)):
            path = root / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(at_level(array, 6))


def main() -> None:
    """Measure on synthetic scenes and, with --dataset_dir, on the images of that folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", help="a Cityscapes tree, or one with images/train and labels/train")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--crop_size", type=int, nargs=2, default=(512, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    cv2.setNumThreads(1)
    size, data = tuple(args.size), Data(crop_size=tuple(args.crop_size))
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        roots = {"synthetic scenes": Path(temporary) / "scenes"}
        synthetic.write(roots["synthetic scenes"], train=args.images, val=0, test=0, size=size)
        if args.dataset_dir and (Path(args.dataset_dir) / "leftImg8bit").is_dir():
            roots["given"] = Path(args.dataset_dir)
        elif args.dataset_dir:
            roots["photographs side by side"] = Path(temporary) / "photos"
            tile_photos(Path(args.dataset_dir), Path(temporary) / "photos", size, args.images)
        for name, root in roots.items():
            dataset = open_dataset("cityscapes", root, "train")
            dataset = Dataset(dataset.classes, dataset.pairs[: args.images], root)
            found[name] = measure(dataset, Path(temporary) / "cache", data, args.rounds)
    write_report(
        {
            "data": found,
            "cores_wanted_by": {
                name: {
                    option: REQUIRED * milliseconds / 1e3
                    for option, milliseconds in row["cpu_milliseconds"].items()
                    if option.startswith("sample")
                }
                for name, row in found.items()
            },
            "images_per_second_wanted": REQUIRED,
            "load_before": load,
            "versions": core_versions() | versions(),
            "commit": git_commit(),
        },
        args.out,
    )


def versions() -> dict[str, str]:
    """Return the versions of the optional decoders that are installed."""
    import importlib.metadata

    found = {}
    for name in ("imagecodecs", "pyspng", "isal"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
