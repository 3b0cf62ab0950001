"""Compare the predictions of an exported file with those of its checkpoint, and enforce the limits."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ocrnet.architecture import Arch
from ocrnet.config import Eval
from ocrnet.data.datasets.files import IMAGES
from ocrnet.data.datasets.street import scene
from ocrnet.data.image_io import read_image
from ocrnet.engines.base import Engine
from ocrnet.engines.tta import make_passes
from ocrnet.evaluation import metrics
from ocrnet.export.build import ExportSpec
from ocrnet.export.formats import Precision, Session
from ocrnet.export.runtimes.engine import as_input, resize
from ocrnet.utils.errors import OcrnetError

Sample = tuple[np.ndarray, np.ndarray | None]  # image uint8 H,W,3 RGB, class indices uint8 H,W or None


@dataclass(frozen=True)
class Limit:
    """The maximum difference of the logits, relative to the largest logit, and the minimum share of equal labels."""

    logits: float
    labels: float


LIMITS: dict[Precision, Limit] = {
    "float32": Limit(1e-4, 0.999),
    "float16": Limit(1e-2, 0.99),
    "int8": Limit(0.5, 0.90),
}


@dataclass(frozen=True)
class Comparison:
    """The result of comparing the predictions of an exported file with those of its checkpoint."""

    images: int
    logits_apart: float  # the largest difference of two logits, divided by the largest logit
    labels_equal: float  # the share of pixels with equal labels
    mean_iou: float | None = None  # of the exported file, if the images are labeled
    mean_iou_checkpoint: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Return the comparison as a sentence."""
        summary = (
            f"on {self.images} images its logits differ by at most {self.logits_apart:.1e} of the largest, and "
            f"{100 * self.labels_equal:.3f} % of the labels are equal"
        )
        if self.mean_iou is None or self.mean_iou_checkpoint is None:
            return summary
        return f"{summary}; mIoU {100 * self.mean_iou:.2f}, the checkpoint's {100 * self.mean_iou_checkpoint:.2f}"


def compare(
    engine: Engine, arch: Arch, spec: ExportSpec, session: Session, logits: Session, samples: Iterable[Sample]
) -> Comparison:
    """Run an exported file and the checkpoint's engine on the same images, and compare their predictions.

    Args:
        engine: The engine that runs the checkpoint.
        arch: The architecture of the network.
        spec: The settings of the export.
        session: The session of the exported file.
        logits: The session of the file that outputs logits; ``session`` itself if that outputs logits.
        samples: Images uint8 H,W,3 RGB, each with class indices uint8 H,W as ground truth, or None.

    Returns:
        The comparison, with the mIoU of both if at least one sample has ground truth.

    Raises:
        OcrnetError: There are no samples.
    """
    largest = difference = 0.0
    pixels = equal = images = 0
    counts = np.zeros((2, 256, 256), np.int64)
    scored = False
    align_corners, num_classes = arch.rule.align_corners, arch.num_classes
    for image, ground_truth in samples:
        size = image.shape[0], image.shape[1]
        x = as_input(image, spec.input, spec.mean, spec.std)
        expected_logits = engine.logits(as_input(image, "normalized", spec.mean, spec.std))[1][0]
        actual_logits = logits.run(x)[0]
        output = actual_logits if session is logits else session.run(x)[0]
        if spec.outputs != "labels":
            output = resize(output, size, align_corners=align_corners).argmax(0).astype(np.uint8)
        expected = engine.predict(image[None], make_passes(Eval(), size))["labels"][0]
        largest = max(largest, float(np.abs(expected_logits).max()))
        difference = max(difference, _largest_difference(actual_logits, expected_logits))
        images, pixels, equal = images + 1, pixels + expected.size, equal + int((output == expected).sum())
        if ground_truth is not None:
            scored = True
            for total, labels in zip(counts, (output, expected), strict=True):
                total[:num_classes, :num_classes] += metrics.confusion(labels, ground_truth, num_classes)
    if not images:
        raise OcrnetError("the comparison needs at least one image, but there is none")
    means = [metrics.scores(c[:num_classes, :num_classes], ["class"] * num_classes).mean_iou for c in counts]
    return Comparison(images, difference / largest, equal / pixels, *(means if scored else ()))


def _largest_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(np.abs(actual - expected).max())


def check(comparison: Comparison, precision: Precision, tolerance: float | None, output: Path) -> None:
    """Verify that the differences are within the limits for the precision.

    Args:
        comparison: The comparison with the checkpoint.
        precision: The precision of the export, which selects the limits.
        tolerance: Replaces the limit of the logits; None keeps it.
        output: The path of the export, for the error message.

    Raises:
        OcrnetError: A limit is exceeded; the message contains the differences.
    """
    limit = LIMITS[precision]
    limit_logits = limit.logits if tolerance is None else tolerance
    if comparison.logits_apart < limit_logits and comparison.labels_equal >= limit.labels:
        return
    raise OcrnetError(
        f"the exported {precision} network differs too much from the checkpoint: {comparison.text()}; the limits are "
        f"{limit_logits:g} (--tolerance) and {100 * limit.labels:g} %; {output} was not written"
    )


def spread(items: Sequence, number: int) -> list:
    """Return ``number`` evenly spaced items of a sequence; all items if there are fewer or ``number`` is 0."""
    if not number or number >= len(items):
        return list(items)
    return [items[i * len(items) // number] for i in range(number)]


def files(folder: str, flag: str, number: int) -> list[Path]:
    """Return evenly spaced image files of a folder and its subfolders, in sorted order.

    Args:
        folder: The folder to search.
        flag: The command-line option that error messages name.
        number: The maximum number of images; 0 returns all.

    Raises:
        OcrnetError: The folder does not exist or contains no images.
    """
    root = Path(folder)
    if not root.is_dir():
        raise OcrnetError(f"{flag} '{folder}' is not a folder; set it to a folder of images ({' '.join(IMAGES)})")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    if not paths:
        raise OcrnetError(f"{flag} '{folder}' contains no images ({' '.join(IMAGES)})")
    return spread(paths, number)


def resize_to(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Return an image resized to ``size`` (height, width); None only enlarges sides below 32 pixels."""
    height, width = size or (max(32, image.shape[0]), max(32, image.shape[1]))
    return image if image.shape[:2] == (height, width) else cv2.resize(image, (width, height))


def resize_label_to(label: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Return class indices resized like their image in `resize_to`, but with nearest-neighbor interpolation."""
    height, width = size or (max(32, label.shape[0]), max(32, label.shape[1]))
    return cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)


def draw(size: tuple[int, int], index: int) -> np.ndarray:
    """Return one synthetic street scene of ``size``, uint8 H,W,3 RGB."""
    least = max(64, size[0]), max(128, size[1])
    return resize_to(scene.draw(least, np.random.default_rng((7, index)), index=index)[0], size)


def crop_to_odd(image: np.ndarray) -> np.ndarray:
    """Return an image cropped to odd height and width; a side of 32 pixels is not cropped."""
    height, width = (length - 1 + length % 2 for length in image.shape[:2])
    return np.ascontiguousarray(image[: max(33, height), : max(33, width)])


def read(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """Read an image file and resize it with `resize_to`."""
    return resize_to(read_image(path), size)
