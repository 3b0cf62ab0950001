"""A store in a folder, on a disk of this machine or shared by several machines."""

import contextlib
import os
import shutil
import stat
from pathlib import Path

from ocrnet.cloud.store import Item, StoreError, check_length


class FolderStore:
    """A store in a folder, on a disk of this machine or shared by several machines."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder)

    def list(self, prefix: str = "") -> list[Item]:
        """Return the files in the folder and its subfolders, except hidden ones."""
        top = self.folder / prefix.rpartition("/")[0]
        items = []
        for parent, folders, files in os.walk(top, onerror=_raise_unless_missing):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(parent) / name for name in files if not name.startswith(".")):
                name = path.relative_to(self.folder).as_posix()
                if name.startswith(prefix) and (item := self.stat(name)):
                    items.append(item)
        return sorted(items, key=lambda item: item.name)

    def stat(self, name: str) -> Item | None:
        """Return one file, or None if it does not exist; its etag is its modification time in nanoseconds."""
        try:
            status = (self.folder / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _store_error(error) from error
        if not stat.S_ISREG(status.st_mode):
            return None
        return Item(name, status.st_size, str(status.st_mtime_ns))

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return a part of a file.

        Args:
            name: The file's name.
            start: The offset of the first byte.
            length: The number of bytes.

        Returns:
            Exactly ``length`` bytes.

        Raises:
            StoreError: The file cannot be read, or is too short.
        """
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(start)
                return check_length(file.read(length), length)
        except OSError as error:
            raise _store_error(error) from error

    def upload(self, source: Path | bytes, name: str) -> None:
        """Write a temporary file in the target's folder, sync it to disk and rename it to the target."""
        target = self.folder / name
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                if isinstance(source, bytes):
                    file.write(source)
                else:
                    with source.open("rb") as content:
                        shutil.copyfileobj(content, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            raise _store_error(error) from error
        finally:
            with contextlib.suppress(OSError):  # the file is already renamed, or another error is being raised
                temporary.unlink()

    def delete(self, name: str) -> None:
        """Remove a file."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise _store_error(error) from error


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise _store_error(error)


def _store_error(error: OSError) -> StoreError:
    """Return the `StoreError` for an `OSError`; it is final if a retry cannot succeed."""
    final = isinstance(error, (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError))
    return StoreError(f"{error.strerror}: '{error.filename}'", final=final)
