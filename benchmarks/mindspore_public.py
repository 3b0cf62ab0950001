"""A baseline that computes and trains as the public MindSpore OCRNet (mindspore-lab/models, official/cv/OCRNet).

It is written from scratch after that code and has its parameter names, so `ocrnet.weights.mindspore` reads them. It
differs from ours as follows. It uses MindSpore's own layers. Each head resizes and concatenates the four maps itself.
The loss is `nn.CrossEntropyLoss` of flattened logits, upsampled to the size of the labels. `nn.Momentum` applies weight
decay to all weights except those of batch norms. The unused ImageNet classifier stays in the backbone, and the
optimizer updates it. The context has the same settings as there, and the instruction set of oneDNN is not limited.

Its datasets and `Model` are omitted. Its training step is `nn.TrainOneStepWithLossScaleCell` in float16, which does not
run on a CPU; here it is `nn.TrainOneStepCell` in float32, without the overflow check.

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


def conv(in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that keeps the size (stride 1) or halves it (stride 2)."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, pad_mode="pad", padding=kernel // 2)


def unit(
    in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, *, relu: bool = True
) -> nn.SequentialCell:
    """Return a convolution and batch norm of the backbone, with or without ReLU."""
    layers = [conv(in_channels, out_channels, kernel, stride), nn.BatchNorm2d(out_channels)]
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
    """A residual block of a 3x3 between two 1x1 convolutions; the output has four times the width."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.down_sample = None if in_channels == 4 * width else unit(in_channels, 4 * width, relu=False)

    def construct(self, x: Tensor) -> Tensor:
        """N,in_channels,H,W -> N,4*width,H,W."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.down_sample is not None:
            x = self.down_sample(x)
        return self.relu(y + x)


def fuse_layer(widths: Sequence[int], i: int, j: int) -> nn.Cell:
    """Return the layers from branch ``j`` to ``i``: a 1x1 convolution upwards, a chain with stride 2 downwards."""
    if i == j:
        return nn.Identity()
    if j > i:
        return unit(widths[j], widths[i], relu=False)
    steps = [unit(widths[j], widths[j], 3, 2) for _ in range(i - j - 1)]
    return nn.SequentialCell([*steps, unit(widths[j], widths[i], 3, 2, relu=False)])


class Module(nn.Cell):
    """Branches of residual blocks, and for each branch the sum of all, upsampled to its size by nearest neighbor."""

    def __init__(self, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.number = len(widths)
        self.branches = nn.CellList([nn.SequentialCell([Basic(width) for _ in range(blocks)]) for width in widths])
        all_ = range(self.number)
        self.fuse_layers = nn.CellList([nn.CellList([fuse_layer(widths, i, j) for j in all_]) for i in all_])
        self.relu = nn.ReLU()

    def construct(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps of the branches -> maps of the same shapes."""
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
    """HRNet with the classifier of its ImageNet file, which does not contribute to the four maps."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 3, 2), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = conv(64, 64, 3, 2), nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = nn.SequentialCell([Bottleneck(256 if i else 64, 64) for i in range(arch.blocks)])
        width = arch.widths
        second = nn.SequentialCell([unit(256, width[1], 3, 2)])
        self.transition1 = nn.CellList([unit(256, width[0], 3), second])
        self.transition2 = self._transition(width[1], width[2], 2)
        self.transition3 = self._transition(width[2], width[3], 3)
        self.stage2, self.stage3, self.stage4 = (self._stage(arch, number) for number in (2, 3, 4))
        self._add_classifier(width)

    def _transition(self, in_channels: int, out_channels: int, before: int) -> nn.CellList:
        new = nn.SequentialCell([unit(in_channels, out_channels, 3, 2)])
        return nn.CellList([*(nn.Identity() for _ in range(before)), new])

    def _stage(self, arch: Arch, number: int) -> nn.SequentialCell:
        modules = range(arch.modules[number - 2])
        return nn.SequentialCell([Module(arch.widths[:number], arch.blocks) for _ in modules])

    def _add_classifier(self, widths: Sequence[int]) -> None:
        own = (32, 64, 128, 256)
        pairs = zip(widths, own, strict=True)
        self.incre_modules = nn.CellList(
            [nn.SequentialCell([Bottleneck(in_channels, out_channels)]) for in_channels, out_channels in pairs]
        )
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

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.SequentialCell(
            [conv(in_channels, out_channels, kernel), nn.BatchNorm2d(out_channels, eps=HEAD_EPS), nn.ReLU()]
        )

    def construct(self, x: Tensor) -> Tensor:
        """N,in_channels,H,W -> N,out_channels,H,W."""
        return self.conv(x)


def concat_resized(maps: list[Tensor]) -> Tensor:
    """Resize all maps to the size of the first and concatenate them."""
    size = maps[0].shape[2:]
    resized = ()
    for one in maps:
        resized += (ops.interpolate(one, size=size, mode="bilinear", align_corners=None),)
    return ops.concat(resized, axis=1)


class AuxHead(nn.Cell):
    """The auxiliary head: it classifies each pixel without object context."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.convs = nn.SequentialCell([HeadUnit(in_channels, in_channels)])
        self.conv_seg = nn.Conv2d(in_channels, classes, 1, has_bias=True)

    def construct(self, maps: list[Tensor]) -> Tensor:
        """Four maps -> N,classes,h,w."""
        return self.conv_seg(self.convs(concat_resized(maps)))


