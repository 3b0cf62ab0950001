"""Dataset validation: read every file, check every label id, and count the pixels of every class."""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ocrnet.data.datasets.base import IGNORE, ClassTable, Dataset
from ocrnet.utils.errors import OcrnetError

logger = logging.getLogger(__name__)

MAX_SHOWN = 20


@dataclass
class Report:
    """Statistics of the files of one split."""

    pixels: np.ndarray  # int64 num_classes: labeled pixels of each class
    images: np.ndarray  # int64 num_classes: images in which each class occurs
    read: int = 0
    ignored: int = 0  # pixels with class index 255
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # height, width -> images
    unlabeled: list[str] = field(default_factory=list)  # images in which every pixel is ignored
    problems: list[str] = field(default_factory=list)  # error messages, one for each unusable file

    @property
    def shares(self) -> np.ndarray:
        """Share of the labeled pixels that each class has, float64 num_classes."""
        return self.pixels / max(1, self.pixels.sum())

    @property
    def class_weights(self) -> np.ndarray:
        """Class weights for the loss, float64 num_classes: 1 / ln(1.02 + share) (Paszke et al., ENet, 2016).

        The weights are divided by their mean over the labeled pixels, so that this mean is 1.
        """
        weights = 1 / np.log(1.02 + self.shares)
        return weights / ((weights * self.shares).sum() or 1.0)


def inspect(dataset: Dataset, indices: Sequence[int], *, workers: int) -> Report:
    """Read and validate samples of a split; a failure is recorded and does not end the validation.

    Args:
        dataset: Split to read.
        indices: Dataset indices of the samples to read.
        workers: Number of threads; at least one is used.

    Returns:
        The statistics. For a sample that cannot be read, they contain only the error message in ``problems``.
    """
    count = len(dataset.classes)
    report = Report(np.zeros(count, np.int64), np.zeros(count, np.int64))
    for done, (index, result) in enumerate(_inspect_all(dataset, indices, max(1, workers)), 1):
        if isinstance(result, str):
            report.problems.append(result)
        else:
            height, width, counts = result
            report.read += 1
            report.sizes[height, width] += 1
            report.pixels += counts[:count]
            report.images += counts[:count] > 0
            report.ignored += int(counts[IGNORE])
            if not counts[:count].any():
                report.unlabeled.append(dataset.name(index))
        if done % 250 == 0:
            logger.info(f"checked {done}/{len(indices)} images")
    if not report.problems and not report.pixels.any():
        report.problems.append(f"no pixel of the {report.read} images is labeled; all pixels are ignored")
    return report


PairResult = str | tuple[int, int, np.ndarray]  # error message, or height, width and pixel counts


def _inspect_all(dataset: Dataset, indices: Sequence[int], workers: int) -> Iterator[tuple[int, PairResult]]:
    """Yield (index, result) in the order of ``indices``; at most about 2 * ``workers`` reads are pending."""
    pending: deque[tuple[int, Future[PairResult]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for index in indices:
            pending.append((index, pool.submit(_inspect_pair, dataset, index)))
            if len(pending) > 2 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()


def _inspect_pair(dataset: Dataset, index: int) -> PairResult:
    """Return height, width and the number of pixels of each class index; or the message of the error."""
    try:
        _, label = dataset.read(index)
    except OcrnetError as error:
        return str(error)
    return label.shape[0], label.shape[1], np.bincount(label.reshape(-1), minlength=IGNORE + 1)


def text(report: Report, classes: ClassTable) -> str:
    """Return the report as a text; it includes a line with the class weights, to copy into the YAML file."""
    if not report.read:
        return "\n".join(_problems(report))
    width = max(len("class"), *(len(name) for name in classes.names))
    lines = [f"{'class':<{width}}   id  pixels %  in images  weight"]
    rows = zip(classes.names, classes.ids, report.shares, report.images, report.class_weights, strict=True)
    lines += [
        f"{name:<{width}}  {value:>3}  {100 * share:>8.3f}  {images:>9}  {weight:>6.3f}"
        for name, value, share, images, weight in rows
    ]
    all_pixels = max(1, int(report.pixels.sum()) + report.ignored)
    sizes = ", ".join(f"{count} of {height}x{width}" for (height, width), count in report.sizes.most_common(8))
    more = f" and {len(report.sizes) - 8} more sizes" if len(report.sizes) > 8 else ""
    weights = ", ".join(f"{weight:.4f}" for weight in report.class_weights)
    lines += [
        f"ignored: {100 * report.ignored / all_pixels:.2f} % of all pixels",
        f"images (height x width): {sizes or 'none'}{more}",
        f"class_weights: [{weights}]",
    ]
    missing = [name for name, images in zip(classes.names, report.images, strict=True) if not images]
    lines += [f"warning: no pixels of {', '.join(missing)}"] if missing else []
    if missing and report.ignored and len(missing) == len(classes.names) - 1:
        lines.append("warning: only one class occurs; 255 is ignored, so a mask of 0 and 255 needs 1 instead of 255")
    lines += [f"warning: {name} has no labeled pixels" for name in report.unlabeled[:MAX_SHOWN]]
    return "\n".join(lines + _problems(report))


def _problems(report: Report) -> list[str]:
    lines = [f"problem: {problem}" for problem in report.problems[:MAX_SHOWN]]
    beyond = len(report.problems) - MAX_SHOWN
    return lines + ([f"problem: ... and {beyond} more files"] if beyond > 0 else [])
