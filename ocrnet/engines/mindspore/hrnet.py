"""HRNet (Wang et al., TPAMI 2020) in MindSpore: a stem, a bottleneck stage, and three stages of parallel branches.

The parameter names are those of the authors, except for batch norms, whose names ``ocrnet.weights.mindspore`` converts.
Where the authors' module lists contain None, these contain ``nn.Identity``. Values that must be constant at compile
time (sizes, rules of the variant) are Python values.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ocrnet import architecture
from ocrnet.architecture import Arch, Variant

Size = tuple[int, int]


def resize(x: Tensor, size: Size, align_corners: bool) -> Tensor:
    """Resize a tensor bilinearly.

    Args:
        x: Tensor N,C,H,W.
        size: Target (height, width).
        align_corners: As in ``ops.interpolate``.

    Returns:
        Tensor N,C,height,width; ``x`` itself if it has this size.
    """
    if x.shape[-2:] == size:
        return x
    return ops.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def parameter(shape: tuple[int, ...], value: float, *, trained: bool = True) -> Parameter:
    """Create a float32 parameter filled with ``value``.

    Args:
        shape: The shape.
        value: The value of every element until weights are loaded.
        trained: Whether the parameter requires a gradient.

    Returns:
        The parameter.
    """
    return Parameter(Tensor(np.full(shape, value, np.float32)), requires_grad=trained)


class Norm(nn.Cell):
    """Batch norm over N, H and W, computed in float32 for any input dtype; the identity until weights are loaded."""

    def __init__(self, channels: int, eps: float = architecture.BN_EPS) -> None:
        super().__init__()
        self.gamma, self.beta = parameter((channels,), 1), parameter((channels,), 0)
        self.moving_mean = parameter((channels,), 0, trained=False)
        self.moving_variance = parameter((channels,), 1, trained=False)
        self.by_batch = ops.BatchNorm(is_training=True, epsilon=eps, momentum=architecture.BN_MOMENTUM)
        self.by_statistics = ops.BatchNorm(is_training=False, epsilon=eps)
        self.eps, self.ranks = eps, 1

    def synchronize(self, ranks: int) -> None:
        """In training, normalize over the batches of all ``ranks``; MindSpore's SyncBatchNorm does not support CPUs."""
        self.ranks = ranks
        if ranks > 1:
            self.sum = ops.AllReduce()

    def construct(self, x: Tensor) -> Tensor:
        """Normalize N,C,H,W by the statistics of the batch in training, else by the moving statistics.

        Training also updates the moving statistics.
        """
        wide = x.astype("float32")
        if self.training and self.ranks > 1:
            return self.by_all_batches(wide).astype(x.dtype)
        norm = self.by_batch if self.training else self.by_statistics
        return norm(wide, self.gamma, self.beta, self.moving_mean, self.moving_variance)[0].astype(x.dtype)

    def by_all_batches(self, x: Tensor) -> Tensor:
        """Normalize by the mean and variance over all ranks, which one all-reduce computes.

        The batches of all ranks must have the same size.
        """
        mean = x.mean((0, 2, 3), True)
        square = ops.square(x - mean).mean((0, 2, 3), True) + ops.square(mean)
        both = self.sum(ops.stack((mean, square))) / self.ranks
        mean, variance = both[0], both[1] - ops.square(both[0])
        y = (x - mean) * ops.rsqrt(variance + self.eps)
        count = x.shape[0] * x.shape[2] * x.shape[3] * self.ranks
        self.move(self.moving_mean, mean)
        self.move(self.moving_variance, variance * (count / (count - 1)))
        return y * self.gamma.reshape(1, -1, 1, 1) + self.beta.reshape(1, -1, 1, 1)

    def move(self, statistic: Parameter, value: Tensor) -> None:
        """Update a moving statistic with the ``value`` of one batch."""
        value = ops.stop_gradient(value).reshape(-1)
        ops.assign(statistic, (1 - architecture.BN_MOMENTUM) * statistic + architecture.BN_MOMENTUM * value)


