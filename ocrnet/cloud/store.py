"""The one interface to object stores and folders, its errors, and how a call that failed is tried again."""

import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from ocrnet.cloud import urls
from ocrnet.cloud.urls import Url
from ocrnet.config import Cloud
from ocrnet.errors import OcrnetError

Result = TypeVar("Result")

LONGEST_PAUSE = 60.0  # seconds between two tries


@dataclass(frozen=True)
class Item:
    """An object: its name below the store's url, its size in bytes, and what the store calls its version.

    The ``etag`` of an object store is the MD5 of the content where it came in one part (and is not encrypted with a key
    of its owner's); otherwise, as in folders, it only tells that the object changed.
    """

    name: str
    size: int
    etag: str = ""

    @property
    def md5(self) -> str:
        """The content's MD5 in hex, or an empty string."""
        return self.etag.lower() if re.fullmatch(r"[0-9a-fA-F]{32}", self.etag) else ""


class StoreError(Exception):
    """A call to a store failed; where ``final``, trying again is of no use."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        # mutation: scrub-credentials
        super().__init__(urls.scrub(message))
        self.final = final


class Store(Protocol):
    """A folder in an object store or on a disk. Names have ``/`` between their parts and are relative to it.

    Every call either succeeds or raises `StoreError`. Calls may come from several threads.
    """

    url: str

    def list(self, prefix: str = "") -> list[Item]:
        """Return the objects whose names begin with ``prefix``, sorted by name; empty where there are none."""

    def stat(self, name: str) -> Item | None:
        """Return one object, or None where there is none."""

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start``; never fewer."""

    def upload(self, source: Path | bytes, name: str) -> None:
        """Make an object of a file or of bytes; until it is complete, an older one of that name stays as it is."""

    def delete(self, name: str) -> None:
        """Remove an object; it is no error where there is none."""


def open_store(url: Url, cloud: Cloud) -> Store:
    """Return the store for a url; an `OcrnetError` says what is not installed or not set."""
    if url.scheme == "s3":
        from ocrnet.cloud.s3 import S3Store

        return S3Store(url, cloud)
    if url.scheme == "obs":
        from ocrnet.cloud import moxing
        from ocrnet.cloud.obs import ObsStore

        file = moxing.find()
        return moxing.MoxingStore(url, file) if file is not None else ObsStore(url, cloud)
    return FolderStore(Path(url.path))


class FolderStore:
    """A folder on a disk of this machine, or one that several machines share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder)

    def list(self, prefix: str = "") -> list[Item]:
        """Return the files below, hidden ones left out."""
        place = self.folder / prefix.rpartition("/")[0]
        found = []
        for parent, folders, files in os.walk(place, onerror=_raise_unless_missing):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(parent) / name for name in files if not name.startswith(".")):
                name = path.relative_to(self.folder).as_posix()
                if name.startswith(prefix) and (item := self.stat(name)):
                    found.append(item)
        return sorted(found, key=lambda item: item.name)

    def stat(self, name: str) -> Item | None:
        """Return one file; its etag is the time of its last change."""
        try:
            status = (self.folder / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _of_folder(error) from error
        if not stat.S_ISREG(status.st_mode):
            return None
        return Item(name, status.st_size, str(status.st_mtime_ns))

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return a part of a file."""
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(start)
                return whole(file.read(length), length)
        except OSError as error:
            raise _of_folder(error) from error

    def upload(self, source: Path | bytes, name: str) -> None:
        """Copy beside, flush to the disk and rename."""
        target = self.folder / name
        draft = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                if isinstance(source, bytes):
                    file.write(source)
                else:
                    with source.open("rb") as content:
                        shutil.copyfileobj(content, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        except OSError as error:
            raise _of_folder(error) from error
        finally:
            with contextlib.suppress(OSError):  # what is to be told is told already
                draft.unlink()

    def delete(self, name: str) -> None:
        """Remove a file."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise _of_folder(error) from error


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise _of_folder(error)


def _of_folder(error: OSError) -> StoreError:
    final = isinstance(error, (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError))
    return StoreError(f"{error.strerror}: '{error.filename}'", final=final)


def md5_of(source: Path | bytes) -> bytes:
    """Return the MD5 of a file or of bytes."""
    digest = hashlib.md5(usedforsecurity=False)
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def whole(content: bytes, length: int) -> bytes:
    """Return what a store gave, or raise where it is not as long as was asked for."""
    if len(content) != length:
        raise StoreError(f"{len(content):,} bytes came where {length:,} were asked for")
    return content


def tried(call: Callable[[], Result], what: str, *, retries: int, say: Callable[[str], None]) -> Result:
    """Return what ``call`` returns; after a failure pause and try again; raise `OcrnetError` after the last try."""
    tries = 0
    while True:
        try:
            return call()
        except StoreError as error:
            tries += 1
            # mutation: retry-failed-requests
            if error.final or tries > retries:
                times = f" ({tries} tries)" if tries > 1 else ""
                raise OcrnetError(f"{what}: {error}{times}") from error
            seconds = pause(tries)
            say(f"{what}: {error}; trying again in {seconds:.1f} s ({tries} of {retries})")
        time.sleep(seconds)


def pause(tries: int) -> float:
    """Return the seconds to wait after so many failed tries: twice as long each time, and not all at one moment."""
    return min(LONGEST_PAUSE, 0.5 * 2 ** (tries - 1)) * random.uniform(0.5, 1)


def size_text(size: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
