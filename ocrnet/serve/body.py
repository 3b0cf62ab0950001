"""From a request's body to an image: limits on bytes while it is read, on pixels before anything is decoded."""

import asyncio
import io
import struct
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from ocrnet.errors import OcrnetError
from ocrnet.images import decode_image
from ocrnet.serve.refused import Refused, busy

# A body must begin within these seconds, and then come at no less than this rate: else it would hold memory for ever.
FIRST_SECONDS = 10.0
BYTES_PER_SECOND = 16_384
# What the bodies that are being read at a time may hold together, in largest bodies.
BODIES = 8
# What a form may need around its file.
FORM_BYTES = 65_536
FIELDS = 16
KINDS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "BMP": "BMP"}
NAMES = ", ".join(KINDS.values())


class Reader:
    """Reads bodies of at most ``max_bytes``; those that are being read share a bounded memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._held = 0

    async def read(self, headers: Mapping[str, str], chunks: AsyncIterator[bytes]) -> bytes:
        """Return a body, or the file in it where it is a form; raise `Refused` where it is too long or too slow."""
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused(415, "a compressed body is not taken; send the image's bytes as they are")
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self.max_bytes + FORM_BYTES:
            raise self._too_long()
        body = bytearray()
        begun = time.monotonic()
        try:
            while True:
                left = begun + FIRST_SECONDS + len(body) / BYTES_PER_SECOND - time.monotonic()
                try:
                    chunk = await asyncio.wait_for(anext(chunks), max(left, 0.001))
                except StopAsyncIteration:
                    break
                except (TimeoutError, asyncio.TimeoutError):
                    raise Refused(408, "the body came too slowly", {"Connection": "close"}) from None
                body += chunk
                self._held += len(chunk)
                if len(body) > self.max_bytes + FORM_BYTES:
                    raise self._too_long()
                if self._held > BODIES * (self.max_bytes + FORM_BYTES):
                    raise busy("too many bodies are being read; try again")
        finally:
            self._held -= len(body)
        data = bytes(body)
        kind = headers.get("content-type", "")
        if kind.lower().startswith("multipart/"):
            data = file_in_form(data, kind)
        if len(data) > self.max_bytes:
            raise self._too_long()
        if not data:
            raise Refused(400, "the request holds no image; send one as the body, or as the field 'image' of a form")
        return data

    def _too_long(self) -> Refused:
        return Refused(413, f"the image has more than {self.max_bytes / 1e6:g} MB, which is the most that is taken")


def file_in_form(body: bytes, content_type: str) -> bytes:
    """Return the field `image` of a multipart/form-data body, or its only file; raise `Refused` where there is none."""
    parameters = dict(_parameters(content_type))
    boundary = parameters.get("boundary", "").encode()
    if not 0 < len(boundary) <= 70:
        raise Refused(400, "the form has no boundary; let your HTTP client make the Content-Type header")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, FIELDS + 1)
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise Refused(400, "the form is cut short or damaged")
    files = {}
    for piece in pieces[1:-1]:
        head, gap, content = piece.partition(b"\r\n\r\n")
        if not gap:
            raise Refused(400, "the form is cut short or damaged")
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
    """What an image file says of itself before anything is decoded; ``size`` (height, width) as stored."""

    kind: str
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        """How many pixels decoding makes."""
        return self.size[0] * self.size[1]


def look_at(data: bytes, max_pixels: int) -> Head:
    """Read an image file's header; raise `Refused` for what is no image of ours, or has too many pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=tuple(KINDS)) as image:
            head = Head(image.format or "", (image.height, image.width))
    except Image.DecompressionBombError:
        raise _too_large(max_pixels) from None
    except UnidentifiedImageError:
        raise Refused(415, f"this is no image that can be read here: {NAMES}") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, OverflowError):
        raise Refused(400, "the image is damaged") from None
    if head.pixels > max_pixels:
        raise _too_large(max_pixels)
    if head.pixels == 0:
        raise Refused(400, "the image is damaged")
    return head


def _too_large(max_pixels: int) -> Refused:
    return Refused(413, f"the image has more than {max_pixels / 1e6:g} megapixels, which is the most that is taken")


def decode(data: bytes, head: Head) -> np.ndarray:
    """Return the image uint8 H,W,3 RGB, upright; raise `Refused` where it is damaged or not what its header said."""
    try:
        image = decode_image(data, "the image", upright=True)
    except OcrnetError:
        raise Refused(400, f"the image is damaged: its {KINDS[head.kind]} data cannot be decoded") from None
    if sorted(image.shape[:2]) != sorted(head.size):
        raise Refused(400, "the image is damaged: its data and its header are of different sizes")
    return image
