"""Cache of decoded pairs on disk (``data.cache_dir``), which avoids decoding them in every epoch.

Each pair has one file: a header, the bytes of the image, and the bytes of its class indices. The first process that
needs a pair writes its file. A cached pair has the same bytes as a decoded one; otherwise the pair is decoded again.
"""

import contextlib
import hashlib
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

END, DRAFT_END = ".pair", ".pair.tmp"
MAGIC = b"ocrnet pair 1\n"
# Magic and CRC-32 of the bytes after it; then height, width, size and mtime in ns of the image, and of the label.
_SEAL, _REST = struct.Struct("<14sI"), struct.Struct("<IIQqQq")
HEADER = 64  # bytes of both structs with padding; the pixels follow
# Writing a pair takes less time than this: an older draft was left by a killed process.
DRAFT_SECONDS = 600
LOOKED_AT = 16


class CacheError(OcrnetError):
    """The cache cannot be used; unlike an unreadable image, this error is never skipped by ``data.on_error``."""


class Source(NamedTuple):
    """Size in bytes and mtime in ns of the image and label files of a pair, to detect changes."""

    image_bytes: int
    image_ns: int
    label_bytes: int
    label_ns: int


class DecodedDataset(Dataset):
    """Dataset that caches decoded pairs in ``folder``; `read` returns the same bytes, in read-only arrays.

    Any number of processes may read and write pairs concurrently. Each checksum is verified once by all processes
    forked from the one that opened the dataset. A damaged file is reported on stderr, and its pair is decoded and
    written again.
    """

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        super().__init__(dataset.classes, dataset.pairs, dataset.root)
        self.folder = folder
        self._compared = _shared(len(self))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_compared": None}  # only fork shares this memory, pickling does not

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._compared = _shared(len(self))

    def place(self, i: int) -> Path:
        """Return the cache file of pair ``i``; it exists once the pair has been read."""
        return self.folder / _name(self.pairs[i], self.classes)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return and raise the same as `Dataset.read`; raise `CacheError` if ``folder`` cannot be used."""
        pair, place = self.pairs[i], self.place(i)
        source = _source(pair)
        if source is None:  # no label, or a file is missing: raises the specific error
            return super().read(i)
        found = self._found(i, place, source)
        if found is not None:
            return found
        image, label = super().read(i)
        # mutation: do-not-cache-changing-source
        if _source(pair) == source:  # otherwise a file changed during the read
            _write(place, source, image, label)
            self._compared[i] = 0
        image.flags.writeable = label.flags.writeable = False
        return image, label

    def _found(self, i: int, place: Path, source: Source) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the pair from its cache file; None if the file is missing, outdated or damaged."""
        try:
            with open(place, "rb") as file:
                mapped = _mapped(file.fileno())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(place, "read", error) from None
        if not self._is_whole(i, mapped):
            # On stderr, because a data loader worker has no other output channel.
            print(f"cache: {place} is damaged; {self.path(i)} is decoded again", file=sys.stderr, flush=True)
            return None
        height, width, *written = _REST.unpack_from(mapped, _SEAL.size)
        # mutation: decode-changed-source
        if Source(*written) != source:
            return None
        pixels = height * width
        image = np.frombuffer(mapped, np.uint8, 3 * pixels, HEADER).reshape(height, width, 3)
        return image, np.frombuffer(mapped, np.uint8, pixels, HEADER + 3 * pixels).reshape(height, width)

    def _is_whole(self, i: int, mapped: mmap.mmap | bytes) -> bool:
        if len(mapped) < HEADER:
            return False
        magic, crc = _SEAL.unpack_from(mapped)
        height, width, *_ = _REST.unpack_from(mapped, _SEAL.size)
        if magic != MAGIC or len(mapped) != HEADER + 4 * height * width:
            return False
        if not self._compared[i]:
            # mutation: verify-cached-pair
            if zlib.crc32(memoryview(mapped)[_SEAL.size :]) != crc:
                return False
            # mutation: verify-cached-pair-once
            self._compared[i] = 1
        return True


