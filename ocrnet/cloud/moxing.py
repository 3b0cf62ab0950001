"""OBS through ModelArts' moxing package, which has the job's permissions and needs no key.

The package exists only on ModelArts. The code follows the documentation of `moxing.file`; it could not be run with the
real package.
"""

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ocrnet.cloud.store import Item, StoreError, check_length
from ocrnet.utils.urls import Url

NEEDED = ("File", "copy", "exists", "get_size", "list_directory", "remove")


def find() -> Any | None:
    """Return ``moxing.file``, or None if it is missing; the PyPI package of that name is a different one."""
    try:
        if importlib.util.find_spec("moxing") is None:
            return None
        file = getattr(importlib.import_module("moxing"), "file", None)
    except Exception:  # a package of that name that fails to import
        return None
    return file if all(callable(getattr(file, name, None)) for name in NEEDED) else None


class MoxingStore:
    """A folder of a bucket; moxing returns no checksums, so only sizes are compared."""

    def __init__(self, url: Url, file: Any) -> None:
        self.url, self._file = str(url), file

    def list(self, prefix: str = "") -> list[Item]:
        """Return the objects, except those that only represent a folder."""
        if not _call_sdk(lambda: self._file.exists(self.url)):
            return []
        names = _call_sdk(lambda: self._file.list_directory(self.url, recursive=True))
        names = [name.lstrip("/") for name in names]
        wanted = sorted(name for name in names if name.startswith(prefix) and not name.endswith("/"))
        folders = {name[: slash.start()] for name in wanted for slash in re.finditer("/", name)}
        return [self._item(name) for name in wanted if name not in folders]

    def stat(self, name: str) -> Item | None:
        """Return one object, or None if it does not exist."""
        return self._item(name) if _call_sdk(lambda: self._file.exists(self._at(name))) else None

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
            with self._file.File(self._at(name), "rb") as file:
                file.seek(start)
                return file.read(length)

        return check_length(_call_sdk(read), length)

    def upload(self, source: Path | bytes, name: str) -> None:
        """Upload an object."""

        def write() -> None:
            with self._file.File(self._at(name), "wb") as file:
                file.write(source)

        _call_sdk(write if isinstance(source, bytes) else lambda: self._file.copy(str(source), self._at(name)))

    def delete(self, name: str) -> None:
        """Remove an object if it exists."""
        if _call_sdk(lambda: self._file.exists(self._at(name))):
            _call_sdk(lambda: self._file.remove(self._at(name)))

    def _at(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _item(self, name: str) -> Item:
        return Item(name, int(_call_sdk(lambda: self._file.get_size(self._at(name)))))


def _call_sdk(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        final = isinstance(error, (FileNotFoundError, PermissionError))
        raise StoreError(f"{type(error).__name__}: {error}", final=final) from error
