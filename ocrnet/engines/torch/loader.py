"""The training stream in a torch DataLoader: worker processes read and augment, batches come out in order."""

import warnings
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ocrnet.config import Config
from ocrnet.errors import OcrnetError
from ocrnet.stream import Sample, TrainStream, numbers
from ocrnet.world import World

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class StepNumbers:
    """The sample numbers of this rank's micro-batches, one list each, from ``step`` to the end of the run."""

    def __init__(self, cfg: Config, world: World, step: int) -> None:
        self.cfg, self.world, self.step = cfg, world, step

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.step, self.cfg.total_step):
            yield from numbers(
                step, batch_size=self.cfg.batch_size, accumulate_steps=self.cfg.accumulate_steps, world=self.world
            )


def batches(stream: TrainStream, cfg: Config, *, world: World, step: int, pinned: bool = False) -> Iterator[Batch]:
    """Yield micro-batches from ``step`` on: images uint8 N,H,W,3, labels uint8 N,H,W, dropout masks bool N,channels.

    An unreadable file raises the `OcrnetError` that names it, also where a worker met it. ``pinned`` memory copies to a
    GPU without waiting.
    """
    workers = cfg.num_workers
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # said in the banner, once
        loader: DataLoader = DataLoader(
            Guarded(stream),
            batch_sampler=StepNumbers(cfg, world, step),
            num_workers=workers,
            prefetch_factor=cfg.prefetch_size if workers else None,
            collate_fn=collate,
            worker_init_fn=one_thread,
            pin_memory=pinned,
        )
        ready = iter(loader)
    for batch in ready:
        if isinstance(batch, OcrnetError):
            raise batch
        yield batch


class Guarded(Dataset):
    """The stream with errors as values, because a DataLoader wraps what a worker raises into a traceback's text."""

    def __init__(self, stream: TrainStream) -> None:
        self.stream = stream

    def __getitem__(self, number: int) -> Sample | OcrnetError:
        """Return sample ``number``, or the error that names its file."""
        try:
            return self.stream[number]
        except OcrnetError as error:
            return error


def collate(samples: list[Sample | OcrnetError]) -> Batch | OcrnetError:
    """Stack samples into the three tensors of a micro-batch; hand an error on."""
    good = [sample for sample in samples if isinstance(sample, Sample)]
    if len(good) < len(samples):
        return next(sample for sample in samples if isinstance(sample, OcrnetError))
    images, labels, keeps = (torch.from_numpy(np.stack(part)) for part in zip(*good, strict=True))
    return images, labels, keeps


def one_thread(_: int) -> None:
    """Keep a worker to one thread: the workers themselves are the parallelism."""
    cv2.setNumThreads(0)
