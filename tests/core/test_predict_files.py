"""What `ocrnet predict` looks at and how it cuts: names of results, tiles, and who decides a pixel."""

import numpy as np
import pytest

from ocrnet import cost, passes, predict
from ocrnet.config import Eval
from ocrnet.errors import OcrnetError
from ocrnet.images import write_png
from ocrnet.spec import Arch

ARCH = Arch(width=18, num_classes=4)


class Colours:
    """A model that answers each pixel's red value, and the shape of what it was shown."""

    arch = ARCH

    def __init__(self) -> None:
        self.shown: list[tuple[int, int]] = []

    def predict(self, image, scales, flip, slide):
        self.shown.append(image.shape[:2])
        return image[..., 0].copy()


def test_a_folders_results_have_unique_names(tmp_path):
    for name in ("a.png", "a.jpg", "deep/b.png", ".hidden.png", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert list(predict.find(tmp_path, tmp_path / "out")) == ["a.jpg", "a.png", "deep/b"]
    assert list(predict.find(tmp_path, tmp_path / "deep")) == ["a.jpg", "a.png"]


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(OcrnetError, match="does not exist"):
        predict.find(tmp_path / "no", "out")
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(OcrnetError, match=r"holds no images .* it holds note.txt"):
        predict.find(tmp_path, "out")


def test_a_small_image_is_looked_at_whole():
    model = Colours()
    labels, tiles = predict.label(model, np.zeros((300, 400, 3), np.uint8), Eval())
    assert (labels.shape, tiles, model.shown) == ((300, 400), 1, [(300, 400)])


@pytest.mark.parametrize("size", [(700, 900), (257, 1500), (1200, 301)])
def test_tiles_cover_every_pixel_once_and_stay_below_the_bound(size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    how = Eval(max_memory=0.1)
    model = Colours()
    labels, tiles = predict.label(model, image, how)
    np.testing.assert_array_equal(labels, image[..., 0])
    assert tiles == len(model.shown) > 1
    for shown in model.shown:
        side = predict.SMALLEST_TILE
        assert cost.predict_bytes(ARCH, shown) <= 0.1 * 2**30 or shown == (min(size[0], side), min(size[1], side))


def test_a_pixel_is_taken_from_the_tile_in_which_it_lies_further_inside():
    assert passes.cuts([0, 200, 300], 256, 556) == {0: (0, 228), 200: (228, 378), 300: (378, 556)}


def test_an_image_is_turned_upright(tmp_path):
    from PIL import Image

    from ocrnet.images import read_image

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    write_png(tmp_path / "b.png", np.zeros((20, 30, 3), np.uint8))
    assert read_image(tmp_path / "a.jpg", upright=True).shape == (30, 20, 3)
    assert read_image(tmp_path / "a.jpg").shape == (20, 30, 3)
    assert read_image(tmp_path / "b.png", upright=True).shape == (20, 30, 3)
