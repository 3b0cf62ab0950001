"""MindSpore engine: compiled training steps that are skipped if not finite, and prediction by a list of passes."""

from collections.abc import Generator, Mapping, Sequence

import mindspore as ms
import numpy as np
import psutil
from mindspore import ParameterTuple, Tensor, nn, ops

from ocrnet import architecture
from ocrnet.config import Config
from ocrnet.data.sampler import TrainStream
from ocrnet.distributed.launcher import World
from ocrnet.engines import lr_schedule
from ocrnet.engines.base import ATTENTION, check_outputs
from ocrnet.engines.mindspore import distributed
from ocrnet.engines.mindspore.dataloader import Batch, batches
from ocrnet.engines.mindspore.device import (
    Precision,
    choose_device,
    choose_precision,
    configure,
    describe,
    translate_oom,
)
from ocrnet.engines.mindspore.hrnet import Size, resize
from ocrnet.engines.mindspore.interrupts import defer_interrupts
from ocrnet.engines.mindspore.loss import SegmentationLoss, label_weight, weight_table
from ocrnet.engines.mindspore.loss_scaler import LossScaler
from ocrnet.engines.mindspore.ocr import OCRNet
from ocrnet.engines.mindspore.step import Accumulate, Finish, Forward, Gradients, Step, Update
from ocrnet.engines.segment import SegmentTraining
from ocrnet.engines.tta import Pass
from ocrnet.utils.errors import OcrnetError
from ocrnet.weights.mindspore import canonical_name

MOMENTUM = "momentum/"


