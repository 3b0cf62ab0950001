"""Record a whole training step as one CUDA graph, which sends its thousands of kernels to the GPU at once."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ocrnet.engines.torch.bilinear import retain_matrices
from ocrnet.engines.torch.dataloader import Batch
from ocrnet.utils.errors import OcrnetError

# Steps that run before one is recorded: in these, cuDNN selects its convolutions and Triton compiles.
WARMUP = 3
Inputs = list[list[Tensor]]  # for each micro-batch: images, labels and dropout masks, on the device
Step = Callable[[Inputs], tuple[Tensor, Tensor]]


class Recorder(Protocol):
    """Interface that runs work on a separate stream and records it for replay in the same memory."""

    def warm_up(self, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Run ``work`` on the stream of the recording and return its results."""

    def record(self, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
        """Record ``work`` without running it; return its result tensors and a function that replays it into them."""


class StepGraph:
    """Run a training step by replaying a recorded one; inputs, weights and results keep their place in memory.

    ``step`` must not synchronize the host with the device. It must read each value that changes between steps from a
    tensor that is updated in place. The first `WARMUP` steps are real training steps that run without a replay.
    """

    def __init__(self, step: Step, recorder: Recorder, device: torch.device) -> None:
        self.step, self.recorder, self.device = step, recorder, device
        self.inputs: Inputs = []
        self.matrices: list[Tensor] = []
        self.steps_run = 0
        self.results: tuple[Tensor, Tensor] | None = None
        self.replay: Callable[[], None] = lambda: None

    def __call__(self, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Run the step on these micro-batches; the next call overwrites the returned tensors."""
        if not self.inputs:
            self.inputs = [
                [torch.empty_like(part, device=self.device) for part in batch[:3]] for batch in micro_batches
            ]
        for buffers, batch in zip(self.inputs, micro_batches, strict=True):
            for buffer, part in zip(buffers, batch[:3], strict=True):
                buffer.copy_(part, non_blocking=True)
        self.steps_run += 1
        if self.steps_run <= WARMUP:
            return self.recorder.warm_up(self._work)
        if self.results is None:
            with retain_matrices() as self.matrices:
                self.results, self.replay = self.recorder.record(self._work)
        self.replay()
        return self.results

    def _work(self) -> tuple[Tensor, Tensor]:
        return self.step(self.inputs)


class CudaRecorder:
    """Recorder that uses `torch.cuda.graph` and follows its rules for the warm-up."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def warm_up(self, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Run ``work`` on the stream of the recording."""
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            results = work()
        before.wait_stream(self.stream)
        return results

    def record(self, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
        """Record one graph; other threads, such as the one that pins batches, may continue during the recording.

        Raise `OcrnetError` if the step cannot be recorded.
        """
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
