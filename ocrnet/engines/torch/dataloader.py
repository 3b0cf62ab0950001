"""Training data loader: workers of a torch DataLoader read and augment; micro-batches arrive in order."""

import contextlib
import multiprocessing.connection
import multiprocessing.process
import signal
import threading
import warnings
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from ocrnet.config import Config
from ocrnet.data.sampler import Sample, StepBatchSampler, TrainStream
from ocrnet.data.workers import ADVICE, begin_worker, close_at_exit, describe_dead_workers
from ocrnet.distributed.launcher import World
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import block_signals


class Batch(NamedTuple):
    """A micro-batch: images uint8 N,H,W,3, labels uint8 N,H,W, and dropout masks bool N,channels.

    ``unreadable`` contains the error message of each skipped file.
    """

    images: torch.Tensor
    labels: torch.Tensor
    dropout_masks: torch.Tensor
    unreadable: tuple[str, ...]


def batches(
    stream: TrainStream, cfg: Config, *, world: World, step: int, pinned: bool = False
) -> Generator[Batch, None, None]:
    """Return a generator of this rank's micro-batches from ``step`` on; its ``close`` ends the workers.

    Args:
        stream: The training stream.
        cfg: The configuration, with batch size and workers.
        world: This process's rank and the number of ranks.
        step: The step of the first micro-batch.
        pinned: Whether to use pinned memory, from which copies to a GPU are asynchronous.

    Returns:
        The generator. It raises an `OcrnetError` that names the file if a file is unreadable, and `OcrnetError` if a
        worker has died.
    """
    generator = _generate_batches(stream, cfg, world, step, pinned)
    close_at_exit(generator)
    return generator


def _generate_batches(
    stream: TrainStream, cfg: Config, world: World, step: int, pinned: bool
) -> Generator[Batch, None, None]:
    other_processes = set(multiprocessing.active_children())
    with warnings.catch_warnings(), _without_sigchld_handler(), block_signals():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # the startup log contains an equivalent line
        loader: DataLoader = DataLoader(
            ErrorCatchingStream(stream),
            batch_sampler=StepBatchSampler(cfg, world, step),
            num_workers=cfg.num_workers,
            prefetch_factor=cfg.prefetch_size if cfg.num_workers else None,
            collate_fn=collate,
            worker_init_fn=begin_worker,
            pin_memory=pinned,
        )
        iterator = iter(loader)
    del loader
    processes = [process for process in multiprocessing.active_children() if process not in other_processes]
    try:
        for batch in iterator:
            if isinstance(batch, OcrnetError):
                raise batch
            yield batch
    except OcrnetError:
        raise
    except Exception as error:
        dead_workers = describe_dead_workers(processes)
        # mutation: report-dead-worker
        if not dead_workers:
            raise
        _skip_shutdown(iterator)
        raise OcrnetError(f"{dead_workers}; {ADVICE}") from error
    finally:
        del iterator  # ends the workers, even if a traceback references this frame
        for process in processes:
            # mutation: kill-hanging-worker
            process.kill()  # it may hang in a read or wait for a lock of a dead worker
            process.join()


def _skip_shutdown(iterator: Any) -> None:
    """Make a DataLoader iterator skip its shutdown, which may wait forever for a lock of a dead worker.

    Its worker pids are deregistered here, as its shutdown would do. Torch registers them by the iterator's address; a
    later iterator at the same address would fail.
    """
    iterator._shutdown = True
    if iterator._worker_pids_set:
        # mutation: deregister-dead-workers
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False


@contextlib.contextmanager
def _without_sigchld_handler() -> Iterator[None]:
    """Restore the SIGCHLD handler on exit: creating a DataLoader iterator installs torch's handler.

    When a worker dies, torch's handler raises an exception at an arbitrary point of the main thread. Without it, the
    exception is raised by the request for the next batch, at most five seconds later.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        # mutation: report-dead-worker-in-order
        signal.signal(signal.SIGCHLD, before)


class ErrorCatchingStream(Dataset):
    """Training stream that returns an `OcrnetError` instead of raising it.

    A DataLoader would replace an exception in a worker by one that contains only the text of its traceback.
    """

    def __init__(self, stream: TrainStream) -> None:
        self.stream = stream

    def __getitem__(self, number: int) -> Sample | OcrnetError:
        """Return sample ``number``, or the `OcrnetError` that names the unreadable file."""
        try:
            return self.stream[number]
        except OcrnetError as error:
            return error


def collate(samples: list[Sample | OcrnetError]) -> Batch | OcrnetError:
    """Stack samples into a micro-batch; if the list contains errors, return the first one instead."""
    valid = [sample for sample in samples if isinstance(sample, Sample)]
    if len(valid) < len(samples):
        return next(sample for sample in samples if isinstance(sample, OcrnetError))
    images, labels, dropout_masks = (torch.from_numpy(np.stack([sample[i] for sample in valid])) for i in range(3))
    return Batch(images, labels, dropout_masks, tuple(error for sample in valid for error in sample.unreadable))
