"""Headless Chromium for tests of pages."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# No sandbox, as CI is root; none of Chromium's own calls home.
CHROMIUM_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium_page() -> Iterator[Any]:
    """A page that reaches this machine alone. Skips the test without playwright or Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[test]'")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_ARGUMENTS))
        page = browser.new_page(viewport={"width": 1400, "height": 1200})
        local = re.compile(r"(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:|file:")
        page.route(lambda url: not local.match(url), lambda route: route.abort())
        yield page
        browser.close()
