"""Image files, read and written in one place: a damaged file is an error that names it, never half a picture."""

import io
import os
import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from ocrnet.errors import OcrnetError

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_LABELS = "a label is a PNG of one channel, 8 bits a pixel, whose values are the class ids"
_DAMAGED = "is damaged or no image; write it again or take it out of the dataset"

_RGB = getattr(cv2, "IMREAD_COLOR_RGB", None)  # from OpenCV 4.11 on; before, channels are turned around afterwards
_COLOURS = cv2.IMREAD_COLOR if _RGB is None else _RGB
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(path: str | Path, *, upright: bool = False) -> np.ndarray:
    """Read an image file as uint8 H,W,3 RGB, whatever its channels and depth.

    ``upright`` turns it as its EXIF orientation says; datasets leave that out, because labels have no orientation.
    Raises `OcrnetError` naming a file that is missing, empty, truncated or undecodable.
    """
    data = _read(path)
    flags = _COLOURS if upright else _COLOURS | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise OcrnetError(f"{path} {_DAMAGED} ({error.err})") from None
    if image is None:
        raise OcrnetError(f"{path} {_DAMAGED}")
    return image if _COLOURS == _RGB else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def image_size(path: str | Path) -> tuple[int, int]:
    """Return height and width as the beginning of an image file tells them; raises `OcrnetError` naming the file."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise OcrnetError(f"{path} does not exist") from None
    except _UNDECODABLE as why:
        raise OcrnetError(f"{path} {_DAMAGED} ({why})") from None


def read_label(path: str | Path) -> np.ndarray:
    """Read a label file as uint8 H,W of the ids stored in it: grey values, or the indices of a palette PNG.

    Raises `OcrnetError` naming a file that is missing, empty, damaged, coloured, or holds a value above 255.
    """
    data = _read(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, mode, ids = image.format, image.mode, np.asarray(image)
    except UnidentifiedImageError:
        raise OcrnetError(f"{path} {_DAMAGED}") from None
    except _UNDECODABLE as why:
        raise OcrnetError(f"{path} {_DAMAGED} ({why})") from None
    if kind == "JPEG":
        raise OcrnetError(f"{path} is a JPEG, which changes ids; {_LABELS}: write it again from its source")
    if mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
        raise OcrnetError(f"{path} has mode {mode}; {_LABELS}, not colours: convert it")
    if ids.max(initial=0) > 255 or ids.min(initial=0) < 0:
        raise OcrnetError(f"{path} holds values from {ids.min()} to {ids.max()}; {_LABELS}, 0 to 255")
    ids = ids.astype(np.uint8)
    # Pillow spreads grey of 2 and 4 bits over 0 to 255.
    stretch = {2: 85, 4: 17}.get(data[24], 1) if mode == "L" and data.startswith(_PNG) else 1
    return ids // stretch if stretch > 1 else ids


def write_png(path: str | Path, array: np.ndarray) -> None:
    """Write uint8 H,W (grey) or H,W,3 (RGB) as PNG; whoever reads ``path`` sees the old file or the whole new one.

    Folders are made as needed. Raises `OcrnetError` where the file cannot be written.
    """
    assert array.dtype == np.uint8, f"{array.dtype}, not uint8"
    assert array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3), f"shape {array.shape}, not H,W or H,W,3"
    path = Path(path)
    done, data = cv2.imencode(".png", array if array.ndim == 2 else cv2.cvtColor(array, cv2.COLOR_RGB2BGR))
    assert done, f"OpenCV could not encode an array of shape {array.shape}"
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(data.tobytes())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OcrnetError(f"{path} cannot be written: {error.strerror}") from None


def _read(path: str | Path) -> bytes:
    """Return a file's bytes after checking that it ends where its format says, which the decoders do not all do."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise OcrnetError(f"{path} does not exist") from None
    except OSError as error:
        raise OcrnetError(f"{path} cannot be read: {error.strerror}") from None
    if not data:
        raise OcrnetError(f"{path} is empty; write it again or take it out of the dataset")
    if data.startswith(_PNG):
        _check_png(path, data)
    # The last scan must be followed by an end-of-image marker; what cameras append after that does no harm.
    elif data.startswith(_JPEG) and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise OcrnetError(f"{path} is truncated: the JPEG has no end; write it again or take it out of the dataset")
    return data


def _check_png(path: str | Path, data: bytes) -> None:
    """Walk the chunks of a PNG, each with its length and CRC, up to IEND."""
    position, kind = len(_PNG), b""
    while kind != b"IEND":
        if position + 12 > len(data):
            raise OcrnetError(f"{path} is truncated: the PNG has no end; write it again or take it out of the dataset")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            raise OcrnetError(f"{path} is truncated in a PNG chunk; write it again or take it out of the dataset")
        if zlib.crc32(memoryview(data)[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise OcrnetError(f"{path} is damaged: a PNG chunk fails its checksum; write it again")
        position = end + 4
