"""Scores on the validation images besides the confusion matrix: boundaries, calibration, scores per image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ocrnet.data.datasets.base import IGNORE
from ocrnet.evaluation import metrics

# Maximum distance between matching boundary pixels, as a share of the image's diagonal (Csurka et al., 2013).
TOLERANCE = 0.0075

# Number of confidence intervals (Guo et al., 2017).
BINS = 15

# Number of classes whose boundaries are matched at once, each as one bit of a uint32.
_BITS = 32

# Confidences are rounded to multiples of this, so that their sums are exact in any order of images.
_CONFIDENCE_UNIT = 2**-24


def boundary(indices: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return a mask, bool H,W, of the pixels that have a 4-neighbor of another class.

    ``indices`` are class indices, uint8 H,W. Pixels outside ``valid`` (bool H,W) are not boundary pixels and do not
    make their neighbors boundary pixels; neither does the border of the image.
    """
    mask = np.zeros(indices.shape, bool)
    for before, after in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        # mutation: no-boundary-at-ignored-pixels
        differs = (indices[before] != indices[after]) & valid[before] & valid[after]
        mask[before] |= differs
        mask[after] |= differs
    return mask


def tolerance(height: int, width: int) -> int:
    """Return the boundary tolerance in pixels for an image size: 0.75 % of the diagonal, rounded up."""
    return math.ceil(TOLERANCE * math.hypot(height, width))


def boundary_scores(prediction: np.ndarray, ground_truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the boundary F-score of each class in one image.

    Precision is the share of the predicted class's boundary pixels that have a boundary pixel of the same class in the
    ground truth within `tolerance` pixels (Euclidean). Recall is the reverse, and F is their harmonic mean: Csurka et
    al., "What is a good evaluation measure for semantic segmentation?" (BMVC 2013), with the matching by dilation of
    Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016).

    Args:
        prediction: Predicted class indices, uint8 H,W.
        ground_truth: Ground truth class indices, uint8 H,W; pixels with 255 are ignored in both.
        num_classes: The number of classes.

    Returns:
        float64 num_classes; nan for a class without boundary pixels, 0 for one with boundary pixels in only one of the
        two.
    """
    valid = ground_truth != IGNORE
    reach = tolerance(*ground_truth.shape)
    maps = prediction, ground_truth
    edges = [boundary(indices, valid) for indices in maps]
    edge_classes = [indices[edge] for indices, edge in zip(maps, edges, strict=True)]  # class of each boundary pixel
    matched = [np.zeros(len(classes), bool) for classes in edge_classes]
    for first in range(0, num_classes, _BITS):
        for this, other in ((0, 1), (1, 0)):
            bits = np.zeros(ground_truth.shape, np.uint32)
            bits[edges[other]] = _bit(edge_classes[other], first)
            matched[this] |= spread(bits, reach)[edges[this]] & _bit(edge_classes[this], first) > 0
    pixels = [np.bincount(classes, minlength=num_classes) for classes in edge_classes]
    with np.errstate(invalid="ignore"):
        precision, recall = (
            np.where(some, np.bincount(classes[correct], minlength=num_classes) / some, 0.0)
            for classes, correct, some in zip(edge_classes, matched, pixels, strict=True)
        )
        score = 2 * precision * recall / (precision + recall)
    score[precision + recall == 0] = 0.0
    score[pixels[0] + pixels[1] == 0] = np.nan
    return score


def _bit(classes: np.ndarray, first: int) -> np.ndarray:
    """Return, as uint32, the bit of each class index from ``first`` to ``first + _BITS - 1``; 0 for other indices."""
    place = classes.astype(np.int64) - first
    inside = (place >= 0) & (place < _BITS)
    return np.where(inside, np.left_shift(np.uint32(1), np.clip(place, 0, _BITS - 1).astype(np.uint32)), 0)


def spread(bits: np.ndarray, reach: int) -> np.ndarray:
    """Return, uint32 H,W, the union of the bits (uint32 H,W) within ``reach`` pixels (Euclidean) of each pixel.

    A disk is one horizontal run per row, and each run is the union of two runs of power-of-two length. All classes
    are processed at once.
    """
    height, width = bits.shape
    runs = [np.pad(bits, ((0, 0), (reach, reach)))]  # runs[k][y, x]: union over 2**k pixels, starting at x
    while 2 ** len(runs) <= 2 * reach + 1:
        half = 2 ** (len(runs) - 1)
        runs.append(runs[-1][:, :-half] | runs[-1][:, half:])
    union = np.zeros_like(bits)
    for rows in range(min(reach, height - 1) + 1):
        half = math.isqrt(reach**2 - rows**2)
        power = (2 * half + 1).bit_length() - 1
        left, right = reach - half, reach + half + 1 - 2**power
        row = runs[power][:, left : left + width] | runs[power][:, right : right + width]
        union[rows:] |= row[: height - rows]
        union[: height - rows] |= row[rows:]
    return union


@dataclass
class Calibration:
    """Confidence and accuracy of all valid pixels, in `BINS` equal intervals of (0, 1].

    See Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017). Confidence is the probability of the
    predicted class.
    """

    pixels: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    right: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    parts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))  # sums of confidence, in 2**-24

    def add(self, confidence: np.ndarray, prediction: np.ndarray, ground_truth: np.ndarray) -> None:
        """Add an image.

        Args:
            confidence: float32 H,W.
            prediction: Predicted class indices, uint8 H,W.
            ground_truth: Ground truth class indices, uint8 H,W; pixels with 255 are ignored.
        """
        valid = ground_truth != IGNORE
        confidences = confidence[valid].astype(np.float64)
        interval = np.clip(np.ceil(confidences * BINS).astype(np.int64) - 1, 0, BINS - 1)
        correct = (prediction == ground_truth)[valid]
        self.pixels += np.bincount(interval, minlength=BINS)
        self.right += np.bincount(interval[correct], minlength=BINS)
        # float64 sums integers below 2**53 exactly.
        self.parts += np.bincount(interval, np.rint(confidences / _CONFIDENCE_UNIT), BINS).astype(np.int64)

    @property
    def confidence(self) -> np.ndarray:
        """The mean confidence of each interval, float64; nan if it has no pixels."""
        with np.errstate(invalid="ignore"):
            return self.parts * _CONFIDENCE_UNIT / self.pixels

    @property
    def accuracy(self) -> np.ndarray:
        """The share of correctly predicted pixels of each interval, float64; nan if it has no pixels."""
        with np.errstate(invalid="ignore"):
            return self.right / self.pixels

    @property
    def error(self) -> float:
        """The expected calibration error: the mean over pixels of their interval's abs(confidence - accuracy)."""
        total = int(self.pixels.sum())
        return float(np.abs(self.parts * _CONFIDENCE_UNIT - self.right).sum() / total) if total else float("nan")


