"""The OCR head (Yuan et al., ECCV 2020, section 3) on HRNet, in PyTorch."""

import torch
from torch import Tensor, nn

from ocrnet.architecture import Arch, head_channels
from ocrnet.engines.torch.bilinear import conv_of_upsampled
from ocrnet.engines.torch.hrnet import Conv, HRNet, Norm, norm_act, resize

# Maximum height and width of maps for `conv_of_upsampled`: its matrices grow quadratically, to 25 MB at this length.
LONGEST = 2048


class NormAct(nn.Sequential):
    """Batch norm and activation of a head; the norm is the submodule ``0``, as in the authors' parameter names."""

    def __init__(self, channels: int, arch: Arch) -> None:
        super().__init__(Norm(channels, arch.rule.head_eps))
        self.slope = arch.rule.head_activation_slope

    def forward(self, x: Tensor) -> Tensor:
        """Map N,channels,H,W to the same shape."""
        return norm_act(self[0], x, self.slope)


class ConvNormAct(nn.Sequential):
    """Convolution with bias (named ``0``), norm (named ``1``) and activation of a head.

    Further layers are named from ``3`` on, because the authors' ReLU has the name ``2``.
    """

    def __init__(self, conv: Conv, arch: Arch, *further_layers: nn.Module) -> None:
        super().__init__(conv, Norm(conv.out_channels, arch.rule.head_eps), nn.Identity(), *further_layers)
        self.slope = arch.rule.head_activation_slope

    def forward(self, x: Tensor) -> Tensor:
        """Map N,in_channels,H,W to N,out_channels,H,W."""
        return self._after_conv(self[0](x))

    def of_upsampled(self, maps: list[Tensor], align_corners: bool) -> Tensor:
        """Resize the maps to the size of the first, concatenate them, and return `forward` of the result."""
        conv = self[0]
        assert isinstance(conv, Conv)
        return self._after_conv(conv_of_upsampled(conv, maps, align_corners))

    def _after_conv(self, x: Tensor) -> Tensor:
        _, norm, *further_layers = self
        x = norm_act(norm, x, self.slope)
        for layer in further_layers:
            x = layer(x)
        return x


class ObjectContext(nn.Module):
    """Attention from pixels (query) to object regions (key, value): formulas 4 and 5 of the paper."""

    def __init__(self, arch: Arch, low_resolution: bool) -> None:
        super().__init__()
        self.low_resolution = low_resolution
        channels, key = arch.channels, arch.key_channels
        self.scale = key**-0.5
        self.f_pixel = nn.Sequential(Conv(channels, key), NormAct(key, arch), Conv(key, key), NormAct(key, arch))
        self.f_object = nn.Sequential(Conv(channels, key), NormAct(key, arch), Conv(key, key), NormAct(key, arch))
        self.f_down = nn.Sequential(Conv(channels, key), NormAct(key, arch))
        self.f_up = nn.Sequential(Conv(key, channels), NormAct(channels, arch))

    def relation(self, pixels: Tensor, objects: Tensor) -> Tensor:
        """Return the attention weight of each object region for each pixel, N,HW,K, with sum 1 over the regions.

        ``pixels`` is N,channels,H,W; ``objects`` is N,channels,K,1.
        """
        query = self.f_pixel(pixels).flatten(2).transpose(1, 2)  # N, HW, key
        key = self.f_object(objects).flatten(2)  # N, key, K
        return torch.softmax(self.scale * (query @ key), dim=-1)

    def forward(self, pixels: Tensor, objects: Tensor) -> Tensor:
        """Return the object context of every pixel, N,channels,H,W.

        ``pixels`` is N,channels,H,W; ``objects`` is N,channels,K,1.
        """
        conv, norm = self.f_up
        value = self.f_down(objects)  # N, key, K, 1
        # Apply the convolution to K regions instead of HW pixels: equivalent, because the weights of a pixel sum to 1.
        if self.low_resolution:
            value = conv(value)
        context = self.relation(pixels, objects) @ value.flatten(2).transpose(1, 2)  # N, HW, key or channels
        context = context.transpose(1, 2).unflatten(2, pixels.shape[-2:])
        return norm(context if self.low_resolution else conv(context))


