"""The browser fixture itself: it sees a script's error and an address elsewhere, and lets neither pass."""

import pytest

PAGE = """<!doctype html><meta name="viewport" content="width=device-width"><title>{title}</title><p id="said"></p>
<link rel="icon" href="data:,"><script>{script}</script>"""


@pytest.fixture
def write(tmp_path):
    def write(script: str) -> str:
        path = tmp_path / "page.html"
        path.write_text(PAGE.format(title="a page", script=script), encoding="utf-8")
        return path.as_uri()

    return write


def test_a_sound_page_is_clean(open_page, write):
    script = "said.textContent = innerWidth + ' ' + matchMedia('(prefers-color-scheme: dark)').matches"
    seen = open_page(write(script), width=390, dark=True)
    assert seen.page.inner_text("#said") == "390 true"
    seen.assert_clean()


def test_errors_and_requests_elsewhere_are_noted(open_page, write):
    seen = open_page(write("fetch('https://example.com/').catch(() => { said.textContent = 'no' })"))
    seen.page.wait_for_selector("text=no", state="attached")
    assert seen.foreign == ["https://example.com/"]
    with pytest.raises(AssertionError):
        seen.assert_clean()
    assert any("oops" in text for text in open_page(write("oops()")).errors)
