"""A whole training step as one CUDA graph: the thousands of kernels of a step are sent to the GPU at once."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ocrnet.engines.torch.bilinear import matrices_held
from ocrnet.engines.torch.dataloader import Batch
from ocrnet.utils.errors import OcrnetError

# Steps taken as they are before one is recorded: cuDNN chooses its convolutions in them, and Triton compiles.
WARMUP = 3
Inputs = list[list[Tensor]]  # of each micro-batch: images, labels and dropout masks, on the device
Step = Callable[[Inputs], tuple[Tensor, Tensor]]


class Recorder(Protocol):
    """What can run work beside, and record it to be run again with the same memory."""

    def aside(self, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Do work where recording will take place."""

    def record(self, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
        """Note what ``work`` would do, without doing it; return its results' tensors, and what does it into them."""


class StepGraph:
    """Takes a step by repeating a recorded one: on inputs, weights and results that stay where they are in memory.

    ``step`` must ask the device nothing, and take whatever changes from step to step from tensors that are changed in
    place. The first steps are real ones too, taken as they are.
    """

    def __init__(self, step: Step, recorder: Recorder, device: torch.device) -> None:
        self.step, self.recorder, self.device = step, recorder, device
        self.inputs: Inputs = []
        self.matrices: list[Tensor] = []
        self.taken = 0
        self.results: tuple[Tensor, Tensor] | None = None
        self.replay: Callable[[], None] = lambda: None

    def __call__(self, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Take the step on these micro-batches; what it returns is overwritten by the next."""
        if not self.inputs:
            self.inputs = [[torch.empty_like(part, device=self.device) for part in b[:3]] for b in micro_batches]
        for places, batch in zip(self.inputs, micro_batches, strict=True):
            for place, part in zip(places, batch[:3], strict=True):
                place.copy_(part, non_blocking=True)
        self.taken += 1
        if self.taken <= WARMUP:
            return self.recorder.aside(self._work)
        if self.results is None:
            with matrices_held() as self.matrices:
                self.results, self.replay = self.recorder.record(self._work)
        self.replay()
        return self.results

    def _work(self) -> tuple[Tensor, Tensor]:
        return self.step(self.inputs)


class CudaRecorder:
    """Records with `torch.cuda.graph`, whose rules for warming up these are."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def aside(self, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Do work on the stream of the recording."""
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            results = work()
        before.wait_stream(self.stream)
        return results

    def record(self, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
        """Record one graph; other threads, such as the one that pins batches, may go on meanwhile."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                results = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise OcrnetError(
                f"a step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}); leave cuda_graph out"
            ) from error
        return results, graph.replay