class SpatialOCR(nn.Module):
    """Combine pixels and their object context into the classifier's input features, with channel dropout."""

    def __init__(self, arch: Arch, low_resolution: bool) -> None:
        super().__init__()
        self.dropout = arch.dropout
        self.object_context_block = ObjectContext(arch, low_resolution)
        features = head_channels(arch)
        conv = Conv(2 * arch.channels, features, arch.rule.bottleneck_kernel)
        self.conv_bn_dropout = nn.Sequential(conv, NormAct(features, arch))

    def forward(self, pixels: Tensor, objects: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        """Return the classifier's input features.

        Args:
            pixels: Pixel representations N,channels,H,W.
            objects: Object region representations N,channels,K,1.
            dropout_mask: Bool N,features: the channels that dropout keeps; None disables dropout.

        Returns:
            Tensor N,features,H,W.
        """
        context = self.object_context_block(pixels, objects)
        x = self.conv_bn_dropout(torch.cat([context, pixels], 1))
        if dropout_mask is not None:
            x = x * (dropout_mask.to(x.dtype) / (1 - self.dropout))[:, :, None, None]
        return x


def soft_regions(logits: Tensor) -> Tensor:
    """Return the soft object region of each class, N,K,HW, with sum 1 over the pixels, from logits N,K,H,W."""
    return torch.softmax(logits.flatten(2), dim=2)


def gather_object_regions(pixels: Tensor, logits: Tensor) -> Tensor:
    """Return the object region representations N,C,K,1.

    The representation of a class is the mean of the pixels N,C,H,W, weighted by the spatial softmax of its logits
    N,K,H,W.
    """
    return (soft_regions(logits) @ pixels.flatten(2).transpose(1, 2)).transpose(1, 2).unsqueeze(3)


class OCRNet(HRNet):
    """HRNet with the OCR head; ``architecture.shapes(arch)`` contains the names and shapes of its state dict.

    ``low_resolution`` True: convolutions of the head that follow an upsampling or the attention are computed before it,
    at lower cost. This saves a quarter of the operations of HRNet-W48, and results differ only by rounding. It applies
    to images with sides up to 4 * `LONGEST`. False: the order of operations is that of the paper, as exported graphs of
    any size require.
    """

    def __init__(self, arch: Arch, *, low_resolution: bool = True) -> None:
        super().__init__(arch)
        self.low_resolution = low_resolution
        total = sum(arch.widths)
        self.conv3x3_ocr = ConvNormAct(Conv(total, arch.channels, 3, bias=True), arch)
        self.ocr_distri_head = SpatialOCR(arch, low_resolution)
        self.cls_head = Conv(head_channels(arch), arch.num_classes, bias=True)
        classifier = Conv(total, arch.num_classes, bias=True)
        self.aux_head = ConvNormAct(Conv(total, total, self.rule.aux_kernel, bias=True), arch, classifier)

    def forward(self, x: Tensor, dropout_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (aux, ocr), each N,num_classes,ceil(H/4),ceil(W/4).

        ``x`` is normalized N,3,H,W with H and W at least 32. ``dropout_mask`` N,features marks the channels of the OCR
        head that dropout keeps; None disables dropout.
        """
        maps = self.forward_features(x)
        aux, pixels = self._heads(maps)
        features = self.ocr_distri_head(pixels, gather_object_regions(pixels, aux), dropout_mask)
        return aux, self.cls_head(features)

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (regions, relation), each N,num_classes,ceil(H/4),ceil(W/4), for normalized N,3,H,W.

        `ocrnet.engines.base.Engine.predict` defines both.
        """
        aux, pixels = self._heads(self.forward_features(x))
        relation = self.ocr_distri_head.object_context_block.relation(pixels, gather_object_regions(pixels, aux))
        return soft_regions(aux).view_as(aux), relation.transpose(1, 2).reshape(aux.shape)

    def _heads(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the auxiliary head's logits and the pixel representations for the four maps of the backbone."""
        heads, align_corners = (self.aux_head, self.conv3x3_ocr), self.rule.align_corners
        height, width = maps[0].shape[-2:]
        if self.low_resolution and max(height, width) <= LONGEST:
            return [head.of_upsampled(maps, align_corners) for head in heads]
        x = torch.cat([resize(y, (height, width), align_corners) for y in maps], 1)
        return [head(x) for head in heads]
