"""The MindSpore loss and its gradients equal those of the torch loss on random logits."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from ocrnet.engines.mindspore import loss as ours
from ocrnet.engines.torch import loss as theirs

WEIGHT = (0.5, 1.0, 2.0)
OHEM = [None, (0.9, 1), (0.3, 1), (0.01, 300), (0.2, 10**6), (1e-9, 0)]


@pytest.fixture(autouse=True)
def pynative():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")


def random_batch():
    """Return float32 logits 2,3,5,7 and uint8 labels 2,18,27 with ignored pixels."""
    rng = np.random.default_rng(0)
    logits = (2 * rng.standard_normal((2, 3, 5, 7))).astype(np.float32)
    label = rng.integers(0, 3, (2, 18, 27)).astype(np.uint8)
    label[rng.random(label.shape) < 0.2] = 255
    return logits, label


def by_torch(logits, label, **options):
    x, y = torch.tensor(logits, requires_grad=True), torch.from_numpy(label)
    loss = theirs.SegmentationLoss(torch.tensor(WEIGHT), True, **options)
    total, heads = loss((x, 2 * x), y, theirs.label_weight(y, torch.tensor(WEIGHT)), parts=2)
    total.backward()
    return total.item(), heads.numpy(), x.grad.numpy()


def by_mindspore(logits, label, **options):
    loss = ours.SegmentationLoss(WEIGHT, True, parts=2, **options)
    denominator = Tensor(np.array([ours.label_weight(label, ours.weight_table(WEIGHT))], np.float32))
    compute = ms.value_and_grad(lambda x: loss(x, 2 * x, Tensor(label), denominator), 0, None, has_aux=True)
    (total, heads), gradient = compute(Tensor(logits))
    return float(total.asnumpy()), heads.asnumpy(), gradient.asnumpy()


@pytest.mark.parametrize("ohem", OHEM, ids=str)
def test_the_engines_agree(ohem):
    logits, label = random_batch()
    for a, b in zip(by_mindspore(logits, label, ohem=ohem), by_torch(logits, label, ohem=ohem), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("ohem", [None, (0.9, 100)])
def test_without_valid_pixels_loss_and_gradient_are_zero(ohem):
    logits, label = random_batch()
    total, heads, gradient = by_mindspore(logits, np.full_like(label, 255), ohem=ohem)
    assert total == 0
    assert not heads.any()
    assert not gradient.any()


def test_float16_logits_are_summed_in_float32():
    logits, label = random_batch()
    logits = logits.astype(np.float16)
    total, _, gradient = by_mindspore(logits, label)
    assert gradient.dtype == np.float16
    assert total == pytest.approx(by_torch(logits.astype(np.float32), label)[0], rel=1e-3)
