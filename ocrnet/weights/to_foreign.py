"""Conversion of weights to the names of other implementations, if their code computes the same result."""

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

    ``suffix``: the suffix of its files. ``prefix``: precedes every name. ``counters``: its norms have
    num_batches_tracked. ``setting``: the key of align_corners in its configs, if that can be set.
    """

    family: Family
    suffix: str
    prefix: str = ""
    counters: bool = False
    setting: str = ""


# The authors' test.py removes six characters from every name, so their names begin with ``model.``, as in their files.
TARGETS = {
    "hrnet": Target(family=hrnet.FAMILY, suffix=".pth", prefix="model.", counters=True, setting="MODEL.ALIGN_CORNERS"),
    "mmseg": Target(family=mmseg.FAMILY, suffix=".pth", counters=True),
    "mindspore": Target(family=mindspore.FAMILY, suffix=".ckpt"),
}


def target(name: str) -> Target:
    """Return the target of a name; raise OcrnetError if it is unknown."""
    if name not in TARGETS:
        raise OcrnetError(f"--to {name}: unknown{nearest(name, TARGETS)} ({', '.join(TARGETS)})")
    return TARGETS[name]


def foreign(tensors: Mapping[str, np.ndarray], arch: Arch, to: Target, normal: Normal) -> dict[str, np.ndarray]:
    """Return a complete network's tensors under another family's names, in network order.

    Biases that the family lacks are folded into the running means of the norms after them.

    Args:
        tensors: The arrays by canonical name.
        arch: The architecture of the network.
        to: The target.
        normal: The mean and std by which the network's images are normalized.

    Returns:
        The arrays by the family's names.

    Raises:
        OcrnetError: The family's code would compute a different result; the message gives the reason.
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
    """Return lines about changes made for the family, and about settings that the written file requires."""
    said = []
    if not to.family.biases:
        said.append(
            f"{' and '.join(f'{conv}.bias' for conv in WITH_BIAS)} are folded into running means: it has no biases"
        )
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
            f"{family.title} would compute a different result from these weights: it has {describe(rule)}; this "
            f"network has {describe(arch.rule)} (variant {arch.variant}). Use the weights with ocrnet, or train the "
            f"network of variant {family.variant}"
        )
    if rule.bottleneck_out and arch.key_channels != rule.bottleneck_out:
        raise OcrnetError(
            f"{family.title} has as many key channels as bottleneck channels: {rule.bottleneck_out}; this "
            f"network has {arch.key_channels} key channels"
        )
    if normal != family.normal:
        raise OcrnetError(
            f"{family.title} normalizes images by mean {list(family.normal[0])} and std {list(family.normal[1])}; this "
            f"network was trained with {list(normal[0])} and {list(normal[1])}"
        )
