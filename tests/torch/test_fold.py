"""Folding each norm into the convolution before it keeps the outputs, for every variant."""

import dataclasses

import pytest
import torch

from ocrnet import architecture
from ocrnet.architecture import Arch
from ocrnet.engines.torch.fold import fold_norms
from ocrnet.engines.torch.hrnet import Conv, Norm
from ocrnet.engines.torch.ocr import OCRNet

ARCH = Arch(width=6, blocks=1, modules=(1, 1, 1), num_classes=5, channels=16, key_channels=8)


def network(arch: Arch) -> OCRNet:
    """Return a float64 network without default values."""
    generator = torch.Generator().manual_seed(0)
    model = OCRNet(arch).double()
    for tensor in model.state_dict().values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, Norm):
            module.weight.data.abs_().add_(0.01)
            module.running_var.abs_().add_(0.01)
    return model.eval()


@pytest.mark.parametrize("variant", architecture.VARIANTS)
def test_the_folded_network_has_the_same_outputs(variant):
    model = network(dataclasses.replace(ARCH, variant=variant))
    x = torch.randn(2, 3, 65, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, actual = model(x), fold_norms(model, torch.float64)(x)
    for a, b in zip(expected, actual, strict=True):
        assert (a - b).abs().max() <= 1e-11 * a.abs().max()


def test_the_folded_network_has_no_norm_and_the_original_is_unchanged():
    model = network(ARCH)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half = fold_norms(model.train(), torch.bfloat16)
    assert not any(isinstance(module, Norm) for module in half.modules())
    assert all(conv.weight.dtype == torch.bfloat16 for conv in half.modules() if isinstance(conv, Conv))
    assert model.training
    assert not half.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
