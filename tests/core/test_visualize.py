import numpy as np
import pytest

from ocrnet.data import visualize

PALETTE = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
NAMES = ["road", "building", "sky"]


def test_overlay_blends_by_alpha_and_leaves_ignored_pixels():
    image = np.full((2, 3, 3), 100, np.uint8)
    indices = np.array([[0, 1, 2], [255, 255, 0]], np.uint8)
    original = image.copy()
    blended = visualize.overlay(image, indices, PALETTE)
    assert blended.dtype == np.uint8
    np.testing.assert_array_equal(blended[0], [[150, 50, 50], [50, 150, 50], [50, 50, 150]])
    np.testing.assert_array_equal(blended[1, :2], original[1, :2])
    np.testing.assert_array_equal(image, original)
    np.testing.assert_array_equal(visualize.overlay(image, indices, PALETTE, alpha=0), original)
    np.testing.assert_array_equal(visualize.overlay(image, indices, np.array(PALETTE), alpha=1)[0], PALETTE)


def test_overlay_refuses_wrong_shapes_dtypes_and_indices():
    image = np.zeros((4, 6, 3), np.uint8)
    with pytest.raises(ValueError, match=r"\(4, 6, 3\) and indices uint8 \(6, 4\)"):
        visualize.overlay(image, np.zeros((6, 4), np.uint8), PALETTE)
    with pytest.raises(ValueError, match="float32"):
        visualize.overlay(image.astype(np.float32), np.zeros((4, 6), np.uint8), PALETTE)
    with pytest.raises(ValueError, match="class index 3 has no color: the palette has 3 colors"):
        visualize.overlay(image, np.full((4, 6), 3, np.uint8), PALETTE)


def has_color(image, color):
    return bool((image == np.array(color, np.uint8)).all(axis=-1).any())


@pytest.mark.parametrize(("height", "width"), [(16, 8), (120, 160), (400, 700)])
def test_side_by_side_has_its_panels_and_a_legend_of_the_classes_in_them(height, width):
    image = np.full((height, width, 3), 100, np.uint8)
    prediction = np.zeros((height, width), np.uint8)
    label = np.where(np.arange(width) < width // 2, 1, 255)[None].repeat(height, 0).astype(np.uint8)
    with_label = visualize.side_by_side(image, prediction, label, palette=PALETTE, names=NAMES)
    without = visualize.side_by_side(image, prediction, None, palette=PALETTE, names=NAMES)
    assert with_label.dtype == np.uint8
    assert with_label.shape[0] > height
    gap = without.shape[1] - 2 * width
    assert 0 < gap < width
    assert with_label.shape[1] == 3 * width + 2 * gap

    last_row = with_label[height - 1]
    np.testing.assert_array_equal(last_row[:width], image[-1])
    np.testing.assert_array_equal(last_row[width + gap : 2 * width + gap], visualize.overlay(image, label, PALETTE)[-1])
    np.testing.assert_array_equal(last_row[2 * (width + gap) :], visualize.overlay(image, prediction, PALETTE)[-1])
    assert [has_color(with_label[height:], color) for color in PALETTE] == [True, True, False]
    assert [has_color(without[height:], color) for color in PALETTE] == [True, False, False]


def test_a_long_legend_takes_more_rows():
    image = np.zeros((100, 150, 3), np.uint8)
    indices = np.arange(100 * 150, dtype=np.uint64).reshape(100, 150) % 19
    palette = np.random.default_rng(0).integers(60, 220, (19, 3), dtype=np.uint8)
    names = [f"a rather long name {index}" for index in range(19)]
    many = visualize.side_by_side(image, indices.astype(np.uint8), None, palette=palette, names=names)
    one = visualize.side_by_side(image, np.zeros((100, 150), np.uint8), None, palette=palette, names=names)
    assert many.shape[0] - 100 > 5 * (one.shape[0] - 100)
    assert all(has_color(many[100:], color) for color in palette)


def test_an_image_of_only_ignored_pixels_is_drawn():
    image = np.full((50, 60, 3), 9, np.uint8)
    void = np.full((50, 60), 255, np.uint8)
    panels = visualize.side_by_side(image, void, void, palette=PALETTE, names=NAMES)
    np.testing.assert_array_equal(panels[49, -60:], image[49])
