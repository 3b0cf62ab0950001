"""Reading and writing image files: the one place that does it."""

import io
import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ocrnet.errors import OcrnetError

# What a whole file ends with; OpenCV may return a half-grey picture for one cut short by a few bytes.
ENDINGS = {b"\x89PNG\r\n\x1a\n": b"IEND\xaeB`\x82", b"\xff\xd8\xff": b"\xff\xd9"}


def read_image(path: str | Path) -> np.ndarray:
    """Return a picture as uint8 H,W,3 RGB, whatever its depth or colours; EXIF rotation is ignored, as labels have none."""
    content = _read(path)
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise OcrnetError(f"image '{path}' cannot be decoded: {error.err}") from None
    if image is None:
        raise OcrnetError(f"image '{path}' is not an image that OpenCV can decode, or is damaged; replace or remove it")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_label(path: str | Path) -> np.ndarray:
    """Return a label file's ids as stored, uint8 H,W: grey levels, or the indices of a palette."""
    content = _read(path)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OcrnetError(f"label '{path}' cannot be decoded: {error}; replace or remove it") from None
    if picture.mode not in ("L", "P", "1") and not picture.mode.startswith("I"):
        raise OcrnetError(
            f"label '{path}' is a {picture.mode} picture, but a label has one channel with the class id of each pixel"
        )
    ids = np.asarray(picture)
    if ids.min() < 0 or ids.max() > 255:
        raise OcrnetError(f"label '{path}' has ids from {ids.min()} to {ids.max()}, but they must be in 0..255")
    return ids.astype(np.uint8)


def write_png(path: str | Path, array: np.ndarray) -> None:
    """Write uint8 H,W or H,W,3 RGB as PNG, whole or not at all; makes the folder if need be."""
    path = Path(path)
    pixels = array if array.ndim == 2 else cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    done, content = cv2.imencode(".png", pixels)
    assert done, f"OpenCV did not encode {array.dtype} {array.shape}"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(content.tobytes())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _read(path: str | Path) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise OcrnetError(f"file '{path}' cannot be read: {error.strerror}") from None
    if not content:
        raise OcrnetError(f"file '{path}' is empty; replace or remove it")
    for beginning, ending in ENDINGS.items():
        if content.startswith(beginning) and ending not in content[-64:]:
            raise OcrnetError(f"file '{path}' is cut short (its end is missing); replace or remove it")
    return content
