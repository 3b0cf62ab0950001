"""The page, comparison and card of the report, from synthetic runs: complete, safe to open, with the right numbers."""

import dataclasses
import json
import os
import re
import signal
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_runs import HOSTILE, made_up_figures, write_run

from ocrnet.cli.flags import parse
from ocrnet.cli.main import main
from ocrnet.evaluation import metrics
from ocrnet.report import build, card, charts, compare, page, source
from ocrnet.report.build import ReportOptions
from ocrnet.report.compute import Figures, ReportFilter
from ocrnet.utils.errors import OcrnetError

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The elements and the text of a page, as a browser reads them; checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> Figures:
    return made_up_figures(tmp_path_factory.mktemp("images"))


def test_the_facts_follow_from_the_confusion_matrix(figures):
    facts = figures.facts
    assert facts["images"] == facts["of"] == 8
    assert [s["why"] for s in facts["samples"]] == ["best"] * 3 + ["worst"] * 3 + ["same"] * 2
    scores = [sample["mean_iou"] for sample in facts["samples"]]
    assert scores[:3] == sorted(scores[:3], reverse=True)
    assert scores[0] == max(i["mean_iou"] for i in facts["per_image"])
    assert scores[3] == min(i["mean_iou"] for i in facts["per_image"])
    confusion = np.array(facts["confusion"])
    assert confusion.sum() == 8 * 52 * 80
    assert figures.scores.mean_iou == metrics.scores(confusion, HOSTILE).mean_iou
    assert sum(facts["calibration"]["pixels"]) == confusion.sum()
    right = np.diagonal(confusion).sum() / confusion.sum()
    assert facts["calibration"]["error"] == pytest.approx(abs(0.9 - right), abs=1e-6)


def test_hostile_names_are_escaped_and_the_page_loads_nothing(tmp_path, figures):
    run = source.read(write_run(tmp_path / "<b onclick=alert(3)>&run"))
    for text in (
        page.page(run, figures),
        page.page(run, None, note="<p>", refresh=5),
        compare.page([run, dataclasses.replace(run, name="<other>")], [figures, None]),
    ):
        parsed = Page(text)
        assert [tag for tag, _ in parsed.elements].count("script") == 1 + text.count('id="relation"')
        assert not {tag for tag, _ in parsed.elements} & {"link", "iframe", "object", "s", "u", "form", "base", "a"}
        for tag, attributes in parsed.elements:
            assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
            for name in ("src", "href", "xlink:href", "srcset", "data"):
                assert attributes.get(name, "data:").startswith("data:")
        assert "url(" not in text
        assert "@import" not in text
        assert HOSTILE[1] in parsed.text
        assert "alert(1)</script>" not in text


def test_the_page_has_every_section_and_its_numbers(tmp_path, figures):
    run = source.read(write_run(tmp_path / "run"))
    text = page.page(run, figures)
    ids = [attributes["id"] for tag, attributes in Page(text).elements if tag == "section"]
    assert ids == ["curves", "classes", "confusion", "calibration", "images", "ocr", "setup"]
    assert f"<b>{100 * figures.scores.mean_iou:.2f}</b>" in text
    assert text.count("data:image/") == 6 * 4 + 1 + 4
    assert len(text) < 1_000_000
    curves_only = page.page(run, None)
    assert [a["id"] for t, a in Page(curves_only).elements if t == "section"] == ["curves", "classes", "setup"]
    assert "<b>30.00</b>" in curves_only  # the best evaluation in metrics.jsonl
    assert 'http-equiv="refresh"' not in curves_only


def test_without_regions_only_that_section_is_missing(tmp_path, figures):
    facts = figures.facts | {"ocr": None}
    text = page.page(source.read(write_run(tmp_path / "run")), Figures(facts, figures.arrays))
    assert "Object regions (OCR)" not in text
    assert 'id="images"' in text


def test_credentials_and_paths_of_the_machine_are_not_on_the_page(tmp_path, figures, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    folder = write_run(
        tmp_path / "run", data_url="s3://bucket/a?X-Amz-Signature=abcdef", train_url="s3://k:pw123@bucket/x"
    )
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"command": ["train", "wJalrXUtnFEMI", f"--config={folder}/config.yml"]}) + "\n")
    run = source.read(folder)
    for text in (page.page(run, figures), card.card(run, figures), compare.page([run, run], [None, None])):
        for secret in ("wJalrXUtnFEMI", "abcdef", "pw123", "/home/somebody", str(tmp_path)):
            assert secret not in text
    assert "…/camvid" in page.page(run, figures)


