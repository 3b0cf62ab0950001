"""One optimizer step as compiled cells: gradients, then an update, which is skipped if they are not finite."""

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, amp, nn, ops

from ocrnet.config import Config
from ocrnet.engines.mindspore.hrnet import parameter
from ocrnet.engines.mindspore.loss import SegmentationLoss
from ocrnet.engines.mindspore.loss_scaler import LossScaler
from ocrnet.engines.mindspore.ocr import OCRNet

# Operations on each parameter use HyperMap, because a loop over all parameters exceeds the compiler's depth limit.
_momentum = ops.ApplyMomentum()
_nesterov = ops.ApplyMomentum(use_nesterov=True)
_all_reduce = ops.MultitypeFuncGraph("all_reduce")
_put = ops.MultitypeFuncGraph("put")
_add = ops.MultitypeFuncGraph("add")
_clear = ops.MultitypeFuncGraph("clear")
_square_sum = ops.MultitypeFuncGraph("square_sum")
_times = ops.MultitypeFuncGraph("times")
_apply = ops.MultitypeFuncGraph("apply")


@_put.register("Tensor", "Tensor")
def _put_one(target, source):  # type: ignore[no-untyped-def]
    return ops.assign(target, source)


@_add.register("Tensor", "Tensor")
def _add_one(target, source):  # type: ignore[no-untyped-def]
    return ops.assign_add(target, source)


@_clear.register("Tensor")
def _clear_one(target):  # type: ignore[no-untyped-def]
    return ops.assign(target, ops.zeros_like(target))


@_square_sum.register("Tensor")
def _square_sum_one(gradient):  # type: ignore[no-untyped-def]
    return ops.square(gradient).sum()


@_times.register("Tensor", "Tensor")
def _times_one(factor, gradient):  # type: ignore[no-untyped-def]
    return gradient * factor


@_all_reduce.register("Function", "Tensor")
def _all_reduce_one(reduce, gradient):  # type: ignore[no-untyped-def]
    return reduce(gradient)


@_apply.register("Bool", "Number", "Tensor", "Number", "Tensor", "Tensor", "Tensor")
def _apply_one(nesterov, momentum, lr, decay, weight, accumulated, gradient):  # type: ignore[no-untyped-def]
    if decay != 0:
        gradient = gradient + decay * weight
    if nesterov:
        return _nesterov(weight, accumulated, lr, gradient, momentum)
    return _momentum(weight, accumulated, lr, gradient, momentum)


def _copy(sources: ParameterTuple, targets: ParameterTuple) -> None:
    for source, target in zip(sources, targets, strict=True):
        ops.assign(target, Tensor(source.asnumpy().copy()))


