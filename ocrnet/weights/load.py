"""Reading weights from our files and from those of other implementations, whose family is inferred from their names.

Each family is one small table (`Family`) in a separate module: `hrnet`, `openseg`, `nvidia`, `mmseg`, `paddleseg`,
`mindspore`, `timm`.
"""

import re
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ocrnet import architecture
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import checkpoint, ckpt, formats, hrnet, mindspore, mmseg, nvidia, openseg, paddleseg, timm
from ocrnet.weights.family import IMAGENET, Converted, Family, peel
from ocrnet.weights.load_report import is_counter, notes, some

# The first family whose mark matches is used, so families with few distinctive names come last.
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

# The tag of our JSON document in a .ckpt: a uint8 tensor of its bytes, which MindSpore loads and does not use.
DOCUMENT = "ocrnet.meta"

# Tensors from which, in addition to the backbone, the architecture of a partial network is inferred.
_HEAD_SIZES = ("conv3x3_ocr.0.weight", f"{architecture.BLOCK}.f_pixel.0.weight", "cls_head.weight")


@dataclass(frozen=True)
class Weights:
    """Canonical tensors, the architecture inferred from them, and metadata as in our own files.

    For files of other implementations, ``meta`` holds the normalization if it is not ImageNet's, and ``notes`` describe
    the family and the conversion.
    """

    path: Path
    tensors: dict[str, np.ndarray]
    arch: architecture.Arch
    meta: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Stored:
    """A file's tensors under canonical names; ``family`` is None if the file is ours."""

    converted: Converted
    meta: dict[str, Any]
    family: Family | None

    @property
    def variant(self) -> str:
        return self.family.variant if self.family else "hrnet"


def read(path: str | Path, *, allow_partial: bool = False) -> Weights:
    """Read a file that holds a complete OCRNet; the architecture is inferred from its names and shapes.

    With ``allow_partial``, missing tensors take the values of `architecture.init`, and unknown ones are left out; the
    notes list both.
    """
    path = Path(path)
    stored = _read(path)
    tensors, head = stored.converted.tensors, stored.meta.get("config", {}).get("ocr_head", {})
    shapes = {name: array.shape for name, array in tensors.items() if stored.family or "/" not in name}
    hints = _with_head(shapes) if allow_partial else shapes
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
    _check_numbers(path, tensors, table)
    said = notes(stored.family, stored.converted, arch, len(table) - len(missing), missing, unexpected)
    if allow_partial:
        fresh = architecture.init(arch, seed=0)
        tensors = {name: tensors.get(name, fresh[name]) for name in table}
    return Weights(path, tensors, arch, stored.meta, said)


def identity(found: Weights) -> str:
    """Return the file's name and a CRC-32 of its tensors, for comparing weights between machines."""
    digest = 0
    for name in sorted(found.tensors):
        digest = zlib.crc32(np.ascontiguousarray(found.tensors[name]).data, digest)
    return f"{found.path.name}, the CRC-32 of its tensors is {digest:08x}"


def read_backbone(path: str | Path, arch: architecture.Arch) -> tuple[dict[str, np.ndarray], str]:
    """Read HRNet weights for the backbone of ``arch``; return its tensors and a report of the loading.

    The file must hold every tensor of the backbone with the right shape; otherwise raise OcrnetError and load nothing.
    The report counts and names the other tensors of the file (a classification head).
    """
    path = Path(path)
    if not path.is_file():
        raise OcrnetError(f"backbone.backbone_ckpt: '{path}' does not exist")
    stored = _read(path)
    tensors = stored.converted.tensors
    wanted = {name: shape for name, shape in architecture.shapes(arch).items() if architecture.is_backbone(name)}
    missing = [name for name in wanted if name not in tensors]
    differing = [name for name in wanted if name in tensors and tensors[name].shape != wanted[name]]
    if missing or differing:
        wrong = "; ".join(
            f"{len(names)} {what} ({some(names, 3)})"
            for what, names in (("missing", missing), ("with another shape", differing))
            if names
        )
        raise OcrnetError(f"backbone.backbone_ckpt: '{path}' does not fit backbone.width {arch.width}: {wrong}")
    _check_numbers(path, tensors, wanted)
    unused = [name for name in (*tensors, *stored.converted.left_out) if name not in wanted and not is_counter(name)]
    beyond = sorted({name.removeprefix("backbone.").split(".")[0] for name in unused})
    report = f"backbone: {len(wanted)} tensors loaded from {path}, 0 missing, {len(unused)} not used"
    report += f" ({', '.join(beyond)})" if beyond else ""
    if stored.family:
        report += f"; {stored.family.title}" + (f": {stored.family.note}" if stored.family.note else "")
    return {name: tensors[name] for name in wanted}, report