def test_unfinished_and_invalid_lines_are_skipped(tmp_path):
    folder = write_run(tmp_path / "run")
    expected = source.read(folder)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"kind": "train"}\n{"kind": "train", "step": "9"}\n\xff\xfe\n')
        file.write(b'{"kind": "train", "step": 40, "loss": 1' + b"0" * 400 + b"}\n")
        file.write(b'{"kind": "train", "step": 40, "lo')
    (folder / "starts.jsonl").write_text('{"time": "x", "comm')
    (folder / "config.yml").write_text("a: [1")
    run = source.read(folder)
    assert run.train == expected.train
    assert run.evals == expected.evals
    Page(page.page(run, None))


def test_missing_and_invalid_values_are_gaps(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = [
        {"kind": "train", "step": 40, "loss": None, "memory_bytes": "many", "seconds_per_step": 0},
        {"kind": "train", "step": 50, "loss": float("inf")},
        {"kind": "eval", "step": 50, "mean_iou": None, "classes": [1]},
    ]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    text = page.page(source.read(folder), None)
    assert not re.search(r"\b(nan|inf)\b", text.split("</style>")[1].split("<script>")[0])


@pytest.mark.parametrize("kind", ["empty folder", "file"])
def test_a_path_that_is_not_a_run_is_refused(tmp_path, kind):
    path = tmp_path / "x"
    path.write_text("") if kind == "file" else path.mkdir()
    with pytest.raises(OcrnetError, match=r"is not a (run )?folder.*use the save_dir"):
        build.make(ReportOptions([path]))


def test_a_comparison_lists_the_most_changed_classes_first(tmp_path):
    runs = [source.read(write_run(tmp_path / name, gain=gain)) for name, gain in (("one", 0.0), ("two", 0.05))]
    text = compare.page(runs, [None, None])
    table = text.split('id="classes"')[1].split("</section>")[0]
    places = [table.index(f'title="{name}"') for name in ("a|b`c` [x](http://evil.test)", "road")]
    assert places == sorted(places)
    assert '<span class="up">+15.00</span>' in table
    assert "Config and versions are the same" in text.split('id="setup"')[1]
    assert "lr_init" not in text.split('id="setup"')[1]
    assert [len(section.split("curve s2")) for section in [text.split('id="curves"')[1].split("</section>")[0]]] == [7]


def test_a_comparison_shows_the_same_images_and_the_keys_that_differ(tmp_path, figures):
    runs = [source.read(write_run(tmp_path / name, lr_init=rate)) for name, rate in (("one", 0.01), ("two", 0.02))]
    text = compare.page(runs, [figures, figures])
    assert text.split('id="images"')[1].split("</section>")[0].count("data:image/") == 2 * 4
    assert "<td>lr_init</td><td>0.01</td><td>0.02</td>" in text.split('id="setup"')[1]
    other = Figures(figures.facts | {"samples": []}, figures.arrays)
    assert 'id="images"' not in compare.page(runs, [figures, other])


def test_runs_with_the_same_name_get_distinct_names(tmp_path):
    runs = [source.read(write_run(tmp_path / name / "run")) for name in ("a", "b")]
    assert compare.distinct(runs) == ["a/run", "b/run"]


def test_the_card_has_the_numbers_of_the_page_and_an_edited_card_is_kept(tmp_path, figures):
    run = source.read(write_run(tmp_path / "run"))
    text = card.card(run, figures)
    assert f"| mean IoU | {100 * figures.scores.mean_iou:.2f} |" in text
    assert "<script>" not in text.replace("\\<script\\>", "")
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [7] * 4
    path = tmp_path / "MODEL_CARD.md"
    assert card.write(path, text) == path
    assert card.write(path, text + "new\n") == path
    path.write_text(path.read_text() + "by hand\n")
    assert card.write(path, text) == tmp_path / "MODEL_CARD.new.md"
    assert path.read_text().endswith("by hand\n")


def test_missing_images_are_omitted_with_a_message_unless_requested(tmp_path, caplog):
    folder = write_run(tmp_path / "run")
    written = build.make(ReportOptions([folder]))
    assert written == [folder / "report.html", folder / "MODEL_CARD.md"]
    assert "images, confusion, boundaries and calibration are omitted" in caplog.text
    assert "could not be evaluated" in written[0].read_text()
    build.make(ReportOptions([folder], curves_only=True))
    assert "Curves only" in written[0].read_text()
    with pytest.raises(OcrnetError, match="no checkpoint to evaluate"):
        build.make(ReportOptions([folder], report_filter=ReportFilter(images=3)))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "lr_init=1"], "--set lr_init: no effect on report"),
        (["--output", "x.pdf"], "--output x.pdf: must be an HTML file"),
        (["--checkpoint_path", "x"], "there are several runs"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, argv, message):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    args = parse("report", [*map(str, runs), *argv])
    report_filter = ReportFilter(args.given, args.options.get("checkpoint_path"))
    output = args.options.get("output")
    with pytest.raises(OcrnetError, match=message):
        build.make(ReportOptions([Path(run) for run in args.inputs], output and Path(output), report_filter))
    with pytest.raises(OcrnetError, match="listed twice"):
        build.make(ReportOptions([runs[0], runs[0]]))
    with pytest.raises(OcrnetError, match="--watch shows only the curves"):
        build.watch(ReportOptions([runs[0]], report_filter=ReportFilter(images=1)))


