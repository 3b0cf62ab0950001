"""Class-weighted cross-entropy of the two heads and online hard example mining (OHEM), in PyTorch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ocrnet.data.datasets.base import IGNORE
from ocrnet.engines.torch.fused_loss import upsampled_cross_entropy_sum
from ocrnet.engines.torch.hrnet import resize


def label_weight(label: Tensor, class_weight: Tensor) -> Tensor:
    """Return the sum of the class weights over all pixels, a scalar: the denominator of the loss.

    ``label`` is uint8 N,H,W; ``class_weight`` is (num_classes,). Pixels with label 255 have weight 0. The loss is
    divided by the total of all micro-batches and ranks.
    """
    return _pixel_weight(label, class_weight).sum()


def cross_entropy_sum(logits: Tensor, label: Tensor, class_weight: Tensor, *, align_corners: bool) -> Tensor:
    """Return the sum, over the pixels that are not ignored, of class weight times negative log-likelihood.

    Args:
        logits: Logits N,K,h,w; they are resized to the size of the labels, in at least float32.
        label: Labels uint8 N,H,W; 255 is ignored.
        class_weight: Weights (K,).
        align_corners: As in ``F.interpolate``.

    Returns:
        The sum, a scalar.
    """
    weight = _pixel_weight(label, class_weight)
    return upsampled_cross_entropy_sum(logits, label, weight, align_corners=align_corners)


def ohem(
    logits: Tensor, label: Tensor, class_weight: Tensor, *, threshold: float, min_kept: int, align_corners: bool
) -> Tensor:
    """Return the mean class-weighted loss over the hard pixels (the authors' OhemCrossEntropy).

    A pixel that is not ignored is hard if the predicted probability of its ground truth class is below a bound. The
    bound is the maximum of ``threshold`` and the probability at index ``min_kept``, in ascending order of these
    probabilities. The host does not wait for the device.

    Args:
        logits: Logits N,K,h,w; they are resized to the size of the labels, in at least float32.
        label: Labels uint8 N,H,W; 255 is ignored.
        class_weight: Weights (K,).
        threshold: The minimum of the bound, a probability.
        min_kept: The number of hard pixels (without ties) if fewer have a probability below ``threshold``.
        align_corners: As in ``F.interpolate``.

    Returns:
        The mean, a scalar; 0 if no pixel is hard.
    """
    logits = _full_size(logits, label, align_corners)
    target = label.long()
    nll = F.nll_loss(F.log_softmax(logits, 1), target, ignore_index=IGNORE, reduction="none")
    weighted = nll * _pixel_weight(label, class_weight.to(logits.dtype))
    valid = target != IGNORE
    probability = torch.exp(-nll.detach())  # 1 for ignored pixels, which are therefore sorted last
    sorted_probability = probability.flatten().sort().values
    position = (valid.sum() - 1).clamp(0, min_kept)
    bound = sorted_probability.gather(0, position[None]).clamp_min(threshold)
    kept = (probability < bound) & valid
    return (weighted * kept).sum() / kept.sum().clamp_min(1)


@dataclass(frozen=True, eq=False)
class SegmentationLoss:
    """Loss of both heads: ``aux`` times that of the auxiliary head plus ``ocr`` times that of the OCR head.

    ``ohem`` contains threshold and min_kept of the OHEM of the OCR head; None disables OHEM.
    """

    class_weight: Tensor
    align_corners: bool
    aux: float = 0.4
    ocr: float = 1.0
    ohem: tuple[float, int] | None = None

    def __call__(
        self, outputs: tuple[Tensor, Tensor], label: Tensor, denominator: Tensor, *, parts: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a micro-batch to differentiate, and the loss of each head.

        The losses of all micro-batches and ranks of a step add up to the loss of the step. Without OHEM, the class-
        weighted sum of each head is therefore divided by ``denominator``. With OHEM, the loss of each head is a mean
        over the micro-batch, divided by ``parts``: in the OCR head over the hard pixels, in the auxiliary head over all
        pixels, where ignored pixels count as 0, as in the authors' code.

        Args:
            outputs: The (aux, ocr) logits, each N,K,h,w.
            label: Labels uint8 N,H,W.
            denominator: The sum of `label_weight` over all micro-batches and ranks, a scalar; 0 gives a loss of 0.
            parts: Number of micro-batches of the step, over all ranks.

        Returns:
            The loss, a scalar, and the losses of both heads (2,), detached and not multiplied by ``aux`` and ``ocr``.
        """
        aux, ocr = outputs
        aux_head = cross_entropy_sum(aux, label, self.class_weight, align_corners=self.align_corners)
        if self.ohem is None:
            ocr_head = cross_entropy_sum(ocr, label, self.class_weight, align_corners=self.align_corners)
            heads = torch.stack([aux_head, ocr_head]) / torch.where(denominator > 0, denominator, 1)
        else:
            threshold, min_kept = self.ohem
            ocr_head = ohem(
                ocr,
                label,
                self.class_weight,
                threshold=threshold,
                min_kept=min_kept,
                align_corners=self.align_corners,
            )
            heads = torch.stack([aux_head / label.numel(), ocr_head]) / parts
        return self.aux * heads[0] + self.ocr * heads[1], heads.detach()


def _full_size(logits: Tensor, label: Tensor, align_corners: bool) -> Tensor:
    height, width = label.shape[-2:]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return resize(logits, (height, width), align_corners)


def _pixel_weight(label: Tensor, class_weight: Tensor) -> Tensor:
    return F.pad(class_weight, (0, IGNORE + 1 - len(class_weight)))[label.long()]
