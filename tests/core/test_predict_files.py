"""`ocrnet predict`: sources, tiles and results, with a stand-in model that predicts from the colors of an image."""

import json
import os
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from ocrnet.architecture import Arch, flops
from ocrnet.config import Eval
from ocrnet.data.datasets import cityscapes
from ocrnet.data.image_io import read_image, read_label, write_png
from ocrnet.engines import tta
from ocrnet.predict import predictor, sources, tiles, video
from ocrnet.predict.predictor import Job
from ocrnet.predict.progress import Progress, duration
from ocrnet.predict.writers import Areas, Painter, parse_save
from ocrnet.utils import log
from ocrnet.utils.errors import OcrnetError

ARCH = Arch(width=18, num_classes=4)


class Colors:
    """Predicts the red value of each pixel, with confidence green / 255; `sizes` lists the sizes of its inputs."""

    arch = ARCH
    names = ("road", "sky", "car", "tree")
    palette = ((128, 64, 128), (70, 130, 180), (0, 0, 142), (107, 142, 35))

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def outputs(self, image, outputs, scales, flip, slide):
        self.sizes.append(image.shape[:2])
        maps = {"labels": image[..., 0].copy(), "confidence": image[..., 1] / np.float32(255)}
        return {name: maps[name] for name in outputs}


