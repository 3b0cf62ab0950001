"""PyTorch engine: training steps that are skipped on the device if not finite, and prediction by a list of passes."""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import nn

from ocrnet import architecture
from ocrnet.config import Config
from ocrnet.data.sampler import TrainStream
from ocrnet.distributed.launcher import World
from ocrnet.engines import lr_schedule
from ocrnet.engines.base import ATTENTION, check_outputs
from ocrnet.engines.segment import SegmentTraining
from ocrnet.engines.torch import distributed
from ocrnet.engines.torch.cuda_graph import CudaRecorder, Inputs, Recorder, StepGraph
from ocrnet.engines.torch.dataloader import Batch, batches
from ocrnet.engines.torch.device import (
    Precision,
    choose_device,
    choose_precision,
    configure,
    cuda_graph_unavailable_reason,
    describe,
    fused_norm_unavailable_reason,
    translate_oom,
)
from ocrnet.engines.torch.fold import fold_norms
from ocrnet.engines.torch.hrnet import Norm, Size, resize
from ocrnet.engines.torch.loss import SegmentationLoss, label_weight
from ocrnet.engines.torch.loss_scaler import LossScaler
from ocrnet.engines.torch.ocr import OCRNet
from ocrnet.engines.torch.optimizer import SGD
from ocrnet.engines.tta import Pass
from ocrnet.utils.errors import OcrnetError

MOMENTUM = "momentum/"


