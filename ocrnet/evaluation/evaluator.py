"""The evaluation loop: predict one image at a time and add it to an int64 confusion matrix."""

import logging
import time
from collections.abc import Callable

import numpy as np

from ocrnet.config import Config, Eval
from ocrnet.data.datasets.base import Dataset
from ocrnet.data.sampler import val_stream
from ocrnet.engines import collectives
from ocrnet.engines.base import Engine
from ocrnet.engines.tta import make_passes
from ocrnet.evaluation import metrics
from ocrnet.evaluation.metrics import Scores
from ocrnet.utils.errors import OcrnetError

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0

Show = Callable[[int, np.ndarray, np.ndarray, np.ndarray], None]  # index, image, prediction, label


class EvaluationStoppedError(Exception):
    """A stop signal on this or another rank interrupted the evaluation."""


def evaluate(
    engine: Engine,
    dataset: Dataset,
    cfg: Config,
    *,
    eval_cfg: Eval,
    show: Show | None = None,
    stopped: Callable[[], int] = lambda: 0,
) -> Scores:
    """Evaluate a dataset; each rank predicts its share of the images.

    This is a collective: all ranks return the same scores, or all raise an exception.

    Args:
        engine: The engine of this rank.
        dataset: The labeled dataset.
        cfg: The configuration.
        eval_cfg: Scales, flip and sliding windows.
        show: Called as ``show(index, image, prediction, label)`` for each image of this rank.
        stopped: Returns a nonzero number if this rank must stop; it is called after each image.

    Returns:
        The scores of the whole dataset.

    Raises:
        EvaluationStoppedError: ``stopped`` returned a nonzero number on this or another rank.
        OcrnetError: No pixel is labeled, an image cannot be read or predicted, or another rank failed.
    """
    with collectives.propagate_errors(engine):
        counts = _count(engine, dataset, cfg, eval_cfg, show, stopped)
    if collectives.all_reduce_max(engine, int(counts is None)):
        raise EvaluationStoppedError
    assert counts is not None
    confusion = engine.sum(counts)
    if not confusion.any():
        raise OcrnetError(f"no pixel of the validation images at {dataset.root} is labeled; see ocrnet check")
    return metrics.scores(confusion, dataset.classes.names, dataset.classes.categories)


def _count(
    engine: Engine,
    dataset: Dataset,
    cfg: Config,
    eval_cfg: Eval,
    show: Show | None,
    stopped: Callable[[], int],
) -> np.ndarray | None:
    """Return the confusion matrix of this rank's images; None if ``stopped`` returned a nonzero number."""
    num_classes, world = len(dataset.classes), engine.world
    confusion = np.zeros((num_classes, num_classes), np.int64)
    num_images = len(range(world.rank, len(dataset), world.size))
    share = " of rank 0" if world.size > 1 else ""
    started = last_logged = time.monotonic()
    for done, (index, image, label) in enumerate(val_stream(dataset, world, cfg.num_workers), 1):
        passes = make_passes(eval_cfg, (image.shape[0], image.shape[1]), cfg.data.base_size)
        prediction = engine.predict(image[None], passes)["labels"][0]
        confusion += metrics.confusion(prediction, label, num_classes)
        if stopped():
            return None
        if show is not None:
            show(index, image, prediction, label)
        if time.monotonic() - last_logged > PROGRESS_SECONDS:
            last_logged = time.monotonic()
            rate = done / (last_logged - started)
            logger.info(f"evaluated {done}/{num_images} images{share}, {rate:.2f} img/s")
    return confusion
