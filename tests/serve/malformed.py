"""Malformed uploads: {name: (path, body, headers, method)}, each with one defect."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from serving import form

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, *, depth: int = 8, color: int = 0) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def uploads(max_bytes: int) -> dict[str, tuple[str, object, dict[str, str], str]]:
    """Return the malformed uploads for a server that accepts images of up to ``max_bytes``."""
    good = {kind: encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP")}
    flipped = bytearray(good["PNG"])
    flipped[60] ^= 1
    bmp = bytearray(good["BMP"])
    bmp[18:26] = struct.pack("<ii", 30_000, 30_000)
    bodies: dict[str, bytes] = {
        "empty": b"",
        "text": b"This is text, not an image.\n",
        "html": b"<!doctype html><title>x</title>",
        "json": b'{"image": 1}',
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "zeros": bytes(1000),
        "noise": np.random.default_rng(1).bytes(5000),
        "gif": encoded("GIF"),
        "tiff": encoded("TIFF"),
        "pdf": b"%PDF-1.7\n1 0 obj\n",
        "zip": b"PK\x03\x04" + bytes(100),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "elf": b"\x7fELF" + bytes(100),
        "mp4": bytes(4) + b"ftypisom" + bytes(100),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "one byte": b"\x89",
        "png signature only": b"\x89PNG\r\n\x1a\n",
        "png of width 0": png(0, 5, bytes(5)),
        "png of height 0": png(5, 0, b""),
        "png of depth 3": png(5, 5, bytes(30), depth=3),
        "png of color 9": png(5, 5, bytes(30), color=9),
        "png with too few rows": png(50, 50, bytes(60)),
        "png whose rows are not zlib": good["PNG"][:41] + chunk(b"IDAT", b"no") + chunk(b"IEND", b""),
        "png with a wrong checksum": bytes(flipped),
        "png with an unknown filter": png(5, 5, b"\x09" + bytes(29)),
        "png bomb": png(20_000, 20_000, bytes(20_001 * 2_000)),
        "png of 2 billion pixels a side": png(2**31 - 1, 2**31 - 1, b""),
        "png just above the limit": png(4001, 4000, b""),
        "jpeg without data": b"\xff\xd8\xff\xd9",
        "jpeg without an end": b"\xff\xd8\xff\xe0" + bytes(50),
        "jpeg of 60,000 pixels a side": good["JPEG"].replace(b"\0\x28\0\x3c", struct.pack(">HH", 60_000, 60_000)),
        "webp without data": b"RIFF\x20\x00\x00\x00WEBPVP8 " + bytes(8),
        "webp of an unknown chunk": b"RIFF\x20\x00\x00\x00WEBPABCD" + bytes(24),
        "bmp of 900 megapixels": bytes(bmp),
        "bmp header only": good["BMP"][:30],
        "too many bytes": bytes(max_bytes + 100_000),
        "just too many bytes": good["PNG"] + bytes(max_bytes + 1 - len(good["PNG"])),
    }  # fmt: skip
    for kind, data in good.items():
        for part in (10, 30, 60, 90):
            bodies[f"{kind} cut at {part} %"] = data[: len(data) * part // 100]
    image = good["PNG"]
    body, head = form("image", image)
    table = {name: ("/predict", body, {}, "POST") for name, body in bodies.items()}
    table |= {
        "form without a boundary": ("/predict", body, {"Content-Type": "multipart/form-data"}, "POST"),
        "form with another boundary": ("/predict", body, {"Content-Type": "multipart/form-data; boundary=x"}, "POST"),
        "form with a long boundary": ("/predict", body, {"Content-Type": "multipart/x;boundary=" + 80 * "b"}, "POST"),
        "form without an end": ("/predict", body[:-12], head, "POST"),
        "form without part headers": ("/predict", b"--limit\r\n" + image + b"\r\n--limit--\r\n", head, "POST"),
        "form with text only": ("/predict", form("note", b"hello", None)[0], head, "POST"),
        "form with an empty file": ("/predict", form("image", b"")[0], head, "POST"),
        "form with a text file as image": ("/predict", form("image", b"hello", "a.txt")[0], head, "POST"),
        "form of a thousand parts": ("/predict", 1000 * b"--limit\r\n\r\n\r\n" + body, head, "POST"),
        "form that is empty": ("/predict", b"", head, "POST"),
        "compressed body": ("/predict", image, {"Content-Encoding": "gzip"}, "POST"),
        "chunked and too long": ("/predict", (bytes(100_000) for _ in range(max_bytes // 100_000 + 3)), {}, "POST"),
        "unknown output": ("/predict?output=../../etc/passwd", image, {}, "POST"),
        "multi_scale of 7": ("/predict?multi_scale=7", image, {}, "POST"),
        "unknown parameter": ("/predict?multiscale=true", image, {}, "POST"),
        "parameter of another path": ("/explain?output=json", image, {}, "POST"),
        "flip without a value": ("/explain?flip=", image, {}, "POST"),
        "text to explain": ("/explain", b"hello", {}, "POST"),
        "request of another site": ("/predict", image, {"Sec-Fetch-Site": "cross-site"}, "POST"),
        "GET of predict": ("/predict", None, {}, "GET"),
        "PUT": ("/predict", image, {}, "PUT"),
        "unknown path": ("/predikt", image, {}, "POST"),
        "path with ..": ("/../../../etc/passwd", None, {}, "GET"),
        "page with ..": ("/page.css/../app.py", None, {}, "GET"),
    }  # fmt: skip
    return table