class TorchEngine(SegmentTraining[Batch]):
    """OCRNet in PyTorch, on the CPU or on one GPU per rank; `ocrnet.engines.base.Engine` documents the interface."""

    def __init__(
        self, cfg: Config, arch: architecture.Arch, *, world: World, stream: TrainStream | None = None
    ) -> None:
        super().__init__(cfg, world, stream)
        self.arch = arch
        self.device, device_description = choose_device(cfg.device_target, world.local)
        self.device_target = "GPU" if self.device.type == "cuda" else "CPU"
        self.precision: Precision = choose_precision(self.device, cfg.mix)
        self.startup_messages: Sequence[str]
        self.versions: Mapping[str, str]
        configure(self.device, deterministic=cfg.deterministic)
        if world.size > 1:
            distributed.join(world, self.device, cfg.rank_timeout)
        self.startup_messages, self.versions = describe(
            self.device, device_description, self.precision, cfg, training=stream is not None, ranks=world.size
        )
        self.model = OCRNet(arch).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.running = _flatten_buffers(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.mean = torch.tensor(cfg.data.mean, device=self.device).mul(255).view(1, 3, 1, 1)
        self.std = torch.tensor(cfg.data.std, device=self.device).mul(255).view(1, 3, 1, 1)
        self._folded: OCRNet | None = None
        if stream is not None:
            self._prepare_training()

    def _prepare_training(self) -> None:
        cfg = self.cfg
        self.lr = lr_schedule.table(cfg, self.world.size)
        weights = cfg.data.class_weights or (1.0,) * self.arch.num_classes
        self.class_weight = torch.tensor(weights, device=self.device)
        ohem = (cfg.loss.ohem_threshold, cfg.loss.ohem_min_kept) if cfg.loss.ohem else None
        self.loss = SegmentationLoss(
            self.class_weight, self.arch.rule.align_corners, aux=cfg.loss.aux, ocr=cfg.loss.ocr, ohem=ohem
        )
        self.scaler = LossScaler(self.device, dynamic=self.precision.scaled)
        self.optimizer = SGD(self.parameters, cfg.optimizer)
        self.step_lr: float | torch.Tensor = 0.0
        self.graph: StepGraph | None = None
        if cfg.cuda_graph and cuda_graph_unavailable_reason(self.device, self.world.size) is None:
            self.use_graph(CudaRecorder())
        self.gradient_sum = distributed.GradientSum(self.parameters.values()) if self.world.size > 1 else None
        fused: Callable[..., torch.Tensor] | None = None
        if cfg.fused_norm and fused_norm_unavailable_reason(self.device, cfg, self.world.size) is None:
            from ocrnet.engines.torch.fused_norm import batch_norm_relu

            fused = batch_norm_relu
        for module in self.model.modules():
            if isinstance(module, Norm):
                # mutation: synchronize-batch-norm
                module.sync = cfg.norm == "sync" and self.world.size > 1
                module.fused = fused

    def use_graph(self, recorder: Recorder) -> None:
        """Run all later training steps by a `StepGraph`, which records one step and replays it."""
        self.graph = StepGraph(self._device_step, recorder, self.device)
        self.step_lr = torch.zeros((), device=self.device)

    def _open_loader(self, stream: TrainStream) -> Generator[Batch, None, None]:
        return batches(stream, self.cfg, world=self.world, step=self.step, pinned=self.device.type == "cuda")

    def _begin_segment(self) -> None:
        self.model.train()
        self._folded = None

    def _take_step(self, micro_batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one optimizer step; return the losses of both heads (2,) and whether it was finite, on the device."""
        lr = float(self.lr[self.step])
        if isinstance(self.step_lr, torch.Tensor):
            self.step_lr.fill_(lr)
        else:
            self.step_lr = lr
        with translate_oom("lower batch_size (and raise accumulate_steps) or data.crop_size"):
            if self.graph is not None:
                heads, finite = self.graph(micro_batches)
                return heads.clone(), finite.clone()  # the next replay overwrites them
            return self._device_step(
                [[part.to(self.device, non_blocking=True) for part in batch[:3]] for batch in micro_batches]
            )

    def _device_step(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one optimizer step on batches that are on the device, without synchronizing the host with the device.

        Return the losses of both heads (2,) and whether the step was finite. If it was not, or if this method raises,
        batch norm statistics are those from before the step.
        """
        before = self.running.clone()
        try:
            with self._translate_lost_peer():
                heads, norm = self._gradients(inputs)
                finite = torch.isfinite(norm) & torch.isfinite(heads).all()
        except (OcrnetError, RuntimeError, MemoryError):
            self.running.copy_(before)
            raise
        self._update(norm, finite)
        # mutation: keep-bn-statistics-of-nonfinite-step
        self.running.copy_(torch.where(finite, self.running, before))
        return heads, finite

    def _gradients(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradients of one step, summed over micro-batches and ranks, in the parameters' ``grad``.

        Return the losses of both heads (2,) and the norm of the unscaled gradients.
        """
        denominator = torch.stack([label_weight(label, self.class_weight) for _, label, _ in inputs]).sum()
        heads = torch.zeros(2, device=self.device)
        if self.gradient_sum is None:
            self.optimizer.free_gradients()
        else:
            self.gradient_sum.begin()
            # mutation: one-loss-denominator
            dist.all_reduce(denominator)
        num_parts = len(inputs) * self.world.size
        for number, (images, label, dropout_mask) in enumerate(inputs, 1):
            with self.precision.autocast():
                outputs = self.model(self._normalize(images), dropout_mask)
            total, head_losses = self.loss(outputs, label, denominator, parts=num_parts)
            if self.gradient_sum is not None:
                self.gradient_sum.expect(last=number == len(inputs))
            self.scaler.scaled(total).backward()
            heads += head_losses.detach()
        if self.gradient_sum is not None:
            dist.all_reduce(heads)
            self.gradient_sum.finish()
        return heads, self._gradient_norm()

    def _translate_lost_peer(self) -> contextlib.AbstractContextManager:
        return (
            distributed.translate_lost_peer(self.cfg.rank_timeout) if self.world.size > 1 else contextlib.nullcontext()
        )

    def _gradient_norm(self) -> torch.Tensor:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) / self.scaler.scale

    def _update(self, norm: torch.Tensor, finite: torch.Tensor) -> None:
        """Update weights and momentum if ``finite``, and the loss scale in any case.

        One division of the gradients unscales and clips them.
        """
        divisor = self.scaler.scale
        if self.cfg.clip_grad is not None:
            divisor = divisor * (norm / self.cfg.clip_grad).clamp(min=1.0)
        self.optimizer.step(self.step_lr, divisor.float(), finite)
        self.scaler.update(finite)

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Convert uint8 N,H,W,3 to normalized float32 N,3,H,W in channels-last memory, which is the input's order."""
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std

    @translate_oom("for predict, lower eval.max_memory; for eval, set eval.slide to a window such as [512, 1024]")
    @torch.inference_mode()
    def predict(
        self, images: np.ndarray, passes: Sequence[Pass], outputs: Sequence[str] = ("labels",)
    ) -> dict[str, np.ndarray]:
        """Predict images from the softmax averaged over ``passes``; labels of a single pass need no softmax.

        Args:
            images: RGB images uint8 N,H,W,3.
            passes: The passes to average.
            outputs: Names from `OUTPUTS` and `ATTENTION` of `ocrnet.engines.base`.

        Returns:
            The requested outputs by name; `ocrnet.engines.base.Engine.predict` documents shapes and dtypes.

        Raises:
            OcrnetError: An output is unknown or unavailable for these passes, or memory is exhausted.
        """
        check_outputs(outputs, passes)
        x = self._normalize(torch.from_numpy(images).to(self.device))
        size = images.shape[1], images.shape[2]
        if list(outputs) == ["labels"] and len(passes) == 1:
            return {"labels": self._logits_for_pass(x, passes[0], size).argmax(1).to(torch.uint8).cpu().numpy()}
        probabilities = torch.zeros(len(images), self.arch.num_classes, *size, device=self.device)
        for pass_ in passes:
            logits = self._logits_for_pass(x, pass_, size)
            probabilities += logits.softmax(1)
        probabilities /= len(passes)
        confidence, labels = probabilities.max(1)
        if len(passes) == 1:  # use the logits, as for labels only: rounding in the softmax creates ties
            labels = logits.argmax(1)
        results = {"labels": labels.to(torch.uint8), "confidence": confidence, "probabilities": probabilities}
        if set(ATTENTION) & set(outputs):
            with self.precision.autocast():
                attention = self._network().attention(self._resized(x, passes[0]))
            results |= {name: attention_map.float() for name, attention_map in zip(ATTENTION, attention, strict=True)}
        return {name: results[name].cpu().numpy() for name in outputs}

    def _logits_for_pass(self, x: torch.Tensor, pass_: Pass, size: Size) -> torch.Tensor:
        """Return the OCR head's logits of one pass, float32 N,num_classes,H,W, resized to the image size ``size``."""
        x = self._resized(x, pass_)
        if pass_.flip:
            x = x.flip(3)
        align_corners = self.arch.rule.align_corners
        if len(pass_.windows) == 1:
            logits = self._ocr(x)
        else:
            total = torch.zeros(len(x), self.arch.num_classes, *pass_.size, device=self.device)
            count = torch.zeros(pass_.size, device=self.device)
            size_of_window = pass_.windows[0][2:]
            logits = pass_.average_windows(
                total, count, lambda window: resize(self._ocr(x[window]), size_of_window, align_corners)
            )
        if pass_.flip:
            logits = logits.flip(3)
        return resize(logits, size, align_corners)

    def _resized(self, x: torch.Tensor, pass_: Pass) -> torch.Tensor:
        return x if pass_.size == x.shape[2:] else resize(x, pass_.size, align_corners=False)

    def _ocr(self, x: torch.Tensor) -> torch.Tensor:
        return self._heads(x)[1].float()

    @torch.inference_mode()
    def logits(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run one forward pass on normalized float32 N,3,H,W; return the (aux, ocr) logits as float32."""
        aux, ocr = self._heads(torch.from_numpy(x).to(self.device))
        return aux.float().cpu().numpy(), ocr.float().cpu().numpy()

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self.precision.autocast():
            return self._network()(x)

    def _network(self) -> OCRNet:
        """Return the network with folded batch norms; create it if the weights have changed since the last call."""
        if self._folded is None:
            self._folded = fold_norms(self.model, self.precision.dtype)
        return self._folded

    def state(self) -> dict[str, np.ndarray]:
        """Copy the state to the host; return it by canonical name."""
        state = {name: _to_numpy(tensor) for name, tensor in self.model.state_dict().items()}
        if self.stream is not None:
            state |= {MOMENTUM + name: _to_numpy(buffer) for name, buffer in self.optimizer.momentum.items()}
            state |= self.scaler.state()
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, np.ndarray], step: int) -> None:
        """Load ``state`` and continue the training stream at ``step``; momentum missing in ``state`` becomes zero."""
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(torch.from_numpy(state[name]))
        if self.stream is not None:
            for name, buffer in self.optimizer.momentum.items():
                saved = state.get(MOMENTUM + name)
                # mutation: restore-momentum
                buffer.copy_(torch.from_numpy(saved)) if saved is not None else buffer.zero_()
            self.scaler.restore(state)
        self._folded = None
        self._set_position(step)

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Return the sum of ``array`` over the ranks, exact for int64."""
        if self.world.size == 1:
            return array
        with self._translate_lost_peer():
            return distributed.all_sum(array)

    def close(self) -> None:
        """Stop the workers of the training data loader and leave the process group."""
        self.close_loader()
        if self.world.size > 1:
            distributed.leave()

    def _to_host(self, values: Sequence[torch.Tensor]) -> np.ndarray:
        return torch.stack(list(values)).cpu().numpy()

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return psutil.Process().memory_info().rss


def _flatten_buffers(model: nn.Module) -> torch.Tensor:
    """Move all batch norm statistics into one flat tensor and return it; the modules' buffers become views of it.

    Copying this one tensor saves or restores all statistics.
    """
    owners = [(module, name) for module in model.modules() for name, _ in module.named_buffers(recurse=False)]
    flat = torch.cat([getattr(module, name).reshape(-1) for module, name in owners])
    start = 0
    for module, name in owners:
        size = getattr(module, name).numel()
        setattr(module, name, flat[start : start + size])
        start += size
    return flat


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy().copy()
