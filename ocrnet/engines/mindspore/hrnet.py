"""HRNet (Wang et al., TPAMI 2020) in MindSpore: a stem, a bottleneck stage, and three stages of parallel branches.

Attribute names give the authors' parameter names (batch norms by ``ocrnet.weights.mindspore``), so ``nn.Identity``
stands where their lists hold None. What a step should know at compile time (sizes, rules) is a Python value.
"""

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ocrnet import architecture
from ocrnet.architecture import Arch, Variant

Size = tuple[int, int]


def resize(x: Tensor, size: Size, align_corners: bool) -> Tensor:
    """Bilinear resize of N,C,H,W to ``size`` (height, width)."""
    if x.shape[-2:] == size:
        return x
    return ops.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def parameter(shape: tuple[int, ...], value: float, *, trained: bool = True) -> Parameter:
    """A float32 parameter full of ``value`` until weights are loaded; nothing is drawn at random."""
    return Parameter(Tensor(np.full(shape, value, np.float32)), requires_grad=trained)


class Norm(nn.Cell):
    """Batch norm over N, H and W, in float32 whatever comes in; identity until weights are loaded."""

    def __init__(self, channels: int, eps: float = architecture.BN_EPS) -> None:
        super().__init__()
        self.gamma, self.beta = parameter((channels,), 1), parameter((channels,), 0)
        self.moving_mean = parameter((channels,), 0, trained=False)
        self.moving_variance = parameter((channels,), 1, trained=False)
        self.by_batch = ops.BatchNorm(is_training=True, epsilon=eps, momentum=architecture.BN_MOMENTUM)
        self.by_statistics = ops.BatchNorm(is_training=False, epsilon=eps)
        self.eps, self.ranks = eps, 1

    def synchronise(self, ranks: int) -> None:
        """Normalise by the batches of all ``ranks`` in training. MindSpore's own SyncBatchNorm refuses CPUs."""
        self.ranks = ranks
        if ranks > 1:
            self.sum = ops.AllReduce()

    def construct(self, x: Tensor) -> Tensor:
        """Normalise N,C,H,W: by the batch in training, which updates the moving statistics, else by those."""
        wide = x.astype("float32")
        if self.training and self.ranks > 1:
            return self.by_all_batches(wide).astype(x.dtype)
        norm = self.by_batch if self.training else self.by_statistics
        return norm(wide, self.gamma, self.beta, self.moving_mean, self.moving_variance)[0].astype(x.dtype)

    def by_all_batches(self, x: Tensor) -> Tensor:
        """Normalise by the mean and variance over the ranks, whose batches are of one size: one exchange a norm."""
        mean = x.mean((0, 2, 3), True)
        square = ops.square(x - mean).mean((0, 2, 3), True) + ops.square(mean)
        both = self.sum(ops.stack((mean, square))) / self.ranks
        mean, variance = both[0], both[1] - ops.square(both[0])
        y = (x - mean) * ops.rsqrt(variance + self.eps)
        count = x.shape[0] * x.shape[2] * x.shape[3] * self.ranks
        self.move(self.moving_mean, mean)
        self.move(self.moving_variance, variance * (count / (count - 1)))
        return y * self.gamma.reshape(1, -1, 1, 1) + self.beta.reshape(1, -1, 1, 1)

    def move(self, statistic: Parameter, seen: Tensor) -> None:
        """Let a moving statistic follow what a batch showed."""
        seen = ops.stop_gradient(seen).reshape(-1)
        ops.assign(statistic, (1 - architecture.BN_MOMENTUM) * statistic + architecture.BN_MOMENTUM * seen)


class Conv(nn.Cell):
    """A 1x1 or 3x3 convolution that keeps the size (or halves it, stride 2); zero until weights are loaded.

    ``same_padding`` pads a stride-2 convolution by (0, 1) on even sizes and (1, 1) on odd ones. The computation has the
    dtype of the input, or float16 if ``half`` is set.
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
        """N,in_channels,H,W -> N,out_channels,ceil(H / stride),ceil(W / stride)."""
        inner = x.astype("float16") if self.half else x
        y = self.conv2d(inner, self.weight.astype(inner.dtype))
        if self.has_bias:
            y = y + self.bias.astype(y.dtype).reshape(1, -1, 1, 1)
        return y.astype(x.dtype)


class ConvNorm(nn.SequentialCell):
    """Convolution and norm, then ReLU where ``relu``; the names are ``0`` and ``1``."""

    def __init__(self, conv: Conv, *, relu: bool = True) -> None:
        super().__init__(conv, Norm(conv.out_channels))
        self.relu = relu

    def construct(self, x: Tensor) -> Tensor:
        """N,in_channels,H,W -> N,out_channels,H',W'."""
        conv, norm = self.cell_list
        x = norm(conv(x))
        return ops.relu(x) if self.relu else x


class BasicBlock(nn.Cell):
    """Two 3x3 convolutions and the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = Conv(width, width, 3), Norm(width)
        self.conv2, self.bn2 = Conv(width, width, 3), Norm(width)

    def construct(self, x: Tensor) -> Tensor:
        """N,width,H,W -> the same shape."""
        y = ops.relu(self.bn1(self.conv1(x)))
        return ops.relu(self.bn2(self.conv2(y)) + x)


