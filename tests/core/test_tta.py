"""Passes: sliding windows cover every pixel, overlap by at least a third, and stay inside the image."""

import itertools

import numpy as np
import pytest

from ocrnet.config import Eval
from ocrnet.engines.tta import make_passes, make_windows


def test_the_default_is_one_pass_over_the_whole_image():
    (one,) = make_passes(Eval(), (360, 480))
    assert (one.size, one.flip, one.windows) == ((360, 480), False, ((0, 0, 360, 480),))


def test_each_scale_has_a_pass_and_a_mirrored_pass():
    passes = make_passes(Eval(scales=(0.5, 1.0, 1.75), flip=True), (1024, 2048))
    assert [(p.size, p.flip) for p in passes] == [
        ((512, 1024), False), ((512, 1024), True), ((1024, 2048), False), ((1024, 2048), True),
        ((1792, 3584), False), ((1792, 3584), True),
    ]  # fmt: skip


def test_base_size_replaces_the_image_size():
    (one,) = make_passes(Eval(scales=(0.5,)), (375, 1242), base_size=(512, 1024))
    assert one.size == (256, 512)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (100, 300), (33, 1000), (40, 50)])
@pytest.mark.parametrize("window", [(64, 64), (48, 96), (1000, 1000)])
def test_windows_cover_the_image_and_overlap_by_a_third(size, window):
    count = np.zeros(size, int)
    windows = make_windows(size, window)
    for top, left, height, width in windows:
        assert top >= 0
        assert left >= 0
        assert (height, width) == (min(size[0], window[0]), min(size[1], window[1]))
        part = count[top : top + height, left : left + width]
        assert part.shape == (height, width)
        part += 1
    assert count.min() >= 1
    assert len(set(windows)) == len(windows)
    tops = sorted({top for top, *_ in windows})
    assert all(later - earlier <= windows[0][2] * 2 // 3 for earlier, later in itertools.pairwise(tops))
