"""The report in a browser: it loads nothing, fits a phone, and shows the relation of the pixel pointed at."""

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
def test_a_page_fits_a_phone_and_loads_nothing(pages, open_page, name, dark):
    watched = open_page((pages / f"{name}.html").as_uri(), width=390, dark=dark)
    assert watched.page.evaluate("document.documentElement.scrollWidth") == 390
    background = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) is dark
    broken_images = "Array.from(document.images).filter(image => !image.complete || !image.naturalWidth).length"
    assert watched.page.evaluate(broken_images) == 0
    watched.assert_clean()


def test_pointing_shows_the_relation_of_a_pixel_and_the_values_of_a_step(pages, open_page):
    watched = open_page((pages / "one.html").as_uri())
    relation = watched.page.locator(".relation")
    first = relation.inner_text()
    watched.page.locator(".stage").click(position={"x": 30, "y": 30})
    clicked = relation.inner_text()
    watched.page.keyboard.press("ArrowRight")
    assert len({first, clicked, relation.inner_text()}) == 3
    shares = [float(text) for text in watched.page.locator(".relation b").all_inner_texts()]
    relation_map = np.load(pages / "relation.npy") / 2.55  # num_classes,height,width in percent
    box, (_, height, width) = watched.page.locator(".stage").bounding_box(), relation_map.shape
    expected = relation_map[:, int(30 / box["height"] * height), int(30 / box["width"] * width) + 1]
    assert shares == pytest.approx(expected.tolist(), abs=0.06)
    chart = watched.page.locator("figure.chart").first
    chart.locator("svg").hover(position={"x": 60, "y": 60})
    assert "step 10" in chart.inner_text()
    watched.page.mouse.move(0, 0)
    assert "step" not in chart.inner_text()
    watched.assert_clean()


def test_a_live_page_reloads(pages, open_page):
    watched = open_page((pages / "live.html").as_uri())
    with watched.page.expect_event("load", timeout=10_000):
        pass
    watched.assert_clean()
