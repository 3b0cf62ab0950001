"""Fused Triton kernels for training on NVIDIA GPUs: batch norm, optional addition of a tensor, and ReLU.

Separate operations read or write an activation 13 times in the forward and backward passes, 16 times with the addition;
the fused kernels do so 8 and 11 times. Neither the normalized input nor a mask is stored: the backward pass recomputes
where ReLU is 0 or, with the addition, reads this from the output.

An activation N,C,H,W in channels-last memory is a matrix of ``rows`` = N H W by ``channels`` = C. One kernel reduces
groups of rows to ``parts``, and a second kernel reduces the parts. The order depends only on the shape, so repeats are
bit-identical. The host never waits for the device, and launch grids depend only on shapes, so a CUDA graph can record
the kernels.

This module requires Triton. Import it only if ``device.fused_norm_unavailable_reason`` returns None.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096  # values of one block: 16 per thread, which are two 16-byte loads of 16-bit values
WARPS = 8
PROGRAMS = 512  # maximum programs of the first reduction: they fill a GPU, and all parts fit one block
END_CHANNELS = 8  # channels per program of the second reduction: a memory sector of 32 bytes


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    add: Tensor | None = None,
) -> Tensor:
    """Normalize a tensor by its mean and variance over N, H and W, add ``add`` if it is not None, and apply ReLU.

    The result equals that of ``F.batch_norm`` in training, an addition and ``F.relu``, except for rounding: all
    intermediate values are float32.

    Args:
        x: Tensor N,C,H,W.
        weight: Scale of each channel, (C,).
        bias: Shift of each channel, (C,).
        running_mean: Running mean (C,), updated in place with the mean of the batch.
        running_var: Running variance (C,), updated in place with the unbiased variance of the batch.
        momentum: Weight of the new value in the running statistics.
        eps: Value added to the variance.
        add: Tensor N,C,H,W to add before ReLU, or None.

    Returns:
        Tensor N,C,H,W in channels-last memory.

    Raises:
        ValueError: ``x`` has only one value for each channel, or ``add`` has another shape than ``x``.
    """
    if x.numel() == x.shape[1]:
        raise ValueError(f"batch norm in training needs more than one value per channel; got shape {tuple(x.shape)}")
    if add is not None and add.shape != x.shape:
        raise ValueError(f"add has shape {tuple(add.shape)}, but the input has shape {tuple(x.shape)}")
    return _BatchNormReLU.apply(x, weight, bias, running_mean, running_var, momentum, eps, add)


class _BatchNormReLU(torch.autograd.Function):
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
        add: Tensor | None,
    ) -> Tensor:
        x, partition = _channels_last(x), _partition(x)
        part_mean, part_m2 = _two_floats(x, partition.parts, partition.channels)
        moments[partition.reducing](
            x, part_mean, part_m2, partition.rows, partition.channels, partition.tiles, **partition.blocks
        )
        mean, rstd = _two_floats(x, partition.channels)
        statistics = mean, rstd, running_mean, running_var
        shape = partition.rows, partition.channels, partition.parts, partition.part_rows
        end_moments[partition.ending](part_mean, part_m2, *statistics, *shape, momentum, eps, **partition.end_blocks)
        affine = mean, rstd, weight, bias
        added = x if add is None else _channels_last(add)
        y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, added.dtype))
        apply[partition.applying](
            x, added, *affine, y, partition.rows, partition.channels, has_add=add is not None, **partition.blocks
        )
        ctx.save_for_backward(x, *affine, None if add is None else y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs.

        The gradient of ``add`` is ``dy`` where the output is positive, else 0. The gradient of ``x`` follows from it.
        """
        x, *affine, y = ctx.saved_tensors
        dy, partition, has_add = _channels_last(dy), _partition(x), y is not None
        dadd = torch.empty_like(y) if has_add else None
        gradients = (dy, y, dadd) if has_add else (dy, dy, dy)
        part_dweight, part_dbias = _two_floats(x, partition.parts, partition.channels)
        parts = part_dweight, part_dbias, partition.rows, partition.channels, partition.tiles
        reduce_gradient[partition.reducing](x, *gradients, *affine, *parts, has_add=has_add, **partition.blocks)
        dweight, dbias = _two_floats(x, partition.channels)
        end_gradient[partition.ending](
            part_dweight, part_dbias, dweight, dbias, partition.channels, partition.parts, **partition.end_blocks
        )
        dx, sums = torch.empty_like(x), (dweight, dbias)
        apply_gradient[partition.applying](
            x, gradients[2], *affine, *sums, dx, partition.rows, partition.channels, has_add=has_add, **partition.blocks
        )
        return dx, dweight, dbias, None, None, None, None, dadd


