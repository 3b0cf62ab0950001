"""Multi-scale, flip and sliding windows as a list of passes over one image."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from ocrnet.config import Eval


@dataclass(frozen=True)
class Pass:
    """One look at an image: resized to ``size``, mirrored or not, through ``windows`` of the resized image.

    A window is (top, left, height, width) in pixels of the resized image; all windows of a pass have the same height
    and width and together cover it. Whole-image passes have one window.
    """

    size: tuple[int, int]
    flip: bool
    windows: tuple[tuple[int, int, int, int], ...]


def make_passes(eval_cfg: Eval, size: tuple[int, int], base_size: tuple[int, int] | None = None) -> list[Pass]:
    """Return the passes for an image of ``size`` (height, width): every scale, and its mirror image where asked."""
    base = base_size or size
    passes = []
    for scale in eval_cfg.scales:
        height, width = (max(1, round(length * scale)) for length in base)
        windows = make_windows((height, width), eval_cfg.slide) if eval_cfg.slide else ((0, 0, height, width),)
        passes += [Pass((height, width), flip, windows) for flip in ((False, True) if eval_cfg.flip else (False,))]
    return passes


def make_windows(size: tuple[int, int], window: tuple[int, int]) -> tuple[tuple[int, int, int, int], ...]:
    """Cover ``size`` with windows that overlap by at least a third; a window never reaches outside."""
    height, width = (min(length, limit) for length, limit in zip(size, window, strict=True))
    tops, lefts = _starts(size[0], height), _starts(size[1], width)
    return tuple((top, left, height, width) for top in tops for left in lefts)


def _starts(length: int, window: int) -> list[int]:
    stride = max(1, window * 2 // 3)
    return [*range(0, length - window, stride), length - window]


def cuts(starts: Iterable[int], length: int, end: int) -> dict[int, tuple[int, int]]:
    """Return, by its start, the part of an axis that each window decides: up to the middle of the overlaps."""
    order = sorted(set(starts))
    borders = [0, *((start + before + length) // 2 for before, start in itertools.pairwise(order)), end]
    return {start: (borders[i], borders[i + 1]) for i, start in enumerate(order)}
