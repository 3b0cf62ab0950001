"""Text that describes the conversion of a file of weights."""

from collections.abc import Collection, Sequence

from ocrnet import architecture
from ocrnet.weights.family import IMAGENET, Converted, Family


def describe(rule: architecture.Variant) -> str:
    """Return a description of the rules in which a variant differs from others."""
    said = [f"align_corners {rule.align_corners}"]
    said += ["nearest-neighbor resizing between branches"] * (rule.fuse_resize == "nearest")
    said += ["branches are resized twice"] * rule.double_resize
    said += ["stride-2 convolutions pad (0, 1) on even sizes"] * rule.same_padding
    said += [f"batch norms of the heads have eps {rule.head_eps:g}"] * (rule.head_eps != architecture.BN_EPS)
    said += ["a 3x3 auxiliary head"] * (rule.aux_kernel == 3)
    said += [f"a 3x3 bottleneck to {rule.bottleneck_out} channels"] * (rule.bottleneck_kernel == 3)
    said += [f"leaky ReLU of slope {rule.head_activation_slope:g} in the heads"] * (rule.head_activation_slope > 0)
    return ", ".join(said)


def notes(
    family: Family | None,
    done: Converted,
    arch: architecture.Arch,
    loaded: int,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return lines to log about a file that was read.

    Args:
        family: The family of the file; None for our own, which yields no lines if it is complete.
        done: The result of the conversion.
        arch: The architecture of the network.
        loaded: The number of loaded tensors.
        missing: Names that the file lacks.
        unexpected: Names that the network lacks.

    Returns:
        The lines.
    """
    lines = [f"family: {family.title}" + (f"; {describe(arch.rule)}" if family.heads else "")] if family else []
    if family or missing or unexpected:
        parts = [f"{loaded} tensors loaded, {len(missing)} missing, {len(unexpected)} unexpected"]
        parts += [f"left out: {_grouped(done.left_out)}"] if done.left_out else []
        lines.append("; ".join(parts))
    if missing:
        lines.append(f"missing, initialized (architecture.init, seed 0): {some(missing, 20)}")
    if unexpected:
        lines.append(f"unexpected, left out: {some(unexpected, 20)}")
    if done.folded:
        lines.append(f"{len(done.folded)} biases folded into the running means of the batch norms after them")
    if done.zeros:
        lines.append(f"{len(done.zeros)} biases that the family lacks are 0: {', '.join(done.zeros)}")
    return (*lines, *_of_family(family)) if family else tuple(lines)


def _of_family(family: Family) -> list[str]:
    lines = []
    if family.inplace:
        lines.append("every batch norm's weight is abs(weight) + 1e-05, as inplace_abn computes it")
    if family.bgr:
        lines.append("the first convolution's channels are reversed: the family's images are BGR, ours are RGB")
    if family.normal != IMAGENET:
        lines.append("images are normalized by mean {} and std {}, the family's own".format(*map(list, family.normal)))
    return [*lines, family.note] if family.note else lines


def is_counter(name: str) -> bool:
    """Return whether a tensor is only the step counter of a batch norm."""
    return name.endswith("num_batches_tracked")


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first ``most`` names, and the number of further ones."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _grouped(names: Collection[str]) -> str:
    """Return the names left out, with counts of the counters and of each module's tensors."""
    counters = sum(map(is_counter, names))
    groups: dict[str, int] = {}
    for name in names:
        if not is_counter(name):
            group = name.removeprefix("backbone.").split(".")[0]
            groups[group] = groups.get(group, 0) + 1
    said = [f"{counters} num_batches_tracked"] if counters else []
    return ", ".join(said + [f"{name} ({count})" for name, count in groups.items()])
