"""The loss that upsamples band by band: the numbers and gradients of the plain one, in a fraction of the memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ocrnet.engines.torch import fused_loss
from ocrnet.engines.torch.fused_loss import upsampled_cross_entropy_sum

SIZES = [(13, 21, 97, 161), (16, 32, 128, 128), (7, 9, 7, 9), (5, 5, 1, 33), (16, 32, 61, 125), (1, 1, 9, 9)]


def plain(logits, label, pixel_weight, align_corners):
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    up = F.interpolate(wide, label.shape[-2:], mode="bilinear", align_corners=align_corners)
    nll = F.cross_entropy(up, label.long().clamp_max(logits.shape[1] - 1), reduction="none")
    return (nll * pixel_weight).sum()


def batch(size, dtype=torch.float64, seed=0):
    h, w, height, width = size
    made = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 19, h, w, generator=made, dtype=torch.float64)
    label = torch.randint(0, 19, (2, height, width), generator=made).to(torch.uint8)
    label[torch.rand(label.shape, generator=made) < 0.3] = 255
    weight = torch.rand(label.shape, generator=made, dtype=torch.float64) * (label != 255)
    return logits.to(dtype).requires_grad_(), label, weight


@pytest.fixture(params=[True, False], ids=["corners", "centers"])
def align_corners(request):
    return request.param


@pytest.fixture(params=[None, 1], ids=["bands", "rows"])
def band(request, monkeypatch):
    """Bands as they are, and of one row each."""
    if request.param:
        monkeypatch.setitem(fused_loss.BAND_BYTES, "cpu", 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "value", "gradient"), [(torch.float64, 1e-14, 1e-14), (torch.float32, 2e-6, 1e-5)])
def test_it_is_the_plain_loss(size, dtype, value, gradient, align_corners, band):
    logits, label, weight = batch(size, dtype)
    found = upsampled_cross_entropy_sum(logits, label, weight, align_corners=align_corners)
    wanted = plain(logits, label, weight, align_corners)
    assert found.item() == pytest.approx(wanted.item(), rel=value)
    mine, theirs = (torch.autograd.grad(loss / 100, logits)[0] for loss in (found, wanted))
    assert (mine - theirs).norm() <= gradient * theirs.norm()
    other = plain(logits, label, weight, not align_corners)
    if size[:2] not in (size[2:], (1, 1)):
        assert found.item() != pytest.approx(other.item(), rel=1e-5)


def test_the_gradient_is_that_of_the_value(align_corners, band):
    logits, label, weight = batch((3, 4, 7, 9))
    assert torch.autograd.gradcheck(
        lambda x: upsampled_cross_entropy_sum(x, label, weight, align_corners=align_corners),
        logits,
        fast_mode=True,
    )


def test_bfloat16_is_computed_in_float32(align_corners):
    logits, label, weight = batch((13, 21, 97, 161), torch.bfloat16)
    found = upsampled_cross_entropy_sum(logits, label, weight, align_corners=align_corners)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(plain(logits, label, weight, align_corners).item(), rel=1e-5)
    assert torch.autograd.grad(found, logits)[0].dtype == torch.bfloat16


def test_what_is_ignored_counts_nothing_whatever_is_there():
    logits, label, weight = batch((4, 4, 16, 16))
    label[0], weight[0] = 255, 0
    label[1], weight[1] = 3, 1
    with torch.no_grad():
        logits[0] = float("nan")
    assert torch.isfinite(upsampled_cross_entropy_sum(logits.detach(), label, weight, align_corners=True))
    with torch.no_grad():
        logits[1, 0] = float("nan")
    assert torch.isnan(upsampled_cross_entropy_sum(logits.detach(), label, weight, align_corners=True))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        sizes = [one.nbytes for one in tree_leaves(made) if isinstance(one, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return made


def test_no_tensor_is_as_large_as_logits_at_full_resolution():
    logits, label, weight = batch((128, 256, 512, 1024), torch.float32)
    full = 2 * 19 * 512 * 1024 * 4
    with Largest() as mine:
        upsampled_cross_entropy_sum(logits, label, weight.float(), align_corners=True).backward()
    with Largest() as theirs:
        plain(logits, label, weight.float(), True).backward()
    assert theirs.bytes >= full
    assert mine.bytes <= full / 5
