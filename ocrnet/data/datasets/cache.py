"""Cache of decoded pairs of image and label on disk (``data.cache_dir``), so that no epoch has to decode them again.

There is one cache file per pair: a header, the bytes of the image, and the bytes of its class indices. The first
process that reads a pair writes its cache file. If a cache file is damaged or its source files have changed, the pair
is decoded again. Therefore a cached pair has the same bytes as a decoded one.
"""

import contextlib
import hashlib
import logging
import math
import mmap
import os
import secrets
import shutil
import struct
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL

from ocrnet.data.datasets.base import ClassTable, Dataset, Pair
from ocrnet.data.image_io import image_size
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.format import size_text

logger = logging.getLogger(__name__)

SUFFIX, TEMPORARY_SUFFIX = ".pair", ".pair.tmp"
MAGIC = b"ocrnet pair 1\n"
# The header: `MAGIC` and the CRC-32 of all bytes after it; then height, width, and size and mtime in ns of the image
# file and of the label file.
_SEAL, _REST = struct.Struct("<14sI"), struct.Struct("<IIQqQq")
HEADER = 64  # bytes of both structs and padding; the pixels follow
# A temporary file that is older was left by a killed process, because writing a pair takes less time.
STALE_SECONDS = 600
SIZE_SAMPLES = 16  # number of images from whose sizes the required disk space is estimated


class CacheError(OcrnetError):
    """The cache folder cannot be used. ``data.on_error: skip`` applies only to unreadable images, not to this error."""


class Source(NamedTuple):
    """Size in bytes and mtime in ns of the image and label files of a pair, to detect that they have changed."""

    image_bytes: int
    image_ns: int
    label_bytes: int
    label_ns: int


class DecodedDataset(Dataset):
    """A dataset that caches decoded pairs in ``folder``; `read` returns the same bytes as `Dataset.read`, read-only.

    Any number of processes may read and write pairs concurrently. The process that opened the dataset and the processes
    forked from it verify each checksum only once in total. A damaged file is reported on stderr, and its pair is
    decoded and written again.
    """

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        super().__init__(dataset.classes, dataset.pairs, dataset.root)
        self.folder = folder
        self._verified = _shared_memory(len(self))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_verified": None}  # this memory is shared only with forked processes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._verified = _shared_memory(len(self))

    def cache_file(self, i: int) -> Path:
        """Return the path of the cache file of pair ``i``; the file exists after the first read of the pair."""
        return self.folder / _cache_name(self.pairs[i], self.classes)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return and raise the same as `Dataset.read`; also raise `CacheError` if ``folder`` cannot be used."""
        pair, cache_file = self.pairs[i], self.cache_file(i)
        source = _source(pair)
        if source is None:  # no label, or a file is missing: `Dataset.read` raises the error
            return super().read(i)
        cached = self._read_cached(i, cache_file, source)
        if cached is not None:
            return cached
        image, label = super().read(i)
        # mutation: do-not-cache-changing-source
        if _source(pair) == source:  # otherwise a file has changed during the read
            _write(cache_file, source, image, label)
            self._verified[i] = 0
        image.flags.writeable = label.flags.writeable = False
        return image, label

    def _read_cached(self, i: int, cache_file: Path, source: Source) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the pair from its cache file; None if the file is missing, outdated or damaged."""
        try:
            with open(cache_file, "rb") as file:
                mapped = _map_file(file.fileno())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _cache_error(cache_file, "read", error) from None
        if not self._is_valid(i, mapped):
            # On stderr, because a data loader worker cannot write to the log.
            print(f"cache: {cache_file} is damaged; {self.path(i)} is decoded again", file=sys.stderr, flush=True)
            return None
        height, width, *written = _REST.unpack_from(mapped, _SEAL.size)
        # mutation: decode-changed-source
        if Source(*written) != source:
            return None
        pixels = height * width
        image = np.frombuffer(mapped, np.uint8, 3 * pixels, HEADER).reshape(height, width, 3)
        return image, np.frombuffer(mapped, np.uint8, pixels, HEADER + 3 * pixels).reshape(height, width)

    def _is_valid(self, i: int, mapped: mmap.mmap | bytes) -> bool:
        """Return whether a cache file has the expected length and, unless already verified, the right checksum."""
        if len(mapped) < HEADER:
            return False
        magic, crc = _SEAL.unpack_from(mapped)
        height, width, *_ = _REST.unpack_from(mapped, _SEAL.size)
        if magic != MAGIC or len(mapped) != HEADER + 4 * height * width:
            return False
        if not self._verified[i]:
            # mutation: verify-cached-pair
            if zlib.crc32(memoryview(mapped)[_SEAL.size :]) != crc:
                return False
            # mutation: verify-cached-pair-once
            self._verified[i] = 1
        return True


