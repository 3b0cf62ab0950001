"""`ocrnet submit`: the zip for the Cityscapes server holds the predictions that `eval` scores, and is validated."""

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
    argv = ["submit", *data_flags(cityscapes), "--checkpoint_path", str(w48_run), "--device_target", "CPU"]
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        assert main([*argv, "--split", "val", "--output", str(path)]) == 0
    for part in ("3 results", "note: images are 96x192; the server accepts only 1024x2048", "no problems"):
        assert part in stdout.getvalue()
    return path


def data_flags(cityscapes) -> list[str]:
    return ["--config", str(ROOT / W48), "--set", f"data.dataset_dir={cityscapes}"]


def test_the_zip_holds_the_predictions_that_eval_scores(val_zip, cityscapes, w48_run, tmp_path):
    argv = ["eval", *data_flags(cityscapes), "--device_target", "CPU", "--checkpoint_path", str(w48_run)]
    assert main([*argv, "--save_dir", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    (evaluation,) = [row for row in rows if row["kind"] == "eval"]
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
    assert scores == {name: evaluation[name] for name in scores}


def test_cityscapesscripts_reads_and_scores_the_predictions(val_zip, cityscapes, tmp_path, monkeypatch):
    evaluation = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    shutil.unpack_archive(val_zip, tmp_path)
    ground_truth = sorted(map(str, (cityscapes / "gtFine/val").rglob("*_labelIds.png")))
    args = evaluation.args
    for name, value in (("predictionPath", str(tmp_path)), ("predictionWalk", None), ("JSONOutput", False),
                        ("evalInstLevelScore", False), ("quiet", True)):  # fmt: skip
        monkeypatch.setattr(args, name, value)
    predictions = [evaluation.getPrediction(args, path) for path in ground_truth]
    scores = evaluation.evaluateImgLists(predictions, ground_truth, args)
    assert 0 <= scores["averageScoreClasses"] <= 1


def test_the_test_split_needs_no_labels(cityscapes, w48_run, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(cityscapes / "leftImg8bit", data / "leftImg8bit")
    argv = ["submit", *data_flags(data), "--checkpoint_path", str(w48_run), "--device_target", "CPU", "--flip", "True"]
    assert main([*argv, "--output", str(tmp_path / "new/test.zip")]) == 0
    assert "of Cityscapes test at" in capsys.readouterr().out
    assert zipfile.ZipFile(tmp_path / "new/test.zip").namelist() == ["demo_000000_000019_labelIds.png"]
    assert os.listdir(tmp_path / "new") == ["test.zip"]
    assert main([*argv, "--output", str(tmp_path / "new/test.zip")]) == 2
    assert "exists; remove it" in capsys.readouterr().err


def test_a_stopped_submit_leaves_no_file(cityscapes, w48_run, tmp_path):
    data = tmp_path / "data/leftImg8bit/test/demo"
    data.mkdir(parents=True)
    scene = next((cityscapes / "leftImg8bit/test/demo").iterdir())
    for i in range(2000):
        os.symlink(scene, data / f"demo_{i:06}_000019_leftImg8bit.png")
    process = start("-m", "ocrnet", "submit", *data_flags(tmp_path / "data"), "--checkpoint_path", str(w48_run),
                    "--output", str(tmp_path / "out/test.zip"), "--device_target", "CPU")  # fmt: skip
    wait_for(process, "scales: ")
    while not list(tmp_path.glob("out/.test.zip.*")):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "SIGTERM: stopping; no file is written" in process.stderr.read()
    assert list((tmp_path / "out").iterdir()) == []


# --- validation of a zip

GOOD = np.full((4, 6), 7, np.uint8)


def write_zip(path, **entries: bytes | np.ndarray):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.png", content if isinstance(content, bytes) else encode_png(content))
    return path


NAMES = {f"bonn_{i:06}_000019": (4, 6) for i in range(2)}
A, B = NAMES


@pytest.mark.parametrize(
    ("entries", "messages"),
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
        ({A: GOOD, B: b"not an image"}, [f"{B}.png is damaged or not an image"]),
        ({A: GOOD, f"folder/{B}_labelIds": GOOD}, []),
    ],
)
def test_each_problem_of_a_zip_is_named(tmp_path, entries, messages):
    problems = submit.inspect(write_zip(tmp_path / "a.zip", **entries), NAMES).problems
    assert len(problems) == len(messages)
    for problem, part in zip(problems, messages, strict=True):
        assert part in problem


def test_every_altered_byte_of_a_result_is_detected(tmp_path):
    path = write_zip(tmp_path / "a.zip", **dict.fromkeys(NAMES, GOOD))
    assert submit.inspect(path, NAMES).problems == []
    data = path.read_bytes()
    begin = data.index(b"\x89PNG")
    for position in range(begin, data.index(b"IEND", begin), 5):
        path.write_bytes(data[:position] + bytes([data[position] ^ 16]) + data[position + 1 :])
        (problem, *_) = submit.inspect(path, NAMES).problems
        assert f"{A}.png is damaged" in problem


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_result_with_damaged_compressed_data_is_named(tmp_path, method):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(f"{A}.png", encode_png(np.random.default_rng(0).integers(0, 20, (4, 6), np.uint8)))
        begin = 30 + len(f"{A}.png")  # after the local file header and the name
        end = begin + archive.getinfo(f"{A}.png").compress_size
    data = path.read_bytes()
    for filler in (b"\xff", b"\x05"):
        path.write_bytes(data[:begin] + filler * (end - begin) + data[end:])
        problem, _ = submit.inspect(path, NAMES).problems
        assert f"{A}.png is damaged (" in problem


def test_a_result_of_another_size_is_not_decoded(tmp_path, monkeypatch, recwarn):
    bomb = bytearray(encode_png(GOOD))
    bomb[16:24] = struct.pack(">II", 13_000, 13_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    monkeypatch.setattr(submit, "decode_label", lambda data, name: pytest.fail("decoded") if len(data) else None)
    path = write_zip(tmp_path / "a.zip", **{A: bytes(bomb)})
    assert submit.inspect(path, {A: (4, 6)}).problems == [f"{A}.png is 13000x13000, not 4x6"]
    assert not recwarn.list


def test_names_in_a_zip_are_printed_escaped_and_shortened(tmp_path, capsys):
    names = ["\x1b[2J\nfine", "z" * 60_000, "\x1b_000000_000000"]
    assert main(["submit", "--verify", str(write_zip(tmp_path / "a.zip", **dict.fromkeys(names, GOOD)))]) == 1
    printed = capsys.readouterr()
    assert r"  \x1b[2J\nfine.png is not named" in printed.err
    assert r"  \x1b is not a city of" in printed.err
    assert "\x1b" not in printed.err + printed.out
    assert max(map(len, printed.err.splitlines())) < 300


def test_a_zip_with_undecodable_names_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", **{A: GOOD, B: GOOD, "é": GOOD})
    data = path.read_bytes()
    begin = data.rindex("é".encode())
    path.write_bytes(data[:begin] + b"\xff" + data[begin + 1 :])
    with pytest.raises(OcrnetError, match=r"a\.zip is damaged or not a zip \('utf-8' codec"):
        submit.inspect(path, NAMES)


def test_without_a_dataset_the_official_cities_and_size_are_required(tmp_path, monkeypatch, capsys):
    assert {split: sum(cities.values()) for split, cities in submit.CITIES.items()} == {"test": 1525, "val": 500}
    monkeypatch.setattr(submit, "CITIES", {"test": {"bonn": 2, "mainz": 1}, "val": {"lindau": 1}})
    full = np.full(submit.SIZE, 7, np.uint8)
    path = write_zip(tmp_path / "a.zip", **dict.fromkeys([A, B, "mainz_000000_000019"], full))
    assert main(["submit", "--verify", str(path)]) == 0
    output = capsys.readouterr().out
    assert "3 results" in output
    assert "  7 road" in output
    path = write_zip(tmp_path / "b.zip", **{A: full, B: GOOD, "ulm_000000_000019": full})
    assert main(["submit", "--verify", str(path)]) == 1
    errors = capsys.readouterr().err
    parts = ("4x6, not 1024x2048", "mainz has 0 results; the test split has 1", "ulm is not a city of the test split")
    for part in parts:
        assert part in errors
    assert main(["submit", "--verify", str(path), "--split", "val"]) == 1
    assert "lindau has 0 results" in capsys.readouterr().err


def test_with_a_dataset_the_results_must_match_its_images(val_zip, cityscapes, capsys):
    assert main(["submit", "--verify", str(val_zip), "--split", "val", *data_flags(cityscapes)]) == 0
    assert main(["submit", "--verify", str(val_zip), *data_flags(cityscapes)]) == 1
    assert "does not match any image of the split" in capsys.readouterr().err


def test_a_written_zip_is_validated_before_it_is_renamed(cityscapes, w48_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(submit, "encode_png", lambda ids: encode_png(ids % 7))
    argv = ["submit", *data_flags(cityscapes), "--checkpoint_path", str(w48_run), "--device_target", "CPU"]
    assert main([*argv, "--output", str(tmp_path / "test.zip")]) == 2
    assert "seem to be class indices" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_label_ids_range_from_7_to_33():
    ids = layout.classes().ids
    assert (min(ids), max(ids)) == (7, 33)
