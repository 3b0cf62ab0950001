"""Reading and writing of image files. A damaged file raises an error that names it, and gives no partial image."""

import contextlib
import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from ocrnet.utils.errors import OcrnetError

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_EXIF_ORIENTATION = 0x0112
# EXIF orientation -> (whether to mirror left to right, number of counterclockwise quarter turns after that).
_ORIENTATIONS = {
    1: (False, 0),
    2: (True, 0),
    3: (False, 2),
    4: (True, 2),
    5: (True, 1),
    6: (False, 3),
    7: (True, 3),
    8: (False, 1),
}
# Maximum number of characters of a file name that are part of its temporary name; a file name is limited to 255 bytes.
TEMPORARY_NAME_LENGTH = 40
_CHUNK = 2**20  # maximum bytes of a PNG chunk; libpng warns above 8 million
# Pixels per strip in operations that process an image in strips, because a second full array takes too much memory.
STRIP_PIXELS = 2**22
_LABEL_RULE = "a label is a one-channel PNG with 8 bits per pixel, whose values are class ids"
_DAMAGED_HINT = "is damaged or not an image; replace or remove it"

_RGB = getattr(cv2, "IMREAD_COLOR_RGB", None)  # since OpenCV 4.11; otherwise BGR is converted after decoding
_COLORS = cv2.IMREAD_COLOR if _RGB is None else _RGB
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(path: str | Path, *, upright: bool = False) -> np.ndarray:
    """Read an image file with any number of channels and any bit depth, and return it as uint8 H,W,3 RGB.

    ``upright`` applies the EXIF orientation; datasets do not use it, because label files have no orientation. Raise
    `OcrnetError`, which names the file, if it is missing, empty, truncated or not decodable.
    """
    return decode_image(_read(path), path, upright=upright)


def decode_image(data: bytes, name: str | Path, *, upright: bool = False) -> np.ndarray:
    """Decode the bytes of an image file as `read_image` does.

    Args:
        data: Bytes of the file.
        name: Name of the file in error messages.
        upright: Apply the EXIF orientation.

    Returns:
        The image, uint8 H,W,3 RGB.

    Raises:
        OcrnetError: The bytes are empty, truncated or not decodable.
    """
    _check_complete(name, data)
    webp = data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    # OpenCV applies the orientation of JPEG and PNG files, but some versions ignore that of WebP files.
    flags = _COLORS if upright and not webp else _COLORS | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise OcrnetError(f"{name} {_DAMAGED_HINT} ({error.err})") from None
    if image is None:
        raise OcrnetError(f"{name} {_DAMAGED_HINT}")
    if _COLORS != _RGB:
        for strip in strips(image):
            cv2.cvtColor(strip, cv2.COLOR_BGR2RGB, strip)  # in place: a second whole image would double the memory
    return _apply_orientation(image, _webp_orientation(data)) if upright and webp else image


def strips(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield strips of an array H,W,... from top to bottom, as views of at most about `STRIP_PIXELS` pixels."""
    rows = max(1, STRIP_PIXELS // array.shape[1])
    yield from (array[top : top + rows] for top in range(0, len(array), rows))


def image_size(path: str | Path) -> tuple[int, int]:
    """Return height and width from the header of an image file; raise `OcrnetError` if it cannot be read."""
    return _size(path, path)


def size_in(data: bytes, name: str | Path) -> tuple[int, int]:
    """Return height and width from the bytes of an image file; error messages name the file as ``name``."""
    return _size(io.BytesIO(data), name)


def _size(file: Any, path: str | Path) -> tuple[int, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
            with Image.open(file) as image:
                return image.height, image.width
    except FileNotFoundError:
        raise OcrnetError(f"{path} does not exist") from None
    except _UNDECODABLE as error:
        raise OcrnetError(f"{path} {_DAMAGED_HINT} ({error})") from None


def read_label(path: str | Path) -> np.ndarray:
    """Read a label file and return its ids, uint8 H,W: gray values, or the indices of a palette PNG.

    Raise `OcrnetError`, which names the file, if it is missing, empty, damaged or in color, or if it holds a value
    above 255.
    """
    return decode_label(_read(path), path)


def decode_label(data: bytes, path: str | Path) -> np.ndarray:
    """Return the ids in the bytes of a label file as `read_label` does; error messages name the file as ``path``."""
    _check_complete(path, data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, mode, ids = image.format, image.mode, np.asarray(image)
    except UnidentifiedImageError:
        raise OcrnetError(f"{path} {_DAMAGED_HINT}") from None
    except _UNDECODABLE as error:
        raise OcrnetError(f"{path} {_DAMAGED_HINT} ({error})") from None
    if kind == "JPEG":
        raise OcrnetError(f"{path} is a JPEG, which changes ids; {_LABEL_RULE}: export it again from its source")
    if mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
        raise OcrnetError(f"{path} has mode {mode}; {_LABEL_RULE}, not colors: convert it")
    if ids.max(initial=0) > 255 or ids.min(initial=0) < 0:
        raise OcrnetError(f"{path} holds values from {ids.min()} to {ids.max()}; {_LABEL_RULE}, 0 to 255")
    ids = ids.astype(np.uint8)
    # Pillow scales gray values of 2 and 4 bits to the range 0 to 255; undo this.
    stretch = {2: 85, 4: 17}.get(data[24], 1) if mode == "L" and data.startswith(_PNG) else 1
    return ids // stretch if stretch > 1 else ids


def write_png(path: str | Path, array: np.ndarray) -> None:
    """Write uint8 H,W (gray) or H,W,3 (RGB) as a PNG file atomically, and create missing folders.

    Raise `OcrnetError` if the file cannot be written.
    """
    write_png_rows(path, array.shape[:2], strips(array))  # type: ignore[arg-type]


def write_png_rows(path: str | Path, size: tuple[int, int], rows: Iterable[np.ndarray]) -> None:
    """Write a PNG file as `write_png` does, from strips of rows; only one strip is in memory at a time.

    If ``rows`` raises an exception, it is passed on and no file is written.

    Args:
        path: File to write.
        size: Height and width of the image.
        rows: Strips of rows, uint8 h,W or h,W,3, top first.

    Raises:
        OcrnetError: The file cannot be written.
    """
    with replaced(path) as file:
        _encode(file, size, rows)


def encode_png(array: np.ndarray) -> bytes:
    """Return the PNG file that `write_png` writes, as bytes."""
    file = io.BytesIO()
    _encode(file, array.shape[:2], strips(array))  # type: ignore[arg-type]
    return file.getvalue()


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[BinaryIO]:
    """A context manager that writes a file atomically: it opens a temporary file, which replaces ``path`` at the end.

    After an exception, ``path`` is unchanged. Missing folders are created. Raise `OcrnetError` if the file cannot be
    written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:TEMPORARY_NAME_LENGTH]}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OcrnetError(f"{path} cannot be written: {error.strerror}") from None


