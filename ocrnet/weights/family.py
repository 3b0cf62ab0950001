"""Families of implementations: the tensor names of each, and the conversion to and from canonical names.

A tensor name consists of an *owner*, the module that holds the tensor, and a *part*, the last component: in
``aux_head.0.weight``, the owner is ``aux_head.0`` and the part is ``weight``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ocrnet import architecture
from ocrnet.architecture import BLOCK, BOTTLENECK
from ocrnet.utils.errors import OcrnetError

# Prefixes that wrappers for data parallelism and training add to names, and a pattern of entries that are not weights.
PREFIXES = ("module.", "model.")
NO_WEIGHT = re.compile(r"(^|\.)num_batches_tracked$|^(loss|criterion)\.")

# Keys of the dicts in which training scripts nest the weights, outermost first.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model")

CLASSIFIER = r"(incre_modules|downsamp_modules|downsample_modules|final_layer|classifier)\."
INPLACE_EPS = 1e-5

# The owners of each convolution of the heads and of its batch norm, by the names that family tables use.
BLOCKS = {
    "conv3x3_ocr": ("conv3x3_ocr.0", "conv3x3_ocr.1"),
    "f_pixel.0": (f"{BLOCK}.f_pixel.0", f"{BLOCK}.f_pixel.1.0"),
    "f_pixel.1": (f"{BLOCK}.f_pixel.2", f"{BLOCK}.f_pixel.3.0"),
    "f_object.0": (f"{BLOCK}.f_object.0", f"{BLOCK}.f_object.1.0"),
    "f_object.1": (f"{BLOCK}.f_object.2", f"{BLOCK}.f_object.3.0"),
    "f_down": (f"{BLOCK}.f_down.0", f"{BLOCK}.f_down.1.0"),
    "f_up": (f"{BLOCK}.f_up.0", f"{BLOCK}.f_up.1.0"),
    "conv_bn_dropout": (f"{BOTTLENECK}.0", f"{BOTTLENECK}.1.0"),
    "aux_head": ("aux_head.0", "aux_head.1"),
}
OWNERS = (*(owner for pair in BLOCKS.values() for owner in pair), "cls_head", "aux_head.3")
NORM_OF = dict(BLOCKS.values())

# Canonical owner -> owner in families whose norm and activation are in a Sequential (openseg.pytorch and NVIDIA).
NESTED = {"conv3x3_ocr.1": "conv3x3_ocr.1.0", "aux_head.1": "aux_head.1.0", "aux_head.3": "aux_head.2"}

# Convolutions before a norm that have a bias in this project.
WITH_BIAS = ("conv3x3_ocr.0", "aux_head.0")

# Mean and std of red, green and blue with which images are normalized.
Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]
IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of implementations, which share tensor names and a variant of `architecture.VARIANTS`.

    Attributes:
        title: Name of the family in messages.
        variant: Its variant.
        mark: Pattern of tensor names that only this family has.
        heads: Its owners in the heads -> canonical owners.
        backbone: Prefix of its owners in the backbone.
        branches: Converts such an owner, without the prefix, to the canonical owner.
        branches_to_family: The reverse of ``branches``, for families that can be written.
        parts: Its parts -> canonical parts.
        left_out: Pattern of names that are known and not used.
        biases: Whether the convolutions in `WITH_BIAS` have a bias.
        normalization: Mean and std of its images.
        bgr: Whether its images have channels in BGR order.
        abs_norm_weights: Whether its norms use \\|gamma\\| + 1e-5 in place of gamma.
        note: A line to log after loading.
    """

    title: str
    variant: str
    mark: str
    heads: Mapping[str, str]
    backbone: str = ""
    branches: Callable[[str], str] = str
    branches_to_family: Callable[[str], str] = str
    parts: Mapping[str, str] = field(default_factory=dict)
    left_out: str = r"(?!)"
    biases: bool = True
    normalization: Normalization = IMAGENET
    bgr: bool = False
    abs_norm_weights: bool = False
    note: str = ""

    def canonical_name(self, name: str) -> str:
        """Return the canonical name of a tensor; a name that the family does not have is returned unchanged."""
        owner, _, part = name.rpartition(".")
        part = self.parts.get(part, part)
        if owner in self.heads:
            return f"{self.heads[owner]}.{part}"
        canonical_owner = self.branches(owner.removeprefix(self.backbone))
        return f"{canonical_owner}.{part}" if owner and architecture.is_backbone(f"{canonical_owner}.") else name

    def family_name(self, name: str) -> str:
        """Return the name that this implementation gives to a parameter, from the canonical name.

        Only the implementations in `to_foreign.TARGETS` support this direction.
        """
        owner, _, part = name.rpartition(".")
        if architecture.is_norm(name):
            part = {ours: family_owner for family_owner, ours in self.parts.items()}.get(part, part)
        if architecture.is_backbone(name):
            return f"{self.backbone}{self.branches_to_family(owner)}.{part}"
        family_owner = next(family_owner for family_owner, ours in self.heads.items() if ours == owner)
        return f"{family_owner}.{part}"

    def canonical(self, stored: Mapping[str, np.ndarray]) -> "Converted":
        """Convert a file's tensors, given by the family's names, to canonical names and float32.

        Raise OcrnetError if two tensors get the same canonical name.
        """
        tensors: dict[str, np.ndarray] = {}
        left_out = []
        for name, array in stored.items():
            stripped = strip_prefixes(name)
            if NO_WEIGHT.search(stripped) or re.match(self.left_out, stripped):
                left_out.append(stripped)
                continue
            canonical = self.canonical_name(stripped)
            if canonical in tensors:
                raise OcrnetError(f"the file has two tensors for '{stripped}', under different names")
            tensors[canonical] = np.array(array, np.float32) if array.dtype.kind == "f" else array
        folded_biases = _fold_biases(tensors)
        zero_biases = [] if self.biases else _add_zero_biases(tensors)
        for name in tensors if self.abs_norm_weights else ():
            if architecture.is_norm(name) and name.endswith(".weight"):
                tensors[name] = np.abs(tensors[name]) + np.float32(INPLACE_EPS)
        if self.bgr and tensors.get("conv1.weight", np.zeros(0)).ndim == 4:
            tensors["conv1.weight"] = np.ascontiguousarray(tensors["conv1.weight"][:, ::-1])
        return Converted(tensors, tuple(left_out), tuple(folded_biases), tuple(zero_biases))


