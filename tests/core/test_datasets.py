"""Datasets: class tables, folder layouts, and the message for every error in them."""

import pickle
import typing

import numpy as np
import pytest

from ocrnet import config
from ocrnet.data.datasets import NAMES, ClassTable, Dataset, Pair, camvid, cityscapes, open_dataset
from ocrnet.data.image_io import write_png
from ocrnet.utils.errors import OcrnetError

IMAGE, LABEL = np.full((6, 8, 3), 90, np.uint8), np.zeros((6, 8), np.uint8)


@pytest.fixture
def streets(tmp_path):
    """A Cityscapes folder of two cities with three images each in train and val, and a test split without labels."""
    root = tmp_path / "streets"
    for split in ("train", "val", "test"):
        for city in ("ulm", "aachen"):
            for i in (2, 0, 1):
                name = f"{split}/{city}/{city}_{i:06d}_000019"
                write_png(root / f"leftImg8bit/{name}_leftImg8bit.png", IMAGE)
                if split != "test":
                    write_png(root / f"gtFine/{name}_gtFine_labelIds.png", LABEL + 7)
                    write_png(root / f"gtFine/{name}_gtFine_color.png", IMAGE)
    return root


@pytest.fixture
def own(tmp_path):
    root = tmp_path / "own"
    for split in ("train", "val"):
        for name in ("deep/down/b", "a"):
            write_png(root / f"images/{split}/{name}.png", IMAGE)
            write_png(root / f"labels/{split}/{name}.png", LABEL)
    (root / "classes.yml").write_text("[road, sky]")
    return root


def open_error(name, root, split="train", **options) -> str:
    with pytest.raises(OcrnetError) as caught:
        open_dataset(name, root, split, **options)
    return str(caught.value)


def test_dataset_names_match_the_config():
    assert typing.get_args(config.Data.__dataclass_fields__["name"].type) == NAMES


# -- the table of classes


TABLE = ClassTable(
    names=("road", "sky"), palette=((1, 2, 3), (4, 5, 6)), ids=(7, 23), ignored=frozenset({0, 255}), ignored_id=0
)


def test_ids_convert_to_indices_and_back():
    ids = np.array([[7, 23, 0, 255]], np.uint8)
    indices = TABLE.to_indices(ids, "file")
    assert indices.dtype == np.uint8
    np.testing.assert_array_equal(indices, [[0, 1, 255, 255]])
    np.testing.assert_array_equal(TABLE.to_ids(indices), [[7, 23, 0, 0]])
    np.testing.assert_array_equal(TABLE.color(indices), [[(1, 2, 3), (4, 5, 6), (0, 0, 0), (0, 0, 0)]])
    assert TABLE.to_ids(indices).dtype == TABLE.color(indices).dtype == np.uint8
    assert len(TABLE) == 2


def test_an_unknown_id_is_named_with_its_file():
    with pytest.raises(OcrnetError, match=r"the_file.png holds the unknown id 8, 99; known ids: 7, 23 .* 0, 255"):
        TABLE.to_indices(np.array([[7, 8], [99, 8]], np.uint8), "the_file.png")


def test_an_index_without_a_class_is_refused():
    for turn in (TABLE.to_ids, TABLE.color):
        with pytest.raises(ValueError, match="class index 2 is out of range; allowed: 0 to 1 and 255"):
            turn(np.array([[0, 2, 255]], np.uint8))


def test_a_class_table_can_be_pickled():
    TABLE.to_indices(np.array([[7]], np.uint8), "file")
    assert pickle.loads(pickle.dumps(TABLE)) == TABLE


def test_a_class_table_holds_255_classes():
    table = ClassTable(tuple(map(str, range(255))), ((0, 0, 0),) * 255, tuple(range(255)), frozenset({255}))
    ids = np.arange(256, dtype=np.uint8)[None]
    np.testing.assert_array_equal(table.to_indices(ids, "file"), ids)
    np.testing.assert_array_equal(table.to_ids(ids), ids)


# -- Cityscapes


def test_every_cityscapes_id_is_mapped():
    table = cityscapes.classes()
    indices = table.to_indices(np.array([[*range(34), 255]], np.uint8), "file")[0]
    expected = {label.id % 256: label.train_id for label in cityscapes.LABELS}
    assert dict(zip([*range(34), 255], indices.tolist(), strict=True)) == expected
    with pytest.raises(OcrnetError, match="holds the unknown id 34"):
        table.to_indices(np.array([[34]], np.uint8), "file")


def test_cityscapes_is_read_sorted_by_name(streets):
    for root in (streets, str(streets)):
        train = open_dataset("cityscapes", root, "train")
        assert len(train) == 6
        assert train.labeled
        assert [train.name(i) for i in (0, 2, 3)] == [
            "aachen/aachen_000000_000019", "aachen/aachen_000002_000019", "ulm/ulm_000000_000019",
        ]  # fmt: skip
    assert train.path(0) == streets / "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    image, label = train.read(0)
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(label, LABEL)  # road: id 7, index 0


def test_a_split_without_labels_opens_without_them(streets):
    test = open_dataset("cityscapes", streets, "test", labels=False)
    assert len(test) == 6
    assert not test.labeled
    np.testing.assert_array_equal(test.image(5), IMAGE)
    with pytest.raises(OcrnetError, match=r"aachen_000000_000019_leftImg8bit.png was opened without a label"):
        test.read(0)
    assert "gtFine/test does not exist; " in open_error("cityscapes", streets, "test")


