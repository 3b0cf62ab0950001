"""Weights from files: ours, and foreign ones whose names one small table a family turns into canonical names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ocrnet import checkpoint, engine, spec
from ocrnet.errors import OcrnetError
from ocrnet.weights import ckpt, hrnet, mindspore

# The tag of our own JSON document in a .ckpt: a tensor of its bytes, which MindSpore reads and does not use.
DOCUMENT = "ocrnet.meta"


@dataclass(frozen=True)
class Weights:
    """Canonical tensors, the architecture they imply, and the metadata of our own files (empty for foreign ones)."""

    path: Path
    tensors: dict[str, np.ndarray]
    arch: spec.Arch
    meta: dict[str, Any]


def read(path: str | Path) -> Weights:
    """Read a file that holds a whole OCRNet; the architecture comes from its names and shapes."""
    path = Path(path)
    tensors, meta, variant = _read(path)
    head = meta.get("config", {}).get("ocr_head", {})
    shapes = {name: array.shape for name, array in tensors.items() if "/" not in name}
    try:
        arch = spec.infer(shapes, variant=head.get("variant", variant), align_corners=head.get("align_corners"))
    except OcrnetError as error:
        raise OcrnetError(f"{path}: {error}") from None
    spec.check(shapes, arch, str(path))
    return Weights(path, tensors, arch, meta)


def read_backbone(path: str | Path, arch: spec.Arch) -> tuple[dict[str, np.ndarray], str]:
    """Read HRNet ImageNet weights for the backbone of ``arch``: its tensors, and a report of what was loaded.

    Everything that the backbone has must be in the file with the right shape: nothing is loaded partly. What the file
    has beyond it (a classification head) is counted and named in the report.
    """
    path = Path(path)
    if not path.is_file():
        raise OcrnetError(f"backbone.backbone_ckpt: '{path}' does not exist")
    tensors = _read(path)[0]
    wanted = {name: shape for name, shape in spec.shapes(arch).items() if spec.is_backbone(name)}
    missing = [name for name in wanted if name not in tensors]
    differing = [name for name in wanted if name in tensors and tensors[name].shape != wanted[name]]
    unexpected = [name for name in tensors if name not in wanted]
    if missing or differing:
        wrong = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("of another shape", differing))
            if names
        )
        raise OcrnetError(f"backbone.backbone_ckpt: '{path}' does not fit backbone.width {arch.width}: {wrong}")
    beyond = sorted({name.split(".")[0] for name in unexpected})
    report = f"backbone: {len(wanted)} tensors loaded from {path}, 0 missing, {len(unexpected)} not used"
    return {name: tensors[name] for name in wanted}, report + (f" ({', '.join(beyond)})" if beyond else "")


def write_ckpt(path: Path, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write a state's weights and statistics as a MindSpore checkpoint under our Cells' names; see `ckpt.write`.

    ``meta`` goes with them, as in our own files: the architecture's rules, the classes, and the tensors' sha256.
    """
    plain = {name: array for name, array in tensors.items() if "/" not in name}
    text = checkpoint.document(plain, meta).encode()
    cells = {mindspore.cell_name(name): array for name, array in plain.items()}
    ckpt.write(path, {DOCUMENT: np.frombuffer(text, np.uint8), **cells})


def kind(path: Path) -> Literal["pth", "ckpt", "safetensors"]:
    """Tell a PyTorch file, zipped or bare pickle, from a MindSpore one by its first bytes; safetensors is the rest."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise OcrnetError(f"'{path}' cannot be read: {error.strerror}") from None
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "pth"
    is_safetensors = head[8:] == b"{"
    return "ckpt" if not is_safetensors and (ckpt.looks_like(head) or path.suffix == ".ckpt") else "safetensors"


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """Return a file's tensors under canonical names, its metadata, and the variant that its layout stands for."""
    what = kind(path)
    if what == "pth":
        return hrnet.canonical(engine.read_pth(path)), {}, "hrnet"
    if what == "safetensors":
        found = checkpoint.load(path)
        return found.tensors, found.meta, "hrnet"
    return _read_ckpt(path)


def _read_ckpt(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    stored = ckpt.read(path)
    text = stored.pop(DOCUMENT, None)
    try:
        tensors = mindspore.canonical(stored)
    except OcrnetError as error:
        raise OcrnetError(f"{path}: {error}") from None
    if text is None:
        return tensors, {}, "mindspore" if mindspore.is_relative(stored) else "hrnet"
    meta = checkpoint.opened(path, text.tobytes().decode("utf-8", "replace"))
    checkpoint.verify(path, tensors, meta)
    return tensors, meta, "hrnet"
