"""Writing of files: appending of lines, and errors that name the file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ocrnet.utils.errors import OcrnetError


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
