"""The door between core and frameworks: what an engine offers, and the one place that imports an engine."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ocrnet.config import Config
from ocrnet.errors import OcrnetError
from ocrnet.passes import Pass
from ocrnet.spec import Arch
from ocrnet.stream import TrainStream
from ocrnet.world import World

Framework = Literal["torch", "mindspore"]
NOT_INSTALLED: dict[Framework, str] = {
    "torch": "PyTorch is not installed: pip install -r requirements.txt",
    "mindspore": "MindSpore is not installed: from a clone, pip install -e '.[mindspore]'",
}
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
    decisions: Sequence[str]  # what was chosen for this device, and why: for the start banner
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


def open_engine(cfg: Config, arch: Arch, *, world: World, stream: TrainStream | None = None) -> Engine:
    """Return the engine that the config chooses, importing its framework alone; ``stream`` is what it trains on."""
    if choose_engine(cfg) == "torch":
        from ocrnet.engines.torch.engine import TorchEngine

        return TorchEngine(cfg, arch, world=world, stream=stream)
    from ocrnet.engines.mindspore import ranks

    ranks.prepare(world, cfg.device_target, cfg.rank_timeout)
    from ocrnet.engines.mindspore.engine import MindSporeEngine

    return MindSporeEngine(cfg, arch, world=world, stream=stream)


def choose_engine(cfg: Config) -> Framework:
    """Return the engine that the config asks for, else the one for its device; raise where it is not installed.

    Ascend means MindSpore. Elsewhere PyTorch goes first, except on a machine with an Ascend and no device asked for.
    """
    if cfg.engine == "torch" and cfg.device_target == "Ascend":
        raise OcrnetError(
            "--engine torch does not run on Ascend; use --device_target CPU or GPU, or --engine mindspore"
        )
    frameworks: tuple[Framework, ...] = ("torch", "mindspore")
    found = [name for name in frameworks if installed(name)]
    if cfg.engine != "auto" or cfg.device_target == "Ascend":
        wanted: Framework = "mindspore" if cfg.engine == "mindspore" or cfg.device_target == "Ascend" else "torch"
        if wanted not in found:
            raise OcrnetError(f"{NOT_INSTALLED[wanted]}, or leave --engine and --device_target out")
        return wanted
    if not found:
        raise OcrnetError(NOT_INSTALLED["torch"])
    ascend = cfg.device_target is None and Path("/dev/davinci_manager").exists()
    return "mindspore" if found == ["mindspore"] or (ascend and "mindspore" in found) else "torch"


def installed(name: Framework) -> bool:
    """Say whether a framework can be imported; a folder of its name on the path is none."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a PyTorch weights file; no code in it is run. Needs torch."""
    if not installed("torch"):
        raise OcrnetError(f"{path}: reading a .pth file needs PyTorch: pip install -r requirements.txt")
    from ocrnet.engines.torch.pth import read

    return read(path)


def write_pth(path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any] | None = None) -> None:
    """Write a PyTorch state dict, with ``meta`` beside it where given. Needs torch."""
    if not installed("torch"):
        raise OcrnetError(f"{path}: writing a .pth file needs PyTorch: pip install -r requirements.txt")
    from ocrnet.engines.torch.pth import write

    write(path, tensors, meta)
