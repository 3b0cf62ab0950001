"""Reading an image from a request body: bytes are limited during reading, pixels before decoding."""

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
from ocrnet.serve.errors import Refused, busy
from ocrnet.utils.errors import OcrnetError

# A body must start within FIRST_SECONDS and then arrive at BYTES_PER_SECOND or faster: otherwise it would hold memory
# forever. A client that sent faster before may pause, but for no more than FIRST_SECONDS.
FIRST_SECONDS = 10.0
BYTES_PER_SECOND = 16_384
# Limit of the memory that all bodies being read or decoded hold together, as a multiple of the largest body.
BODIES = 8
# If that memory is full, a body that is behind the rate by more than this is dropped in favor of another.
BEHIND_SECONDS = 1.0
# Maximum size of a form in addition to its file.
FORM_BYTES = 65_536
FIELDS = 16
KINDS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "BMP": "BMP"}
NAMES = ", ".join(KINDS.values())
_PNG = b"\x89PNG\r\n\x1a\n"
# OpenCV decodes no wider or higher image, even if it has few pixels.
LONGEST_SIDE = 1_000_000


@dataclass(eq=False)
class _Coming:
    """A body being read.

    ``until`` is the monotonic time in seconds at which it times out, and ``held`` its bytes in memory. ``ousted`` is
    done when the body is dropped to free memory.
    """

    until: float
    held: int = 0
    ousted: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Reader:
    """A reader of bodies of at most ``max_bytes``; the bodies being read or decoded share a limited memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._coming: set[_Coming] = set()
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, headers: Mapping[str, str], chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield a body, or the file in it if it is a form; its memory is counted until ``async with`` ends.

        Raise `Refused` if it is compressed, too long, too slow or empty, or if too many bodies are being read.
        """
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused(415, "compressed bodies are not supported; send the image without Content-Encoding")
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self.max_bytes + FORM_BYTES:
            raise self._too_long()
        coming = _Coming(time.monotonic() + FIRST_SECONDS)
        self._coming.add(coming)
        try:
            body = await self._whole(coming, chunks)
            self._coming.remove(coming)  # a complete body is not dropped in favor of another
            yield self._image(body, headers.get("content-type", ""))
        finally:
            self._coming.discard(coming)
            self._held -= coming.held

    async def _whole(self, coming: _Coming, chunks: AsyncIterator[bytes]) -> bytes:
        body = bytearray()
        while (chunk := await _next(coming, chunks)) is not None:
            body += chunk
            coming.held += len(chunk)
            self._held += len(chunk)
            now = time.monotonic()
            # mutation: bound-silence-within-body
            coming.until = min(coming.until + len(chunk) / BYTES_PER_SECOND, now + FIRST_SECONDS)
            if len(body) > self.max_bytes + FORM_BYTES:
                raise self._too_long()
            # mutation: bound-bodies-in-memory
            while self._held > BODIES * (self.max_bytes + FORM_BYTES):
                self._make_room(now, coming)
        return bytes(body)

    def _make_room(self, now: float, asking: _Coming) -> None:
        """Drop the body furthest behind the rate; raise `Refused` if that is ``asking`` or if none is behind."""
        behind = [other for other in self._coming if other.until < now + FIRST_SECONDS - BEHIND_SECONDS and other.held]
        last = min(behind, key=lambda other: other.until, default=asking)
        # mutation: drop-silent-bodies-first
        if last is asking:
            raise busy("too many bodies are being read; try again")
        self._held -= last.held
        last.held = 0
        last.ousted.set_result(None)
        self._coming.remove(last)

    def _image(self, data: bytes, kind: str) -> bytes:
        if kind.lower().startswith("multipart/"):
            data = file_in_form(data, kind)
        if len(data) > self.max_bytes:
            raise self._too_long()
        if not data:
            raise Refused(400, "the request has no image; send one as the body, or as the field 'image' of a form")
        return data

    def _too_long(self) -> Refused:
        return Refused(413, f"the image exceeds the limit of {self.max_bytes / 1e6:g} MB")