def test_names_are_printed_without_control_characters(tmp_path, capsys):
    folder = write_run(tmp_path / "a\x1b[2J\nb")
    assert main(["report", str(folder)]) == 0
    assert main(["report", f"{folder}c"]) == 2
    output = capsys.readouterr()
    assert r"a\x1b[2J\nb: images, confusion" in output.out
    assert r"a\x1b[2J\nb/report.html" in output.out
    assert r"a\x1b[2J" in output.err
    assert "\x1b" not in output.out + output.err


def test_runs_may_be_anywhere_on_the_command_line():
    args = parse("report", ["--watch", "a", "--set", "eval.flip=True", "b", "--curves_only", "False", "c"])
    assert args.inputs == ("a", "b", "c")
    assert args.options == {"watch": "True", "curves_only": "False"}


def test_a_page_that_cannot_be_written_is_an_error_and_the_older_one_is_kept(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    output = build.make(ReportOptions([folder], curves_only=True))[0]
    before = output.read_bytes()

    def fail_disk_full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail_disk_full)
    with pytest.raises(OcrnetError, match=r"cannot write .*report\.html: No space left on device"):
        build.make(ReportOptions([folder], curves_only=True))
    assert output.read_bytes() == before
    assert not list(folder.glob(".*.tmp"))


def test_watch_follows_a_run_and_ends_with_it(tmp_path, caplog):
    folder = write_run(tmp_path / "run", steps=(10,))
    lines = (write_run(tmp_path / "whole") / "metrics.jsonl").read_text().splitlines(keepends=True)

    def train() -> None:
        page_path = folder / "report.html"
        for _ in range(100):
            if page_path.exists() and 'http-equiv="refresh"' in page_path.read_text():
                break
            time.sleep(0.05)
        half = len(lines[2]) // 2
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(lines[2][:half])
            file.flush()
            time.sleep(0.4)
            file.write(lines[2][half:] + "".join(lines[3:]))

    trainer = threading.Thread(target=train)
    trainer.start()
    output = build.watch(ReportOptions([folder]), interval=0.1)
    trainer.join()
    assert "report.html: run after step 10/30" in caplog.messages[0]
    assert 'http-equiv="refresh"' not in output.read_text()
    assert "30 of 30 steps" in output.read_text()


def test_watch_writes_a_last_page_when_it_is_interrupted(tmp_path):
    folder = write_run(tmp_path / "run", steps=(10,))
    before = signal.getsignal(signal.SIGINT)
    threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
    output = build.watch(ReportOptions([folder]), interval=30)
    assert 'http-equiv="refresh"' not in output.read_text()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_confusion_matrix_of_many_classes_stays_small():
    counts = (np.eye(150, dtype=np.int64) * 1000 + (np.arange(150)[:, None] + 1 == np.arange(150))).tolist()
    drawn = charts.heat(counts, [f"class {i}" for i in range(150)])
    assert drawn.count("<title>") == 150 + 149
    assert len(drawn) < 200_000


def test_axes_have_round_numbers_and_long_curves_keep_their_peaks():
    assert charts.nice(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert charts.nice(3, 3)[0] <= 3 <= charts.nice(3, 3)[-1]
    for low, high in ((1e-6, 3e-6), (-2, 7), (0, 159_999)):
        ticks = charts.nice(low, high)
        assert ticks[0] <= low < high <= ticks[-1]
        assert 2 <= len(ticks) <= 8
    points = [(float(i), 0.0) for i in range(10_000)]
    points[1234] = (1234.0, 9.0)
    kept = charts.thinned(points)
    assert len(kept) <= 2 * charts.PARTS + 2
    assert points[1234] in kept
    assert [kept[0], kept[-1]] == [points[0], points[-1]]
    assert charts.thinned(points[:50]) == points[:50]
    assert [charts.short(n) for n in (800, 20_000, 1_500_000)] == ["800", "20k", "1.5M"]


def test_curves_only_contradicts_flags_about_images(tmp_path):
    with pytest.raises(OcrnetError, match="--curves_only omits the evaluation"):
        build.make(ReportOptions([tmp_path], curves_only=True, report_filter=ReportFilter(images=3)))
