"""The training stream in a MindSpore GeneratorDataset: worker processes read and augment, batches come out in order.

MindSpore starts, feeds and reads its worker processes, and a row of the dataset is one whole micro-batch, made by one
worker. What it does where something goes wrong is replaced here, because (seen with 2.10)

- its watchdog answers a dead worker with SIGTERM to the whole run, and without it the next row is waited for forever;
- a pipeline that is interrupted, or fails, while a thread other than the main one waits for a row ends the run with
  SIGSEGV, while the main thread must not wait in C++, where it could answer no signal;
- an error whose text holds "MemoryError" ends the run with SIGKILL;
- with one worker it starts no process, and it looks for a row ten times a second.

So a row is never an exception but may be the text of one, a thread of ours waits for rows, and a pipeline that is to
end first gives that thread a last row.
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
    """A micro-batch: images uint8 N,H,W,3, labels uint8 N,H,W, dropout masks bool N,channels; files passed over."""

    images: np.ndarray
    labels: np.ndarray
    keeps: np.ndarray
    unreadable: tuple[str, ...]


Row = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def batches(stream: TrainStream, cfg: Config, *, world: World, step: int) -> Generator[Batch, None, None]:
    """Return a generator of micro-batches from ``step`` on, whose ``close`` ends its workers.

    An unreadable file raises the `OcrnetError` that names it, also where a worker met it. One that says which value
    is needed is raised at once where a sample takes more memory than ``max_rowsize``.
    """
    rows = Rows(stream, cfg, world, step)
    made = _from_workers(rows) if cfg.num_workers else (rows.batch(number) for number in range(len(rows)))
    close_at_exit(made)
    return made


class Rows:
    """The micro-batches of this rank from ``step`` on, as rows of arrays: what the workers are asked for."""

    def __init__(self, stream: TrainStream, cfg: Config, world: World, step: int) -> None:
        self.stream, self.numbers = stream, StepBatchSampler(cfg, world, step)
        self.num_workers, self.prefetch_size = cfg.num_workers, cfg.prefetch_size
        self.megabytes = _row_megabytes(cfg, stream.channels) if cfg.num_workers else 0
        self.parent = os.getpid()
        self.begun = False

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, number: int) -> Batch:
        """Return micro-batch ``number``; an unreadable file raises `OcrnetError`."""
        samples = [self.stream[sample] for sample in self.numbers[number]]
        images, labels, keeps = (np.stack([sample[i] for sample in samples]) for i in range(3))
        return Batch(images, labels, keeps, tuple(error for sample in samples for error in sample.unreadable))

    def __getitem__(self, number: int) -> Row:
        """Return micro-batch ``number`` as a row, in a worker; whatever it raises is a row too."""
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
    """Return the MB of shared memory that a row takes; raise where a sample exceeds ``max_rowsize``.

    Each worker has ``prefetch_size`` + 2 such pieces of memory from the start, so they are no larger than needed.
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
    """End a worker whose run was killed, which could end it no more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class Workers(SamplerFn):
    """The worker processes of a dataset; `process` gives their rows in order until ``closed`` is set."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows, rows.num_workers, True, rows.megabytes)
        self.closed = threading.Event()
        self.failure = ""

    def launch(self, op_id: int = -1) -> None:
        """Start the processes; what goes wrong is kept, as MindSpore ends the run for some texts of an error."""
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
            self.need_join = False  # its own end of the workers waits for those that hang
        for worker in self.workers:
            worker.res_queue._writer.close()  # else a message that a dead worker began is waited for forever

    def _queue_size(self) -> int:
        """Return the prefetch size by which each worker's queues hold ``prefetch_size`` rows, however many workers."""
        return math.ceil(self.dataset.prefetch_size * max(self.num_worker, 4) / 4)

    def _launch_monitor(self) -> None:
        """Start no process that sends the workers SIGTERM when the run has ended: they see that themselves."""

    def process(self, indices: np.ndarray) -> Iterator[Row]:
        """Yield the rows of ``indices``; after a failure, or once closed, a last row again and again."""
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
    """The GeneratorDataset of `Rows`, with `Workers` in the place of MindSpore's own, also for one."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows, COLUMNS, shuffle=False)  # it refuses more workers than there are cores

    def prepare_multiprocessing(self) -> None:
        """Give MindSpore the workers and the rows that come from them."""
        self.sample_fn = Workers(self.source)
        self.prepared_source = self.sample_fn.process


def _from_workers(rows: Rows) -> Generator[Batch, None, None]:
    if not len(rows):
        return
    with _settings(prefetch_size=1):  # what is ready waits with the workers
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
    """Hand rows on until closed; the thread that waits in MindSpore, and from which the workers are forked.

    The signals that stop a run are held in it, and so in each worker until `begin_worker` lifts the hold.
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
        raise RuntimeError(f"in a loader worker: {notes['bug']}")
    if "failure" in notes:
        _raise_deaths(workers)
        raise OcrnetError(f"the loader's workers failed: {notes['failure']}; {ADVICE}")
    return Batch(row[0], row[1], row[2], tuple(notes["unreadable"]))


def _raise_deaths(workers: Workers) -> None:
    told = describe_dead_workers(workers.workers)
    if told:
        raise OcrnetError(f"{told}; {ADVICE}")


def _close(iterator: Any, workers: Workers, feeder: threading.Thread) -> None:
    """End the workers, the feeder and the pipeline, in this order: see the module's beginning."""
    workers.closed.set()
    end = time.monotonic() + 30
    while feeder.is_alive() and time.monotonic() < end:
        for worker in list(workers.workers):
            worker.kill()  # also one that hangs in a read; the feeder may wait for the rest of its message
        feeder.join(timeout=0.05)
    for worker in workers.workers:
        worker.kill()
        worker.join()
    workers.workers.clear()  # a queue's thread ends with it; a traceback may keep what this was called with
    if not feeder.is_alive():
        iterator.stop()


@contextlib.contextmanager
def _settings(**chosen: Any) -> Iterator[None]:
    """Set MindSpore's process-wide dataset settings for as long as this pipeline needs them."""
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
    """Undo that MindSpore sets Python's way to start processes, for everybody."""
    before = multiprocessing.get_start_method(allow_none=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


def _handlers_restored() -> None:
    """Put Python's handlers back where MindSpore set its own, of which `signal.getsignal` knows nothing."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
        return
    for number in (*SIGNALS, signal.SIGCHLD):
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)
