"""HRNet (Wang et al., TPAMI 2020) in PyTorch: a stem, a bottleneck stage, and three stages of parallel branches.

The state-dict names are those of the authors. Where their module lists contain None, these contain ``nn.Identity``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ocrnet import architecture
from ocrnet.architecture import Arch, Variant
from ocrnet.engines.torch.sync_batch_norm import sync_batch_norm

Size = tuple[int, int]


def resize(x: Tensor, size: Size, align_corners: bool) -> Tensor:
    """Resize a tensor bilinearly.

    Args:
        x: Tensor N,C,H,W.
        size: Target (height, width).
        align_corners: As in ``F.interpolate``.

    Returns:
        Tensor N,C,height,width; ``x`` itself if it has this size.
    """
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


class Norm(nn.Module):
    """Batch norm over N, H and W, without ``num_batches_tracked``; the identity until weights are loaded.

    ``sync``: in training, normalize over the batches of all ranks. ``fused``: in training, the function that computes
    the norm together with the following addition and ReLU (``fused_norm.batch_norm_relu``); None: separate operations.
    """

    def __init__(self, channels: int, eps: float = architecture.BN_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.sync = False
        self.fused: Callable[..., Tensor] | None = None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize N,C,H,W by the statistics of the batch in training, else by the running statistics.

        Training also updates the running statistics.
        """
        statistics = self.running_mean, self.running_var
        if self.training and self.sync:
            return sync_batch_norm(x, self.weight, self.bias, *statistics, architecture.BN_MOMENTUM, self.eps)
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, architecture.BN_MOMENTUM, self.eps)


class Conv(nn.Conv2d):
    """A 1x1 or 3x3 convolution that keeps height and width, or halves them with stride 2; initially zero.

    ``same_padding``: a convolution of stride 2 pads even sizes by (0, 1) and odd sizes by (1, 1).
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
        super().__init__(
            in_channels, out_channels, kernel, stride, padding=0 if same_padding else kernel // 2, bias=bias
        )
        self.same_padding = same_padding

    def reset_parameters(self) -> None:
        """Set weight and bias to zero without using PyTorch's global random generator.

        Initial values always come from ``architecture.init`` or from a file.
        """
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map N,in_channels,H,W to N,out_channels,ceil(H / stride),ceil(W / stride)."""
        if self.same_padding:
            # Pad by 1 and slice: in a traced graph, the sizes of a slice stay dynamic, but those of a padding do not.
            x = F.pad(x, (1, 1, 1, 1))[..., 1 - x.shape[-2] % 2 :, 1 - x.shape[-1] % 2 :]
        return super().forward(x)


def norm_act(norm: nn.Module, x: Tensor, slope: float = 0.0, add: Tensor | None = None) -> Tensor:
    """Apply a norm, add ``add`` if it is not None, and apply the activation.

    Args:
        norm: The norm, or ``nn.Identity`` after folding.
        x: Tensor N,C,H,W.
        slope: Negative slope of the leaky ReLU; 0 selects ReLU.
        add: Tensor N,C,H,W to add before the activation, or None.

    Returns:
        Tensor N,C,H,W.
    """
    if isinstance(norm, Norm) and norm.training and norm.fused is not None and not slope:
        statistics = norm.running_mean, norm.running_var
        return norm.fused(x, norm.weight, norm.bias, *statistics, architecture.BN_MOMENTUM, norm.eps, add)
    y = norm(x)
    if add is not None:
        y = y + add
    return F.leaky_relu(y, slope) if slope else F.relu(y)


class ConvNorm(nn.Sequential):
    """Convolution (named ``0``), norm (named ``1``) and, if ``relu``, ReLU."""

    def __init__(self, conv: Conv, *, relu: bool = True) -> None:
        super().__init__(conv, Norm(conv.out_channels))
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Map N,in_channels,H,W to N,out_channels,H',W', where the convolution determines H' and W'."""
        return norm_act(self[1], self[0](x)) if self.relu else self[1](self[0](x))


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions with an identity shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = Conv(width, width, 3), Norm(width)
        self.conv2, self.bn2 = Conv(width, width, 3), Norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map N,width,H,W to the same shape."""
        y = norm_act(self.bn1, self.conv1(x))
        return norm_act(self.bn2, self.conv2(y), add=x)


