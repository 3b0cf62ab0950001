"""The OCR head (Yuan et al., ECCV 2020, section 3) on HRNet, in MindSpore."""

from mindspore import Tensor, nn, ops

from ocrnet.architecture import Arch, head_channels
from ocrnet.engines.mindspore.hrnet import Conv, HRNet, Norm, resize


def activate(x: Tensor, slope: float) -> Tensor:
    """Apply ReLU, or leaky ReLU if ``slope`` is not 0."""
    return ops.leaky_relu(x, slope) if slope else ops.relu(x)


class NormAct(nn.SequentialCell):
    """Norm (named ``0``) and activation of a head."""

    def __init__(self, channels: int, arch: Arch) -> None:
        super().__init__(Norm(channels, arch.rule.head_eps))
        self.slope = arch.rule.head_activation_slope

    def construct(self, x: Tensor) -> Tensor:
        """Map N,channels,H,W to the same shape."""
        return activate(self.cell_list[0](x), self.slope)


class ConvNormAct(nn.SequentialCell):
    """Convolution with bias (named ``0``), norm (named ``1``) and activation of a head.

    Further layers are named from ``3`` on, because the authors' ReLU has the name ``2``.
    """

    def __init__(self, conv: Conv, arch: Arch, *further_layers: nn.Cell) -> None:
        super().__init__(conv, Norm(conv.out_channels, arch.rule.head_eps), nn.Identity(), *further_layers)
        self.slope = arch.rule.head_activation_slope

    def construct(self, x: Tensor) -> Tensor:
        """Map N,in_channels,H,W to N,out_channels,H,W."""
        x = activate(self.cell_list[1](self.cell_list[0](x)), self.slope)
        for layer in self.cell_list[3:]:
            x = layer(x)
        return x