def _encode(file: BinaryIO, size: tuple[int, int], rows: Iterable[np.ndarray]) -> None:
    """Write strips of rows to ``file`` as a PNG of ``size`` (height, width)."""
    left = size[0]
    chunks = _Chunks(file)
    for strip in rows:
        assert strip.dtype == np.uint8, f"{strip.dtype}, not uint8"
        assert strip.shape[1:] in ((size[1],), (size[1], 3)), f"rows of {strip.shape}, not h,{size[1]} or h,{size[1]},3"
        if left == size[0]:
            chunks.begin(size, color=strip.ndim == 3)
        chunks.rows(strip)
        left -= len(strip)
    assert left == 0, f"{left} of {size[0]} rows are missing"
    chunks.end()


class _Chunks:
    """Incremental PNG writer: signature and header, then compressed rows.

    With these filters and this compression strategy, photos are written as fast and as small as by libpng, and labels
    smaller.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
        self._above: np.ndarray | None = None

    def begin(self, size: tuple[int, int], *, color: bool) -> None:
        self._file.write(_PNG)
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, 2 if color else 0, 0, 0, 0))

    def rows(self, strip: np.ndarray) -> None:
        color = strip.ndim == 3
        flat = strip.reshape(len(strip), -1)
        packed = np.empty((len(flat), flat.shape[1] + 1), np.uint8)
        packed[:, 0], packed[:, 1:] = (1, flat) if color else (2, flat)
        if color:  # filter Sub: each byte minus that of the pixel to its left
            packed[:, 4:] -= flat[:, :-3]
        else:  # filter Up: each byte minus the one above it
            packed[1:, 1:] -= flat[:-1]
            if self._above is not None:
                packed[0, 1:] -= self._above
            self._above = flat[-1].copy()
        self._pixels(self._packer.compress(packed.data))

    def end(self) -> None:
        self._pixels(self._packer.flush())
        self._chunk(b"IEND", b"")

    def _pixels(self, data: bytes) -> None:
        for begin in range(0, len(data), _CHUNK):
            self._chunk(b"IDAT", data[begin : begin + _CHUNK])

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self._file.write(struct.pack(">I", len(data)) + kind)
        self._file.write(data)
        self._file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))


def _read(path: str | Path) -> bytes:
    """Return a file's bytes; raise `OcrnetError` if it is missing or unreadable."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise OcrnetError(f"{path} does not exist") from None
    except OSError as error:
        raise OcrnetError(f"{path} cannot be read: {error.strerror}") from None
    return data


def _check_complete(path: str | Path, data: bytes) -> None:
    """Raise `OcrnetError` if the bytes of a PNG or JPEG file are truncated, which not all decoders detect."""
    if not data:
        raise OcrnetError(f"{path} is empty; replace or remove it")
    if data.startswith(_PNG):
        _check_png(path, data)
    # An end-of-image marker must follow the last start-of-scan marker. Some cameras append data, which is allowed.
    elif data.startswith(_JPEG) and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise OcrnetError(f"{path} is truncated: the JPEG has no end marker; replace or remove it")


def _webp_orientation(data: bytes) -> int:
    """Return the EXIF orientation in the bytes of a WebP file, or 1 if it has none."""
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            exif = Image.Exif()
            with contextlib.suppress(Exception):  # Pillow raises many error types for damaged EXIF
                exif.load(data[position + 8 : position + 8 + length])
                return exif.get(_EXIF_ORIENTATION, 1)
            return 1
        position += 8 + length + length % 2
    return 1


def _apply_orientation(image: np.ndarray, orientation: int) -> np.ndarray:
    """Return the image mirrored and rotated as an EXIF orientation requires."""
    mirrored, quarters = _ORIENTATIONS.get(orientation, (False, 0))
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if mirrored else image, quarters))


def _check_png(path: str | Path, data: bytes) -> None:
    """Validate the length and CRC of each PNG chunk up to IEND."""
    position, kind = len(_PNG), b""
    while kind != b"IEND":
        if position + 12 > len(data):
            raise OcrnetError(f"{path} is truncated: the PNG has no IEND chunk; replace or remove it")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            raise OcrnetError(f"{path} is truncated in a PNG chunk; replace or remove it")
        if zlib.crc32(memoryview(data)[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise OcrnetError(f"{path} is damaged: a PNG chunk fails its checksum; replace or remove it")
        position = end + 4
