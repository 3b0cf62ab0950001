"""Description of the network as data: variants, canonical names and shapes of tensors, and initial values.

Both engines and all weight converters use these names and shapes. The canonical names are the state-dict names of the
HRNet-OCR authors (HRNet-Semantic-Segmentation, branch HRNet-OCR), without ``num_batches_tracked``.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ocrnet.utils.errors import OcrnetError, nearest

STEM = 64
LAYER1 = 256
BN_EPS = 1e-5
BN_MOMENTUM = 0.1
INITIALIZERS = ("kaiming", "normal")
DECAYS = ("all", "no_norm", "weights_only")

BLOCK = "ocr_distri_head.object_context_block"
BOTTLENECK = "ocr_distri_head.conv_bn_dropout"
HEADS = ("conv3x3_ocr.", "ocr_distri_head.", "cls_head.", "aux_head.")
NORM = re.compile(r"(^|\.)bn\d$|^ocr_distri_head\..*\.[13]\.0$|^(?!ocr_distri_head\.).*\.1$")

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What the network of an implementation (a family) computes differently; the defaults are the authors' values.

    - ``align_corners``: as in PyTorch; it applies to every bilinear resize, including that of the logits to image size.
    - ``fuse_resize``: interpolation mode of the fuse layers.
    - ``double_resize``: the fuse layers first upsample by the power of two between the branches, then to the size of
      the target branch.
    - ``same_padding``: 3x3 convolutions of stride 2 pad (0, 1) on even sizes and (1, 1) on odd sizes.
    - ``head_eps``: eps of the batch norms in the heads.
    - ``aux_kernel``, ``bottleneck_kernel``: kernel size of the auxiliary head's first convolution, and of the last
      convolution before the classifier.
    - ``bottleneck_out``: input channels of the classifier; None: the channels of the OCR head.
    - ``head_activation_slope``: negative slope of the activations in the heads; 0 is ReLU.
    """

    align_corners: bool = True
    fuse_resize: Literal["bilinear", "nearest"] = "bilinear"
    double_resize: bool = False
    same_padding: bool = False
    head_eps: float = BN_EPS
    aux_kernel: Literal[1, 3] = 1
    bottleneck_kernel: Literal[1, 3] = 1
    bottleneck_out: int | None = None
    head_activation_slope: float = 0.0


