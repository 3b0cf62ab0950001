"""Reading and writing of image files; a damaged file raises an error that names it and never yields a partial image."""

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
# EXIF orientation -> mirrored left to right, number of quarter turns counterclockwise after that.
_TURNS = {
    1: (False, 0),
    2: (True, 0),
    3: (False, 2),
    4: (True, 2),
    5: (True, 1),
    6: (False, 3),
    7: (True, 3),
    8: (False, 1),
}
# Characters of the file name used in the draft name, which has more parts: a file name is limited to 255 bytes.
DRAFT_NAME = 40
_CHUNK = 2**20  # bytes of a PNG chunk: libpng warns above 8 million
# Pixels per strip in operations for which a second full array would take too much memory.
STRIP_PIXELS = 2**22
_LABELS = "a label is a one-channel PNG with 8 bits per pixel, whose values are class ids"
_DAMAGED = "is damaged or not an image; replace or remove it"

_RGB = getattr(cv2, "IMREAD_COLOR_RGB", None)  # since OpenCV 4.11; otherwise BGR is converted after decoding
_COLORS = cv2.IMREAD_COLOR if _RGB is None else _RGB
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(path: str | Path, *, upright: bool = False) -> np.ndarray:
    """Read an image file as uint8 H,W,3 RGB, whatever its channels and depth.

    ``upright`` applies the EXIF orientation; datasets do not use it, because labels have no orientation. Raise
    `OcrnetError` that names the file if it is missing, empty, truncated or undecodable.
    """
    return decode_image(_read(path), path, upright=upright)


def decode_image(data: bytes, name: str | Path, *, upright: bool = False) -> np.ndarray:
    """Decode the bytes of an image file like `read_image`.

    Args:
        data: Bytes of the file.
        name: Name of the file in error messages.
        upright: Apply the EXIF orientation.

    Returns:
        The image, uint8 H,W,3 RGB.

    Raises:
        OcrnetError: The bytes are empty, truncated or undecodable.
    """
    _check_whole(name, data)
    webp = data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    # OpenCV applies the orientation of JPEG and PNG, but some versions ignore that of WebP.
    flags = _COLORS if upright and not webp else _COLORS | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise OcrnetError(f"{name} {_DAMAGED} ({error.err})") from None
    if image is None:
        raise OcrnetError(f"{name} {_DAMAGED}")
    if _COLORS != _RGB:
        for strip in strips(image):
            cv2.cvtColor(strip, cv2.COLOR_BGR2RGB, strip)  # in place: a second whole image would double the memory
    return _turned(image, _webp_orientation(data)) if upright and webp else image


def strips(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield an array H,W,... from top to bottom as views of a few megapixels each."""
    rows = max(1, STRIP_PIXELS // array.shape[1])
    yield from (array[top : top + rows] for top in range(0, len(array), rows))


def image_size(path: str | Path) -> tuple[int, int]:
    """Return height and width from the header of an image file; raise `OcrnetError` that names the file."""
    return _size(path, path)


def size_in(data: bytes, name: str | Path) -> tuple[int, int]:
    """Return the same as `image_size` from a file's bytes; errors name the file as ``name``."""
    return _size(io.BytesIO(data), name)


def _size(file: Any, path: str | Path) -> tuple[int, int]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
            with Image.open(file) as image:
                return image.height, image.width
    except FileNotFoundError:
        raise OcrnetError(f"{path} does not exist") from None
    except _UNDECODABLE as why:
        raise OcrnetError(f"{path} {_DAMAGED} ({why})") from None


def read_label(path: str | Path) -> np.ndarray:
    """Read a label file as uint8 H,W of the ids stored in it: gray values, or the indices of a palette PNG.

    Raise `OcrnetError` that names the file if it is missing, empty, damaged or in color, or if it holds a value above
    255.
    """
    return decode_label(_read(path), path)


def decode_label(data: bytes, path: str | Path) -> np.ndarray:
    """Return the ids in a label file's bytes, like `read_label`; errors name the file as ``path``."""
    _check_whole(path, data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, mode, ids = image.format, image.mode, np.asarray(image)
    except UnidentifiedImageError:
        raise OcrnetError(f"{path} {_DAMAGED}") from None
    except _UNDECODABLE as why:
        raise OcrnetError(f"{path} {_DAMAGED} ({why})") from None
    if kind == "JPEG":
        raise OcrnetError(f"{path} is a JPEG, which changes ids; {_LABELS}: export it again from its source")
    if mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
        raise OcrnetError(f"{path} has mode {mode}; {_LABELS}, not colors: convert it")
    if ids.max(initial=0) > 255 or ids.min(initial=0) < 0:
        raise OcrnetError(f"{path} holds values from {ids.min()} to {ids.max()}; {_LABELS}, 0 to 255")
    ids = ids.astype(np.uint8)
    # Pillow scales 2-bit and 4-bit gray to 0 to 255.
    stretch = {2: 85, 4: 17}.get(data[24], 1) if mode == "L" and data.startswith(_PNG) else 1
    return ids // stretch if stretch > 1 else ids


def write_png(path: str | Path, array: np.ndarray) -> None:
    """Write uint8 H,W (gray) or H,W,3 (RGB) as PNG; readers of ``path`` see the old file or the complete new one.

    Create missing folders. Raise `OcrnetError` if the file cannot be written.
    """
    write_png_rows(path, array.shape[:2], strips(array))  # type: ignore[arg-type]


def write_png_rows(path: str | Path, size: tuple[int, int], rows: Iterable[np.ndarray]) -> None:
    """Write a PNG like `write_png`, from rows that arrive in strips; only one strip is in memory at a time.

    An exception from ``rows`` is passed on, and no file is left behind.

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
    """Return the bytes that `write_png` would write."""
    file = io.BytesIO()
    _encode(file, array.shape[:2], strips(array))  # type: ignore[arg-type]
    return file.getvalue()


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[BinaryIO]:
    """Open a draft next to ``path`` that replaces it when ``with`` ends; an exception leaves ``path`` unchanged.

    Create missing folders. Raise `OcrnetError` if the file cannot be written.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name[:DRAFT_NAME]}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                yield file
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OcrnetError(f"{path} cannot be written: {error.strerror}") from None


def _encode(file: BinaryIO, size: tuple[int, int], rows: Iterable[np.ndarray]) -> None:
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
    """Incremental PNG writer: signature, header, then compressed rows.

    The filters and the compression strategy are as fast and as compact as libpng's for photos, and more compact for
    labels.
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


def _check_whole(path: str | Path, data: bytes) -> None:
    """Raise `OcrnetError` unless a file's bytes end where its format requires; not all decoders check this."""
    if not data:
        raise OcrnetError(f"{path} is empty; replace or remove it")
    if data.startswith(_PNG):
        _check_png(path, data)
    # An end-of-image marker must follow the last scan; data that cameras append after it is allowed.
    elif data.startswith(_JPEG) and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise OcrnetError(f"{path} is truncated: the JPEG has no end marker; replace or remove it")


def _webp_orientation(data: bytes) -> int:
    """Return the EXIF orientation in the bytes of a WebP file, or 1 if it has none."""
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            exif = Image.Exif()
            with contextlib.suppress(Exception):  # damaged EXIF: no rotation; Pillow raises many error types
                exif.load(data[position + 8 : position + 8 + length])
                return exif.get(_EXIF_ORIENTATION, 1)
            return 1
        position += 8 + length + length % 2
    return 1


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    mirrored, quarters = _TURNS.get(orientation, (False, 0))
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
