"""Class-weighted cross-entropy of the two heads and online hard example mining (OHEM), in MindSpore."""

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn, ops

from ocrnet.data.datasets.base import IGNORE
from ocrnet.engines.mindspore.hrnet import resize


def weight_table(class_weight: Sequence[float]) -> np.ndarray:
    """Return the weight of every uint8 label, float32 (256,): the class weights, then 0 from ``num_classes`` to 255."""
    return np.pad(np.asarray(class_weight, np.float32), (0, IGNORE + 1 - len(class_weight)))


def label_weight(label: np.ndarray, table: np.ndarray) -> float:
    """Return the sum of the class weights over all pixels of ``label``, uint8 N,H,W: the denominator of the loss.

    ``table`` comes from `weight_table`. The loss is divided by the total of all micro-batches and ranks.
    """
    return float(np.bincount(label.reshape(-1), minlength=IGNORE + 1) @ table.astype(np.float64))


class SegmentationLoss(nn.Cell):
    """The loss of both heads: ``aux`` times the auxiliary head's loss plus ``ocr`` times the OCR head's loss.

    ``ohem`` contains threshold and min_kept of the OHEM of the OCR head; None disables OHEM. ``parts`` is the number of
    micro-batches of a step, over all ranks. The losses of all micro-batches and ranks of a step add up to the loss of
    the step. Without OHEM, the class-weighted sum of each head is therefore divided by ``denominator``. With OHEM, the
    loss of each head is a mean over the micro-batch, divided by ``parts``: in the OCR head over the hard pixels, in the
    auxiliary head over all pixels, where ignored pixels count as 0, as in the authors' code.
    """

    def __init__(
        self,
        class_weight: Sequence[float],
        align_corners: bool,
        *,
        aux: float = 0.4,
        ocr: float = 1.0,
        ohem: tuple[float, int] | None = None,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.table = Tensor(weight_table(class_weight))
        self.align_corners, self.aux, self.ocr, self.parts = align_corners, aux, ocr, parts
        self.mined = ohem is not None
        self.threshold, self.min_kept = ohem if ohem is not None else (0.0, 0)

    def construct(self, aux: Tensor, ocr: Tensor, label: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a micro-batch to differentiate, and the loss of each head.

        Args:
            aux: Logits N,K,h,w of the auxiliary head.
            ocr: Logits N,K,h,w of the OCR head.
            label: uint8 N,H,W.
            denominator: float32 (1,), the total of `label_weight` of the step; not used with OHEM.

        Returns:
            The loss, and the losses of both heads (2,), without gradient and not multiplied by ``aux`` and ``ocr``.
        """
        target = label.astype("int32")
        aux_sum = (self.nll(aux, target) * self.weight(target)).sum()
        if self.mined:
            heads = ops.stack((aux_sum / target.size, self.ohem(ocr, target))) / self.parts
        else:
            ocr_sum = (self.nll(ocr, target) * self.weight(target)).sum()
            heads = ops.stack((aux_sum, ocr_sum)) / ops.where(denominator > 0, denominator, ops.ones_like(denominator))
        return self.aux * heads[0] + self.ocr * heads[1], ops.stop_gradient(heads)

    def weight(self, target: Tensor) -> Tensor:
        """Return the class weight of every pixel; 0 for ignored pixels."""
        return ops.gather(self.table, target, 0)

    def nll(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the negative log-likelihood, float32 N,H,W, of logits N,K,h,w; 0 for ignored pixels.

        The logits are resized to the size of ``target``.
        """
        logits = resize(logits.astype("float32"), target.shape[-2:], self.align_corners)
        valid = target != IGNORE
        safe = ops.where(valid, target, ops.zeros_like(target))
        log_probability = ops.gather_elements(ops.log_softmax(logits, 1), 1, safe.expand_dims(1)).squeeze(1)
        return ops.where(valid, -log_probability, ops.zeros_like(log_probability))

    def ohem(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean class-weighted loss over the hard pixels (the authors' OhemCrossEntropy); 0 without any.

        A pixel that is not ignored is hard if the predicted probability of its ground truth class is below a bound.
        The bound is the maximum of the threshold and the probability at index ``min_kept``, in ascending order of
        these probabilities (or at the last index, if there are fewer).
        """
        nll = self.nll(logits, target)
        valid = target != IGNORE
        probability = ops.stop_gradient(ops.exp(-nll))  # 1 for ignored pixels, which are therefore sorted last
        sorted_probability = ops.sort(probability.reshape(-1))[0]
        position = ops.clamp(valid.astype("int32").sum() - 1, 0, self.min_kept)
        bound = ops.maximum(ops.gather(sorted_probability, position, 0), self.threshold)
        kept = ops.logical_and(probability < bound, valid).astype("float32")
        return (nll * self.weight(target) * kept).sum() / ops.maximum(kept.sum(), 1.0)
