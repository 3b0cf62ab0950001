"""A real Chromium for the tests of pages: `open_page(url)` opens one, which notes what a page must not do."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = Path(os.environ.get("OCRNET_CHROMIUM", "/usr/bin/chromium"))
ARGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PATIENCE_MS = 30_000  # of a click, or a text that is waited for: CI's two cores do other things too
WITHIN = ("data", "blob", "about")


@dataclass
class Watched:
    """A page, the errors on its console, and the addresses it asked for elsewhere; those are not reached."""

    page: Any  # playwright.sync_api.Page
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def assert_clean(self) -> None:
        """Assert that nothing was wrong, and nothing came from elsewhere."""
        assert self.errors == []
        assert self.foreign == []


# A package's, not the session's: while Playwright runs, asyncio takes the thread for one with a loop in it.
@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Return a headless Chromium; skip where there is none, unless OCRNET_TEST_BROWSER asks for it."""
    sync_api = None
    missing = "" if CHROMIUM.exists() else f"no Chromium at {CHROMIUM}: apt-get install chromium"
    try:
        from playwright import sync_api
    except ImportError:
        missing = "Playwright is not installed: pip install playwright"
    if missing and os.environ.get("OCRNET_TEST_BROWSER"):
        pytest.fail(f"OCRNET_TEST_BROWSER is set, but {missing}")
    if missing:
        pytest.skip(missing)
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGS), timeout=2 * PATIENCE_MS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Watched]]:
    """Return what opens an address, http or file, in a window of its own; ``dark`` and ``width`` as a person has it."""
    contexts = []

    def open_page(url: str, *, width: int = 1280, height: int = 800, dark: bool = False) -> Watched:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        watched = Watched(context.new_page())
        home = urlsplit(url)

        def look(route: Any) -> None:
            asked = urlsplit(route.request.url)
            if asked.scheme in WITHIN or (asked.scheme, asked.netloc) == (home.scheme, home.netloc):
                route.continue_()
            else:
                watched.foreign.append(route.request.url)
                route.abort()

        context.route("**/*", look)
        watched.page.on("pageerror", lambda error: watched.errors.append(str(error)))
        watched.page.on("console", lambda said: watched.errors.append(said.text) if said.type == "error" else None)
        watched.page.goto(url)
        return watched

    yield open_page
    for context in contexts:
        context.close()
