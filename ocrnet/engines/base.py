"""The interface that each framework implements for the rest of the package; inputs and outputs are NumPy arrays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ocrnet.distributed.launcher import World
from ocrnet.engines.tta import Pass
from ocrnet.utils.errors import OcrnetError

OUTPUTS = ("labels", "confidence", "probabilities")
ATTENTION = ("regions", "relation")


@dataclass(frozen=True)
class Stats:
    """Results of one training segment; ``loss``, ``finite`` and ``samples`` cover all ranks."""

    loss: np.ndarray  # float64 steps,heads: the unweighted loss of the aux head and of the ocr head
    finite: np.ndarray  # bool steps: whether the step was applied; a step that was not changed nothing
    samples: int
    seconds: float
    data_seconds: float  # part of ``seconds``: waiting for the data loader
    memory_bytes: int  # GPU: peak memory of the device; CPU: current resident memory
    unreadable: tuple[str, ...] = ()  # with data.on_error: skip, the error of each skipped file


class Engine(Protocol):
    """One framework on one device; inputs and outputs are NumPy arrays.

    Each rank has its own engine. ``train`` and ``sum`` are collectives: all ranks call them in the same order. The
    other methods are not collectives and do not wait for other ranks.
    """

    world: World
    startup_messages: Sequence[str]  # for the log: device, precision and other choices, each with its reason
    versions: Mapping[str, str]  # for the checkpoint: the framework and the libraries and devices that it uses

    def train(self, steps: int, stopped: Callable[[], bool] = lambda: False) -> Stats:
        """Run up to ``steps`` optimizer steps; stop early when ``stopped()`` is true after a step.

        If a step fails (an unreadable file, out of memory), the steps before it are returned and the next call raises
        its `OcrnetError`. If the first step fails, this call raises it. Whenever this method raises, the state is as
        the last return left it.
        """

    def predict(
        self, images: np.ndarray, passes: Sequence[Pass], outputs: Sequence[str] = ("labels",)
    ) -> dict[str, np.ndarray]:
        """Predict images, averaged over ``passes``.

        Args:
            images: uint8 N,H,W,3, RGB.
            passes: The forward passes to average over.
            outputs: Names from `OUTPUTS` and `ATTENTION`. The names in `ATTENTION` need a single pass over whole
                images without flip, and one additional forward pass.

        Returns:
            The requested outputs by name:

            - labels: uint8 N,H,W.
            - confidence: float32 N,H,W, the probability of the predicted class.
            - probabilities: float32 N,num_classes,H,W, the mean over the passes of the softmax at full resolution.
            - regions: float32 N,num_classes,ceil(H/4),ceil(W/4) with H and W of the pass, the spatial distribution of
              each class's object region, with sum 1 over the pixels (formula 1 of the OCR paper).
            - relation: same shape and dtype as regions, the attention weight of each region for each pixel, with sum
              1 over the classes (formula 4).

        Raises:
            OcrnetError: An output is unknown or unavailable for these passes, or memory is exhausted.
        """

    def logits(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (aux, ocr), each float32 N,num_classes,ceil(H/4),ceil(W/4), for normalized float32 N,3,H,W."""

    def state(self) -> dict[str, np.ndarray]:
        """Return weights, batch-norm statistics, momentum/<name> and scaler/<name> under canonical names."""

    def restore(self, state: Mapping[str, np.ndarray], step: int) -> None:
        """Load a state, complete or weights only, and set the position in the training stream to ``step``."""

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return the sum over the ranks, which is exact for int64."""

    def close(self) -> None:
        """Release the data loader's workers and the process groups."""


def check_outputs(outputs: Sequence[str], passes: Sequence[Pass]) -> None:
    """Raise `OcrnetError` if `Engine.predict` cannot compute these outputs for these passes (scales, flip, windows)."""
    known = (*OUTPUTS, *ATTENTION)
    if unknown := sorted(set(outputs) - set(known)):
        raise OcrnetError(f"predict has no output {unknown}; it has {', '.join(known)}")
    attention = [name for name in outputs if name in ATTENTION]
    if attention and (len(passes) > 1 or passes[0].flip or len(passes[0].windows) > 1):
        raise OcrnetError(
            f"{' and '.join(attention)}: requires a single pass over whole images; leave out scales, flip and slide"
        )
