"""Datasets of the `folder` layout: pairs by path, and an error for every mistake in classes.yml."""

import numpy as np
import pytest

from ocrnet.data.datasets import open_dataset
from ocrnet.data.image_io import write_png
from ocrnet.utils.errors import OcrnetError

IMAGE, LABEL = np.full((6, 8, 3), 90, np.uint8), np.zeros((6, 8), np.uint8)


@pytest.fixture
def own(tmp_path):
    root = tmp_path / "own"
    for name in ("deep/down/b", "a"):
        write_png(root / f"images/train/{name}.png", IMAGE)
        write_png(root / f"labels/train/{name}.png", LABEL)
    (root / "classes.yml").write_text("[road, sky]")
    return root


def open_error(root, split="train", **options) -> str:
    with pytest.raises(OcrnetError) as caught:
        open_dataset("folder", root, split, **options)
    return str(caught.value)


def test_pairs_are_found_at_any_depth_and_sorted(own):
    write_png(own / "images/train/c.JPG", IMAGE)  # a PNG with another extension is read by its content
    write_png(own / "labels/train/c.png", LABEL)
    (own / "images/train/.DS_Store").write_text("")
    (own / "images/train/readme.txt").write_text("")
    train = open_dataset("folder", own, "train")
    assert [train.name(i) for i in range(3)] == ["a", "c", "deep/down/b"]
    assert train.path(2) == own / "images/train/deep/down/b.png"
    assert train.labeled
    np.testing.assert_array_equal(train.read(1)[1], LABEL)


def test_linked_folders_are_followed(own, tmp_path):
    (own / "images").rename(tmp_path / "elsewhere")
    (own / "images").mkdir()
    (own / "images/train").symlink_to(tmp_path / "elsewhere/train", target_is_directory=True)
    assert len(open_dataset("folder", own, "train")) == 2


def test_two_images_for_one_label_are_refused(own):
    write_png(own / "images/train/a.jpg", IMAGE)
    message = open_error(own)
    assert "a.jpg and " in message
    assert "a.png have the same label file" in message


def test_missing_and_surplus_labels_are_listed(own):
    (own / "labels/train/a.png").rename(own / "labels/train/z.png")
    message = open_error(own)
    assert "1 of 2 images have no label" in message
    assert str(own / "labels/train/a.png") in message
    assert "1 of 2 labels have no image" in message
    assert str(own / "labels/train/z.png") in message
    assert len(open_dataset("folder", own, "train", labels=False)) == 2


def test_labels_that_are_not_png_are_listed(own):
    (own / "labels/train/a.png").rename(own / "labels/train/a.JPG")
    message = open_error(own)
    assert f"1 of 2 labels are not PNG files:\n  {own / 'labels/train/a.JPG'}" in message
    assert "export them again as PNG" in message


def test_wrong_layouts_are_refused_with_the_right_one(own):
    assert f"{own}/images/val does not exist; {own}/images holds train/" in open_error(own, "val")
    (own / "images/val").mkdir()
    (own / "labels/val").mkdir()
    message = open_error(own, "val")
    assert "images/val holds no images (.jpg" in message
    assert "DATASET_DIR/classes.yml" in message
    (own / "classes.yml").unlink()
    message = open_error(own)
    assert f"{own}/classes.yml does not exist; {own} holds images/, labels/" in message
    assert "classes.yml is a list of names" in message


# -- classes.yml


def table(own, text: str):
    (own / "classes.yml").write_text(text)
    return open_dataset("folder", own, "train").classes


def test_a_plain_list_gives_ids_and_colors_by_position(own):
    classes = table(own, "[road, sky, car]")
    assert classes.names == ("road", "sky", "car")
    assert classes.ids == (0, 1, 2)
    assert classes.ignored == {255}
    assert classes.palette == ((128, 0, 0), (0, 128, 0), (128, 128, 0))  # Pascal VOC's


def test_ids_colors_and_ignored_ids_can_be_given(own):
    classes = table(
        own,
        """
        classes:
          - {name: road, id: 7, color: [128, 0, 0]}
          - sky
          - {name: car, id: 0}
        ignore: [9, 255]
    """,
    )
    assert classes.ids == (7, 1, 0)
    assert classes.ignored == {9, 255}
    assert classes.palette[0] == (128, 0, 0)
    assert len(set(classes.palette)) == 3
    ids = np.array([[7, 1, 0, 9, 255]], np.uint8)
    np.testing.assert_array_equal(classes.to_indices(ids, "file"), [[0, 1, 2, 255, 255]])


def test_255_classes_have_255_colors(own):
    classes = table(own, str([f"c{i}" for i in range(255)]))
    assert len(set(classes.palette) | {(0, 0, 0)}) == 256


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "classes is None"),
        ("[]", "classes is [], not a list of at least one class"),
        ("classes: {}", "classes is {}"),
        ("just words", "str"),
        ("[road, sky", "YAML"),
        ("[road, sky, road]", "classes 0 and 2 have the same name, road"),
        ("[road, no]", "class 1 has the name False, which is not text"),
        ("[road, 3]", "class 1 has the name 3"),
        ("[road, ' ']", "class 1 has the name ' '"),
        ("[road, [sky]]", "class 1 has the name ['sky']"),
        ("[{id: 3}]", "class 0 has the name None"),
        ("[{name: road, id: 1}, sky]", "classes 0 and 1 have the same id, 1"),
        ("[{name: road, id: 255}]", "class 0 (road) has the id 255, not a whole number from 0 to 254"),
        ("[{name: road, id: -1}]", "the id -1"),
        ("[{name: road, id: 1.5}]", "the id 1.5"),
        ("[{name: road, id: '1'}]", "the id '1'"),
        ("[{name: road, id: True}]", "the id True"),
        ("[{name: road, color: [1, 2]}]", "class 0 (road) has the color [1, 2]"),
        ("[{name: road, color: [1, 2, 256]}]", "the color [1, 2, 256]"),
        ("[{name: road, color: red}]", "the color 'red'"),
        ("[{name: road, colr: [1, 2, 3]}]", "class 0 has the unknown key 'colr'; did you mean 'color'?"),
        ("[road: 1]", "class 0 has the unknown key 'road'"),
        ("{classes: [road], ignored: [1]}", "the file has the unknown key 'ignored'; did you mean 'ignore'?"),
        ("{classes: [road], ignore: 3}", "ignore is 3, not a list of ids"),
        ("{classes: [road], ignore: [256]}", "ignore is [256]"),
        ("{classes: [road], ignore: [x]}", "ignore is ['x']"),
        ("{classes: [road, sky], ignore: [1]}", "class 1 (sky) has the id 1, which is ignored"),
        (str([f"c{i}" for i in range(256)]), "256 classes; at most 255 are allowed"),
    ],
)
def test_every_mistake_in_classes_yml_is_named(own, text, expected):
    (own / "classes.yml").write_text(text)
    message = open_error(own)
    assert str(own / "classes.yml") in message
    assert expected in message
