"""The class names and colors of a weights file."""

import itertools

from ocrnet.data.datasets import cityscapes
from ocrnet.data.datasets.base import colors
from ocrnet.weights.load import Weights


def classes_of(weights: Weights) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Return class names and RGB colors from the metadata of loaded weights.

    Without metadata, a network with 19 classes gets those of Cityscapes. Others get the names ``class 0``, ``class 1``
    and so on, and default colors.
    """
    count = weights.arch.num_classes
    if "classes" in weights.meta:
        classes = weights.meta["classes"]
        return tuple(classes["names"]), tuple(tuple(color) for color in classes["palette"])
    table = cityscapes.classes()
    if count == len(table):
        return table.names, table.palette
    return tuple(f"class {i}" for i in range(count)), tuple(itertools.islice(colors(), count))
