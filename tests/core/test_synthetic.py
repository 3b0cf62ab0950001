"""Synthetic scenes: the Cityscapes layout, reproducible bytes, all classes, and images that match their labels."""

import hashlib

import numpy as np
import pytest

from ocrnet.data.datasets import cityscapes, open_dataset, synthetic
from ocrnet.data.datasets.street import scene
from ocrnet.data.datasets.street.canvas import ID, Camera, Canvas
from ocrnet.data.image_io import read_image, read_label
from ocrnet.utils.errors import OcrnetError

SIZE = (96, 160)


def digests(root) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "new"
    synthetic.write(root, train=4, val=2, test=1, size=SIZE, seed=5)
    return root


def test_the_layout_is_that_of_cityscapes(root):
    assert list(digests(root))[:3] == [
        "gtFine/train/demo/demo_000000_000019_gtFine_color.png",
        "gtFine/train/demo/demo_000000_000019_gtFine_labelIds.png",
        "gtFine/train/demo/demo_000001_000019_gtFine_color.png",
    ]
    assert len(digests(root)) == 4 * 3 + 2 * 3 + 1
    assert not (root / "gtFine/test").exists()
    train = open_dataset("cityscapes", root, "train")
    assert [train.name(i) for i in (0, 3)] == ["demo/demo_000000_000019", "demo/demo_000003_000019"]
    image, label = train.read(0)
    assert image.shape == (*SIZE, 3)
    assert label.shape == SIZE
    assert len(open_dataset("cityscapes", root, "val")) == 2
    assert not open_dataset("cityscapes", root, "test", labels=False).labeled


def test_the_color_files_match_the_ids(root):
    folder = root / "gtFine/train/demo"
    ids, color = (read_label(folder / "demo_000000_000019_gtFine_labelIds.png"),
                   read_image(folder / "demo_000000_000019_gtFine_color.png"))  # fmt: skip
    for label in cityscapes.LABELS[:-1]:
        assert (color[ids == label.id] == label.color).all(), label.name


def test_the_same_seed_writes_the_same_bytes(root, tmp_path):
    synthetic.write(tmp_path / "again", train=4, val=2, test=1, size=SIZE, seed=5)
    assert digests(tmp_path / "again") == digests(root)


def test_a_scene_does_not_depend_on_how_many_are_written(root, tmp_path):
    synthetic.write(tmp_path / "fewer", train=2, val=1, test=0, size=SIZE, seed=5)
    few = digests(tmp_path / "fewer")
    assert len(few) == 9
    assert few.items() <= digests(root).items()


def test_seeds_splits_and_numbers_give_different_scenes(root, tmp_path):
    synthetic.write(tmp_path / "other", train=4, val=2, test=1, size=SIZE, seed=6)
    every = [*digests(root).values(), *digests(tmp_path / "other").values()]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("size", [(32, 64), (96, 160)])
def test_eight_consecutive_scenes_contain_every_class_and_ignored_ids(size):
    counts = np.zeros(256, int)
    for index in range(3, 11):
        image, ids = scene.draw(size, np.random.default_rng((9, index)), index=index)
        assert image.shape == (*size, 3)
        assert image.dtype == ids.dtype == np.uint8
        counts += np.bincount(ids.ravel(), minlength=256)
    table = cityscapes.classes()
    assert [name for name, i in zip(table.names, table.ids, strict=True) if counts[i] == 0] == []
    assert counts[ID["ego vehicle"]] > 0
    assert counts[ID["out of roi"]] > 0
    assert counts[[*table.ids, *table.ignored]].sum() == counts.sum()


@pytest.mark.parametrize("size", [(33, 65), (120, 70), (64, 400)])
def test_odd_sizes_are_drawn(size):
    image, ids = scene.draw(size, np.random.default_rng(1), index=2)
    assert image.shape == (*size, 3)
    assert len(np.unique(ids)) > 8


def test_classes_differ_in_color():
    """A network can learn from the scenes: the mean colors of large classes are far from each other."""
    image, ids = scene.draw((128, 256), np.random.default_rng(3), index=0)
    means = [image[ids == ID[name]].mean(0) for name in ("sky", "road", "vegetation", "ego vehicle")]
    for i, mean in enumerate(means):
        assert all(np.abs(mean - other).max() > 20 for other in means[:i])


def test_image_and_label_change_in_the_same_pixels():
    camera = Camera(focal=80, center=(30, 48))
    shapes = {
        "polygon": lambda brush: brush.polygon([(-2, 0, 4), (2, 0, 4), (3, 0, 9), (-1, 0, 9)], (9, 9, 9)),
        "panel": lambda brush: brush.panel(2, (0, 3), (4, 9), (9, 9, 9)),
        "plate": lambda brush: brush.plate((-0.01, 0.01), (0, 3), 40, (9, 9, 9)),
        "disc": lambda brush: brush.disc((1, 1, 5), 0.7, (9, 9, 9), squeeze=0.4),
        "stroke": lambda brush: brush.stroke([(-2, 0, 4), (0, 2, 4), (2, 0, 5)], 0.2, (9, 9, 9)),
    }
    for name, draw in shapes.items():
        canvas = Canvas((64, 96), camera, (255, 255, 255))
        draw(canvas.brush("car", 0.0))
        changed = canvas.label == ID["car"]
        assert changed.any(), name
        assert ((canvas.image == 9).all(-1) == changed).all(), name
        assert ((canvas.image == 0).all(-1) == ~changed).all(), name


def test_invalid_arguments_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    for root in ("full", "full/file"):
        with pytest.raises(OcrnetError, match=f"{root}' exists and is not an empty folder"):
            synthetic.write(tmp_path / root, train=1)
    for size in ((31, 64), (32, 63)):
        with pytest.raises(OcrnetError, match=f"{size[0]}x{size[1]} is too small; the minimum is 32x64"):
            synthetic.write(tmp_path / "new", size=size)
    with pytest.raises(OcrnetError, match="val: -1"):
        synthetic.write(tmp_path / "new", val=-1)
    with pytest.raises(OcrnetError, match="seed: -1"):
        synthetic.write(tmp_path / "new", seed=-1)
    assert not (tmp_path / "new").exists()
