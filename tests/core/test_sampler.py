"""The training stream is a pure function of (seed, sample number): any order, any start, any number of ranks."""

import dataclasses
import hashlib

import cv2
import numpy as np
import pytest

from ocrnet.config import Data
from ocrnet.data import augment
from ocrnet.data.datasets import open_dataset, synthetic
from ocrnet.data.sampler import TrainStream, rank_sample_indices, val_stream
from ocrnet.distributed.launcher import World

DATA = Data(crop_size=(64, 96))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    synthetic.write(root, train=5, val=3, test=0, size=(96, 160), seed=3)
    return open_dataset("cityscapes", root, "train")


def stream(dataset, seed=1, data=DATA) -> TrainStream:
    return TrainStream(dataset, data, seed=seed, channels=16, dropout=0.25)


def digest(sample) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in sample)).hexdigest()


def test_a_sample_does_not_depend_on_the_order_of_access(dataset):
    one, other = stream(dataset), stream(dataset)
    forward = [digest(one[n]) for n in range(12)]
    assert [digest(other[n]) for n in reversed(range(12))] == forward[::-1]
    assert len(set(forward)) == 12
    assert digest(stream(dataset, seed=2)[0]) != forward[0]


def test_a_sample_has_the_documented_shapes_and_dtypes(dataset):
    image, label, dropout_mask, unreadable = stream(dataset)[0]
    assert unreadable == ()
    assert (image.shape, image.dtype) == ((64, 96, 3), np.uint8)
    assert (label.shape, label.dtype) == ((64, 96), np.uint8)
    assert (dropout_mask.shape, dropout_mask.dtype) == ((16,), np.bool_)
    assert image.flags.c_contiguous
    assert label.flags.c_contiguous


def test_each_epoch_has_every_image_once_in_its_own_order(dataset):
    s = stream(dataset)
    epochs = [[s.index(5 * epoch + i) for i in range(5)] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_the_ranks_together_get_the_samples_of_one_rank_with_the_global_batch(ranks, accumulate_steps):
    for step in (0, 7):
        single = rank_sample_indices(step, batch_size=2 * ranks, accumulate_steps=accumulate_steps, world=World())
        shares = [
            rank_sample_indices(step, batch_size=2, accumulate_steps=accumulate_steps, world=World(r, ranks))
            for r in range(ranks)
        ]
        together = [[n for share in shares for n in share[m]] for m in range(accumulate_steps)]
        assert together == single
    flat = [
        n
        for step in range(4)
        for b in rank_sample_indices(step, batch_size=3, accumulate_steps=2, world=World())
        for n in b
    ]
    assert flat == list(range(24))


def test_dropout_keeps_the_configured_share(dataset):
    s = TrainStream(dataset, DATA, seed=1, channels=4096, dropout=0.25)
    assert abs(s[0].dropout_mask.mean() - 0.75) < 0.03
    assert TrainStream(dataset, DATA, seed=1, channels=64, dropout=0.0)[0].dropout_mask.all()


def test_val_stream_yields_every_image_once_over_all_ranks(dataset):
    val = open_dataset("cityscapes", dataset.root, "val")
    for workers in (0, 2):
        for ranks in (1, 2, 5):
            shares = [[i for i, _, _ in val_stream(val, World(r, ranks), workers)] for r in range(ranks)]
            assert sorted(i for share in shares for i in share) == [0, 1, 2]
    (index, image, label), *_ = val_stream(val, World(), 2)
    expected_image, expected_label = val.read(0)
    assert index == 0
    np.testing.assert_array_equal(image, expected_image)
    np.testing.assert_array_equal(label, expected_label)


def test_without_augmentation_a_sample_is_a_plain_crop():
    plain = dataclasses.replace(DATA, scale_range=(1.0, 1.0), flip=False, color=False)
    image = np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8)
    label = np.random.default_rng(1).integers(0, 19, (90, 140), np.uint8)
    crop, crop_label = augment.train(image, label, np.random.default_rng(0), plain)
    hits = [
        (y, x)
        for y in range(90 - 64 + 1)
        for x in range(140 - 96 + 1)
        if np.array_equal(image[y, x], crop[0, 0]) and np.array_equal(image[y : y + 64, x : x + 96], crop)
    ]
    ((y, x),) = hits
    np.testing.assert_array_equal(label[y : y + 64, x : x + 96], crop_label)


def test_image_and_label_are_transformed_alike():
    """An image painted from its label: after scale, crop and flip, both agree except at resampled edges."""
    label = cv2.resize(
        np.random.default_rng(5).integers(0, 10, (9, 14), np.uint8), (140, 90), interpolation=cv2.INTER_NEAREST
    )
    image = np.repeat((label * 25)[:, :, None], 3, axis=2)
    data = dataclasses.replace(DATA, color=False)
    for n in range(20):
        crop, crop_label = augment.train(image, label, np.random.default_rng(n), data)
        inside = crop_label != 255
        differs = np.abs(crop[..., 0].astype(int) - crop_label * 25) > 12
        assert (differs & inside).mean() < 0.15
        assert inside.any()


def test_a_small_image_is_padded_with_the_mean_color_and_ignored_labels():
    data = dataclasses.replace(DATA, scale_range=(0.5, 0.5), flip=False, color=False)
    image = np.full((64, 96, 3), 200, np.uint8)
    label = np.full((64, 96), 7, np.uint8)
    crop, crop_label = augment.train(image, label, np.random.default_rng(0), data)
    assert (crop_label == 7).sum() == 32 * 48
    assert (crop[crop_label == 255] == np.round(np.array(data.mean) * 255)).all()
    assert (crop[crop_label == 7] == 200).all()


def test_base_size_is_the_image_size_at_scale_1():
    data = dataclasses.replace(DATA, base_size=(32, 48), scale_range=(1.0, 1.0), flip=False, color=False)
    _, crop_label = augment.train(
        np.zeros((64, 96, 3), np.uint8), np.zeros((64, 96), np.uint8), np.random.default_rng(0), data
    )
    assert (crop_label == 0).sum() == 32 * 48


def test_color_varies_in_the_documented_range():
    image = np.full((4, 4, 3), 100, np.uint8)
    grays = np.array([augment.vary_color(image, np.random.default_rng(n))[0, 0, 0] for n in range(2000)], int)
    untouched = (grays == 100).mean()
    assert 0.2 < untouched < 0.3  # neither brightness nor contrast changes, each with probability 1/2
    assert grays.min() >= 20
    assert grays.max() <= 230


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_evaluation_prefetches_at_most_one_image_per_worker(workers):
    """The number of images in memory does not grow with the dataset."""

    class Counting:
        started = 0

        def __len__(self):
            return 50

        def read(self, index):
            self.started += 1
            return np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.uint8)

    counting = Counting()
    for taken, _ in enumerate(val_stream(counting, World(), workers), 1):
        assert counting.started <= taken + workers
    assert counting.started == 50