class Quarters(Colors):
    """Predicts one of four classes: the quarter of 0 to 255 that contains the red value."""

    def outputs(self, image, outputs, scales, flip, slide):
        maps = super().outputs(image, outputs, scales, flip, slide)
        return maps | {"labels": maps["labels"] // 64}


def run(source, output, *, model=None, **changes) -> predictor.Report:
    job = Job(model or Quarters(), output, Eval(), **changes)
    return predictor.predict(job, sources.find(str(source), output))


def names(source, output="out") -> list[str]:
    return [entry.name for entry in sources.find(str(source), output)]


# --- sources


def test_results_of_a_folder_have_unique_names(tmp_path):
    for name in ("a.png", "a.jpg", "deep/b.png", "deep/film.mp4", ".hidden.png", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert names(tmp_path, tmp_path / "out") == ["a.jpg", "a.png", "deep/b", "deep/film"]
    assert names(tmp_path, tmp_path / "deep") == ["a.jpg", "a.png"]
    assert [entry.kind for entry in sources.find(str(tmp_path), "out")] == ["image", "image", "image", "video"]
    (tmp_path / "a.jpg.png").write_bytes(b"x")
    assert names(tmp_path) == ["a.jpg", "a.jpg.png", "a.png", "deep/b.png", "deep/film.mp4"]


def test_two_sources_never_write_the_same_file(tmp_path):
    for name in ("a.mp4", "a/000000.png", "b.jpg", "b.png/x.jpg", "c.jpg", "c.png.mp4", "d.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert names(tmp_path) == ["a/000000", "a.mp4", "b.jpg", "b.png/x", "c.jpg", "c.png.mp4", "d"]
    for name in ("e.jpg", "e.jpg.jpg", "e.png", "e.jpg.png/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(OcrnetError, match=r"'.*e\.jpg' and another source would write the same file; rename one"):
        names(tmp_path)


def test_a_pattern_finds_images_and_videos(tmp_path):
    for name in ("p/a.png", "p/b.jpg", "p/deep/a.png", "p/deep/c.mov", "p/.a.png", "p/note.txt", "p/x[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"x")
    assert names(tmp_path / "p/*") == ["a", "b", "x[1]"]
    assert names(tmp_path / "p/**/[ac].*") == ["a", "deep/a", "deep/c"]
    assert names(tmp_path / "*/a.png") == ["p/a"]
    assert names(tmp_path / "p/x[1].png") == ["x[1]"]  # a file with this name has precedence over the pattern
    with pytest.raises(OcrnetError, match=r"'.*\*\.bmp' matches no images"):
        names(tmp_path / "p/*.bmp")


def test_missing_sources_are_refused(tmp_path):
    with pytest.raises(OcrnetError, match="does not exist; use an image, a video, a folder, a quoted pattern"):
        names(tmp_path / "no")
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(OcrnetError, match=r"holds no images .* it holds note.txt"):
        names(tmp_path)


def test_the_kind_of_a_file_follows_its_content(tmp_path):
    film(tmp_path / "film.mp4", 2)
    os.rename(tmp_path / "film.mp4", tmp_path / "film.dat")
    write_png(tmp_path / "photo.png", np.zeros((20, 30, 3), np.uint8))
    os.rename(tmp_path / "photo.png", tmp_path / "photo")
    (tmp_path / "text.txt").write_text("no image\n" * 100)
    kinds = [sources.find(str(tmp_path / name), "out")[0].kind for name in ("film.dat", "photo", "text.txt")]
    assert kinds == ["video", "image", "image"]


def test_a_playlist_is_refused_as_a_video(tmp_path):
    film(tmp_path / "film.ts.mp4", 12)
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path / 'film.ts.mp4'}'\n")
    with pytest.raises(OcrnetError, match=r"list\.mp4 is damaged or not a video"):
        run(tmp_path / "list.mp4", tmp_path / "out")


# --- tiles


def test_a_small_image_is_predicted_whole():
    model = Colors()
    prediction = tiles.predict_tiled(model, np.zeros((300, 400, 3), np.uint8), Eval())
    assert (prediction.labels.shape, prediction.tiles, model.sizes) == ((300, 400), 1, [(300, 400)])
    assert prediction.confidence is None


@pytest.mark.parametrize("size", [(700, 900), (257, 1500), (1200, 301)])
def test_tiles_cover_every_pixel_and_stay_below_the_memory_limit(size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    eval_cfg = Eval(max_memory=0.1)
    model, steps = Colors(), []
    prediction = tiles.predict_tiled(model, image, eval_cfg, confidence=True, step=lambda *at: steps.append(at))
    np.testing.assert_array_equal(prediction.labels, image[..., 0])
    np.testing.assert_array_equal(prediction.confidence, image[..., 1])
    assert prediction.tiles == len(model.sizes) > 1
    assert steps == [(i + 1, prediction.tiles) for i in range(prediction.tiles)]
    for tile in model.sizes:
        side = tiles.SMALLEST_TILE
        assert flops.predict_bytes(ARCH, tile) <= 0.1 * 2**30 or tile == (min(size[0], side), min(size[1], side))


def test_a_pixel_is_taken_from_the_tile_in_which_it_lies_further_inside():
    assert tta.cuts([0, 200, 300], 256, 556) == {0: (0, 228), 200: (228, 378), 300: (378, 556)}


# --- kinds of image files

IMAGE = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8), (40, 24))
PILLOW = Image.fromarray(IMAGE)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_an_image_is_turned_upright(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name.endswith("webp") else {}
    PILLOW.save(tmp_path / name, exif=exif, **options)
    turn = {3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270,
            8: Image.Transpose.ROTATE_90}[orientation]  # fmt: skip
    read = read_image(tmp_path / name, upright=True)
    upright = np.asarray(PILLOW.transpose(turn))
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).mean() < (12 if name.endswith("jpg") else 0.1)
    if not name.endswith("tif"):  # libtiff always applies the orientation
        assert read_image(tmp_path / name).shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [
        ("gray.png", "L", 0), ("gray.jpg", "L", 1), ("gray.tif", "L", 0), ("alpha.png", "RGBA", 0),
        ("alpha.webp", "RGBA", 0), ("gray_alpha.png", "LA", 0), ("palette.png", "P", 0), ("palette.tif", "P", 0),
        ("palette.bmp", "P", 0), ("bits.png", "1", 0), ("cmyk.jpg", "CMYK", 2), ("cmyk.tif", "CMYK", 0),
    ],
)  # fmt: skip
def test_every_kind_of_image_is_predicted_as_pillow_shows_it(tmp_path, name, mode, tolerance):
    stored = PILLOW.convert(mode)
    stored.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {"quality": 95}))
    shown = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    report = run(tmp_path / name, tmp_path / "out", model=Quarters(), save=("indices", "side"))
    assert report.written == 1
    left = read_image(tmp_path / f"out/side/{name.partition('.')[0]}.png")[:, :40]
    assert np.abs(left.astype(int) - shown).max(initial=0) <= tolerance * 3
    assert np.abs(left.astype(int) - shown).mean() <= tolerance


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep_gray.png", "deep_gray.tif"])
def test_16_bits_are_scaled_to_8_bits(tmp_path, name):
    deep = IMAGE[..., 0] if "gray" in name else IMAGE
    stored = deep.astype(np.uint16) * 256 + 129
    assert cv2.imwrite(str(tmp_path / name), stored if "gray" in name else stored[..., ::-1])
    shown = np.stack([deep] * 3, -1) if "gray" in name else deep
    np.testing.assert_array_equal(read_image(tmp_path / name, upright=True), shown)


# --- results


