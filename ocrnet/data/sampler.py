"""The samples of a run.

A training sample is a pure function of (seed, sample number). Evaluation reads the images in file order.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import numpy as np

from ocrnet.config import Config, Data
from ocrnet.data import augment
from ocrnet.data.datasets.base import Dataset
from ocrnet.data.datasets.cache import CacheError
from ocrnet.distributed.launcher import World
from ocrnet.utils.errors import OcrnetError

T = TypeVar("T")

# Numbers of the two independent random streams of a seed: the order of an epoch, and the augmentation of a sample.
ORDER, SAMPLE = 0, 1

# Maximum number of unreadable files that are skipped for one sample; the next one raises its error.
MAX_SKIPPED_FILES = 10


class Sample(NamedTuple):
    """One training sample: image, label and dropout mask.

    ``image`` is uint8 H,W,3, ``label`` is uint8 H,W, and ``dropout_mask`` is bool (channels,), True for the channels
    that dropout keeps. ``unreadable`` holds the error of each file that was skipped (``data.on_error: skip``).
    """

    image: np.ndarray
    label: np.ndarray
    dropout_mask: np.ndarray
    unreadable: tuple[str, ...] = ()


class TrainStream:
    """Endless stream of training samples; ``stream[number]`` returns the same bytes in any process and at any time."""

    def __init__(self, dataset: Dataset, data: Data, *, seed: int, channels: int, dropout: float) -> None:
        self.dataset, self.data, self.seed = dataset, data, seed
        self.channels, self.dropout = channels, dropout

    def __getitem__(self, number: int) -> Sample:
        """Return sample ``number``.

        Raise `OcrnetError`, which names the file, if a file is unreadable. With ``data.on_error: skip``, the next
        readable image of the dataset replaces the unreadable one in this sample; all other samples are unchanged.
        """
        rng = np.random.default_rng((self.seed, SAMPLE, number))
        dropout_mask = rng.random(self.channels) >= self.dropout
        image, label, unreadable = self._read(self.index(number))
        return Sample(*augment.train(image, label, rng, self.data), dropout_mask, unreadable)

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """Return image and class indices, and the errors of the files that were skipped before them."""
        unreadable: list[str] = []
        while True:
            try:
                return *self.dataset.read(index), tuple(unreadable)
            except OcrnetError as error:
                # mutation: cache-error-is-no-unreadable-image
                skip = self.data.on_error == "skip" and not isinstance(error, CacheError)
                if not skip or len(unreadable) == MAX_SKIPPED_FILES:
                    raise
                unreadable.append(str(error))
                index = (index + 1) % len(self.dataset)

    def index(self, number: int) -> int:
        """Return the dataset index of sample ``number``; each epoch has its own permutation."""
        epoch, position = divmod(number, len(self.dataset))
        return int(_order(self.seed, epoch, len(self.dataset))[position])

    def name(self, number: int) -> str:
        """Return the name of the image of sample ``number``."""
        return self.dataset.name(self.index(number))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, ORDER, epoch)).permutation(length)


def rank_sample_indices(step: int, *, batch_size: int, accumulate_steps: int, world: World) -> list[list[int]]:
    """Return the sample numbers of this rank at ``step``, one list for each micro-batch.

    Position j of a global micro-batch belongs to rank j // batch_size. Therefore N ranks together process the same
    samples in the same order as one rank with an N times larger batch.

    Args:
        step: Optimizer step, from 0.
        batch_size: Samples per rank and micro-batch.
        accumulate_steps: Micro-batches per step.
        world: Rank and number of ranks.

    Returns:
        ``accumulate_steps`` lists of ``batch_size`` sample numbers.
    """
    global_size = batch_size * world.size
    first = step * accumulate_steps * global_size + world.rank * batch_size
    return [list(range(first + m * global_size, first + m * global_size + batch_size)) for m in range(accumulate_steps)]


class StepBatchSampler:
    """This rank's micro-batches from ``step`` to the end of the run, each as a list of sample numbers."""

    def __init__(self, cfg: Config, world: World, step: int) -> None:
        self.cfg, self.world, self.step = cfg, world, step

    def __len__(self) -> int:
        return max(0, self.cfg.total_step - self.step) * self.cfg.accumulate_steps

    def __iter__(self) -> Iterator[list[int]]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> list[int]:
        """Return the sample numbers of micro-batch ``position``, counted from the first one of ``step``."""
        step, micro = divmod(position, self.cfg.accumulate_steps)
        return rank_sample_indices(
            self.step + step,
            batch_size=self.cfg.batch_size,
            accumulate_steps=self.cfg.accumulate_steps,
            world=self.world,
        )[micro]


def val_stream(dataset: Dataset, world: World, num_workers: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (index, image, label) of every ``world.size``-th image of a dataset, starting at ``world.rank``.

    Args:
        dataset: Dataset to read.
        world: Rank and number of ranks.
        num_workers: Threads that prefetch; 0: decode in the calling thread.
    """
    indices = range(world.rank, len(dataset), world.size)
    for index, (image, label) in prefetch_map(indices, partial(_writeable, dataset), num_workers):
        yield index, image, label


def prefetch_map(indices: Iterable[int], read: Callable[[int], T], num_workers: int) -> Iterator[tuple[int, T]]:
    """Call ``read`` for each index in threads, and yield (index, result) in the order of ``indices``.

    Args:
        indices: Arguments of ``read``.
        read: Function to call for each index.
        num_workers: Threads that prefetch; 0: read in the calling thread.
    """
    if num_workers == 0:
        yield from ((i, read(i)) for i in indices)
        return
    pending: deque[tuple[int, Future]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        for i in indices:
            pending.append((i, pool.submit(read, i)))
            if len(pending) > num_workers:
                index, future = pending.popleft()
                yield index, future.result()
        while pending:
            index, future = pending.popleft()
            yield index, future.result()


def _writeable(dataset: Dataset, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Return image and label in writable arrays, which the frameworks require; read-only arrays are copied."""
    image, label = dataset.read(i)
    return np.require(image, requirements="W"), np.require(label, requirements="W")
