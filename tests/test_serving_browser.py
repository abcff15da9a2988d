"""The search page in Chromium, served by scripts/serve.py over generated scenes and the small ColPali."""

import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from browser import SIZES, fits_sideways, opened, pixels, until

from samer.config import MergeConfig
from samer.index.write import build_index
from samer.retrievers.hf import Retriever

pytest.importorskip("starlette", reason="needs starlette (the extra `serve`)")
pytest.importorskip("uvicorn", reason="needs uvicorn (the extra `serve`)")
pytestmark = pytest.mark.browser
WORD = "#words button"
RESULT = "#results li"


@pytest.fixture(scope="module")
def server(world, base, tmp_path_factory):
    """The address of a running server with three indexes, the last without regions."""
    from conftest import ROOT

    folder, retriever = tmp_path_factory.mktemp("served"), Retriever.load(str(base))
    for name, regions, kept in (("small", 4, True), ("large", 12, True), ("bare", 20, False)):
        merge = MergeConfig(num_regions=regions)
        build_index(folder / name, world, ["test"], retriever, merge, assignments=kept)
    words = ["--cache-dir", *(folder / name for name in ("large", "small", "bare")), "--data-root", world]
    process = subprocess.Popen(
        [sys.executable, "scripts/serve.py", *map(str, words), "--port", "0", "--threads", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        ready, *_ = select.select([process.stdout], [], [], 120)
        lines = [process.stdout.readline() for _ in range(2)] if ready else []  # first the kind of data set
        assert lines[0] == f"note: {world} is read as flickr (data.name=flickr)\n"
        yield re.match(r"(http://127\.0\.0\.1:\d+)/ searches ", lines[1])[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()


def facts(page):
    return dict(zip(page.locator("#facts dt").all_inner_texts(), page.locator("#facts dd").all_inner_texts()))


def settled(page):
    """Waits until a search has been answered and its pictures are there."""
    page.wait_for_selector(f"#results:not([aria-busy]) {RESULT[9:]}")
    until(page, "[...document.images].every((image) => image.complete && image.naturalWidth)")


def drawn(page):
    """Share of pixels that each canvas of a result covers; 0 where it is not shown."""
    return page.evaluate(
        """() => [...document.querySelectorAll("#results canvas")].map((canvas) => {
            if (!canvas.classList.contains("shown")) return 0;
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            let count = 0;
            for (let k = 3; k < data.length; k += 4) count += data[k] > 0;
            return count / (data.length / 4);
        })"""
    )


def test_typing_searches_and_the_address_keeps_it(chromium, server):
    with opened(chromium, server) as page:
        until(page, "document.querySelector('#status').textContent.startsWith('Write what to look for')")
        assert page.evaluate("document.activeElement.id") == "query"
        page.keyboard.type("a red car")
        settled(page)  # without Enter
        assert page.locator(RESULT).count() == 8
        assert page.locator(WORD).all_inner_texts() == ["a", "red", "car"]
        assert page.locator("#status").inner_text() == "The best 8 of 8 pictures"
        scores = [float(text) for text in page.locator(".score").all_inner_texts()]
        assert scores == sorted(scores, reverse=True)
        assert page.locator(".rank").all_inner_texts() == [str(k) for k in range(1, 9)]
        assert all(re.match(r"Result \d: \d+", image.get_attribute("alt")) for image in page.locator("img").all())
        assert "q=a+red+car" in page.url
        names = page.locator(".name").all_inner_texts()
        page.reload()
        settled(page)
        assert page.locator(".name").all_inner_texts() == names
        assert page.input_value("#query") == "a red car"


def test_what_is_typed_before_the_list_of_indexes_comes_is_searched(chromium, server):
    held = []
    with opened(chromium, server) as page:
        page.route("**/api/indexes", lambda route: held.append(route))
        page.reload()
        page.fill("#query", "a red car")
        while not held:
            page.wait_for_timeout(20)
        assert page.input_value("#query") == "a red car"
        held[0].continue_()
        settled(page)
        assert page.input_value("#query") == "a red car"
        assert "q=a+red+car" in page.url


def test_pictures_that_are_gone_or_changed_bear_a_mark(chromium, server):
    def on_disk(route):
        response = route.fetch()
        answer = response.json()
        for result, state in zip(answer["results"], ["changed", None, "gone"]):
            result["state"] = state
        route.fulfill(response=response, json=answer)

    with opened(chromium, server) as page:
        page.route("**/api/search*", on_disk)
        page.fill("#query", "a red car")
        settled(page)
        assert [card.locator(".state").all_inner_texts() for card in page.locator(RESULT).all()[:3]] == [
            ["changed"],
            [],
            ["gone"],
        ]
        assert page.locator(".state").count() == 2
        assert "--sync" in page.locator(".state").nth(1).get_attribute("title")


def test_a_word_shows_what_it_matched(chromium, server):
    with opened(chromium, f"{server}/?q=a+red+car&index=0", reduced_motion="reduce") as page:
        settled(page)
        assert drawn(page) == [0] * 8
        before = pixels(page.locator(".frame").first)
        page.locator(WORD).nth(1).hover()
        shares = drawn(page)
        assert all(0 < share <= 1 for share in shares)
        assert not np.array_equal(pixels(page.locator(".frame").first), before)
        told = page.locator(".evidence").all_inner_texts()
        assert any(re.fullmatch(r"\d+ % inside the boxes of .red.", text) for text in told)
        page.mouse.move(5, 5)
        assert drawn(page) == [0] * 8
        assert np.array_equal(pixels(page.locator(".frame").first), before)


def test_evidence_lies_on_each_pictures_own_grid(chromium, server):
    """Patches that are lit are cells of the picture's rows and columns, whatever those of its neighbours are."""
    grids = [(2, 3), (5, 1), (1, 4), (3, 3)]
    lit = [{1, 3}, {0, 4}, {2}, set()]  # patches of the vector that the word chose; the last picture has none of it

    def on_other_grids(route):
        response = route.fetch()
        answer = response.json()
        for result, (rows, columns), cells in zip(answer["results"], grids, lit):
            result["grid"] = [rows, columns]
            result["regions"] = [7 if cell in cells else cell % 3 - 1 for cell in range(rows * columns)]
            for word in result["words"]:
                word.update(vectors=[7, 8], boxes=None, box_mass=None)
        route.fulfill(response=response, json=answer)

    with opened(chromium, server, reduced_motion="reduce") as page:
        page.route("**/api/search*", on_other_grids)
        page.fill("#query", "a red car")
        settled(page)
        page.locator(WORD).nth(1).hover()
        assert page.locator("#results canvas.shown").count() == 8
        for place, ((rows, columns), cells) in enumerate(zip(grids, lit)):
            clear = page.evaluate(
                """([place, rows, columns]) => {
                    const canvas = document.querySelectorAll("#results canvas")[place];
                    const { width, height } = canvas;
                    const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
                    const found = [];
                    for (let cell = 0; cell < rows * columns; cell += 1) {
                        const x = Math.floor(((cell % columns) + 0.5) * width / columns);
                        const y = Math.floor((Math.floor(cell / columns) + 0.5) * height / rows);
                        if (data[4 * (y * width + x) + 3] === 0) found.push(cell);
                    }
                    return found;
                }""",
                [place, rows, columns],
            )
            assert set(clear) == cells
        told = page.locator(".evidence").all_inner_texts()[: len(grids)]
        assert "matched a vector without patches" in told[3]
        assert not any("without patches" in text for text in told[:3])


def test_the_keyboard_is_enough(chromium, server):
    with opened(chromium, f"{server}/?q=a+red+car&index=0") as page:
        settled(page)
        page.focus("#query")
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")  # to the next larger index
        until(page, "new URLSearchParams(location.search).get('index') === '2'")
        page.keyboard.press("ArrowLeft")
        until(page, "new URLSearchParams(location.search).get('index') === '0'")
        settled(page)
        page.keyboard.press("Tab")
        assert page.locator(f"{WORD}.active").inner_text() == "a"
        page.keyboard.press("ArrowRight")
        assert page.locator(f"{WORD}.active").inner_text() == "red"
        assert max(drawn(page)) > 0
        page.keyboard.press("Enter")  # pins it
        assert page.locator(f"{WORD}[aria-pressed=true]").inner_text() == "red"
        page.keyboard.press("Escape")
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Shift+Tab")
        assert page.locator(f"{WORD}.active").count() == 0


def test_a_tap_holds_a_word(chromium, server):
    with opened(chromium, f"{server}/?q=a+red+car", size=(390, 844), has_touch=True) as page:
        settled(page)
        page.locator(WORD).nth(2).tap()
        assert page.locator(f"{WORD}.active").inner_text() == "car"
        assert max(drawn(page)) > 0
        page.locator(WORD).nth(2).tap()
        assert page.locator(f"{WORD}.active").count() == 0


def test_the_slider_moves_between_indexes(chromium, server):
    with opened(chromium, f"{server}/?q=a+red+car&index=1") as page:
        settled(page)
        assert [text.split()[0] for text in page.locator("#ticks span").all_inner_texts()] == ["small", "large", "bare"]
        small, scores = facts(page), page.locator(".score").all_inner_texts()
        assert (small["Index"], small["Vectors"], small["Per image"]) == ("small", "4, bfloat16", "132 B")
        page.locator(WORD).nth(1).click()
        page.mouse.move(5, 5)
        page.locator("#slider").fill("1")
        until(page, "document.querySelector('#facts dd').textContent === 'large'")
        until(page, "!document.querySelector('#facts').textContent.includes('\\u2013')")
        settled(page)
        assert page.locator(".score").all_inner_texts() != scores
        assert facts(page)["Vectors"] == "12, bfloat16"
        assert "index=0" in page.url  # its number in the order given
        assert page.locator(f"{WORD}.active").inner_text() == "red"  # the word stays, to compare
        until(page, "document.querySelector('#results canvas').classList.contains('shown')")
        page.locator("#slider").fill("2")
        until(page, "document.querySelector('#hint').textContent.includes('--no-assignments')")
        assert drawn(page) == [0] * 8


def test_troubles_are_told_in_words(chromium, server):
    with opened(chromium, f"{server}/?q=an+<image>", forgiven=["400 (Bad Request)"]) as page:
        page.wait_for_selector("#status.error")
        assert "holds <image>" in page.locator("#status").inner_text()
        assert page.locator(RESULT).count() == 0
        page.fill("#query", "")
        until(page, "document.querySelector('#status').textContent.startsWith('Write what')")
        assert not page.locator("#status.error").count()


def test_an_answer_that_comes_late_changes_nothing(chromium, server):
    with opened(chromium, server) as page:

        def late(route):
            if "q=first" in route.request.url:
                time.sleep(0.5)
            route.continue_()

        page.route("**/api/search*", late)
        page.fill("#query", "first")
        page.keyboard.press("Enter")
        page.fill("#query", "second")
        page.keyboard.press("Enter")
        settled(page)
        page.wait_for_timeout(700)
        assert page.locator(WORD).all_inner_texts() == ["second"]
        assert "q=second" in page.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=["desk", "phone"])
def test_it_fits_the_window_and_is_not_blank(chromium, server, size, scheme):
    query = "a+red+car+" + "w" * 120
    with opened(chromium, f"{server}/?q={query}&index=0", size=size, scheme=scheme) as page:
        settled(page)
        assert fits_sideways(page)
        look = pixels(page)
        assert look.shape[:2] == size[::-1]
        assert len(np.unique(look.reshape(-1, 3), axis=0)) > 500
        assert (np.median(look) > 128) == (scheme == "light")
