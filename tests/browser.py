"""What tests in a browser share: Chromium, if there is one, a page that reports what goes wrong, a look at pixels."""

import io
import shutil
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = "--no-sandbox --disable-quic --disable-background-networking --disable-component-update --disable-sync"
SIZES = [(1280, 900), (390, 844)]


def launched():
    """Yields a running Chromium once; skips where it or Playwright is missing. The fixture `chromium` is made of it."""
    library = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"needs one of {', '.join(CHROMIUM)} on the PATH")
    with library.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*QUIET.split(), "--no-first-run"])
        yield browser
        browser.close()


@contextmanager
def opened(chromium, address, *, size=(1280, 900), scheme="light", forgiven=(), **settings):
    """A page at an address; at its end it must have reported no error and asked no other host.

    Args:
        chromium: the fixture.
        address: http://, or file:// for a page of its own.
        size: of the window, in CSS pixels.
        scheme: "light" or "dark".
        forgiven: parts of messages that the test provokes.
        settings: for Playwright's `new_page`, e.g. reduced_motion.
    """
    width, height = size
    page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, **settings)
    troubles, asked = [], []
    page.on("console", lambda said: said.type in ("error", "warning") and troubles.append(said.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(address)
        yield page
        assert [words for words in troubles if not any(part in words for part in forgiven)] == []
        own = urlsplit(address).netloc
        assert [url for url in asked if urlsplit(url).scheme != "data" and urlsplit(url).netloc != own] == []
    finally:
        page.close()


def until(page, expression, seconds=20):
    """Waits until a JavaScript expression holds; Playwright's own wait compiles text, which our pages forbid."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"after {seconds} s still not: {expression}"
        page.wait_for_timeout(20)


def pixels(target):
    """What a page or an element looks like, (rows, columns, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(target.screenshot())).convert("RGB"))


def fits_sideways(page):
    """Whether nothing makes the page scroll to the side."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
