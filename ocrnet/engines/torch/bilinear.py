"""Bilinear resizing as a product with a small matrix along each axis.

This form lets `conv_of_upsampled` apply a convolution before its input is upsampled, where it costs less.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows and columns of an output block, which is computed from only the inputs it needs. Small blocks take fewer
# multiplications; on a GPU, fewer kernels matter more.
BLOCK = {"cpu": 64, "cuda": 256}


def conv_of_upsampled(conv: nn.Conv2d, maps: Sequence[Tensor], align_corners: bool) -> Tensor:
    """Apply a convolution to maps that are resized bilinearly to the size of the first and concatenated.

    Upsampling and convolution are both linear. Each tap of the kernel is therefore applied at the resolution of a map,
    and its outputs are upsampled, shifted and added, first along the width, then along the height. For the four maps of
    HRNet and a 3x3 kernel this takes a quarter of the multiplications, and no tensor of all channels at full size.

    Args:
        conv: Convolution with a square kernel of odd size that keeps the size of its input.
        maps: Tensors N,c,h,w; their channels together are the input channels of ``conv``.
        align_corners: As in ``F.interpolate``.

    Returns:
        Tensor N,out,H,W at the size of the first map.
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
    """Upsample, shift and add the taps along the width.

    ``taps`` is rows,w*kernel,out. Return rows,columns,out for the columns ``block`` of ``width``.
    """
    w = taps.shape[1] // kernel
    first, last = _source_range(w, width, kernel, align_corners, block)
    tap_slice = slice(first * kernel, last * kernel)
    matrix = tap_matrix(w, width, kernel, align_corners, taps.dtype, taps.device)[block, tap_slice]
    return torch.bmm(matrix.expand(len(taps), -1, -1), taps[:, tap_slice])


def _upsample_height_and_add(
    base: Tensor, upsampled_taps: Sequence[Tensor], block: slice, height: int, kernel: int, align_corners: bool
) -> Tensor:
    """Upsample, shift and add the taps along the height, and add ``base``.

    ``base`` is N,rows,columns,out for the rows ``block`` of ``height``. ``wide`` has one tensor N,h,columns*out for
    each kernel row of each map. Return a tensor of the shape of ``base``.
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
    """Yield a list that keeps a reference to every matrix used in the context.

    A recorded graph still needs these matrices after the cache drops them.
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
    """Return the matrix from the values of all taps along one axis to the outputs of a convolution.

    Output i is the sum over taps k of the upsampled value of tap k at position i + k - kernel // 2; values beyond the
    ends of the target are 0.

    Args:
        size: Number of positions before upsampling.
        target: Number of positions after upsampling.
        kernel: Number of taps.
        align_corners: As in ``F.interpolate``.
        dtype: Type of the matrix.
        device: Device of the matrix.

    Returns:
        Matrix target,size*kernel. It is cached: do not change it.
    """
    return _retain(_tap_matrix(size, target, kernel, align_corners, dtype, device))


def bilinear_matrix(size: int, target: int, align_corners: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix with which ``F.interpolate`` resizes one axis bilinearly.

    Args:
        size: Number of positions before resizing.
        target: Number of positions after resizing.
        align_corners: As in ``F.interpolate``.
        dtype: Type of the matrix.
        device: Device of the matrix.

    Returns:
        Matrix target,size. It is cached: do not change it.
    """
    return _retain(_bilinear_matrix(size, target, align_corners, dtype, device))


def _retain(matrix: Tensor) -> Tensor:
    for matrices in _retained_lists:
        matrices.append(matrix)
    return matrix


@functools.lru_cache(64)
@torch.inference_mode(False)  # training may use a matrix that prediction has cached
def _tap_matrix(
    size: int, target: int, kernel: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    upsampling = bilinear_matrix(size, target, align_corners, torch.float64, torch.device("cpu"))
    margin = kernel // 2
    padded = F.pad(upsampling, (0, 0, margin, margin))
    shifted = [padded[tap : tap + target] for tap in range(kernel)]
    return torch.stack(shifted, 2).reshape(target, size * kernel).to(device, dtype)


def source_coordinates(size: int, target: int, align_corners: bool, index: Tensor | int) -> Any:
    """Return the source coordinates of target pixels along one axis, as PyTorch defines them.

    Args:
        size: Number of source pixels; their coordinates are 0 .. size - 1.
        target: Number of target pixels.
        align_corners: As in ``F.interpolate``.
        index: Indices of target pixels, a tensor or one number.

    Returns:
        The coordinates, a tensor or one number like ``index``; none is negative.
    """
    if align_corners:
        return index * ((size - 1) / (target - 1) if target > 1 else 0.0)
    position = (index + 0.5) * (size / target) - 0.5
    return position.clamp_min(0) if isinstance(position, Tensor) else max(position, 0.0)


def source_rows(size: int, target: int, align_corners: bool, start: int, stop: int) -> tuple[int, int]:
    """Return the range of source rows that a range of target rows depends on.

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
