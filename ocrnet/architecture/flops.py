"""Cost of a network: floating-point operations, computed from its shapes, and the memory of a prediction."""

import math
import re

from ocrnet import architecture
from ocrnet.architecture import Arch

# The maps of branch b (0 to 3) have the image size, halved 2 + b times. The patterns capture branch numbers.
_BRANCH = re.compile(r"stage\d\.\d+\.branches\.(\d)")
_FUSE = re.compile(r"stage\d\.\d+\.fuse_layers\.(\d)\.(\d)(?:\.(\d))?\.0\.weight")
_TRANSITION = re.compile(r"transition\d\.(\d)")


def forward_flops(arch: Arch, size: tuple[int, int]) -> int:
    """Return the number of floating-point operations of one forward pass of one image of ``size`` (height, width).

    A multiply-add counts as 2. Only convolutions and matrix products are counted, as in torch.utils.flop_counter.
    """
    total = 0
    for name, shape in architecture.shapes(arch).items():
        if len(shape) == 4:
            total += 2 * math.prod(shape) * _positions(name, arch, size)
    pixels = _pixels(size, 2)
    gather = arch.num_classes * pixels * arch.channels  # object regions: (classes x pixels) times (pixels x channels)
    attention = 2 * arch.num_classes * pixels * arch.key_channels  # its two products have the same cost
    return total + 2 * (gather + attention)


def train_flops(arch: Arch, size: tuple[int, int]) -> int:
    """Return the operations of a training step on one crop: 3 times the forward pass, as the backward pass costs 2."""
    return 3 * forward_flops(arch, size)


def predict_bytes(arch: Arch, size: tuple[int, int], scale: float = 1.0) -> int:
    """Estimate the peak float32 memory of predicting one image, without the weights.

    The estimate is four copies of the widest features (at a quarter of the image size) and of the class maps (at image
    size), at the largest ``scale``. Measured peaks on a CPU were 0.7 to 1.0 times the estimate.

    Args:
        arch: The architecture of the network.
        size: Height and width of the image.
        scale: The largest evaluation scale; values below 1 count as 1.

    Returns:
        The memory in bytes.
    """
    features = (sum(arch.widths) + arch.channels) * _pixels(size, 2)
    return round(4 * 4 * (features + arch.num_classes * _pixels(size, 0)) * max(1.0, scale) ** 2)


def _positions(name: str, arch: Arch, size: tuple[int, int]) -> int:
    """Return the number of output pixels of the convolution with weight ``name``."""
    if match := _BRANCH.match(name):
        return _pixels(size, 2 + int(match[1]))
    if match := _FUSE.match(name):
        j, k = int(match[2]), match[3]
        return _pixels(size, 2 + (j if k is None else j + int(k) + 1))
    if match := _TRANSITION.match(name):
        return _pixels(size, 2 + int(match[1]))
    if name.startswith("conv1."):
        return _pixels(size, 1)
    if ".f_object." in name or ".f_down." in name:
        return arch.num_classes
    return _pixels(size, 2)


def _pixels(size: tuple[int, int], halvings: int) -> int:
    height, width = size
    for _ in range(halvings):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return height * width
