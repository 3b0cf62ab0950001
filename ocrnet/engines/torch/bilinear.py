"""Bilinear resizing as one matrix product per axis.

In this form, `conv_of_upsampled` can compute a convolution of upsampled maps mostly at the low resolution, where it
costs less.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Maximum rows and columns of an output block by device type. Each block is computed from only the inputs it depends on:
# small blocks need fewer multiplications, but on a GPU the number of kernels matters more.
BLOCK = {"cpu": 64, "cuda": 256}


def conv_of_upsampled(conv: nn.Conv2d, maps: Sequence[Tensor], align_corners: bool) -> Tensor:
    """Resize maps bilinearly to the size of the first, concatenate them, and apply a convolution.

    The result equals that of these three operations, except for rounding. Upsampling and convolution are both linear,
    so each tap (kernel position) is applied at the resolution of a map, and its outputs are upsampled, shifted and
    added, first along the width, then along the height. For the four maps of HRNet and a 3x3 kernel, this needs a
    quarter of the multiplications, and the concatenated maps are never stored.

    Args:
        conv: Convolution of stride 1 with a square kernel of odd size, padded to keep the size of its input.
        maps: Tensors N,c,h,w; the sum of their channels is the number of input channels of ``conv``.
        align_corners: As in ``F.interpolate``.

    Returns:
        Tensor N,out_channels,H,W with the height and width of the first map.
    """
    batch, channels, height, width = maps[0].shape
    out_channels, kernel = conv.out_channels, conv.weight.shape[-1]
    base = F.conv2d(maps[0], conv.weight[:, :channels], conv.bias, padding=kernel // 2).permute(0, 2, 3, 1)
    taps = []
    for x in maps[1:]:
        h, w = x.shape[2:]
        pixels = x.permute(0, 2, 3, 1).reshape(batch * h * w, x.shape[1])
        weight = conv.weight[:, channels : channels + x.shape[1]]
        channels += x.shape[1]
        for tap in range(kernel):
            values = pixels @ weight[:, :, tap].permute(1, 2, 0).reshape(x.shape[1], kernel * out_channels)
            taps.append(values.view(batch * h, w * kernel, out_channels))
    block_size = BLOCK.get(base.device.type, BLOCK["cpu"])
    columns = [slice(left, min(left + block_size, width)) for left in range(0, width, block_size)]
    rows = [slice(top, min(top + block_size, height)) for top in range(0, height, block_size)]
    stripes = []
    for column_block in columns:
        upsampled_taps = [
            _upsample_width(tap_values, column_block, width, kernel, align_corners).view(
                batch, -1, (column_block.stop - column_block.start) * out_channels
            )
            for tap_values in taps
        ]
        blocks = [
            _upsample_height_and_add(
                base[:, row_block, column_block], upsampled_taps, row_block, height, kernel, align_corners
            )
            for row_block in rows
        ]
        stripes.append(torch.cat(blocks, 1))
    return torch.cat(stripes, 2).permute(0, 3, 1, 2)


def _upsample_width(taps: Tensor, block: slice, width: int, kernel: int, align_corners: bool) -> Tensor:
    """Upsample, shift and add the outputs of the taps along the width.

    ``taps`` has shape (rows, w * kernel, out_channels). Return (rows, columns, out_channels) for the columns ``block``
    of an axis of length ``width``.
    """
    w = taps.shape[1] // kernel
    first, last = _source_range(w, width, kernel, align_corners, block)
    tap_slice = slice(first * kernel, last * kernel)
    matrix = tap_matrix(w, width, kernel, align_corners, taps.dtype, taps.device)[block, tap_slice]
    return torch.bmm(matrix.expand(len(taps), -1, -1), taps[:, tap_slice])


def _upsample_height_and_add(
    base: Tensor, upsampled_taps: Sequence[Tensor], block: slice, height: int, kernel: int, align_corners: bool
) -> Tensor:
    """Upsample, shift and add the outputs of the taps along the height, and add ``base``.

    ``base`` has shape (N, rows, columns, out_channels), for the rows ``block`` of an axis of length ``height``.
    ``upsampled_taps`` has one tensor (N, h, columns * out_channels) for each kernel row of each map. Return a tensor of
    the shape of ``base``.
    """
    matrices, parts = [], []
    for number, tap_values in enumerate(upsampled_taps):
        h = tap_values.shape[1]
        first, last = _source_range(h, height, kernel, align_corners, block)
        matrix = tap_matrix(h, height, kernel, align_corners, tap_values.dtype, tap_values.device).view(
            height, h, kernel
        )
        matrices.append(matrix[block, first:last, number % kernel])
        parts.append(tap_values[:, first:last])
    flat = base.flatten(2)
    return torch.baddbmm(flat, torch.cat(matrices, 1).expand(len(flat), -1, -1), torch.cat(parts, 1)).view(base.shape)


def _source_range(size: int, target: int, kernel: int, align_corners: bool, block: slice) -> tuple[int, int]:
    margin = kernel // 2
    return source_rows(size, target, align_corners, max(0, block.start - margin), min(target, block.stop + margin))


_retained_lists: list[list[Tensor]] = []


@contextlib.contextmanager
def retain_matrices() -> Iterator[list[Tensor]]:
    """Yield a list to which every matrix used in the context is appended.

    A recorded CUDA graph reads these matrices on each replay, so they must stay allocated after the cache evicts them.
    """
    matrices: list[Tensor] = []
    _retained_lists.append(matrices)
    try:
        yield matrices
    finally:
        _retained_lists.remove(matrices)


def tap_matrix(
    size: int, target: int, kernel: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the matrix that upsamples, shifts and adds the outputs of all taps along one axis.

    Output i is the sum, over all taps k, of the upsampled values of tap k at position i + k - kernel // 2. Values at
    positions outside the target are 0.

    Args:
        size: Number of positions before upsampling.
        target: Number of positions after upsampling.
        kernel: Number of taps.
        align_corners: As in ``F.interpolate``.
        dtype: Dtype of the matrix.
        device: Device of the matrix.

    Returns:
        Matrix (target, size * kernel). It is cached; do not modify it.
    """
    return _retain(_tap_matrix(size, target, kernel, align_corners, dtype, device))


