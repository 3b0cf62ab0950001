"""`device.py` translates PyTorch's out of memory errors and reports keys that have no effect."""

import importlib.util

import pytest
import torch

from ocrnet.config import Config
from ocrnet.engines.torch.device import choose_precision, describe, fused_norm_unavailable_reason, translate_oom
from ocrnet.utils.errors import OcrnetError


def test_out_of_memory_becomes_an_error_with_a_remedy_and_other_errors_pass_unchanged():
    expected = r"out of memory .*can't allocate memory.*; lower batch_size"
    with pytest.raises(OcrnetError, match=expected), translate_oom("lower batch_size"):
        torch.empty(2**46, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="must match"), translate_oom("lower batch_size"):
        torch.ones(2) + torch.ones(3)


@pytest.mark.parametrize(
    ("device", "triton", "norm", "ranks", "expected"),
    [
        ("cpu", True, "local", 1, "on a CPU"),
        ("cuda", False, "local", 1, "without Triton, which PyTorch's CUDA builds include"),
        ("cuda", True, "sync", 2, "with batch norm over 2 ranks; --set norm=local computes it per rank"),
        ("cuda", True, "sync", 1, None),
        ("cuda", True, "local", 2, None),
    ],
)
def test_the_reason_why_the_fused_norm_is_unavailable(device, triton, norm, ranks, expected, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    assert fused_norm_unavailable_reason(torch.device(device), Config(norm=norm, fused_norm=True), ranks) == expected


def test_startup_messages_mention_the_fused_norm_only_when_it_is_requested_for_training():
    def fused_norm_messages(training=True, **settings):
        cpu = torch.device("cpu")
        lines, _ = describe(cpu, "CPU", choose_precision(cpu, False), Config(**settings), training=training, ranks=1)
        return [line for line in lines if line.startswith("fused_norm")]

    assert fused_norm_messages(fused_norm=True) == ["fused_norm: no effect on a CPU"]
    assert fused_norm_messages() == fused_norm_messages(training=False, fused_norm=True) == []
