"""A page opened in headless Chromium: what it says on the console, what it asks the network for, and how it looks.

with opened(path, width_px=390) as view:
    assert view.complaints == [] and view.requests == [] and view.overflow_px() == 0
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
FIGURE_BOXES = """[...document.querySelectorAll('figure svg')].map(drawing => {
    const box = drawing.getBoundingClientRect();
    const inked = [...drawing.querySelectorAll('path, use, text')].filter(part => part.getBoundingClientRect().width > 0);
    return {width: box.width, height: box.height, left: box.left, right: box.right, inked: inked.length};
})"""
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll('figure svg text')].map(text =>
    parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a).filter(size => size > 1))"""

COLOURS = """[getComputedStyle(document.body).backgroundColor,
    ...[...document.querySelectorAll('figure svg text')].map(text => getComputedStyle(text).fill),
    ...[...document.querySelectorAll('figure svg path, figure svg use')].map(line => getComputedStyle(line).stroke)]"""


@dataclass
class View:
    """An open page."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def figures(self) -> list[dict[str, float]]:
        return self.page.evaluate(FIGURE_BOXES)

    def overflow_px(self) -> int:
        """By how much the page is wider than the screen."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def smallest_text_px(self) -> float:
        """Of the upright text in the figures."""
        return self.page.evaluate(SMALLEST_TEXT)

    def colours(self) -> list[str]:
        """Of the paper, and of all letters and lines of the figures."""
        return self.page.evaluate(COLOURS)

    def screenshot(self, path: Path) -> None:
        self.page.screenshot(path=path, full_page=True)


@contextmanager
def opened(path: Path, width_px: int = 1280, dark: bool = False) -> Iterator[View]:
    """Context: the page at `path`; skips the test where Chromium or Playwright is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -e .[dev]")
    if not CHROMIUM:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, env=dict(os.environ))
        try:
            scheme = "dark" if dark else "light"
            page = browser.new_page(viewport={"width": width_px, "height": 900}, color_scheme=scheme)
            view = View(page)
            page.on("console", lambda message: view.complaints.append(message.text))
            page.on("pageerror", lambda error: view.complaints.append(str(error)))
            page.on("request", lambda request: view.requests.append(request.url))
            page.goto(path.as_uri())
            view.requests = [url for url in view.requests if url != path.as_uri() and not url.startswith("data:")]
            yield view
        finally:
            browser.close()
