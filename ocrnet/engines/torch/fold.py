"""Fold batch norms into the preceding convolutions for prediction: a third fewer passes over the activations."""

import copy

import torch
from torch import nn

from ocrnet.engines.torch.hrnet import Conv, Norm
from ocrnet.engines.torch.ocr import OCRNet


@torch.no_grad()
def fold_norms(model: OCRNet, dtype: torch.dtype) -> OCRNet:
    """Return a copy for evaluation without norms, with weights in ``dtype``; the outputs differ only by rounding.

    In evaluation, a norm is a factor and a shift for each channel: gamma (W x + b - mean) / sqrt(var + eps) + beta is
    again a convolution. Every norm follows a convolution whose output has no other use. The factors are float64.
    """
    network = copy.deepcopy(model).eval().requires_grad_(False)
    conv: Conv | None = None
    for name, module in list(network.named_modules()):
        if isinstance(module, Conv):
            conv = module
        elif isinstance(module, Norm):
            assert conv is not None
            _fold(conv, module)
            owner, _, part = name.rpartition(".")
            setattr(network.get_submodule(owner), part, nn.Identity())
    return network.to(dtype)


def _fold(conv: Conv, norm: Norm) -> None:
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = 0.0 if conv.bias is None else conv.bias.double()
    folded_bias = norm.bias.double() + factor * (bias - norm.running_mean.double())
    conv.weight.copy_(conv.weight.double() * factor[:, None, None, None])
    conv.bias = nn.Parameter(folded_bias.to(conv.weight.dtype), requires_grad=False)
