"""Training data loader: worker processes of a MindSpore GeneratorDataset read and augment; batches arrive in order.

A row of the dataset is one micro-batch, which one worker computes. This module replaces the error handling of
MindSpore because of the following behavior (observed with MindSpore 2.10):

- When a worker dies, MindSpore's watchdog sends SIGTERM to all processes of the run. Without the watchdog, MindSpore
  waits for the next row forever.
- If a pipeline is stopped or fails while a thread other than the main thread waits for a row, the run ends with
  SIGSEGV. The main thread must not wait for rows in C++ either, because it cannot handle signals there.
- An error whose message contains "MemoryError" ends the run with SIGKILL.
- With one worker, MindSpore starts no process and polls for rows ten times a second.

Therefore workers never raise an exception but return a row that contains its message; a separate thread waits for rows;
and before a pipeline is stopped, that thread receives a last row, so that it no longer waits.
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

COLUMNS = ["images", "labels", "dropout_masks", "messages"]
MEGABYTE = 2**20


class Batch(NamedTuple):
    """A micro-batch: images uint8 N,H,W,3, labels uint8 N,H,W, and dropout masks bool N,channels.

    ``unreadable`` contains the error message of each skipped file.
    """

    images: np.ndarray
    labels: np.ndarray
    dropout_masks: np.ndarray
    unreadable: tuple[str, ...]


Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def batches(stream: TrainStream, cfg: Config, *, world: World, step: int) -> Generator[Batch, None, None]:
    """Return a generator of this rank's micro-batches from ``step`` on; its ``close`` ends the workers.

    Args:
        stream: The training stream.
        cfg: The configuration.
        world: This process's rank and the number of ranks.
        step: The step of the first micro-batch.

    Returns:
        The generator. It raises an `OcrnetError` that names the file if a file is unreadable, and `OcrnetError` if a
        worker has died.

    Raises:
        OcrnetError: With workers, a sample needs more memory than ``max_rowsize``; the message contains the required
            value.
    """
    rows = Rows(stream, cfg, world, step)
    generator = _from_workers(rows) if cfg.num_workers else (rows.batch(number) for number in range(len(rows)))
    close_at_exit(generator)
    return generator


class Rows:
    """The source of the dataset: item i is micro-batch i of this rank, counted from ``step``, as a row of arrays."""

    def __init__(self, stream: TrainStream, cfg: Config, world: World, step: int) -> None:
        self.stream, self.sample_numbers = stream, StepBatchSampler(cfg, world, step)
        self.num_workers, self.prefetch_size = cfg.num_workers, cfg.prefetch_size
        self.megabytes = _row_megabytes(cfg, stream.channels) if cfg.num_workers else 0
        self.parent = os.getpid()
        self.worker_started = False

    def __len__(self) -> int:
        return len(self.sample_numbers)

    def batch(self, number: int) -> Batch:
        """Return micro-batch ``number``; raise `OcrnetError` if a file is unreadable."""
        samples = [self.stream[sample] for sample in self.sample_numbers[number]]
        images, labels, dropout_masks = (np.stack([sample[i] for sample in samples]) for i in range(3))
        return Batch(images, labels, dropout_masks, tuple(error for sample in samples for error in sample.unreadable))

    def __getitem__(self, number: int) -> Row:
        """Return micro-batch ``number`` as a row; an exception becomes a row with its message. Runs in a worker."""
        if not self.worker_started:
            begin_worker()
            threading.Thread(target=_exit_with_parent, args=(self.parent,), daemon=True).start()
            self.worker_started = True
        try:
            batch = self.batch(int(number))
        except OcrnetError as error:
            return _message_row(error=str(error))
        except Exception:
            return _message_row(bug=traceback.format_exc())
        return *batch[:3], _encode_messages({"unreadable": batch.unreadable})


def _row_megabytes(cfg: Config, channels: int) -> int:
    """Return the shared memory for a row in MB; raise `OcrnetError` if a sample exceeds ``max_rowsize``.

    The size is the smallest possible, because each worker allocates ``prefetch_size`` + 2 blocks of it at its start.
    """
    height, width = cfg.data.crop_size
    sample_bytes = height * width * 4 + channels
    sample_megabytes = math.ceil(sample_bytes / MEGABYTE)
    if sample_megabytes > cfg.max_rowsize:
        raise OcrnetError(
            f"a sample of data.crop_size [{height}, {width}] takes {sample_megabytes} MB but max_rowsize is "
            f"{cfg.max_rowsize}; "
            f"set max_rowsize: {sample_megabytes} or use smaller crops (without workers there is no such limit: "
            "--set num_workers=0)"
        )
    return sample_bytes * cfg.batch_size // MEGABYTE + 1


def _encode_messages(messages: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(messages).encode(), np.uint8)


def _message_row(**messages: str) -> Row:
    empty = np.zeros(1, np.uint8)
    return empty, empty, empty, _encode_messages(messages)


def _exit_with_parent(parent: int) -> None:
    """Exit this worker process when process ``parent`` has ended: a killed main process cannot end its workers."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class Workers(SamplerFn):
    """The worker processes of the dataset; `process` yields their rows in order until ``closed`` is set."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows, rows.num_workers, True, rows.megabytes)
        self.closed = threading.Event()
        self.failure = ""

    def launch(self, op_id: int = -1) -> None:
        """Start the processes; store an error message in ``failure``, because MindSpore kills the run for some."""
        try:
            with (
                _dataset_settings(prefetch_size=self._queue_size(), multiprocessing_start_method="fork"),
                _restored_start_method(),
            ):
                super().launch(op_id)
        except Exception as error:
            self.failure = str(error) or repr(error)
            raise RuntimeError("the workers did not start") from None
        finally:
            self.need_join = False  # otherwise MindSpore's shutdown waits for workers that hang
        for worker in self.workers:
            worker.res_queue._writer.close()  # else reading a row that a dead worker wrote in part waits forever

    def _queue_size(self) -> int:
        """Return MindSpore's prefetch setting for which each worker's queues hold ``prefetch_size`` rows."""
        return math.ceil(self.dataset.prefetch_size * max(self.num_worker, 4) / 4)

    def _launch_monitor(self) -> None:
        """Do not start MindSpore's process that sends SIGTERM to orphaned workers: they exit by themselves."""

    def process(self, indices: np.ndarray) -> Iterator[Row]:
        """Yield the rows of ``indices``; after a failure or when closed, yield rows with ``failure`` forever."""
        try:
            yield from self._rows(indices)
        except Exception:
            self.failure = traceback.format_exc()
        while self.failure or self.closed.is_set():
            yield _message_row(failure=self.failure)

    def _rows(self, indices: np.ndarray) -> Iterator[Row]:
        submitted = 0
        for number in range(len(indices)):
            while submitted < min(len(indices), number + self.num_worker * self.dataset.prefetch_size):
                self.workers[submitted % self.num_worker].put(indices[submitted])
                submitted += 1
            result_queue = self.workers[number % self.num_worker].res_queue
            while not multiprocessing.connection.wait([result_queue._reader], timeout=0.1):
                if self.closed.is_set():
                    return
            yield result_queue.get()


