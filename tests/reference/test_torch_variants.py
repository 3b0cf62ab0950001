"""The rules of each variant in the torch network equal direct implementations of them."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.engines.torch.hrnet import Conv, HighResolutionModule
from ocrnet.engines.torch.ocr import OCRNet

ARCH = Arch(width=6, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8)
CONTEXT, BOTTLENECK = "ocr_distri_head.object_context_block.", "ocr_distri_head.conv_bn_dropout."


@pytest.mark.parametrize("size", [(32, 64), (33, 64), (32, 65), (33, 65)])
def test_same_padding_equals_that_of_tensorflow(size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, *size, generator=generator)
    conv = Conv(3, 4, 3, stride=2, same_padding=True)
    conv.weight.data = torch.randn(4, 3, 3, 3, generator=generator)
    pads = []
    for length in reversed(size):  # total = (ceil(length / 2) - 1) * 2 + 3 - length, the smaller half first
        total = (-(-length // 2) - 1) * 2 + 3 - length
        pads += [total // 2, total - total // 2]
    expected = F.conv2d(F.pad(x, pads), conv.weight, stride=2)
    assert expected.shape[2:] == tuple(-(-length // 2) for length in size)
    assert torch.equal(conv(x), expected)
    symmetric = F.conv2d(x, conv.weight, stride=2, padding=1)
    assert torch.equal(symmetric, expected) == (size == (33, 65))


@pytest.mark.parametrize("fuse_resize", ["nearest", "bilinear"])
@pytest.mark.parametrize("double_resize", [False, True])
def test_fuse_resize_equals_a_direct_implementation(fuse_resize, double_resize):
    rule = architecture.Variant(align_corners=False, fuse_resize=fuse_resize, double_resize=double_resize)
    x, size = torch.randn(1, 2, 3, 5, generator=torch.Generator().manual_seed(0)), (11, 19)
    actual = HighResolutionModule((2, 4), 1, rule).upsample(x, size, 4)
    if fuse_resize == "nearest":
        rows, columns = ([i * n // out for i in range(out)] for n, out in zip((3, 5), size, strict=True))
        expected = x[:, :, rows][:, :, :, columns]
    else:
        first = F.interpolate(x, scale_factor=4, mode="bilinear") if double_resize else x
        expected = F.interpolate(first, size, mode="bilinear")
    assert torch.equal(actual, expected)


def random_state(arch):
    """Return weights and statistics without default values."""
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in architecture.shapes(arch).items()}
    scales = {name for name in state if architecture.is_norm(name) and name.endswith((".weight", ".running_var"))}
    return {name: 0.01 + x.abs() if name in scales else x for name, x in state.items()}


def reference_heads(x, state, rule):
    """Compute both heads directly: return (aux, ocr) logits of the concatenated branches x 1,C,H,W."""

    def conv(name, x):
        weight = state[name + ".weight"]
        return F.conv2d(x, weight, state.get(name + ".bias"), padding=weight.shape[-1] // 2)

    def block(name, norm, x):
        y = conv(name, x)
        mean, var, weight, bias = (
            state[f"{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        y = (y - mean) / torch.sqrt(var + rule.head_eps) * weight + bias
        return torch.where(y > 0, y, rule.head_activation_slope * y)

    def context(name, x):
        return block(f"{CONTEXT}{name}.0", f"{CONTEXT}{name}.1.0", x)

    aux = conv("aux_head.3", block("aux_head.0", "aux_head.1", x))
    pixels = block("conv3x3_ocr.0", "conv3x3_ocr.1", x)
    regions = torch.einsum("khw,chw->ck", aux[0].flatten(1).softmax(1).view_as(aux[0]), pixels[0])[None, :, :, None]
    query, key = (
        block(f"{CONTEXT}{name}.2", f"{CONTEXT}{name}.3.0", context(name, y))
        for name, y in (("f_pixel", pixels), ("f_object", regions))
    )
    relation = torch.einsum("chw,ck->khw", query[0], key[0, :, :, 0]) / query.shape[1] ** 0.5
    context_of_pixels = torch.einsum("khw,ck->chw", relation.softmax(0), context("f_down", regions)[0, :, :, 0])[None]
    combined = torch.cat([context("f_up", context_of_pixels), pixels], 1)
    return aux, conv("cls_head", block(BOTTLENECK + "0", BOTTLENECK + "1.0", combined))


@pytest.mark.parametrize("variant", architecture.VARIANTS)
def test_the_heads_equal_a_direct_implementation(variant):
    arch = dataclasses.replace(ARCH, variant=variant)
    state = {name: value.double() for name, value in random_state(arch).items()}
    model = OCRNet(arch).double().eval()
    model.load_state_dict(state)
    maps = [
        torch.randn(1, width, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
        for width in arch.widths
    ]
    model.forward_features = lambda x: maps
    with torch.no_grad():
        actual = model(torch.zeros(1, 3, 24, 28))
    expected = reference_heads(torch.cat(maps, 1), state, arch.rule)
    assert torch.allclose(actual[0], expected[0], rtol=1e-9, atol=1e-9)
    assert torch.allclose(actual[1], expected[1], rtol=1e-9, atol=1e-9)
    slopes = reference_heads(torch.cat(maps, 1), state, dataclasses.replace(arch.rule, head_activation_slope=0.02))
    eps = reference_heads(torch.cat(maps, 1), state, dataclasses.replace(arch.rule, head_eps=1e-3))
    for other in (slopes, eps):
        assert not torch.allclose(actual[0], other[0], rtol=1e-5)
        assert not torch.allclose(actual[1], other[1], rtol=1e-5)
