"""The worker thread that owns the network; queued images of the same size and options can share a batch."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from ocrnet.config import Eval
from ocrnet.serve.errors import Refused, busy

# Limit in bytes of the memory that the images of all requests in progress hold; a single image is always accepted.
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
    """An image uint8 H,W,3 RGB with its evaluation options; a caller that no longer waits cancels ``future``.

    ``explain``: also return confidence and relation.
    """

    image: np.ndarray
    eval_cfg: Eval
    explain: bool
    future: "Future[Prediction]" = field(default_factory=Future)

    @property
    def kind(self) -> tuple:
        """The properties that all jobs of a batch share."""
        return self.image.shape, self.eval_cfg, self.explain


class Worker:
    """A thread that takes the oldest job first, with up to ``max_batch`` jobs of its kind in one batch."""

    def __init__(
        self,
        look: Callable[[Sequence[Job]], list[Prediction]],
        *,
        max_batch: int,
        batch_wait: float,
        max_requests: int,
        log: Callable[[BaseException], None],
        seen_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        self._look, self.max_batch, self._batch_wait, self.max_requests = look, max_batch, batch_wait, max_requests
        self._log, self._seen_batch = log, seen_batch
        self._jobs: deque[Job] = deque()
        self._news = threading.Condition()
        self._closed = False
        self.requests, self._bytes = 0, 0
        self._thread = threading.Thread(target=self._work, name="network", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Process the queued jobs, then end the thread."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """The number of queued images."""
        return len(self._jobs)

    def check_room(self) -> None:
        """Raise `Refused` if no further request is accepted; called before the body is read."""
        if self.requests >= self.max_requests:
            raise busy(f"{self.max_requests} requests are in progress, which is the limit; try again")

    def enter(self, pixels: int) -> "Place":
        """Return the slot of a request from decoding to its response; raise `Refused` if none is free."""
        self.check_room()
        # mutation: bound-images-in-memory
        if self._bytes and self._bytes + 3 * pixels > IMAGE_BYTES:
            raise busy("the images in progress reach the memory limit; try again")
        return Place(self, 3 * pixels)

    def submit(self, job: Job) -> "Future[Prediction]":
        """Queue a job and return its future."""
        with self._news:
            self._jobs.append(job)
            self._news.notify_all()
        return job.future

    def _work(self) -> None:
        while jobs := self._next():
            begun = time.monotonic()
            try:
                answers = self._look(jobs)
            except Exception as error:
                self._log(error)
                self._alone(jobs, error)
                continue
            self._seen_batch(len(jobs), time.monotonic() - begun)
            for job, answer in zip(jobs, answers, strict=True):
                job.future.set_result(answer)

    def _alone(self, jobs: Sequence[Job], error: Exception) -> None:
        """Retry each image of a failed batch separately, because the batch may have exceeded memory.

        A batch of one image is not retried: its future gets the error.
        """
        for job in jobs:
            try:
                # mutation: failed-image-spares-its-batch
                job.future.set_result(self._look([job])[0] if len(jobs) > 1 else _raise(error))
            except Exception as why:
                if why is not error:
                    self._log(why)
                job.future.set_exception(Refused(500, "inference failed for this image; see the server's log"))

    def _next(self) -> list[Job]:
        """Wait for jobs; return the oldest and those of its kind, or none when the worker is closed."""
        with self._news:
            while True:
                while not self._jobs:
                    if self._closed:
                        return []
                    self._news.wait()
                first = self._jobs[0]
                until = time.monotonic() + self._batch_wait
                while self._like(first) < self.max_batch and not self._closed:
                    left = until - time.monotonic()
                    if left <= 0:
                        break
                    self._news.wait(left)
                # mutation: batch-equal-sizes-only
                chosen = [job for job in self._jobs if job.kind == first.kind][: self.max_batch]
                for job in chosen:
                    self._jobs.remove(job)
                ready = [job for job in chosen if job.future.set_running_or_notify_cancel()]
                if ready:
                    return ready

    def _like(self, first: Job) -> int:
        return sum(job.kind == first.kind for job in self._jobs)


class Place:
    """The slot of a request in progress, held within ``with``; only the server's event loop enters and leaves it."""

    def __init__(self, worker: Worker, size: int) -> None:
        self._worker, self._size = worker, size

    def __enter__(self) -> "Place":
        self._worker.requests += 1
        self._worker._bytes += self._size
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.requests -= 1
        self._worker._bytes -= self._size


def _raise(error: Exception) -> Prediction:
    raise error
