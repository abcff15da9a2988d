"""A report in Chromium, opened from disk as a reader would: whole, legible in both schemes, usable by keyboard."""

import numpy as np
import pytest
import torch
from browser import SIZES, fits_sideways, opened, pixels, until

from samer.config import MergeConfig
from samer.index.write import build_index
from samer.retrievers.base import Projector
from samer.retrievers.hf import Retriever

pytestmark = pytest.mark.browser
LOADED = "[...document.images].every((image) => image.complete && image.naturalWidth > 0)"
LINE = "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth"
# what is held by the keyboard: where it leads or what it is called, and whether it is in sight
HELD = """() => {
    const element = document.activeElement, box = element.getBoundingClientRect();
    const name = element.getAttribute("href") || element.getAttribute("aria-label") || element.tagName;
    const across = box.left >= 0 && box.left < innerWidth;
    return [name, across && box.top >= 0 && box.bottom > box.top && box.top < innerHeight];
}"""


@pytest.fixture(scope="module")
def report(world, base, script, tmp_path_factory):
    """The address of a report by scripts/report.py: two methods with long names, plots, regions."""
    folder = tmp_path_factory.mktemp("report")
    encoder = Retriever.load(str(base), dtype=torch.float32)
    plain = encoder.base_projector
    moved = Projector(plain.weight.flip(0) + 0.5 * plain.weight, plain.bias)
    words = {}
    for name, projector, settings in (
        ("all tokens", plain, MergeConfig(compressor="none")),
        ("farthest centres, a rather long name, trained", moved, MergeConfig(num_regions=6, center_init="farthest")),
    ):
        encoder.use_projector(projector)
        build_index(folder / settings.compressor, world, ["test"], encoder, settings)
        words[name] = f"{name}={folder / settings.compressor}"
    own = words["farthest centres, a rather long name, trained"]
    settings = ["--data-root", str(world), "--out", str(folder / "report.html"), "--method", *words.values()]
    script("report").main([*settings, "--regions", own, "--sweep", own.partition("=")[0]])
    return (folder / "report.html").as_uri()


def load_all(page):
    """Pictures out of sight are loaded only when asked for."""
    page.evaluate("document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; })")
    until(page, LOADED)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=["desk", "phone"])
def test_it_is_whole_and_fits_the_window(chromium, report, size, scheme):
    with opened(chromium, report, size=size, scheme=scheme) as page:
        load_all(page)
        assert page.locator("img").count() > 20
        loaded = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert [address for address in loaded if not address.startswith("data:")] == []
        assert fits_sideways(page)
        height = page.evaluate("document.documentElement.scrollHeight")
        for top in (0, height // 3, 2 * height // 3, height):
            page.evaluate(f"window.scrollTo({{top: {top}, behavior: 'instant'}})")
            assert fits_sideways(page)
            look = pixels(page)
            assert look.shape[:2] == size[::-1]
            assert len(np.unique(look[::3, ::3].reshape(-1, 3), axis=0)) > 40
            # the ground at the page's edges, beside everything
            ground = look[:, -2:].reshape(-1, 3)
            assert (
                (np.median(ground, axis=0) < 60).all() if scheme == "dark" else (np.median(ground, axis=0) > 200).all()
            )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(chromium, report, scheme):
    """Contrast by WCAG: 4.5 to 1 for text."""
    with opened(chromium, report, scheme=scheme) as page:
        found = page.evaluate(
            """() => {
            const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
            const light = (colour) => {
                const [r, g, b] = numbers(colour).slice(0, 3).map((v) => v / 255)
                    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const ground = (element) => {
                for (; element; element = element.parentElement) {
                    const colour = getComputedStyle(element).backgroundColor;
                    if ((numbers(colour)[3] ?? 1) === 1) return colour;
                }
                return "rgb(255, 255, 255)";
            };
            const texts = [];
            const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walker.nextNode()) {
                const words = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
                if (!words) continue;
                const [a, b] = [light(getComputedStyle(element).color), light(ground(element))].sort((x, y) => y - x);
                texts.push([(a + 0.05) / (b + 0.05), words.slice(0, 40)]);
            }
            return texts;
        }"""
        )
        assert len(found) > 60
        assert [pair for pair in found if pair[0] < 4.5] == []


@pytest.mark.parametrize("size", SIZES, ids=["desk", "phone"])
def test_the_keyboard_reaches_everything(chromium, report, size):
    with opened(chromium, report, size=size, reduced_motion="reduce") as page:
        load_all(page)
        labels = page.locator("[tabindex='0']").evaluate_all("all => all.map((one) => one.getAttribute('aria-label'))")
        assert len(labels) == page.locator("table").count() + page.locator("picture").count() == 6
        reached = []
        for number in range(1 + 4 + len(labels)):
            before = pixels(page) if number < 2 else None
            page.keyboard.press("Tab")
            page.wait_for_timeout(30)
            name, seen = page.evaluate(HELD)
            assert seen, name
            assert page.evaluate(LINE) == "solid3px", name
            assert before is None or not np.array_equal(pixels(page), before)
            reached.append(name)
        assert reached == ["#gallery", "#figures", "#gallery", "#regions", "#about", *labels]


def test_a_wide_table_scrolls_by_keyboard(chromium, report):
    with opened(chromium, report, size=(390, 844), reduced_motion="reduce") as page:
        wide = "document.querySelector('.scroll')"
        assert page.evaluate(f"{wide}.scrollWidth > {wide}.clientWidth")
        page.locator(".scroll").first.focus()
        page.keyboard.press("ArrowRight")
        until(page, f"{wide}.scrollLeft > 0")
        assert page.evaluate("window.scrollX") == 0


@pytest.mark.parametrize("name", ["figures", "gallery", "regions", "about"])
def test_links_lead_to_their_sections(chromium, report, name):
    with opened(chromium, report, reduced_motion="reduce") as page:
        load_all(page)
        page.locator(f"nav a[href='#{name}']").click()
        top, bottom, end = page.evaluate(
            f"""() => [document.querySelector('#{name} h2').getBoundingClientRect().top,
            document.querySelector('nav').getBoundingClientRect().bottom,
            scrollY + innerHeight >= document.documentElement.scrollHeight - 2]"""
        )
        assert top >= bottom  # not under the bar that stays
        assert top < 300 or end


def test_the_skip_link_shows_and_skips(chromium, report):
    with opened(chromium, report, reduced_motion="reduce") as page:
        load_all(page)
        skip = page.locator("a.skip")
        assert skip.bounding_box()["x"] < -500
        page.keyboard.press("Tab")
        box = skip.bounding_box()
        assert box["x"] >= 0
        assert box["y"] >= 0
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#gallery h2').getBoundingClientRect().top < 300")


def test_dark_pages_show_dark_plots(chromium, report):
    means = {}
    for scheme in ("light", "dark"):
        with opened(chromium, report, scheme=scheme) as page:
            load_all(page)
            plots = page.locator(".plots .scroll").all()
            means[scheme] = [pixels(plot).mean() for plot in plots]
            assert all(len(np.unique(pixels(plot).reshape(-1, 3), axis=0)) > 30 for plot in plots)
    assert len(means["light"]) == 3
    assert min(means["light"]) > 200
    assert max(means["dark"]) < 90