async def _next(coming: _Coming, chunks: AsyncIterator[bytes]) -> bytes | None:
    """Return the next bytes of a body, or None at its end; raise `Refused` if it times out or was dropped."""
    chunk = asyncio.ensure_future(_or_none(chunks))
    try:
        left = max(coming.until - time.monotonic(), 0.001)
        either: set[asyncio.Future[Any]] = {chunk, coming.ousted}
        # mutation: time-out-slow-body
        await asyncio.wait(either, timeout=left, return_when="FIRST_COMPLETED")
        if chunk.done() and not coming.ousted.done():
            return chunk.result()
        raise Refused(408, "the body arrived too slowly", {"Connection": "close"})
    finally:
        chunk.cancel()


async def _or_none(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)


def file_in_form(body: bytes, content_type: str) -> bytes:
    """Return the field `image` of a multipart/form-data body, or its only file; raise `Refused` if there is none."""
    parameters = dict(_parameters(content_type))
    boundary = parameters.get("boundary", "").encode()
    if not 0 < len(boundary) <= 70:
        raise Refused(400, "the form has no boundary; let the HTTP client set the Content-Type header")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, FIELDS + 1)
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise Refused(400, "the form is truncated or damaged")
    files = {}
    for piece in pieces[1:-1]:
        head, gap, content = piece.partition(b"\r\n\r\n")
        if not gap:
            raise Refused(400, "the form is truncated or damaged")
        for line in head.decode("utf-8", "replace").split("\r\n"):
            name, _, value = line.partition(":")
            if name.strip().lower() == "content-disposition":
                said = dict(_parameters(value))
                if "filename" in said or said.get("name") == "image":
                    files[said.get("name", "")] = content
    if "image" in files:
        return files["image"]
    if len(files) != 1:
        raise Refused(400, "the form has no field 'image'")
    return next(iter(files.values()))


def _parameters(value: str) -> list[tuple[str, str]]:
    pairs = (part.partition("=") for part in value.split(";")[1:])
    return [(name.strip().lower(), text.strip().strip('"')) for name, _, text in pairs]


@dataclass(frozen=True)
class Head:
    """The format and size of an image file, read from its header; ``size`` is (height, width) as stored."""

    kind: str
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        """The number of pixels of the decoded image."""
        return self.size[0] * self.size[1]


def look_at(data: bytes, max_pixels: int) -> Head:
    """Read an image file's header; raise `Refused` if the format is not supported or the image is too large."""
    head = _png_head(data) if data.startswith(_PNG) else _other_head(data, max_pixels)
    # mutation: check-pixels-before-decoding
    if head.pixels > max_pixels:
        raise _too_large(max_pixels)
    if head.pixels == 0:
        raise Refused(400, "the image is damaged")
    if max(head.size) > LONGEST_SIDE:
        raise Refused(413, f"the image exceeds the limit of {LONGEST_SIDE:,} pixels in width or height")
    return head


def _png_head(data: bytes) -> Head:
    """Return the header of a PNG's first chunk; Pillow would also unpack profiles and texts, and reject long ones."""
    if data[12:16] != b"IHDR" or len(data) < 24:
        raise Refused(400, "the image is damaged")
    width, height = struct.unpack_from(">II", data, 16)
    return Head("PNG", (height, width))


def _other_head(data: bytes, max_pixels: int) -> Head:
    try:
        with Image.open(io.BytesIO(data), formats=tuple(KINDS)) as image:
            # The only other format is MPO: several JPEGs in one file, of which the first is read.
            return Head(image.format if image.format in KINDS else "JPEG", (image.height, image.width))
    except Image.DecompressionBombError:
        raise _too_large(max_pixels) from None
    except UnidentifiedImageError:
        raise Refused(415, f"unsupported image format; supported: {NAMES}") from None
    except Exception:  # Pillow raises many kinds of errors for damaged files
        raise Refused(400, "the image is damaged") from None


def _too_large(max_pixels: int) -> Refused:
    return Refused(413, f"the image exceeds the limit of {max_pixels / 1e6:g} megapixels")


def decode(data: bytes, head: Head) -> np.ndarray:
    """Return the image uint8 H,W,3 RGB, upright; raise `Refused` if it is damaged or its size differs from ``head``."""
    try:
        image = decode_image(data, "the image", upright=True)
    except OcrnetError:
        raise Refused(400, f"the image is damaged: its {KINDS[head.kind]} data cannot be decoded") from None
    if sorted(image.shape[:2]) != sorted(head.size):
        raise Refused(400, "the image is damaged: the sizes in its data and its header differ")
    return image
