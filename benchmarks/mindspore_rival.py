"""The relative: OCRNet as the public MindSpore one (mindspore-lab/models, official/cv/OCRNet) computes and trains it.

Written anew from what that code does; parameter names are its own, so `ocrnet.weights.mindspore` reads them. What makes
its way another than ours: MindSpore's own layers; each head resizes and joins the four maps for itself; the loss is
`nn.CrossEntropyLoss` of logits brought to the labels' size, flattened; `nn.Momentum` decays the weights, all but those
of batch norms; the ImageNet classifier stays in the backbone, unused, and the optimizer keeps it up; the context is set
as there, and nothing tells oneDNN which instructions to use.

Left out: its datasets and `Model`. Its step is a `nn.TrainOneStepWithLossScaleCell` in float16, which does not run on a
CPU: here it is `nn.TrainOneStepCell` in float32, without the check for overflow.

This file must not import `ocrnet.engines.mindspore`, which sets the environment.
"""

from collections.abc import Mapping, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.config import Config, Data
from ocrnet.engines import lr_schedule
from ocrnet.weights.mindspore import FAMILY

HEAD_EPS = 1e-4
OCR, AUX = 1.0, 0.4
IGNORE = 255


def conv(inp: int, out: int, kernel: int = 1, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size, or halves it."""
    return nn.Conv2d(inp, out, kernel, stride, pad_mode="pad", padding=kernel // 2)


def unit(inp: int, out: int, kernel: int = 1, stride: int = 1, *, relu: bool = True) -> nn.SequentialCell:
    """The backbone's convolution and batch norm, with or without ReLU."""
    layers = [conv(inp, out, kernel, stride), nn.BatchNorm2d(out)]
    return nn.SequentialCell([*layers, nn.ReLU()] if relu else layers)


class Basic(nn.Cell):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def construct(self, x: Tensor) -> Tensor:
        """N,width,H,W -> the same shape."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Bottleneck(nn.Cell):
    """A residual block of a 3x3 convolution between two 1x1, with four times its width at the end."""

    def __init__(self, inp: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inp, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.down_sample = None if inp == 4 * width else unit(inp, 4 * width, relu=False)

    def construct(self, x: Tensor) -> Tensor:
        """N,inp,H,W -> N,4*width,H,W."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.down_sample is not None:
            x = self.down_sample(x)
        return self.relu(y + x)


def exchange(widths: Sequence[int], i: int, j: int) -> nn.Cell:
    """From branch ``j`` to branch ``i``: a 1x1 convolution upwards, a chain of stride 2 downwards."""
    if i == j:
        return nn.Identity()
    if j > i:
        return unit(widths[j], widths[i], relu=False)
    steps = [unit(widths[j], widths[j], 3, 2) for _ in range(i - j - 1)]
    return nn.SequentialCell([*steps, unit(widths[j], widths[i], 3, 2, relu=False)])


class Module(nn.Cell):
    """Branches of residual blocks, and the sum of all at each one's size, with the nearest pixel upwards."""

    def __init__(self, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.number = len(widths)
        self.branches = nn.CellList([nn.SequentialCell([Basic(width) for _ in range(blocks)]) for width in widths])
        all_ = range(self.number)
        self.fuse_layers = nn.CellList([nn.CellList([exchange(widths, i, j) for j in all_]) for i in all_])
        self.relu = nn.ReLU()

    def construct(self, maps: list[Tensor]) -> list[Tensor]:
        """One map a branch -> the same shapes."""
        deep = []
        for i in range(self.number):
            deep.append(self.branches[i](maps[i]))
        fused = []
        for i in range(self.number):
            total = self.fuse_layers[i][0](deep[0])
            for j in range(1, self.number):
                y = self.fuse_layers[i][j](deep[j])
                if j > i:
                    y = ops.ResizeNearestNeighbor(deep[i].shape[2:])(y)
                total = total + y
            fused.append(self.relu(total))
        return fused


class Backbone(nn.Cell):
    """HRNet with the classifier that its ImageNet file has; the four maps do not come through that."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 3, 2), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = conv(64, 64, 3, 2), nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = nn.SequentialCell([Bottleneck(256 if i else 64, 64) for i in range(arch.blocks)])
        width = arch.widths
        second = nn.SequentialCell([unit(256, width[1], 3, 2)])
        self.transition1 = nn.CellList([unit(256, width[0], 3), second])
        self.transition2 = self._begin(width[1], width[2], 2)
        self.transition3 = self._begin(width[2], width[3], 3)
        self.stage2, self.stage3, self.stage4 = (self._stage(arch, number) for number in (2, 3, 4))
        self._add_classifier(width)

    def _begin(self, inp: int, out: int, before: int) -> nn.CellList:
        new = nn.SequentialCell([unit(inp, out, 3, 2)])
        return nn.CellList([*(nn.Identity() for _ in range(before)), new])

    def _stage(self, arch: Arch, number: int) -> nn.SequentialCell:
        modules = range(arch.modules[number - 2])
        return nn.SequentialCell([Module(arch.widths[:number], arch.blocks) for _ in modules])

    def _add_classifier(self, widths: Sequence[int]) -> None:
        own = (32, 64, 128, 256)
        pairs = zip(widths, own, strict=True)
        self.incre_modules = nn.CellList([nn.SequentialCell([Bottleneck(inp, out)]) for inp, out in pairs])
        self.downsample_modules = nn.CellList([unit(4 * own[i], 4 * own[i + 1], 3, 2) for i in range(3)])
        self.final_layer = unit(1024, 2048)
        self.classifier = nn.Dense(2048, 1000)

    def construct(self, x: Tensor) -> list[Tensor]:
        """N,3,H,W -> the maps of the four branches."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.layer1(x)
        maps = self.stage2([self.transition1[0](x), self.transition1[1](x)])
        maps = self.stage3([*maps, self.transition2[2](maps[-1])])
        return self.stage4([*maps, self.transition3[3](maps[-1])])


class HeadUnit(nn.Cell):
    """A head's convolution, batch norm and ReLU."""

    def __init__(self, inp: int, out: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.SequentialCell([conv(inp, out, kernel), nn.BatchNorm2d(out, eps=HEAD_EPS), nn.ReLU()])

    def construct(self, x: Tensor) -> Tensor:
        """N,inp,H,W -> N,out,H,W."""
        return self.conv(x)


def joined(maps: list[Tensor]) -> Tensor:
    """All maps at the first one's size, in one."""
    size = maps[0].shape[2:]
    same = ()
    for one in maps:
        same += (ops.interpolate(one, size=size, mode="bilinear", align_corners=None),)
    return ops.concat(same, axis=1)


class AuxHead(nn.Cell):
    """The plain classifier of pixels."""

    def __init__(self, inp: int, classes: int) -> None:
        super().__init__()
        self.convs = nn.SequentialCell([HeadUnit(inp, inp)])
        self.conv_seg = nn.Conv2d(inp, classes, 1, has_bias=True)

    def construct(self, maps: list[Tensor]) -> Tensor:
        """Four maps -> N,classes,h,w."""
        return self.conv_seg(self.convs(joined(maps)))


class Attention(nn.Cell):
    """From pixels to object regions."""

    def __init__(self, channels: int, key: int) -> None:
        super().__init__()
        self.scale = key**-0.5
        self.query_project = nn.SequentialCell([HeadUnit(channels, key), HeadUnit(key, key)])
        self.key_project = nn.SequentialCell([HeadUnit(channels, key), HeadUnit(key, key)])
        self.value_project, self.out_project = HeadUnit(channels, key), HeadUnit(key, channels)

    def construct(self, pixels: Tensor, regions: Tensor) -> Tensor:
        """Pixels N,C,h,w and regions N,C,K,1 -> N,C,h,w."""
        n, _, h, w = pixels.shape
        query, key, value = self.query_project(pixels), self.key_project(regions), self.value_project(regions)
        channels = query.shape[1]
        query = query.reshape(n, channels, -1).transpose((0, 2, 1))
        value = value.reshape(n, channels, -1).transpose((0, 2, 1))
        weights = ops.softmax(self.scale * ops.matmul(query, key.reshape(n, channels, -1)), axis=-1)
        context = ops.matmul(weights, value).transpose((0, 2, 1)).reshape(n, channels, h, w)
        return self.out_project(context)


class Context(nn.Cell):
    """Attention, joined with the pixels by a 3x3 convolution."""

    def __init__(self, channels: int, key: int, out: int) -> None:
        super().__init__()
        self.self_att = Attention(channels, key)
        self.bottleneck = HeadUnit(2 * channels, out, 3)

    def construct(self, pixels: Tensor, regions: Tensor) -> Tensor:
        """Pixels N,C,h,w and regions N,C,K,1 -> N,out,h,w."""
        return self.bottleneck(ops.concat((self.self_att(pixels, regions), pixels), axis=1))


class OCRHead(nn.Cell):
    """The classifier that sees each pixel's object context."""

    def __init__(self, inp: int, arch: Arch) -> None:
        super().__init__()
        out = architecture.head_channels(arch)
        self.object_context_block = Context(arch.channels, arch.key_channels, out)
        self.bottleneck = HeadUnit(inp, arch.channels, 3)
        self.conv_seg = nn.Conv2d(out, arch.num_classes, 1, has_bias=True)

    def construct(self, maps: list[Tensor], aux: Tensor) -> Tensor:
        """Four maps and the other head's logits -> N,classes,h,w."""
        pixels = self.bottleneck(joined(maps))
        n, channels = pixels.shape[:2]
        weights = ops.softmax(aux.reshape(n, aux.shape[1], -1), axis=2)
        regions = ops.matmul(weights, pixels.reshape(n, channels, -1).transpose((0, 2, 1)))
        return self.conv_seg(self.object_context_block(pixels, regions.transpose((0, 2, 1)).unsqueeze(3)))


class Network(nn.Cell):
    """Backbone and both heads."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        inp = sum(arch.widths)
        self.backbone = Backbone(arch)
        self.fcn_head, self.ocr_head = AuxHead(inp, arch.num_classes), OCRHead(inp, arch)

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (ocr, aux), each N,classes,h,w, of x N,3,H,W normalized."""
        maps = self.backbone(x)
        aux = self.fcn_head(maps)
        return self.ocr_head(maps, aux), aux


class WithLoss(nn.Cell):
    """The network and the weighted sum of its heads' losses."""

    def __init__(self, network: Network, class_weights: Sequence[float]) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.weights, self.classes = network, (OCR, AUX), len(class_weights)
        table = Tensor(np.array(class_weights, np.float32))
        self.criterion = nn.CrossEntropyLoss(weight=table, ignore_index=IGNORE)

    def construct(self, x: Tensor, label: Tensor) -> Tensor:
        """Loss of x N,3,H,W and int32 labels N,H,W."""
        heads = self.network(x)
        total = 0
        for i in range(2):
            logits = ops.interpolate(heads[i], label.shape[-2:], mode="bilinear")
            logits = logits.transpose((0, 2, 3, 1)).reshape((-1, self.classes))
            total += self.weights[i] * self.criterion(logits, label.reshape((-1,)))
        return total


class Infer(nn.Cell):
    """The relative's evaluation at scale 1: resizes the image all the same, and sums up softmaxes."""

    def __init__(self, network: Network, classes: int) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.classes = network, classes

    def construct(self, x: Tensor) -> Tensor:
        """Class indices N,H,W of x N,3,H,W normalized."""
        n, _, h, w = x.shape
        total = ops.zeros((n, h, w, self.classes), ms.float32)
        logits = self.network(ops.interpolate(x, size=(h, w), mode="bilinear"))[0]
        logits = ops.interpolate(logits, size=(h, w), mode="bilinear")
        total += ops.softmax(logits.transpose(0, 2, 3, 1), -1)
        return ops.argmax(total, -1)


class Rival:
    """One network with its training step and its evaluation, both compiled."""

    def __init__(self, arch: Arch, cfg: Config) -> None:
        ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", max_call_depth=2000, runtime_num_threads=15)
        self.network = Network(arch)
        with_loss = WithLoss(self.network, cfg.data.class_weights or (1.0,) * arch.num_classes)
        self.trained = with_loss.trainable_params()
        how = cfg.optimizer
        lr = Tensor(lr_schedule.table(cfg).astype(np.float32))
        optimizer = nn.Momentum(self.trained, lr, how.momentum, weight_decay=how.weight_decay)
        self.step = nn.TrainOneStepCell(with_loss, optimizer).set_train(True)
        self.infer = Infer(self.network, arch.num_classes)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over all weights and statistics under canonical names, but for the two biases that are not here."""
        parameters = {FAMILY.canonical_name(one.name): one for one in self.network.get_parameters()}
        left = state.keys() - parameters.keys()
        for name in state.keys() - left:
            assert parameters[name].shape == state[name].shape, name
            parameters[name].set_data(Tensor(state[name]))
        assert left == {"conv3x3_ocr.0.bias", "aux_head.0.bias"}, left
        assert not any(state[name].any() for name in left)

    def parameters(self) -> int:
        """Trainable values that the optimizer keeps up."""
        return sum(one.size for one in self.trained)

    def train(self, x: Tensor, label: Tensor) -> float:
        """Take one step; return its loss."""
        self.network.set_train(True)
        return float(self.step(x, label).asnumpy())

    def predict(self, x: Tensor) -> np.ndarray:
        """Return class indices, uint8 N,H,W."""
        self.infer.set_train(False)
        return self.infer(x).asnumpy().astype(np.uint8)


def inputs(images: np.ndarray, label: np.ndarray) -> tuple[Tensor, Tensor]:
    """Images uint8 N,H,W,3 and labels uint8 N,H,W as the relative's loader hands them over."""
    scaled = images.astype(np.float32) / 255
    x = (scaled - np.array(Data.mean, np.float32)) / np.array(Data.std, np.float32)
    return Tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2))), Tensor(label.astype(np.int32))