def test_missing_and_surplus_files_are_listed_in_one_error(streets):
    (streets / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    (streets / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png").unlink()
    (streets / "leftImg8bit/train/aachen/aachen_000002_000019_leftImg8bit.png").unlink()
    message = open_error("cityscapes", streets)
    assert "2 of 5 images have no label" in message
    assert str(streets / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png") in message
    assert "ulm_000001_000019_gtFine_labelIds.png" in message
    assert "1 of 4 labels have no image" in message
    assert "aachen_000002_000019_gtFine_labelIds.png" in message


def test_a_long_list_of_missing_files_is_shortened(streets):
    for i in range(10, 30):
        write_png(streets / f"leftImg8bit/train/ulm/ulm_{i:06d}_000019_leftImg8bit.png", IMAGE)
    message = open_error("cityscapes", streets)
    assert "20 of 26 images have no label" in message
    assert message.count("_gtFine_labelIds.png") == 10
    assert "and 10 more" in message


def test_hidden_files_are_ignored(streets):
    (streets / "leftImg8bit/train/ulm/._ulm_000000_000019_leftImg8bit.png").write_bytes(b"left by a Mac")
    assert len(open_dataset("cityscapes", streets, "train")) == 6


def test_a_wrong_root_is_refused_with_the_expected_layout(streets, tmp_path):
    for root in (tmp_path / "nowhere", "your cityscapes", ""):
        message = open_error("cityscapes", root)
        assert f"data.dataset_dir: '{root}' does not exist" in message
        assert "config/cityscapes.yml" in message
        assert "--set data.dataset_dir=" in message
        assert "leftImg8bit/SPLIT/CITY" in message
    (tmp_path / "file").write_text("")
    assert "file' is not a folder" in open_error("cityscapes", tmp_path / "file")
    assert "config/cityscapes.yml" not in open_error("camvid", tmp_path / "nowhere")


def test_a_root_one_folder_off_is_refused_with_the_right_one(streets):
    for wrong in (streets / "leftImg8bit", streets.parent, streets / "leftImg8bit/train"):
        message = open_error("cityscapes", wrong)
        assert f"{wrong}/leftImg8bit does not exist; {wrong} holds " in message
        assert f"did you mean data.dataset_dir={streets}?" in message
        assert "gtFine/SPLIT/CITY" in message


def test_a_wrong_or_empty_split_is_refused_with_the_folder_contents(streets):
    assert "leftImg8bit holds test/, train/, val/" in open_error("cityscapes", streets, "valid")
    (streets / "leftImg8bit/none").mkdir()
    (streets / "gtFine/none").mkdir()
    message = open_error("cityscapes", streets, "none")
    assert "leftImg8bit/none holds no CITY/*_leftImg8bit.png; it holds nothing" in message
    write_png(streets / "leftImg8bit/none/lost_leftImg8bit.png", IMAGE)
    assert "it holds lost_leftImg8bit.png" in open_error("cityscapes", streets, "none", labels=False)


def test_an_unknown_dataset_suggests_the_nearest(tmp_path):
    assert "'cityscape' is not a known dataset; did you mean 'cityscapes'?" in open_error("cityscape", tmp_path)


# -- one sample


def test_different_sizes_of_image_and_label_are_refused(tmp_path):
    write_png(tmp_path / "image.png", IMAGE)
    write_png(tmp_path / "label.png", LABEL.T)
    dataset = Dataset(TABLE, [Pair("one", tmp_path / "image.png", tmp_path / "label.png")], tmp_path)
    with pytest.raises(OcrnetError, match=r"image.png is 6x8 .*label.png 8x6"):
        dataset.read(0)


def test_an_unknown_id_in_a_file_is_named(streets):
    path = streets / "gtFine/val/ulm/ulm_000002_000019_gtFine_labelIds.png"
    write_png(path, LABEL + 77)
    with pytest.raises(OcrnetError, match=r"ulm_000002_000019_gtFine_labelIds.png holds the unknown id 77"):
        open_dataset("cityscapes", streets, "val").read(5)


# -- CamVid


def test_camvid_ignores_its_last_id(own):
    write_png(own / "labels/train/a.png", np.arange(12, dtype=np.uint8).repeat(4).reshape(6, 8))
    train = open_dataset("camvid", own, "train")
    assert train.classes.names[:3] == ("sky", "building", "pole")
    assert len(train.classes) == 11
    label = train.read(0)[1]
    assert sorted(np.unique(label)) == [*range(11), 255]
    assert train.classes.to_ids(label).max() == camvid.UNLABELED
    write_png(own / "labels/train/a.png", LABEL + 12)
    with pytest.raises(OcrnetError, match=r"holds the unknown id 12; known ids: 0-10 .* 11"):
        train.read(0)


def test_a_wrong_camvid_root_is_refused_with_the_expected_layout(tmp_path):
    (tmp_path / "CamVid").mkdir()
    message = open_error("camvid", tmp_path / "CamVid")
    assert "CamVid/images does not exist" in message
    assert "images/SPLIT/NAME.jpg" in message
    assert "classes.yml" not in message


def test_ignore_label_is_ignored_in_addition_to_the_ids_of_the_layout(tmp_path):
    for split_file in ("images/train/a.png", "labels/train/a.png"):
        write_png(tmp_path / split_file, np.array([[0, 1, 9, 255]], np.uint8))
    (tmp_path / "classes.yml").write_text("[road, sky]")
    with pytest.raises(OcrnetError, match="holds the unknown id 9"):
        open_dataset("folder", tmp_path, "train").read(0)
    _, label = open_dataset("folder", tmp_path, "train", ignore_label=9).read(0)
    assert label.tolist() == [[0, 1, 255, 255]]
    with pytest.raises(OcrnetError, match=r"data\.ignore_label: 1 is the id of the class 'sky'"):
        open_dataset("folder", tmp_path, "train", ignore_label=1)
