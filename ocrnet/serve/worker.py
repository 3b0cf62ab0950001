"""The worker thread, the only one that calls the network; it batches queued images of equal size and options."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from ocrnet.config import Eval
from ocrnet.serve.errors import HttpError, busy

# Limit in bytes of the total size of the images in progress; a single image is always accepted.
IMAGE_BYTES = 2**29


@dataclass(frozen=True)
class Prediction:
    """The prediction of an image.

    labels uint8 H,W; confidence uint8 H,W, where 255 is 1.0; relation uint8 num_classes,ceil(H/4),ceil(W/4), where 255
    is 1.0. ``tiles`` is the number of tiles that were predicted, and ``batch`` the number of images in the batch.
    """

    labels: np.ndarray
    confidence: np.ndarray | None = None
    relation: np.ndarray | None = None
    tiles: int = 1
    batch: int = 1


@dataclass(eq=False)
class Job:
    """An image uint8 H,W,3 RGB with its evaluation settings; ``future`` gets its prediction, and can be canceled.

    ``explain``: also predict confidence and relation.
    """

    image: np.ndarray
    eval_cfg: Eval
    explain: bool
    future: "Future[Prediction]" = field(default_factory=Future)

    @property
    def batch_key(self) -> tuple:
        """The properties that all jobs of a batch have in common."""
        return self.image.shape, self.eval_cfg, self.explain


class Worker:
    """A thread that predicts queued jobs, the oldest first, in batches.

    Args:
        predict: Returns the predictions of jobs with equal `Job.batch_key`.
        max_batch: The maximum number of jobs in a batch.
        batch_wait: The seconds to wait for more jobs of a batch.
        max_requests: The maximum number of requests in progress.
        log: Called with each exception of ``predict``.
        on_batch: Called after each batch with its number of images and its inference time in seconds.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[Job]], list[Prediction]],
        *,
        max_batch: int,
        batch_wait: float,
        max_requests: int,
        log: Callable[[BaseException], None],
        on_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        self._predict, self.max_batch = predict, max_batch
        self._batch_wait, self.max_requests = batch_wait, max_requests
        self._log, self._on_batch = log, on_batch
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.requests, self._bytes = 0, 0
        self._thread = threading.Thread(target=self._work, name="network", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Process the queued jobs, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """The number of queued images."""
        return len(self._jobs)

    def check_capacity(self) -> None:
        """Raise `HttpError` if the maximum number of requests is in progress; called before the body is read."""
        if self.requests >= self.max_requests:
            raise busy(f"{self.max_requests} requests are in progress, which is the limit; try again")

    def reserve(self, pixels: int) -> "Slot":
        """Return a slot for a request, held from decoding to its response.

        Raise `HttpError` if the maximum number of requests or the memory limit is reached.
        """
        self.check_capacity()
        # mutation: bound-images-in-memory
        if self._bytes and self._bytes + 3 * pixels > IMAGE_BYTES:
            raise busy("the images in progress reach the memory limit; try again")
        return Slot(self, 3 * pixels)

    def submit(self, job: Job) -> "Future[Prediction]":
        """Queue a job and return its future."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
        return job.future

    def _work(self) -> None:
        while jobs := self._next():
            start = time.monotonic()
            try:
                predictions = self._predict(jobs)
            except Exception as error:
                self._log(error)
                self._retry_separately(jobs, error)
                continue
            self._on_batch(len(jobs), time.monotonic() - start)
            for job, prediction in zip(jobs, predictions, strict=True):
                job.future.set_result(prediction)

    def _retry_separately(self, jobs: Sequence[Job], error: Exception) -> None:
        """Retry each image of a failed batch separately, because the batch may have run out of memory.

        A batch of one image is not retried; its future gets an error response.
        """
        for job in jobs:
            try:
                # mutation: failed-image-spares-its-batch
                job.future.set_result(self._predict([job])[0] if len(jobs) > 1 else _raise(error))
            except Exception as retry_error:
                if retry_error is not error:
                    self._log(retry_error)
                job.future.set_exception(HttpError(500, "inference failed for this image; see the server's log"))

    def _next(self) -> list[Job]:
        """Wait for jobs; return the oldest one and others with its key, or an empty list when the worker is closed."""
        with self._changed:
            while True:
                while not self._jobs:
                    if self._closed:
                        return []
                    self._changed.wait()
                first = self._jobs[0]
                deadline = time.monotonic() + self._batch_wait
                while self._count_like(first) < self.max_batch and not self._closed:
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        break
                    self._changed.wait(remaining)
                # mutation: batch-equal-sizes-only
                chosen = [job for job in self._jobs if job.batch_key == first.batch_key][: self.max_batch]
                for job in chosen:
                    self._jobs.remove(job)
                ready = [job for job in chosen if job.future.set_running_or_notify_cancel()]
                if ready:
                    return ready

    def _count_like(self, first: Job) -> int:
        return sum(job.batch_key == first.batch_key for job in self._jobs)


class Slot:
    """A context manager that counts a request in progress; use it only from the server's event loop."""

    def __init__(self, worker: Worker, size: int) -> None:
        self._worker, self._size = worker, size

    def __enter__(self) -> "Slot":
        self._worker.requests += 1
        self._worker._bytes += self._size
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.requests -= 1
        self._worker._bytes -= self._size


def _raise(error: Exception) -> Prediction:
    raise error
