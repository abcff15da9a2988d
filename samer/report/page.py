"""The report: one HTML file that shows what a run did, its figures, and what its winning vectors stand on.

The file holds everything it shows; no request leaves it. Beside it, `<name>_figures/` has the same pictures for papers.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image

from samer.data.pictures import load_image
from samer.report.drawing import draw_boxes, panels, regions_over, spotlight, thumbnail
from samer.report.gallery import Case, Gallery, image_boxes, smallest_area
from samer.report.plots import plots
from samer.report.tables import plain_tables
from samer.runtime.files import atomic_path, listing, trouble

_OF_A_REPORT = re.compile(r"(case|regions)-.*\.png|qualitative\.png|.*\.svg")  # beside it
EVIDENCE_SIDE, THUMBNAIL_SIDE = 320, 150  # pixels
PLOT_TITLES = {
    "recall_budget": "Recall against budget",
    "recall_bytes": "Recall against bytes per image",
    "phrases_budget": "Recall of short phrases against budget",
    "grounding": "What winning vectors stand on",
}


@dataclass(frozen=True)
class Table:
    """A table of the report; cells are text."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def metrics_table(rows: Sequence[dict]) -> Table:
    """Recall both ways with intervals, from what scripts/eval.py writes (`both_directions`), a name added to each."""
    body = []
    for row in rows:
        text, image = row["text_to_image"], row["image_to_text"]
        plain = [f"{text[name]['value']:.1f}" for name in ("r@5", "r@10", "ndcg@10")]
        size = [_vectors(row), f"{row['bytes_per_image']:,.0f}"]
        body.append([row["name"], _with_interval(text["r@1"]), *plain, _with_interval(image["r@1"]), *size])
    note = (
        "In percent, text to image unless said otherwise; 95 % bootstrap intervals, captions of one image together. "
        "Bytes as these indexes store them."
    )
    head = ["", "R@1", "R@5", "R@10", "nDCG@10", "R@1, image to text", "vectors", "bytes per image"]
    return Table("Retrieval", note, head, body)


def _vectors(row: dict) -> str:
    """Vectors per image, fewest to most where they differ."""
    if "sizes" not in row:
        return f"{row['vectors_per_image']:,}"
    return "{fewest:,} to {most:,} (mean {mean:,.1f})".format(**row["sizes"]["vectors"])


def _with_interval(metric: dict) -> str:
    return "{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]".format(**metric)


def headline(base: dict, own: dict, controls: Sequence[dict] = ()) -> list[tuple[str, str]]:
    """The rows of `metrics_table` that matter most, as large figures: baseline, the one in question, controls."""
    if base is own:
        tiles = [(_recall(own), "R@1, text to image")]
        return [*tiles, (f"{own['bytes_per_image']:,.0f}", f"bytes per image, {own['vectors_per_image']:,} vectors")]
    share = base["bytes_per_image"] / own["bytes_per_image"]
    return [
        *(
            (_recall(row), f"R@1, {row['name']} ({row['vectors_per_image']:,} vectors per image)")
            for row in (base, own, *controls)
        ),
        (
            f"{share:.1f} x",
            f"smaller: {own['bytes_per_image']:,.0f} bytes per image, not {base['bytes_per_image']:,.0f}",
        ),
    ]


def _recall(row: dict) -> str:
    return f"{row['text_to_image']['r@1']['value']:.1f} %"


