"""Class-weighted cross-entropy of the two heads, and the authors' hard-pixel mining (OHEM), in MindSpore."""

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn, ops

from ocrnet.data.datasets.base import IGNORE
from ocrnet.engines.mindspore.hrnet import resize


def weight_table(class_weight: Sequence[float]) -> np.ndarray:
    """Return the weight of every uint8 label, float32 (256,): the class's, and 0 from ``num_classes`` on."""
    return np.pad(np.asarray(class_weight, np.float32), (0, IGNORE + 1 - len(class_weight)))


def label_weight(label: np.ndarray, table: np.ndarray) -> float:
    """Sum over the valid pixels of uint8 labels N,H,W of their class's weight: the loss's denominator.

    Ranks and micro-batches add these up before any of them divides.
    """
    return float(np.bincount(label.reshape(-1), minlength=IGNORE + 1) @ table.astype(np.float64))


class SegmentationLoss(nn.Cell):
    """The loss of both heads: ``aux`` times the auxiliary head's plus ``ocr`` times the OCR head's.

    ``ohem``: (threshold, min_kept) of the hard-pixel mining in the OCR head, None for none. What each part is divided
    by is as in the torch engine: ``denominator``, or with OHEM the number of pixels times ``parts`` (micro-batches and
    ranks together).
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
        """Loss to differentiate, and the two heads' own values (2,), of logits N,K,h,w and uint8 labels N,H,W."""
        target = label.astype("int32")
        aux_sum = (self.nll(aux, target) * self.weight(target)).sum()
        if self.mined:
            heads = ops.stack((aux_sum / target.size, self.ohem(ocr, target))) / self.parts
        else:
            ocr_sum = (self.nll(ocr, target) * self.weight(target)).sum()
            heads = ops.stack((aux_sum, ocr_sum)) / ops.where(denominator > 0, denominator, ops.ones_like(denominator))
        return self.aux * heads[0] + self.ocr * heads[1], ops.stop_gradient(heads)

    def weight(self, target: Tensor) -> Tensor:
        """The class weight of every pixel, 0 where ignored."""
        return ops.gather(self.table, target, 0)

    def nll(self, logits: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood float32 N,H,W of logits N,K,h,w brought to the labels' size; 0 where ignored."""
        logits = resize(logits.astype("float32"), target.shape[-2:], self.align_corners)
        valid = target != IGNORE
        safe = ops.where(valid, target, ops.zeros_like(target))
        picked = ops.gather_elements(ops.log_softmax(logits, 1), 1, safe.expand_dims(1)).squeeze(1)
        return ops.where(valid, -picked, ops.zeros_like(picked))

    def ohem(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over the kept pixels of their class-weighted loss, 0 where none is kept (the authors' OhemCrossEntropy).

        Kept are the valid pixels whose true class has a probability below the threshold, or below that of rank
        ``min_kept`` from the lowest, whichever is more.
        """
        nll = self.nll(logits, target)
        valid = target != IGNORE
        probability = ops.stop_gradient(ops.exp(-nll))  # 1 where ignored, so these sort last
        ranked = ops.sort(probability.reshape(-1))[0]
        rank = ops.clamp(valid.astype("int32").sum() - 1, 0, self.min_kept)
        bound = ops.maximum(ops.gather(ranked, rank, 0), self.threshold)
        kept = ops.logical_and(probability < bound, valid).astype("float32")
        return (nll * self.weight(target) * kept).sum() / ops.maximum(kept.sum(), 1.0)
