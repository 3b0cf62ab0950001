"""Log lines about loaded weights: their family, the conversion, and missing or unknown tensors."""

import logging
from collections.abc import Collection, Sequence

from ocrnet import architecture
from ocrnet.weights.family import IMAGENET, Converted, Family

logger = logging.getLogger(__name__)


def describe(rule: architecture.Variant) -> str:
    """Return a text with align_corners and those rules of a variant that are not the authors'."""
    rules = [f"align_corners {rule.align_corners}"]
    rules += ["nearest-neighbor resizing between branches"] * (rule.fuse_resize == "nearest")
    rules += ["branches are resized twice"] * rule.double_resize
    rules += ["stride-2 convolutions pad (0, 1) on even sizes"] * rule.same_padding
    rules += [f"batch norms of the heads have eps {rule.head_eps:g}"] * (rule.head_eps != architecture.BN_EPS)
    rules += ["a 3x3 auxiliary head"] * (rule.aux_kernel == 3)
    rules += [f"a 3x3 bottleneck to {rule.bottleneck_out} channels"] * (rule.bottleneck_kernel == 3)
    rules += [f"leaky ReLU of slope {rule.head_activation_slope:g} in the heads"] * (rule.head_activation_slope > 0)
    return ", ".join(rules)


def log(
    family: Family | None,
    converted: Converted,
    arch: architecture.Arch,
    loaded: int,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
) -> None:
    """Log what was read from a file.

    Args:
        family: The family of the file; None for our own files, about which nothing is logged if nothing is missing.
        converted: The result of the conversion.
        arch: The architecture of the network.
        loaded: The number of loaded tensors.
        missing: Names of the network that are not in the file.
        unexpected: Names in the file that the network does not have.
    """
    lines = [f"family: {family.title}" + (f"; {describe(arch.rule)}" if family.heads else "")] if family else []
    if family or missing or unexpected:
        parts = [f"{loaded} tensors loaded, {len(missing)} missing, {len(unexpected)} unexpected"]
        parts += [f"left out: {_group_names(converted.left_out)}"] if converted.left_out else []
        lines.append("; ".join(parts))
    if missing:
        lines.append(f"missing, initialized (architecture.init, seed 0): {first_names(missing, 20)}")
    if unexpected:
        lines.append(f"unexpected, left out: {first_names(unexpected, 20)}")
    if converted.folded_biases:
        lines.append(
            f"{len(converted.folded_biases)} biases folded into the running means of the batch norms after them"
        )
    if converted.zero_biases:
        lines.append(
            f"{len(converted.zero_biases)} biases that the family lacks are 0: {', '.join(converted.zero_biases)}"
        )
    for line in (*lines, *(_family_lines(family) if family else ())):
        logger.info(line)


def _family_lines(family: Family) -> list[str]:
    lines = []
    if family.abs_norm_weights:
        lines.append("every batch norm's weight is abs(weight) + 1e-05, as inplace_abn computes it")
    if family.bgr:
        lines.append("the first convolution's channels are reversed: the family's images are BGR, ours are RGB")
    if family.normalization != IMAGENET:
        lines.append(
            "images are normalized by mean {} and std {}, the family's own".format(*map(list, family.normalization))
        )
    return [*lines, family.note] if family.note else lines


def is_counter(name: str) -> bool:
    """Return whether a tensor is the step counter of a batch norm, which is not needed."""
    return name.endswith("num_batches_tracked")


def first_names(names: Sequence[str], most: int = 5) -> str:
    """Return a text with the first ``most`` names and the number of other names."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _group_names(names: Collection[str]) -> str:
    """Return a text with the number of batch norm counters and, for each module, the number of its other tensors."""
    counters = sum(map(is_counter, names))
    groups: dict[str, int] = {}
    for name in names:
        if not is_counter(name):
            group = name.removeprefix("backbone.").split(".")[0]
            groups[group] = groups.get(group, 0) + 1
    parts = [f"{counters} num_batches_tracked"] if counters else []
    return ", ".join(parts + [f"{name} ({count})" for name, count in groups.items()])
