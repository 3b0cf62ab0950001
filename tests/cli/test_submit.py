"""The zip for the Cityscapes test server: what is in it, what `eval` says of the same predictions, what is refused."""

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import zipfile
import zlib

import numpy as np
import pytest
from commands import ROOT, start, wait_for

from ocrnet.cli import submit
from ocrnet.cli.main import main
from ocrnet.data.datasets import cityscapes as layout
from ocrnet.data.datasets import open_dataset
from ocrnet.data.image_io import decode_label, encode_png
from ocrnet.evaluation import metrics
from ocrnet.utils.errors import OcrnetError

W48 = "config/ocrnet/config_ocrnet_hrw48_16k.yml"


@pytest.fixture(scope="module")
def val_zip(cityscapes, w48_run, tmp_path_factory):
    """Return the zip of the validation split."""
    path = tmp_path_factory.mktemp("submit") / "val.zip"
    argv = ["submit", *of(cityscapes), "--checkpoint_path", str(w48_run), "--device_target", "CPU", "--split", "val"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([*argv, "--output", str(path)]) == 0
    for part in ("3 results", "note: images are 96x192; the server accepts only 1024x2048", "no problems"):
        assert part in said.getvalue()
    return path


def of(cityscapes) -> list[str]:
    return ["--config", str(ROOT / W48), "--set", f"data.dataset_dir={cityscapes}"]


def test_the_zip_holds_what_eval_scores(val_zip, cityscapes, w48_run, tmp_path):
    argv = ["eval", *of(cityscapes), "--device_target", "CPU", "--checkpoint_path", str(w48_run)]
    assert main([*argv, "--save_dir", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    (scored,) = [row for row in rows if row["kind"] == "eval"]
    dataset = open_dataset("cityscapes", cityscapes, "val")
    counts = np.zeros((19, 19), np.int64)
    with zipfile.ZipFile(val_zip) as archive:
        assert sorted(archive.namelist()) == [f"demo_{i:06}_000019_labelIds.png" for i in range(3)]
        for index in range(len(dataset)):
            name = dataset.name(index).rpartition("/")[2]
            ids = decode_label(archive.read(f"{name}_labelIds.png"), name)
            assert (ids.shape, ids.dtype) == ((96, 192), np.uint8)
            counts += metrics.confusion(dataset.classes.to_indices(ids, name), dataset.read(index)[1], 19)
    scores = metrics.as_dict(metrics.scores(counts, dataset.classes.names, dataset.classes.categories))
    assert scores == {name: scored[name] for name in scores}


def test_cityscapesscripts_finds_and_scores_it(val_zip, cityscapes, tmp_path, monkeypatch):
    evaluation = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    shutil.unpack_archive(val_zip, tmp_path)
    truth = sorted(map(str, (cityscapes / "gtFine/val").rglob("*_labelIds.png")))
    args = evaluation.args
    for name, value in (("predictionPath", str(tmp_path)), ("predictionWalk", None), ("JSONOutput", False),
                        ("evalInstLevelScore", False), ("quiet", True)):  # fmt: skip
        monkeypatch.setattr(args, name, value)
    found = evaluation.evaluateImgLists([evaluation.getPrediction(args, path) for path in truth], truth, args)
    assert 0 <= found["averageScoreClasses"] <= 1


def test_the_test_split_needs_no_labels(cityscapes, w48_run, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(cityscapes / "leftImg8bit", data / "leftImg8bit")
    argv = ["submit", *of(data), "--checkpoint_path", str(w48_run), "--device_target", "CPU", "--flip", "True"]
    assert main([*argv, "--output", str(tmp_path / "new/test.zip")]) == 0
    assert "of Cityscapes test at" in capsys.readouterr().out
    assert zipfile.ZipFile(tmp_path / "new/test.zip").namelist() == ["demo_000000_000019_labelIds.png"]
    assert os.listdir(tmp_path / "new") == ["test.zip"]
    assert main([*argv, "--output", str(tmp_path / "new/test.zip")]) == 2
    assert "exists; remove it" in capsys.readouterr().err


def test_a_stop_leaves_nothing(cityscapes, w48_run, tmp_path):
    data = tmp_path / "data/leftImg8bit/test/demo"
    data.mkdir(parents=True)
    scene = next((cityscapes / "leftImg8bit/test/demo").iterdir())
    for i in range(2000):
        os.symlink(scene, data / f"demo_{i:06}_000019_leftImg8bit.png")
    process = start("-m", "ocrnet", "submit", *of(tmp_path / "data"), "--checkpoint_path", str(w48_run), "--output",
                    str(tmp_path / "out/test.zip"), "--device_target", "CPU")  # fmt: skip
    wait_for(process, "scales: ")
    while not list(tmp_path.glob("out/.test.zip.*")):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "SIGTERM: stopping; no file is written" in process.stderr.read()
    assert list((tmp_path / "out").iterdir()) == []


# --- looking through a zip

GOOD = np.full((4, 6), 7, np.uint8)


def zipped(path, **entries: bytes | np.ndarray):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.png", content if isinstance(content, bytes) else encode_png(content))
    return path


NAMES = {f"bonn_{i:06}_000019": (4, 6) for i in range(2)}
A, B = NAMES


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({f"{A}_x": GOOD}, [f"{B} has no result"]),
        ({A: GOOD, f"{A}_again": GOOD, B: GOOD}, [f"{A} has 2 results"]),
        ({A: GOOD, B: GOOD, "bonn_000009_000019": GOOD}, ["bonn_000009_000019.png does not match any image"]),
        ({A: GOOD, B: GOOD, "notes": GOOD}, ["notes.png is not named like"]),
        ({A: GOOD, B: GOOD[:3]}, [f"{B}.png is 3x6, not 4x6"]),
        ({A: GOOD, B: np.full((4, 6), 34, np.uint8)}, ["ids that Cityscapes does not define: 34"]),
        ({A: GOOD % 5, B: GOOD % 4}, ["seem to be class indices (trainIds)"]),
        ({A: GOOD, B: np.zeros((4, 6, 3), np.uint8)}, [f"{B}.png has mode RGB"]),
        ({A: GOOD, B: encode_png(GOOD)[:-20]}, [f"{B}.png is truncated"]),
        ({A: GOOD, B: b"no picture"}, [f"{B}.png is damaged or not an image"]),
        ({A: GOOD, f"folder/{B}_labelIds": GOOD}, []),
    ],
)
def test_what_is_wrong_with_a_zip_is_named(tmp_path, entries, said):
    problems = submit.inspect(zipped(tmp_path / "a.zip", **entries), NAMES).problems
    assert len(problems) == len(said)
    for problem, part in zip(problems, said, strict=True):
        assert part in problem


def test_every_flipped_byte_of_a_result_is_noticed(tmp_path):
    path = zipped(tmp_path / "a.zip", **dict.fromkeys(NAMES, GOOD))
    assert submit.inspect(path, NAMES).problems == []
    data = path.read_bytes()
    begin = data.index(b"\x89PNG")
    for position in range(begin, data.index(b"IEND", begin), 5):
        path.write_bytes(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :])
        (problem, *_) = submit.inspect(path, NAMES).problems
        assert f"{A}.png is damaged" in problem


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_result_whose_packing_is_damaged_is_named(tmp_path, method):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{A}.png", encode_png(np.random.default_rng(0).integers(0, 20, (4, 6), np.uint8)))
        begin, end = 30 + len(A) + 4, archive.fp.tell()
    data = path.read_bytes()
    for filler in (b"\xff", b"\x05"):
        path.write_bytes(data[:begin] + filler * (end - begin) + data[end:])
        problem, _ = submit.inspect(path, NAMES).problems
        assert f"{A}.png is damaged (" in problem


def test_an_image_of_another_size_is_not_decoded(tmp_path, monkeypatch, recwarn):
    bomb = bytearray(encode_png(GOOD))
    bomb[16:24] = struct.pack(">II", 13_000, 13_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    monkeypatch.setattr(submit, "decode_label", lambda data, name: pytest.fail("decoded") if len(data) else None)
    path = zipped(tmp_path / "a.zip", **{A: bytes(bomb)})
    assert submit.inspect(path, {A: (4, 6)}).problems == [f"{A}.png is 13000x13000, not 4x6"]
    assert not recwarn.list


def test_names_in_a_zip_are_said_without_control_characters_and_cut(tmp_path, capsys):
    names = ["\x1b[2J\nfine", "z" * 60_000, "\x1b_000000_000000"]
    assert main(["submit", "--verify", str(zipped(tmp_path / "a.zip", **dict.fromkeys(names, GOOD)))]) == 1
    said = capsys.readouterr()
    assert r"  \x1b[2J\nfine.png is not named" in said.err
    assert r"  \x1b is not a city of" in said.err
    assert "\x1b" not in said.err + said.out
    assert max(map(len, said.err.splitlines())) < 300


def test_a_zip_whose_names_are_damaged_is_no_zip(tmp_path):
    path = zipped(tmp_path / "a.zip", **{A: GOOD, B: GOOD, "é": GOOD})
    data = path.read_bytes()
    begin = data.rindex("é".encode())
    path.write_bytes(data[:begin] + b"\xff" + data[begin + 1 :])
    with pytest.raises(OcrnetError, match=r"a\.zip is damaged or not a zip \('utf-8' codec"):
        submit.inspect(path, NAMES)


def test_without_the_dataset_cities_and_the_full_size_are_asked_for(tmp_path, monkeypatch, capsys):
    assert {split: sum(cities.values()) for split, cities in submit.CITIES.items()} == {"test": 1525, "val": 500}
    monkeypatch.setattr(submit, "CITIES", {"test": {"bonn": 2, "mainz": 1}, "val": {"lindau": 1}})
    full = np.full(submit.SIZE, 7, np.uint8)
    path = zipped(tmp_path / "a.zip", **dict.fromkeys([A, B, "mainz_000000_000019"], full))
    assert main(["submit", "--verify", str(path)]) == 0
    assert "3 results" in (said := capsys.readouterr().out)
    assert "  7 road" in said
    path = zipped(tmp_path / "b.zip", **{A: full, B: GOOD, "ulm_000000_000019": full})
    assert main(["submit", "--verify", str(path)]) == 1
    said = capsys.readouterr().err
    parts = ("4x6, not 1024x2048", "mainz has 0 results; the test split has 1", "ulm is not a city of the test split")
    for part in parts:
        assert part in said
    assert main(["submit", "--verify", str(path), "--split", "val"]) == 1
    assert "lindau has 0 results" in capsys.readouterr().err


def test_the_zip_of_a_split_is_looked_through_with_its_dataset(val_zip, cityscapes, capsys):
    assert main(["submit", "--verify", str(val_zip), "--split", "val", *of(cityscapes)]) == 0
    assert main(["submit", "--verify", str(val_zip), *of(cityscapes)]) == 1
    assert "does not match any image of the split" in capsys.readouterr().err


def test_what_was_written_is_read_back_before_it_has_its_name(cityscapes, w48_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(submit, "encode_png", lambda ids: encode_png(ids % 7))
    argv = ["submit", *of(cityscapes), "--checkpoint_path", str(w48_run), "--device_target", "CPU"]
    assert main([*argv, "--output", str(tmp_path / "test.zip")]) == 2
    assert "seem to be class indices" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_ids_to_look_out_for():
    ids = layout.classes().ids
    assert (min(ids), max(ids)) == (7, 33)
