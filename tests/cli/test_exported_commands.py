"""Exported files in eval, predict and bench: scores and images equal those of the checkpoint."""

import json

import pytest

from ocrnet.cli.main import main

W48 = "config/ocrnet/config_ocrnet_hrw48_16k.yml"


@pytest.fixture(scope="module")
def exported(w48_run, cityscapes, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    argv = ["export", "--checkpoint_path", str(w48_run), "--output", str(path), "--size", "[96, 192]", "--config", W48]
    assert main([*argv, "--set", f"data.dataset_dir={cityscapes}"]) == 0
    return path


def test_eval_of_an_exported_file_scores_like_the_checkpoint(w48_run, exported, cityscapes, tmp_path):
    rows = []
    for number, (path, flags) in enumerate(((w48_run, []), (exported, []), (exported, ["eval.slide=[96,192]"]))):
        folder = tmp_path / str(number)
        argv = ["eval", "--config", W48, "--device_target", "CPU", "--checkpoint_path", str(path), "--save_dir"]
        assert main([*argv, str(folder), "--set", f"data.dataset_dir={cityscapes}", *flags]) == 0
        rows.append(json.loads((folder / "eval.jsonl").read_text()))
    assert rows[1]["step"] == 4
    assert "onnxruntime" in rows[1]["versions"]
    for row in rows[1:]:
        assert row["mean_iou"] == pytest.approx(rows[0]["mean_iou"], abs=5e-5)
    metadata = json.loads(_metadata(exported))
    assert metadata["comparison"]["mean_iou"] == pytest.approx(rows[0]["mean_iou"], abs=5e-5)
    assert metadata["names"][0] == "road"


def _metadata(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map["ocrnet"]


def test_predict_with_an_exported_file_writes_the_same_images(w48_run, exported, cityscapes, tmp_path):
    photos = cityscapes / "leftImg8bit/val"
    for name, path in (("checkpoint", w48_run), ("file", exported)):
        argv = ["predict", str(photos), "--checkpoint_path", str(path), "--device_target", "CPU", "--output"]
        assert main([*argv, str(tmp_path / name)]) == 0
    images = sorted(p.relative_to(tmp_path / "file") for p in (tmp_path / "file").rglob("*.png"))
    assert len(images) == 10
    for image in images:
        assert (tmp_path / "file" / image).read_bytes() == (tmp_path / "checkpoint" / image).read_bytes()


def test_bench_prints_a_table_and_a_recommendation(w48_run, exported, capsys):
    assert main(["bench", "--checkpoint_path", str(w48_run), str(exported), "--rounds", "1"]) == 0
    output = capsys.readouterr().out
    assert " at 96x192 in 1 interleaved rounds" in output
    (row,) = (line for line in output.splitlines() if line.startswith("net.onnx"))
    assert "onnxruntime, float32" in row
    assert row.endswith("0.000 %")
    assert "recommended: " in output
