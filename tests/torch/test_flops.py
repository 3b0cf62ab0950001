"""The operations counted from shapes equal those that PyTorch's FLOP counter counts during a forward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ocrnet.architecture import Arch, flops
from ocrnet.engines.torch.ocr import OCRNet

W48_512x1024 = 648.9  # GFLOP, counted with torch.utils.flop_counter on the authors' own code


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        (Arch(width=48), (512, 1024)),
        (Arch(width=18, blocks=2, modules=(1, 2, 1), channels=64, key_channels=32, num_classes=11), (240, 320)),
        (Arch(width=6, channels=48, key_channels=24), (97, 161)),
    ],
)
def test_forward_flops_equal_those_of_pytorchs_counter(arch, size):
    with torch.device("meta"):
        model, x = OCRNet(arch, low_resolution=False).eval(), torch.zeros(1, 3, *size)
        with FlopCounterMode(display=False) as counter:
            model(x)
    assert flops.forward_flops(arch, size) == counter.get_total_flops()


def test_w48_has_the_flops_of_the_authors_code():
    assert round(flops.forward_flops(Arch(), (512, 1024)) / 1e9, 1) == W48_512x1024
