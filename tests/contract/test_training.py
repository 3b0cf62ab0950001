"""The contract of every engine for training: state, steps, skipped steps, decay groups, the mean over micro-batches."""

import numpy as np
import pytest
from tiny import ARCH, MemoryStream

from ocrnet import architecture
from ocrnet.engines import lr_schedule
from ocrnet.utils.errors import OcrnetError


def weights(state):
    return {name: array for name, array in state.items() if "/" not in name and not architecture.is_buffer(name)}


def gradients(state):
    """Return the momentum as one vector; after one step from zero momentum, it is the gradient."""
    return np.concatenate([array.ravel() for name, array in state.items() if name.startswith("momentum/")])


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_state_has_the_canonical_names_and_shapes(make_engine):
    state = make_engine(MemoryStream()).state()
    shapes = architecture.shapes(ARCH)
    parameters = {name: shape for name, shape in shapes.items() if not architecture.is_buffer(name)}
    expected = shapes | {f"momentum/{name}": shape for name, shape in parameters.items()}
    assert {name: array.shape for name, array in state.items()} == expected
    assert {array.dtype for array in state.values()} == {np.dtype(np.float32)}


def test_the_state_can_be_saved_and_restored_unchanged(make_engine):
    engine = make_engine(MemoryStream())
    engine.train(2)
    state = engine.state()
    other = make_engine(MemoryStream(), fresh=False)
    other.restore(state, 2)
    assert same(other.state(), state)


@pytest.mark.compiled(long=True)
def test_a_restored_run_continues_bit_for_bit(make_engine):
    whole = make_engine(MemoryStream())
    first = whole.train(3)
    middle = whole.state()
    rest = whole.train(3)
    resumed = make_engine(MemoryStream(), fresh=False)
    resumed.restore(middle, 3)
    np.testing.assert_array_equal(resumed.train(3).loss, rest.loss)
    assert same(resumed.state(), whole.state())
    assert not np.array_equal(first.loss, rest.loss)


def test_the_number_of_workers_does_not_change_the_losses(make_engine):
    without_workers, with_workers = make_engine(MemoryStream()), make_engine(MemoryStream(), num_workers=2)
    np.testing.assert_array_equal(without_workers.train(3).loss, with_workers.train(3).loss)
    with_workers.close()


def test_stats_describe_the_segment(make_engine):
    stats = make_engine(MemoryStream(), accumulate_steps=2).train(3)
    assert stats.loss.shape == (3, 2)
    assert stats.loss.dtype == np.float64
    assert stats.finite.all()
    assert stats.samples == 3 * 2 * 2
    assert 0 <= stats.data_seconds <= stats.seconds
    assert stats.memory_bytes > 0


@pytest.mark.compiled
def test_a_step_that_is_not_finite_changes_nothing_but_is_counted(make_engine):
    engine = make_engine(MemoryStream())
    engine.train(2)
    good = engine.state()
    engine.restore(good | {"cls_head.bias": np.full(5, np.inf, np.float32)}, 2)
    before = engine.state()
    stats = engine.train(2)
    assert not stats.finite.any()
    assert same(engine.state(), before)
    engine.restore(good, 4)
    assert engine.train(1).finite.all()
    after = engine.state()
    moved = [name for name in good if architecture.is_buffer(name) or name.startswith("momentum/")]
    assert not [name for name in moved if np.array_equal(after[name], good[name])]


def test_a_sample_that_is_not_finite_only_skips_its_step(make_engine):
    class Poisoned(MemoryStream):
        def __getitem__(self, number):
            sample = super().__getitem__(number)
            image = sample.image.astype(np.float32)
            image[3, 5] = np.nan if number == 5 else image[3, 5]  # samples 4 and 5 are the third step
            return sample._replace(image=image)

    engine = make_engine(Poisoned(), schedule="poly")
    engine.train(2)
    before = engine.state()
    assert engine.train(1).finite.tolist() == [False]
    assert same(engine.state(), before)
    assert engine.train(2).finite.all()
    assert all(np.isfinite(array).all() for array in engine.state().values())


def test_a_failed_step_keeps_the_steps_before_it(make_engine):
    class Broken(MemoryStream):
        def __getitem__(self, number):
            if number == 5:  # samples 4 and 5 are the third step
                raise OcrnetError("a file is broken")
            return super().__getitem__(number)

    engine, sound = make_engine(Broken()), make_engine(MemoryStream())
    assert np.array_equal(engine.train(5).loss, sound.train(2).loss)
    for _ in range(2):
        with pytest.raises(OcrnetError, match="a file is broken"):
            engine.train(5)
    assert same(engine.state(), sound.state())


