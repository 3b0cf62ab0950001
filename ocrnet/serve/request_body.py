"""Reading of an image from a request body; the bytes are limited during reading, the pixels before decoding."""

import asyncio
import contextlib
import io
import struct
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ocrnet.data.image_io import decode_image
from ocrnet.serve.errors import HttpError, busy
from ocrnet.utils.errors import OcrnetError

# A body must start within FIRST_SECONDS and then arrive at BYTES_PER_SECOND or faster, so that slow clients do not hold
# memory forever. A client that has sent faster may pause, but for at most FIRST_SECONDS.
FIRST_SECONDS = 10.0
BYTES_PER_SECOND = 16_384
# Limit of the total memory of the bodies being read or decoded, as a multiple of the largest body.
BODIES = 8
# If that memory is full, a body that is behind the required rate by more than this may be dropped.
BEHIND_SECONDS = 1.0
# Maximum size of a form without its file, in bytes, and its maximum number of fields.
FORM_BYTES = 65_536
FIELDS = 16
KINDS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "BMP": "BMP"}
NAMES = ", ".join(KINDS.values())
_PNG = b"\x89PNG\r\n\x1a\n"
# OpenCV does not decode an image whose width or height exceeds this.
LONGEST_SIDE = 1_000_000


@dataclass(eq=False)
class _Upload:
    """A body being read.

    ``deadline`` is the `time.monotonic` time at which it times out. ``held`` is the number of its bytes in memory.
    ``dropped`` is done when the body is dropped to free memory.
    """

    deadline: float
    held: int = 0
    dropped: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Reader:
    """Reads bodies with an image of at most ``max_bytes``; all bodies being read or decoded share a limited memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._uploads: set[_Upload] = set()
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, headers: Mapping[str, str], chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield a body, or the file in it if it is a form; its memory is counted until the ``async with`` block ends.

        Raise `HttpError` if it is compressed, too long, too slow or empty, or if too many bodies are being read.
        """
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise HttpError(415, "compressed bodies are not supported; send the image without Content-Encoding")
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self.max_bytes + FORM_BYTES:
            raise self._too_long()
        upload = _Upload(time.monotonic() + FIRST_SECONDS)
        self._uploads.add(upload)
        try:
            body = await self._read_all(upload, chunks)
            self._uploads.remove(upload)  # a complete body is never dropped
            yield self._extract_image(body, headers.get("content-type", ""))
        finally:
            self._uploads.discard(upload)
            self._held -= upload.held

    async def _read_all(self, upload: _Upload, chunks: AsyncIterator[bytes]) -> bytes:
        body = bytearray()
        while (chunk := await _next(upload, chunks)) is not None:
            body += chunk
            upload.held += len(chunk)
            self._held += len(chunk)
            now = time.monotonic()
            # mutation: bound-silence-within-body
            upload.deadline = min(upload.deadline + len(chunk) / BYTES_PER_SECOND, now + FIRST_SECONDS)
            if len(body) > self.max_bytes + FORM_BYTES:
                raise self._too_long()
            # mutation: bound-bodies-in-memory
            while self._held > BODIES * (self.max_bytes + FORM_BYTES):
                self._free_memory(now, upload)
        return bytes(body)

    def _free_memory(self, now: float, current: _Upload) -> None:
        """Drop the body furthest behind the required rate; raise `HttpError` if it is ``current`` or none is behind."""
        slow = [
            other for other in self._uploads if other.deadline < now + FIRST_SECONDS - BEHIND_SECONDS and other.held
        ]
        slowest = min(slow, key=lambda other: other.deadline, default=current)
        # mutation: drop-silent-bodies-first
        if slowest is current:
            raise busy("the server is receiving too many request bodies; try again later")
        self._held -= slowest.held
        slowest.held = 0
        slowest.dropped.set_result(None)
        self._uploads.remove(slowest)

    def _extract_image(self, data: bytes, kind: str) -> bytes:
        if kind.lower().startswith("multipart/"):
            data = file_in_form(data, kind)
        if len(data) > self.max_bytes:
            raise self._too_long()
        if not data:
            raise HttpError(400, "the request has no image; send one as the body, or as the field 'image' of a form")
        return data

    def _too_long(self) -> HttpError:
        return HttpError(413, f"the image exceeds the limit of {self.max_bytes / 1e6:g} MB")


