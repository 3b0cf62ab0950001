"""Weights for other implementations: under their names, where their code computes the same from them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.utils.errors import OcrnetError, nearest
from ocrnet.weights import hrnet, mindspore, mmseg
from ocrnet.weights.family import WITH_BIAS, Family, Normal, fold
from ocrnet.weights.load_report import describe


@dataclass(frozen=True, kw_only=True)
class Target:
    """A family that can be written.

    ``suffix`` of its files; ``prefix`` before every name; ``counters``: its norms have num_batches_tracked;
    ``setting``: what sets align_corners in its configs, where that is not fixed.
    """

    family: Family
    suffix: str
    prefix: str = ""
    counters: bool = False
    setting: str = ""


# The authors' test.py takes six letters off every name, so theirs begin with ``model.``, as in their own files.
TARGETS = {
    "hrnet": Target(family=hrnet.FAMILY, suffix=".pth", prefix="model.", counters=True, setting="MODEL.ALIGN_CORNERS"),
    "mmseg": Target(family=mmseg.FAMILY, suffix=".pth", counters=True),
    "mindspore": Target(family=mindspore.FAMILY, suffix=".ckpt"),
}


def target(name: str) -> Target:
    """Return what can be written; OcrnetError for anything else."""
    if name not in TARGETS:
        raise OcrnetError(f"--to {name}: not known{nearest(name, TARGETS)} ({', '.join(TARGETS)})")
    return TARGETS[name]


def foreign(tensors: Mapping[str, np.ndarray], arch: Arch, to: Target, normal: Normal) -> dict[str, np.ndarray]:
    """Return a whole network's tensors under another family's names, in network order.

    Biases that it lacks are folded into the running means behind them. OcrnetError tells why the family's code would
    compute something else from them; ``normal``: the mean and std that images are normalised by.
    """
    _check(arch, to, normal)
    ours = {name: tensors[name] for name in architecture.shapes(arch)}
    if not to.family.biases:
        for conv in WITH_BIAS:
            fold(ours, conv)
    named = {}
    for name, array in ours.items():
        named[to.prefix + to.family.theirs(name)] = array
        if to.counters and name.endswith(".running_var"):
            counter = to.family.theirs(name).replace(".running_var", ".num_batches_tracked")
            named[to.prefix + counter] = np.zeros((), np.int64)
    return named


def notes(arch: Arch, to: Target) -> list[str]:
    """Return what was done for the family, and what a user of the written file must set."""
    said = []
    if not to.family.biases:
        said.append(f"{' and '.join(f'{conv}.bias' for conv in WITH_BIAS)} are folded into running means: it has none")
    if to.setting and arch.rule.align_corners != architecture.VARIANTS[to.family.variant].align_corners:
        said.append(f"in its config, set {to.setting}: {arch.rule.align_corners}")
    return said


def _check(arch: Arch, to: Target, normal: Normal) -> None:
    family, rule = to.family, architecture.VARIANTS[to.family.variant]
    if (
        dataclasses.replace(arch.rule, align_corners=rule.align_corners if to.setting else arch.rule.align_corners)
        != rule
    ):
        raise OcrnetError(
            f"{family.title} would compute other numbers from these weights: it has {describe(rule)}; this network has "
            f"{describe(arch.rule)} (variant {arch.variant}). Use the weights here, or train the network of variant "
            f"{family.variant}"
        )
    if rule.bottleneck_out and arch.key_channels != rule.bottleneck_out:
        raise OcrnetError(
            f"{family.title} has one number for the key channels and for the bottleneck's: {rule.bottleneck_out}; this "
            f"network has {arch.key_channels} key channels"
        )
    if normal != family.normal:
        raise OcrnetError(
            f"{family.title} normalises images by mean {list(family.normal[0])} and std {list(family.normal[1])}; this "
            f"network was trained with {list(normal[0])} and {list(normal[1])}"
        )
