"""Writing what a report consists of: whole or not at all, but without waiting for the disk, as a checkpoint must."""

import os
from pathlib import Path

from ocrnet.data.image_io import DRAFT_NAME
from ocrnet.utils.errors import OcrnetError


def write(path: Path, data: bytes) -> Path:
    """Put ``data`` in place of a file in one step, and make its folder if need be; `OcrnetError` where that fails."""
    draft = path.with_name(f".{path.name[:DRAFT_NAME]}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(data)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OcrnetError(
            f"cannot write {path}: {error.strerror}; make room there, or give another --output"
        ) from error
    return path
