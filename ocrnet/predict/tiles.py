"""Prediction of an image of any size: in one piece if the memory limit allows it, else in overlapping tiles."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ocrnet.architecture import Arch, flops
from ocrnet.config import Eval
from ocrnet.engines.tta import cuts, make_windows
from ocrnet.predict.model import Model

# Minimum side of a tile in pixels: smaller tiles contain too little context.
SMALLEST_TILE = 256


@dataclass(frozen=True)
class Prediction:
    """Prediction for an image: class indices uint8 H,W; on request, confidence uint8 H,W, where 255 means 1."""

    labels: np.ndarray
    confidence: np.ndarray | None
    tiles: int


def predict_tiled(
    model: Model,
    image: np.ndarray,
    eval_cfg: Eval,
    *,
    confidence: bool = False,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Prediction:
    """Predict an image, in tiles if it is too large for the memory limit.

    Adjacent tiles overlap by at least a third. Where they overlap, each pixel is taken from the tile in which it is
    farther from the border.

    Args:
        model: The network.
        image: uint8 H,W,3 RGB.
        eval_cfg: Scales, flip, sliding windows and the memory limit.
        confidence: Also predict confidence.
        step: Called as ``step(done, total)`` after each tile; it may raise.

    Returns:
        The prediction at the size of the image.
    """
    size = image.shape[0], image.shape[1]
    tile = tile_size(model.arch, size, eval_cfg)
    windows = make_windows(size, tile)
    outputs = ("labels", "confidence") if confidence else ("labels",)
    merged = {name: np.empty(size, np.uint8) for name in outputs}
    rows, columns = (cuts((window[axis] for window in windows), tile[axis], size[axis]) for axis in (0, 1))
    for done, (top, left, height, width) in enumerate(windows, 1):
        part = image[top : top + height, left : left + width]
        tile_outputs = model.outputs(part, outputs, eval_cfg.scales, eval_cfg.flip, eval_cfg.slide)
        (first, last), (begin, end) = rows[top], columns[left]
        kept = slice(first - top, last - top), slice(begin - left, end - left)
        for name, array in merged.items():
            values = tile_outputs[name][kept]
            array[first:last, begin:end] = values if name == "labels" else np.rint(values * 255)
        step(done, len(windows))
    return Prediction(merged["labels"], merged.get("confidence"), len(windows))


def tile_size(arch: Arch, size: tuple[int, int], eval_cfg: Eval) -> tuple[int, int]:
    """Return the size of the tiles in which an image is predicted.

    Args:
        arch: The architecture of the network.
        size: Height and width of the image.
        eval_cfg: The memory limit ``max_memory`` in GiB, and the scales.

    Returns:
        Height and width of a tile; ``size`` itself if the whole image fits the memory limit.
    """
    limit = eval_cfg.max_memory * 2**30
    needed = flops.predict_bytes(arch, size, max(eval_cfg.scales))
    if needed <= limit:
        return size
    side = math.isqrt(round(size[0] * size[1] * limit / needed)) // 32 * 32
    side = max(SMALLEST_TILE, side)
    return min(size[0], side), min(size[1], side)
