"""Looking at an image of any size: whole where memory allows it, else in overlapping tiles."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ocrnet.architecture import Arch, flops
from ocrnet.config import Eval
from ocrnet.engines.tta import cuts, make_windows
from ocrnet.predict.model import Model

# The shortest side of a tile: below it a tile shows the network too little of the scene.
SMALLEST_TILE = 256


@dataclass(frozen=True)
class Prediction:
    """What the network answers for an image: class indices uint8 H,W; on request confidence uint8 H,W, 255 for sure."""

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
    """Look at an image uint8 H,W,3 RGB; ``step(done, total)`` is called after each tile, and may raise.

    Neighbouring tiles overlap by at least a third; a pixel is taken from the tile in which it lies further inside.
    """
    size = image.shape[0], image.shape[1]
    tile = tile_size(model.arch, size, eval_cfg)
    windows = make_windows(size, tile)
    outputs = ("labels", "confidence") if confidence else ("labels",)
    whole = {name: np.empty(size, np.uint8) for name in outputs}
    rows, columns = (cuts((window[axis] for window in windows), tile[axis], size[axis]) for axis in (0, 1))
    for done, (top, left, height, width) in enumerate(windows, 1):
        part = image[top : top + height, left : left + width]
        seen = model.outputs(part, outputs, eval_cfg.scales, eval_cfg.flip, eval_cfg.slide)
        (first, last), (begin, end) = rows[top], columns[left]
        inside = slice(first - top, last - top), slice(begin - left, end - left)
        for name, array in whole.items():
            values = seen[name][inside]
            array[first:last, begin:end] = values if name == "labels" else np.rint(values * 255)
        step(done, len(windows))
    return Prediction(whole["labels"], whole.get("confidence"), len(windows))


def tile_size(arch: Arch, size: tuple[int, int], eval_cfg: Eval) -> tuple[int, int]:
    """Return the whole ``size`` (height, width) where it fits into ``eval_cfg.max_memory``, else that of a tile."""
    limit = eval_cfg.max_memory * 2**30
    need = flops.predict_bytes(arch, size, max(eval_cfg.scales))
    if need <= limit:
        return size
    side = math.isqrt(round(size[0] * size[1] * limit / need)) // 32 * 32
    side = max(SMALLEST_TILE, side)
    return min(size[0], side), min(size[1], side)
