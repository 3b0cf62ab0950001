"""Training data loader as a MindSpore GeneratorDataset: worker processes read and augment, batches keep their order.

MindSpore starts, feeds and reads its worker processes. A row of the dataset is one whole micro-batch, made by one
worker. This module replaces MindSpore's error handling because of the following behavior (observed with 2.10):

- When a worker dies, MindSpore's watchdog sends SIGTERM to the whole run. Without the watchdog, MindSpore waits for the
  next row forever.
- If a pipeline is interrupted or fails while a thread other than the main thread waits for a row, the run ends with
  SIGSEGV. The main thread must not wait in C++ either, because it cannot handle signals there.
- An error whose text contains "MemoryError" ends the run with SIGKILL.
- With one worker, MindSpore starts no process, and it polls for rows ten times a second.

Therefore a row is never an exception but may contain the text of one, a thread of this module waits for rows, and a
pipeline that must end first gives that thread a last row.
"""

import contextlib
import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import mindspore.dataset
import numpy as np
from mindspore.dataset.engine.datasets_user_defined import SamplerFn

from ocrnet.config import Config
from ocrnet.data.sampler import StepBatchSampler, TrainStream
from ocrnet.data.workers import ADVICE, begin_worker, close_at_exit, describe_dead_workers
from ocrnet.distributed.launcher import World
from ocrnet.utils.errors import OcrnetError
from ocrnet.utils.signals import SIGNALS, block_signals

COLUMNS = ["images", "labels", "keeps", "notes"]
MEGABYTE = 2**20


class Batch(NamedTuple):
    """A micro-batch: images uint8 N,H,W,3, labels uint8 N,H,W, dropout masks bool N,channels, skipped files' errors."""

    images: np.ndarray
    labels: np.ndarray
    keeps: np.ndarray
    unreadable: tuple[str, ...]


Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def batches(stream: TrainStream, cfg: Config, *, world: World, step: int) -> Generator[Batch, None, None]:
    """Return a generator of micro-batches from ``step`` on; its ``close`` ends the workers.

    Args:
        stream: The training stream.
        cfg: The configuration.
        world: This process's rank and the number of ranks.
        step: The first step.

    Returns:
        The generator. It raises the `OcrnetError` that names an unreadable file, also if a worker reads the file.

    Raises:
        OcrnetError: A sample needs more memory than ``max_rowsize``; the message contains the required value. Raised
            by this call, only with workers.
    """
    rows = Rows(stream, cfg, world, step)
    made = _from_workers(rows) if cfg.num_workers else (rows.batch(number) for number in range(len(rows)))
    close_at_exit(made)
    return made


class Rows:
    """The micro-batches of this rank from ``step`` on, as rows of arrays that the workers compute by index."""

    def __init__(self, stream: TrainStream, cfg: Config, world: World, step: int) -> None:
        self.stream, self.numbers = stream, StepBatchSampler(cfg, world, step)
        self.num_workers, self.prefetch_size = cfg.num_workers, cfg.prefetch_size
        self.megabytes = _row_megabytes(cfg, stream.channels) if cfg.num_workers else 0
        self.parent = os.getpid()
        self.begun = False

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, number: int) -> Batch:
        """Return micro-batch ``number``; raise `OcrnetError` if a file is unreadable."""
        samples = [self.stream[sample] for sample in self.numbers[number]]
        images, labels, keeps = (np.stack([sample[i] for sample in samples]) for i in range(3))
        return Batch(images, labels, keeps, tuple(error for sample in samples for error in sample.unreadable))

    def __getitem__(self, number: int) -> Row:
        """Return micro-batch ``number`` as a row, in a worker; return an exception as a row too."""
        if not self.begun:
            begin_worker()
            threading.Thread(target=_end_with, args=(self.parent,), daemon=True).start()
            self.begun = True
        try:
            batch = self.batch(int(number))
        except OcrnetError as error:
            return _note(error=str(error))
        except Exception:
            return _note(bug=traceback.format_exc())
        return *batch[:3], _text({"unreadable": batch.unreadable})