class Pipeline(mindspore.dataset.GeneratorDataset):
    """The GeneratorDataset of `Rows`, with `Workers` in place of MindSpore's workers, also for one worker."""

    def __init__(self, rows: Rows) -> None:
        # The number of workers is not passed, because MindSpore rejects one that exceeds the number of cores.
        super().__init__(rows, COLUMNS, shuffle=False)

    def prepare_multiprocessing(self) -> None:
        """Make MindSpore use `Workers` as the source of rows."""
        self.sample_fn = Workers(self.source)
        self.prepared_source = self.sample_fn.process


def _from_workers(rows: Rows) -> Generator[Batch, None, None]:
    if not len(rows):
        return
    with _dataset_settings(prefetch_size=1):  # the workers' queues do the prefetching
        iterator = Pipeline(rows).create_tuple_iterator(num_epochs=1, output_numpy=True)
    workers: Workers = iterator.dataset.sample_fn
    ready: queue.Queue[list[np.ndarray]] = queue.Queue(1)
    feeder = threading.Thread(target=_feed, args=(iterator, workers, ready), daemon=True)
    feeder.start()
    try:
        for number in range(len(rows)):
            row = _next(ready, workers)
            if number == 0:
                _restore_signal_handlers()
            yield _batch(row, workers)
    finally:
        _close(iterator, workers, feeder)


