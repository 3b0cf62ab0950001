"""Export a trained network with its normalization and postprocessing as ONNX, TorchScript and torch.export files.

ONNX is exported from a traced graph (``dynamo=False``): torch.export takes ten times as long and requires another
library.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocrnet.architecture import Arch
from ocrnet.engines.torch.device import translate_oom
from ocrnet.engines.torch.ocr import OCRNet

OPSET = 18
# N,H,W of the example input for graphs of any size. The sides are odd so that every resize changes the size: a resize
# that does not would be missing from the trace.
ODD = (2, 65, 99)


class Portable(nn.Module):
    """The network with normalization and postprocessing, as it is exported.

    ``input_format`` is ``uint8`` (RGB images N,H,W,3) or another value for normalized float32 N,3,H,W. ``outputs``
    contains the names of the outputs: labels, probabilities, logits; docs/export.md describes them.
    """

    def __init__(
        self,
        arch: Arch,
        tensors: Mapping[str, np.ndarray],
        mean: Sequence[float],
        std: Sequence[float],
        input_format: str,
    ) -> None:
        super().__init__()
        self.network, self.input_format, self.outputs = OCRNet(arch, low_resolution=False), input_format, ("logits",)
        weights = {name: torch.tensor(tensors[name]) for name in self.network.state_dict()}
        self.network.load_state_dict(weights)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).mul(255).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).mul(255).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the tensors that ``outputs`` names, as a tuple, or as a tensor if there is only one.

        ``images`` has the format ``input_format``.
        """
        x = images
        if self.input_format == "uint8":
            x = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        logits = self.network(x)[1]
        tensors = {"logits": logits}
        if set(self.outputs) - {"logits"}:
            align_corners = self.network.rule.align_corners
            full = F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=align_corners)
            tensors |= {"labels": full.argmax(1).to(torch.uint8), "probabilities": full.softmax(1)}
        results = tuple(tensors[name] for name in self.outputs)
        return results if len(results) > 1 else results[0]

    def example(self, size: tuple[int, int] | None) -> Tensor:
        """Return an example input of ``size`` (height, width), or one for tracing a graph of any size if None."""
        number, height, width = (1, *size) if size else ODD
        if self.input_format == "uint8":
            return torch.zeros(number, height, width, 3, dtype=torch.uint8)
        return torch.zeros(number, 3, height, width)


def write_onnx(network: Portable, path: Path, size: tuple[int, int] | None) -> None:
    """Write an ONNX file with the outputs ``network.outputs``.

    Args:
        network: The network to export.
        path: The file to write.
        size: Height and width of the images; None: batch, height and width are dynamic.

    Raises:
        OcrnetError: Memory is exhausted.
    """
    names = {"images": (0, 1, 2) if network.input_format == "uint8" else (0, 2, 3), "logits": (0, 2, 3)}
    names |= {"labels": (0, 1, 2), "probabilities": (0, 2, 3)}
    axes = {name: dict(zip(names[name], ("batch", "height", "width"), strict=True)) for name in network.outputs}
    axes["images"] = dict(zip(names["images"], ("batch", "height", "width"), strict=True))
    if "logits" in axes:
        axes["logits"] = {0: "batch", 2: "quarter_height", 3: "quarter_width"}
    with _export_context():
        torch.onnx.export(
            network,
            (network.example(size),),
            str(path),
            input_names=["images"],
            output_names=list(network.outputs),
            opset_version=OPSET,
            dynamo=False,
            dynamic_axes=None if size else axes,
        )


def write_torchscript(network: Portable, path: Path, size: tuple[int, int] | None) -> None:
    """Write a TorchScript file.

    Args:
        network: The network to export.
        path: The file to write.
        size: Height and width of the images; None: batch, height and width are dynamic.

    Raises:
        OcrnetError: Memory is exhausted.
    """
    with _export_context():
        torch.jit.trace(network, network.example(size), check_trace=False).save(str(path))


def write_torch_export(network: Portable, path: Path, size: tuple[int, int]) -> None:
    """Write a .pt2 file (torch.export) for one image size.

    Args:
        network: The network to export.
        path: The file to write.
        size: Height and width of the images.

    Raises:
        OcrnetError: Memory is exhausted.
    """
    with _export_context():
        torch.export.save(torch.export.export(network, (network.example(size),)), str(path))


def add(source: Path, path: Path, texts: Mapping[str, str]) -> None:
    """Copy a TorchScript or .pt2 file and embed text files in the copy.

    Args:
        source: The file to copy.
        path: The file to write.
        texts: Content of each file to embed, by file name.

    Raises:
        OcrnetError: Memory is exhausted.
    """
    with _export_context():
        if source.suffix == ".pt2":
            torch.export.save(torch.export.load(str(source)), str(path), extra_files=dict(texts))
        else:
            torch.jit.load(str(source)).save(str(path), _extra_files=dict(texts))


@contextlib.contextmanager
def _export_context() -> Iterator[None]:
    """Suppress warnings, convert out-of-memory errors into `OcrnetError`, and disable inference mode.

    The warnings are those of a trace: branches depend on the input's size, and tracing is deprecated.
    """
    with warnings.catch_warnings(), translate_oom("use a smaller --size"), torch.inference_mode(False):
        warnings.simplefilter("ignore")
        yield
