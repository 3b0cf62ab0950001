"""Weights from files: ours, and foreign ones whose names one small table a family turns into canonical names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ocrnet import checkpoint, engine, spec
from ocrnet.errors import OcrnetError
from ocrnet.weights import hrnet


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
    if is_pickle(path):
        tensors, meta = hrnet.canonical(engine.read_pth(path)), {}
    else:
        found = checkpoint.load(path)
        tensors, meta = found.tensors, found.meta
    head = meta.get("config", {}).get("ocr_head", {})
    shapes = {name: array.shape for name, array in tensors.items() if "/" not in name}
    try:
        arch = spec.infer(shapes, variant=head.get("variant", "hrnet"), align_corners=head.get("align_corners"))
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
    tensors = hrnet.canonical(engine.read_pth(path)) if is_pickle(path) else checkpoint.load(path).tensors
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


def is_pickle(path: Path) -> bool:
    """Say whether a file is a PyTorch one, zipped or bare pickle, by its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise OcrnetError(f"'{path}' cannot be read: {error.strerror}") from None
    return head.startswith((b"PK\x03\x04", b"\x80\x02"))