def test_every_kind_of_result_is_written(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 90, 3), np.uint8)
    write_png(tmp_path / "in/a.png", image)
    kinds = parse_save("overlay, indices,color,side,confidence,json,overlay")
    assert kinds == ("overlay", "indices", "color", "side", "confidence", "json")
    run(tmp_path / "in/a.png", tmp_path / "out", save=kinds)
    labels = image[..., 0] // 64
    np.testing.assert_array_equal(read_label(tmp_path / "out/indices/a.png"), labels)
    np.testing.assert_array_equal(read_image(tmp_path / "out/color/a.png"), np.array(Colors.palette)[labels])
    np.testing.assert_array_equal(read_label(tmp_path / "out/confidence/a.png"), image[..., 1])
    overlay = read_image(tmp_path / "out/overlay/a.png")
    assert np.abs(overlay - (image / 2 + np.array(Colors.palette)[labels] / 2)).max() <= 0.5
    np.testing.assert_array_equal(read_image(tmp_path / "out/side/a.png"), np.concatenate([image, overlay], axis=1))
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*kinds[:-1], "areas.json", "legend.png"])


def test_the_default_results_are_written(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((20, 30, 3), np.uint8))
    run(tmp_path / "a.png", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["areas.json", "color", "indices", "legend.png", "overlay"]


def test_images_written_in_strips_equal_those_written_whole(tmp_path, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (61, 90, 3), np.uint8)
    write_png(tmp_path / "a.png", image)
    for name, pixels in (("whole", 2**22), ("strips", 90 * 7)):
        monkeypatch.setattr("ocrnet.data.image_io.STRIP_PIXELS", pixels)
        run(tmp_path / "a.png", tmp_path / name, save=("overlay", "indices", "color", "side", "confidence", "json"))
    for path in (tmp_path / "whole").glob("*/a.png"):
        other = tmp_path / "strips" / path.relative_to(tmp_path / "whole")
        np.testing.assert_array_equal(read_image(other), read_image(path), err_msg=str(path))
        np.testing.assert_array_equal(np.asarray(Image.open(other)), np.asarray(Image.open(path)), err_msg=str(path))
    assert (tmp_path / "whole/areas.json").read_text() == (tmp_path / "strips/areas.json").read_text()


def test_label_ids_are_only_for_cityscapes(tmp_path):
    model = Quarters()
    model.names = cityscapes.classes().names
    labels = np.array([[0, 18], [255, 7]], np.uint8)
    assert Painter(model, ("labelIds",)).paint("labelIds", labels, labels, None).tolist() == [[7, 33], [0, 20]]
    with pytest.raises(OcrnetError, match="--save labelIds: the classes of this network are not the 19 of Cityscapes"):
        Painter(Quarters(), ("labelIds",))


@pytest.mark.parametrize(
    ("text", "message"),
    [("ovrelay", "did you mean 'overlay'"), (",", "list one or more of overlay"), ("all", "not one of")],
)
def test_an_unknown_kind_of_result_is_refused(text, message):
    with pytest.raises(OcrnetError, match=message):
        parse_save(text)


def test_areas_match_the_written_indices(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_png(tmp_path / f"in/{name}.png", rng.integers(0, 256, (40, 50, 3), np.uint8))
    report = run(tmp_path / "in", tmp_path / "out")
    areas = json.loads((tmp_path / "out/areas.json").read_text())
    assert areas["classes"] == list(Colors.names)
    assert areas["whole"] is True
    total = np.zeros(4, int)
    for row in areas["images"]:
        counts = np.bincount(read_label(tmp_path / f"out/indices/{row['name']}.png").reshape(-1), minlength=4)
        assert row["pixels"] == {name: int(n) for name, n in zip(Colors.names, counts, strict=True)}
        assert row["share"] == {name: round(n / 2000, 6) for name, n in row["pixels"].items()}
        assert (row["source"], row["height"], row["width"]) == (str(tmp_path / f"in/{row['name']}.png"), 40, 50)
        total += counts
    assert [areas["all"]["pixels"][name] for name in Colors.names] == total.tolist() == report.areas.total.tolist()
    assert "% of the pixels" in predictor.text(report)


def test_a_name_that_is_not_utf8_is_escaped_and_the_rest_is_written(tmp_path, capsys):
    write_png(tmp_path / "in/ok.png", np.zeros((20, 30, 3), np.uint8))
    odd = os.fsdecode(b"\xff\xfe\n")
    for end in (".png", ".mp4"):
        shutil.copy(tmp_path / "in/ok.png", f"{tmp_path}/in/{odd}{end}")
    log.open_console()
    report = run(tmp_path / "in", tmp_path / "out")
    assert report.written == 2
    assert "has a name that is not valid UTF-8" in report.problems[0]
    areas = json.loads((tmp_path / "out/areas.json").read_text())
    assert [row["name"] for row in areas["images"]] == ["ok", f"{odd}.png"]
    assert os.path.exists(f"{tmp_path}/out/indices/{odd}.png.png")
    stdout = capsys.readouterr().out
    assert f"{tmp_path}/in/\\udcff\\udcfe\\n.png: 20x30" in stdout
    assert len(stdout.splitlines()) == 3


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    name = "é" * 118  # 236 bytes
    write_png(tmp_path / f"in/{name}.png", np.zeros((20, 30, 3), np.uint8))
    film(tmp_path / "in/film.mp4", 2)
    os.rename(tmp_path / "in/film.mp4", tmp_path / f"in/{'f' * 240}.mp4")
    assert run(tmp_path / "in", tmp_path / "out").written == 2
    assert os.path.exists(tmp_path / f"out/overlay/{name}.png")
    assert os.path.exists(tmp_path / f"out/overlay/{'f' * 240}.mp4")


@pytest.mark.parametrize(
    ("names", "keys"),
    [(("x", "x", "y"), ["x (0)", "x (1)", "y"]), (("x", "x", "x (1)"), ["x (0)", "x (1)", "x (1) (2)"])],
)
def test_classes_with_the_same_name_have_separate_areas(names, keys):
    areas = Areas(names).of(np.array([3, 2, 1]))
    assert list(areas["pixels"].items()) == list(zip(keys, [3, 2, 1], strict=True))
    assert list(areas["share"]) == keys


def test_class_names_are_printed_shortened_and_without_control_characters():
    areas = Areas(["\x1b[31mred\n" + "x" * 60_000])
    areas.total += 1
    text = predictor.text(predictor.Report(areas))
    assert text.startswith(r"  \x1b[31mred\nxxx")
    assert len(text) < 120


def test_a_broken_file_is_reported_and_skipped(tmp_path, caplog):
    write_png(tmp_path / "in/a.png", np.zeros((20, 30, 3), np.uint8))
    (tmp_path / "in/b.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:-20])
    (tmp_path / "in/c.mp4").write_bytes(b"no film")
    report = run(tmp_path / "in", tmp_path / "out")
    assert report.written == 1
    assert len(report.problems) == 2
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"[2/3] skipped: {report.problems[0]}", f"[3/3] skipped: {report.problems[1]}",
    ]  # fmt: skip
    assert "b.png is truncated" in report.problems[0]
    assert "c.mp4 is damaged or not a video" in report.problems[1]
    with pytest.raises(OcrnetError, match=r"b\.png is truncated"):
        run(tmp_path / "in/b.png", tmp_path / "out")


class Stop(Exception):  # noqa: N818
    pass


def stops_after(count: int):
    calls = iter(range(count))

    def check() -> None:
        if next(calls, None) is None:
            raise Stop

    return check


def test_a_stop_keeps_finished_results_and_marks_the_areas_incomplete(tmp_path):
    for name in ("a", "b", "c"):
        write_png(tmp_path / f"in/{name}.png", np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(Stop):
        run(tmp_path / "in", tmp_path / "out", check=stops_after(3))
    assert os.listdir(tmp_path / "out/overlay") == ["a.png"]
    areas = json.loads((tmp_path / "out/areas.json").read_text())
    assert (areas["whole"], [row["name"] for row in areas["images"]]) == (False, ["a"])


# --- progress


def test_progress_shows_rate_and_time_left(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr("ocrnet.predict.progress.time.monotonic", lambda: now[0])
    with Progress(10, shown=False) as progress:
        for seconds in (4, 4, 4, 8):
            now[0] += seconds
            progress.done()
        begun = now[0]
        now[0] += 20
        progress.part("frame", 30, 60, begun)
        now[0] += 1
        progress.part("frame", 31, 0, begun)  # too early for another line
        now[0] += 20
        progress.part("frame", 32, 0, begun)
    assert caplog.messages == [
        "3/10 images, 0.25 images/s, about 0:28 left",
        "frames 30/60, 1.5 frames/s, about 0:49 left",
        "frames 32, 0.78 frames/s, about 1:32 left",
    ]
    assert duration(3661) == "1:01:01"


# --- videos


def film(path, frames, *, rate=29.97, size=(48, 64)) -> list[int]:
    """Write a video with one red value in each frame; return the classes that `Quarters` predicts for the frames."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size[::-1])
    assert writer.isOpened()
    reds = [40 + 40 * (i % 5) for i in range(frames)]
    for red in reds:
        frame = np.zeros((*size, 3), np.uint8)
        frame[..., 2] = red
        writer.write(frame)
    writer.release()
    return [red // 64 for red in reds]


def test_a_video_keeps_rate_length_and_size(tmp_path):
    classes = film(tmp_path / "film.mp4", 12)
    report = run(tmp_path / "film.mp4", tmp_path / "out", save=("overlay", "side", "confidence", "indices", "json"))
    assert report.problems == []
    for kind, width in (("overlay", 64), ("side", 128), ("confidence", 64)):
        with video.Reader(tmp_path / f"out/{kind}/film.mp4") as reader:
            frames = list(reader)
        assert (len(frames), reader.promised, reader.size) == (12, 12, (48, width))
        assert reader.rate == pytest.approx(29.97)
    indices = sorted((tmp_path / "out/indices/film").iterdir())
    assert [np.unique(read_label(path)).tolist() for path in indices] == [[value] for value in classes]
    lines = [json.loads(line) for line in (tmp_path / "out/areas/film.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(12))
    assert lines[3]["seconds"] == pytest.approx(3 / 29.97, abs=1e-3)
    assert [list(line["pixels"]) for line in lines] == [[Colors.names[value]] for value in classes]
    (row,) = json.loads((tmp_path / "out/areas.json").read_text())["images"]
    assert (row["frames"], sum(row["pixels"].values())) == (12, 12 * 48 * 64)
    assert row["frames_per_second"] == pytest.approx(29.97)


def test_the_default_results_of_a_video_with_an_odd_size_are_written(tmp_path, caplog):
    writer = video.Writer(tmp_path / "odd.mp4", 10)
    with writer:
        for i in range(5):
            writer.write(np.full((31, 45, 3), 50 * i, np.uint8))
        writer.finish()
    with video.Reader(tmp_path / "odd.mp4") as reader:
        assert reader.size == (32, 46)
        assert len(list(reader)) == 5
    run(tmp_path / "odd.mp4", tmp_path / "out")
    files = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(files) == ["areas.json", "areas/odd.jsonl", "legend.png", "overlay/odd.mp4"]
    assert "32x46, 5 frames at 10 per second, without sound" in caplog.messages[-1]


def test_a_truncated_video_is_reported_and_its_frames_are_kept(tmp_path):
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    rng = np.random.default_rng(0)
    for _ in range(40):
        writer.write(rng.integers(0, 256, (48, 64, 3), np.uint8))
    writer.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report = run(path, tmp_path / "out")
    (problem,) = report.problems
    assert "film.avi is truncated or damaged: " in problem
    assert "of 40 frames" in problem
    with video.Reader(tmp_path / "out/overlay/film.mp4") as reader:
        assert 10 < len(list(reader)) < 30
    whole = tmp_path / "whole.mp4"  # without the index at its end, no frame can be read
    film(whole, 20)
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(OcrnetError, match=r"whole\.mp4 is damaged or not a video"):
        run(whole, tmp_path / "out")


def test_a_stopped_video_leaves_no_unfinished_file(tmp_path):
    film(tmp_path / "film.mp4", 12)
    with pytest.raises(Stop):
        run(tmp_path / "film.mp4", tmp_path / "out", check=stops_after(6), save=("overlay", "confidence", "json"))
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["legend.png"]


def test_a_stopped_video_keeps_the_frames_that_have_separate_files(tmp_path):
    film(tmp_path / "film.mp4", 12)
    with pytest.raises(Stop):
        run(tmp_path / "film.mp4", tmp_path / "out", check=stops_after(6), save=("overlay", "indices", "json"))
    left = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert left == [f"{i:06}.png" for i in range(len(left) - 1)] + ["legend.png"]
    assert len(left) > 3


def test_a_video_that_is_not_fully_written_is_an_error(tmp_path):
    with video.Writer(tmp_path / "film.mp4", 10) as writer:
        for _ in range(4):
            writer.write(np.zeros((32, 48, 3), np.uint8))
        writer._frames += 1  # as if OpenCV had lost a frame without an error
        with pytest.raises(OcrnetError, match="4 of 5 frames were written; the disk may be full"):
            writer.finish()
    assert os.listdir(tmp_path) == []
