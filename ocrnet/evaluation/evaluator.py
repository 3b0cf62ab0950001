"""The one evaluation loop: images one by one, an int64 confusion matrix, nothing that grows with their number."""

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

Show = Callable[[int, np.ndarray, np.ndarray, np.ndarray], None]


class AbandonedError(Exception):
    """A stop came in the middle of an evaluation, on this rank or another."""


def evaluate(
    engine: Engine,
    dataset: Dataset,
    cfg: Config,
    *,
    eval_cfg: Eval,
    show: Show | None = None,
    say: Callable[[str], None] | None = None,
    stopped: Callable[[], int] = lambda: 0,
) -> Scores:
    """Score a dataset, each rank its share; ``show(index, image, prediction, truth)`` sees every image of this rank.

    All ranks return the same scores, or none does: where ``stopped`` says so on one, all raise `AbandonedError`.
    """
    with collectives.propagate_errors(engine):
        counts = _count(engine, dataset, cfg, eval_cfg, show, say, stopped)
    if collectives.all_reduce_max(engine, int(counts is None)):
        raise AbandonedError
    assert counts is not None
    total = engine.sum(counts)
    if not total.any():
        raise OcrnetError(f"no pixel of the validation images at {dataset.root} is labelled; see ocrnet check")
    return metrics.scores(total, dataset.classes.names, dataset.classes.categories)


def _count(
    engine: Engine,
    dataset: Dataset,
    cfg: Config,
    eval_cfg: Eval,
    show: Show | None,
    say: Callable[[str], None] | None,
    stopped: Callable[[], int],
) -> np.ndarray | None:
    """Return the confusion matrix of this rank's share; None where it was stopped."""
    num_classes, world = len(dataset.classes), engine.world
    total = np.zeros((num_classes, num_classes), np.int64)
    share = len(range(world.rank, len(dataset), world.size))
    whose = f" of rank {world.rank}'s" if world.size > 1 else ""
    begun = said = time.monotonic()
    for done, (index, image, label) in enumerate(val_stream(dataset, world, cfg.num_workers), 1):
        passes = make_passes(eval_cfg, (image.shape[0], image.shape[1]), cfg.data.base_size)
        prediction = engine.predict(image[None], passes)["labels"][0]
        total += metrics.confusion(prediction, label, num_classes)
        if stopped():
            return None
        if show is not None:
            show(index, image, prediction, label)
        if say is not None and time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"evaluated {done}/{share} images{whose}, {done / (said - begun):.2f} img/s")
    return total
