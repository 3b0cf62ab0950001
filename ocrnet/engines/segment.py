"""The loop of a training segment, which both engines share."""

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ocrnet.config import Config
from ocrnet.data.sampler import TrainStream
from ocrnet.distributed.launcher import World
from ocrnet.engines.base import Stats
from ocrnet.utils.errors import OcrnetError


class MicroBatch(Protocol):
    """The part of a micro-batch that does not depend on the engine."""

    @property
    def unreadable(self) -> tuple[str, ...]:
        """One message for each skipped file."""


_NO_STEP = (np.zeros((0, 2)), np.zeros(0, bool))

BatchT = TypeVar("BatchT", bound=MicroBatch)


class SegmentTraining(Generic[BatchT]):
    """Training segments by optimizer steps; the base class of both engines.

    A subclass implements `_open_loader`, `_take_step`, `_to_host` and `_memory`.
    """

    def __init__(self, cfg: Config, world: World, stream: TrainStream | None) -> None:
        self.cfg, self.world, self.stream = cfg, world, stream
        self.step = 0  # the number of completed optimizer steps
        self._loader: Generator[BatchT, None, None] | None = None
        self._failure: OcrnetError | None = None

    def train(self, steps: int, stopped: Callable[[], bool] = lambda: False) -> Stats:
        """Run up to ``steps`` optimizer steps; stop early if ``stopped()`` is true after a step.

        No result is copied to the host before the last step is launched. If a step fails, return the steps before it
        and raise its `OcrnetError` in the next call; if the first step fails, raise at once. Raise `OcrnetError` if the
        engine has no training stream.
        """
        if self.stream is None:
            raise OcrnetError("this engine was opened without a training stream")
        if self._failure is not None:
            raise self._failure
        if self._loader is None:
            self._loader = self._open_loader(self.stream)
        loader = self._loader
        self._begin_segment()
        results: list[tuple[Any, Any]] = []
        unreadable: list[str] = []
        start, waited = time.perf_counter(), 0.0
        while len(results) < steps and not (results and stopped()):
            requested = time.perf_counter()
            try:
                micro_batches = [next(loader) for _ in range(self.cfg.accumulate_steps)]
                waited += time.perf_counter() - requested
                results.append(self._take_step(micro_batches))
            except OcrnetError as error:
                self._failure = error
                if not results:
                    raise
                break
            unreadable += [error for batch in micro_batches for error in batch.unreadable]
            self.step += 1
        losses, finite = (self._to_host(values) for values in zip(*results, strict=True)) if results else _NO_STEP
        return Stats(
            loss=losses.astype(np.float64).reshape(-1, 2),
            finite=finite.astype(bool).reshape(-1),
            samples=len(results) * self.cfg.accumulate_steps * self.cfg.batch_size * self.world.size,
            seconds=time.perf_counter() - start,
            data_seconds=waited,
            memory_bytes=self._memory(),
            unreadable=tuple(unreadable),
        )

    def _set_position(self, step: int) -> None:
        """Continue the training stream at ``step``, without an earlier failure."""
        self.close_loader()
        # mutation: restore-stream-position
        self.step = step
        self._failure = None

    def close_loader(self) -> None:
        """Stop the workers of the data loader."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _open_loader(self, stream: TrainStream) -> Generator[BatchT, None, None]:
        """Return the micro-batches from ``self.step`` on."""
        raise NotImplementedError

    def _begin_segment(self) -> None:
        """Set the network to training mode."""
        raise NotImplementedError

    def _take_step(self, micro_batches: Sequence[BatchT]) -> tuple[Any, Any]:
        """Run one optimizer step; return the losses of both heads and whether it is finite, both on the device."""
        raise NotImplementedError

    def _to_host(self, values: Sequence[Any]) -> np.ndarray:
        """Copy values of the same shape to the host, stacked."""
        raise NotImplementedError

    def _memory(self) -> int:
        """Return the memory in use, as `Stats.memory_bytes` defines it."""
        raise NotImplementedError
