"""Fold batch norms into the preceding convolutions for prediction, which reads or writes activations a third less."""

import copy

import torch
from torch import nn

from ocrnet.engines.torch.hrnet import Conv, Norm
from ocrnet.engines.torch.ocr import OCRNet


@torch.no_grad()
def fold_norms(model: OCRNet, dtype: torch.dtype) -> OCRNet:
    """Return a copy of the model for evaluation, with batch norms folded into convolutions and weights in ``dtype``.

    In evaluation, a convolution and its norm, gamma (W x + b - mean) / sqrt(var + eps) + beta, are one convolution.
    Every norm of the model follows a convolution whose output is not used elsewhere. The factors are computed in
    float64. The outputs differ from those of the model only by rounding.
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
