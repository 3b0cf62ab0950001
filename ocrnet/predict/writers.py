"""The outputs that `--save` selects: images rendered from a prediction, and the area of each class as JSON."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ocrnet.data.datasets import cityscapes
from ocrnet.data.image_io import replaced, strips, write_png_rows
from ocrnet.data.visualize import overlay
from ocrnet.predict.model import Model
from ocrnet.predict.sources import Source
from ocrnet.predict.tiles import Prediction
from ocrnet.utils.errors import OcrnetError, nearest

# The kinds of output image, with a description of each; the kind "json" is not an image.
IMAGE_KINDS = {
    "overlay": "the colors of the classes over the image",
    "indices": "the class index of each pixel",
    "labelIds": "the Cityscapes id of each pixel",
    "color": "the colors of the classes",
    "side": "image and overlay side by side",
    "confidence": "the probability of the predicted class, 255 for 1",
}
KINDS = (*IMAGE_KINDS, "json")
DEFAULT, DEFAULT_OF_VIDEO = ("overlay", "indices", "color", "json"), ("overlay", "json")
# Kinds that must keep exact values; for a video they are written as PNG files, because compression changes values.
EXACT = ("indices", "labelIds")

AREAS = "areas.json"


def parse_save(text: str | None) -> tuple[str, ...] | None:
    """Return the kinds in the value of --save; None if it is None. Raise `OcrnetError` for an unknown kind."""
    if text is None:
        return None
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for kind in kinds:
        if kind not in KINDS:
            raise OcrnetError(
                f"--save is '{text}', but '{kind}' is not one of {', '.join(KINDS)}{nearest(kind, KINDS)}"
            )
    if not kinds:
        raise OcrnetError(f"--save is '{text}'; list one or more of {', '.join(KINDS)}, separated by commas")
    return kinds


class Painter:
    """Renders an image and its prediction as output images, for the classes of one network."""

    def __init__(self, model: Model, kinds: Sequence[str] | None) -> None:
        self.palette = np.array(model.palette, np.uint8)
        table = cityscapes.classes()
        if kinds is not None and "labelIds" in kinds and tuple(model.names) != table.names:
            raise OcrnetError(
                "--save labelIds: the classes of this network are not the 19 of Cityscapes, so they have no labelIds; "
                "use --save indices"
            )
        self._ids = table.to_ids

    def paint(self, kind: str, image: np.ndarray, labels: np.ndarray, confidence: np.ndarray | None) -> np.ndarray:
        """Return rows of an output image, rendered from the same rows of the image and of its prediction.

        Args:
            kind: The kind of output image, a key of `IMAGE_KINDS`.
            image: uint8 h,W,3 RGB.
            labels: Class indices uint8 h,W.
            confidence: uint8 h,W; required only for the kind "confidence".

        Returns:
            uint8 h,W or h,W,3; for the kind "side", h,2W,3.
        """
        if kind == "overlay":
            return overlay(image, labels, self.palette)
        if kind == "indices":
            return labels
        if kind == "labelIds":
            return self._ids(labels)
        if kind == "color":
            return self.palette[labels]
        if kind == "side":
            return np.concatenate([image, overlay(image, labels, self.palette)], axis=1)
        assert kind == "confidence", kind
        assert confidence is not None, "predict_tiled() did not compute confidence"
        return confidence

    def write(self, path: Path, kind: str, image: np.ndarray, prediction: Prediction) -> None:
        """Write an output image as PNG, a few rows at a time to save memory.

        Args:
            path: The file to write.
            kind: The kind of output image, a key of `IMAGE_KINDS`.
            image: uint8 H,W,3 RGB.
            prediction: The prediction for the image.
        """
        height, width = prediction.labels.shape
        write_png_rows(path, (height, 2 * width if kind == "side" else width), self._rows(kind, image, prediction))

    def _rows(self, kind: str, image: np.ndarray, prediction: Prediction) -> Iterator[np.ndarray]:
        confidences = strips(prediction.labels if prediction.confidence is None else prediction.confidence)
        for rows, labels, confidence in zip(strips(image), strips(prediction.labels), confidences, strict=True):
            yield self.paint(kind, rows, labels, None if prediction.confidence is None else confidence)


@dataclass
class Areas:
    """The number of pixels of each class, for each image and video (``rows``) and in ``total`` (int64 num_classes).

    ``keys`` are the class names made unique: two classes 0 and 1 named x become "x (0)" and "x (1)".
    """

    names: Sequence[str]
    keys: Sequence[str] = field(init=False)
    total: np.ndarray = field(init=False)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.total = np.zeros(len(self.names), np.int64)
        counts, numbered_names = Counter(self.names), [f"{name} ({i})" for i, name in enumerate(self.names)]
        keys = [
            numbered if counts[name] > 1 else name for name, numbered in zip(self.names, numbered_names, strict=True)
        ]
        self.keys = keys if len(set(keys)) == len(keys) else numbered_names

    def add(self, source: Source, size: tuple[int, int], pixels: np.ndarray, **extra: Any) -> None:
        """Add the areas of an image or a video.

        Args:
            source: The image or video.
            size: Its height and width.
            pixels: Number of pixels of each class, int64 num_classes; for a video, the sum over its frames.
            **extra: Additional entries of its row.
        """
        self.total += pixels
        source_fields = {"name": source.name, "source": source.shown, "height": size[0], "width": size[1]}
        self.rows.append(source_fields | extra | self.of(pixels))

    def of(self, pixels: np.ndarray) -> dict[str, Any]:
        """Return pixels and share of each class that has pixels, largest first."""
        num_pixels = max(1, int(pixels.sum()))
        present = [int(i) for i in np.argsort(-pixels, kind="stable") if pixels[i]]
        return {
            "pixels": {self.keys[i]: int(pixels[i]) for i in present},
            "share": {self.keys[i]: round(int(pixels[i]) / num_pixels, 6) for i in present},
        }

    def write(self, path: Path, *, complete: bool) -> None:
        """Write all rows and the total as JSON; ``complete`` is False if the prediction stopped early."""
        tree = {"classes": list(self.names), "whole": complete, "images": self.rows, "all": self.of(self.total)}
        with replaced(path) as file:
            file.write(as_json(tree, indent=1))


def as_json(tree: dict[str, Any], *, indent: int | None = None) -> bytes:
    """Return JSON as UTF-8; bytes of a file name that are not UTF-8 become escapes, which Python's json restores."""
    return json.dumps(tree, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def count(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the number of pixels of each class in ``labels`` uint8 H,W, as int64 num_classes.

    A few rows are counted at a time, because `np.bincount` converts its input to int64.
    """
    total = np.zeros(num_classes, np.int64)
    for rows in strips(labels):
        total += np.bincount(rows.reshape(-1), minlength=num_classes)
    return total