class Bottleneck(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        """Map N,in_channels,H,W to N,256,H,W."""
        y = norm_act(self.bn1, self.conv1(x))
        y = norm_act(self.bn2, self.conv2(y))
        return norm_act(self.bn3, self.conv3(y), add=self.downsample(x))


class HighResolutionModule(nn.Module):
    """A module of HRNet: residual blocks in each branch, then the fusion of the branches.

    The fusion replaces the map of each branch by the sum of the maps of all branches, resized to its size.
    """

    def __init__(self, widths: tuple[int, ...], blocks: int, rule: Variant) -> None:
        super().__init__()
        self.rule = rule
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(width) for _ in range(blocks))) for width in widths)
        numbers = range(len(widths))
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(fuse_layer(widths, i, j, rule.same_padding) for j in numbers) for i in numbers
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Map one feature map per branch, highest resolution first, to maps of the same shapes."""
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        return [F.relu(self.fuse(i, maps)) for i in range(len(maps))]

    def fuse(self, i: int, maps: list[Tensor]) -> Tensor:
        """Return the sum of all maps, each converted to the size and the channels of branch ``i``."""
        height, width = maps[i].shape[-2:]
        layers = self.fuse_layers[i]
        assert isinstance(layers, nn.ModuleList)
        total = layers[0](maps[0])
        for j in range(1, len(maps)):
            y = layers[j](maps[j])
            total = total + (self.upsample(y, (height, width), 2 ** (j - i)) if j > i else y)
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
        if self.rule.fuse_resize == "nearest":
            return F.interpolate(x, size, mode="nearest")
        if self.rule.double_resize:
            x = resize(x, (x.shape[-2] * factor, x.shape[-1] * factor), self.rule.align_corners)
        return resize(x, size, self.rule.align_corners)


def fuse_layer(widths: tuple[int, ...], i: int, j: int, same_padding: bool) -> nn.Module:
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
    convs = (Conv(widths[j], channels, 3, stride=2, same_padding=same_padding) for channels in outs)
    return nn.Sequential(*(ConvNorm(conv, relu=k < i - j - 1) for k, conv in enumerate(convs)))


class HRNet(nn.Module):
    """The backbone; ``forward_features`` returns the maps of the four branches."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.arch, self.rule = arch, arch.rule
        same_padding = self.rule.same_padding
        self.conv1, self.bn1 = (
            Conv(3, architecture.STEM, 3, stride=2, same_padding=same_padding),
            Norm(architecture.STEM),
        )
        self.conv2, self.bn2 = (
            Conv(architecture.STEM, architecture.STEM, 3, stride=2, same_padding=same_padding),
            Norm(architecture.STEM),
        )
        self.layer1 = nn.Sequential(
            *(Bottleneck(architecture.LAYER1 if i else architecture.STEM) for i in range(arch.blocks))
        )
        first = ConvNorm(Conv(architecture.LAYER1, arch.width, 3))
        self.transition1 = nn.ModuleList([first, self._new_branch(2, architecture.LAYER1)])
        self.stage2 = self._stage(2)
        self.transition2 = nn.ModuleList([nn.Identity(), nn.Identity(), self._new_branch(3, arch.widths[1])])
        self.stage3 = self._stage(3)
        self.transition3 = nn.ModuleList([*(nn.Identity() for _ in range(3)), self._new_branch(4, arch.widths[2])])
        self.stage4 = self._stage(4)

    def _stage(self, stage: int) -> nn.Sequential:
        modules = range(self.arch.modules[stage - 2])
        return nn.Sequential(
            *(HighResolutionModule(self.arch.widths[:stage], self.arch.blocks, self.rule) for _ in modules)
        )

    def _new_branch(self, stage: int, in_channels: int) -> nn.Sequential:
        conv = Conv(in_channels, self.arch.widths[stage - 1], 3, stride=2, same_padding=self.rule.same_padding)
        return nn.Sequential(ConvNorm(conv))

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the four branches for normalized images N,3,H,W.

        The first map is N,width,ceil(H/4),ceil(W/4). Each further map has twice the channels and half the height
        and width.
        """
        x = norm_act(self.bn1, self.conv1(x))
        x = norm_act(self.bn2, self.conv2(x))
        x = self.layer1(x)
        maps = self.stage2([transition(x) for transition in self.transition1])
        for transitions, stage in ((self.transition2, self.stage3), (self.transition3, self.stage4)):
            inputs = [*maps, maps[-1]]  # the new branch starts from the smallest map
            maps = stage([transition(x) for transition, x in zip(transitions, inputs, strict=True)])
        return maps
