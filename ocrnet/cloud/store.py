"""The interface that object stores and folders implement, and its error."""

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ocrnet.utils import urls


@dataclass(frozen=True)
class Item:
    """An object: its name relative to the store's url, its size in bytes, and its version (``etag``) in the store.

    The ``etag`` of an object store is the MD5 of the content if the object was uploaded in one part and is not
    encrypted with a key of its owner. Otherwise, and in folders, it only changes when the object changes.
    """

    name: str
    size: int
    etag: str = ""

    @property
    def md5(self) -> str:
        """Return the content's MD5 in hex, or an empty string if it is unknown."""
        return self.etag.lower() if re.fullmatch(r"[0-9a-fA-F]{32}", self.etag) else ""


class StoreError(Exception):
    """A call to a store failed; if ``final``, a retry cannot succeed."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        # mutation: scrub-credentials
        super().__init__(urls.scrub(message))
        self.final = final


class Store(Protocol):
    """A folder in an object store or on a disk.

    Names are relative to the folder and have ``/`` between their parts. Every call either succeeds or raises
    `StoreError`. Calls may come from several threads.
    """

    url: str

    def list(self, prefix: str = "") -> list[Item]:
        """Return the objects whose names begin with ``prefix``, sorted by name; empty if there are none."""

    def stat(self, name: str) -> Item | None:
        """Return one object, or None if it does not exist."""

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return a part of an object.

        Args:
            name: The object's name.
            start: The offset of the first byte.
            length: The number of bytes.

        Returns:
            Exactly ``length`` bytes.

        Raises:
            StoreError: The request failed, or returned another number of bytes.
        """

    def upload(self, source: Path | bytes, name: str) -> None:
        """Upload a file or bytes; an older object of that name stays unchanged until the new one is complete."""

    def delete(self, name: str) -> None:
        """Remove an object; do nothing if it does not exist."""


def md5_of(source: Path | bytes) -> bytes:
    """Return the MD5 of a file or of bytes, as 16 bytes."""
    digest = hashlib.md5(usedforsecurity=False)
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def check_length(content: bytes, length: int) -> bytes:
    """Return ``content``; raise `StoreError` if it does not have ``length`` bytes."""
    if len(content) != length:
        raise StoreError(f"expected {length:,} bytes, got {len(content):,}")
    return content
