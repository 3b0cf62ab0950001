"""Writing of files: atomic replacement, appending of lines, and errors that name the file."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ocrnet.utils.errors import OcrnetError

DRAFT_SUFFIX = ".tmp"
_LONGEST_NAME = 200  # characters; file systems permit 255 bytes


@contextlib.contextmanager
def atomic_write(path: str | Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Open a draft next to ``path`` that replaces ``path`` when the ``with`` statement ends without an exception.

    A reader sees the old file or the complete new one, at any moment and after a kill. Missing folders are created.

    Args:
        path: The file to write.
        sync: Write the file and its folder entry to the disk, so that it also survives a power failure.

    Yields:
        The draft, open for writing in binary mode.

    Raises:
        OSError: A file cannot be written; see `translate_write_errors`.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name[:_LONGEST_NAME]}.{os.getpid()}.{threading.get_ident()}{DRAFT_SUFFIX}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with draft.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(draft, path)
        if sync:
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network and FUSE file systems may not support this; the file itself is already synced and in place.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file; create the file and its folder if they do not exist."""
    # mutation: recreate-removed-run-folder
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextlib.contextmanager
def translate_write_errors(
    path: str | Path, remedy: str = "free some space, then resume with --resume_ckpt auto"
) -> Iterator[None]:
    """Raise an `OSError` in the body as an `OcrnetError`.

    Args:
        path: The file or folder that the error names.
        remedy: What the user can do, as the end of the message.

    Raises:
        OcrnetError: The body raised an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise OcrnetError(f"'{path}' cannot be written: {error.strerror or error}; {remedy}") from error
