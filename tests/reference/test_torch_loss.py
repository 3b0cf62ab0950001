"""The torch losses equal the authors' values (tests/data/official_w6) and a NumPy implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ocrnet.architecture import Arch
from ocrnet.engines.torch.hrnet import resize
from ocrnet.engines.torch.loss import SegmentationLoss, cross_entropy_sum, label_weight, ohem
from ocrnet.engines.torch.ocr import OCRNet

DATA = Path(__file__).parents[1] / "data" / "official_w6"
# fmt: off
CITYSCAPES = (0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023,
              0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507)
# fmt: on
WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


@pytest.fixture(params=["a", "b"])
def case(request):
    """Return a case's tensors, the authors' values for it, and our float64 logits with the authors' weights."""
    sample = torch.load(DATA / f"case_{request.param}.pth", weights_only=True)
    weights = torch.load(DATA / "state_dict.pth", weights_only=True)
    model = OCRNet(Arch(width=6, channels=48, key_channels=24)).eval()
    model.load_state_dict({k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")})
    with torch.no_grad():
        outputs = model.double()(sample["x"].double())
    return sample, json.loads((DATA / "summary.json").read_text())[f"case_{request.param}"]["eval"], outputs


def value(outputs, label, class_weight=CITYSCAPES, align_corners=True, **options):
    # The authors' class weights are float32 values, also in their float64 run.
    weight = torch.tensor(class_weight).to(outputs[0].dtype)
    loss = SegmentationLoss(weight, align_corners, **options)
    return loss(outputs, label, label_weight(label, weight))[0].item()


def test_cross_entropy_equals_the_authors(case):
    sample, expected, outputs = case
    assert value(outputs, sample["label"]) == pytest.approx(expected["loss_fp64"], rel=1e-12)
    single = (sample["aux"], sample["ocr"])
    assert value(single, sample["label"]) == pytest.approx(expected["loss_fp32"], rel=1e-5)
    assert value(outputs, sample["label"], align_corners=False) != pytest.approx(expected["loss_fp64"], rel=1e-5)
    assert value(outputs, sample["label"], class_weight=(1.0,) * 19) != pytest.approx(expected["loss_fp64"], rel=1e-5)


def test_ohem_equals_the_authors(case):
    """Nearly all pixels are below 0.9 here, so this checks the two means; test_ohem_equals_numpy checks the mining."""
    sample, expected, outputs = case
    exact = expected["ohem_thres0.9_keep1000_fp64"]
    assert value(outputs, sample["label"], ohem=(0.9, 1000)) == pytest.approx(exact, rel=1e-12)
    assert value(outputs, sample["label"], ohem=(0.1, 1)) != pytest.approx(exact, rel=1e-5)
    assert value(outputs, sample["label"]) != pytest.approx(exact, rel=1e-5)


def random_batch(seed=0, dtype=torch.float64):
    """Return logits 2,3,5,7 that require gradients, and uint8 labels 2,18,27 with ignored pixels."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(2 * rng.standard_normal((2, 3, 5, 7)), dtype=dtype, requires_grad=True)
    label = rng.integers(0, 3, (2, 18, 27)).astype(np.uint8)
    label[rng.random(label.shape) < 0.2] = 255
    return logits, torch.from_numpy(label)


def pixel_losses(logits, label):
    """Return the valid pixels' probability of the labeled class and class weight, computed in float64 NumPy."""
    full = resize(logits.detach().double(), tuple(label.shape[1:]), True).numpy()
    exp = np.exp(full - full.max(1, keepdims=True))
    n, y, x = np.nonzero(label.numpy() != 255)
    labeled = label.numpy()[n, y, x]
    return (exp / exp.sum(1, keepdims=True))[n, labeled, y, x], WEIGHT.numpy()[labeled]


def test_cross_entropy_and_its_denominator_equal_numpy():
    logits, label = random_batch()
    probability, weight = pixel_losses(logits, label)
    assert label_weight(label, WEIGHT).item() == pytest.approx(weight.sum(), rel=1e-12)
    actual = cross_entropy_sum(logits, label, WEIGHT, align_corners=True).item()
    assert actual == pytest.approx((weight * -np.log(probability)).sum(), rel=1e-12)


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.9, 1), (0.3, 1), (0.01, 300), (0.2, 10**6), (1e-9, 0)])
def test_ohem_equals_numpy(threshold, min_kept):
    logits, label = random_batch()
    probability, weight = pixel_losses(logits, label)
    bound = max(np.sort(probability)[min(min_kept, probability.size - 1)], threshold)
    kept = probability < bound
    expected = (weight * -np.log(probability))[kept].mean() if kept.any() else 0.0
    actual = ohem(logits, label, WEIGHT, threshold=threshold, min_kept=min_kept, align_corners=True)
    assert actual.item() == pytest.approx(expected, rel=1e-12)
    actual.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any() == kept.any()


@pytest.mark.parametrize("ohem_rule", [None, (0.9, 100)])
def test_without_valid_pixels_loss_and_gradient_are_zero(ohem_rule):
    logits, label = random_batch()
    label = torch.full_like(label, 255)
    loss = SegmentationLoss(WEIGHT, True, ohem=ohem_rule)
    total, heads = loss((logits, logits), label, label_weight(label, WEIGHT))
    total.backward()
    assert total.item() == 0
    assert heads.tolist() == [0, 0]
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_micro_batches_add_up_to_one_mean():
    logits, label = random_batch()
    label[1, :, 5:] = 255  # unequal numbers of valid pixels, so that the mean of means differs
    loss, denominator = SegmentationLoss(WEIGHT, True), label_weight(label, WEIGHT)
    whole = loss((logits, 2 * logits), label, denominator)[0]
    halves = [(logits[i : i + 1], label[i : i + 1]) for i in range(2)]
    parts = sum(loss((x, 2 * x), y, denominator)[0] for x, y in halves)
    mean_of_means = sum(loss((x, 2 * x), y, label_weight(y, WEIGHT))[0] for x, y in halves) / 2
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    assert mean_of_means.item() != pytest.approx(whole.item(), rel=1e-3)


def test_ohem_divides_its_local_means_by_the_micro_batches():
    logits, label = random_batch()
    loss, denominator = SegmentationLoss(WEIGHT, True, ohem=(0.9, 10)), label_weight(label, WEIGHT)
    once = loss((logits, logits), label, denominator)[1]
    assert torch.allclose(loss((logits, logits), label, denominator, parts=4)[1], once / 4, rtol=1e-12)
    probability, weight = pixel_losses(logits, label)
    assert once[0].item() == pytest.approx((weight * -np.log(probability)).sum() / label.numel(), rel=1e-12)


def test_the_losses_of_the_heads_are_unweighted_and_detached():
    logits, label = random_batch()
    total, heads = SegmentationLoss(WEIGHT, True, aux=0.3, ocr=2.0)(
        (logits, 2 * logits), label, label_weight(label, WEIGHT)
    )
    assert total.item() == pytest.approx(0.3 * heads[0].item() + 2.0 * heads[1].item(), rel=1e-12)
    assert total.requires_grad
    assert not heads.requires_grad


def test_bfloat16_logits_are_summed_in_float32():
    logits, label = random_batch(dtype=torch.bfloat16)
    weight = WEIGHT.float()
    with torch.autocast("cpu", torch.bfloat16):
        actual = cross_entropy_sum(logits, label, weight, align_corners=True)
    assert actual.dtype == torch.float32
    expected = cross_entropy_sum(logits.double(), label, WEIGHT, align_corners=True)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
