"""The OCR head (Yuan et al., ECCV 2020, section 3) on HRNet, in MindSpore."""

from mindspore import Tensor, nn, ops

from ocrnet.architecture import Arch, head_channels
from ocrnet.engines.mindspore.hrnet import Conv, HRNet, Norm, resize


def activate(x: Tensor, slope: float) -> Tensor:
    """ReLU, or leaky ReLU where ``slope`` is not 0."""
    return ops.leaky_relu(x, slope) if slope else ops.relu(x)


class NormAct(nn.SequentialCell):
    """A head's norm (named ``0``) with its activation."""

    def __init__(self, channels: int, arch: Arch) -> None:
        super().__init__(Norm(channels, arch.rule.head_eps))
        self.slope = arch.rule.head_activation_slope

    def construct(self, x: Tensor) -> Tensor:
        """N,channels,H,W -> the same shape."""
        return activate(self.cell_list[0](x), self.slope)


class ConvNormAct(nn.SequentialCell):
    """A head's convolution, with bias, and its norm and activation; the names are ``0`` and ``1``.

    Further layers follow under ``3``; ``2`` stands for the authors' ReLU.
    """

    def __init__(self, conv: Conv, arch: Arch, *then: nn.Cell) -> None:
        super().__init__(conv, Norm(conv.out_channels, arch.rule.head_eps), nn.Identity(), *then)
        self.slope = arch.rule.head_activation_slope

    def construct(self, x: Tensor) -> Tensor:
        """N,in_channels,H,W -> N,out_channels,H,W."""
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
        """Pixels N,channels,H,W and objects N,channels,K,1 -> N,HW,K: what each pixel takes from each object."""
        query = flatten(self.f_pixel(pixels)).swapaxes(1, 2)  # N, HW, key
        key = flatten(self.f_object(objects))  # N, key, K
        return softmax(self.scale * ops.bmm(query, key))

    def construct(self, pixels: Tensor, objects: Tensor) -> Tensor:
        """Pixels N,channels,H,W and objects N,channels,K,1 -> the objects' context of every pixel, as pixels."""
        value = flatten(self.f_down(objects)).swapaxes(1, 2)  # N, K, key
        context = ops.bmm(self.relation(pixels, objects), value)  # N, HW, key
        number, _, height, width = pixels.shape
        return self.f_up(context.swapaxes(1, 2).reshape(number, -1, height, width))


class SpatialOCR(nn.Cell):
    """Pixels and their object context, mixed to the features that the classifier sees, with channel dropout."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.kept = 1 - arch.dropout
        self.object_context_block = ObjectContext(arch)
        features = head_channels(arch)
        conv = Conv(2 * arch.channels, features, arch.rule.bottleneck_kernel)
        self.conv_bn_dropout = nn.SequentialCell(conv, NormAct(features, arch))

    def construct(self, pixels: Tensor, objects: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        """Pixels N,channels,H,W, objects N,channels,K,1, dropout_mask N,features or None -> N,features,H,W."""
        context = self.object_context_block(pixels, objects)
        x = self.conv_bn_dropout(ops.cat((context, pixels), 1))
        if dropout_mask is not None:
            x = x * (dropout_mask.astype(x.dtype) / self.kept).reshape(x.shape[0], -1, 1, 1)
        return x


def flatten(x: Tensor) -> Tensor:
    """N,C,H,W -> N,C,HW."""
    return x.reshape(x.shape[0], x.shape[1], -1)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last axis, computed in float32."""
    return ops.softmax(x.astype("float32"), -1).astype(x.dtype)


def soft_regions(logits: Tensor) -> Tensor:
    """Where each class's object region lies: logits N,K,H,W -> N,K,HW, which add up to 1 over the pixels."""
    return softmax(flatten(logits))


def gather_object_regions(pixels: Tensor, logits: Tensor) -> Tensor:
    """Object regions: pixels N,C,H,W averaged by each class's spatial softmax of logits N,K,H,W -> N,C,K,1."""
    return ops.bmm(soft_regions(logits), flatten(pixels).swapaxes(1, 2)).swapaxes(1, 2).expand_dims(3)


class OCRNet(HRNet):
    """HRNet with the OCR head; names and shapes of its parameters are ``architecture.shapes(arch)``."""

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
        """Logits (aux, ocr), each N,num_classes,ceil(H/4),ceil(W/4), of x N,3,H,W normalised, H and W at least 32.

        ``dropout_mask`` N,features marks the channels of the OCR head that dropout keeps; None drops none.
        """
        aux, pixels = self.heads(x)
        features = self.ocr_distri_head(pixels, gather_object_regions(pixels, aux), dropout_mask)
        return aux, self.cls_head(features)

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(regions, relation), each N,num_classes,ceil(H/4),ceil(W/4): see `ocrnet.engines.base.Engine.predict`."""
        aux, pixels = self.heads(x)
        relation = self.ocr_distri_head.object_context_block.relation(pixels, gather_object_regions(pixels, aux))
        return soft_regions(aux).reshape(aux.shape), relation.swapaxes(1, 2).reshape(aux.shape)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The auxiliary head's logits and the pixel representations of x N,3,H,W."""
        if self.half:
            x = x.astype("float16")
        maps = self.forward_features(x)
        size = maps[0].shape[-2:]
        x = ops.cat([resize(y, size, self.align_corners) for y in maps], 1)
        return self.aux_head(x), self.conv3x3_ocr(x)

    def compute_at(self, level: str) -> None:
        """Choose the precision: O0 float32, O1 convolutions in float16, O2 and O3 all but norms and softmax."""
        self.half = level in ("O2", "O3")
        for _, cell in self.cells_and_names():
            if isinstance(cell, Conv):
                cell.half = level == "O1"

    def synchronise(self, ranks: int) -> None:
        """Let batch norms in training see the batches of all ``ranks``."""
        for _, cell in self.cells_and_names():
            if isinstance(cell, Norm):
                cell.synchronise(ranks)
