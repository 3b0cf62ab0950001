"""`ocrnet report` of a finished run: it shows the scores of eval, and reuses stored figures without the images."""

import json
import shutil
import signal

import pytest
from commands import run, start, wait_for

from ocrnet.cli.main import main
from ocrnet.weights import checkpoint


@pytest.fixture(scope="module")
def run_folder(w48_run, tmp_path_factory):
    """Return a copy of a finished run, because other tests use the original."""
    return shutil.copytree(w48_run, tmp_path_factory.mktemp("report") / "run")


def test_report_shows_the_scores_of_eval_and_stores_its_figures(run_folder, tmp_path, capsys):
    result = run("-m", "ocrnet", "report", run_folder, "--device_target", "CPU")
    assert f"wrote {run_folder}/report.html and {run_folder}/MODEL_CARD.md" in result.stdout
    assert "evaluating 3 of 3 validation images with OCRNet_hrnet_seg_w48_best_rank0.safetensors" in result.stdout
    figures = json.loads((run_folder / "report" / "figures.json").read_text())
    best = next((run_folder / "checkpoint").glob("*_best_*"))
    assert figures["key"]["checkpoint"] == checkpoint.read_meta(best)["sha256"]
    run("eval.py", "--config", run_folder / "config.yml", "--checkpoint_path", best, "--save_dir", tmp_path / "eval")
    row = json.loads((tmp_path / "eval" / "eval.jsonl").read_text())
    page = (run_folder / "report.html").read_text()
    assert page.count("data:image/") > 12
    assert 'id="ocr"' in page
    assert f"<b>{100 * row['mean_iou']:.2f}</b>" in page
    classes = page.split('id="classes"')[1].split("</section>")[0]
    for scores in row["classes"].values():
        assert scores["iou"] is None or f"<b>{100 * scores['iou']:.2f}</b>" in classes

    argv = ["report", str(run_folder), "--set", "data.dataset_dir=nowhere", "--output", str(tmp_path / "x.html")]
    assert main(argv) == 0
    output = capsys.readouterr().out
    assert "using the figures stored in the run's folder" in output
    assert "evaluating" not in output
    assert f"<b>{100 * row['mean_iou']:.2f}</b>" in (tmp_path / "x.html").read_text()
    assert (tmp_path / "x.MODEL_CARD.md").exists()

    assert main(["report", str(tmp_path / "eval"), "--curves_only"]) == 0
    assert f"<b>{100 * row['mean_iou']:.2f}</b>" in (tmp_path / "eval" / "report.html").read_text()


def test_watch_exits_with_status_0_on_ctrl_c(run_folder, tmp_path):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(lines[0] + lines[-1][:20])
    shutil.copy(run_folder / "config.yml", tmp_path)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a child inherits SIGINT blocked by MindSpore's import
    process = start("-m", "ocrnet", "report", str(tmp_path), "--watch")
    wait_for(process, "after step")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in errors) == (0, False)
    assert f"wrote {tmp_path}/report.html" in output
    assert 'http-equiv="refresh"' not in (tmp_path / "report.html").read_text()
