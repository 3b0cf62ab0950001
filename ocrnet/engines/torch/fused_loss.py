"""Fused upsampling and class-weighted cross-entropy, which never stores the logits at full resolution.

Full-resolution float32 logits of 19 classes take 40 MB for an image of 512x1024, and separate operations keep several
such tensors per head. This module upsamples one band of rows at a time by two small matrix products. The forward pass
also computes the gradient of the low-resolution logits. Only one band and this gradient are in memory.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ocrnet.engines.torch.bilinear import bilinear_matrix, source_rows

BAND_BYTES = {
    "cpu": 8 * 2**20,
    "cuda": 256 * 2**20,
}  # upsampled logits of one band: they fit a CPU's cache; few kernels on a GPU


def upsampled_cross_entropy_sum(logits: Tensor, label: Tensor, pixel_weight: Tensor, *, align_corners: bool) -> Tensor:
    """Return the sum, over all pixels, of pixel weight times negative log-likelihood.

    Value and gradient equal those of ``F.interpolate`` followed by ``F.cross_entropy``, except for rounding.

    Args:
        logits: Logits N,K,h,w; they are resized bilinearly to the size of the labels, in at least float32.
        label: Labels uint8 N,H,W.
        pixel_weight: Weights N,H,W; pixels with weight 0 are ignored, whatever their label.
        align_corners: As in ``F.interpolate``.

    Returns:
        The sum, a scalar.
    """
    return _UpsampledCrossEntropy.apply(logits, label, pixel_weight, align_corners)


class _UpsampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, label: Tensor, pixel_weight: Tensor, align_corners: bool) -> Tensor:
        """Compute the sum and the gradient of the logits, band by band."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        low = logits.detach().to(dtype).contiguous()
        gradient = torch.zeros_like(low) if ctx.needs_input_grad[0] else None
        with _no_autocast(low.device.type):
            total = _sum_in_bands(low, label, pixel_weight, align_corners, gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient that the forward pass has computed, times the gradient of the sum."""
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None, None


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context that disables autocast, if the device has autocast; the meta device has none."""
    has_autocast = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if has_autocast else nullcontext()


def _sum_in_bands(
    low: Tensor, label: Tensor, pixel_weight: Tensor, align_corners: bool, gradient: Tensor | None
) -> Tensor:
    """Return the sum, and add the gradient of ``low`` to ``gradient`` unless that is None."""
    count, classes, h, w = low.shape
    height, width = label.shape[1:]
    rows = bilinear_matrix(h, height, align_corners, low.dtype, low.device)
    columns = bilinear_matrix(w, width, align_corners, low.dtype, low.device)
    total = low.new_zeros(())
    band_bytes = BAND_BYTES.get(low.device.type, BAND_BYTES["cpu"])
    band_rows = max(1, band_bytes // (count * classes * width * low.element_size()))
    for top in range(0, height, band_rows):
        band = slice(top, min(top + band_rows, height))
        first, last = source_rows(h, height, align_corners, band.start, band.stop)
        band_matrix = rows[band, first:last]
        upsampled = band_matrix @ F.linear(low[:, :, first:last].contiguous(), columns)  # N, K, band, W
        target = label[:, None, band].long().clamp_max(classes - 1)
        weight = pixel_weight[:, band].to(low.dtype)
        target_logit = upsampled.gather(1, target)[:, 0]
        max_logit = upsampled.amax(1, keepdim=True)
        upsampled.sub_(max_logit).exp_()
        partition = upsampled.sum(1, keepdim=True)
        nll = partition[:, 0].log() + max_logit[:, 0] - target_logit
        total += (torch.where(weight > 0, nll, 0) * weight).sum()
        if gradient is not None:
            upsampled.mul_(weight[:, None] / partition)  # the weighted softmax
            upsampled.scatter_add_(1, target, -weight[:, None])
            gradient[:, :, first:last] += F.linear(band_matrix.T @ upsampled, columns.T)
    return total
