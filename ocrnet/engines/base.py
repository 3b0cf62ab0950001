"""The interface that each framework implements for the rest of the package, with NumPy arrays on both sides."""

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
    """What a segment of training did, on all ranks together."""

    loss: np.ndarray  # float64 steps,heads: the aux and the ocr head's loss, not yet weighted
    finite: np.ndarray  # bool steps: whether the step was taken; otherwise it left everything unchanged
    samples: int
    seconds: float
    data_seconds: float  # of which: waiting for the loader
    memory_bytes: int  # GPU: the device's peak; CPU: resident now
    unreadable: tuple[str, ...] = ()  # with data.on_error: skip, what was wrong with each file that was passed over


class Engine(Protocol):
    """One framework on one device, NumPy on both sides.

    Of several ranks each has its own. ``train`` and ``sum`` are collectives, which all ranks call in the same order;
    the other methods are not, and wait for no other rank.
    """

    world: World
    startup_messages: Sequence[str]  # device, precision and what else was chosen, each with its reason: for the log
    versions: Mapping[str, str]  # of the framework and of what it computes with: for the checkpoint

    def train(self, steps: int, stopped: Callable[[], bool] = lambda: False) -> Stats:
        """Take ``steps`` optimizer attempts from where the state stands; fewer where ``stopped`` says so after one.

        Where a step fails (an unreadable file, no memory), the steps before it are returned and the next call raises
        its `OcrnetError`: a raise always finds the state as the last return left it.
        """

    def predict(
        self, images: np.ndarray, passes: Sequence[Pass], outputs: Sequence[str] = ("labels",)
    ) -> dict[str, np.ndarray]:
        """Look at uint8 N,H,W,3 RGB images through ``passes``.

        Of `OUTPUTS`, as asked: labels uint8 N,H,W; confidence float32 N,H,W, the winning class's probability;
        probabilities float32 N,num_classes,H,W, the mean over the passes of the softmax at full resolution.

        Of `ATTENTION`, for a single pass of whole images, not mirrored, at a quarter of its size, float32
        N,num_classes,ceil(H/4),ceil(W/4): regions, where each class's object region lies, adding up to 1 over the
        pixels (formula 1 of the OCR paper); relation, what each pixel takes from each region, adding up to 1 over the
        classes (formula 4). They run the network once more.
        """

    def logits(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (aux, ocr), each float32 N,num_classes,ceil(H/4),ceil(W/4), for normalised float32 N,3,H,W."""

    def state(self) -> dict[str, np.ndarray]:
        """Return weights, BN statistics, momentum/<name> and scaler/<name> under canonical names."""

    def restore(self, state: Mapping[str, np.ndarray], step: int) -> None:
        """Take over a state, complete or weights alone, and the place in the stream."""

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return the sum over the ranks, exact for int64."""

    def close(self) -> None:
        """Release loader workers and process groups."""


def check_outputs(outputs: Sequence[str], passes: Sequence[Pass]) -> None:
    """Raise `OcrnetError` where `Engine.predict` cannot give these outputs for these passes."""
    known = (*OUTPUTS, *ATTENTION)
    if unknown := sorted(set(outputs) - set(known)):
        raise OcrnetError(f"predict has no output {unknown}; it has {', '.join(known)}")
    asked = [name for name in outputs if name in ATTENTION]
    if asked and (len(passes) > 1 or passes[0].flip or len(passes[0].windows) > 1):
        raise OcrnetError(f"{' and '.join(asked)}: of one look at whole images alone; leave out scales, flip and slide")