class MindSporeEngine(SegmentTraining[Batch]):
    """OCRNet in MindSpore, on Ascend, CPU or GPU; `ocrnet.engines.base.Engine` documents the interface."""

    def __init__(
        self, cfg: Config, arch: architecture.Arch, *, world: World, stream: TrainStream | None = None
    ) -> None:
        super().__init__(cfg, world, stream)
        self.arch = arch
        self.device, device_description = choose_device(cfg.device_target)
        self.device_target = self.device
        self.precision: Precision = choose_precision(self.device, cfg)
        self.startup_messages: Sequence[str]
        self.versions: Mapping[str, str]
        configure(self.device, cfg)
        if world.size > 1:
            distributed.join(world)
        self.startup_messages, self.versions = describe(
            self.device, device_description, self.precision, cfg, training=stream is not None
        )
        self.network = OCRNet(arch)
        self.network.set_precision(self.precision.level)
        self.tensors = {canonical_name(p.name): p for p in self.network.get_parameters()}
        self.mean = Tensor(np.array(cfg.data.mean, np.float32).reshape(1, 3, 1, 1) * 255)
        self.std = Tensor(np.array(cfg.data.std, np.float32).reshape(1, 3, 1, 1) * 255)
        self.predictor = Predictor(self.network)
        if stream is not None:
            self._prepare_training()

    def _prepare_training(self) -> None:
        cfg, size = self.cfg, self.world.size
        self.lr = lr_schedule.table(cfg, size).astype(np.float32)
        if cfg.norm == "sync":
            self.network.synchronize(size)
        class_weights = cfg.data.class_weights or (1.0,) * self.arch.num_classes
        self.weight_table = weight_table(class_weights)
        loss = SegmentationLoss(
            class_weights,
            self.arch.rule.align_corners,
            aux=cfg.loss.aux,
            ocr=cfg.loss.ocr,
            ohem=(cfg.loss.ohem_threshold, cfg.loss.ohem_min_kept) if cfg.loss.ohem else None,
            parts=cfg.accumulate_steps * size,
        )
        dynamic = self.precision.scaled and cfg.loss_scale is None
        self.scaler = LossScaler(dynamic=dynamic, fixed=(cfg.loss_scale or 1.0) if self.precision.scaled else 1.0)
        names = {name: p for name, p in self.tensors.items() if not architecture.is_buffer(name)}
        statistics = ParameterTuple([p for name, p in self.tensors.items() if architecture.is_buffer(name)])
        weights = ParameterTuple(list(names.values()))
        optimizer_cfg = cfg.optimizer
        decays = tuple(
            optimizer_cfg.weight_decay if architecture.decays(name, optimizer_cfg.decay) else 0.0 for name in names
        )
        self.update = Update(weights, statistics, decays, self.scaler, cfg, size)
        self.momenta = dict(zip(names, self.update.momenta, strict=True)) if optimizer_cfg.momentum else {}
        forward = Forward(self.network, loss, self.mean, self.std, self.scaler)
        gradients = Gradients(forward, weights, size)
        self.single_step: Step | None = None
        if cfg.accumulate_steps == 1:
            self.single_step = Step(gradients, self.update)
        else:
            self.accumulate = Accumulate(gradients, weights)
            self.finish = Finish(self.accumulate, self.update)
        for cell in (self.single_step,) if self.single_step else (self.accumulate, self.finish):
            cell.set_train(True)

    def _open_loader(self, stream: TrainStream) -> Generator[Batch, None, None]:
        return batches(stream, self.cfg, world=self.world, step=self.step)

    def _begin_segment(self) -> None:
        self.network.set_train(True)

    def _take_step(self, micro_batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Run one optimizer step; return the losses of both heads (2,) and whether it was finite, on the device."""
        weight = sum(label_weight(batch.labels, self.weight_table) for batch in micro_batches)
        denominator = Tensor(np.array([weight], np.float32))
        lr = Tensor(self.lr[self.step])
        try:
            with (
                distributed.translate_lost_peer(),
                translate_oom("lower batch_size (and raise accumulate_steps) or data.crop_size"),
            ):
                inputs = [(*(Tensor(part) for part in batch[:3]), denominator) for batch in micro_batches]
                if self.single_step is not None:
                    return self.single_step(*inputs[0], lr)
                for micro_batch in inputs:
                    self.accumulate(*micro_batch)
                return self.finish(lr)
        except OcrnetError:
            self.update.undo()
            if self.single_step is None:
                self.accumulate.clear()
            raise

    @defer_interrupts()
    @translate_oom("for predict, lower eval.max_memory; for eval, set eval.slide to a window such as [512, 1024]")
    def predict(
        self, images: np.ndarray, passes: Sequence[Pass], outputs: Sequence[str] = ("labels",)
    ) -> dict[str, np.ndarray]:
        """Predict images from the softmax averaged over ``passes``; labels of a single pass need no softmax.

        Args:
            images: uint8 N,H,W,3, RGB.
            passes: The forward passes to average over.
            outputs: Names from `ocrnet.engines.base.OUTPUTS` and `ocrnet.engines.base.ATTENTION`.

        Returns:
            The requested outputs by name; `ocrnet.engines.base.Engine.predict` documents shapes and dtypes.

        Raises:
            OcrnetError: An output is unknown or unavailable for these passes, or memory is exhausted.
        """
        check_outputs(outputs, passes)
        self.network.set_train(False)
        self.predictor.expect({(height, width) for pass_ in passes for _, _, height, width in pass_.windows})
        x = (Tensor(images).astype("float32").transpose(0, 3, 1, 2) - self.mean) / self.std
        size = images.shape[1], images.shape[2]
        if list(outputs) == ["labels"] and len(passes) == 1:
            return {"labels": self._logits_for_pass(x, passes[0], size).argmax(1).asnumpy().astype(np.uint8)}
        probabilities = ops.zeros((len(images), self.arch.num_classes, *size), ms.float32)
        for pass_ in passes:
            logits = self._logits_for_pass(x, pass_, size)
            probabilities = probabilities + ops.softmax(logits, 1)
        probabilities = probabilities / len(passes)
        scores = logits if len(passes) == 1 else probabilities  # for labels: rounding in the softmax creates ties
        results = {
            "labels": lambda: scores.argmax(1).asnumpy().astype(np.uint8),
            "confidence": lambda: ops.amax(probabilities, 1).asnumpy(),
            "probabilities": probabilities.asnumpy,
        }
        if set(ATTENTION) & set(outputs):
            attention = self.predictor.attention(resize(x, passes[0].size, align_corners=False))
            results |= {name: attention_map.asnumpy for name, attention_map in zip(ATTENTION, attention, strict=True)}
        return {name: results[name]() for name in outputs}

    def _logits_for_pass(self, x: Tensor, pass_: Pass, size: Size) -> Tensor:
        """Return the OCR head's logits of one pass, float32 N,num_classes,H,W, resized to the image size ``size``."""
        x = resize(x, pass_.size, align_corners=False)
        if pass_.flip:
            x = ops.flip(x, (3,))
        align_corners = self.arch.rule.align_corners
        if len(pass_.windows) == 1:
            logits = self.predictor(x)
        else:
            total = np.zeros((len(x), self.arch.num_classes, *pass_.size), np.float32)
            count = np.zeros(pass_.size, np.float32)
            size_of_window = pass_.windows[0][2:]
            average = pass_.average_windows(
                total,
                count,
                lambda window: resize(self.predictor(x[window]), size_of_window, align_corners).asnumpy(),
            )
            logits = Tensor(average)
        if pass_.flip:
            logits = ops.flip(logits, (3,))
        return resize(logits, size, align_corners)

    @defer_interrupts()
    def logits(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run one forward pass on normalized float32 N,3,H,W; return the (aux, ocr) logits as float32."""
        self.network.set_train(False)
        self.predictor.expect({(x.shape[2], x.shape[3])})
        aux, ocr = self.predictor.both(Tensor(x))
        return aux.asnumpy(), ocr.asnumpy()

    def state(self) -> dict[str, np.ndarray]:
        """Copy the state to the host; return it by canonical name."""
        state = {name: p.asnumpy().copy() for name, p in self.tensors.items()}
        if self.stream is not None:
            state |= {MOMENTUM + name: p.asnumpy().copy() for name, p in self.momenta.items()}
            state |= self.scaler.state()
        return state

    def restore(self, state: Mapping[str, np.ndarray], step: int) -> None:
        """Load ``state`` and continue the training stream at ``step``; momentum missing in ``state`` becomes zero."""
        for name, parameter in self.tensors.items():
            _put(parameter, state[name])
        if self.stream is not None:
            for name, parameter in self.momenta.items():
                _put(parameter, state.get(MOMENTUM + name, np.zeros(parameter.shape, np.float32)))
            self.update.keep()
            self.scaler.restore(state)
        self._set_position(step)

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return the sum of ``array`` over the ranks, exact for int64."""
        return array if self.world.size == 1 else distributed.all_sum(array)

    def close(self) -> None:
        """Stop the workers of the training data loader and leave the process group."""
        self.close_loader()
        if self.world.size > 1:
            distributed.leave()

    def _to_host(self, values: Sequence[Tensor]) -> np.ndarray:
        return np.array([value.asnumpy() for value in values])

    def _memory(self) -> int:
        if self.device == "CPU":
            return psutil.Process().memory_info().rss
        return int(ms.hal.max_memory_allocated())


class Predictor:
    """The network in evaluation mode, compiled for the first input size and, if another size occurs, for any size.

    Graphs with fixed shapes are the fastest, but each takes about a minute to compile.
    """

    def __init__(self, network: OCRNet) -> None:
        self.fixed_size, self.any_size, self.attention_maps = Logits(network), Logits(network), Attention(network)
        self.any_size.set_inputs(Tensor(shape=[None, 3, None, None], dtype=ms.float32))
        self.size: Size | None = None
        self.several_sizes = False

    def expect(self, sizes: set[Size]) -> None:
        """Set the sizes (height, width) of the next inputs, which determine the graph to use."""
        self.several_sizes = self.several_sizes or len(sizes | ({self.size} if self.size else set())) > 1
        if not self.several_sizes:
            (self.size,) = sizes

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (aux, ocr), each float32 N,num_classes,ceil(H/4),ceil(W/4), for normalized x N,3,H,W."""
        cell = self.any_size if self.several_sizes and x.shape[2:] != self.size else self.fixed_size
        cell.set_train(False)
        return cell(x)

    def attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (regions, relation), each float32 N,num_classes,ceil(H/4),ceil(W/4), for normalized x N,3,H,W."""
        return self.attention_maps.set_train(False)(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Return only the OCR head's logits."""
        return self.both(x)[1]


class Attention(nn.Cell):
    """The attention maps of the OCR head in float32."""

    def __init__(self, network: OCRNet) -> None:
        super().__init__()
        self.network = network

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (regions, relation), each N,num_classes,ceil(H/4),ceil(W/4), for normalized x N,3,H,W."""
        regions, relation = self.network.attention(x)
        return regions.astype("float32"), relation.astype("float32")


class Logits(nn.Cell):
    """The logits of both heads in float32."""

    def __init__(self, network: OCRNet) -> None:
        super().__init__()
        self.network = network

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (aux, ocr), each N,num_classes,ceil(H/4),ceil(W/4), for normalized x N,3,H,W."""
        aux, ocr = self.network(x, None)
        return aux.astype("float32"), ocr.astype("float32")


def _put(parameter: ms.Parameter, array: np.ndarray) -> None:
    """Copy ``array`` into the existing memory of the parameter.

    `set_data` would allocate new memory, which graphs that have already run would not update.
    """
    ops.assign(parameter, Tensor(np.ascontiguousarray(array, np.float32)))
