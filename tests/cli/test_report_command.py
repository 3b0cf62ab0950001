"""The command report on a real run: what eval says, once computed, and what it does where the images are missing."""

import json
import shutil
import signal

import pytest
from commands import run, start, wait_for

from ocrnet.cli.main import main
from ocrnet.weights import checkpoint


@pytest.fixture(scope="module")
def finished(w48_run, tmp_path_factory):
    """Return a copy of a finished run: others use the original."""
    return shutil.copytree(w48_run, tmp_path_factory.mktemp("report") / "run")


def test_report_has_what_eval_says_and_keeps_what_it_computed(finished, tmp_path, capsys):
    found = run("-m", "ocrnet", "report", finished, "--device_target", "CPU")
    assert f"wrote {finished}/report.html and {finished}/MODEL_CARD.md" in found.stdout
    assert "evaluating 3 of 3 validation images with OCRNet_hrnet_seg_w48_best_rank0.safetensors" in found.stdout
    facts = json.loads((finished / "report" / "figures.json").read_text())
    best = next((finished / "checkpoint").glob("*_best_*"))
    assert facts["key"]["checkpoint"] == checkpoint.read_meta(best)["sha256"]
    run("eval.py", "--config", finished / "config.yml", "--checkpoint_path", best, "--save_dir", tmp_path / "eval")
    row = json.loads((tmp_path / "eval" / "eval.jsonl").read_text())
    page = (finished / "report.html").read_text()
    assert page.count("data:image/") > 12
    assert 'id="ocr"' in page
    assert f"<b>{100 * row['mean_iou']:.2f}</b>" in page
    classes = page.split('id="classes"')[1].split("</section>")[0]
    for scores in row["classes"].values():
        assert scores["iou"] is None or f"<b>{100 * scores['iou']:.2f}</b>" in classes

    wanted = ["report", str(finished), "--set", "data.dataset_dir=nowhere", "--output", str(tmp_path / "x.html")]
    assert main(wanted) == 0
    said = capsys.readouterr().out
    assert "using the figures stored in the run's folder" in said
    assert "evaluating" not in said
    assert f"<b>{100 * row['mean_iou']:.2f}</b>" in (tmp_path / "x.html").read_text()
    assert (tmp_path / "x.MODEL_CARD.md").exists()

    assert main(["report", str(tmp_path / "eval"), "--curves_only"]) == 0
    assert f"<b>{100 * row['mean_iou']:.2f}</b>" in (tmp_path / "eval" / "report.html").read_text()


def test_watch_ends_cleanly_on_ctrl_c(finished, tmp_path):
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(lines[0] + lines[-1][:20])
    shutil.copy(finished / "config.yml", tmp_path)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a child inherits what MindSpore's import left blocked
    watching = start("-m", "ocrnet", "report", str(tmp_path), "--watch")
    wait_for(watching, "after step")
    watching.send_signal(signal.SIGINT)
    said, errors = watching.communicate(timeout=30)
    assert (watching.returncode, "Traceback" in errors) == (0, False)
    assert f"wrote {tmp_path}/report.html" in said
    assert 'http-equiv="refresh"' not in (tmp_path / "report.html").read_text()
