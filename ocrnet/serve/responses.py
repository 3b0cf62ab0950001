"""Encoding of predictions as response bodies: PNG, JSON, or the page's binary arrays."""

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
    """Return uint8 H,W (gray) or H,W,3 (RGB) as PNG."""
    done, data = cv2.imencode(".png", array if array.ndim == 2 else cv2.cvtColor(array, cv2.COLOR_RGB2BGR))
    assert done, f"OpenCV could not encode an array of shape {array.shape}"
    return data.tobytes()


def overlay_png(model: Model, image: np.ndarray, seen: Prediction) -> bytes:
    """Return the class colors over the image as PNG.

    Args:
        model: The model, for its palette.
        image: The image, uint8 H,W,3 RGB.
        seen: The prediction of the image.

    Returns:
        The bytes of the PNG.
    """
    return png(overlay(image, seen.labels, model.palette))


def summary(model: Model, seen: Prediction, seconds: float) -> dict[str, Any]:
    """Return the area of each predicted class, largest first, and how the image was processed.

    Args:
        model: The model, for its class names and palette.
        seen: The prediction.
        seconds: The processing time.

    Returns:
        Height, width, classes (index, name, color, pixels and share of the image), tiles, batch and seconds.
    """
    height, width = seen.labels.shape
    pixels = np.bincount(seen.labels.reshape(-1), minlength=len(model.names))
    order = [int(i) for i in np.argsort(-pixels, kind="stable") if pixels[i]]
    classes = [
        {"index": i, "name": model.names[i], "color": color(model.palette[i]), "pixels": int(pixels[i]),
         "share": round(float(pixels[i]) / (height * width), 6)}
        for i in order
    ]  # fmt: skip
    how = {"tiles": seen.tiles, "batch": seen.batch, "seconds": round(seconds, 4)}
    return {"height": height, "width": width, "classes": classes, **how}


def color(rgb: tuple[int, ...]) -> str:
    """Return a color in CSS notation, for example #ff0000."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def arrays(head: dict[str, Any], seen: Prediction, *, zipped: bool) -> bytes:
    """Return a prediction in the page's binary format.

    The format is the length of a JSON text (uint32, little-endian), the text, then the uint8 arrays. The text's
    ``arrays`` lists their names and shapes in order. The labels of a photograph are far smaller when compressed.

    Args:
        head: The other entries of the JSON text.
        seen: The prediction.
        zipped: Whether to compress the result with gzip.

    Returns:
        The bytes of the response body.
    """
    given = {"labels": seen.labels, "confidence": seen.confidence, "relation": seen.relation}
    held = {name: array for name, array in given.items() if array is not None}
    text = json.dumps(head | {"arrays": [{"name": n, "shape": list(a.shape)} for n, a in held.items()]}).encode()
    data = b"".join([struct.pack("<I", len(text)), text, *(array.tobytes() for array in held.values())])
    return gzip.compress(data, compresslevel=1, mtime=0) if zipped else data


def painted(model: Model, seen: Prediction) -> np.ndarray:
    """Return the class colors of a prediction, uint8 H,W,3, without the image."""
    return np.array(model.palette, np.uint8)[seen.labels]
