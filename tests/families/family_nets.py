"""Each family's OCRNet, written after that family's own code: its module names, padding, resizing, norms and biases.

Nothing here uses ocrnet's tables: the names of a family's tensors are those of its modules. `fill` computes the values
of a tensor from its name. A network takes the input of its family's network, a normalized image in the family's channel
order, and returns (aux, ocr) logits before the last upsampling.
"""

import itertools
import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]
Resize = Callable[[Tensor, Size, int], Tensor]


def fill(net: nn.Module) -> nn.Module:
    """Fill every tensor with random values seeded by its name; variances are positive, counters are 7."""
    for name, tensor in net.state_dict().items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if tensor.dtype == torch.int64:
            values = np.full(tensor.shape, 7)
        elif "var" in name.rsplit(".", 1)[1]:
            values = rng.uniform(0.5, 1.5, tensor.shape)
        elif tensor.ndim == 4:
            values = rng.standard_normal(tensor.shape) * (1.5 / np.prod(tensor.shape[1:])) ** 0.5
        elif name.endswith((".bias", ".beta", "mean")):
            values = rng.normal(0, 0.3, tensor.shape)
        else:
            values = rng.uniform(0.4, 1.1, tensor.shape)
        tensor.copy_(torch.from_numpy(np.asarray(values)))
    for module in net.modules():
        if isinstance(module, InPlaceABN):  # the norm ignores the sign of its weight
            module.weight[::2] *= -1
    return net.eval()


def bilinear(align_corners: bool) -> Resize:
    return lambda x, size, factor: F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


ALIGNED = bilinear(True)


def nearest(x: Tensor, size: Size, factor: int) -> Tensor:
    return F.interpolate(x, size, mode="nearest")


