"""Encoding of predictions as response bodies: PNG, JSON, or the binary format of the page."""

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
    encoded, data = cv2.imencode(".png", array if array.ndim == 2 else cv2.cvtColor(array, cv2.COLOR_RGB2BGR))
    assert encoded, f"OpenCV could not encode an array of shape {array.shape}"
    return data.tobytes()


def overlay_png(model: Model, image: np.ndarray, prediction: Prediction) -> bytes:
    """Return the class colors over the image as PNG.

    Args:
        model: The model, for its palette.
        image: The image, uint8 H,W,3 RGB.
        prediction: The prediction of the image.

    Returns:
        The bytes of the PNG.
    """
    return png(overlay(image, prediction.labels, model.palette))


def summary(model: Model, prediction: Prediction, seconds: float) -> dict[str, Any]:
    """Return the JSON response: the area of each predicted class, and data about the processing.

    Args:
        model: The model, for its class names and palette.
        prediction: The prediction.
        seconds: The processing time in seconds.

    Returns:
        Height, width, classes (index, name, color, pixels and share of the image; largest first), tiles, batch and
        seconds.
    """
    height, width = prediction.labels.shape
    pixels = np.bincount(prediction.labels.reshape(-1), minlength=len(model.names))
    order = [int(i) for i in np.argsort(-pixels, kind="stable") if pixels[i]]
    classes = [
        {"index": i, "name": model.names[i], "color": color(model.palette[i]), "pixels": int(pixels[i]),
         "share": round(float(pixels[i]) / (height * width), 6)}
        for i in order
    ]  # fmt: skip
    processing = {"tiles": prediction.tiles, "batch": prediction.batch, "seconds": round(seconds, 4)}
    return {"height": height, "width": width, "classes": classes, **processing}


def color(rgb: tuple[int, ...]) -> str:
    """Return a color in CSS notation, for example #ff0000."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def arrays(fields: dict[str, Any], prediction: Prediction, *, compress: bool) -> bytes:
    """Return a prediction in the page's binary format.

    The format is the length of a JSON text (uint32, little-endian), the text, then the uint8 arrays. The text's
    ``arrays`` lists their names and shapes in order. Compression makes the labels of a photo much smaller.

    Args:
        fields: The other entries of the JSON text.
        prediction: The prediction.
        compress: Whether to compress the result with gzip.

    Returns:
        The bytes of the response body.
    """
    optional = {"labels": prediction.labels, "confidence": prediction.confidence, "relation": prediction.relation}
    present = {name: array for name, array in optional.items() if array is not None}
    text = json.dumps(fields | {"arrays": [{"name": n, "shape": list(a.shape)} for n, a in present.items()]}).encode()
    data = b"".join([struct.pack("<I", len(text)), text, *(array.tobytes() for array in present.values())])
    return gzip.compress(data, compresslevel=1, mtime=0) if compress else data


def color_image(model: Model, prediction: Prediction) -> np.ndarray:
    """Return the class colors of a prediction, uint8 H,W,3, without the image."""
    return np.array(model.palette, np.uint8)[prediction.labels]
