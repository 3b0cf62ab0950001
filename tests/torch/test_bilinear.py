"""`conv_of_upsampled` computes a convolution of upsampled maps at their own resolution: same outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ocrnet.architecture import Arch
from ocrnet.engines.torch import bilinear
from ocrnet.engines.torch.bilinear import conv_of_upsampled
from ocrnet.engines.torch.ocr import OCRNet

SIZES = [
    ((16, 24), (8, 12), (4, 6), (2, 3)),
    ((13, 21), (7, 11), (4, 6), (2, 3)),
    ((8, 8), (4, 4), (2, 2), (1, 1)),
    ((1, 5), (1, 3)),
]


def random_conv_and_maps(sizes, kernel, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    maps = [draw(2, 3 + i, *size).requires_grad_() for i, size in enumerate(sizes)]
    conv = nn.Conv2d(sum(x.shape[1] for x in maps), 5, kernel, padding=kernel // 2, dtype=dtype)
    conv.weight.data, conv.bias.data = draw(*conv.weight.shape), draw(5)
    return conv, maps


def reference(conv, maps, align_corners):
    size = maps[0].shape[2:]
    up = [F.interpolate(x, size, mode="bilinear", align_corners=align_corners) for x in maps]
    return conv(torch.cat(up, 1))


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes[0])))
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("block", [5, 128])
def test_outputs_and_gradients_equal_those_of_upsampling_first(sizes, kernel, align_corners, block, monkeypatch):
    monkeypatch.setitem(bilinear.BLOCK, "cpu", block)
    conv, maps = random_conv_and_maps(sizes, kernel)
    expected, actual = reference(conv, maps, align_corners), conv_of_upsampled(conv, maps, align_corners)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    output_gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [*maps, conv.weight, conv.bias]
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, output_gradient),
        torch.autograd.grad(expected, leaves, output_gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    other = reference(conv, maps, not align_corners)
    if len(sizes) == 4:
        assert (actual - other).abs().max() > 1e-2


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_rounding_error_is_bounded_in_float32_and_bfloat16(dtype, bound):
    conv, maps = random_conv_and_maps(SIZES[0], 3)
    expected = reference(conv, maps, True)
    conv, maps = random_conv_and_maps(SIZES[0], 3, dtype)
    actual = conv_of_upsampled(conv, maps, True)
    assert actual.dtype == dtype
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


def test_training_works_after_prediction_has_filled_the_matrix_cache():
    conv, maps = random_conv_and_maps(((6, 10), (3, 5)), 3)
    with torch.inference_mode():
        conv_of_upsampled(conv, maps, True)
    conv_of_upsampled(conv, maps, True).sum().backward()


@pytest.mark.parametrize("variant", ["hrnet", "openseg", "mmseg", "mindspore"])
def test_the_low_resolution_network_equals_the_network_with_the_papers_layer_order(variant):
    arch = Arch(width=6, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8, variant=variant)
    networks = OCRNet(arch).double(), OCRNet(arch, low_resolution=False).double()
    generator = torch.Generator().manual_seed(0)
    for tensor in networks[0].state_dict().values():
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator).abs())
    networks[1].load_state_dict(networks[0].state_dict())
    x = torch.randn(2, 3, 65, 97, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(*(network.train()(x) for network in networks), strict=True):
        assert (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max()
