"""The OCR head (Yuan et al., ECCV 2020, section 3) on HRNet, in PyTorch."""

import torch
from torch import Tensor, nn

from ocrnet.architecture import Arch, head_channels
from ocrnet.engines.torch.bilinear import conv_of_upsampled
from ocrnet.engines.torch.hrnet import Conv, HRNet, Norm, norm_act, resize

# The matrices of `conv_of_upsampled` grow with the square of a side: 25 MB at this many rows or columns.
LONGEST = 2048


class NormAct(nn.Sequential):
    """A head's norm (named ``0``) with its activation."""

    def __init__(self, channels: int, arch: Arch) -> None:
        super().__init__(Norm(channels, arch.rule.head_eps))
        self.slope = arch.rule.head_activation_slope

    def forward(self, x: Tensor) -> Tensor:
        """N,channels,H,W -> the same shape."""
        return norm_act(self[0], x, self.slope)


class ConvNormAct(nn.Sequential):
    """A head's convolution, with bias, and its norm and activation; the names are ``0`` and ``1``.

    Further layers follow under ``3``; ``2`` stands for the authors' ReLU.
    """

    def __init__(self, conv: Conv, arch: Arch, *then: nn.Module) -> None:
        super().__init__(conv, Norm(conv.out_channels, arch.rule.head_eps), nn.Identity(), *then)
        self.slope = arch.rule.head_activation_slope

    def forward(self, x: Tensor) -> Tensor:
        """N,in_channels,H,W -> N,out_channels,H,W."""
        return self._after_conv(self[0](x))

    def of_upsampled(self, maps: list[Tensor], align_corners: bool) -> Tensor:
        """What `forward` gives for the maps brought to the first one's size and concatenated."""
        conv = self[0]
        assert isinstance(conv, Conv)
        return self._after_conv(conv_of_upsampled(conv, maps, align_corners))

    def _after_conv(self, x: Tensor) -> Tensor:
        _, norm, *then = self
        x = norm_act(norm, x, self.slope)
        for layer in then:
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
        """Pixels N,channels,H,W and objects N,channels,K,1 -> N,HW,K: what each pixel takes from each object."""
        query = self.f_pixel(pixels).flatten(2).transpose(1, 2)  # N, HW, key
        key = self.f_object(objects).flatten(2)  # N, key, K
        return torch.softmax(self.scale * (query @ key), dim=-1)

    def forward(self, pixels: Tensor, objects: Tensor) -> Tensor:
        """Pixels N,channels,H,W and objects N,channels,K,1 -> the objects' context of every pixel, as pixels."""
        conv, norm = self.f_up
        value = self.f_down(objects)  # N, key, K, 1
        if self.low_resolution:  # what is linear on K regions, not on HW pixels; a pixel's relations add up to 1
            value = conv(value)
        context = self.relation(pixels, objects) @ value.flatten(2).transpose(1, 2)  # N, HW, key or channels
        context = context.transpose(1, 2).unflatten(2, pixels.shape[-2:])
        return norm(context if self.low_resolution else conv(context))


class SpatialOCR(nn.Module):
    """Pixels and their object context, mixed to the features that the classifier sees, with channel dropout."""

    def __init__(self, arch: Arch, low_resolution: bool) -> None:
        super().__init__()
        self.dropout = arch.dropout
        self.object_context_block = ObjectContext(arch, low_resolution)
        features = head_channels(arch)
        conv = Conv(2 * arch.channels, features, arch.rule.bottleneck_kernel)
        self.conv_bn_dropout = nn.Sequential(conv, NormAct(features, arch))

    def forward(self, pixels: Tensor, objects: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        """Pixels N,channels,H,W, objects N,channels,K,1, dropout_mask N,features or None -> N,features,H,W."""
        context = self.object_context_block(pixels, objects)
        x = self.conv_bn_dropout(torch.cat([context, pixels], 1))
        if dropout_mask is not None:
            x = x * (dropout_mask.to(x.dtype) / (1 - self.dropout))[:, :, None, None]
        return x


def soft_regions(logits: Tensor) -> Tensor:
    """Where each class's object region lies: logits N,K,H,W -> N,K,HW, which add up to 1 over the pixels."""
    return torch.softmax(logits.flatten(2), dim=2)


def gather_object_regions(pixels: Tensor, logits: Tensor) -> Tensor:
    """Object regions: pixels N,C,H,W averaged by each class's spatial softmax of logits N,K,H,W -> N,C,K,1."""
    return (soft_regions(logits) @ pixels.flatten(2).transpose(1, 2)).transpose(1, 2).unsqueeze(3)


class OCRNet(HRNet):
    """HRNet with the OCR head; names and shapes of its state are ``architecture.shapes(arch)``.

    ``low_resolution``: the head's linear layers are computed where they cost least, which saves W48 a quarter of its
    operations and differs by rounding alone, for images of sides up to 4 `LONGEST`; False: where the paper has them, as
    graphs of any size need.
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
        """Logits (aux, ocr), each N,num_classes,ceil(H/4),ceil(W/4), of x N,3,H,W normalised, H and W at least 32.

        ``dropout_mask`` N,features marks the channels of the OCR head that dropout keeps; None drops none.
        """
        maps = self.forward_features(x)
        aux, pixels = self._heads(maps)
        features = self.ocr_distri_head(pixels, gather_object_regions(pixels, aux), dropout_mask)
        return aux, self.cls_head(features)

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(regions, relation), each N,num_classes,ceil(H/4),ceil(W/4): see `ocrnet.engines.base.Engine.predict`."""
        aux, pixels = self._heads(self.forward_features(x))
        relation = self.ocr_distri_head.object_context_block.relation(pixels, gather_object_regions(pixels, aux))
        return soft_regions(aux).view_as(aux), relation.transpose(1, 2).reshape(aux.shape)

    def _heads(self, maps: list[Tensor]) -> list[Tensor]:
        """The auxiliary head's logits and the pixel representations, from the four maps."""
        heads, align_corners = (self.aux_head, self.conv3x3_ocr), self.rule.align_corners
        height, width = maps[0].shape[-2:]
        if self.low_resolution and max(height, width) <= LONGEST:
            return [head.of_upsampled(maps, align_corners) for head in heads]
        x = torch.cat([resize(y, (height, width), align_corners) for y in maps], 1)
        return [head(x) for head in heads]