def mmseg_resize(x: Tensor, size: Size, factor: int) -> Tensor:
    """Upsample by the factor, as in the fuse layer, and then resize to the size."""
    x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class MindSporeNorm(nn.Module):
    """MindSpore's nn.BatchNorm2d in inference mode."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            self.register_buffer(name, torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.gamma / torch.sqrt(self.moving_variance + self.eps)
        return (x - self.moving_mean[:, None, None]) * scale[:, None, None] + self.beta[:, None, None]


class PaddleNorm(nn.Module):
    """Paddle's nn.BatchNorm2D in inference mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "_mean", "_variance"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / torch.sqrt(self._variance + 1e-5)
        return (x - self._mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


class InPlaceABN(nn.Module):
    """The norm of the inplace_abn extension: it scales by abs(weight) + 1e-5; the leaky ReLU is optional."""

    def __init__(self, channels: int, activation: str = "leaky_relu") -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight.abs() + 1e-5) / torch.sqrt(self.running_var + 1e-5)
        y = (x - self.running_mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return F.leaky_relu(y, 0.01) if self.activation == "leaky_relu" else y


def conv(inp: int, out: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, stride, kernel // 2, bias=bias)


# The backbone of the authors, whose module names openseg, NVIDIA, mmsegmentation, timm and MindSpore keep.


class Basic(nn.Module):
    def __init__(self, width: int, norm: type) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width, 3), norm(width)
        self.conv2, self.bn2 = conv(width, width, 3), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class Bottleneck(nn.Module):
    def __init__(self, inp: int, planes: int, norm: type, shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inp, planes, 1), norm(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), norm(planes)
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), norm(4 * planes)
        self.shortcut = shortcut if inp != 4 * planes else None
        if self.shortcut:
            self.add_module(shortcut, nn.Sequential(conv(inp, 4 * planes, 1), norm(4 * planes)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + (getattr(self, self.shortcut)(x) if self.shortcut else x))


class Stage(nn.Module):
    """One module of a stage, under a number in a Sequential."""

    def __init__(self, widths: list[int], blocks: int, norm: type, resize: Resize) -> None:
        super().__init__()
        self.resize = resize
        self.branches = nn.ModuleList(nn.Sequential(*(Basic(w, norm) for _ in range(blocks))) for w in widths)
        self.fuse_layers = nn.ModuleList()
        for i in range(len(widths)):
            row = []
            for j in range(len(widths)):
                if j > i:
                    row.append(nn.Sequential(conv(widths[j], widths[i], 1), norm(widths[i])))
                elif j == i:
                    row.append(nn.Identity())
                else:
                    chain = []
                    for _ in range(i - j - 1):
                        chain.append(nn.Sequential(conv(widths[j], widths[j], 3, 2), norm(widths[j]), nn.ReLU()))
                    chain.append(nn.Sequential(conv(widths[j], widths[i], 3, 2), norm(widths[i])))
                    row.append(nn.Sequential(*chain))
            self.fuse_layers.append(nn.ModuleList(row))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for i, row in enumerate(self.fuse_layers):
            total = 0
            for j, layer in enumerate(row):
                y = layer(maps[j])
                total = total + (self.resize(y, maps[i].shape[2:], 2 ** (j - i)) if j > i else y)
            fused.append(F.relu(total))
        return fused


class HRNet(nn.Module):
    def __init__(self, width, blocks, modules, norm=nn.BatchNorm2d, resize=ALIGNED, shortcut="downsample"):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.conv1, self.bn1 = conv(3, 64, 3, 2), norm(64)
        self.conv2, self.bn2 = conv(64, 64, 3, 2), norm(64)
        self.layer1 = nn.Sequential(*(Bottleneck(256 if i else 64, 64, norm, shortcut) for i in range(blocks)))

        def new(inp: int, out: int) -> nn.Sequential:
            return nn.Sequential(nn.Sequential(conv(inp, out, 3, 2), norm(out), nn.ReLU()))

        first = nn.Sequential(conv(256, width, 3), norm(width), nn.ReLU())
        self.transition1 = nn.ModuleList([first, new(256, widths[1])])
        self.transition2 = nn.ModuleList([nn.Identity(), nn.Identity(), new(widths[1], widths[2])])
        self.transition3 = nn.ModuleList([nn.Identity(), nn.Identity(), nn.Identity(), new(widths[2], widths[3])])
        for number, count in zip((2, 3, 4), modules, strict=True):
            stage = nn.Sequential(*(Stage(widths[:number], blocks, norm, resize) for _ in range(count)))
            self.add_module(f"stage{number}", stage)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = self.layer1(x)
        maps = self.stage2([transition(x) for transition in self.transition1])
        maps = self.stage3([*maps, self.transition2[2](maps[-1])])
        return self.stage4([*maps, self.transition3[3](maps[-1])])


def concat(maps: list[Tensor], align_corners: bool) -> Tensor:
    size = maps[0].shape[2:]
    return torch.cat([F.interpolate(x, size, mode="bilinear", align_corners=align_corners) for x in maps], 1)


def gather_object_regions(pixels: Tensor, logits: Tensor) -> Tensor:
    """Return the region representations of the auxiliary prediction: N,C,K,1."""
    return torch.einsum("nkp,ncp->nck", logits.flatten(2).softmax(2), pixels.flatten(2))[..., None]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the context of each pixel, N,C,H,W, from query N,C,H,W, and key and value N,C,K,1 of the regions."""
    relation = torch.einsum("nchw,nck->nkhw", query, key[..., 0]) * query.shape[1] ** -0.5
    return torch.einsum("nkhw,nck->nchw", relation.softmax(1), value[..., 0])


# The authors, NVIDIA and openseg.pytorch: Sequentials of convolution and "BNReLU".


def torch_bn_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


class ObjectAttention(nn.Module):
    def __init__(self, channels: int, key: int, bn_relu: Callable, bias: bool) -> None:
        super().__init__()

        def block(*sizes: int) -> nn.Sequential:
            layers = []
            for inp, out in itertools.pairwise(sizes):
                layers += [conv(inp, out, 1, bias=bias), bn_relu(out)]
            return nn.Sequential(*layers)

        self.f_pixel, self.f_object = block(channels, key, key), block(channels, key, key)
        self.f_down, self.f_up = block(channels, key), block(key, channels)

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        return self.f_up(attend(self.f_pixel(x), self.f_object(regions), self.f_down(regions)))


class SpatialOCR(nn.Module):
    def __init__(self, channels: int, key: int, bn_relu: Callable, bias: bool = False) -> None:
        super().__init__()
        self.object_context_block = ObjectAttention(channels, key, bn_relu, bias)
        self.conv_bn_dropout = nn.Sequential(
            conv(2 * channels, channels, 1, bias=bias), bn_relu(channels), nn.Dropout2d(0.05)
        )

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        return self.conv_bn_dropout(torch.cat([self.object_context_block(x, regions), x], 1))


class Authors(HRNet):
    """lib/models/seg_hrnet_ocr.py: the heads are modules of the same class as the backbone."""

    def __init__(self, width, blocks, modules, classes, channels, key):
        super().__init__(width, blocks, modules)
        total = 15 * width
        self.conv3x3_ocr = nn.Sequential(conv(total, channels, 3, bias=True), nn.BatchNorm2d(channels), nn.ReLU())
        self.ocr_distri_head = SpatialOCR(channels, key, torch_bn_relu)
        self.cls_head = conv(channels, classes, 1, bias=True)
        self.aux_head = nn.Sequential(
            conv(total, total, 1, bias=True), nn.BatchNorm2d(total), nn.ReLU(), conv(total, classes, 1, bias=True)
        )

    def forward(self, x):
        feats = concat(super().forward(x), True)
        aux, pixels = self.aux_head(feats), self.conv3x3_ocr(feats)
        return aux, self.cls_head(self.ocr_distri_head(pixels, gather_object_regions(pixels, aux)))


class Nvidia(nn.Module):
    """network/ocrnet.py: MscaleOCR at a single scale."""

    def __init__(self, width, blocks, modules, classes, channels, key):
        super().__init__()
        total = 15 * width
        self.backbone = HRNet(width, blocks, modules, resize=bilinear(False))
        self.ocr = nn.Module()
        self.ocr.conv3x3_ocr = nn.Sequential(conv(total, channels, 3, bias=True), torch_bn_relu(channels))
        self.ocr.ocr_distri_head = SpatialOCR(channels, key, torch_bn_relu)
        self.ocr.cls_head = conv(channels, classes, 1, bias=True)
        self.ocr.aux_head = nn.Sequential(
            conv(total, total, 1, bias=True), torch_bn_relu(total), conv(total, classes, 1, bias=True)
        )
        self.scale_attn = nn.Sequential(conv(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 1, 1), nn.Sigmoid())

    def forward(self, x):
        feats = concat(self.backbone(x), False)
        aux, pixels = self.ocr.aux_head(feats), self.ocr.conv3x3_ocr(feats)
        return aux, self.ocr.cls_head(self.ocr.ocr_distri_head(pixels, gather_object_regions(pixels, aux)))


class Openseg(nn.Module):
    """lib/models/nets/hrnet.py: HRNet_W48_OCR; biases everywhere in the heads, a 3x3 auxiliary head."""

    def __init__(self, width, blocks, modules, classes, channels, key, bn_relu=torch_bn_relu, norm=nn.BatchNorm2d):
        super().__init__()
        total = 15 * width
        self.backbone = HRNet(width, blocks, modules, norm=norm)
        self.conv3x3 = nn.Sequential(conv(total, channels, 3, bias=True), bn_relu(channels))
        self.ocr_distri_head = SpatialOCR(channels, key, bn_relu, bias=True)
        self.cls_head = conv(channels, classes, 1, bias=True)
        self.aux_head = nn.Sequential(
            conv(total, total, 3, bias=True), bn_relu(total), conv(total, classes, 1, bias=True)
        )

    def forward(self, x):
        feats = concat(self.backbone(x), True)
        aux, pixels = self.aux_head(feats), self.conv3x3(feats)
        return aux, self.cls_head(self.ocr_distri_head(pixels, gather_object_regions(pixels, aux)))


class OpensegInplace(Openseg):
    """Openseg with bn_type inplace_abn: the heads' norms include a leaky ReLU, those of the backbone do not."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bn_relu=InPlaceABN, norm=lambda channels: InPlaceABN(channels, "none"))


# mmsegmentation, and MindSpore's OCRNet after it: ConvModules under the names of self-attention.


class ConvModule(nn.Module):
    """mmcv's ConvModule: convolution without bias, norm, ReLU."""

    def __init__(self, inp: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(inp, out, kernel), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class MindSporeConvModule(nn.Module):
    """src/modules/base_modules.py: a Sequential called conv; its norms have eps 1e-4."""

    def __init__(self, inp: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(inp, out, kernel), MindSporeNorm(out, 1e-4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SelfAttention(nn.Module):
    def __init__(self, channels: int, key: int, block: type) -> None:
        super().__init__()
        self.query_project = nn.Sequential(block(channels, key, 1), block(key, key, 1))
        self.key_project = nn.Sequential(block(channels, key, 1), block(key, key, 1))
        self.value_project, self.out_project = block(channels, key, 1), block(key, channels, 1)

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        context = attend(self.query_project(x), self.key_project(regions), self.value_project(regions))
        return self.out_project(context)


class MmsegContext(SelfAttention):
    def __init__(self, channels: int, key: int) -> None:
        super().__init__(channels, key, ConvModule)
        self.bottleneck = ConvModule(2 * channels, channels, 1)

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([super().forward(x, regions), x], 1))


class Mmseg(nn.Module):
    """CascadeEncoderDecoder of FCNHead and OCRHead, as in configs/_base_/models/ocrnet_hr18.py."""

    def __init__(self, width, blocks, modules, classes, channels, key):
        super().__init__()
        total = 15 * width
        self.backbone = HRNet(width, blocks, modules, resize=mmseg_resize)
        fcn, ocr = nn.Module(), nn.Module()
        fcn.convs, fcn.conv_seg = nn.Sequential(ConvModule(total, total, 1)), conv(total, classes, 1, bias=True)
        ocr.conv_seg, ocr.bottleneck = conv(channels, classes, 1, bias=True), ConvModule(total, channels, 3)
        ocr.object_context_block = MmsegContext(channels, key)
        self.decode_head = nn.ModuleList([fcn, ocr])

    def forward(self, x):
        feats = concat(self.backbone(x), False)
        fcn, ocr = self.decode_head
        aux, pixels = fcn.conv_seg(fcn.convs(feats)), ocr.bottleneck(feats)
        return aux, ocr.conv_seg(ocr.object_context_block(pixels, gather_object_regions(pixels, aux)))


class MindSpore(nn.Module):
    """official/cv/OCRNet: mindcv's backbone with its ImageNet classifier; a 3x3 bottleneck to the key channels."""

    def __init__(self, width, blocks, modules, classes, channels, key):
        super().__init__()
        total = 15 * width
        self.backbone = Mindcv(width, blocks, modules)
        self.fcn_head, self.ocr_head, context = nn.Module(), nn.Module(), nn.Module()
        self.fcn_head.convs = nn.Sequential(MindSporeConvModule(total, total, 1))
        self.fcn_head.conv_seg = conv(total, classes, 1, bias=True)
        context.self_att = SelfAttention(channels, key, MindSporeConvModule)
        context.bottleneck = MindSporeConvModule(2 * channels, key, 3)
        self.ocr_head.object_context_block = context
        self.ocr_head.bottleneck = MindSporeConvModule(total, channels, 3)
        self.ocr_head.conv_seg = conv(key, classes, 1, bias=True)

    def forward(self, x):
        feats, context = concat(self.backbone(x), False), self.ocr_head.object_context_block
        aux, pixels = self.fcn_head.conv_seg(self.fcn_head.convs(feats)), self.ocr_head.bottleneck(feats)
        attended = context.self_att(pixels, gather_object_regions(pixels, aux))
        return aux, self.ocr_head.conv_seg(context.bottleneck(torch.cat([attended, pixels], 1)))


# HRNet for ImageNet: the authors and timm, and mindcv.


class Classifier(HRNet):
    """HRNet-Image-Classification, also in timm: after the branches, narrow versions of the classifier's modules."""

    downsampling = "downsamp_modules"

    def __init__(self, width, blocks, modules, norm=nn.BatchNorm2d, shortcut="downsample"):
        super().__init__(width, blocks, modules, norm, nearest, shortcut)
        widths, planes = [width, 2 * width, 4 * width, 8 * width], [2, 4, 8, 16]
        pairs = zip(widths, planes, strict=True)
        self.incre_modules = nn.ModuleList(nn.Sequential(Bottleneck(w, p, norm, shortcut)) for w, p in pairs)
        outs = [4 * p for p in planes]
        down = [nn.Sequential(conv(a, b, 3, 2, bias=True), norm(b)) for a, b in itertools.pairwise(outs)]
        self.add_module(self.downsampling, nn.ModuleList(down))
        self.final_layer = nn.Sequential(conv(outs[-1], 24, 1, bias=True), norm(24))
        self.classifier = nn.Linear(24, 10)


class Mindcv(Classifier):
    downsampling = "downsample_modules"

    def __init__(self, width, blocks, modules):
        super().__init__(width, blocks, modules, MindSporeNorm, "down_sample")


# PaddleSeg: other names; 'same' padding, which is (0, 1) for a stride of 2 on an even size.


class PaddleConv(nn.Conv2d):
    """nn.Conv2D(padding='same') as Paddle pads: the smaller half of the padding comes first."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for length, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


class ConvBN(nn.Module):
    def __init__(self, inp: int, out: int, kernel: int, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self._conv, self._batch_norm = PaddleConv(inp, out, kernel, stride, bias=bias), PaddleNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self._batch_norm(self._conv(x))


class ConvBNReLU(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class PaddleBottleneck(nn.Module):
    def __init__(self, inp: int) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = ConvBNReLU(inp, 64, 1), ConvBNReLU(64, 64, 3), ConvBN(64, 256, 1)
        if inp != 256:
            self.conv_down = ConvBN(inp, 256, 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.conv_down(x) if hasattr(self, "conv_down") else x
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + shortcut)


class PaddleBasic(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBNReLU(width, width, 3), ConvBN(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.conv1(x)) + x)


class PaddleModule(nn.Module):
    def __init__(self, widths: list[int], blocks: int, name: str) -> None:
        super().__init__()
        self.widths, self.blocks, self.name = widths, blocks, name
        self.branches_func, self.fuse_func = nn.Module(), nn.Module()
        for i, width in enumerate(widths, 1):
            for j in range(1, blocks + 1):
                self.branches_func.add_module(f"bb_{name}_branch_layer_{i}_{j}", PaddleBasic(width))
        for i in range(len(widths)):
            for j in range(len(widths)):
                if j > i:
                    self.fuse_func.add_module(f"residual_{name}_layer_{i + 1}_{j + 1}", ConvBN(widths[j], widths[i], 1))
                for k in range(i - j):
                    last = k == i - j - 1
                    layer = ConvBN(widths[j], widths[i], 3, 2) if last else ConvBNReLU(widths[j], widths[j], 3, 2)
                    self.fuse_func.add_module(f"residual_{name}_layer_{i + 1}_{j + 1}_{k + 1}", layer)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        branches, fuse = self.branches_func, self.fuse_func
        maps = list(maps)
        for i in range(len(maps)):
            for j in range(self.blocks):
                maps[i] = getattr(branches, f"bb_{self.name}_branch_layer_{i + 1}_{j + 1}")(maps[i])
        fused = []
        for i, total in enumerate(maps):
            for j, y in enumerate(maps):
                if j > i:
                    y = getattr(fuse, f"residual_{self.name}_layer_{i + 1}_{j + 1}")(y)
                    total = total + F.interpolate(y, maps[i].shape[2:], mode="bilinear", align_corners=False)
                elif j < i:
                    for k in range(i - j):
                        y = getattr(fuse, f"residual_{self.name}_layer_{i + 1}_{j + 1}_{k + 1}")(y)
                    total = total + y
            fused.append(F.relu(total))
        return fused


class PaddleHRNet(nn.Module):
    def __init__(self, width, blocks, modules):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.conv_layer1_1, self.conv_layer1_2 = ConvBNReLU(3, 64, 3, 2), ConvBNReLU(64, 64, 3, 2)
        self.la1 = nn.Sequential()
        for i in range(blocks):
            self.la1.add_module(f"bb_layer2_{i + 1}", PaddleBottleneck(256 if i else 64))
        self.tr1, self.tr2, self.tr3 = nn.Module(), nn.Module(), nn.Module()
        self.tr1.add_module("transition_tr1_layer_1", ConvBNReLU(256, width, 3))
        self.tr1.add_module("transition_tr1_layer_2", ConvBNReLU(256, widths[1], 3, 2))
        self.tr2.add_module("transition_tr2_layer_3", ConvBNReLU(widths[1], widths[2], 3, 2))
        self.tr3.add_module("transition_tr3_layer_4", ConvBNReLU(widths[2], widths[3], 3, 2))
        for number, count in zip((2, 3, 4), modules, strict=True):
            stage = nn.Sequential()
            for i in range(1, count + 1):
                name = f"st{number}_{i}"
                stage.add_module(f"stage_{name}", PaddleModule(widths[:number], blocks, name))
            self.add_module(f"st{number}", stage)

    def forward(self, x):
        x = self.la1(self.conv_layer1_2(self.conv_layer1_1(x)))
        maps = self.st2([self.tr1.transition_tr1_layer_1(x), self.tr1.transition_tr1_layer_2(x)])
        maps = self.st3([*maps, self.tr2.transition_tr2_layer_3(maps[-1])])
        return concat(self.st4([*maps, self.tr3.transition_tr3_layer_4(maps[-1])]), False)


class PaddleAttention(nn.Module):
    def __init__(self, channels: int, key: int) -> None:
        super().__init__()
        one = {"kernel": 1, "bias": True}
        self.f_pixel = nn.Sequential(ConvBNReLU(channels, key, **one), ConvBNReLU(key, key, **one))
        self.f_object = nn.Sequential(ConvBNReLU(channels, key, **one), ConvBNReLU(key, key, **one))
        self.f_down, self.f_up = ConvBNReLU(channels, key, **one), ConvBNReLU(key, channels, **one)

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        return self.f_up(attend(self.f_pixel(x), self.f_object(regions), self.f_down(regions)))


class Paddle(nn.Module):
    """paddleseg/models/ocrnet.py: every convolution of the head has a bias."""

    def __init__(self, width, blocks, modules, classes, channels, key):
        super().__init__()
        total = 15 * width
        self.backbone, self.head, ocr = PaddleHRNet(width, blocks, modules), nn.Module(), nn.Module()
        ocr.attention_block = PaddleAttention(channels, key)
        ocr.conv1x1 = nn.Sequential(ConvBNReLU(2 * channels, channels, 1, bias=True), nn.Dropout2d(0.1))
        self.head.spatial_ocr = ocr
        self.head.conv3x3_ocr = ConvBNReLU(total, channels, 3, bias=True)
        self.head.cls_head = conv(channels, classes, 1, bias=True)
        self.head.aux_head = nn.Sequential(ConvBNReLU(total, total, 1, bias=True), conv(total, classes, 1, bias=True))

    def forward(self, x):
        feats, head = self.backbone(x), self.head
        aux, pixels = head.aux_head(feats), head.conv3x3_ocr(feats)
        context = head.spatial_ocr.attention_block(pixels, gather_object_regions(pixels, aux))
        return aux, head.cls_head(head.spatial_ocr.conv1x1(torch.cat([context, pixels], 1)))