def bilinear_matrix(size: int, target: int, align_corners: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix that resizes one axis as ``F.interpolate`` with mode ``bilinear`` does.

    Args:
        size: Number of positions before resizing.
        target: Number of positions after resizing.
        align_corners: As in ``F.interpolate``.
        dtype: Dtype of the matrix.
        device: Device of the matrix.

    Returns:
        Matrix (target, size). It is cached; do not modify it.
    """
    return _retain(_bilinear_matrix(size, target, align_corners, dtype, device))


def _retain(matrix: Tensor) -> Tensor:
    for matrices in _retained_lists:
        matrices.append(matrix)
    return matrix


@functools.lru_cache(64)
@torch.inference_mode(False)  # prediction may create and cache a matrix that training uses later
def _tap_matrix(
    size: int, target: int, kernel: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    upsampling = bilinear_matrix(size, target, align_corners, torch.float64, torch.device("cpu"))
    margin = kernel // 2
    padded = F.pad(upsampling, (0, 0, margin, margin))
    shifted = [padded[tap : tap + target] for tap in range(kernel)]
    return torch.stack(shifted, 2).reshape(target, size * kernel).to(device, dtype)


def source_coordinates(size: int, target: int, align_corners: bool, index: Tensor | int) -> Any:
    """Return the source coordinates of target pixels along one axis, as in PyTorch's bilinear resize.

    Args:
        size: Number of source pixels; their coordinates are 0 to size - 1.
        target: Number of target pixels.
        align_corners: As in ``F.interpolate``.
        index: Indices of target pixels: a tensor or one number.

    Returns:
        The coordinates, at least 0: a tensor or one number, like ``index``.
    """
    if align_corners:
        return index * ((size - 1) / (target - 1) if target > 1 else 0.0)
    position = (index + 0.5) * (size / target) - 0.5
    return position.clamp_min(0) if isinstance(position, Tensor) else max(position, 0.0)


def source_rows(size: int, target: int, align_corners: bool, start: int, stop: int) -> tuple[int, int]:
    """Return the range of source rows on which a range of target rows depends.

    Args:
        size: Number of source rows.
        target: Number of target rows.
        align_corners: As in ``F.interpolate``.
        start: First target row.
        stop: End of the target rows, exclusive.

    Returns:
        The first source row and the end of the source rows, exclusive.
    """
    first = int(source_coordinates(size, target, align_corners, start))
    last = int(source_coordinates(size, target, align_corners, stop - 1)) + 2
    return max(0, min(first, size - 1)), min(last, size)


@functools.lru_cache(64)
@torch.inference_mode(False)
def _bilinear_matrix(size: int, target: int, align_corners: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    position = source_coordinates(size, target, align_corners, torch.arange(target, dtype=torch.float64, device="cpu"))
    low = position.long().clamp_max(size - 1)
    high = (low + 1).clamp_max(size - 1)
    fraction = position - low
    matrix = torch.zeros(target, size, dtype=torch.float64, device="cpu")
    matrix.scatter_add_(1, low[:, None], (1 - fraction)[:, None])
    matrix.scatter_add_(1, high[:, None], fraction[:, None])
    return matrix.to(device, dtype)