@dataclass
class Tally:
    """The scores of all validation images, which are added one at a time; an image adds only one row to ``images``."""

    num_classes: int
    confusion: np.ndarray = field(init=False)
    calibration: Calibration = field(default_factory=Calibration)
    images: list[dict[str, Any]] = field(default_factory=list)
    _edge_sum: np.ndarray = field(init=False)
    _edge_count: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.confusion = np.zeros((self.num_classes, self.num_classes), np.int64)
        self._edge_sum, self._edge_count = np.zeros(self.num_classes), np.zeros(self.num_classes, np.int64)

    def add(self, name: str, prediction: np.ndarray, confidence: np.ndarray, ground_truth: np.ndarray) -> None:
        """Add an image.

        Args:
            name: The image's name.
            prediction: Predicted class indices, uint8 H,W.
            confidence: float32 H,W.
            ground_truth: Ground truth class indices, uint8 H,W; pixels with 255 are ignored.
        """
        counts = metrics.confusion(prediction, ground_truth, self.num_classes)
        self.confusion += counts
        self.calibration.add(confidence, prediction, ground_truth)
        edges = boundary_scores(prediction, ground_truth, self.num_classes)
        known = ~np.isnan(edges)
        self._edge_sum[known] += edges[known]
        self._edge_count += known
        scores = metrics.scores(counts, [""] * self.num_classes)
        self.images.append(
            {
                "name": name,
                "mean_iou": plain(scores.mean_iou),
                "pixel_accuracy": plain(scores.pixel_accuracy),
                "boundary": plain(float(edges[known].mean()) if known.any() else math.nan),
                "classes": int(np.count_nonzero(counts.sum(axis=1))),
            }
        )

    @property
    def boundary(self) -> np.ndarray:
        """The boundary F-score of each class, float64: the mean over the images that define one; nan if none does."""
        with np.errstate(invalid="ignore"):
            return self._edge_sum / np.where(self._edge_count, self._edge_count, np.nan)


def ranked(images: Sequence[dict[str, Any]]) -> list[int]:
    """Return the indices of the images that have a mean IoU, lowest mean IoU first."""
    known = [i for i, image in enumerate(images) if image["mean_iou"] is not None]
    return sorted(known, key=lambda i: (images[i]["mean_iou"], images[i]["name"]))


def plain(value: float) -> float | None:
    """Return a number as strict JSON can represent it: None for nan."""
    return None if math.isnan(value) else float(value)