def _feed(iterator: Iterator[list[np.ndarray]], workers: Workers, ready: queue.Queue[list[np.ndarray]]) -> None:
    """Put rows into ``ready`` until closed; runs in the thread that waits in MindSpore and forks the workers.

    The signals that stop a run are blocked in this thread, and so in each worker until `begin_worker` unblocks them.
    """
    try:
        with block_signals():
            for row in iterator:
                _put(row, workers.closed, ready)
                if workers.closed.is_set():
                    return
    except Exception as error:
        _put(list(_message_row(failure=workers.failure or str(error))), workers.closed, ready)


def _put(row: list[np.ndarray], closed: threading.Event, ready: queue.Queue[list[np.ndarray]]) -> None:
    while not closed.is_set():
        with contextlib.suppress(queue.Full):
            ready.put(row, timeout=0.1)
            return


def _next(ready: queue.Queue[list[np.ndarray]], workers: Workers) -> list[np.ndarray]:
    while True:
        with contextlib.suppress(queue.Empty):
            return ready.get(timeout=1)
        _raise_if_worker_died(workers)


def _batch(row: list[np.ndarray], workers: Workers) -> Batch:
    messages = json.loads(row[3].tobytes())
    if "error" in messages:
        raise OcrnetError(messages["error"])
    if "bug" in messages:
        raise RuntimeError(f"exception in a data loader worker: {messages['bug']}")
    if "failure" in messages:
        _raise_if_worker_died(workers)
        raise OcrnetError(f"the data loader's workers failed: {messages['failure']}; {ADVICE}")
    return Batch(row[0], row[1], row[2], tuple(messages["unreadable"]))


def _raise_if_worker_died(workers: Workers) -> None:
    dead_workers = describe_dead_workers(workers.workers)
    if dead_workers:
        raise OcrnetError(f"{dead_workers}; {ADVICE}")


def _close(iterator: Any, workers: Workers, feeder: threading.Thread) -> None:
    """End the workers, the feeder thread and the pipeline, in this order; the module docstring gives the reason."""
    workers.closed.set()
    deadline = time.monotonic() + 30
    while feeder.is_alive() and time.monotonic() < deadline:
        for worker in list(workers.workers):
            worker.kill()  # ends it even if it hangs in a read, for which the feeder may wait
        feeder.join(timeout=0.05)
    for worker in workers.workers:
        worker.kill()
        worker.join()
    workers.workers.clear()  # frees the queues, which ends their threads, even if a traceback references ``workers``
    if not feeder.is_alive():
        iterator.stop()


@contextlib.contextmanager
def _dataset_settings(**values: Any) -> Iterator[None]:
    """Set MindSpore's process-wide dataset settings and restore them on exit."""
    config = mindspore.dataset.config
    before = {name: getattr(config, f"get_{name}")() for name in values}
    try:
        for name, value in values.items():
            getattr(config, f"set_{name}")(value)
        yield
    finally:
        for name, value in before.items():
            getattr(config, f"set_{name}")(value)


@contextlib.contextmanager
def _restored_start_method() -> Iterator[None]:
    """Restore multiprocessing's start method on exit: MindSpore changes it for the whole process."""
    before = multiprocessing.get_start_method(allow_none=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


def _restore_signal_handlers() -> None:
    """Install Python's signal handlers again: MindSpore has replaced them, which `signal.getsignal` does not show."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        return
    for number in (*SIGNALS, signal.SIGCHLD):
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)