@dataclass(frozen=True, eq=False)
class Converted:
    """Tensors by canonical name, with a record of the conversion; unknown tensors keep their names.

    Attributes:
        tensors: The arrays by name.
        left_out: Names of known tensors that are not used.
        folded_biases: Names of biases before a norm, which are subtracted from its running mean and removed.
        zero_biases: Names of biases that the family does not have, which are added as 0.
    """

    tensors: dict[str, np.ndarray]
    left_out: tuple[str, ...] = ()
    folded_biases: tuple[str, ...] = ()
    zero_biases: tuple[str, ...] = ()


def strip_prefixes(name: str) -> str:
    """Return a tensor name without the prefixes that wrappers add."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def owners(conv: str, norm: str, cls_head: str, aux_head: str, blocks: Mapping[str, str]) -> dict[str, str]:
    """Return the ``heads`` table of a family that has one module (block) for a convolution and its norm.

    Args:
        conv: The name of the convolution within a block.
        norm: The name of the norm within a block.
        cls_head: The family's owner of the classifier of the OCR head.
        aux_head: The family's owner of the classifier of the auxiliary head.
        blocks: The family's owner of each block of `BLOCKS`.

    Returns:
        {the family's owner: canonical owner}.
    """
    table = {cls_head: "cls_head", aux_head: "aux_head.3"}
    for block, theirs in blocks.items():
        ours = BLOCKS[block]
        table |= {f"{theirs}.{conv}": ours[0], f"{theirs}.{norm}": ours[1]}
    return table


def fold_bias(tensors: dict[str, np.ndarray], conv: str) -> bool:
    """Subtract a convolution's bias from the running mean of its norm, and remove the bias.

    The outputs in evaluation are unchanged. Return whether there was a bias.
    """
    bias, mean = tensors.get(f"{conv}.bias"), tensors.get(f"{NORM_OF[conv]}.running_mean")
    if bias is None or mean is None or bias.shape != mean.shape or bias.dtype.kind != "f" or mean.dtype.kind != "f":
        return False
    tensors[f"{NORM_OF[conv]}.running_mean"] = mean - bias
    del tensors[f"{conv}.bias"]
    return True


def _fold_biases(tensors: dict[str, np.ndarray]) -> list[str]:
    return [f"{conv}.bias" for conv in NORM_OF if conv not in WITH_BIAS and fold_bias(tensors, conv)]


def _add_zero_biases(tensors: dict[str, np.ndarray]) -> list[str]:
    zero_biases = []
    for conv in WITH_BIAS:
        weight = tensors.get(f"{conv}.weight")
        if weight is not None and weight.ndim and f"{conv}.bias" not in tensors:
            tensors[f"{conv}.bias"] = np.zeros(weight.shape[0], np.float32)
            zero_biases.append(f"{conv}.bias")
    return zero_biases
