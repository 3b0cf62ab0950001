"""The interface of an engine, implemented once per framework; inputs and outputs are NumPy arrays."""

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
    """Results of one call of `Engine.train`; ``loss``, ``finite`` and ``samples`` are totals over all ranks."""

    loss: np.ndarray  # float64 steps,2: losses of the aux and ocr heads, without the factors loss.aux and loss.ocr
    finite: np.ndarray  # bool steps: whether loss and gradients were finite; if not, the step changed nothing
    samples: int
    seconds: float
    data_seconds: float  # the part of ``seconds`` spent waiting for the data loader
    memory_bytes: int  # GPU: peak memory of the device; CPU: current resident memory
    unreadable: tuple[str, ...] = ()  # with data.on_error: skip, the error message of each skipped file


class Engine(Protocol):
    """A network on one device, in one framework; inputs and outputs are NumPy arrays.

    Each rank has its own engine. ``train`` and ``sum`` are collectives: all ranks call them in the same order. The
    other methods are not collectives and do not wait for other ranks.
    """

    world: World
    device_target: str  # CPU, GPU or Ascend
    startup_messages: Sequence[str]  # log lines about device, precision and other choices, each with its reason
    versions: Mapping[str, str]  # checkpoint metadata: versions of the framework and its libraries, device names

    def train(self, steps: int, stopped: Callable[[], bool] = lambda: False) -> Stats:
        """Run up to ``steps`` optimizer steps; stop early when ``stopped()`` is true after a step.

        If a step fails (an unreadable file, out of memory), this call returns the results of the steps before it, and
        the next call raises the `OcrnetError`. If the first step fails, this call raises it. When this method raises,
        the state is that after the last successful step.
        """

    def predict(
        self, images: np.ndarray, passes: Sequence[Pass], outputs: Sequence[str] = ("labels",)
    ) -> dict[str, np.ndarray]:
        """Predict images; average the class probabilities over ``passes``.

        Args:
            images: uint8 N,H,W,3, RGB.
            passes: The forward passes to average over.
            outputs: Names from `OUTPUTS` and `ATTENTION`. Those in `ATTENTION` require a single pass over whole images
                without flip; they cost one additional forward pass.

        Returns:
            The requested outputs by name:

            - labels: uint8 N,H,W.
            - confidence: float32 N,H,W, the probability of the predicted class.
            - probabilities: float32 N,num_classes,H,W, the mean over the passes of the softmax at full resolution.
            - regions: float32 N,num_classes,ceil(H/4),ceil(W/4), where H,W is the size of the pass: the soft object
              region of each class, normalized over the pixels (OCR paper, formula 1).
            - relation: same shape and dtype as regions: the attention weight of each object region for each pixel,
              normalized over the classes (formula 4).

        Raises:
            OcrnetError: An output is unknown or unavailable for these passes, or memory is exhausted.
        """

    def logits(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the logits of both heads for normalized images.

        ``x`` is float32 N,3,H,W. The result is (aux, ocr), each float32 N,num_classes,ceil(H/4),ceil(W/4).
        """

    def state(self) -> dict[str, np.ndarray]:
        """Return a copy of the complete state by name.

        Weights and batch norm statistics have their canonical names, momentum has momentum/NAME, and the loss scale
        has scaler/NAME. An engine without a training stream returns only weights and batch norm statistics.
        """

    def restore(self, state: Mapping[str, np.ndarray], step: int) -> None:
        """Load a state and continue the training stream at ``step``; momentum and loss scale may be missing."""

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return the sum of ``array`` over the ranks, exact for int64; shape and dtype must match on all ranks."""

    def close(self) -> None:
        """Stop the data loader's workers and leave the process group."""


def check_outputs(outputs: Sequence[str], passes: Sequence[Pass]) -> None:
    """Raise `OcrnetError` if an output is unknown, or if `Engine.predict` cannot compute it for these passes."""
    known = (*OUTPUTS, *ATTENTION)
    if unknown := sorted(set(outputs) - set(known)):
        raise OcrnetError(f"predict: unknown outputs {', '.join(unknown)}; available: {', '.join(known)}")
    attention = [name for name in outputs if name in ATTENTION]
    if attention and (len(passes) > 1 or passes[0].flip or len(passes[0].windows) > 1):
        raise OcrnetError(
            f"{' and '.join(attention)}: requires a single pass over whole images; remove scales, flip and slide"
        )