def read_only_backbone(path: Path) -> tuple[dict[str, np.ndarray], architecture.Arch, tuple[str, ...]] | None:
    """Return tensors, an architecture with this backbone, and notes of an HRNet without heads; else None."""
    stored = _read(path)
    tensors = stored.converted.tensors
    if not tensors or not all(architecture.is_backbone(name) for name in tensors):
        return None
    shapes = {name: array.shape for name, array in tensors.items()}
    try:
        arch = architecture.infer(_with_head(shapes), variant=stored.variant)
    except OcrnetError:
        return None
    table = {name: shape for name, shape in architecture.shapes(arch).items() if architecture.is_backbone(name)}
    unexpected = [name for name in tensors if name not in table]
    if unexpected:
        raise OcrnetError(f"{path}: {len(unexpected)} unexpected: {some(unexpected)}; this is not a known HRNet")
    loaded, _ = read_backbone(path, arch)
    return loaded, arch, notes(stored.family, stored.converted, arch, len(loaded))


def write_ckpt(path: Path, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write a state's weights and statistics as a MindSpore checkpoint under our Cells' names; see `ckpt.write`.

    Args:
        path: The file.
        tensors: The state by canonical name; names with a slash are left out.
        meta: The metadata as in our own files: the architecture's rules and the classes. The tensors' sha256 is added.
    """
    plain = {name: array for name, array in tensors.items() if "/" not in name}
    text = checkpoint.document(plain, meta).encode()
    cells = {mindspore.cell_name(name): array for name, array in plain.items()}
    ckpt.write(path, {DOCUMENT: np.frombuffer(text, np.uint8), **cells})


def _read(path: Path) -> _Stored:
    """Read a file under canonical names."""
    what = formats.kind(path)
    if what == "safetensors" and checkpoint.is_ours(path):
        found = checkpoint.load(path)
        return _Stored(Converted(found.tensors), found.meta, None)
    arrays = formats.read(path, what)
    text = arrays.pop(DOCUMENT, None) if what == "ckpt" else None
    family = mindspore.CELLS if text is not None else _family(path, arrays)
    try:
        converted = family.canonical(arrays)
    except OcrnetError as error:
        raise OcrnetError(f"{path}: {error}") from None
    if text is not None:
        meta = checkpoint.opened(path, text.tobytes().decode("utf-8", "replace"))
        checkpoint.verify(path, converted.tensors, meta)
        return _Stored(converted, meta, None)
    mean, std = family.normal
    meta = {} if family.normal == IMAGENET else {"config": {"data": {"mean": list(mean), "std": list(std)}}}
    return _Stored(converted, meta, family)


def _family(path: Path, names: Collection[str]) -> Family:
    peeled = [peel(name) for name in names]
    for family in FAMILIES:
        if any(re.match(family.mark, name) for name in peeled):
            return family
    known = ", ".join(family.title for family in FAMILIES)
    raise OcrnetError(
        f"{path}: these weights are not from an OCRNet or HRNet of a known family (names: {some(peeled, 3)}); "
        f"known: {known}"
    )


def _with_head(shapes: architecture.Shapes) -> architecture.Shapes:
    """Return the shapes, with default shapes for missing tensors of `_HEAD_SIZES`."""
    usual = architecture.shapes(architecture.Arch())
    classes = shapes.get("aux_head.3.weight", usual["cls_head.weight"])[:1]
    known = {name: usual[name] for name in _HEAD_SIZES} | {"cls_head.weight": (*classes, 1, 1, 1)}
    return known | shapes


def _check_numbers(path: Path, tensors: dict[str, np.ndarray], names: Iterable[str]) -> None:
    for name in names:
        if name in tensors and tensors[name].dtype.kind != "f":
            raise OcrnetError(f"{path}: '{name}' is {tensors[name].dtype}, not floating-point; give float weights")
