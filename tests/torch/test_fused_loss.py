"""The loss that upsamples band by band has the values and gradients of the reference in a fraction of its memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ocrnet.engines.torch import fused_loss
from ocrnet.engines.torch.fused_loss import upsampled_cross_entropy_sum

SIZES = [(13, 21, 97, 161), (16, 32, 128, 128), (7, 9, 7, 9), (5, 5, 1, 33), (16, 32, 61, 125), (1, 1, 9, 9)]


def reference(logits, label, pixel_weight, align_corners):
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    up = F.interpolate(wide, label.shape[-2:], mode="bilinear", align_corners=align_corners)
    nll = F.cross_entropy(up, label.long().clamp_max(logits.shape[1] - 1), reduction="none")
    return (nll * pixel_weight).sum()


def batch(size, dtype=torch.float64, seed=0):
    h, w, height, width = size
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 19, h, w, generator=generator, dtype=torch.float64)
    label = torch.randint(0, 19, (2, height, width), generator=generator).to(torch.uint8)
    label[torch.rand(label.shape, generator=generator) < 0.3] = 255
    weight = torch.rand(label.shape, generator=generator, dtype=torch.float64) * (label != 255)
    return logits.to(dtype).requires_grad_(), label, weight


@pytest.fixture(params=[True, False], ids=["corners", "centers"])
def align_corners(request):
    return request.param


@pytest.fixture(params=[None, 1], ids=["bands", "rows"])
def band(request, monkeypatch):
    """Run the test with bands of the default size and with bands of one row."""
    if request.param:
        monkeypatch.setitem(fused_loss.BAND_BYTES, "cpu", 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "value", "gradient"), [(torch.float64, 1e-14, 1e-14), (torch.float32, 2e-6, 1e-5)])
def test_value_and_gradient_equal_the_reference(size, dtype, value, gradient, align_corners, band):
    logits, label, weight = batch(size, dtype)
    actual = upsampled_cross_entropy_sum(logits, label, weight, align_corners=align_corners)
    expected = reference(logits, label, weight, align_corners)
    assert actual.item() == pytest.approx(expected.item(), rel=value)
    ours, theirs = (torch.autograd.grad(loss / 100, logits)[0] for loss in (actual, expected))
    assert (ours - theirs).norm() <= gradient * theirs.norm()
    other = reference(logits, label, weight, not align_corners)
    if size[:2] not in (size[2:], (1, 1)):
        assert actual.item() != pytest.approx(other.item(), rel=1e-5)


def test_the_gradient_passes_gradcheck(align_corners, band):
    logits, label, weight = batch((3, 4, 7, 9))
    assert torch.autograd.gradcheck(
        lambda x: upsampled_cross_entropy_sum(x, label, weight, align_corners=align_corners),
        logits,
        fast_mode=True,
    )


def test_bfloat16_is_computed_in_float32(align_corners):
    logits, label, weight = batch((13, 21, 97, 161), torch.bfloat16)
    actual = upsampled_cross_entropy_sum(logits, label, weight, align_corners=align_corners)
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(reference(logits, label, weight, align_corners).item(), rel=1e-5)
    assert torch.autograd.grad(actual, logits)[0].dtype == torch.bfloat16


def test_ignored_pixels_do_not_count_even_if_their_logits_are_nan():
    logits, label, weight = batch((4, 4, 16, 16))
    label[0], weight[0] = 255, 0
    label[1], weight[1] = 3, 1
    with torch.no_grad():
        logits[0] = float("nan")
    assert torch.isfinite(upsampled_cross_entropy_sum(logits.detach(), label, weight, align_corners=True))
    with torch.no_grad():
        logits[1, 0] = float("nan")
    assert torch.isnan(upsampled_cross_entropy_sum(logits.detach(), label, weight, align_corners=True))


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [tensor.nbytes for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return result


def test_no_tensor_is_as_large_as_logits_at_full_resolution():
    logits, label, weight = batch((128, 256, 512, 1024), torch.float32)
    full_bytes = 2 * 19 * 512 * 1024 * 4
    with LargestTensor() as ours:
        upsampled_cross_entropy_sum(logits, label, weight.float(), align_corners=True).backward()
    with LargestTensor() as theirs:
        reference(logits, label, weight.float(), True).backward()
    assert theirs.bytes >= full_bytes
    assert ours.bytes <= full_bytes / 5