def _row_megabytes(cfg: Config, channels: int) -> int:
    """Return the shared memory of a row in MB; raise `OcrnetError` if a sample exceeds ``max_rowsize``.

    Each worker allocates ``prefetch_size`` + 2 blocks of this size at its start, so the size is no larger than needed.
    """
    height, width = cfg.data.crop_size
    sample = height * width * 4 + channels
    needed = math.ceil(sample / MEGABYTE)
    if needed > cfg.max_rowsize:
        raise OcrnetError(
            f"a sample of data.crop_size [{height}, {width}] takes {needed} MB but max_rowsize is {cfg.max_rowsize}; "
            f"set max_rowsize: {needed} or use smaller crops (without workers there is no such limit: "
            "--set num_workers=0)"
        )
    return sample * cfg.batch_size // MEGABYTE + 1


def _text(notes: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(notes).encode(), np.uint8)


def _note(**notes: str) -> Row:
    empty = np.zeros(1, np.uint8)
    return empty, empty, empty, _text(notes)


def _end_with(parent: int) -> None:
    """End this worker process when process ``parent`` is gone: a killed run cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class Workers(SamplerFn):
    """The worker processes of a dataset; `process` yields their rows in order until ``closed`` is set."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows, rows.num_workers, True, rows.megabytes)
        self.closed = threading.Event()
        self.failure = ""

    def launch(self, op_id: int = -1) -> None:
        """Start the processes; store an error's text in ``failure``, as MindSpore ends the run for some error texts."""
        try:
            with (
                _settings(prefetch_size=self._queue_size(), multiprocessing_start_method="fork"),
                _start_method_kept(),
            ):
                super().launch(op_id)
        except Exception as error:
            self.failure = str(error) or repr(error)
            raise RuntimeError("the workers did not start") from None
        finally:
            self.need_join = False  # MindSpore's own shutdown waits for workers that hang
        for worker in self.workers:
            worker.res_queue._writer.close()  # otherwise a read waits forever for the rest of a dead worker's message

    def _queue_size(self) -> int:
        """Return the setting with which each worker's queues hold ``prefetch_size`` rows, for any number of workers."""
        return math.ceil(self.dataset.prefetch_size * max(self.num_worker, 4) / 4)

    def _launch_monitor(self) -> None:
        """Do not start the process that sends the workers SIGTERM after the run: they detect its end themselves."""

    def process(self, indices: np.ndarray) -> Iterator[Row]:
        """Yield the rows of ``indices``; after a failure or once closed, yield a last row repeatedly."""
        try:
            yield from self._rows(indices)
        except Exception:
            self.failure = traceback.format_exc()
        while self.failure or self.closed.is_set():
            yield _note(failure=self.failure)

    def _rows(self, indices: np.ndarray) -> Iterator[Row]:
        given = 0
        for number in range(len(indices)):
            while given < min(len(indices), number + self.num_worker * self.dataset.prefetch_size):
                self.workers[given % self.num_worker].put(indices[given])
                given += 1
            results = self.workers[number % self.num_worker].res_queue
            while not multiprocessing.connection.wait([results._reader], timeout=0.1):
                if self.closed.is_set():
                    return
            yield results.get()


