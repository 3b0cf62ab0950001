"""Visualizations: class colors blended into an image; and image, ground truth and prediction side by side."""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from ocrnet.data.datasets.base import IGNORE

Palette = Sequence[Sequence[int]] | np.ndarray  # num_classes, 3: RGB, 0 to 255

_BACKGROUND = (32, 32, 32)
_INK = (235, 235, 235)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def overlay(image: np.ndarray, indices: np.ndarray, palette: Palette, *, alpha: float = 0.5) -> np.ndarray:
    """Blend class colors into an image.

    Args:
        image: RGB image, uint8 H,W,3.
        indices: Class indices, uint8 H,W; pixels with index 255 are unchanged.
        palette: RGB color of each class.
        alpha: Opacity of the class colors, 0 to 1.

    Returns:
        The blended image, uint8 H,W,3 RGB.

    Raises:
        ValueError: Shapes or dtypes do not match, or a class index has no color.
    """
    assert 0 <= alpha <= 1, f"alpha is {alpha}, not 0 to 1"
    if image.shape != (*indices.shape, 3) or image.dtype != np.uint8 or indices.dtype != np.uint8:
        raise ValueError(
            f"image {image.dtype} {image.shape} and indices {indices.dtype} {indices.shape}: "
            "expected uint8 H,W,3 and uint8 H,W"
        )
    colors = np.asarray(palette, dtype=np.uint8)
    known = indices != IGNORE
    highest = int(indices[known].max(initial=0))
    if highest >= len(colors):
        raise ValueError(f"class index {highest} has no color: the palette has {len(colors)} colors")
    by_index = np.zeros((256, 3), np.uint8)
    by_index[: len(colors)] = colors
    blended = cv2.addWeighted(image, 1 - alpha, by_index[indices], alpha, 0)
    return np.where(known[..., None], blended, image)


def thumbnail(array: np.ndarray, side: int) -> np.ndarray:
    """Reduce a uint8 H,W,3 image or a uint8 H,W index map so that its longer side has at most ``side`` pixels.

    A smaller array is returned unchanged.
    """
    height, width = array.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return array
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(array, size, interpolation=cv2.INTER_AREA if array.ndim == 3 else cv2.INTER_NEAREST_EXACT)


def side_by_side(
    image: np.ndarray,
    prediction: np.ndarray,
    ground_truth: np.ndarray | None,
    *,
    palette: Palette,
    names: Sequence[str],
) -> np.ndarray:
    """Draw the image, the ground truth and the prediction side by side, with a legend below.

    OpenCV's fonts support only ASCII; other characters appear as question marks.

    Args:
        image: RGB image, uint8 H,W,3.
        prediction: Class indices, uint8 H,W.
        ground_truth: Class indices, uint8 H,W; None: no ground truth panel.
        palette: RGB color of each class.
        names: Name of each class.

    Returns:
        The image, uint8 RGB. The legend lists the classes that occur in the ground truth or the prediction.
    """
    panels = [("image", image)]
    if ground_truth is not None:
        panels.append(("ground truth", overlay(image, ground_truth, palette)))
    panels.append(("prediction", overlay(image, prediction, palette)))
    size = max(image.shape[0] / 720, 0.4)  # font scale, so that text is readable at full size
    gap = np.full((image.shape[0], max(round(8 * size), 2), 3), _BACKGROUND, np.uint8)
    row: list[np.ndarray] = []
    for title, panel in panels:
        row += [_caption(panel, title, size), gap]
    top = np.concatenate(row[:-1], axis=1)
    occurring = np.union1d(prediction, prediction if ground_truth is None else ground_truth)
    classes = [int(index) for index in occurring if index != IGNORE]
    strip = _legend(
        [(names[index], tuple(int(part) for part in palette[index])) for index in classes], top.shape[1], size
    )
    return np.concatenate([top, strip])


def legend(names: Sequence[str], palette: Palette) -> np.ndarray:
    """Return a uint8 H,640,3 RGB image with the name and color of every class."""
    entries = [(name, tuple(int(part) for part in color)) for name, color in zip(names, palette, strict=True)]
    return _legend(entries, 640, 0.6)


def _caption(image: np.ndarray, title: str, size: float) -> np.ndarray:
    """Return a copy with the title on a dark box at the top left, or the image itself if it is too small."""
    (width, height), baseline = cv2.getTextSize(title, _FONT, size, _thickness(size))
    pad = round(10 * size)
    if width + 2 * pad > image.shape[1] or 4 * (height + baseline + pad) > image.shape[0]:
        return image
    image = np.ascontiguousarray(image.copy())
    cv2.rectangle(image, (0, 0), (width + 2 * pad, height + baseline + pad), _BACKGROUND, cv2.FILLED)
    cv2.putText(image, title, (pad, height + pad), _FONT, size, _INK, _thickness(size), cv2.LINE_AA)
    return image


def _legend(entries: Iterable[tuple[str, tuple[int, ...]]], width: int, size: float) -> np.ndarray:
    """Return a uint8 image of width ``width`` with the color and the name of each entry, in one or more rows."""
    line, pad = round(44 * size), round(16 * size)
    swatch = round(26 * size)
    x, y, placed = pad, pad, []
    for name, color in entries:
        step = swatch + pad // 2 + cv2.getTextSize(name, _FONT, size, _thickness(size))[0][0] + 2 * pad
        if x > pad and x + step > width:
            x, y = pad, y + line
        placed.append((x, y, name, color))
        x += step
    strip = np.full((y + line + pad // 2, width, 3), _BACKGROUND, np.uint8)
    for x, y, name, color in placed:
        cv2.rectangle(strip, (x, y), (x + swatch, y + swatch), color, cv2.FILLED)
        cv2.rectangle(strip, (x, y), (x + swatch, y + swatch), _INK, 1)
        cv2.putText(
            strip,
            name,
            (x + swatch + pad // 2, y + swatch - round(3 * size)),
            _FONT,
            size,
            _INK,
            _thickness(size),
            cv2.LINE_AA,
        )
    return strip


def _thickness(size: float) -> int:
    return max(round(1.4 * size), 1)
