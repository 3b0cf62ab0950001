"""Reading weights from our files and from files of other implementations.

The family of a file is inferred from its tensor names. Each family is a small table (`Family`) in a separate module:
`hrnet`, `openseg`, `nvidia`, `mmseg`, `paddleseg`, `mindspore`, `timm`.
"""

import logging
import re
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ocrnet import architecture
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import (
    checkpoint,
    ckpt,
    formats,
    hrnet,
    load_report,
    mindspore,
    mmseg,
    nvidia,
    openseg,
    paddleseg,
    timm,
)
from ocrnet.weights.family import IMAGENET, Converted, Family, strip_prefixes
from ocrnet.weights.load_report import first_names, is_counter

logger = logging.getLogger(__name__)

# The first family whose mark matches a name is used, so families with few distinctive names come last.
FAMILIES = (
    mindspore.FAMILY,
    mmseg.FAMILY,
    paddleseg.FAMILY,
    nvidia.FAMILY,
    openseg.FAMILY,
    openseg.INPLACE,
    mindspore.CELLS,
    timm.FAMILY,
    hrnet.FAMILY,
)

# Name of the uint8 tensor with our JSON document in a .ckpt file; MindSpore loads this tensor and does not use it.
DOCUMENT = "ocrnet.meta"

# Tensors of the heads that are needed to infer the architecture.
_HEAD_SIZES = ("conv3x3_ocr.0.weight", f"{architecture.BLOCK}.f_pixel.0.weight", "cls_head.weight")


@dataclass(frozen=True)
class Weights:
    """Loaded weights: tensors by canonical name, the architecture inferred from them, and the file's metadata.

    For a file of another implementation (``foreign``), ``meta`` holds only the normalization, if it is not ImageNet's.
    """

    path: Path
    tensors: dict[str, np.ndarray]
    arch: architecture.Arch
    meta: dict[str, Any]
    foreign: bool = False


@dataclass(frozen=True)
class _Stored:
    """The tensors of a file by canonical name, and its metadata; ``family`` is None if the file is ours."""

    converted: Converted
    meta: dict[str, Any]
    family: Family | None

    @property
    def variant(self) -> str:
        return self.family.variant if self.family else "hrnet"


def read(path: str | Path, *, allow_partial: bool = False) -> Weights:
    """Read the weights file of an OCRNet; the architecture is inferred from names and shapes of the tensors.

    With ``allow_partial``, missing tensors get the initial values of `architecture.init`, and unknown ones are left
    out; both are logged. Otherwise, raise OcrnetError if tensors are missing or unknown.
    """
    path = Path(path)
    stored = _read(path)
    tensors, head = stored.converted.tensors, stored.meta.get("config", {}).get("ocr_head", {})
    shapes = {name: array.shape for name, array in tensors.items() if stored.family or "/" not in name}
    hints = _with_default_head(shapes) if allow_partial else shapes
    try:
        variant, align_corners = head.get("variant", stored.variant), head.get("align_corners")
        arch = architecture.infer(hints, variant=variant, align_corners=align_corners)
    except OcrnetError as error:
        raise OcrnetError(f"{path}: {error}") from None
    table = architecture.shapes(arch)
    missing = [name for name in table if name not in shapes]
    unexpected = [name for name in shapes if name not in table]
    if allow_partial:
        shapes = table | {name: shape for name, shape in shapes.items() if name in table}
    architecture.check(shapes, arch, str(path))
    _check_floating_point(path, tensors, table)
    load_report.log(stored.family, stored.converted, arch, len(table) - len(missing), missing, unexpected)
    if allow_partial:
        fresh = architecture.init(arch, seed=0)
        tensors = {name: tensors.get(name, fresh[name]) for name in table}
    return Weights(path, tensors, arch, stored.meta, foreign=stored.family is not None)


def identity(loaded: Weights) -> str:
    """Return a text with the file's name and a CRC-32 of its tensors, to compare weights between ranks."""
    digest = 0
    for name in sorted(loaded.tensors):
        digest = zlib.crc32(np.ascontiguousarray(loaded.tensors[name]).data, digest)
    return f"{loaded.path.name}, the CRC-32 of its tensors is {digest:08x}"


def read_backbone(path: str | Path, arch: architecture.Arch) -> dict[str, np.ndarray]:
    """Read HRNet weights for the backbone of ``arch``; return its tensors by canonical name.

    Raise OcrnetError unless the file holds every tensor of the backbone with the shape of ``arch``. The other tensors
    of the file, such as those of a classification head, are counted in the log.
    """
    path = Path(path)
    if not path.is_file():
        raise OcrnetError(f"backbone.backbone_ckpt: '{path}' does not exist")
    stored = _read(path)
    loaded = _backbone(path, stored, arch)
    unused = [
        name
        for name in (*stored.converted.tensors, *stored.converted.left_out)
        if name not in loaded and not is_counter(name)
    ]
    modules = sorted({name.removeprefix("backbone.").split(".")[0] for name in unused})
    report = f"backbone: {len(loaded)} tensors loaded from {path}, 0 missing, {len(unused)} not used"
    report += f" ({', '.join(modules)})" if modules else ""
    if stored.family:
        report += f"; {stored.family.title}" + (f": {stored.family.note}" if stored.family.note else "")
    logger.info(report)
    return loaded


