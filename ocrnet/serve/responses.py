"""What the network saw as the bytes of an answer: PNG, JSON, or the page's own arrays."""

import gzip
import json
import struct
from typing import Any

import cv2
import numpy as np

from ocrnet.data.visualize import overlay
from ocrnet.predict.model import Model
from ocrnet.serve.worker import Prediction


def png(array: np.ndarray) -> bytes:
    """Return uint8 H,W (grey) or H,W,3 (RGB) as PNG."""
    done, data = cv2.imencode(".png", array if array.ndim == 2 else cv2.cvtColor(array, cv2.COLOR_RGB2BGR))
    assert done, f"OpenCV could not encode an array of shape {array.shape}"
    return data.tobytes()


def overlay_png(model: Model, image: np.ndarray, seen: Prediction) -> bytes:
    """Return the class colours over the image as PNG."""
    return png(overlay(image, seen.labels, model.palette))


def summary(model: Model, seen: Prediction, seconds: float) -> dict[str, Any]:
    """Return the area of each class that occurs, largest first, and how the image was looked at."""
    height, width = seen.labels.shape
    pixels = np.bincount(seen.labels.reshape(-1), minlength=len(model.names))
    order = [int(i) for i in np.argsort(-pixels, kind="stable") if pixels[i]]
    classes = [
        {"index": i, "name": model.names[i], "color": colour(model.palette[i]), "pixels": int(pixels[i]),
         "share": round(float(pixels[i]) / (height * width), 6)}
        for i in order
    ]  # fmt: skip
    how = {"tiles": seen.tiles, "batch": seen.batch, "seconds": round(seconds, 4)}
    return {"height": height, "width": width, "classes": classes, **how}


def colour(rgb: tuple[int, ...]) -> str:
    """Return a colour as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def arrays(head: dict[str, Any], seen: Prediction, *, zipped: bool) -> bytes:
    """Return the page's answer: the length of a JSON text (uint32, little-endian), the text, then uint8 arrays.

    The text's ``arrays`` tells names and shapes, in their order. A photograph's labels are far smaller when packed.
    """
    given = {"labels": seen.labels, "confidence": seen.confidence, "relation": seen.relation}
    held = {name: array for name, array in given.items() if array is not None}
    text = json.dumps(head | {"arrays": [{"name": n, "shape": list(a.shape)} for n, a in held.items()]}).encode()
    data = b"".join([struct.pack("<I", len(text)), text, *(array.tobytes() for array in held.values())])
    return gzip.compress(data, compresslevel=1, mtime=0) if zipped else data


def painted(model: Model, seen: Prediction) -> np.ndarray:
    """Return the class colours alone, uint8 H,W,3."""
    return np.array(model.palette, np.uint8)[seen.labels]
