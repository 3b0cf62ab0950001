"""The interface of object stores and folders, and the error that its methods raise."""

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ocrnet.utils import urls


@dataclass(frozen=True)
class Item:
    """An object: its name relative to the store's url, its size in bytes, and its ``etag``, which identifies a version.

    In an object store, the ``etag`` is the MD5 of the content if the object was uploaded in one part and is not
    encrypted with a customer-managed key. Otherwise, and in folders, it is only a value that changes with the object.
    """

    name: str
    size: int
    etag: str = ""

    @property
    def md5(self) -> str:
        """Return the content's MD5 in hex, or an empty string if it is unknown."""
        return self.etag.lower() if re.fullmatch(r"[0-9a-fA-F]{32}", self.etag) else ""


class StoreError(Exception):
    """A failed call to a store; ``final`` means that a retry cannot succeed."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        # mutation: scrub-credentials
        super().__init__(urls.scrub(message))
        self.final = final


class Store(Protocol):
    """A folder in an object store or on a disk.

    The names of objects are relative to the folder, with ``/`` as separator. Every method raises `StoreError` on
    failure. The methods are thread-safe.
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
        """Upload a file or bytes; an existing object of that name is unchanged until the new one is complete."""

    def delete(self, name: str) -> None:
        """Remove an object; do nothing if it does not exist."""


def md5_of(source: Path | bytes) -> bytes:
    """Return the MD5 of a file's content or of bytes; the result has 16 bytes."""
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