class Conv(nn.Cell):
    """A 1x1 or 3x3 convolution that keeps height and width, or halves them with stride 2; initially zero.

    ``same_padding``: a convolution of stride 2 pads even sizes by (0, 1) and odd sizes by (1, 1). The convolution is
    computed in the dtype of the input, or in float16 if ``half`` is set.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        bias: bool = False,
        same_padding: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels, self.has_bias, self.half = out_channels, bias, False
        self.weight = parameter((out_channels, in_channels, kernel, kernel), 0)
        if bias:
            self.bias = parameter((out_channels,), 0)
        pad = {"pad_mode": "same"} if same_padding else {"pad_mode": "pad", "pad": kernel // 2}
        self.conv2d = ops.Conv2D(out_channels, kernel, stride=stride, **pad)

    def construct(self, x: Tensor) -> Tensor:
        """Map N,in_channels,H,W to N,out_channels,ceil(H / stride),ceil(W / stride)."""
        inner = x.astype("float16") if self.half else x
        y = self.conv2d(inner, self.weight.astype(inner.dtype))
        if self.has_bias:
            y = y + self.bias.astype(y.dtype).reshape(1, -1, 1, 1)
        return y.astype(x.dtype)


class ConvNorm(nn.SequentialCell):
    """Convolution (named ``0``), norm (named ``1``) and, if ``relu``, ReLU."""

    def __init__(self, conv: Conv, *, relu: bool = True) -> None:
        super().__init__(conv, Norm(conv.out_channels))
        self.relu = relu

    def construct(self, x: Tensor) -> Tensor:
        """Map N,in_channels,H,W to N,out_channels,H',W', where the convolution determines H' and W'."""
        conv, norm = self.cell_list
        x = norm(conv(x))
        return ops.relu(x) if self.relu else x


class BasicBlock(nn.Cell):
    """Residual block of two 3x3 convolutions with an identity shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = Conv(width, width, 3), Norm(width)
        self.conv2, self.bn2 = Conv(width, width, 3), Norm(width)

    def construct(self, x: Tensor) -> Tensor:
        """Map N,width,H,W to the same shape."""
        y = ops.relu(self.bn1(self.conv1(x)))
        return ops.relu(self.bn2(self.conv2(y)) + x)


