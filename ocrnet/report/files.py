"""Atomic writes of report files; unlike checkpoints, they are not synchronized to disk."""

import os
from pathlib import Path

from ocrnet.data.image_io import TEMPORARY_NAME_LENGTH
from ocrnet.utils.errors import OcrnetError


def write(path: Path, data: bytes) -> Path:
    """Replace a file with ``data`` atomically and create its folder if needed; raise `OcrnetError` on failure."""
    draft = path.with_name(f".{path.name[:TEMPORARY_NAME_LENGTH]}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(data)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OcrnetError(
            f"cannot write {path}: {error.strerror}; free disk space, or choose another --output"
        ) from error
    return path
