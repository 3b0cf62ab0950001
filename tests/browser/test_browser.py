"""The browser fixture records the errors of scripts and requests to other hosts."""

import pytest

PAGE = """<!doctype html><meta name="viewport" content="width=device-width"><title>{title}</title><p id="output"></p>
<link rel="icon" href="data:,"><script>{script}</script>"""


@pytest.fixture
def write(tmp_path):
    def write(script: str) -> str:
        path = tmp_path / "page.html"
        path.write_text(PAGE.format(title="a page", script=script), encoding="utf-8")
        return path.as_uri()

    return write


def test_a_valid_page_has_no_errors(open_page, write):
    script = "output.textContent = innerWidth + ' ' + matchMedia('(prefers-color-scheme: dark)').matches"
    watched = open_page(write(script), width=390, dark=True)
    assert watched.page.inner_text("#output") == "390 true"
    watched.assert_clean()


def test_script_errors_and_requests_to_other_hosts_are_recorded(open_page, write):
    watched = open_page(write("fetch('https://example.com/').catch(() => { output.textContent = 'no' })"))
    watched.page.wait_for_selector("text=no", state="attached")
    assert watched.foreign == ["https://example.com/"]
    with pytest.raises(AssertionError):
        watched.assert_clean()
    assert any("oops" in text for text in open_page(write("oops()")).errors)