class Pipeline(mindspore.dataset.GeneratorDataset):
    """The GeneratorDataset of `Rows`, with `Workers` instead of MindSpore's own workers, also for a single worker."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows, COLUMNS, shuffle=False)  # worker count not passed: MindSpore rejects more than cores

    def prepare_multiprocessing(self) -> None:
        """Set the workers and the source of rows that MindSpore uses."""
        self.sample_fn = Workers(self.source)
        self.prepared_source = self.sample_fn.process


def _from_workers(rows: Rows) -> Generator[Batch, None, None]:
    if not len(rows):
        return
    with _settings(prefetch_size=1):  # rows that are ready wait in the workers' queues
        iterator = Pipeline(rows).create_tuple_iterator(num_epochs=1, output_numpy=True)
    workers: Workers = iterator.dataset.sample_fn
    ready: queue.Queue[list[np.ndarray]] = queue.Queue(1)
    feeder = threading.Thread(target=_feed, args=(iterator, workers, ready), daemon=True)
    feeder.start()
    try:
        for number in range(len(rows)):
            row = _next(ready, workers)
            if number == 0:
                _handlers_restored()
            yield _batch(row, workers)
    finally:
        _close(iterator, workers, feeder)


def _feed(iterator: Iterator[list[np.ndarray]], workers: Workers, ready: queue.Queue[list[np.ndarray]]) -> None:
    """Put rows into ``ready`` until closed, in the thread that waits in MindSpore and forks the workers.

    The signals that stop a run are blocked in this thread, and so in each worker until `begin_worker` unblocks them.
    """
    try:
        with block_signals():
            for row in iterator:
                _hand_on(row, workers.closed, ready)
                if workers.closed.is_set():
                    return
    except Exception as error:
        _hand_on(list(_note(failure=workers.failure or str(error))), workers.closed, ready)


def _hand_on(row: list[np.ndarray], closed: threading.Event, ready: queue.Queue[list[np.ndarray]]) -> None:
    while not closed.is_set():
        with contextlib.suppress(queue.Full):
            ready.put(row, timeout=0.1)
            return


def _next(ready: queue.Queue[list[np.ndarray]], workers: Workers) -> list[np.ndarray]:
    while True:
        with contextlib.suppress(queue.Empty):
            return ready.get(timeout=1)
        _raise_deaths(workers)


def _batch(row: list[np.ndarray], workers: Workers) -> Batch:
    notes = json.loads(row[3].tobytes())
    if "error" in notes:
        raise OcrnetError(notes["error"])
    if "bug" in notes:
        raise RuntimeError(f"exception in a loader worker: {notes['bug']}")
    if "failure" in notes:
        _raise_deaths(workers)
        raise OcrnetError(f"the loader's workers failed: {notes['failure']}; {ADVICE}")
    return Batch(row[0], row[1], row[2], tuple(notes["unreadable"]))


def _raise_deaths(workers: Workers) -> None:
    told = describe_dead_workers(workers.workers)
    if told:
        raise OcrnetError(f"{told}; {ADVICE}")


def _close(iterator: Any, workers: Workers, feeder: threading.Thread) -> None:
    """End the workers, the feeder and the pipeline, in this order; the module docstring gives the reason."""
    workers.closed.set()
    end = time.monotonic() + 30
    while feeder.is_alive() and time.monotonic() < end:
        for worker in list(workers.workers):
            worker.kill()  # also if it hangs in a read; the feeder may wait for the rest of its message
        feeder.join(timeout=0.05)
    for worker in workers.workers:
        worker.kill()
        worker.join()
    workers.workers.clear()  # frees the queues, which ends their threads; a traceback may keep ``workers``
    if not feeder.is_alive():
        iterator.stop()


@contextlib.contextmanager
def _settings(**chosen: Any) -> Iterator[None]:
    """Set MindSpore's process-wide dataset settings and restore them on exit."""
    config = mindspore.dataset.config
    before = {name: getattr(config, f"get_{name}")() for name in chosen}
    try:
        for name, value in chosen.items():
            getattr(config, f"set_{name}")(value)
        yield
    finally:
        for name, value in before.items():
            getattr(config, f"set_{name}")(value)


@contextlib.contextmanager
def _start_method_kept() -> Iterator[None]:
    """Restore Python's multiprocessing start method on exit: MindSpore changes it for the whole process."""
    before = multiprocessing.get_start_method(allow_none=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


def _handlers_restored() -> None:
    """Restore Python's signal handlers: MindSpore sets its own, which `signal.getsignal` does not report."""
    if threading.current_thread() is not threading.main_thread():  # in Python only the main thread can set handlers
        return
    for number in (*SIGNALS, signal.SIGCHLD):
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)
