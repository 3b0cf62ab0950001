"""The report in a real browser: nothing is fetched, nothing overflows, and a pixel's relation follows the finger."""

import numpy as np
import pytest
from report_runs import made_up_figures, write_run

from ocrnet.report import compare, page, source


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    figures = made_up_figures(folder / "images")
    runs = [source.read(write_run(folder / name, gain=gain)) for name, gain in (("one", 0.0), ("two", 0.1))]
    np.save(folder / "relation.npy", figures.arrays["ocr_relation"])
    (folder / "one.html").write_text(page.page(runs[0], figures))
    (folder / "both.html").write_text(compare.page(runs, [figures, figures]))
    (folder / "live.html").write_text(page.page(runs[0], None, refresh=1))
    return folder


@pytest.mark.parametrize("name", ["one", "both"])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_fits_a_phone_and_fetches_nothing(pages, open_page, name, dark):
    seen = open_page((pages / f"{name}.html").as_uri(), width=390, dark=dark)
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 390
    back = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 200) is dark
    broken = "Array.from(document.images).filter(image => !image.complete || !image.naturalWidth).length"
    assert seen.page.evaluate(broken) == 0
    seen.assert_clean()


def test_pointing_tells_a_pixels_relation_and_a_steps_values(pages, open_page):
    seen = open_page((pages / "one.html").as_uri())
    relation = seen.page.locator(".relation")
    first = relation.inner_text()
    seen.page.locator(".stage").click(position={"x": 30, "y": 30})
    clicked = relation.inner_text()
    seen.page.keyboard.press("ArrowRight")
    assert len({first, clicked, relation.inner_text()}) == 3
    shares = [float(text) for text in seen.page.locator(".relation b").all_inner_texts()]
    kept = np.load(pages / "relation.npy") / 2.55  # num_classes, height, width: in per cent
    box, (_, height, width) = seen.page.locator(".stage").bounding_box(), kept.shape
    there = kept[:, int(30 / box["height"] * height), int(30 / box["width"] * width) + 1]
    assert shares == pytest.approx(there.tolist(), abs=0.06)
    chart = seen.page.locator("figure.chart").first
    chart.locator("svg").hover(position={"x": 60, "y": 60})
    assert "step 10" in chart.inner_text()
    seen.page.mouse.move(0, 0)
    assert "step" not in chart.inner_text()
    seen.assert_clean()


def test_a_live_page_loads_itself_anew(pages, open_page):
    seen = open_page((pages / "live.html").as_uri())
    with seen.page.expect_event("load", timeout=10_000):
        pass
    seen.assert_clean()