class Bottleneck(nn.Cell):
    """Residual block of 1x1, 3x3 and 1x1 convolutions to 256 channels.

    The shortcut is the identity, or a projection if ``in_channels`` is not 256.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = Conv(in_channels, architecture.STEM), Norm(architecture.STEM)
        self.conv2, self.bn2 = Conv(architecture.STEM, architecture.STEM, 3), Norm(architecture.STEM)
        self.conv3, self.bn3 = Conv(architecture.STEM, architecture.LAYER1), Norm(architecture.LAYER1)
        same = in_channels == architecture.LAYER1
        self.downsample = nn.Identity() if same else ConvNorm(Conv(in_channels, architecture.LAYER1), relu=False)

    def construct(self, x: Tensor) -> Tensor:
        """Map N,in_channels,H,W to N,256,H,W."""
        y = ops.relu(self.bn1(self.conv1(x)))
        y = ops.relu(self.bn2(self.conv2(y)))
        return ops.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class HighResolutionModule(nn.Cell):
    """A module of HRNet: residual blocks in each branch, then the fusion of the branches.

    The fusion replaces the map of each branch by the sum of the maps of all branches, resized to its size.
    """

    def __init__(self, widths: tuple[int, ...], blocks: int, rule: Variant) -> None:
        super().__init__()
        self.nearest, self.twice = rule.fuse_resize == "nearest", rule.double_resize
        self.align_corners = rule.align_corners
        self.branches = nn.CellList(
            [nn.SequentialCell(*[BasicBlock(width) for _ in range(blocks)]) for width in widths]
        )
        numbers = range(len(widths))
        self.fuse_layers = nn.CellList(
            [nn.CellList([fuse_layer(widths, i, j, rule.same_padding) for j in numbers]) for i in numbers]
        )

    def construct(self, maps: list[Tensor]) -> list[Tensor]:
        """Map one feature map per branch, highest resolution first, to maps of the same shapes."""
        branch_maps = [self.branches[i](maps[i]) for i in range(len(maps))]
        return [ops.relu(self.fuse(i, branch_maps)) for i in range(len(maps))]

    def fuse(self, i: int, maps: list[Tensor]) -> Tensor:
        """Return the sum of all maps, each converted to the size and the channels of branch ``i``."""
        size = maps[i].shape[-2:]
        total = self.fuse_layers[i][0](maps[0])
        for j in range(1, len(maps)):
            y = self.fuse_layers[i][j](maps[j])
            if j > i:
                y = self.upsample(y, size, 2 ** (j - i))
            total = total + y
        return total

    def upsample(self, x: Tensor, size: Size, factor: int) -> Tensor:
        """Upsample the map of a branch of lower resolution.

        Args:
            x: Tensor N,C,h,w.
            size: Target (height, width).
            factor: The power of two between the resolutions of the two branches.

        Returns:
            Tensor N,C,height,width.
        """
        if self.nearest:
            return ops.interpolate(x, size=size, mode="nearest")
        if self.twice:
            x = resize(x, (x.shape[-2] * factor, x.shape[-1] * factor), self.align_corners)
        return resize(x, size, self.align_corners)


def fuse_layer(widths: tuple[int, ...], i: int, j: int, same_padding: bool) -> nn.Cell:
    """Create the fuse layer from branch ``j`` to branch ``i``, without the resize.

    Args:
        widths: Channels of each branch.
        i: Target branch.
        j: Source branch.
        same_padding: As in `Conv`.

    Returns:
        The identity for the same branch, a 1x1 convolution from a branch of lower resolution, or a chain of stride-2
        convolutions from a branch of higher resolution.
    """
    if i == j:
        return nn.Identity()
    if j > i:
        return ConvNorm(Conv(widths[j], widths[i]), relu=False)
    outs = [widths[j]] * (i - j - 1) + [widths[i]]
    convs = [Conv(widths[j], channels, 3, stride=2, same_padding=same_padding) for channels in outs]
    return nn.SequentialCell(*[ConvNorm(conv, relu=k < i - j - 1) for k, conv in enumerate(convs)])


class HRNet(nn.Cell):
    """The backbone; ``forward_features`` returns the maps of the four branches."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        rule = arch.rule
        same_padding = rule.same_padding
        self.conv1, self.bn1 = (
            Conv(3, architecture.STEM, 3, stride=2, same_padding=same_padding),
            Norm(architecture.STEM),
        )
        self.conv2, self.bn2 = (
            Conv(architecture.STEM, architecture.STEM, 3, stride=2, same_padding=same_padding),
            Norm(architecture.STEM),
        )
        self.layer1 = nn.SequentialCell(
            *[Bottleneck(architecture.LAYER1 if i else architecture.STEM) for i in range(arch.blocks)]
        )
        first = ConvNorm(Conv(architecture.LAYER1, arch.width, 3))
        self.transition1 = nn.CellList([first, new_branch(arch, 2, architecture.LAYER1)])
        self.stage2 = stage(arch, 2)
        self.transition2 = nn.CellList([nn.Identity(), nn.Identity(), new_branch(arch, 3, arch.widths[1])])
        self.stage3 = stage(arch, 3)
        last = new_branch(arch, 4, arch.widths[2])
        self.transition3 = nn.CellList([nn.Identity(), nn.Identity(), nn.Identity(), last])
        self.stage4 = stage(arch, 4)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the four branches for normalized images N,3,H,W.

        The first map is N,width,ceil(H/4),ceil(W/4). Each further map has twice the channels and half the height
        and width.
        """
        x = ops.relu(self.bn1(self.conv1(x)))
        x = ops.relu(self.bn2(self.conv2(x)))
        x = self.layer1(x)
        maps = self.stage2([self.transition1[0](x), self.transition1[1](x)])
        maps = self.stage3([*maps, self.transition2[2](maps[-1])])  # the new branch starts from the smallest map
        return self.stage4([*maps, self.transition3[3](maps[-1])])


def stage(arch: Arch, number: int) -> nn.SequentialCell:
    """Create the modules of stage 2, 3 or 4."""
    modules = range(arch.modules[number - 2])
    return nn.SequentialCell(*[HighResolutionModule(arch.widths[:number], arch.blocks, arch.rule) for _ in modules])


def new_branch(arch: Arch, number: int, in_channels: int) -> nn.SequentialCell:
    """Create the stride-2 convolution from which the new branch of a stage starts.

    Args:
        arch: The architecture of the network.
        number: The stage: 2, 3 or 4.
        in_channels: Channels of the input of the convolution.

    Returns:
        The layer.
    """
    conv = Conv(in_channels, arch.widths[number - 1], 3, stride=2, same_padding=arch.rule.same_padding)
    return nn.SequentialCell(ConvNorm(conv))
