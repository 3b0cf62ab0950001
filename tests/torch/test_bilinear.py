"""A convolution of upsampled maps, computed from the maps as they are: the same outputs and gradients."""

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


def given(sizes, kernel, dtype=torch.float64):
    made = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)  # noqa: E731
    maps = [draw(2, 3 + i, *size).requires_grad_() for i, size in enumerate(sizes)]
    conv = nn.Conv2d(sum(x.shape[1] for x in maps), 5, kernel, padding=kernel // 2, dtype=dtype)
    conv.weight.data, conv.bias.data = draw(*conv.weight.shape), draw(5)
    return conv, maps


def plain(conv, maps, align_corners):
    size = maps[0].shape[2:]
    up = [F.interpolate(x, size, mode="bilinear", align_corners=align_corners) for x in maps]
    return conv(torch.cat(up, 1))


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes[0])))
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("block", [5, 128])
def test_outputs_and_gradients_are_the_plain_ones(sizes, kernel, align_corners, block, monkeypatch):
    monkeypatch.setitem(bilinear.BLOCK, "cpu", block)
    conv, maps = given(sizes, kernel)
    wanted, found = plain(conv, maps, align_corners), conv_of_upsampled(conv, maps, align_corners)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    back = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [*maps, conv.weight, conv.bias]
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, back), torch.autograd.grad(wanted, leaves, back), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    other = plain(conv, maps, not align_corners)
    if len(sizes) == 4:
        assert (found - other).abs().max() > 1e-2


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_rounding(dtype, bound):
    conv, maps = given(SIZES[0], 3)
    wanted = plain(conv, maps, True)
    conv, maps = given(SIZES[0], 3, dtype)
    found = conv_of_upsampled(conv, maps, True)
    assert found.dtype == dtype
    assert (found - wanted).abs().max() <= bound * wanted.abs().max()


def test_training_can_use_what_prediction_made_first():
    conv, maps = given(((6, 10), (3, 5)), 3)
    with torch.inference_mode():
        conv_of_upsampled(conv, maps, True)
    conv_of_upsampled(conv, maps, True).sum().backward()


@pytest.mark.parametrize("variant", ["hrnet", "openseg", "mmseg", "mindspore"])
def test_the_network_is_the_one_with_all_layers_where_the_paper_has_them(variant):
    arch = Arch(width=6, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8, variant=variant)
    networks = OCRNet(arch).double(), OCRNet(arch, low_resolution=False).double()
    made = torch.Generator().manual_seed(0)
    for tensor in networks[0].state_dict().values():
        tensor.copy_(0.1 * torch.randn(tensor.shape, generator=made).abs())
    networks[1].load_state_dict(networks[0].state_dict())
    x = torch.randn(2, 3, 65, 97, generator=made, dtype=torch.float64)
    for mine, theirs in zip(*(network.train()(x) for network in networks), strict=True):
        assert (mine - theirs).abs().max() <= 1e-11 * theirs.abs().max()
