"""What `--save` asks for: the pictures made of an image and its answer, and the area of each class as JSON."""

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

# What each kind of picture holds; "json" is the one that is none.
PICTURES = {
    "overlay": "the classes' colours over the image",
    "indices": "the class of each pixel",
    "labelIds": "the Cityscapes id of each pixel",
    "color": "the classes' colours",
    "side": "image and overlay side by side",
    "confidence": "the probability of each pixel's class, 255 for 1",
}
KINDS = (*PICTURES, "json")
DEFAULT, DEFAULT_OF_VIDEO = ("overlay", "indices", "color", "json"), ("overlay", "json")
# Numbers that a video's compression would change.
EXACT = ("indices", "labelIds")

AREAS = "areas.json"


def parse_save(text: str | None) -> tuple[str, ...] | None:
    """Return the kinds that ``--save`` names, separated by commas; None without it."""
    if text is None:
        return None
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for kind in kinds:
        if kind not in KINDS:
            raise OcrnetError(f"--save is '{text}', but '{kind}' is none of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    if not kinds:
        raise OcrnetError(f"--save is '{text}'; name some of {', '.join(KINDS)}, separated by commas")
    return kinds


class Painter:
    """Turns an image and its answer into the pictures of each kind, for the classes of one network."""

    def __init__(self, model: Model, kinds: Sequence[str] | None) -> None:
        self.palette = np.array(model.palette, np.uint8)
        table = cityscapes.classes()
        if kinds is not None and "labelIds" in kinds and tuple(model.names) != table.names:
            raise OcrnetError(
                "--save labelIds: the classes of this network are not the 19 of Cityscapes, and have no labelIds; "
                "save indices"
            )
        self._ids = table.to_ids

    def paint(self, kind: str, image: np.ndarray, labels: np.ndarray, confidence: np.ndarray | None) -> np.ndarray:
        """Return rows of a picture, uint8 h,W or h,W,3 (side: h,2W,3), from the same rows of what it is made of."""
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
        assert confidence is not None, "look() was not asked for confidence"
        return confidence

    def write(self, path: Path, kind: str, image: np.ndarray, seen: Prediction) -> None:
        """Write one picture as PNG, a few rows at a time: beside the image and the answer it takes little memory."""
        height, width = seen.labels.shape
        write_png_rows(path, (height, 2 * width if kind == "side" else width), self._rows(kind, image, seen))

    def _rows(self, kind: str, image: np.ndarray, seen: Prediction) -> Iterator[np.ndarray]:
        confidences = strips(seen.labels if seen.confidence is None else seen.confidence)
        for rows, labels, confidence in zip(strips(image), strips(seen.labels), confidences, strict=True):
            yield self.paint(kind, rows, labels, None if seen.confidence is None else confidence)


@dataclass
class Areas:
    """The pixels of each class, for each image and video and in all; ``total`` is int64 num_classes.

    ``keys`` are ``names`` made unique: "x (0)" and "x (1)", by their indices, where two are called x.
    """

    names: Sequence[str]
    keys: Sequence[str] = field(init=False)
    total: np.ndarray = field(init=False)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.total = np.zeros(len(self.names), np.int64)
        often, numbered = Counter(self.names), [f"{name} ({i})" for i, name in enumerate(self.names)]
        keys = [both if often[name] > 1 else name for name, both in zip(self.names, numbered, strict=True)]
        self.keys = keys if len(set(keys)) == len(keys) else numbered

    def add(self, source: Source, size: tuple[int, int], pixels: np.ndarray, **more: Any) -> None:
        """Note an image of ``size`` (height, width), or a video with the sum over its frames."""
        self.total += pixels
        facts = {"name": source.name, "source": source.shown, "height": size[0], "width": size[1]}
        self.rows.append(facts | more | self.of(pixels))

    def of(self, pixels: np.ndarray) -> dict[str, Any]:
        """Return pixels and share of each class that occurs, the largest first."""
        every = max(1, int(pixels.sum()))
        occurring = [int(i) for i in np.argsort(-pixels, kind="stable") if pixels[i]]
        return {
            "pixels": {self.keys[i]: int(pixels[i]) for i in occurring},
            "share": {self.keys[i]: round(int(pixels[i]) / every, 6) for i in occurring},
        }

    def write(self, path: Path, *, whole: bool) -> None:
        """Write everything as JSON; ``whole`` is False where the run was stopped before its end."""
        tree = {"classes": list(self.names), "whole": whole, "images": self.rows, "all": self.of(self.total)}
        with replaced(path) as file:
            file.write(as_json(tree, indent=1))


def as_json(tree: dict[str, Any], *, indent: int | None = None) -> bytes:
    """Return JSON as UTF-8; bytes of a name that are no UTF-8 become escapes, which Python reads back as they were."""
    return json.dumps(tree, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def count(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the pixels of each class in uint8 H,W, int64 num_classes; a few rows at a time, as they become int64."""
    total = np.zeros(num_classes, np.int64)
    for rows in strips(labels):
        total += np.bincount(rows.reshape(-1), minlength=num_classes)
    return total