class ObjectContext(nn.Cell):
    """Attention from pixels (query) to object regions (key, value): formulas 4 and 5 of the paper."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        channels, key = arch.channels, arch.key_channels
        self.scale = key**-0.5
        self.f_pixel = nn.SequentialCell(Conv(channels, key), NormAct(key, arch), Conv(key, key), NormAct(key, arch))
        self.f_object = nn.SequentialCell(Conv(channels, key), NormAct(key, arch), Conv(key, key), NormAct(key, arch))
        self.f_down = nn.SequentialCell(Conv(channels, key), NormAct(key, arch))
        self.f_up = nn.SequentialCell(Conv(key, channels), NormAct(channels, arch))

    def relation(self, pixels: Tensor, objects: Tensor) -> Tensor:
        """Return the attention weight of each object region for each pixel, N,HW,K, with sum 1 over the regions.

        ``pixels`` is N,channels,H,W; ``objects`` is N,channels,K,1.
        """
        query = flatten(self.f_pixel(pixels)).swapaxes(1, 2)  # N, HW, key
        key = flatten(self.f_object(objects))  # N, key, K
        return softmax(self.scale * ops.bmm(query, key))

    def construct(self, pixels: Tensor, objects: Tensor) -> Tensor:
        """Return the object context of every pixel, N,channels,H,W.

        ``pixels`` is N,channels,H,W; ``objects`` is N,channels,K,1.
        """
        value = flatten(self.f_down(objects)).swapaxes(1, 2)  # N, K, key
        context = ops.bmm(self.relation(pixels, objects), value)  # N, HW, key
        number, _, height, width = pixels.shape
        return self.f_up(context.swapaxes(1, 2).reshape(number, -1, height, width))


class SpatialOCR(nn.Cell):
    """Combine pixels and their object context into the classifier's input features, with channel dropout."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.kept = 1 - arch.dropout
        self.object_context_block = ObjectContext(arch)
        features = head_channels(arch)
        conv = Conv(2 * arch.channels, features, arch.rule.bottleneck_kernel)
        self.conv_bn_dropout = nn.SequentialCell(conv, NormAct(features, arch))

    def construct(self, pixels: Tensor, objects: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        """Return the classifier's input features.

        Args:
            pixels: Pixel representations N,channels,H,W.
            objects: Object region representations N,channels,K,1.
            dropout_mask: Bool N,features: the channels that dropout keeps; None disables dropout.

        Returns:
            Tensor N,features,H,W.
        """
        context = self.object_context_block(pixels, objects)
        x = self.conv_bn_dropout(ops.cat((context, pixels), 1))
        if dropout_mask is not None:
            x = x * (dropout_mask.astype(x.dtype) / self.kept).reshape(x.shape[0], -1, 1, 1)
        return x


def flatten(x: Tensor) -> Tensor:
    """Reshape N,C,H,W to N,C,HW."""
    return x.reshape(x.shape[0], x.shape[1], -1)


def softmax(x: Tensor) -> Tensor:
    """Apply softmax over the last axis, computed in float32; the result has the dtype of ``x``."""
    return ops.softmax(x.astype("float32"), -1).astype(x.dtype)


def soft_regions(logits: Tensor) -> Tensor:
    """Return the soft object region of each class, N,K,HW, with sum 1 over the pixels, from logits N,K,H,W."""
    return softmax(flatten(logits))


def gather_object_regions(pixels: Tensor, logits: Tensor) -> Tensor:
    """Return the object region representations N,C,K,1.

    The representation of a class is the mean of the pixels N,C,H,W, weighted by the spatial softmax of its logits
    N,K,H,W.
    """
    return ops.bmm(soft_regions(logits), flatten(pixels).swapaxes(1, 2)).swapaxes(1, 2).expand_dims(3)


class OCRNet(HRNet):
    """HRNet with the OCR head; ``architecture.shapes(arch)`` contains the names and shapes of its parameters."""

    def __init__(self, arch: Arch) -> None:
        super().__init__(arch)
        total = sum(arch.widths)
        self.align_corners, self.half = arch.rule.align_corners, False
        self.conv3x3_ocr = ConvNormAct(Conv(total, arch.channels, 3, bias=True), arch)
        self.ocr_distri_head = SpatialOCR(arch)
        self.cls_head = Conv(head_channels(arch), arch.num_classes, bias=True)
        classifier = Conv(total, arch.num_classes, bias=True)
        self.aux_head = ConvNormAct(Conv(total, total, arch.rule.aux_kernel, bias=True), arch, classifier)

    def construct(self, x: Tensor, dropout_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits (aux, ocr), each N,num_classes,ceil(H/4),ceil(W/4), for normalized x N,3,H,W.

        H and W must be at least 32. ``dropout_mask`` N,features marks the channels of the OCR head that dropout keeps;
        None disables dropout.
        """
        aux, pixels = self.heads(x)
        features = self.ocr_distri_head(pixels, gather_object_regions(pixels, aux), dropout_mask)
        return aux, self.cls_head(features)

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (regions, relation), each N,num_classes,ceil(H/4),ceil(W/4), for normalized x N,3,H,W.

        `ocrnet.engines.base.Engine.predict` defines both.
        """
        aux, pixels = self.heads(x)
        relation = self.ocr_distri_head.object_context_block.relation(pixels, gather_object_regions(pixels, aux))
        return soft_regions(aux).reshape(aux.shape), relation.swapaxes(1, 2).reshape(aux.shape)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the auxiliary head's logits and the pixel representations for normalized x N,3,H,W."""
        if self.half:
            x = x.astype("float16")
        maps = self.forward_features(x)
        size = maps[0].shape[-2:]
        x = ops.cat([resize(y, size, self.align_corners) for y in maps], 1)
        return self.aux_head(x), self.conv3x3_ocr(x)

    def set_precision(self, level: str) -> None:
        """Set the AMP level: O0: float32; O1: convolutions in float16; O2, O3: float16 except norms and softmax."""
        self.half = level in ("O2", "O3")
        for _, cell in self.cells_and_names():
            if isinstance(cell, Conv):
                cell.half = level == "O1"

    def synchronize(self, ranks: int) -> None:
        """In training, normalize over the batches of all ``ranks`` in every batch norm."""
        for _, cell in self.cells_and_names():
            if isinstance(cell, Norm):
                cell.synchronize(ranks)
