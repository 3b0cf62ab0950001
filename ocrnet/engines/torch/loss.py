"""Class-weighted cross-entropy of the two heads, and the authors' hard-pixel mining (OHEM), in PyTorch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ocrnet.data.datasets.base import IGNORE
from ocrnet.engines.torch.fused_loss import upsampled_cross_entropy_sum
from ocrnet.engines.torch.hrnet import resize


def label_weight(label: Tensor, class_weight: Tensor) -> Tensor:
    """Sum over the valid pixels of uint8 labels N,H,W of their class's weight (num_classes,): the loss's denominator.

    255 has no weight. Ranks and micro-batches add these up before any of them divides.
    """
    return _pixel_weight(label, class_weight).sum()


def cross_entropy_sum(logits: Tensor, label: Tensor, class_weight: Tensor, *, align_corners: bool) -> Tensor:
    """Sum over the valid pixels of class weight times negative log-likelihood.

    Logits N,K,h,w are brought to the size of the uint8 labels N,H,W, in float32 at least; 255 is ignored.
    """
    weight = _pixel_weight(label, class_weight)
    return upsampled_cross_entropy_sum(logits, label, weight, align_corners=align_corners)


def ohem(
    logits: Tensor, label: Tensor, class_weight: Tensor, *, threshold: float, min_kept: int, align_corners: bool
) -> Tensor:
    """Mean over the kept pixels of their class-weighted loss, 0 where none is kept (the authors' OhemCrossEntropy).

    Kept are the valid pixels whose true class has a probability below ``threshold``, or below that of rank
    ``min_kept`` from the lowest, whichever is more. Arguments as for ``cross_entropy_sum``; nothing waits for the
    device.
    """
    logits = _full_size(logits, label, align_corners)
    target = label.long()
    nll = F.nll_loss(F.log_softmax(logits, 1), target, ignore_index=IGNORE, reduction="none")
    weighted = nll * _pixel_weight(label, class_weight.to(logits.dtype))
    valid = target != IGNORE
    probability = torch.exp(-nll.detach())  # 1 where ignored, so these sort last
    ranked = probability.flatten().sort().values
    rank = (valid.sum() - 1).clamp(0, min_kept)
    bound = ranked.gather(0, rank[None]).clamp_min(threshold)
    kept = (probability < bound) & valid
    return (weighted * kept).sum() / kept.sum().clamp_min(1)


@dataclass(frozen=True, eq=False)
class SegmentationLoss:
    """The loss of both heads: ``aux`` times the auxiliary head's plus ``ocr`` times the OCR head's.

    ``ohem``: (threshold, min_kept) of the hard-pixel mining in the OCR head, None for none.
    """

    class_weight: Tensor
    align_corners: bool
    aux: float = 0.4
    ocr: float = 1.0
    ohem: tuple[float, int] | None = None

    def __call__(
        self, outputs: tuple[Tensor, Tensor], label: Tensor, denominator: Tensor, *, parts: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Loss to differentiate, and the two heads' own values (2,), detached, of (aux, ocr) logits and uint8 labels.

        Each head's weighted sum is divided by ``denominator``, the ``label_weight`` of all micro-batches and ranks (0
        gives 0), so that the parts of a step add up to its loss. With ``ohem`` they are local means divided by
        ``parts``, the number of micro-batches of all ranks: over the kept pixels in the OCR head, in the auxiliary head
        over all pixels, ignored ones counting as zero, as the authors have it.
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
