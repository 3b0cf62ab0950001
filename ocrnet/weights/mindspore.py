"""MindSpore's names: those of our own Cells, of the public MindSpore OCRNet, and of mindcv's HRNet.

Our Cells have the canonical names but for batch norms, whose four parts MindSpore calls otherwise. The public OCRNet's
names are as in mindspore-lab/models, ``official/cv/OCRNet/src/modules``: ``ocrnet.py``, ``base_modules.py`` and
``backbone/hrnet.py``, which is ``mindcv/models/hrnet.py`` of mindspore-lab/mindcv, classification head included.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from ocrnet import spec
from ocrnet.errors import OcrnetError

NORM_PARTS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}

# What MindSpore's optimizers, loss scaling and checkpoint callback keep beside the weights.
OPTIMIZER = ("moments.", "accum.", "stat.", "moment1.", "moment2.")
COUNTERS = {
    *("global_step", "learning_rate", "momentum", "beta1_power", "beta2_power", "epoch_num", "step_num"),
    *("scale_sense", "current_iterator_step", "last_overflow_iterator_step"),
}

# In the public OCRNet, the ImageNet classifier stays in the backbone.
CLASSIFIER = ("incre_modules.", "downsample_modules.", "final_layer.", "classifier.")
BACKBONE = "backbone."
HEADS = ("ocr_head.", "fcn_head.")

# Convolutions that have a bias here and none there.
WITHOUT_BIAS = ("conv3x3_ocr.0", "aux_head.0")

_CANONICAL_PARTS = {theirs: ours for ours, theirs in NORM_PARTS.items()}


def cell_name(name: str) -> str:
    """Return what a MindSpore Cell calls the tensor of a canonical name."""
    owner, _, part = name.rpartition(".")
    return f"{owner}.{NORM_PARTS[part]}" if spec.is_norm(name) else name


def canonical_name(name: str) -> str:
    """Return the canonical name of a MindSpore Cell's tensor; a name without a batch norm's part is canonical."""
    owner, _, part = name.rpartition(".")
    return f"{owner}.{_CANONICAL_PARTS.get(part, part)}" if owner else name


def is_relative(tensors: Mapping[str, np.ndarray]) -> bool:
    """Say whether the names are those of the public MindSpore OCRNet."""
    return any(name.startswith(HEADS) for name in tensors)


def canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a file's weights under canonical names, without an optimizer's tensors, biases that it lacks as zeros.

    OcrnetError names what has no place in the public OCRNet, and two tensors that mean the same.
    """
    relative = is_relative(tensors)
    found: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if name.startswith(OPTIMIZER) or name in COUNTERS:
            continue
        if relative and name.startswith(tuple(BACKBONE + part for part in CLASSIFIER)):
            continue
        if "/" in name:  # it stands for an engine's own state in our other files, which is not compared
            raise OcrnetError(f"'{name}' is the name of no weight")
        ours = _from_relative(name) if relative else _plain(name)
        if ours in found:
            raise OcrnetError(f"'{name}' is in it twice, under two names")
        found[ours] = array
    if relative:
        for owner in WITHOUT_BIAS:
            if (weight := found.get(f"{owner}.weight")) is not None and weight.ndim:
                found.setdefault(f"{owner}.bias", np.zeros(weight.shape[0], weight.dtype))
    return found


def _plain(name: str) -> str:
    return canonical_name(name.replace(".down_sample.", ".downsample."))


def _from_relative(name: str) -> str:
    owner, _, part = name.rpartition(".")
    peeled = _plain(name.removeprefix(BACKBONE))
    if name.startswith(BACKBONE) and spec.is_backbone(peeled):
        return peeled
    if owner not in RELATIVE_HEADS:
        raise OcrnetError(f"'{name}' has no place in the MindSpore OCRNet that the other names are from")
    return canonical_name(f"{RELATIVE_HEADS[owner]}.{part}")


def _heads() -> Iterator[tuple[str, str]]:
    """Yield the owners of the public OCRNet's head tensors, each with ours."""
    theirs = "ocr_head.object_context_block"
    plain = {"ocr_head.bottleneck": "conv3x3_ocr", "fcn_head.convs.0": "aux_head"}
    nested = {
        f"{theirs}.bottleneck": (spec.BOTTLENECK, 0),
        f"{theirs}.self_att.query_project.0": (f"{spec.BLOCK}.f_pixel", 0),
        f"{theirs}.self_att.query_project.1": (f"{spec.BLOCK}.f_pixel", 2),
        f"{theirs}.self_att.key_project.0": (f"{spec.BLOCK}.f_object", 0),
        f"{theirs}.self_att.key_project.1": (f"{spec.BLOCK}.f_object", 2),
        f"{theirs}.self_att.value_project": (f"{spec.BLOCK}.f_down", 0),
        f"{theirs}.self_att.out_project": (f"{spec.BLOCK}.f_up", 0),
    }
    yield "ocr_head.conv_seg", "cls_head"
    yield "fcn_head.conv_seg", "aux_head.3"
    for owner, ours in plain.items():
        yield f"{owner}.conv.0", f"{ours}.0"
        yield f"{owner}.conv.1", f"{ours}.1"
    for owner, (ours, place) in nested.items():
        yield f"{owner}.conv.0", f"{ours}.{place}"
        yield f"{owner}.conv.1", f"{ours}.{place + 1}.0"


RELATIVE_HEADS = dict(_heads())
