"""The formats of exported files, their metadata, and the interface of a runtime session."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from ocrnet.architecture import Arch
from ocrnet.weights import Weights

Format = Literal["onnx", "openvino", "torchscript", "torch_export", "mindir", "tensorrt"]
Precision = Literal["float32", "float16", "int8"]
Input = Literal["uint8", "normalised"]
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
# The libraries that write a format, and that run it; by the name they are imported by.
WRITERS: dict[Format, tuple[str, ...]] = {
    "onnx": ("torch", "onnx", "onnxruntime"),
    "openvino": ("torch", "onnx", "onnxruntime", "openvino"),
    "torchscript": ("torch",),
    "torch_export": ("torch",),
    "mindir": ("mindspore",),
    "tensorrt": ("torch", "onnx", "onnxruntime", "tensorrt"),
}
# The one JSON document in a file's metadata; a format without metadata has it in a file beside, of this ending.
DOCUMENT = "ocrnet"
BESIDE = ".json"


@dataclass(frozen=True)
class ExportMetadata:
    """What an exported file says of itself; ``size`` (height, width) is None where any size will do."""

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
    versions: dict[str, str]  # of ocrnet and of what wrote the file
    comparison: dict[str, Any]  # how its answers compare with the checkpoint's

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "ExportMetadata":
        """Return what `as_dict` gave, read back from JSON."""
        tree = {entry.name: tree[entry.name] for entry in dataclasses.fields(cls)}  # a later version may write more
        arch = Arch(**tree["arch"] | {"modules": tuple(tree["arch"]["modules"])})
        lists = {name: tuple(tree[name]) for name in ("names", "mean", "std")}
        palette, size = tuple(tuple(colour) for colour in tree["palette"]), tree["size"]
        found = cls(**tree | lists | {"arch": arch, "palette": palette, "size": size and tuple(size)})
        if len(found.names) != arch.num_classes or len(palette) != arch.num_classes:
            raise ValueError(f"{len(found.names)} names and {len(palette)} colours for {arch.num_classes} classes")
        numbers = (*found.mean, *found.std, *(found.size or (1, 1)), found.source["step"])
        if len(numbers) != 9 or not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("mean, std, size and step are no numbers")
        if found.input not in get_args(Input) or found.outputs not in get_args(Outputs):
            raise ValueError(f"input {found.input!r}, outputs {found.outputs!r}")
        return found


class Session(Protocol):
    """One exported file in its runtime."""

    document: dict[str, Any] | None  # what `ExportMetadata.as_dict` gave; None in a file of another maker
    runtime: str  # its name and version
    notes: list[str]  # what was chosen for this machine

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the first output for an input as the file takes it; MINDIR's is the OCR head's logits."""


@dataclass(frozen=True)
class Exported:
    """An exported file, opened; it stands where `Weights` do, but holds no tensors."""

    path: Path
    metadata: ExportMetadata
    session: Session

    @property
    def weights(self) -> Weights:
        """The file as far as it is like a checkpoint: architecture, classes, normalisation and step."""
        metadata = self.metadata
        classes = {"names": list(metadata.names), "palette": [list(colour) for colour in metadata.palette]}
        data = {"data": {"mean": metadata.mean, "std": metadata.std}}
        meta = {"config": data, "classes": classes, "step": metadata.source["step"]}
        return Weights(self.path, {}, metadata.arch, meta)


def format_of(path: str | Path) -> Format | None:
    """Return the format that a file's ending means, None for a checkpoint's."""
    return next((name for name, suffix in SUFFIXES.items() if Path(path).suffix == suffix), None)
