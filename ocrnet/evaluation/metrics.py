"""Confusion matrix and the scores computed from it; counts are int64, so the sum of partial matrices is exact."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ocrnet.data.datasets.base import IGNORE
from ocrnet.utils.errors import OcrnetError


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one confusion matrix, as fractions from 0 to 1; a score is nan if no pixel contributes to it.

    ``mean_iou`` includes the classes that occur in the ground truth or the prediction. ``mean_accuracy`` includes the
    classes that occur in the ground truth.
    """

    names: tuple[str, ...]
    iou: np.ndarray  # float64 num_classes
    accuracy: np.ndarray  # float64 num_classes: recall
    share: np.ndarray  # float64 num_classes: fraction of the labeled pixels that belong to the class
    mean_iou: float
    mean_accuracy: float
    pixel_accuracy: float
    frequency_weighted_iou: float
    category_iou: dict[str, float]
    mean_category_iou: float
    pixels: int


def confusion(prediction: np.ndarray, ground_truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the pixels of each pair of ground truth class and predicted class.

    Args:
        prediction: Class indices, uint8.
        ground_truth: Class indices, uint8, of the same shape; pixels of 255 are ignored.
        num_classes: The number of classes, 1 to 255.

    Returns:
        int64 num_classes,num_classes: one row per ground truth class, one column per predicted class.

    Raises:
        ValueError: The shapes differ, a dtype is not uint8, or the prediction has a class index out of range.
        OcrnetError: The ground truth has a class index out of range.
    """
    assert 1 <= num_classes <= IGNORE, f"num_classes is {num_classes}, not 1 to 255"
    if prediction.dtype != np.uint8 or ground_truth.dtype != np.uint8:
        raise ValueError(
            f"class indices must be uint8, got {prediction.dtype} (prediction) and {ground_truth.dtype} (ground truth)"
        )
    if prediction.shape != ground_truth.shape:
        raise ValueError(f"the prediction has shape {prediction.shape}, the ground truth {ground_truth.shape}")
    pairs = np.left_shift(ground_truth, 8, dtype=np.uint16)
    pairs |= prediction
    # Count all 256 x 256 pairs and validate them afterwards: this is faster than masking and validating each pixel.
    counts = np.bincount(pairs.reshape(-1), minlength=1 << 16).reshape(256, 256).astype(np.int64, copy=False)
    invalid = np.flatnonzero(counts[num_classes:IGNORE].any(axis=1)) + num_classes
    if invalid.size:
        raise OcrnetError(
            f"the ground truth has class index {_first_few(invalid)}; "
            f"allowed are 0 to {num_classes - 1} and {IGNORE} (ignored)"
        )
    invalid = np.flatnonzero(counts[:num_classes, num_classes:].any(axis=0)) + num_classes
    if invalid.size:
        raise ValueError(f"the prediction has class index {_first_few(invalid)}; allowed are 0 to {num_classes - 1}")
    return counts[:num_classes, :num_classes].copy()


def scores(confusion: np.ndarray, names: Sequence[str], categories: Sequence[str] = ()) -> Scores:
    """Compute the scores of a confusion matrix.

    The formulas are those of the Cityscapes evaluation (evalPixelLevelSemanticLabeling) and, for the frequency-weighted
    IoU and the accuracies, of Long et al., "Fully Convolutional Networks for Semantic Segmentation" (CVPR 2015).

    Args:
        confusion: int64 num_classes,num_classes, as the function `confusion` returns it.
        names: The name of each class.
        categories: The category of each class; empty for a dataset without categories.

    Returns:
        The scores.
    """
    num_classes = len(names)
    assert confusion.shape == (num_classes, num_classes), f"{confusion.shape} for {num_classes} names"
    assert len(categories) in (0, num_classes), f"{len(categories)} categories for {num_classes} classes"
    class_pixels, correct, pixels = confusion.sum(axis=1), np.diagonal(confusion), int(confusion.sum())
    iou, share = _iou(confusion), _ratio(class_pixels, pixels)
    accuracy = _ratio(correct, class_pixels)
    present = class_pixels > 0
    category_iou = _category_iou(confusion, categories)
    return Scores(
        names=tuple(names),
        iou=iou,
        accuracy=accuracy,
        share=share,
        mean_iou=_mean(iou),
        mean_accuracy=_mean(accuracy),
        pixel_accuracy=float(_ratio(correct.sum(), pixels)),
        frequency_weighted_iou=float((share[present] * iou[present]).sum()) if pixels else float("nan"),
        category_iou=category_iou,
        mean_category_iou=_mean(np.array(list(category_iou.values()))),
        pixels=pixels,
    )


def constant_prediction(scores: Scores) -> tuple[int, float]:
    """Return the most frequent ground truth class, and the mIoU of a baseline that predicts this class everywhere."""
    best = int(scores.share.argmax())
    return best, float(scores.share[best]) / max(np.count_nonzero(scores.share), 1)


def table(scores: Scores) -> str:
    """Format the scores in percent as a plain-text table: classes, categories if there are any, and means."""
    means = {
        "mIoU": scores.mean_iou,
        "mean accuracy": scores.mean_accuracy,
        "pixel accuracy": scores.pixel_accuracy,
        "frequency-weighted IoU": scores.frequency_weighted_iou,
    }
    if scores.category_iou:
        means["category mIoU"] = scores.mean_category_iou
    width = max(map(len, (*scores.names, *scores.category_iou, *means)))
    lines = [f"{'class':<{width}}   IoU %  accuracy %  pixels %"]
    rule = "-" * len(lines[0])
    lines.append(rule)
    for name, iou, accuracy, share in zip(scores.names, scores.iou, scores.accuracy, scores.share, strict=True):
        lines.append(f"{name:<{width}}  {_percent(iou)}  {_percent(accuracy, 10)}  {_percent(share, 8)}")
    for title, rows in (("category", scores.category_iou), ("", means)):
        lines += [rule, *([f"{title:<{width}}   IoU %", rule] if title and rows else [])] if rows else []
        lines += [f"{name:<{width}}  {_percent(value)}" for name, value in rows.items()]
    lines += [rule, f"over {scores.pixels:,} labeled pixels; -: undefined, no pixel contributes"]
    return "\n".join(lines)


def as_dict(scores: Scores) -> dict[str, Any]:
    """Return the scores as a dict of JSON values: fractions from 0 to 1, and None for nan."""
    rows = zip(scores.names, scores.iou, scores.accuracy, scores.share, strict=True)
    return {
        "mean_iou": _json(scores.mean_iou),
        "mean_accuracy": _json(scores.mean_accuracy),
        "pixel_accuracy": _json(scores.pixel_accuracy),
        "frequency_weighted_iou": _json(scores.frequency_weighted_iou),
        "mean_category_iou": _json(scores.mean_category_iou),
        "pixels": scores.pixels,
        "classes": {
            name: {"iou": _json(iou), "accuracy": _json(accuracy), "share": _json(share)}
            for name, iou, accuracy, share in rows
        },
        "categories": {name: _json(value) for name, value in scores.category_iou.items()},
    }


def _iou(confusion: np.ndarray) -> np.ndarray:
    correct = np.diagonal(confusion)
    return _ratio(correct, confusion.sum(axis=0) + confusion.sum(axis=1) - correct)


def _category_iou(confusion: np.ndarray, categories: Sequence[str]) -> dict[str, float]:
    """Return the IoU of each category, computed by merging its classes into one, as the Cityscapes evaluation does."""
    names = list(dict.fromkeys(categories))
    membership = np.array([[name == category for category in categories] for name in names], dtype=np.int64)
    if not names:
        return {}
    merged = membership @ confusion @ membership.T  # num_categories, num_categories
    return dict(zip(names, _iou(merged).tolist(), strict=True))


def _ratio(part: Any, whole: Any) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(part, whole, dtype=np.float64)


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _first_few(indices: np.ndarray) -> str:
    return ", ".join(map(str, indices[:5])) + (", ..." if indices.size > 5 else "")


def _percent(value: float, width: int = 6) -> str:
    return f"{'-' if np.isnan(value) else format(100 * value, '.2f'):>{width}}"


def _json(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
