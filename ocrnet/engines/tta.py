"""Multi-scale, flip and sliding-window inference as a list of passes over one image."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from ocrnet.config import Eval


@dataclass(frozen=True)
class Pass:
    """One pass over an image: resized to ``size``, optionally flipped, in ``windows`` of the resized image.

    A window is (top, left, height, width) in pixels of the resized image. All windows of a pass have the same height
    and width and together cover the resized image. Whole-image passes have one window.
    """

    size: tuple[int, int]
    flip: bool
    windows: tuple[tuple[int, int, int, int], ...]


def make_passes(eval_cfg: Eval, size: tuple[int, int], base_size: tuple[int, int] | None = None) -> list[Pass]:
    """Return the passes for one image: every scale, with and without flip if ``eval_cfg.flip`` is set.

    Args:
        eval_cfg: The scales, flip and sliding window.
        size: Height and width of the image.
        base_size: Height and width to which the scales apply; None for ``size``.

    Returns:
        The passes, in the order of the scales.
    """
    base = base_size or size
    passes = []
    for scale in eval_cfg.scales:
        height, width = (max(1, round(length * scale)) for length in base)
        windows = make_windows((height, width), eval_cfg.slide) if eval_cfg.slide else ((0, 0, height, width),)
        passes += [Pass((height, width), flip, windows) for flip in ((False, True) if eval_cfg.flip else (False,))]
    return passes


def make_windows(size: tuple[int, int], window: tuple[int, int]) -> tuple[tuple[int, int, int, int], ...]:
    """Cover ``size`` with windows that overlap by at least a third; no window extends beyond ``size``."""
    height, width = (min(length, limit) for length, limit in zip(size, window, strict=True))
    tops, lefts = _starts(size[0], height), _starts(size[1], width)
    return tuple((top, left, height, width) for top in tops for left in lefts)


def _starts(length: int, window: int) -> list[int]:
    stride = max(1, window * 2 // 3)
    return [*range(0, length - window, stride), length - window]


def cuts(starts: Iterable[int], length: int, end: int) -> dict[int, tuple[int, int]]:
    """Split an axis between overlapping windows at the middle of each overlap.

    Args:
        starts: Start of each window; duplicates are ignored.
        length: Length of every window.
        end: Length of the axis.

    Returns:
        For each start, the (first, last) range of the axis that its window provides; ``last`` is exclusive.
    """
    order = sorted(set(starts))
    borders = [0, *((start + previous + length) // 2 for previous, start in itertools.pairwise(order)), end]
    return {start: (borders[i], borders[i + 1]) for i, start in enumerate(order)}