class Forward(nn.Cell):
    """The forward pass, from a uint8 micro-batch to the loss times the loss scale."""

    def __init__(self, network: OCRNet, loss: SegmentationLoss, mean: Tensor, std: Tensor, scaler: LossScaler) -> None:
        super().__init__()
        self.network, self.loss, self.scaler = network, loss, scaler
        self.mean, self.std = mean, std

    def construct(
        self, images: Tensor, label: Tensor, dropout_mask: Tensor, denominator: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the scaled loss of a micro-batch and the loss of each head.

        Args:
            images: N,H,W,3.
            label: uint8 N,H,W.
            dropout_mask: N,features.
            denominator: float32 (1,), the total label weight of the step over all ranks.

        Returns:
            The scaled loss, and the losses of both heads (2,).
        """
        x = (images.astype("float32").transpose(0, 3, 1, 2) - self.mean) / self.std
        aux, ocr = self.network(x, dropout_mask)
        total, heads = self.loss(aux, ocr, label, denominator)
        return total * self.scaler.scale, heads


class Gradients(nn.Cell):
    """The losses of both heads and the scaled gradients of one micro-batch of this rank."""

    def __init__(self, forward: Forward, weights: ParameterTuple, ranks: int) -> None:
        super().__init__()
        self.forward, self.ranks = forward, ranks
        self.compute = ms.value_and_grad(forward, None, weights, has_aux=True)
        if ranks > 1:
            self.sum = ops.AllReduce()

    def construct(self, images: Tensor, label: Tensor, dropout_mask: Tensor, denominator: Tensor):  # type: ignore[no-untyped-def]
        """Compute losses and gradients; with several ranks, sum ``denominator`` over them first.

        Args:
            images: N,H,W,3.
            label: uint8 N,H,W.
            dropout_mask: N,features.
            denominator: float32 (1,), this rank's label weight of the step.

        Returns:
            The losses of both heads (2,), and the scaled gradients.
        """
        if self.ranks > 1:
            denominator = self.sum(denominator)
        (_, heads), gradients = self.compute(images, label, dropout_mask, denominator)
        return heads, gradients


class Update(nn.Cell):
    """SGD update with a weight decay per parameter; if loss or gradients are not finite, only the loss scale changes.

    ``kept`` contains the batch norm statistics from before the step, because the forward pass has already changed
    ``statistics``.
    """

    def __init__(
        self,
        weights: ParameterTuple,
        statistics: ParameterTuple,
        decays: tuple[float, ...],
        scaler: LossScaler,
        cfg: Config,
        ranks: int,
    ) -> None:
        super().__init__()
        self.weights, self.statistics, self.decays = weights, statistics, decays
        self.momenta = weights.clone("momentum", "zeros")
        self.kept = statistics.clone("kept", "same")
        self.scaler = scaler
        self.momentum, self.nesterov = cfg.optimizer.momentum, cfg.optimizer.nesterov
        self.clip, self.ranks = cfg.clip_grad, ranks
        self.map = ops.HyperMap()
        if ranks > 1:
            self.sum = ops.AllReduce()

    def construct(self, heads: Tensor, gradients: tuple[Tensor, ...], lr: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the update, unless a loss or gradient of any rank is not finite.

        Args:
            heads: The losses of both heads (2,) of this rank.
            gradients: The scaled gradients of this rank.
            lr: The learning rate.

        Returns:
            The losses of both heads (2,), summed over the ranks, and whether the update was applied.
        """
        if self.ranks > 1:
            heads = self.sum(heads)
            gradients = self.map(ops.partial(_all_reduce, self.sum), gradients)
        finite = ops.logical_and(amp.all_finite(gradients), ops.isfinite(heads).all())
        if self.ranks > 1:  # on the first Ascend 910, all_finite reports the local device's overflow, not the gradients
            finite = (self.sum(finite.astype("float32").reshape(1)) == self.ranks).reshape(())
        gradients = self.unscaled(gradients)
        if finite:
            step = ops.partial(_apply, self.nesterov, self.momentum, lr)
            self.map(step, self.decays, self.weights, self.momenta, gradients)
            self.map(_put, self.kept, self.statistics)
        else:
            self.map(_put, self.statistics, self.kept)
        self.scaler.update(finite)
        return heads, finite

    def unscaled(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the gradients divided by the loss scale and clipped to the norm ``clip_grad``, if that is set."""
        if self.clip is None and self.scaler.is_one:
            return gradients
        factor = 1.0 / self.scaler.scale
        if self.clip is not None:
            norm = ops.sqrt(ops.addn(self.map(_square_sum, gradients))) * factor
            factor = factor / ops.maximum(norm / self.clip, 1.0)
        return self.map(ops.partial(_times, factor), gradients)

    def keep(self) -> None:
        """Store the current batch norm statistics as those from before the next step."""
        _copy(self.statistics, self.kept)

    def undo(self) -> None:
        """Restore the batch norm statistics from before a step that raised an error."""
        _copy(self.kept, self.statistics)


class Step(nn.Cell):
    """An optimizer step with one micro-batch: gradients and update in one graph."""

    def __init__(self, gradients: Gradients, update: Update) -> None:
        super().__init__()
        self.gradients, self.update = gradients, update

    def construct(self, images: Tensor, label: Tensor, dropout_mask: Tensor, denominator: Tensor, lr: Tensor):  # type: ignore[no-untyped-def]
        """Run the optimizer step.

        Args:
            images: N,H,W,3.
            label: uint8 N,H,W.
            dropout_mask: N,features.
            denominator: float32 (1,), this rank's label weight of the step.
            lr: The learning rate.

        Returns:
            The losses of both heads (2,), summed over the ranks, and whether the step was applied.
        """
        heads, gradients = self.gradients(images, label, dropout_mask, denominator)
        return self.update(heads, gradients, lr)


class Accumulate(nn.Cell):
    """Gradient accumulation: add the losses and gradients of one micro-batch to those of the step."""

    def __init__(self, gradients: Gradients, weights: ParameterTuple) -> None:
        super().__init__()
        self.gradients = gradients
        self.heads = Parameter(parameter((2,), 0, trained=False), name="heads")
        self.total = weights.clone("total", "zeros")
        self.map = ops.HyperMap()

    def construct(self, images: Tensor, label: Tensor, dropout_mask: Tensor, denominator: Tensor) -> Tensor:
        """Add the losses and gradients of one micro-batch.

        Args:
            images: N,H,W,3.
            label: uint8 N,H,W.
            dropout_mask: N,features.
            denominator: float32 (1,), this rank's label weight of the step.

        Returns:
            The losses of both heads (2,), summed over the micro-batches so far.
        """
        heads, gradients = self.gradients(images, label, dropout_mask, denominator)
        self.map(_add, self.total, gradients)
        return ops.assign_add(self.heads, heads)

    def clear(self) -> None:
        """Set the accumulated losses and gradients to zero after a step that raised an error."""
        for accumulated in (self.heads, *self.total):
            ops.assign(accumulated, ops.zeros_like(accumulated))


class Finish(nn.Cell):
    """The update by the accumulated gradients, which are then set to zero."""

    def __init__(self, accumulate: Accumulate, update: Update) -> None:
        super().__init__()
        self.heads, self.total, self.update = accumulate.heads, accumulate.total, update
        self.map = ops.HyperMap()

    def construct(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses of both heads (2,), summed over the ranks, and whether the step was applied."""
        heads, finite = self.update(self.heads + 0.0, self.total, lr)
        self.map(_clear, self.total)
        ops.assign(self.heads, ops.zeros_like(self.heads))
        return heads, finite
