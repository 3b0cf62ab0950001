"""Batch norm over the batches of all ranks.

It replaces nn.SyncBatchNorm, which rejects CPU tensors and makes the host wait for the GPU.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def sync_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> Tensor:
    """Normalize a tensor by its mean and variance over N, H and W of all ranks.

    This function and its backward pass are collectives. Statistics have at least float32 precision. The gradients of
    ``weight`` and ``bias`` are not summed over the ranks.

    Args:
        x: Tensor N,C,H,W of the same shape on all ranks.
        weight: Scale of each channel, (C,).
        bias: Shift of each channel, (C,).
        running_mean: Running mean (C,), updated in place with the mean of the whole batch.
        running_var: Running variance (C,), updated in place with the unbiased variance, n / (n - 1) times that of
            the whole batch.
        momentum: Weight of the new value in the running statistics.
        eps: Value added to the variance.

    Returns:
        Tensor N,C,H,W.
    """
    return _SyncBatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        ranks, count = dist.get_world_size(), x.numel() // x.shape[1]
        if x.is_cuda:
            own = torch.cat(torch.batch_norm_stats(x, eps))
            means, deviations = _gather(own, ranks).chunk(2, dim=1)
            counts = means.new_full((ranks,), count)
            mean, invstd = torch.batch_norm_gather_stats_with_counts(
                x, means, deviations, running_mean, running_var, momentum, eps, counts
            )
            y = torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)
        else:
            own_var, own_mean = torch.var_mean(_at_least_float32(x), (0, 2, 3), correction=0)
            means, variances = _gather(torch.cat([own_mean, own_var]), ranks).chunk(2, dim=1)
            # Chan et al. (1979) for parts of equal size: the mean of the variances plus the variance of the means.
            mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
            total = count * ranks
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (total / (total - 1))).to(running_var.dtype), momentum)
            invstd = (var + eps).rsqrt()
            y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, invstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients (Ioffe and Szegedy, 2015); for that of ``x``, sums over the batch are over all ranks."""
        x, weight, mean, invstd = ctx.saved_tensors
        ranks, count = dist.get_world_size(), x.numel() // x.shape[1]
        if x.is_cuda:
            dy = dy.contiguous(memory_format=torch.channels_last)
            sum_dy, sum_dy_xmu, dweight, dbias = torch.batch_norm_backward_reduce(
                dy, x, mean, invstd, weight, True, True, True
            )
            sums = torch.cat([sum_dy, sum_dy_xmu])
            dist.all_reduce(sums)
            sum_dy, sum_dy_xmu = sums.chunk(2)
            counts = torch.full((ranks,), count, dtype=torch.int32, device=x.device)
            dx = torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts)
            return dx, dweight, dbias, None, None, None, None
        g, centered = _at_least_float32(dy), _at_least_float32(x) - _per_channel(mean)
        sum_dy, sum_dy_xmu = g.sum((0, 2, 3)), (g * centered).sum((0, 2, 3))
        dweight, dbias = sum_dy_xmu * invstd, sum_dy
        sums = torch.cat([sum_dy, sum_dy_xmu])
        dist.all_reduce(sums)
        mean_dy, mean_dy_xmu = (sums / (count * ranks)).chunk(2)
        slope = _per_channel(invstd**2 * mean_dy_xmu)
        dx = _per_channel(weight * invstd) * (g - _per_channel(mean_dy) - slope * centered)
        return dx.to(x.dtype), dweight, dbias, None, None, None, None


def _gather(own: Tensor, ranks: int) -> Tensor:
    """Return the flat tensors of all ranks as rows, in rank order."""
    rows = own.new_empty(ranks, own.numel())
    dist.all_gather(list(rows.unbind()), own)
    return rows


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_channel(x: Tensor) -> Tensor:
    return x.view(1, -1, 1, 1)
