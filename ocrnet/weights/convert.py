"""The command convert: weights of other implementations into our checkpoints, and ours into theirs."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from ocrnet import architecture, weights
from ocrnet.architecture import Arch
from ocrnet.config import Config, Data
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import Weights, checkpoint, ckpt, pth, to_foreign
from ocrnet.weights.classes import classes_of
from ocrnet.weights.family import Normal

SUFFIX = ".safetensors"


def convert(source: Path, output: Path, *, to: str | None = None, allow_partial: bool = False) -> list[str]:
    """Convert a file of weights.

    Args:
        source: The file to convert.
        output: The file to write; it must not exist.
        to: The family whose names and file format are written. None: write our checkpoint, which records its network
            and its source; an HRNet without heads remains one.
        allow_partial: Whether to fill missing tensors with initial values and to leave out unknown ones.

    Returns:
        Lines to print about the conversion.

    Raises:
        OcrnetError: The conversion is not possible; no file is left behind.
    """
    target = to_foreign.target(to) if to else None
    suffix = target.suffix if target else SUFFIX
    if output.suffix != suffix:
        raise OcrnetError(f"--output {output}: must end in {suffix}" + (f" with --to {to}" if to else " without --to"))
    if output.exists():
        raise OcrnetError(f"--output {output}: exists; remove it, or give another name")
    backbone = None if allow_partial or target else weights.read_only_backbone(source)
    lines = [f"input: {source}"]
    if backbone:
        tensors, arch, notes = backbone
        checkpoint.replace(output, [checkpoint.pack(tensors, _meta(source, arch, {}))])
        network = f"backbone: HRNet-W{arch.width}, {arch.blocks} blocks, modules {list(arch.modules)}, without heads"
        use = f"wrote {output}: a backbone, for --set backbone.pretrained=True backbone.backbone_ckpt={output}"
        return [*lines, *notes, network, use]
    found = weights.read(source, allow_partial=allow_partial)
    lines += [*found.notes, network_line(found.arch)]
    tensors = {name: found.tensors[name] for name in architecture.shapes(found.arch)}
    if target is None:
        checkpoint.replace(output, [checkpoint.pack(tensors, _meta(source, found.arch, found.meta))])
    else:
        named = to_foreign.foreign(tensors, found.arch, target, normal_of(found))
        if target.suffix == ".ckpt":
            ckpt.write(output, named)
        else:
            pth.write(output, named, _mmseg_meta(found) if to == "mmseg" else None)
    lines.append(f"wrote {output}" + (f": names of {target.family.title}" if target else ""))
    return lines + (to_foreign.notes(found.arch, target) if target else [])


def network_line(arch: Arch) -> str:
    """Return a line that describes a network."""
    return (
        f"network: OCRNet-HRNet-W{arch.width}, {architecture.num_parameters(arch) / 1e6:.2f} M parameters, "
        f"{arch.num_classes} classes, head {arch.channels}/{arch.key_channels}, variant {arch.variant}"
    )


def normal_of(found: Weights) -> Normal:
    """Return the mean and std by which a network's images are normalized."""
    data = found.meta.get("config", {}).get("data", {})
    mean, std = data.get("mean", Data.mean), data.get("std", Data.std)
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def normalized(cfg: Config, found: Weights) -> tuple[Config, list[str]]:
    """Return the config with the mean and std of a foreign network, and a note if they differ from the config's.

    A network is foreign if it was trained by another implementation; for others, the config is returned unchanged.
    """
    mean, std = normal_of(found)
    foreign = found.notes or "source" in found.meta
    if not foreign or (mean, std) == (cfg.data.mean, cfg.data.std):
        return cfg, []
    data = dataclasses.replace(cfg.data, mean=mean, std=std)
    said = f"data.mean and data.std: the config has {list(cfg.data.mean)} and {list(cfg.data.std)}; the file's are used"
    return dataclasses.replace(cfg, data=data), [said]


def _meta(source: Path, arch: Arch, meta: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's metadata: its network as config keys, its source file, and the source's metadata."""
    config = {
        **meta.get("config", {}),
        "num_classes": arch.num_classes,
        "backbone": {"width": arch.width, "blocks": arch.blocks, "modules": list(arch.modules)},
        "ocr_head": {
            "channels": arch.channels,
            "key_channels": arch.key_channels,
            "variant": arch.variant,
            "align_corners": arch.align_corners,
        },
    }
    kept: dict[str, Any] = {key: meta[key] for key in ("classes", "step") if key in meta}
    with source.open("rb") as file:
        digest = hashlib.sha256()
        while part := file.read(2**20):
            digest.update(part)
    return {"config": config, **kept, "source": {"file": source.name, "sha256": digest.hexdigest()}}


def _mmseg_meta(found: Weights) -> dict[str, Any]:
    """Return the metadata that mmsegmentation 0.x and 1.x expect next to a state dict."""
    names, palette = classes_of(found)
    colors = [list(color) for color in palette]
    dataset = {"classes": list(names), "palette": colors}
    return {"CLASSES": list(names), "PALETTE": colors, "dataset_meta": dataset}