class _Partition(NamedTuple):
    """Partition of the matrix (rows, channels) into blocks, with launch grids and block sizes of the kernels.

    A part is ``tiles`` consecutive blocks of rows, which are ``part_rows`` rows. ``reducing``, ``ending`` and
    ``applying`` are the grids of the first reduction, the second reduction and the elementwise kernels.
    """

    rows: int
    channels: int
    tiles: int
    parts: int
    part_rows: int
    reducing: tuple[int, int]
    ending: tuple[int]
    applying: tuple[int, int]
    blocks: dict[str, int]
    end_blocks: dict[str, int]


def _partition(x: Tensor) -> _Partition:
    channels = x.shape[1]
    rows = x.numel() // channels
    block_channels = min(128, triton.next_power_of_2(channels))
    block_rows = TILE // block_channels
    columns, all_tiles = triton.cdiv(channels, block_channels), triton.cdiv(rows, block_rows)
    tiles = triton.cdiv(all_tiles, max(1, PROGRAMS // columns))
    parts = triton.cdiv(all_tiles, tiles)  # no part is empty
    return _Partition(
        rows,
        channels,
        tiles,
        parts,
        tiles * block_rows,
        (parts, columns),
        (triton.cdiv(channels, END_CHANNELS),),
        (all_tiles, columns),
        {"block_rows": block_rows, "block_channels": block_channels, "num_warps": WARPS},
        {"block_parts": triton.next_power_of_2(parts), "block_channels": END_CHANNELS},
    )


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _two_floats(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    pair = torch.empty(2, *shape, dtype=torch.float32, device=like.device)
    return pair[0], pair[1]


@triton.jit
def moments(
    x: tl.tensor,
    part_mean: tl.tensor,
    part_m2: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    tiles: tl.tensor,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    """Compute the mean and the sum of squared deviations of each part, per channel.

    Args:
        x: Input rows,channels.
        part_mean: Output parts,channels in float32, the means.
        part_m2: Output parts,channels in float32, the sums of squared deviations.
        rows: Number of rows.
        channels: Number of channels.
        tiles: Number of blocks per part. Welford's method runs over the blocks, separately for each row of a block; the
            method of Chan et al. merges these rows.
        block_rows: Rows per block.
        block_channels: Channels per block.
    """
    lane = tl.program_id(0) * tiles * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    mean = tl.zeros((block_rows, block_channels), tl.float32)
    m2 = tl.zeros((block_rows, block_channels), tl.float32)
    row = lane
    for i in range(tiles):
        inside = (row < rows)[:, None] & (column < channels)[None, :]
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        delta = tl.where(inside, value - mean, 0.0)
        mean += delta * (1.0 / (i + 1))
        m2 += delta * (value - mean)
        row += block_rows
    count = tl.minimum(tl.maximum((rows - lane + block_rows - 1) // block_rows, 0), tiles)
    mean_all, m2_all = _merged(count.to(tl.float32), mean, m2)
    to = tl.program_id(0) * channels + column
    tl.store(part_mean + to, mean_all, column < channels)
    tl.store(part_m2 + to, m2_all, column < channels)


@triton.jit
def _merged(count: tl.tensor, mean: tl.tensor, m2: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Merge the means and sums of squared deviations K,channels of K sets of ``count`` (K,) values.

    The method is that of Chan et al. (1979). Means are summed relative to the mean of the first set, which is not
    empty, because a direct sum of large means loses digits.
    """
    first = tl.sum(tl.where(tl.arange(0, mean.shape[0])[:, None] == 0, mean, 0.0), 0)
    offset = tl.where(count[:, None] > 0, mean - first[None, :], 0.0)
    shift = tl.sum(offset * (count / tl.sum(count, 0))[:, None], 0)
    deviation = offset - shift[None, :]
    return first + shift, tl.sum(m2 + count[:, None] * deviation * deviation, 0)


@triton.jit
def end_moments(
    part_mean: tl.tensor,
    part_m2: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    running_mean: tl.tensor,
    running_var: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    part_rows: tl.tensor,
    momentum: tl.tensor,
    eps: tl.tensor,
    block_parts: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    """Merge the parts into the mean and 1 / standard deviation of each channel; update the running statistics.

    Args:
        part_mean: Means of the parts, parts,channels.
        part_m2: Sums of squared deviations of the parts, parts,channels.
        mean: Output (channels,), the mean.
        rstd: Output (channels,), 1 / standard deviation.
        running_mean: Running mean (channels,), updated in place.
        running_var: Running unbiased variance (channels,), updated in place.
        rows: Number of rows.
        channels: Number of channels.
        parts: Number of parts.
        part_rows: Rows of a part; the last one may have fewer.
        momentum: Weight of the new value in the running statistics.
        eps: Value added to the variance.
        block_parts: Parts per block, at least ``parts``.
        block_channels: Channels per block.
    """
    part = tl.arange(0, block_parts)
    column = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    valid = column < channels
    at = part[:, None] * channels + column[None, :]
    inside = (part < parts)[:, None] & valid[None, :]
    count = tl.minimum(tl.maximum(rows - part * part_rows, 0), part_rows).to(tl.float32)
    batch_mean, m2 = _merged(count, tl.load(part_mean + at, inside, 0.0), tl.load(part_m2 + at, inside, 0.0))
    tl.store(mean + column, batch_mean, valid)
    tl.store(rstd + column, 1.0 / tl.sqrt_rn(m2 / rows + eps), valid)
    running = tl.load(running_mean + column, valid, 0.0)
    tl.store(running_mean + column, (1.0 - momentum) * running + momentum * batch_mean, valid)
    running = tl.load(running_var + column, valid, 0.0)
    tl.store(running_var + column, (1.0 - momentum) * running + momentum * (m2 / (rows - 1)), valid)


@triton.jit
def apply(
    x: tl.tensor,
    add: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    has_add: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    """Normalize ``x``, add ``add`` if ``has_add``, and apply ReLU, which keeps NaN.

    Args:
        x: Input rows,channels.
        add: Tensor rows,channels to add; read only if ``has_add``.
        mean: Mean (channels,).
        rstd: 1 / standard deviation (channels,).
        weight: Scale (channels,).
        bias: Shift (channels,).
        y: Output rows,channels.
        rows: Number of rows.
        channels: Number of channels.
        has_add: Whether a tensor is added.
        block_rows: Rows per block.
        block_channels: Channels per block.
    """
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    inside = (row < rows)[:, None] & (column < channels)[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    _, z = _normalized(tl.load(x + at, inside, 0.0), mean, rstd, weight, bias, column, channels)
    if has_add:
        z += tl.load(add + at, inside, 0.0).to(tl.float32)
    tl.store(y + at, tl.where(z <= 0, 0.0, z), inside)


@triton.jit
def _normalized(
    value: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    column: tl.tensor,
    channels: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Return a block in float32: the normalized values, and these values times weight plus bias."""
    valid = column < channels
    centered = value.to(tl.float32) - tl.load(mean + column, valid, 0.0)[None, :]
    normal = centered * tl.load(rstd + column, valid, 0.0)[None, :]
    scaled = normal * tl.load(weight + column, valid, 0.0)[None, :]
    return normal, scaled + tl.load(bias + column, valid, 0.0)[None, :]


@triton.jit
def _rounded(z: tl.tensor, x: tl.tensor) -> tl.tensor:
    """Round float32 values to the dtype of ``x`` and return them as float32.

    The conversion back is needed because the interpreter of Triton 3.9 compares bfloat16 values incorrectly.
    """
    return z.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def reduce_gradient(
    x: tl.tensor,
    dy: tl.tensor,
    y: tl.tensor,
    dadd: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    part_dweight: tl.tensor,
    part_dbias: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    tiles: tl.tensor,
    has_add: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    """Sum the gradients of weight and bias over each part; if ``has_add``, also write the gradient of the added tensor.

    Args:
        x: Input of the forward pass, rows,channels.
        dy: Gradient of the output, rows,channels.
        y: Output of the forward pass, rows,channels; read only if ``has_add``.
        dadd: Output rows,channels, the gradient of the added tensor; written only if ``has_add``.
        mean: Mean (channels,).
        rstd: 1 / standard deviation (channels,).
        weight: Scale (channels,).
        bias: Shift (channels,).
        part_dweight: Output parts,channels, the sums for the gradient of weight.
        part_dbias: Output parts,channels, the sums for the gradient of bias.
        rows: Number of rows.
        channels: Number of channels.
        tiles: Number of blocks per part.
        has_add: Whether a tensor is added.
        block_rows: Rows per block.
        block_channels: Channels per block.
    """
    row = tl.program_id(0) * tiles * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    dweight = tl.zeros((block_rows, block_channels), tl.float32)
    dbias = tl.zeros((block_rows, block_channels), tl.float32)
    for _ in range(tiles):
        inside = (row < rows)[:, None] & (column < channels)[None, :]
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        value, dz = tl.load(x + at, inside, 0.0), tl.load(dy + at, inside, 0.0)
        normal, z = _normalized(value, mean, rstd, weight, bias, column, channels)
        if has_add:
            dz = tl.where(tl.load(y + at, inside, 0.0).to(tl.float32) <= 0, 0.0, dz)
            tl.store(dadd + at, dz, inside)
        else:
            dz = tl.where(_rounded(z, x) <= 0, 0.0, dz)
        dweight += dz.to(tl.float32) * normal
        dbias += dz.to(tl.float32)
        row += block_rows
    to = tl.program_id(0) * channels + column
    tl.store(part_dweight + to, tl.sum(dweight, 0), column < channels)
    tl.store(part_dbias + to, tl.sum(dbias, 0), column < channels)


@triton.jit
def end_gradient(
    part_dweight: tl.tensor,
    part_dbias: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    block_parts: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    """Sum the parts into the gradients of weight and bias.

    Args:
        part_dweight: Sums of the parts for the gradient of weight, parts,channels.
        part_dbias: Sums of the parts for the gradient of bias, parts,channels.
        dweight: Output (channels,), the gradient of weight.
        dbias: Output (channels,), the gradient of bias.
        channels: Number of channels.
        parts: Number of parts.
        block_parts: Parts per block, at least ``parts``.
        block_channels: Channels per block.
    """
    part = tl.arange(0, block_parts)
    column = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    at = part[:, None] * channels + column[None, :]
    inside = (part < parts)[:, None] & (column < channels)[None, :]
    tl.store(dweight + column, tl.sum(tl.load(part_dweight + at, inside, 0.0), 0), column < channels)
    tl.store(dbias + column, tl.sum(tl.load(part_dbias + at, inside, 0.0), 0), column < channels)


@triton.jit
def apply_gradient(
    x: tl.tensor,
    dy: tl.tensor,
    mean: tl.tensor,
    rstd: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    dx: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    has_add: tl.constexpr,
    block_rows: tl.constexpr,
    block_channels: tl.constexpr,
) -> None:
    """Compute the gradient of ``x`` (Ioffe and Szegedy, 2015).

    Args:
        x: Input of the forward pass, rows,channels.
        dy: Gradient of the output, rows,channels; if ``has_add``, ``dadd`` of `reduce_gradient`.
        mean: Mean (channels,).
        rstd: 1 / standard deviation (channels,).
        weight: Scale (channels,).
        bias: Shift (channels,).
        dweight: Gradient of weight (channels,).
        dbias: Gradient of bias (channels,).
        dx: Output rows,channels, the gradient of ``x``.
        rows: Number of rows.
        channels: Number of channels.
        has_add: Whether a tensor is added.
        block_rows: Rows per block.
        block_channels: Channels per block.
    """
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    valid = column < channels
    inside = (row < rows)[:, None] & valid[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    normal, z = _normalized(tl.load(x + at, inside, 0.0), mean, rstd, weight, bias, column, channels)
    dz = tl.load(dy + at, inside, 0.0).to(tl.float32)
    if not has_add:
        dz = tl.where(_rounded(z, x) <= 0, 0.0, dz)
    factor = tl.load(weight + column, valid, 0.0) * tl.load(rstd + column, valid, 0.0)
    mean_dweight = tl.load(dweight + column, valid, 0.0) / rows
    mean_dbias = tl.load(dbias + column, valid, 0.0) / rows
    tl.store(dx + at, factor[None, :] * (dz - mean_dbias[None, :] - normal * mean_dweight[None, :]), inside)
