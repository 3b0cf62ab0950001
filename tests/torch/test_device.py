"""What the device's module tells: of PyTorch's own errors, and of keys that have no effect."""

import importlib.util

import pytest
import torch

from ocrnet.config import Config
from ocrnet.engines.torch.device import choose_precision, describe, fused_norm_unavailable_reason, translate_oom
from ocrnet.utils.errors import OcrnetError


def test_the_end_of_memory_is_told_with_what_helps():
    wanted = r"out of memory .*can't allocate memory.*; lower batch_size"
    with pytest.raises(OcrnetError, match=wanted), translate_oom("lower batch_size"):
        torch.empty(2**46, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="must match"), translate_oom("lower batch_size"):
        torch.ones(2) + torch.ones(3)


@pytest.mark.parametrize(
    ("device", "triton", "norm", "ranks", "wanted"),
    [
        ("cpu", True, "local", 1, "on a CPU"),
        ("cuda", False, "local", 1, "without Triton, which PyTorch's CUDA builds include"),
        ("cuda", True, "sync", 2, "with batch norm over 2 ranks; --set norm=local computes it per rank"),
        ("cuda", True, "sync", 1, None),
        ("cuda", True, "local", 2, None),
    ],
)
def test_what_keeps_the_fused_norm_from_being_used(device, triton, norm, ranks, wanted, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    assert fused_norm_unavailable_reason(torch.device(device), Config(norm=norm, fused_norm=True), ranks) == wanted


def test_the_banner_tells_of_the_fused_norm_where_it_is_asked_for():
    def told(training=True, **given):
        cpu = torch.device("cpu")
        lines, _ = describe(cpu, "CPU", choose_precision(cpu, False), Config(**given), training=training, ranks=1)
        return [line for line in lines if line.startswith("fused_norm")]

    assert told(fused_norm=True) == ["fused_norm: no effect on a CPU"]
    assert told() == told(training=False, fused_norm=True) == []
