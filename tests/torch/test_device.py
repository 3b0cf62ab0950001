"""What the device's module tells of PyTorch's own errors."""

import pytest
import torch

from ocrnet.engines.torch.device import memory_told
from ocrnet.errors import OcrnetError


def test_the_end_of_memory_is_told_with_what_helps():
    wanted = r"out of memory .*can't allocate memory.*; lower batch_size"
    with pytest.raises(OcrnetError, match=wanted), memory_told("lower batch_size"):
        torch.empty(2**46, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="must match"), memory_told("lower batch_size"):
        torch.ones(2) + torch.ones(3)