class Attention(nn.Cell):
    """Attention from pixels to object regions."""

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
    """Attention, and a 3x3 convolution of its output and the pixels."""

    def __init__(self, channels: int, key: int, out_channels: int) -> None:
        super().__init__()
        self.self_att = Attention(channels, key)
        self.bottleneck = HeadUnit(2 * channels, out_channels, 3)

    def construct(self, pixels: Tensor, regions: Tensor) -> Tensor:
        """Pixels N,C,h,w and regions N,C,K,1 -> N,out_channels,h,w."""
        return self.bottleneck(ops.concat((self.self_att(pixels, regions), pixels), axis=1))


class OCRHead(nn.Cell):
    """The OCR head: it classifies each pixel with its object context."""

    def __init__(self, in_channels: int, arch: Arch) -> None:
        super().__init__()
        out_channels = architecture.head_channels(arch)
        self.object_context_block = Context(arch.channels, arch.key_channels, out_channels)
        self.bottleneck = HeadUnit(in_channels, arch.channels, 3)
        self.conv_seg = nn.Conv2d(out_channels, arch.num_classes, 1, has_bias=True)

    def construct(self, maps: list[Tensor], aux: Tensor) -> Tensor:
        """Four maps and the logits of the auxiliary head -> N,classes,h,w."""
        pixels = self.bottleneck(concat_resized(maps))
        n, channels = pixels.shape[:2]
        weights = ops.softmax(aux.reshape(n, aux.shape[1], -1), axis=2)
        regions = ops.matmul(weights, pixels.reshape(n, channels, -1).transpose((0, 2, 1)))
        return self.conv_seg(self.object_context_block(pixels, regions.transpose((0, 2, 1)).unsqueeze(3)))


class Network(nn.Cell):
    """Backbone and both heads."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        in_channels = sum(arch.widths)
        self.backbone = Backbone(arch)
        self.fcn_head, self.ocr_head = AuxHead(in_channels, arch.num_classes), OCRHead(in_channels, arch)

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (ocr, aux), each N,classes,h,w, of x N,3,H,W normalized."""
        maps = self.backbone(x)
        aux = self.fcn_head(maps)
        return self.ocr_head(maps, aux), aux


class WithLoss(nn.Cell):
    """The network and the weighted sum of the losses of its heads."""

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
    """The public evaluation at scale 1, which still resizes the image and accumulates softmaxes."""

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


class PublicOCRNet:
    """A network with its training step and its evaluation, both compiled."""

    def __init__(self, arch: Arch, cfg: Config) -> None:
        ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", max_call_depth=2000, runtime_num_threads=15)
        self.network = Network(arch)
        with_loss = WithLoss(self.network, cfg.data.class_weights or (1.0,) * arch.num_classes)
        self.trained = with_loss.trainable_params()
        optimizer_cfg = cfg.optimizer
        lr = Tensor(lr_schedule.table(cfg).astype(np.float32))
        optimizer = nn.Momentum(self.trained, lr, optimizer_cfg.momentum, weight_decay=optimizer_cfg.weight_decay)
        self.step = nn.TrainOneStepCell(with_loss, optimizer).set_train(True)
        self.infer = Infer(self.network, arch.num_classes)

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Load weights and statistics by canonical name, except the two biases that this network lacks."""
        parameters = {FAMILY.canonical_name(one.name): one for one in self.network.get_parameters()}
        missing = state.keys() - parameters.keys()
        for name in state.keys() - missing:
            assert parameters[name].shape == state[name].shape, name
            parameters[name].set_data(Tensor(state[name]))
        assert missing == {"conv3x3_ocr.0.bias", "aux_head.0.bias"}, missing
        assert not any(state[name].any() for name in missing)

    def parameters(self) -> int:
        """Return the number of values that the optimizer updates."""
        return sum(one.size for one in self.trained)

    def train(self, x: Tensor, label: Tensor) -> float:
        """Run one training step; return its loss."""
        self.network.set_train(True)
        return float(self.step(x, label).asnumpy())

    def predict(self, x: Tensor) -> np.ndarray:
        """Return class indices, uint8 N,H,W."""
        self.infer.set_train(False)
        return self.infer(x).asnumpy().astype(np.uint8)


def inputs(images: np.ndarray, label: np.ndarray) -> tuple[Tensor, Tensor]:
    """Convert images uint8 N,H,W,3 and labels uint8 N,H,W to the inputs of the network."""
    scaled = images.astype(np.float32) / 255
    x = (scaled - np.array(Data.mean, np.float32)) / np.array(Data.std, np.float32)
    return Tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2))), Tensor(label.astype(np.int32))
