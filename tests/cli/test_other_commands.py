"""The commands predict, check and doctor, and --dry_run, min_miou, --quiet and --debug."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
from commands import ROOT, SMALL, run, start

from ocrnet.cli.main import main
from ocrnet.data.datasets import open_dataset
from ocrnet.data.image_io import read_image, read_label, write_png
from ocrnet.predict import video

W48 = "config/ocrnet/config_ocrnet_hrw48_16k.yml"
CPU = ("--device_target", "CPU")


def test_predict_continues_after_a_damaged_file(w48_run, cityscapes, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(cityscapes / "leftImg8bit/val", photos)
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    result = run("-m", "ocrnet", "predict", photos, "--checkpoint_path", w48_run, *CPU, "--output", tmp_path / "out",
                 ok=False)  # fmt: skip
    assert result.returncode == 1
    assert "broken.jpg" in result.stderr
    assert f"skipped: {photos / 'broken.jpg'} is damaged" in result.stdout
    assert result.stdout.count("warning: [") == 1
    assert "3 predicted" in result.stdout
    image = read_image(next((photos / "demo").glob("*.png")))
    for kind in ("overlay", "indices", "color"):
        assert len(list((tmp_path / "out" / kind / "demo").glob("*.png"))) == 3
    (first, *_) = sorted((tmp_path / "out/indices/demo").glob("*.png"))
    labels = read_label(first)
    assert labels.shape == image.shape[:2]
    assert labels.max() < 19
    assert (tmp_path / "out/legend.png").is_file()


def test_quiet_prints_only_the_results(w48_run, cityscapes, tmp_path, capsys):
    photo = str(next((cityscapes / "leftImg8bit/val").rglob("*.png")))
    command = ["predict", photo, "--checkpoint_path", str(w48_run), *CPU, "--output", str(tmp_path / "out")]
    assert main(command) == 0
    normal = capsys.readouterr().out.splitlines()
    starts = ["engine: torch", "device: CPU", "mix: float32", "checkpoint: ", f"[1/1] {photo}: 96x192", "1 predicted"]
    for start_of_line in starts:
        assert sum(line.startswith(start_of_line) for line in normal) == 1, normal
    assert main([*command, "--quiet"]) == 0
    quiet = capsys.readouterr().out.splitlines()
    assert quiet == [line for line in normal if line.endswith(" % of the pixels")]
    assert quiet


def write_video(path, frames: int, size=(96, 192)) -> None:
    """Write a video of blurred noise that moves 4 pixels a frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 12.5, size[::-1])
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8), (9, 9), 0)
    for i in range(frames):
        writer.write(np.roll(image, 4 * i, axis=1))
    writer.release()


def test_predict_a_video_a_pattern_and_a_url(w48_run, cityscapes, tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "film.mp4", 4)
    usual = ["--checkpoint_path", str(w48_run), *CPU, "--output", str(tmp_path / "out")]
    assert main(["predict", str(tmp_path / "film.mp4"), *usual]) == 0
    assert "96x192, 4 frames at 12.5 per second, without sound" in capsys.readouterr().out
    with video.Reader(tmp_path / "out/overlay/film.mp4") as reader:
        assert (len(list(reader)), reader.rate) == (4, 12.5)
    val = cityscapes / "leftImg8bit/val"
    kinds = ["--save", "labelIds,indices,confidence,json"]
    assert main(["predict", f"{val}/*/*_00000[01]_*.png", *usual, *kinds]) == 0
    output = capsys.readouterr().out
    assert "2 predicted" in output
    assert "labelIds/ (the Cityscapes id of each pixel)" in output
    names = [path.name for path in (val / "demo").iterdir() if path.name[:11] in ("demo_000000", "demo_000001")]
    classes = open_dataset("cityscapes", cityscapes, "val").classes
    for name in names:
        ids, indices = (read_label(tmp_path / f"out/{kind}/demo/{name}") for kind in ("labelIds", "indices"))
        np.testing.assert_array_equal(classes.to_indices(ids, name), indices)
        confidence = read_label(tmp_path / f"out/confidence/demo/{name}")
        assert 255 / 19 - 1 <= confidence.min() < confidence.max() <= 255
    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(val / "demo"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, 0.01)
        try:
            url = f"http://127.0.0.1:{server.server_port}/{names[0]}"
            assert main(["predict", url, *usual, "--save", "indices"]) == 0
            assert main(["predict", url + ".gone", *usual]) == 2
        finally:
            server.shutdown()
    assert "the server returned 404" in capsys.readouterr().err
    both = (read_label(tmp_path / f"out/indices/{folder}{names[0]}") for folder in ("", "demo/"))
    np.testing.assert_array_equal(*both)


