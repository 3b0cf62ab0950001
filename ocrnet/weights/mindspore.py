"""MindSpore's names: those of our own Cells, of the public MindSpore OCRNet, and of mindcv's HRNet.

Our Cells have the canonical names but for batch norms, whose four parts MindSpore calls otherwise.
"""

from ocrnet import spec

NORM_PARTS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}

_CANONICAL_PARTS = {theirs: ours for ours, theirs in NORM_PARTS.items()}


def cell_name(name: str) -> str:
    """Return what a MindSpore Cell calls the tensor of a canonical name."""
    owner, _, part = name.rpartition(".")
    return f"{owner}.{NORM_PARTS[part]}" if spec.is_norm(name) else name


def canonical_name(name: str) -> str:
    """Return the canonical name of a MindSpore Cell's tensor; a name without a batch norm's part is canonical."""
    owner, _, part = name.rpartition(".")
    return f"{owner}.{_CANONICAL_PARTS.get(part, part)}" if owner else name
