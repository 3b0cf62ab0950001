"""OBS through ModelArts' moxing package, which uses the permissions of the job and needs no access key.

The package exists only on ModelArts. This code follows the documentation of `moxing.file`. It has not been run with
the real package.
"""

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ocrnet.cloud.store import Item, StoreError, check_length
from ocrnet.utils.urls import Url

REQUIRED_FUNCTIONS = ("File", "copy", "exists", "get_size", "list_directory", "remove")


def find() -> Any | None:
    """Return ModelArts' ``moxing.file`` module, or None if it is not installed.

    PyPI has an unrelated package with the same name; it also gives None.
    """
    try:
        if importlib.util.find_spec("moxing") is None:
            return None
        file = getattr(importlib.import_module("moxing"), "file", None)
    except Exception:  # an unrelated package with this name that fails to import
        return None
    return file if all(callable(getattr(file, name, None)) for name in REQUIRED_FUNCTIONS) else None


class MoxingStore:
    """A folder in an OBS bucket; moxing returns no checksums, so only sizes can be verified."""

    def __init__(self, url: Url, file: Any) -> None:
        self.url, self._file = str(url), file

    def list(self, prefix: str = "") -> list[Item]:
        """Return the objects whose names begin with ``prefix``; objects that represent a folder are left out."""
        if not _call_sdk(lambda: self._file.exists(self.url)):
            return []
        names = _call_sdk(lambda: self._file.list_directory(self.url, recursive=True))
        names = [name.lstrip("/") for name in names]
        objects = sorted(name for name in names if name.startswith(prefix) and not name.endswith("/"))
        folders = {name[: slash.start()] for name in objects for slash in re.finditer("/", name)}
        return [self._item(name) for name in objects if name not in folders]

    def stat(self, name: str) -> Item | None:
        """Return one object, or None if it does not exist."""
        return self._item(name) if _call_sdk(lambda: self._file.exists(self._object_url(name))) else None

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

        def read() -> bytes:
            with self._file.File(self._object_url(name), "rb") as file:
                file.seek(start)
                return file.read(length)

        return check_length(_call_sdk(read), length)

    def upload(self, source: Path | bytes, name: str) -> None:
        """Upload an object."""

        def write() -> None:
            with self._file.File(self._object_url(name), "wb") as file:
                file.write(source)

        _call_sdk(write if isinstance(source, bytes) else lambda: self._file.copy(str(source), self._object_url(name)))

    def delete(self, name: str) -> None:
        """Remove an object if it exists."""
        if _call_sdk(lambda: self._file.exists(self._object_url(name))):
            _call_sdk(lambda: self._file.remove(self._object_url(name)))

    def _object_url(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _item(self, name: str) -> Item:
        return Item(name, int(_call_sdk(lambda: self._file.get_size(self._object_url(name)))))


def _call_sdk(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        final = isinstance(error, (FileNotFoundError, PermissionError))
        raise StoreError(f"{type(error).__name__}: {error}", final=final) from error
