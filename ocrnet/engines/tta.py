"""Test-time augmentation: scales, flip and sliding windows, as a list of passes over one image."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, TypeVar

from ocrnet.config import Eval

Array = TypeVar("Array", bound=Any)  # of NumPy or PyTorch
Window = tuple[EllipsisType, slice, slice]


@dataclass(frozen=True)
class Pass:
    """One pass over an image, which is resized to ``size``, flipped if ``flip``, and predicted window by window.

    A window is (top, left, height, width) in pixels of the resized image. All windows of a pass have the same height
    and width, and together they cover the resized image. A pass over the whole image has one window.
    """

    size: tuple[int, int]
    flip: bool
    windows: tuple[tuple[int, int, int, int], ...]

    def average_windows(self, total: Array, count: Array, predict: Callable[[Window], Array]) -> Array:
        """Return predictions of overlapping windows as one array, averaged where windows overlap.

        Args:
            total: Zeros ...,H,W with H,W of ``size``, to which the predictions are added in place.
            count: Zeros H,W.
            predict: Returns the prediction ...,height,width of a window, given its index into arrays ...,H,W.

        Returns:
            ``total / count``.
        """
        for top, left, height, width in self.windows:
            window = (..., slice(top, top + height), slice(left, left + width))
            total[window] += predict(window)
            count[window] += 1
        return total / count


def make_passes(eval_cfg: Eval, size: tuple[int, int], base_size: tuple[int, int] | None = None) -> list[Pass]:
    """Return the passes for one image: one per scale, or two (without and with flip) if ``eval_cfg.flip`` is set.

    Args:
        eval_cfg: The scales, flip and sliding window.
        size: Height and width of the image.
        base_size: Height and width that the scales multiply; None: ``size``.

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
    """Return windows (top, left, height, width) that cover an image of ``size`` (height, width).

    Each has the size ``window``, or less if the image is smaller. Neighbors overlap by at least a third.
    """
    height, width = (min(length, limit) for length, limit in zip(size, window, strict=True))
    tops, lefts = _starts(size[0], height), _starts(size[1], width)
    return tuple((top, left, height, width) for top in tops for left in lefts)


def _starts(length: int, window: int) -> list[int]:
    stride = max(1, window * 2 // 3)
    return [*range(0, length - window, stride), length - window]


def cuts(starts: Iterable[int], length: int, end: int) -> dict[int, tuple[int, int]]:
    """Assign each position of an axis to one of the overlapping windows; the borders are the middles of the overlaps.

    Args:
        starts: Start of each window; duplicates are ignored.
        length: Length of every window.
        end: Length of the axis.

    Returns:
        For the start of each window, the range (first, last) that is assigned to it; ``last`` is exclusive.
    """
    order = sorted(set(starts))
    borders = [0, *((start + previous + length) // 2 for previous, start in itertools.pairwise(order)), end]
    return {start: (borders[i], borders[i + 1]) for i, start in enumerate(order)}