def _backbone(path: Path, stored: "_Stored", arch: architecture.Arch) -> dict[str, np.ndarray]:
    """Return the tensors of the backbone of ``arch``; raise OcrnetError if one is missing or does not fit."""
    tensors = stored.converted.tensors
    expected = {name: shape for name, shape in architecture.shapes(arch).items() if architecture.is_backbone(name)}
    missing = [name for name in expected if name not in tensors]
    differing = [name for name in expected if name in tensors and tensors[name].shape != expected[name]]
    if missing or differing:
        wrong = "; ".join(
            f"{len(names)} {what} ({first_names(names, 3)})"
            for what, names in (("missing", missing), ("with another shape", differing))
            if names
        )
        raise OcrnetError(f"backbone.backbone_ckpt: '{path}' does not match backbone.width {arch.width}: {wrong}")
    _check_floating_point(path, tensors, expected)
    return {name: tensors[name] for name in expected}


def read_only_backbone(path: Path) -> tuple[dict[str, np.ndarray], architecture.Arch] | None:
    """Read an HRNet without heads; return None if the file holds anything else.

    Returns:
        The tensors by canonical name, and an architecture with this backbone.
    """
    stored = _read(path)
    tensors = stored.converted.tensors
    if not tensors or not all(architecture.is_backbone(name) for name in tensors):
        return None
    shapes = {name: array.shape for name, array in tensors.items()}
    try:
        arch = architecture.infer(_with_default_head(shapes), variant=stored.variant)
    except OcrnetError:
        return None
    table = {name: shape for name, shape in architecture.shapes(arch).items() if architecture.is_backbone(name)}
    unexpected = [name for name in tensors if name not in table]
    if unexpected:
        raise OcrnetError(f"{path}: {len(unexpected)} unexpected: {first_names(unexpected)}; this is not a known HRNet")
    loaded = _backbone(path, stored, arch)
    load_report.log(stored.family, stored.converted, arch, len(loaded))
    return loaded, arch


def write_ckpt(path: Path, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write a state's weights and batch norm statistics as a MindSpore checkpoint; see `ckpt.write`.

    The tensors have the names of this project's MindSpore Cells.

    Args:
        path: The file.
        tensors: The state by canonical name; names with a slash, such as those of momentum, are left out.
        meta: The metadata of a checkpoint: config, classes and so on. The sha256 of the tensors is added.
    """
    plain = {name: array for name, array in tensors.items() if "/" not in name}
    text = checkpoint.build_document(plain, meta).encode()
    cells = {mindspore.cell_name(name): array for name, array in plain.items()}
    ckpt.write(path, {DOCUMENT: np.frombuffer(text, np.uint8), **cells})


def _read(path: Path) -> _Stored:
    """Read a file of any format and family, and convert it to canonical names."""
    kind = formats.kind(path)
    if kind == "safetensors" and checkpoint.is_ours(path):
        loaded = checkpoint.load(path)
        return _Stored(Converted(loaded.tensors), loaded.meta, None)
    arrays = formats.read(path, kind)
    text = arrays.pop(DOCUMENT, None) if kind == "ckpt" else None
    family = mindspore.CELLS if text is not None else _find_family(path, arrays)
    try:
        converted = family.canonical(arrays)
    except OcrnetError as error:
        raise OcrnetError(f"{path}: {error}") from None
    if text is not None:
        meta = checkpoint.parse_document(path, text.tobytes().decode("utf-8", "replace"))
        checkpoint.verify(path, converted.tensors, meta)
        return _Stored(converted, meta, None)
    mean, std = family.normalization
    meta = {} if family.normalization == IMAGENET else {"config": {"data": {"mean": list(mean), "std": list(std)}}}
    return _Stored(converted, meta, family)


def _find_family(path: Path, names: Collection[str]) -> Family:
    """Return the family of a file's tensor names; raise OcrnetError if none matches."""
    stripped = [strip_prefixes(name) for name in names]
    for family in FAMILIES:
        if any(re.match(family.mark, name) for name in stripped):
            return family
    known = ", ".join(family.title for family in FAMILIES)
    raise OcrnetError(
        f"{path}: these weights are not from an OCRNet or HRNet of a known family (names: {first_names(stripped, 3)}); "
        f"known: {known}"
    )


def _with_default_head(shapes: architecture.Shapes) -> architecture.Shapes:
    """Return the shapes, in which missing tensors of `_HEAD_SIZES` are added with default shapes."""
    defaults = architecture.shapes(architecture.Arch())
    classes = shapes.get("aux_head.3.weight", defaults["cls_head.weight"])[:1]
    known = {name: defaults[name] for name in _HEAD_SIZES} | {"cls_head.weight": (*classes, 1, 1, 1)}
    return known | shapes


def _check_floating_point(path: Path, tensors: dict[str, np.ndarray], names: Iterable[str]) -> None:
    for name in names:
        if name in tensors and tensors[name].dtype.kind != "f":
            raise OcrnetError(f"{path}: '{name}' is {tensors[name].dtype}, not floating-point; give float weights")
