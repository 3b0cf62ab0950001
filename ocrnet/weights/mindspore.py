"""MindSpore names: those of this project's Cells, of the public MindSpore OCRNet, and of mindcv's HRNet.

The Cells use the canonical names, except for the four tensors of a batch norm, which have other names in MindSpore. The
public OCRNet is ``official/cv/OCRNet/src/modules`` of mindspore-lab/models: ``ocrnet.py``, ``base_modules.py`` and
``backbone/hrnet.py``. mindcv's HRNet is ``mindcv/models/hrnet.py`` of mindspore-lab/mindcv, with its classification
head.
"""

from ocrnet import architecture
from ocrnet.weights.family import CLASSIFIER, OWNERS, Family, owners

NORM_PARTS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}

_CANONICAL_PARTS = {theirs: ours for ours, theirs in NORM_PARTS.items()}


def cell_name(name: str) -> str:
    """Return the name that a tensor has in this project's MindSpore Cells."""
    owner, _, part = name.rpartition(".")
    return f"{owner}.{NORM_PARTS[part]}" if architecture.is_norm(name) else name


def canonical_name(name: str) -> str:
    """Return the canonical name of a tensor of this project's MindSpore Cells; only those of batch norms differ."""
    owner, _, part = name.rpartition(".")
    return f"{owner}.{_CANONICAL_PARTS.get(part, part)}" if owner else name


# Pattern of entries that MindSpore's optimizers, loss scaling and checkpoint callback store besides the weights.
_OPTIMIZER_ENTRIES = (
    r"(moments|accum|stat|moment1|moment2)\.|(global_step|learning_rate|momentum|beta1_power|beta2_power|epoch_num|"
    r"step_num|scale_sense|current_iterator_step|last_overflow_iterator_step)$"
)
_CONTEXT = "ocr_head.object_context_block"


def _to_canonical_branch(owner: str) -> str:
    return owner.replace(".down_sample.", ".downsample.")


def _to_family_branch(owner: str) -> str:
    return owner.replace(".downsample.", ".down_sample.")


FAMILY = Family(
    title="MindSpore OCRNet (mindspore-lab, mindspore-ai)",
    variant="mindspore",
    mark=r"(ocr_head|fcn_head)\.",
    heads=owners(
        "conv.0",
        "conv.1",
        cls_head="ocr_head.conv_seg",
        aux_head="fcn_head.conv_seg",
        blocks={
            "aux_head": "fcn_head.convs.0",
            "conv3x3_ocr": "ocr_head.bottleneck",
            "f_pixel.0": f"{_CONTEXT}.self_att.query_project.0",
            "f_pixel.1": f"{_CONTEXT}.self_att.query_project.1",
            "f_object.0": f"{_CONTEXT}.self_att.key_project.0",
            "f_object.1": f"{_CONTEXT}.self_att.key_project.1",
            "f_down": f"{_CONTEXT}.self_att.value_project",
            "f_up": f"{_CONTEXT}.self_att.out_project",
            "conv_bn_dropout": f"{_CONTEXT}.bottleneck",
        },
    ),
    backbone="backbone.",
    branches=_to_canonical_branch,
    branches_to_family=_to_family_branch,
    parts=_CANONICAL_PARTS,
    left_out=rf"{_OPTIMIZER_ENTRIES}|backbone\.{CLASSIFIER}",  # the ImageNet classifier stays in its backbone
    biases=False,
)
CELLS = Family(
    title="MindSpore Cells of ocrnet, or mindcv's HRNet",
    variant="hrnet",
    mark=r".+\.(gamma|beta|moving_mean|moving_variance)$",
    heads={owner: owner for owner in OWNERS},
    branches=_to_canonical_branch,
    parts=_CANONICAL_PARTS,
    left_out=rf"{_OPTIMIZER_ENTRIES}|{CLASSIFIER}",
)