def write_report(
    path: str | Path,
    *,
    title: str,
    about: Sequence[tuple[str, str]],
    tiles: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    results: dict | None = None,
    gallery: Gallery | None = None,
    note: str = "",
) -> list[Path]:
    """Writes the HTML file and, beside it, the same pictures as files.

    Args:
        path: of the HTML file.
        title: what was run.
        about: (term, description), what it was run on and how.
        tiles: (figure, what it is), the run in a few numbers.
        tables: shown below them, in order.
        results: as `comparison.compare` returns them; its rows are plotted.
        gallery: None: no pictures, the note says why.
        note: a sentence above the gallery.

    Returns:
        The files written, the HTML first.
    """
    path = Path(path)
    folder = path.with_name(f"{path.stem}_figures")
    for old in listing(folder):
        if _OF_A_REPORT.fullmatch(old.name):
            try:
                old.unlink(missing_ok=True)
            except OSError as error:
                raise trouble(old, error, "removed") from None
    drawn, written = _draw_plots(results, folder) if results else ([], [])
    cases, regions = [], []
    if gallery:
        pictures = _Pictures(gallery)
        cases, files = _draw_cases(gallery, pictures, folder)
        regions, more = _draw_regions(gallery, pictures, folder)
        written += [*files, *more]
        note = " ".join(filter(None, (note, gallery.note)))
        if not cases:
            note = note or "No caption names anything that has a box, so there is nothing to show."
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    text = environment.get_template("report.html").render(
        title=title,
        about=about,
        tiles=tiles,
        tables=[*tables, *(Table(*words) for words in (plain_tables(results) if results else []))],
        plots=drawn,
        cases=cases,
        regions=regions,
        note=note,
        folder=folder.name,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [path, *written]


class _Pictures:
    """The images of a gallery, each read once and made small enough to draw on."""

    def __init__(self, gallery: Gallery) -> None:
        self.records = gallery.records
        self.read: dict[int, Image.Image] = {}

    def __getitem__(self, number: int) -> Image.Image:
        if number not in self.read:
            side = 2 * EVIDENCE_SIDE
            image = load_image(self.records[number].image_path, (side, side), inside=True)
            self.read[number] = thumbnail(image, side)
        return self.read[number]


def _draw_plots(results: dict, folder: Path) -> tuple[list[dict], list[Path]]:
    """What the page needs of each plot, and the files written."""
    drawn, written = [], []
    for name, (light, dark) in plots(results).items():
        written.append(folder / f"{name}.svg")
        with atomic_path(written[-1]) as temporary:
            temporary.write_bytes(light)
        drawn.append({"title": PLOT_TITLES[name], "light": _data(light, "svg+xml"), "dark": _data(dark, "svg+xml")})
    return drawn, written


def _draw_cases(gallery: Gallery, pictures: _Pictures, folder: Path) -> tuple[list[dict], list[Path]]:
    """What the page needs of each case, and the files written: one each, and one of the first case of every rule."""
    cases, written, firsts = [], [], {}
    for number, case in enumerate(gallery.cases, 1):
        picture = pictures[case.image]
        lit = [spotlight(picture, evidence, case.phrase.boxes) for evidence in case.evidence]
        cases.append(_case_words(case, gallery, lit, pictures))
        row = [("the image, boxed", draw_boxes(picture, case.phrase.boxes))]
        for name, image, mass, rank in zip(gallery.names, lit, case.box_mass, case.ranks):
            row.append((f"{name}\nBoxMass {100 * mass:.0f} %, rank {rank}", image))
        head = f"{case.caption.text}   [{case.phrase.text}]"
        figure = panels([row[:4], row[4:]], [head, ""]) if row[4:] else panels([row], [head])
        written.append(_save(figure, folder / f"case-{number:02d}.png"))
        firsts.setdefault(case.rule, (f"{case.rule}: {head}", row))
    if firsts:
        heads, rows = zip(*firsts.values())
        written.append(_save(panels(rows, heads, height=190), folder / "qualitative.png"))
    return cases, written


def _draw_regions(gallery: Gallery, pictures: _Pictures, folder: Path) -> tuple[list[list[dict]], list[Path]]:
    """What the page needs of each image whose regions are shown, and the files written."""
    drawn, written = [], []
    for number, item in enumerate(gallery.regions, 1):
        image, boxes = pictures[item.image], image_boxes(gallery.records[item.image])
        row = [("image, with all its boxes", draw_boxes(image, boxes))]
        row += [(name, regions_over(image, regions, boxes)) for name, regions in item.assignments]
        drawn.append([{"name": name, "source": _jpeg(drawing, EVIDENCE_SIDE)} for name, drawing in row])
        written.append(_save(panels([row], [""]), folder / f"regions-{number:02d}.png"))
    return drawn, written


def _case_words(case: Case, gallery: Gallery, lit: Sequence[Image.Image], pictures: _Pictures) -> dict:
    """What the page needs of a case."""
    text, phrase = case.caption.text, case.phrase
    methods = [
        {
            "name": name,
            "rank": rank,
            "box_mass": f"{100 * mass:.0f} %",
            "evidence": _jpeg(image, EVIDENCE_SIDE),
        }
        for name, rank, mass, image in zip(gallery.names, case.ranks, case.box_mass, lit)
    ]
    shown = [0, len(gallery.names) - 1] if len(gallery.names) > 1 else [0]
    tops = [
        {
            "name": gallery.names[k],
            "rank": case.ranks[k],
            "images": [
                {"source": _jpeg(pictures[image], THUMBNAIL_SIDE), "true": image == case.image, "place": place}
                for place, image in enumerate(case.top[k], 1)
            ],
        }
        for k in shown
    ]
    return {
        "rule": case.rule,
        "boxed": _jpeg(draw_boxes(pictures[case.image], phrase.boxes), EVIDENCE_SIDE),
        "before": text[: phrase.start],
        "phrase": text[phrase.start : phrase.end],
        "after": text[phrase.end :],
        "area": f"{100 * smallest_area(phrase):.1f} %",
        "methods": methods,
        "tops": tops,
        "image": gallery.records[case.image].image_id,
    }


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _jpeg(image: Image.Image, side: int) -> str:
    content = io.BytesIO()
    thumbnail(image, side).save(content, "JPEG", quality=82, optimize=True)
    return _data(content.getvalue(), "jpeg")


def _save(image: Image.Image, path: Path) -> Path:
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG", optimize=True)
    return path
