"""The output of a run: progress bar, curves, TensorBoard, thumbnails."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ocrnet.data.visualize import legend, thumbnail
from ocrnet.tracking import plots
from ocrnet.tracking.progress_bar import ProgressBar
from ocrnet.tracking.run_dir import Run
from ocrnet.utils.errors import OcrnetError

ROW = {"kind": "train", "step": 5, "loss": 2.5, "loss_aux": 1.0, "loss_ocr": 2.1, "learning_rate": 0.01}
SCORE = {"kind": "eval", "step": 5, "mean_iou": 0.25, "pixel_accuracy": 0.5}

ON_A_TERMINAL = """
import logging
from ocrnet.tracking.progress_bar import ProgressBar
from ocrnet.utils import log
log.open_console()
with ProgressBar(10, 2) as bar:
    bar.advance()
    bar.show_row({"loss": 1.5, "learning_rate": 0.01, "images_per_second": 3.0, "memory_bytes": 2**30})
    bar.set_step(7)
    logging.getLogger("ocrnet.tests").info("a log line")
"""


def test_no_progress_bar_without_a_terminal(capsys):
    with ProgressBar(10, 0) as bar:
        bar.advance()
        bar.show_row(ROW | {"images_per_second": 1.0, "memory_bytes": 1})
        bar.set_step(5)
        print("a log line")
    assert capsys.readouterr().out.strip() == "a log line"


def test_a_progress_bar_on_a_terminal():
    inner = [sys.executable, "-c", ON_A_TERMINAL]
    outer = [sys.executable, "-c", f"import pty; pty.spawn({inner!r})"]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "140", "NO_COLOR": "1"}
    done = subprocess.run(
        outer, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL, env=env
    )
    assert "7/10" in done.stdout
    assert "loss 1.500" in done.stdout
    assert "a log line" in done.stdout


def test_curves_are_drawn_from_the_metrics(tmp_path):
    rows = [ROW, ROW | {"step": 10, "loss": None, "loss_aux": None, "loss_ocr": None}, SCORE]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.draw(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 1000
    (tmp_path / "none.jsonl").write_text("")
    plots.draw(tmp_path / "none.jsonl", tmp_path / "none.png")
    assert (tmp_path / "none.png").read_bytes() != (tmp_path / "curves.png").read_bytes()


def test_metrics_and_samples_are_written_to_tensorboard(tmp_path):
    run = Run(tmp_path / "out")
    run.open_tensorboard(0)
    run.record(ROW)
    run.sample("city/scene", 5, np.zeros((8, 16, 3), np.uint8))
    run.close()
    (events,) = (tmp_path / "out/tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/learning_rate" in content
    assert b"samples/city_scene" in content
    assert (tmp_path / "out/samples/step_5/city_scene.png").is_file()


def test_a_full_disk_ends_a_run_that_writes_tensorboard(tmp_path):
    run = Run(tmp_path / "out")
    run.open_tensorboard(0)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(OcrnetError, match=r"tensorboard' cannot be written: .* free some space"):
            any(run.record(ROW) for _ in range(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_thumbnails_keep_the_classes():
    labels = np.zeros((100, 200), np.uint8)
    labels[:, 100:] = 255
    small = thumbnail(labels, 50)
    assert small.shape == (25, 50)
    assert set(np.unique(small)) == {0, 255}
    assert thumbnail(labels, 200) is labels
    assert thumbnail(np.zeros((100, 200, 3), np.uint8), 50).shape == (25, 50, 3)


def test_a_legend_shows_every_color():
    image = legend(["road", "sky"], [(128, 64, 128), (70, 130, 180)])
    colors = {tuple(pixel) for pixel in image.reshape(-1, 3).tolist()}
    assert {(128, 64, 128), (70, 130, 180)} <= colors