def test_a_stopped_prediction_leaves_no_partial_video(w48_run, tmp_path):
    write_video(tmp_path / "film.mp4", 3000)
    process = start("-m", "ocrnet", "predict", str(tmp_path / "film.mp4"), "--checkpoint_path", str(w48_run), *CPU,
                    "--output", str(tmp_path / "out"))  # fmt: skip
    while not list(tmp_path.glob("out/overlay/.film.*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "SIGTERM: stopping; finished results are kept" in process.stderr.read()
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["legend.png"]


def test_predict_an_image_whole_and_in_tiles(w48_run, tmp_path, capsys):
    write_png(tmp_path / "large.png", np.random.default_rng(0).integers(0, 256, (500, 700, 3), np.uint8))
    command = ["predict", str(tmp_path / "large.png"), "--checkpoint_path", str(w48_run), *CPU, "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert "tiles" not in capsys.readouterr().out
    assert main([*command, str(tmp_path / "tiles"), "--set", "eval.max_memory=0.1"]) == 0
    output = capsys.readouterr().out
    assert "500x700 needs more than eval.max_memory (0.1 GiB), so it is predicted in overlapping tiles of" in output
    assert "500x700, in 6 tiles" in output
    whole, tiles = (read_label(tmp_path / name / "indices/large.png") for name in ("whole", "tiles"))
    assert whole.shape == tiles.shape == (500, 700)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "required: SOURCE"),
        (("no.jpg", "--checkpoint_path", "output"), "does not exist"),
        (("train.py",), "--checkpoint_path is required"),
        (("train.py", "--config", W48), "unknown flag '--config'"),
    ],
)
def test_wrong_predict_arguments_are_refused(argv, message):
    result = run("-m", "ocrnet", "predict", *argv, ok=False)
    assert result.returncode == 2
    assert message in result.stderr


def test_predict_of_a_file_that_is_no_image_is_an_error(w48_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = ["predict", "train.py", "--checkpoint_path", str(w48_run), *CPU, "--output", str(tmp_path / "out")]
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("error: train.py is damaged or not an image")


def test_check_counts_valid_images_and_names_problems(cityscapes, tmp_path):
    valid = run("-m", "ocrnet", "check", "--config", W48, "--set", f"data.dataset_dir={cityscapes}")
    assert valid.stdout.count("images are valid") == 2
    assert "no problems" in valid.stdout
    data = tmp_path / "data"
    shutil.copytree(cityscapes, data)
    damaged = next((data / "leftImg8bit/train").rglob("*.png"))
    damaged.write_bytes(damaged.read_bytes()[:500])
    next((data / "gtFine/val").rglob("*_labelIds.png")).unlink()
    result = run("-m", "ocrnet", "check", "--config", W48, "--set", f"data.dataset_dir={data}", ok=False)
    assert result.returncode == 1
    assert f"problem: {damaged} is truncated" in result.stdout
    assert "problem: 1 of 3 images have no label" in result.stdout
    assert "2 problems" in result.stdout
    unedited = run("-m", "ocrnet", "check", "--config", W48, ok=False)
    assert unedited.returncode == 2
    assert "your cityscapes" in unedited.stderr


def test_doctor_trains_and_predicts_on_the_cpu():
    result = run("-m", "ocrnet", "doctor", ok=False)
    assert "OK  CPU, float32: " in result.stdout
    assert "trained and predicted in" in result.stdout
    assert result.returncode == ("!!" in result.stdout)


def test_a_closed_pipe_causes_no_traceback(cityscapes):
    line = f"{sys.executable} -m ocrnet check --config {W48} --set data.dataset_dir={cityscapes} | head -1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode in (0, 141)  # 0 if everything was written before head exited
    assert result.stderr == ""


def test_dry_run_prints_the_cost_and_writes_nothing(cityscapes, tmp_path):
    command = ("train.py", "--config", W48, *CPU, "--save_dir", tmp_path / "out", "--dry_run", "--set",
               "total_step=1", *SMALL[1:])  # fmt: skip
    result = run(*command, f"data.dataset_dir={cityscapes}")
    for part in ("crop_size: [64, 64]", "parameters: ", "GFLOP", "GiB in use", "all 1 steps", "nothing was written"):
        assert part in result.stdout
    assert not (tmp_path / "out").exists()
    data = tmp_path / "data"
    shutil.copytree(cityscapes, data)
    damaged = next((data / "leftImg8bit/train").rglob("*.png"))
    damaged.write_bytes(damaged.read_bytes()[:500])
    result = run(*command, f"data.dataset_dir={data}", ok=False)
    assert result.returncode == 1
    assert f"problem: {damaged} is truncated" in result.stdout


def test_eval_below_min_miou_has_exit_status_1(w48_run, cityscapes, tmp_path):
    command = ("eval.py", "--config", W48, *CPU, "--checkpoint_path", w48_run, "--save_dir", tmp_path, "--set",
               f"data.dataset_dir={cityscapes}")  # fmt: skip
    result = run(*command, "min_miou=0.99", ok=False)
    assert result.returncode == 1
    assert "min_miou: mIoU of at least 99.00: NOT reached" in result.stdout
    assert "reached" in run(*command, "min_miou=0").stdout
    (first, _) = (json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines())
    assert first["mean_iou"] < 0.99


def test_a_run_writes_samples_curves_and_tensorboard_files(w48_run):
    assert len(list((w48_run / "samples/step_4").glob("*.png"))) == 3
    assert (w48_run / "curves.png").is_file()
    assert list((w48_run / "tensorboard").iterdir())


def test_importing_the_cli_loads_no_framework():
    code = (
        "import sys, ocrnet.cli; slow = {'torch', 'matplotlib', 'tensorboardX', 'mindspore'} & set(sys.modules); "
        "import ocrnet.tracking.tensorboard, torch.nn; print(sorted(slow), 'torch._C' in sys.modules)"
    )
    assert run("-c", code).stdout.split("\n")[0] == "[] True"


def test_debug_shows_the_traceback():
    plain = run("train.py", "--config", "no.yml", ok=False)
    debug = run("train.py", "--config", "no.yml", "--debug", ok=False)
    assert plain.returncode == debug.returncode == 2
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)