def prepare(folder: str | None, datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Add a cache in ``folder`` to datasets; also remove temporary files that killed processes left there.

    Args:
        folder: The cache folder, or None for no cache.
        datasets: The datasets by name of the split.

    Returns:
        The datasets with the cache; without ``folder``, the unchanged datasets.

    Raises:
        CacheError: The folder cannot be used, or the disk has too little free space for the pairs that are not cached,
            as estimated from the sizes of some images.
    """
    if not folder:
        return dict(datasets)
    cache_folder = Path(folder)
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        for temporary in cache_folder.glob(f"*{TEMPORARY_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # renamed or removed by another process meanwhile
                if temporary.stat().st_mtime < time.time() - STALE_SECONDS:
                    temporary.unlink()
        existing = {entry.name for entry in os.scandir(cache_folder)}
        free = shutil.disk_usage(cache_folder).free
    except OSError as error:
        raise _cache_error(cache_folder, "used", error) from None
    count = sum(len(dataset) for dataset in datasets.values())
    missing, needed = 0, 0
    for dataset in datasets.values():
        uncached = sum(_cache_name(pair, dataset.classes) not in existing for pair in dataset.pairs)
        missing, needed = missing + uncached, needed + uncached * _mean_bytes(dataset)
    # mutation: check-disk-space-for-cache
    if needed > free:
        raise CacheError(
            f"data.cache_dir {cache_folder} needs {size_text(needed)} for {missing} decoded pairs, but "
            f"{size_text(free)} are free; free some space, set another folder, or remove data.cache_dir"
        )
    line = f"cache: {count - missing} of {count} pairs are cached in {cache_folder}"
    if missing:
        line += f"; the others need about {size_text(needed)}; {size_text(free)} are free"
    logger.info(line)
    return {split: DecodedDataset(dataset, cache_folder) for split, dataset in datasets.items()}


def _mean_bytes(dataset: Dataset) -> int:
    """Return the mean size of a cache file in bytes, estimated from the sizes of some images."""
    count = min(SIZE_SAMPLES, len(dataset))
    pixels = []
    for i in range(count):
        with contextlib.suppress(OcrnetError):  # raised again when the image is read
            pixels.append(math.prod(image_size(dataset.path(i * len(dataset) // count))))
    return HEADER + 4 * sum(pixels) // max(1, len(pixels))


def _cache_name(pair: Pair, classes: ClassTable) -> str:
    """Return the name of a pair's cache file: a hash of the file paths, the label ids and the decoder versions."""
    paths = [os.path.abspath(path) for path in (pair.image, pair.label) if path is not None]
    # mutation: cache-per-class-table
    key = (paths, classes.ids, sorted(classes.ignored), cv2.__version__, PIL.__version__)
    return hashlib.sha256(repr(key).encode()).hexdigest()[:32] + SUFFIX


def _source(pair: Pair) -> Source | None:
    """Return sizes and mtimes of a pair's files; None if it has no label or a file is missing."""
    if pair.label is None:
        return None
    try:
        image, label = os.stat(pair.image), os.stat(pair.label)
    except OSError:
        return None
    return Source(image.st_size, image.st_mtime_ns, label.st_size, label.st_mtime_ns)


def _write(path: Path, source: Source, image: np.ndarray, label: np.ndarray) -> None:
    """Write the cache file of a pair atomically; readers see the old file or the complete new file."""
    rest = _REST.pack(*label.shape, *source).ljust(HEADER - _SEAL.size, b"\0")
    crc = zlib.crc32(label.data, zlib.crc32(image.data, zlib.crc32(rest)))
    # mutation: rename-cached-pair-when-complete
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # the folder may have been removed during the run
        try:
            with open(temporary, "xb") as file:
                file.writelines((_SEAL.pack(MAGIC, crc), rest, image.data, label.data))
            os.replace(temporary, path)  # no fsync: a file truncated by a power failure fails its checksum
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cache_error(path, "written", error) from None


def _cache_error(path: Path, action: str, error: OSError) -> CacheError:
    return CacheError(
        f"data.cache_dir: {path} cannot be {action}: {error.strerror}; fix this, set another folder, or remove the key"
    )


def _map_file(file: int) -> mmap.mmap | bytes:
    return mmap.mmap(file, 0, access=mmap.ACCESS_READ) if os.fstat(file).st_size else b""


def _shared_memory(size: int) -> mmap.mmap:
    return mmap.mmap(-1, max(1, size))
