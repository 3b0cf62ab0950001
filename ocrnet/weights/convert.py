"""The command convert: it converts weights of other implementations to our checkpoints, and the reverse."""

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import Any

from ocrnet import architecture, weights
from ocrnet.architecture import Arch
from ocrnet.config import Config, Data
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights import Weights, checkpoint, ckpt, pth, to_foreign
from ocrnet.weights.classes import classes_of
from ocrnet.weights.family import Normalization

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"


def convert(source: Path, output: Path, *, to: str | None = None, allow_partial: bool = False) -> None:
    """Convert a weights file and write the result.

    Args:
        source: The file to convert.
        output: The file to write; it must not exist.
        to: The family in whose names and file format the weights are written. None: write a checkpoint of ours, whose
            metadata describe the network and the source file. An HRNet without heads is written without heads.
        allow_partial: Whether to set missing tensors to initial values and leave out unknown ones, not raise an error.

    Raises:
        OcrnetError: The conversion is not possible; no file is written.
    """
    target = to_foreign.target(to) if to else None
    suffix = target.suffix if target else SUFFIX
    if output.suffix != suffix:
        raise OcrnetError(f"--output {output}: must end in {suffix}" + (f" with --to {to}" if to else " without --to"))
    if output.exists():
        raise OcrnetError(f"--output {output}: exists; remove it, or give another name")
    logger.info(f"input: {source}")
    backbone = None if allow_partial or target else weights.read_only_backbone(source)
    if backbone:
        tensors, arch = backbone
        checkpoint.replace(output, [checkpoint.pack(tensors, _meta(source, arch, {}))])
        network = f"HRNet-W{arch.width}, {arch.blocks} blocks, modules {list(arch.modules)}, without heads"
        logger.info(f"backbone: {network}")
        use = f"--set backbone.pretrained=True backbone.backbone_ckpt={output}"
        logger.info(f"wrote {output}: a backbone, for {use}")
        return
    loaded = weights.read(source, allow_partial=allow_partial)
    logger.info(network_line(loaded.arch))
    tensors = {name: loaded.tensors[name] for name in architecture.shapes(loaded.arch)}
    if target is None:
        checkpoint.replace(output, [checkpoint.pack(tensors, _meta(source, loaded.arch, loaded.meta))])
    else:
        named = to_foreign.foreign(tensors, loaded.arch, target, normalization_of(loaded))
        if target.suffix == ".ckpt":
            ckpt.write(output, named)
        else:
            pth.write(output, named, _mmseg_meta(loaded) if to == "mmseg" else None)
    logger.info(f"wrote {output}" + (f": names of {target.family.title}" if target else ""))
    if target:
        to_foreign.log_differences(loaded.arch, target)


def network_line(arch: Arch) -> str:
    """Return a line with width, parameters, classes, head channels and variant of a network."""
    return (
        f"network: OCRNet-HRNet-W{arch.width}, {architecture.num_parameters(arch) / 1e6:.2f} M parameters, "
        f"{arch.num_classes} classes, head {arch.channels}/{arch.key_channels}, variant {arch.variant}"
    )


def normalization_of(found: Weights) -> Normalization:
    """Return the mean and std with which images are normalized for a network."""
    data = found.meta.get("config", {}).get("data", {})
    mean, std = data.get("mean", Data.mean), data.get("std", Data.std)
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def with_normalization(cfg: Config, found: Weights) -> Config:
    """Return the config with the mean and std of a network from another implementation; log them if they differ.

    For a network that this project trained, the config is returned unchanged.
    """
    mean, std = normalization_of(found)
    foreign = found.foreign or "source" in found.meta
    if not foreign or (mean, std) == (cfg.data.mean, cfg.data.std):
        return cfg
    data = dataclasses.replace(cfg.data, mean=mean, std=std)
    logger.info(
        f"data.mean and data.std: the config has {list(cfg.data.mean)} and {list(cfg.data.std)}; the file's are used"
    )
    return dataclasses.replace(cfg, data=data)


def _meta(source: Path, arch: Arch, meta: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a converted checkpoint: the network as config keys, and name and SHA-256 of the source.

    The config, the classes and the step of the source's metadata ``meta`` are kept.
    """
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
    copied: dict[str, Any] = {key: meta[key] for key in ("classes", "step") if key in meta}
    with source.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"config": config, **copied, "source": {"file": source.name, "sha256": digest.hexdigest()}}


def _mmseg_meta(found: Weights) -> dict[str, Any]:
    """Return the metadata that mmsegmentation 0.x and 1.x expect next to a state dict."""
    names, palette = classes_of(found)
    colors = [list(color) for color in palette]
    dataset = {"classes": list(names), "palette": colors}
    return {"CLASSES": list(names), "PALETTE": colors, "dataset_meta": dataset}