VARIANTS = {
    "hrnet": Variant(),
    "openseg": Variant(aux_kernel=3),
    "openseg_inplace": Variant(aux_kernel=3, head_activation_slope=0.01),
    "nvidia": Variant(align_corners=False),
    "mmseg": Variant(align_corners=False, double_resize=True),
    "paddleseg": Variant(align_corners=False, same_padding=True),
    "mindspore": Variant(
        align_corners=False, fuse_resize="nearest", head_eps=1e-4, bottleneck_kernel=3, bottleneck_out=256
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arch:
    """Sizes and variant of one network: the arguments from which all names and shapes of its tensors follow.

    ``width`` is the number of channels of the finest branch, ``blocks`` the number of residual blocks per branch, and
    ``modules`` the number of modules in stages 2, 3 and 4. ``channels``, ``key_channels`` and ``dropout`` belong to the
    OCR head. ``align_corners`` replaces the value of the variant unless it is None. Raise `OcrnetError` for an unknown
    variant, a size below 1, or a dropout outside [0, 1).
    """

    width: int = 48
    blocks: int = 4
    modules: tuple[int, int, int] = (1, 4, 3)
    num_classes: int = 19
    channels: int = 512
    key_channels: int = 256
    dropout: float = 0.05
    variant: str = "hrnet"
    align_corners: bool | None = None

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            hint = nearest(self.variant, VARIANTS)
            raise OcrnetError(f"variant: unknown '{self.variant}'{hint}; allowed: {', '.join(VARIANTS)}")
        for key in ("width", "blocks", "num_classes", "channels", "key_channels"):
            if getattr(self, key) < 1:
                raise OcrnetError(f"{key}: {getattr(self, key)} is not allowed; it must be at least 1")
        if len(self.modules) != 3 or min(self.modules) < 1:
            raise OcrnetError(f"modules: {self.modules} is not allowed; it must be three integers, each at least 1")
        if not 0 <= self.dropout < 1:
            raise OcrnetError(f"dropout: {self.dropout} is not allowed; it must be in [0, 1)")

    @property
    def rule(self) -> Variant:
        """The variant of this network, with ``align_corners`` replaced if it is set."""
        variant = VARIANTS[self.variant]
        if self.align_corners is None:
            return variant
        return dataclasses.replace(variant, align_corners=self.align_corners)

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels of the four branches, from the highest resolution to the lowest."""
        return self.width, 2 * self.width, 4 * self.width, 8 * self.width


def shapes(arch: Arch) -> Shapes:
    """Return the shapes of all weights and running statistics, by canonical name, in the order of the network."""
    return dict((*_backbone(arch), *_head(arch)))


def head_channels(arch: Arch) -> int:
    """Return the number of input channels of the final classifier, which is also the length of a dropout mask."""
    return arch.rule.bottleneck_out or arch.channels


def num_parameters(arch: Arch) -> int:
    """Return the number of trainable parameters; running statistics are not counted."""
    return sum(math.prod(shape) for name, shape in shapes(arch).items() if not is_buffer(name))


def is_buffer(name: str) -> bool:
    """Return whether the canonical name is that of a running statistic (a buffer, not trained)."""
    return name.endswith((".running_mean", ".running_var"))


def is_norm(name: str) -> bool:
    """Return whether the canonical name belongs to a batch norm (weight, bias or statistic)."""
    return NORM.search(name.rpartition(".")[0]) is not None


def is_backbone(name: str) -> bool:
    """Return whether the canonical name belongs to the HRNet backbone; all others belong to the heads."""
    return not name.startswith(HEADS)


def decays(name: str, mode: str) -> bool:
    """Return whether weight decay applies to a parameter.

    ``mode`` is one of DECAYS: ``all`` parameters, ``no_norm`` (all but batch norms), or ``weights_only`` (all but batch
    norms and biases).
    """
    assert mode in DECAYS, mode
    assert not is_buffer(name), name
    if mode == "all":
        return True
    return not is_norm(name) and (mode == "no_norm" or not name.endswith(".bias"))


def init(arch: Arch, seed: int, initializer: str = "kaiming") -> dict[str, NDArray[np.float32]]:
    """Return the initial values of all tensors of a network.

    Each tensor has its own random generator, seeded by (seed, crc32 of its name). Convolutions of the backbone are
    normally distributed with mean 0 and standard deviation sqrt(2 / fan_out) (``kaiming``) or 0.001 (``normal``, the
    authors' choice). Convolutions of the heads are uniformly distributed in [-1/sqrt(fan_in), 1/sqrt(fan_in)], the
    default of PyTorch, which the authors use. Batch norms are the identity.

    Args:
        arch: The architecture of the network.
        seed: Random seed.
        initializer: One of INITIALIZERS, for the convolutions of the backbone.

    Returns:
        Float32 arrays by canonical name, in the order of the network.

    Raises:
        OcrnetError: The initializer is unknown.
    """
    if initializer not in INITIALIZERS:
        raise OcrnetError(f"initializer: unknown '{initializer}'; allowed: {', '.join(INITIALIZERS)}")
    table = shapes(arch)
    return {name: _draw(name, table, seed, initializer) for name in table}


def infer(tensor_shapes: Mapping[str, Shape], *, variant: str = "hrnet", align_corners: bool | None = None) -> Arch:
    """Infer the architecture of a network from the shapes of its tensors.

    Only the tensors that determine a size are read; `check` validates all of them.

    Args:
        tensor_shapes: Shapes by canonical name.
        variant: The variant of the network; it is not inferred.
        align_corners: Replaces the value of the variant; None: no replacement.

    Returns:
        The architecture.

    Raises:
        OcrnetError: Tensors are missing that every OCRNet has.
    """
    size_tensors = {
        "width": "stage2.0.branches.0.0.conv1.weight",
        "channels": "conv3x3_ocr.0.weight",
        "key_channels": f"{BLOCK}.f_pixel.0.weight",
        "num_classes": "cls_head.weight",
    }
    missing = [name for name in size_tensors.values() if len(tensor_shapes.get(name, ())) != 4]
    modules = tuple(_count_indices(tensor_shapes, rf"stage{stage}\.(\d+)\.") for stage in (2, 3, 4))
    missing += [f"stage{stage}.0" for stage, number in zip((2, 3, 4), modules, strict=True) if not number]
    if missing:
        raise OcrnetError(f"these weights are not from an OCRNet (HRNet with OCR head); missing: {_first_few(missing)}")
    sizes: dict[str, Any] = {key: int(tensor_shapes[name][0]) for key, name in size_tensors.items()}
    sizes |= {"modules": modules, "blocks": _count_indices(tensor_shapes, r"stage2\.0\.branches\.0\.(\d+)\.")}
    return Arch(**sizes, variant=variant, align_corners=align_corners)


def check(tensor_shapes: Mapping[str, Shape], arch: Arch, source: str) -> None:
    """Require that names and shapes of tensors are exactly those of a network.

    Args:
        tensor_shapes: Shapes by canonical name.
        arch: The expected architecture.
        source: The origin of the tensors, such as a path, for the error message.

    Raises:
        OcrnetError: Tensors are missing or unexpected, or shapes differ. The message names ``source`` and the
            differences.
    """
    table = shapes(arch)
    differing = [
        f"{name} {tuple(tensor_shapes[name])}, expected {shape}"
        for name, shape in table.items()
        if name in tensor_shapes and tuple(tensor_shapes[name]) != shape
    ]
    problems = {
        "missing": [name for name in table if name not in tensor_shapes],
        "unexpected": [name for name in tensor_shapes if name not in table],
        "with another shape": differing,
    }
    messages = [f"{len(names)} {problem}: {_first_few(names)}" for problem, names in problems.items() if names]
    if messages:
        raise OcrnetError(
            f"{source}: does not fit the network (width {arch.width}, {arch.blocks} blocks, modules {arch.modules}, "
            f"{arch.num_classes} classes, head {arch.channels}/{arch.key_channels}, variant {arch.variant}): "
            + "; ".join(messages)
            + ". Use weights of this network, or set backbone, ocr_head and num_classes to those of the file."
        )


def _first_few(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _count_indices(names: Iterable[str], pattern: str) -> int:
    return max((int(match[1]) + 1 for name in names if (match := re.match(pattern, name))), default=0)


def _draw(name: str, table: Shapes, seed: int, initializer: str) -> NDArray[np.float32]:
    shape = table[name]
    if is_norm(name):
        return np.full(shape, name.endswith((".weight", ".running_var")), np.float32)
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    if is_backbone(name):
        std = 0.001 if initializer == "normal" else math.sqrt(2 / (shape[0] * math.prod(shape[2:])))
        return rng.standard_normal(shape, np.float32) * np.float32(std)
    fan_in = math.prod(table[name.rpartition(".")[0] + ".weight"][1:])
    return ((2 * rng.random(shape, np.float32) - 1) / np.float32(math.sqrt(fan_in))).astype(np.float32)


NamedShapes = Iterator[tuple[str, Shape]]


def _conv(name: str, out_channels: int, in_channels: int, kernel: int = 1, *, bias: bool = False) -> NamedShapes:
    yield f"{name}.weight", (out_channels, in_channels, kernel, kernel)
    if bias:
        yield f"{name}.bias", (out_channels,)


def _norm(name: str, channels: int) -> NamedShapes:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (channels,)


def _conv_norm(name: str, out_channels: int, in_channels: int, kernel: int = 1) -> NamedShapes:
    yield from _conv(f"{name}.0", out_channels, in_channels, kernel)
    yield from _norm(f"{name}.1", out_channels)


def _backbone(arch: Arch) -> NamedShapes:
    for i, channels in ((1, 3), (2, STEM)):
        yield from _conv(f"conv{i}", STEM, channels, 3)
        yield from _norm(f"bn{i}", STEM)
    for block in range(arch.blocks):
        channels = LAYER1 if block else STEM
        for i, (out_channels, in_channels, kernel) in enumerate(
            ((STEM, channels, 1), (STEM, STEM, 3), (LAYER1, STEM, 1)), 1
        ):
            yield from _conv(f"layer1.{block}.conv{i}", out_channels, in_channels, kernel)
            yield from _norm(f"layer1.{block}.bn{i}", out_channels)
        if not block:
            yield from _conv_norm("layer1.0.downsample", LAYER1, STEM)
    yield from _conv_norm("transition1.0", arch.widths[0], LAYER1, 3)
    for stage, modules in zip((2, 3, 4), arch.modules, strict=True):
        previous_width = arch.widths[stage - 2] if stage > 2 else LAYER1
        yield from _conv_norm(f"transition{stage - 1}.{stage - 1}.0", arch.widths[stage - 1], previous_width, 3)
        for module in range(modules):
            yield from _module(f"stage{stage}.{module}", arch.widths[:stage], arch.blocks)


def _module(name: str, widths: tuple[int, ...], blocks: int) -> NamedShapes:
    for branch, width in enumerate(widths):
        for block in range(blocks):
            for i in (1, 2):
                yield from _conv(f"{name}.branches.{branch}.{block}.conv{i}", width, width, 3)
                yield from _norm(f"{name}.branches.{branch}.{block}.bn{i}", width)
    for i, out_width in enumerate(widths):
        for j, width in enumerate(widths):
            layer = f"{name}.fuse_layers.{i}.{j}"
            if j > i:
                yield from _conv_norm(layer, out_width, width)
            for k in range(i - j):  # chain of stride-2 convolutions; only the last one changes the number of channels
                yield from _conv_norm(f"{layer}.{k}", out_width if k == i - j - 1 else width, width, 3)


def _head(arch: Arch) -> NamedShapes:
    total, channels, key, features = sum(arch.widths), arch.channels, arch.key_channels, head_channels(arch)
    yield from _conv("conv3x3_ocr.0", channels, total, 3, bias=True)
    yield from _norm("conv3x3_ocr.1", channels)
    for name in ("f_pixel", "f_object", "f_down"):
        yield from _conv(f"{BLOCK}.{name}.0", key, channels)
        yield from _norm(f"{BLOCK}.{name}.1.0", key)
        if name != "f_down":
            yield from _conv(f"{BLOCK}.{name}.2", key, key)
            yield from _norm(f"{BLOCK}.{name}.3.0", key)
    yield from _conv(f"{BLOCK}.f_up.0", channels, key)
    yield from _norm(f"{BLOCK}.f_up.1.0", channels)
    yield from _conv(f"{BOTTLENECK}.0", features, 2 * channels, arch.rule.bottleneck_kernel)
    yield from _norm(f"{BOTTLENECK}.1.0", features)
    yield from _conv("cls_head", arch.num_classes, features, bias=True)
    yield from _conv("aux_head.0", total, total, arch.rule.aux_kernel, bias=True)
    yield from _norm("aux_head.1", total)
    yield from _conv("aux_head.3", arch.num_classes, total, bias=True)
