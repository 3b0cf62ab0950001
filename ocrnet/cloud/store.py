"""The interface of a store, which object stores and folders implement, and its error."""

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ocrnet.utils import urls


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


def md5_of(source: Path | bytes) -> bytes:
    """Return the MD5 of a file or of bytes."""
    digest = hashlib.md5(usedforsecurity=False)
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def check_length(content: bytes, length: int) -> bytes:
    """Return what a store gave, or raise where it is not as long as was asked for."""
    if len(content) != length:
        raise StoreError(f"{len(content):,} bytes came where {length:,} were asked for")
    return content