def prepare(folder: str | None, datasets: Mapping[str, Dataset]) -> tuple[dict[str, Dataset], list[str]]:
    """Return the datasets with a cache in ``folder``, and a log line on cached pairs and disk space.

    Without ``folder``, return the datasets unchanged and no line. Remove the drafts of killed processes. Raise
    `CacheError` if the folder cannot be used, or if the missing pairs do not fit on the disk, estimated from the sizes
    of some images.
    """
    if not folder:
        return dict(datasets), []
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        for draft in place.glob(f"*{DRAFT_END}"):
            with contextlib.suppress(FileNotFoundError):  # just renamed, or removed by another rank
                if draft.stat().st_mtime < time.time() - DRAFT_SECONDS:
                    draft.unlink()
        there = {entry.name for entry in os.scandir(place)}
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise _unusable(place, "used", error) from None
    count = sum(len(dataset) for dataset in datasets.values())
    missing, needed = 0, 0
    for dataset in datasets.values():
        absent = sum(_name(pair, dataset.classes) not in there for pair in dataset.pairs)
        missing, needed = missing + absent, needed + absent * _mean_bytes(dataset)
    # mutation: check-disk-space-for-cache
    if needed > free:
        raise CacheError(
            f"data.cache_dir {place} needs {size_text(needed)} for {missing} decoded pairs, but {size_text(free)} "
            "are free; free some space, give another folder, or remove data.cache_dir"
        )
    line = f"cache: {count - missing} of {count} pairs are cached in {place}"
    if missing:
        line += f"; the others need about {size_text(needed)}; {size_text(free)} are free"
    return {what: DecodedDataset(dataset, place) for what, dataset in datasets.items()}, [line]


def _mean_bytes(dataset: Dataset) -> int:
    """Return the approximate number of bytes per cached pair, estimated from the sizes of some images."""
    count = min(LOOKED_AT, len(dataset))
    pixels = []
    for i in range(count):
        with contextlib.suppress(OcrnetError):  # raised when the image is read
            pixels.append(math.prod(image_size(dataset.path(i * len(dataset) // count))))
    return HEADER + 4 * sum(pixels) // max(1, len(pixels))


def _name(pair: Pair, classes: ClassTable) -> str:
    """Return the name of a cache file: a hash of the file paths, the label ids, and the decoder versions."""
    paths = [os.path.abspath(path) for path in (pair.image, pair.label) if path is not None]
    # mutation: cache-per-class-table
    key = (paths, classes.ids, sorted(classes.ignored), cv2.__version__, PIL.__version__)
    return hashlib.sha256(repr(key).encode()).hexdigest()[:32] + END


def _source(pair: Pair) -> Source | None:
    if pair.label is None:
        return None
    try:
        image, label = os.stat(pair.image), os.stat(pair.label)
    except OSError:
        return None
    return Source(image.st_size, image.st_mtime_ns, label.st_size, label.st_mtime_ns)


def _write(place: Path, source: Source, image: np.ndarray, label: np.ndarray) -> None:
    """Write the cache file of a pair atomically; readers see the old file or the complete new one."""
    rest = _REST.pack(*label.shape, *source).ljust(HEADER - _SEAL.size, b"\0")
    crc = zlib.crc32(label.data, zlib.crc32(image.data, zlib.crc32(rest)))
    # mutation: rename-cached-pair-when-complete
    draft = place.with_name(f"{place.stem}.{secrets.token_hex(8)}{DRAFT_END}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)  # the folder may have been removed during the run
        try:
            with open(draft, "xb") as file:
                file.writelines((_SEAL.pack(MAGIC, crc), rest, image.data, label.data))
            os.replace(draft, place)  # no fsync: a file truncated by a power failure fails its checksum
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise _unusable(place, "written", error) from None


def _unusable(place: Path, how: str, error: OSError) -> CacheError:
    return CacheError(
        f"data.cache_dir: {place} cannot be {how}: {error.strerror}; fix it, give another folder, or remove the key"
    )


def _mapped(file: int) -> mmap.mmap | bytes:
    return mmap.mmap(file, 0, access=mmap.ACCESS_READ) if os.fstat(file).st_size else b""


def _shared(size: int) -> mmap.mmap:
    return mmap.mmap(-1, max(1, size))
