"""Formats of exported files, their metadata, and the interface of a session in a runtime."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from ocrnet.architecture import Arch
from ocrnet.weights import Weights

Format = Literal["onnx", "openvino", "torchscript", "torch_export", "mindir", "tensorrt"]
Precision = Literal["float32", "float16", "int8"]
Input = Literal["uint8", "normalized"]
Outputs = Literal["labels", "probabilities", "logits"]

FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[Format, str] = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "torchscript": ".torchscript",
    "torch_export": ".pt2",
    "mindir": ".mindir",
    "tensorrt": ".engine",
}
# Import names of the libraries that write and run each format.
WRITERS: dict[Format, tuple[str, ...]] = {
    "onnx": ("torch", "onnx", "onnxruntime"),
    "openvino": ("torch", "onnx", "onnxruntime", "openvino"),
    "torchscript": ("torch",),
    "torch_export": ("torch",),
    "mindir": ("mindspore",),
    "tensorrt": ("torch", "onnx", "onnxruntime", "tensorrt"),
}
# Key of the JSON document in a file's metadata. If a format has no metadata, the document is a separate file, named as
# the exported file with SIDECAR_SUFFIX appended.
DOCUMENT = "ocrnet"
SIDECAR_SUFFIX = ".json"


@dataclass(frozen=True)
class ExportMetadata:
    """Metadata of an exported file, stored as JSON; ``size`` is (height, width), or None for any size."""

    format: Format
    precision: Precision
    input: Input
    outputs: Outputs
    size: tuple[int, int] | None
    arch: Arch
    names: tuple[str, ...]
    palette: tuple[tuple[int, ...], ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    align_corners: bool
    source: dict[str, Any]  # file, sha256 and step of the checkpoint
    versions: dict[str, str]  # of ocrnet and of the libraries that wrote the file
    comparison: dict[str, Any]  # with the checkpoint: its results, the runtime and the images

    def as_dict(self) -> dict[str, Any]:
        """Return the metadata as a dict that JSON can represent."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "ExportMetadata":
        """Return the metadata from the result of `as_dict`; raise ValueError for invalid or contradictory values."""
        tree = {entry.name: tree[entry.name] for entry in dataclasses.fields(cls)}  # later versions may add keys
        arch = Arch(**tree["arch"] | {"modules": tuple(tree["arch"]["modules"])})
        lists = {name: tuple(tree[name]) for name in ("names", "mean", "std")}
        palette, size = tuple(tuple(color) for color in tree["palette"]), tree["size"]
        metadata = cls(**tree | lists | {"arch": arch, "palette": palette, "size": size and tuple(size)})
        if len(metadata.names) != arch.num_classes or len(palette) != arch.num_classes:
            raise ValueError(f"{len(metadata.names)} names and {len(palette)} colors for {arch.num_classes} classes")
        numbers = (*metadata.mean, *metadata.std, *(metadata.size or (1, 1)), metadata.source["step"])
        if len(numbers) != 9 or not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("mean, std, size and step must be numbers")
        if metadata.input not in get_args(Input) or metadata.outputs not in get_args(Outputs):
            raise ValueError(f"input {metadata.input!r}, outputs {metadata.outputs!r}")
        return metadata


class Session(Protocol):
    """One exported file, opened in its runtime."""

    document: dict[str, Any] | None  # from `ExportMetadata.as_dict`; None if the file has none
    runtime: str  # name and version of the runtime
    notes: list[str]  # choices made for this machine

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the output for a batch in the file's input format; for MINDIR, the logits of the OCR head."""


@dataclass(frozen=True)
class Exported:
    """An exported file, open in its runtime; it replaces the `Weights` of a checkpoint."""

    path: Path
    metadata: ExportMetadata
    session: Session

    @property
    def weights(self) -> Weights:
        """`Weights` without tensors: architecture, classes, normalization and step of the file."""
        metadata = self.metadata
        classes = {"names": list(metadata.names), "palette": [list(color) for color in metadata.palette]}
        data = {"data": {"mean": metadata.mean, "std": metadata.std}}
        meta = {"config": data, "classes": classes, "step": metadata.source["step"]}
        return Weights(self.path, {}, metadata.arch, meta)


def format_of(path: str | Path) -> Format | None:
    """Return the export format that a file's suffix means, or None, for example for a checkpoint."""
    return next((name for name, suffix in SUFFIXES.items() if Path(path).suffix == suffix), None)
