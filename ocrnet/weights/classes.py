"""The class names and colors that a file of weights holds."""

import itertools

from ocrnet.data.datasets import cityscapes
from ocrnet.data.datasets.base import colors
from ocrnet.weights.load import Weights


def classes_of(found: Weights) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Return the class names and colors in the file; if it has none, 19 classes are taken to be Cityscapes'."""
    count = found.arch.num_classes
    if "classes" in found.meta:
        known = found.meta["classes"]
        return tuple(known["names"]), tuple(tuple(color) for color in known["palette"])
    table = cityscapes.classes()
    if count == len(table):
        return table.names, table.palette
    return tuple(f"class {i}" for i in range(count)), tuple(itertools.islice(colors(), count))
