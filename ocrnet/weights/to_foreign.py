"""Conversion of weights to the tensor names of other implementations whose code computes the same result."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.utils.errors import OcrnetError, nearest
from ocrnet.weights import hrnet, mindspore, mmseg
from ocrnet.weights.family import WITH_BIAS, Family, Normalization, fold_bias
from ocrnet.weights.load_report import describe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A family in whose format weights can be written.

    Attributes:
        family: The family.
        suffix: Suffix of its files.
        prefix: Prefix of every tensor name.
        counters: Whether its norms have a ``num_batches_tracked`` tensor.
        setting: Key of align_corners in its configs; empty if it cannot be set.
    """

    family: Family
    suffix: str
    prefix: str = ""
    counters: bool = False
    setting: str = ""


# The authors' test.py removes the first six characters of every name; therefore the names begin with ``model.``.
TARGETS = {
    "hrnet": Target(family=hrnet.FAMILY, suffix=".pth", prefix="model.", counters=True, setting="MODEL.ALIGN_CORNERS"),
    "mmseg": Target(family=mmseg.FAMILY, suffix=".pth", counters=True),
    "mindspore": Target(family=mindspore.FAMILY, suffix=".ckpt"),
}


def target(name: str) -> Target:
    """Return the target for a value of ``--to``; raise OcrnetError if it is unknown."""
    if name not in TARGETS:
        raise OcrnetError(f"--to {name}: unknown{nearest(name, TARGETS)} ({', '.join(TARGETS)})")
    return TARGETS[name]


def foreign(
    tensors: Mapping[str, np.ndarray], arch: Arch, to: Target, normalization: Normalization
) -> dict[str, np.ndarray]:
    """Rename the tensors of a complete network to another family's names, in the order of the network.

    Biases that the family does not have are subtracted from the running means of the norms after them.

    Args:
        tensors: The arrays by canonical name.
        arch: The architecture of the network.
        to: The target.
        normalization: The mean and std with which images are normalized for the network.

    Returns:
        The arrays by the family's names.

    Raises:
        OcrnetError: The family's code would compute a different result.
    """
    _check(arch, to, normalization)
    state = {name: tensors[name] for name in architecture.shapes(arch)}
    if not to.family.biases:
        for conv in WITH_BIAS:
            fold_bias(state, conv)
    renamed = {}
    for name, array in state.items():
        renamed[to.prefix + to.family.family_name(name)] = array
        if to.counters and name.endswith(".running_var"):
            counter = to.family.family_name(name).replace(".running_var", ".num_batches_tracked")
            renamed[to.prefix + counter] = np.zeros((), np.int64)
    return renamed


def log_differences(arch: Arch, to: Target) -> None:
    """Log changes of the weights, and settings that the other implementation needs."""
    if not to.family.biases:
        logger.info(
            f"{' and '.join(f'{conv}.bias' for conv in WITH_BIAS)} are folded into running means, "
            "because the family has no such biases"
        )
    if to.setting and arch.rule.align_corners != architecture.VARIANTS[to.family.variant].align_corners:
        logger.info(f"in its config, set {to.setting}: {arch.rule.align_corners}")


def _check(arch: Arch, to: Target, normalization: Normalization) -> None:
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
    if normalization != family.normalization:
        mean, std = family.normalization
        raise OcrnetError(
            f"{family.title} normalizes images with mean {list(mean)} and std {list(std)}; this network uses "
            f"{list(normalization[0])} and {list(normalization[1])}"
        )
