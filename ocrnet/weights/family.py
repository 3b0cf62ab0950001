"""Families of implementations: the table of tensor names of each, and the conversion to canonical names.

A tensor's *owner* is its name without the last component, and that component is its *part*: ``aux_head.0`` and
``weight``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ocrnet import architecture
from ocrnet.architecture import BLOCK, BOTTLENECK
from ocrnet.utils.errors import OcrnetError

# Prefixes that data parallelism and training wrappers add to names, and a pattern of entries that are not weights.
PREFIXES = ("module.", "model.")
NO_WEIGHT = re.compile(r"(^|\.)num_batches_tracked$|^(loss|criterion)\.")

# Keys under which training scripts store the weights in their files, outermost first.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model")

CLASSIFIER = r"(incre_modules|downsamp_modules|downsample_modules|final_layer|classifier)\."
INPLACE_EPS = 1e-5

# The convolutions of the heads, each with its batch norm.
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

# Names in families that put norm and activation into a Sequential, as openseg.pytorch and NVIDIA's code do.
NESTED = {"conv3x3_ocr.1": "conv3x3_ocr.1.0", "aux_head.1": "aux_head.1.0", "aux_head.3": "aux_head.2"}

# Convolutions before a norm that have a bias in this implementation.
WITH_BIAS = ("conv3x3_ocr.0", "aux_head.0")

# Mean and std of red, green and blue, by which images are normalized.
Normal = tuple[tuple[float, float, float], tuple[float, float, float]]
IMAGENET: Normal = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of implementations: its variant in `architecture.VARIANTS` and its tensor names.

    ``mark`` matches a name that no other family has. ``heads`` maps its owners of the heads' tensors to ours.
    ``backbone`` is the prefix of its backbone names. ``branches`` converts the rest of such an owner to ours, and
    ``outward`` converts ours back, if the family can be written. ``parts`` maps its parts to ours. ``left_out`` matches
    names that are known and not used. ``biases``: the convolutions in `WITH_BIAS` have a bias. ``normal``: the mean and
    std of its images. ``bgr``: its images have channels in BGR order. ``inplace``: its norms use \\|gamma\\| + 1e-5.
    """

    title: str
    variant: str
    mark: str
    heads: Mapping[str, str]
    backbone: str = ""
    branches: Callable[[str], str] = str
    outward: Callable[[str], str] = str
    parts: Mapping[str, str] = field(default_factory=dict)
    left_out: str = r"(?!)"
    biases: bool = True
    normal: Normal = IMAGENET
    bgr: bool = False
    inplace: bool = False
    note: str = ""

    def ours(self, name: str) -> str:
        """Return the canonical name; a name that is not one of the family's tensors is returned unchanged."""
        owner, _, part = name.rpartition(".")
        part = self.parts.get(part, part)
        if owner in self.heads:
            return f"{self.heads[owner]}.{part}"
        inner = self.branches(owner.removeprefix(self.backbone))
        return f"{inner}.{part}" if owner and architecture.is_backbone(f"{inner}.") else name

    def theirs(self, name: str) -> str:
        """Return the family's name of a canonical name; the family must be one that can be written."""
        owner, _, part = name.rpartition(".")
        if architecture.is_norm(name):
            part = {ours: theirs for theirs, ours in self.parts.items()}.get(part, part)
        if architecture.is_backbone(name):
            return f"{self.backbone}{self.outward(owner)}.{part}"
        theirs = next(theirs for theirs, ours in self.heads.items() if ours == owner)
        return f"{theirs}.{part}"

    def canonical(self, stored: Mapping[str, np.ndarray]) -> "Converted":
        """Return a file's tensors under canonical names, float32; raise OcrnetError if two have the same name."""
        tensors: dict[str, np.ndarray] = {}
        left_out = []
        for name, array in stored.items():
            peeled = peel(name)
            if NO_WEIGHT.search(peeled) or re.match(self.left_out, peeled):
                left_out.append(peeled)
                continue
            ours = self.ours(peeled)
            if ours in tensors:
                raise OcrnetError(f"the file has two tensors for '{peeled}', under different names")
            tensors[ours] = np.array(array, np.float32) if array.dtype.kind == "f" else array
        folded = _fold(tensors)
        zeros = [] if self.biases else _no_bias(tensors)
        for name in tensors if self.inplace else ():
            if architecture.is_norm(name) and name.endswith(".weight"):
                tensors[name] = np.abs(tensors[name]) + np.float32(INPLACE_EPS)
        if self.bgr and tensors.get("conv1.weight", np.zeros(0)).ndim == 4:
            tensors["conv1.weight"] = np.ascontiguousarray(tensors["conv1.weight"][:, ::-1])
        return Converted(tensors, tuple(left_out), tuple(folded), tuple(zeros))


@dataclass(frozen=True, eq=False)
class Converted:
    """Tensors under canonical names, with a record of the conversion; unknown tensors keep their own names.

    ``left_out``: known tensors that are not used. ``folded``: biases before a norm, subtracted from its running mean.
    ``zeros``: biases that the family lacks.
    """

    tensors: dict[str, np.ndarray]
    left_out: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    zeros: tuple[str, ...] = ()


def peel(name: str) -> str:
    """Return a name without the prefixes of wrappers."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def owners(conv: str, norm: str, cls_head: str, aux_head: str, blocks: Mapping[str, str]) -> dict[str, str]:
    """Return the owner table of a family that groups a convolution and its norm in a block.

    Args:
        conv: The name of the convolution in a block.
        norm: The name of the norm in a block.
        cls_head: The family's owner of the classifier of the OCR head.
        aux_head: The family's owner of the classifier of the auxiliary head.
        blocks: The family's path of each block in `BLOCKS`.

    Returns:
        {the family's owner: our owner}.
    """
    found = {cls_head: "cls_head", aux_head: "aux_head.3"}
    for block, theirs in blocks.items():
        ours = BLOCKS[block]
        found |= {f"{theirs}.{conv}": ours[0], f"{theirs}.{norm}": ours[1]}
    return found


def fold(tensors: dict[str, np.ndarray], conv: str) -> bool:
    """Subtract a convolution's bias from the running mean of its norm and remove it; return whether there was one."""
    bias, mean = tensors.get(f"{conv}.bias"), tensors.get(f"{NORM_OF[conv]}.running_mean")
    if bias is None or mean is None or bias.shape != mean.shape or bias.dtype.kind != "f" or mean.dtype.kind != "f":
        return False
    tensors[f"{NORM_OF[conv]}.running_mean"] = mean - bias
    del tensors[f"{conv}.bias"]
    return True


def _fold(tensors: dict[str, np.ndarray]) -> list[str]:
    return [f"{conv}.bias" for conv in NORM_OF if conv not in WITH_BIAS and fold(tensors, conv)]


def _no_bias(tensors: dict[str, np.ndarray]) -> list[str]:
    zeros = []
    for conv in WITH_BIAS:
        weight = tensors.get(f"{conv}.weight")
        if weight is not None and weight.ndim and f"{conv}.bias" not in tensors:
            tensors[f"{conv}.bias"] = np.zeros(weight.shape[0], np.float32)
            zeros.append(f"{conv}.bias")
    return zeros
