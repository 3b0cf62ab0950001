"""Record a training step as one CUDA graph, which launches its thousands of kernels at once."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ocrnet.engines.torch.bilinear import retain_matrices
from ocrnet.engines.torch.dataloader import Batch
from ocrnet.utils.errors import OcrnetError

# Number of steps before the recording: in these, cuDNN selects its algorithms and Triton compiles its kernels.
WARMUP = 3
Inputs = list[list[Tensor]]  # for each micro-batch: images, labels and dropout masks on the device
Step = Callable[[Inputs], tuple[Tensor, Tensor]]


class Recorder(Protocol):
    """Interface for running a function on the recording stream and for recording it as a graph."""

    def warm_up(self, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Run ``work`` on the recording stream and return its results."""

    def record(self, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
        """Record ``work`` without running it; return its result tensors and a function that computes their values."""


class StepGraph:
    """Training step that is recorded once and then replayed, with all tensors at fixed addresses.

    ``step`` must not synchronize the host with the device. It must read each value that changes between steps from a
    tensor that is updated in place. The first `WARMUP` steps are training steps too; they run without a graph.
    """

    def __init__(self, step: Step, recorder: Recorder, device: torch.device) -> None:
        self.step, self.recorder, self.device = step, recorder, device
        self.inputs: Inputs = []
        self.matrices: list[Tensor] = []
        self.steps_run = 0
        self.results: tuple[Tensor, Tensor] | None = None
        self.replay: Callable[[], None] = lambda: None

    def __call__(self, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Run the step on the micro-batches and return its results; the next call overwrites the returned tensors."""
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
    """Recorder that uses `torch.cuda.graph`; the warm-up runs on a side stream, as PyTorch requires."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def warm_up(self, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Run ``work`` on the recording stream, after the work of the current stream; return its results."""
        before = torch.cuda.current_stream()
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            results = work()
        before.wait_stream(self.stream)
        return results

    def record(self, work: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
        """Record ``work`` as a graph; return its result tensors and the function that replays it.

        Other threads, such as the one that pins batches, may call CUDA during the recording. Raise `OcrnetError` if
        ``work`` cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                results = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise OcrnetError(
                f"a step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}); remove cuda_graph"
            ) from error
        return results, graph.replay