def test_without_any_valid_pixel_loss_and_gradient_are_zero(make_engine):
    engine = make_engine(MemoryStream(label=255), weight_decay=0.0)
    before = weights(engine.state())
    stats = engine.train(1)
    assert stats.finite.all()
    assert (stats.loss == 0).all()
    assert same(weights(engine.state()), before)


@pytest.mark.parametrize("mode", architecture.DECAYS)
def test_weight_decay_acts_only_on_its_group(make_engine, mode):
    engine = make_engine(MemoryStream(label=255), weight_decay=0.1, decay=mode, momentum=0.0, lr_init=0.5)
    before = weights(engine.state())
    for array in before.values():
        array += 0.25  # so that no parameter is zero, which weight decay would not change
    engine.restore(engine.state() | before, 0)
    engine.train(1)
    for name, array in weights(engine.state()).items():
        factor = 1 - 0.5 * 0.1 if architecture.decays(name, mode) else 1.0
        np.testing.assert_allclose(array, before[name] * factor, rtol=1e-6, err_msg=name)


def test_steps_follow_sgd_with_momentum(make_engine):
    engine = make_engine(MemoryStream(), weight_decay=0.0, momentum=0.9, lr_init=0.02)
    rate = lr_schedule.table(engine.cfg)
    states = [engine.state()]
    for _ in range(2):
        engine.train(1)
        states.append(engine.state())
    for name in weights(states[0]):
        for step in (0, 1):
            moved = states[step][name] - rate[step] * states[step + 1][f"momentum/{name}"]
            np.testing.assert_allclose(states[step + 1][name], moved, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.compiled(long=True)
def test_clip_grad_bounds_the_step(make_engine):
    def first_momentum(clip_grad):
        engine = make_engine(MemoryStream(), weight_decay=0.0, momentum=0.9, clip_grad=clip_grad)
        engine.train(1)
        return gradients(engine.state())

    free, clipped, unbound = first_momentum(None), first_momentum(0.5), first_momentum(1e6)
    norm = np.linalg.norm(free)
    assert norm > 0.5
    np.testing.assert_allclose(clipped, free * 0.5 / norm, rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(unbound, free)


@pytest.mark.compiled(long=True)
def test_micro_batches_give_the_mean_of_the_whole_batch(make_engine):
    """All images are equal, so that batch norm has the same statistics; only the labels differ."""
    options = {"weight_decay": 0.0, "momentum": 0.9}
    whole = make_engine(MemoryStream(same_image=True), batch_size=2, **options)
    parts = make_engine(MemoryStream(same_image=True), batch_size=1, accumulate_steps=2, **options)
    expected, found = whole.train(1).loss, parts.train(1).loss
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    gradient = gradients(whole.state())
    assert np.linalg.norm(gradients(parts.state()) - gradient) < 5e-3 * np.linalg.norm(gradient)
    # The negative control: the mean of the local means differs, because 5 % and 70 % of the pixels are valid.
    single = make_engine(MemoryStream(same_image=True), batch_size=1, lr_init=0.0, end_lr=0.0, **options)
    losses, momenta = [], [np.zeros_like(gradient)]
    for _ in range(2):
        losses.append(single.train(1).loss[0])
        momenta.append(gradients(single.state()) - 0.9 * momenta[-1])
    assert np.abs(np.mean(losses, axis=0) / expected[0] - 1).min() > 1e-4
    assert np.linalg.norm(np.mean(momenta[1:], axis=0) - gradient) > 5e-2 * np.linalg.norm(gradient)


def test_dropout_masks_of_the_stream_are_used(make_engine):
    class Dropping(MemoryStream):
        def __getitem__(self, number):
            return super().__getitem__(number)._replace(dropout_mask=np.zeros(16, bool))

    kept, dropped = make_engine(MemoryStream()), make_engine(Dropping())
    assert kept.train(1).loss[0, 1] != dropped.train(1).loss[0, 1]


def test_ohem_increases_the_loss_of_the_ocr_head(make_engine):
    from ocrnet.config import Loss

    plain = make_engine(MemoryStream())
    mined = make_engine(MemoryStream(), loss=Loss(ohem=True, ohem_min_kept=100, ohem_threshold=0.3))
    assert mined.train(1).loss[0, 1] > plain.train(1).loss[0, 1]
