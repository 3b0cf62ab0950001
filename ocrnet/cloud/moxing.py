"""OBS through ModelArts' own moxing, which has the job's rights without any key. It exists on ModelArts alone.

Written after its documentation (`moxing.file`); it could not be run against the real one.
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
    """Return ``moxing.file``, or None where there is none: the package of that name on PyPI is something else."""
    try:
        if importlib.util.find_spec("moxing") is None:
            return None
        file = getattr(importlib.import_module("moxing"), "file", None)
    except Exception:  # something of that name that does not even import here
        return None
    return file if all(callable(getattr(file, name, None)) for name in NEEDED) else None


class MoxingStore:
    """A folder of a bucket; its objects have no checksum here, so that sizes alone are compared."""

    def __init__(self, url: Url, file: Any) -> None:
        self.url, self._file = str(url), file

    def list(self, prefix: str = "") -> list[Item]:
        """Return the objects; those that only stand for a folder are left out."""
        if not _call_sdk(lambda: self._file.exists(self.url)):
            return []
        names = _call_sdk(lambda: self._file.list_directory(self.url, recursive=True))
        names = [name.lstrip("/") for name in names]
        wanted = sorted(name for name in names if name.startswith(prefix) and not name.endswith("/"))
        folders = {name[: slash.start()] for name in wanted for slash in re.finditer("/", name)}
        return [self._item(name) for name in wanted if name not in folders]

    def stat(self, name: str) -> Item | None:
        """Return one object."""
        return self._item(name) if _call_sdk(lambda: self._file.exists(self._at(name))) else None

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return a part of an object."""

        def read() -> bytes:
            with self._file.File(self._at(name), "rb") as file:
                file.seek(start)
                return file.read(length)

        return check_length(_call_sdk(read), length)

    def upload(self, source: Path | bytes, name: str) -> None:
        """Put an object."""

        def write() -> None:
            with self._file.File(self._at(name), "wb") as file:
                file.write(source)

        _call_sdk(write if isinstance(source, bytes) else lambda: self._file.copy(str(source), self._at(name)))

    def delete(self, name: str) -> None:
        """Remove an object."""
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