async def _next(upload: _Upload, chunks: AsyncIterator[bytes]) -> bytes | None:
    """Return the next chunk of a body, or None at its end; raise `HttpError` if it times out or was dropped."""
    chunk = asyncio.ensure_future(_next_chunk(chunks))
    try:
        remaining = max(upload.deadline - time.monotonic(), 0.001)
        events: set[asyncio.Future[Any]] = {chunk, upload.dropped}
        # mutation: time-out-slow-body
        await asyncio.wait(events, timeout=remaining, return_when="FIRST_COMPLETED")
        if chunk.done() and not upload.dropped.done():
            return chunk.result()
        raise HttpError(408, "the body arrived too slowly", {"Connection": "close"})
    finally:
        chunk.cancel()


async def _next_chunk(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)


def file_in_form(body: bytes, content_type: str) -> bytes:
    """Return the field `image` of a multipart/form-data body, or its only file; raise `HttpError` if there is none."""
    parameters = dict(_parameters(content_type))
    boundary = parameters.get("boundary", "").encode()
    if not 0 < len(boundary) <= 70:
        raise HttpError(400, "the form has no boundary; let the HTTP client set the Content-Type header")
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary, FIELDS + 1)
    if len(parts) < 3 or not parts[-1].startswith(b"--"):
        raise HttpError(400, "the form is truncated or damaged")
    files = {}
    for part in parts[1:-1]:
        part_headers, separator, content = part.partition(b"\r\n\r\n")
        if not separator:
            raise HttpError(400, "the form is truncated or damaged")
        for line in part_headers.decode("utf-8", "replace").split("\r\n"):
            name, _, value = line.partition(":")
            if name.strip().lower() == "content-disposition":
                disposition = dict(_parameters(value))
                if "filename" in disposition or disposition.get("name") == "image":
                    files[disposition.get("name", "")] = content
    if "image" in files:
        return files["image"]
    if len(files) != 1:
        raise HttpError(400, "the form has no field 'image'")
    return next(iter(files.values()))


def _parameters(value: str) -> list[tuple[str, str]]:
    pairs = (part.partition("=") for part in value.split(";")[1:])
    return [(name.strip().lower(), text.strip().strip('"')) for name, _, text in pairs]


@dataclass(frozen=True)
class Header:
    """The format and size of an image file, from its header; ``size`` is (height, width) before any EXIF rotation."""

    kind: str
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        """The number of pixels of the decoded image."""
        return self.size[0] * self.size[1]


def read_header(data: bytes, max_pixels: int) -> Header:
    """Return the header of an image file; raise `HttpError` if its format is unsupported or the image is too large."""
    header = _png_header(data) if data.startswith(_PNG) else _other_header(data, max_pixels)
    # mutation: check-pixels-before-decoding
    if header.pixels > max_pixels:
        raise _too_large(max_pixels)
    if header.pixels == 0:
        raise HttpError(400, "the image is damaged")
    if max(header.size) > LONGEST_SIDE:
        raise HttpError(413, f"the image exceeds the limit of {LONGEST_SIDE:,} pixels in width or height")
    return header


def _png_header(data: bytes) -> Header:
    """Return the header of a PNG from its first chunk; Pillow would also unpack and limit profiles and texts."""
    if data[12:16] != b"IHDR" or len(data) < 24:
        raise HttpError(400, "the image is damaged")
    width, height = struct.unpack_from(">II", data, 16)
    return Header("PNG", (height, width))


def _other_header(data: bytes, max_pixels: int) -> Header:
    try:
        with Image.open(io.BytesIO(data), formats=tuple(KINDS)) as image:
            # Any other format is MPO: several JPEGs in one file, of which the first is decoded.
            return Header(image.format if image.format in KINDS else "JPEG", (image.height, image.width))
    except Image.DecompressionBombError:
        raise _too_large(max_pixels) from None
    except UnidentifiedImageError:
        raise HttpError(415, f"unsupported image format; supported: {NAMES}") from None
    except Exception:  # Pillow raises many kinds of errors for damaged files
        raise HttpError(400, "the image is damaged") from None


def _too_large(max_pixels: int) -> HttpError:
    return HttpError(413, f"the image exceeds the limit of {max_pixels / 1e6:g} megapixels")


def decode(data: bytes, header: Header) -> np.ndarray:
    """Return the image uint8 H,W,3 RGB, upright; raise `HttpError` if it is damaged or its size is not the header's."""
    try:
        image = decode_image(data, "the image", upright=True)
    except OcrnetError:
        raise HttpError(400, f"the image is damaged: its {KINDS[header.kind]} data cannot be decoded") from None
    if sorted(image.shape[:2]) != sorted(header.size):
        raise HttpError(400, "the image is damaged: the sizes in its data and its header differ")
    return image
