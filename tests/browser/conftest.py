"""Headless Chromium: `open_page(url)` opens a page and records its errors and its requests to other hosts."""

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
TIMEOUT_MS = 30_000  # of a click or a wait for a text; the two cores of CI run other tests at the same time
LOCAL_SCHEMES = ("data", "blob", "about")


@dataclass
class WatchedPage:
    """A page, the errors on its console, and the urls that it requested from other hosts; these are blocked."""

    page: Any  # playwright.sync_api.Page
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def assert_clean(self) -> None:
        """Assert that there were no errors and no requests to other hosts."""
        assert self.errors == []
        assert self.foreign == []


# Of package scope, not session scope: while Playwright runs, asyncio considers its loop to run in this thread.
@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Return a headless Chromium; without one, skip, or fail if OCRNET_TEST_BROWSER is set."""
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
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGS), timeout=2 * TIMEOUT_MS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., WatchedPage]]:
    """Return a function that opens an http or file url in a new window of a width, with the light or dark scheme."""
    contexts = []

    def open_page(url: str, *, width: int = 1280, height: int = 800, dark: bool = False) -> WatchedPage:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        context.set_default_timeout(TIMEOUT_MS)
        watched = WatchedPage(context.new_page())
        origin = urlsplit(url)

        def intercept(route: Any) -> None:
            target = urlsplit(route.request.url)
            if target.scheme in LOCAL_SCHEMES or (target.scheme, target.netloc) == (origin.scheme, origin.netloc):
                route.continue_()
            else:
                watched.foreign.append(route.request.url)
                route.abort()

        context.route("**/*", intercept)
        watched.page.on("pageerror", lambda error: watched.errors.append(str(error)))
        watched.page.on(
            "console", lambda message: watched.errors.append(message.text) if message.type == "error" else None
        )
        watched.page.goto(url)
        return watched

    yield open_page
    for context in contexts:
        context.close()