class Bottleneck(nn.Cell):
    """1x1, 3x3, 1x1 convolutions to 256 channels and the identity, projected where ``in_channels`` differs."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = Conv(in_channels, architecture.STEM), Norm(architecture.STEM)
        self.conv2, self.bn2 = Conv(architecture.STEM, architecture.STEM, 3), Norm(architecture.STEM)
        self.conv3, self.bn3 = Conv(architecture.STEM, architecture.LAYER1), Norm(architecture.LAYER1)
        same = in_channels == architecture.LAYER1
        self.downsample = nn.Identity() if same else ConvNorm(Conv(in_channels, architecture.LAYER1), relu=False)

    def construct(self, x: Tensor) -> Tensor:
        """N,in_channels,H,W -> N,256,H,W."""
        y = ops.relu(self.bn1(self.conv1(x)))
        y = ops.relu(self.bn2(self.conv2(y)))
        return ops.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class HighResolutionModule(nn.Cell):
    """One multi-resolution module: residual branches, then every branch becomes the sum of all, at its own size."""

    def __init__(self, widths: tuple[int, ...], blocks: int, rule: Variant) -> None:
        super().__init__()
        self.nearest, self.twice = rule.fuse_resize == "nearest", rule.double_resize
        self.align_corners = rule.align_corners
        self.branches = nn.CellList([nn.SequentialCell(*[BasicBlock(w) for _ in range(blocks)]) for w in widths])
        numbers = range(len(widths))
        self.fuse_layers = nn.CellList(
            [nn.CellList([fuse_layer(widths, i, j, rule.same_padding) for j in numbers]) for i in numbers]
        )

    def construct(self, maps: list[Tensor]) -> list[Tensor]:
        """One map a branch, finest first -> the same shapes."""
        deep = [self.branches[i](maps[i]) for i in range(len(maps))]
        return [ops.relu(self.fuse(i, deep)) for i in range(len(maps))]

    def fuse(self, i: int, maps: list[Tensor]) -> Tensor:
        """The sum of all maps at branch ``i``'s size and channels."""
        size = maps[i].shape[-2:]
        total = self.fuse_layers[i][0](maps[0])
        for j in range(1, len(maps)):
            y = self.fuse_layers[i][j](maps[j])
            if j > i:
                y = self.upsample(y, size, 2 ** (j - i))
            total = total + y
        return total

    def upsample(self, x: Tensor, size: Size, factor: int) -> Tensor:
        """A coarser branch at ``size``, about ``factor`` times its own."""
        if self.nearest:
            return ops.interpolate(x, size=size, mode="nearest")
        if self.twice:
            x = resize(x, (x.shape[-2] * factor, x.shape[-1] * factor), self.align_corners)
        return resize(x, size, self.align_corners)


def fuse_layer(widths: tuple[int, ...], i: int, j: int, same_padding: bool) -> nn.Cell:
    """The layer from branch ``j`` to branch ``i``, before its resize: 1x1 from coarser, a stride-2 chain from finer."""
    if i == j:
        return nn.Identity()
    if j > i:
        return ConvNorm(Conv(widths[j], widths[i]), relu=False)
    outs = [widths[j]] * (i - j - 1) + [widths[i]]
    convs = [Conv(widths[j], channels, 3, stride=2, same_padding=same_padding) for channels in outs]
    return nn.SequentialCell(*[ConvNorm(conv, relu=k < i - j - 1) for k, conv in enumerate(convs)])


class HRNet(nn.Cell):
    """The backbone; ``forward_features`` gives the four branches."""

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
        """N,3,H,W normalised -> four maps: N,width,ceil(H/4),ceil(W/4), then twice the channels at half the size."""
        x = ops.relu(self.bn1(self.conv1(x)))
        x = ops.relu(self.bn2(self.conv2(x)))
        x = self.layer1(x)
        maps = self.stage2([self.transition1[0](x), self.transition1[1](x)])
        maps = self.stage3([*maps, self.transition2[2](maps[-1])])  # the new branch starts from the coarsest one
        return self.stage4([*maps, self.transition3[3](maps[-1])])


def stage(arch: Arch, number: int) -> nn.SequentialCell:
    """The modules of stage 2, 3 or 4."""
    modules = range(arch.modules[number - 2])
    return nn.SequentialCell(*[HighResolutionModule(arch.widths[:number], arch.blocks, arch.rule) for _ in modules])


def new_branch(arch: Arch, number: int, in_channels: int) -> nn.SequentialCell:
    """The halving that begins the coarsest branch of a stage."""
    conv = Conv(in_channels, arch.widths[number - 1], 3, stride=2, same_padding=arch.rule.same_padding)
    return nn.SequentialCell(ConvNorm(conv))
