"""The report: one HTML file that shows what a run did, its figures, and what its winning vectors stand on.

The file holds everything it shows; no request leaves it. Beside it, `<name>_figures/` has the same pictures for papers.

Shape letters: Q queries (captions), I images.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from samer import flickr
from samer.cache_io import Cache
from samer.colpali import Encoder, Projector
from samer.config import InputError, MergeConfig
from samer.drawing import draw_boxes, panels, regions_over, spotlight, thumbnail
from samer.evaluation import fitted_compressor, score_records
from samer.grounding import PhraseIndex, ground
from samer.metrics import query_metrics
from samer.runtime import Progress, atomic_path
from samer.tables import plain_tables, plots

PER_RULE = 3  # cases that each rule chooses
TOP = 5
EVIDENCE_SIDE, THUMBNAIL_SIDE = 320, 150  # pixels
PLOT_TITLES = {
    "recall_budget": "Recall against budget",
    "recall_bytes": "Recall against bytes per image",
    "grounding": "What winning vectors stand on",
}


@dataclass(frozen=True)
class Shown:
    """A method in the gallery: how images are compressed, the projector, and its scores (Q, I) if they are at hand."""

    name: str
    merge: MergeConfig
    projector: Projector
    scores: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """A caption in the gallery.

    Attributes:
        rule: why it was chosen.
        image: number of the image it describes.
        caption: its text.
        phrase: the phrase whose evidence is shown, of all with boxes the one with the smallest.
        ranks: of its image, per method.
        top: per method, the best images' numbers.
        evidence: per method, (rows, columns) float: what the winning vectors of the phrase's tokens stand on.
        box_mass: per method, the share of it inside the phrase's boxes, in [0, 1].
    """

    rule: str
    image: int
    caption: flickr.Caption
    phrase: flickr.Phrase
    ranks: list[int]
    top: list[list[int]]
    evidence: list[np.ndarray]
    box_mass: list[float]


@dataclass(frozen=True)
class Regions:
    """An image's regions: (name, assignments (N,) long) per method."""

    image: int
    assignments: list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Gallery:
    """Cases and regions of a split, with what is needed to draw them."""

    records: Sequence[flickr.ImageRecord]
    grid: int
    names: list[str]
    cases: list[Case]
    regions: list[Regions]


@dataclass(frozen=True)
class Table:
    """A table of the report; cells are text."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def metrics_table(rows: Sequence[dict]) -> Table:
    """Recall both ways with intervals, from what scripts/eval.py writes (`both_directions`), a name added to each."""
    with_interval = lambda metric: "{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]".format(**metric)
    body = []
    for row in rows:
        text, image = row["text_to_image"], row["image_to_text"]
        plain = [f"{text[name]['value']:.1f}" for name in ("r@5", "r@10", "ndcg@10")]
        size = [f"{row['vectors_per_image']:,}", f"{row['bytes_per_image']:,.0f}"]
        body.append([row["name"], with_interval(text["r@1"]), *plain, with_interval(image["r@1"]), *size])
    note = (
        "In percent, text to image unless said otherwise; 95 % bootstrap intervals, captions of one image together. "
        "Bytes as these indexes store them."
    )
    head = ["", "R@1", "R@5", "R@10", "nDCG@10", "R@1, image to text", "vectors", "bytes per image"]
    return Table("Retrieval", note, head, body)


def headline(base: dict, own: dict, controls: Sequence[dict] = ()) -> list[tuple[str, str]]:
    """The rows of `metrics_table` that matter most, as large figures: baseline, the one in question, controls."""
    recall = lambda row: f"{row['text_to_image']['r@1']['value']:.1f} %"
    if base is own:
        tiles = [(recall(own), "R@1, text to image")]
        return [*tiles, (f"{own['bytes_per_image']:,.0f}", f"bytes per image, {own['vectors_per_image']:,} vectors")]
    share = base["bytes_per_image"] / own["bytes_per_image"]
    return [
        *(
            (recall(row), f"R@1, {row['name']} ({row['vectors_per_image']:,} vectors per image)")
            for row in (base, own, *controls)
        ),
        (
            f"{share:.1f} x",
            f"smaller: {own['bytes_per_image']:,.0f} bytes per image, not {base['bytes_per_image']:,.0f}",
        ),
    ]


def check_images(cache: Cache, split: str, records: Sequence[flickr.ImageRecord], root: str | Path) -> None:
    """Refuses an index whose split holds other images than the records, in number or order."""
    if [image for ids, *_ in cache.images(split) for image in ids] != [record.image_id for record in records]:
        raise InputError(f"{cache.folder}: its images are not those of {split} in {root}")


def smallest_phrase(caption: flickr.Caption) -> flickr.Phrase | None:
    """The phrase with boxes whose smallest box is the smallest; None if no phrase has boxes."""
    return min((phrase for phrase in caption.phrases if phrase.boxes), key=_smallest_area, default=None)


def _smallest_area(phrase: flickr.Phrase) -> float:
    """Of the phrase's smallest box, as a share of the image."""
    return min((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in phrase.boxes)


def choose_cases(
    records: Sequence[flickr.ImageRecord], ranks: Sequence[np.ndarray], names: Sequence[str], *, seed: int = 0
) -> list[tuple[str, int]]:
    """Captions for the gallery, by rule, never by hand: an image at most once, ties in an order drawn from `seed`.

    Args:
        records: of the split, with boxes; a caption without boxes is never chosen.
        ranks: (Q,) of each caption's image, per method: the first is the baseline, the last the method in question.
        names: of the methods.
        seed: of ties and of the random captions.

    Returns:
        Pairs (rule, caption number): largest gains and losses in 1 / rank, the smallest objects, and some at random.
    """
    captions = [(image, caption) for image, record in enumerate(records) for caption in record.captions]
    phrases = [smallest_phrase(caption) for _, caption in captions]
    order = [k for k in np.random.default_rng(seed).permutation(len(captions)).tolist() if phrases[k]]
    gain = 1 / ranks[-1] - 1 / ranks[0]
    rules = [
        ("Smallest object named", sorted(order, key=lambda k: _smallest_area(phrases[k]))),
        ("Chosen at random", order),
    ]
    if len(ranks) > 1:
        losses = sorted((k for k in order if gain[k] < 0), key=lambda k: gain[k])
        gains = sorted((k for k in order if gain[k] > 0), key=lambda k: -gain[k])
        changes = f"{names[-1]} against {names[0]}"
        rules = [(f"Largest gain, {changes}", gains), (f"Largest loss, {changes}", losses), *rules]
    else:
        worst = sorted((k for k in order if ranks[0][k] > 1), key=lambda k: -ranks[0][k])
        rules = [("Ranked worst", worst), *rules]
    chosen, seen = [], set()
    for rule, candidates in rules:
        found = 0
        for k in candidates:
            if found < PER_RULE and captions[k][0] not in seen:
                seen.add(captions[k][0])
                chosen.append((rule, k))
                found += 1
    return chosen


@torch.no_grad()
def make_gallery(
    encoder: Encoder,
    records: Sequence[flickr.ImageRecord],
    shown: Sequence[Shown],
    regions: Sequence[Shown] = (),
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> Gallery:
    """Chooses cases and finds what every method's winning vectors stand on; nothing is compressed with boxes.

    Args:
        encoder: a retriever or a feature store; its projector is replaced.
        records: of the split, with boxes, in the order of the scores.
        shown: the methods, the baseline first, the one in question last.
        regions: whose regions are drawn, for the first case of each rule.
        batch_size: images and captions per forward pass.
        seed: of `choose_cases`.
    """
    captions = [(image, caption) for image, record in enumerate(records) for caption in record.captions]
    positives = torch.tensor([image for image, _ in captions])[:, None] == torch.arange(len(records))
    ranks, tops, compressors = [], [], []
    for method in shown:
        encoder.use_projector(method.projector)
        compressors.append(fitted_compressor(encoder, records, method.merge, batch_size))
        scores = method.scores
        if scores is None:
            scores = score_records(encoder, records, compressors[-1], batch_size=batch_size)
        ranks.append(query_metrics(scores, positives)["median_rank"])
        tops.append(scores.topk(min(TOP, len(records)), dim=1).indices)
    chosen = choose_cases(records, ranks, [method.name for method in shown], seed=seed)
    cases = []
    for rule, number in Progress(chosen, "gallery", unit="captions"):
        image, caption = captions[number]
        phrase = smallest_phrase(caption)
        alone = [replace(records[image], captions=(replace(caption, phrases=(phrase,)),))]
        inputs = encoder.record_inputs(alone)
        evidence, mass = [], []
        for method, compressor in zip(shown, compressors):
            encoder.use_projector(method.projector)
            query = encoder.encode_queries(encoder.query_inputs([caption.text]))
            index = PhraseIndex(alone, [query], encoder.grid)
            visual = encoder.encode_images(inputs, compressor.needs)
            found = ground(
                compressor(visual), index.own_tokens([0], [query.tokens[0][query.mask[0]]]), index, visual.patches
            )
            if not len(found["phrases"]):  # a tokenizer that drops every character of it
                break
            on_patch = found["evidence"][0][visual.patches[0]].reshape(encoder.grid, encoder.grid)
            evidence.append(on_patch.float().cpu().numpy())
            mass.append(float(found["box_mass"][0]))
        else:
            top = [rows[number].tolist() for rows in tops]
            places = [int(values[number]) for values in ranks]
            cases.append(Case(rule, image, caption, phrase, places, top, evidence, mass))
    firsts = {case.rule: case.image for case in reversed(cases)}
    images = list(dict.fromkeys(reversed(firsts.values()))) if regions else []
    drawn = [Regions(image, []) for image in images]
    for method in regions:
        encoder.use_projector(method.projector)
        compressor = fitted_compressor(encoder, records, method.merge, batch_size)
        for item in drawn:
            visual = encoder.encode_images(encoder.record_inputs([records[item.image]]), compressor.needs)
            item.assignments.append((method.name, compressor(visual).assignments[0][visual.patches[0]].cpu()))
    return Gallery(records, encoder.grid, [method.name for method in shown], cases, drawn)


def image_boxes(record: flickr.ImageRecord) -> list[flickr.Box]:
    """All boxes that any caption of the image names, each once."""
    phrases = (phrase for caption in record.captions for phrase in caption.phrases)
    return list(dict.fromkeys(box for phrase in phrases for box in phrase.boxes))


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
    written = []
    drawn = []
    for pattern in ("case-*.png", "regions-*.png", "qualitative.png", "*.svg"):  # of an earlier report
        for old in folder.glob(pattern):
            old.unlink()
    if gallery and not gallery.cases:
        note = note or "No caption names anything that has a box, so there is nothing to show."
    for name, (light, dark) in (plots(results) if results else {}).items():
        written.append(folder / f"{name}.svg")
        with atomic_path(written[-1]) as temporary:
            temporary.write_bytes(light)
        drawn.append({"title": PLOT_TITLES[name], "light": _data(light, "svg+xml"), "dark": _data(dark, "svg+xml")})
    cases, regions, firsts = [], [], []
    if gallery:
        pictures: dict[int, Image.Image] = {}

        def picture(number: int) -> Image.Image:
            if number not in pictures:
                pictures[number] = thumbnail(flickr.load_image(gallery.records[number].image_path), 2 * EVIDENCE_SIDE)
            return pictures[number]

        for number, case in enumerate(gallery.cases, 1):
            lit = [spotlight(picture(case.image), evidence, case.phrase.boxes) for evidence in case.evidence]
            cases.append(_case_words(case, gallery, lit, picture))
            row = [("the image, boxed", draw_boxes(picture(case.image), case.phrase.boxes))]
            for name, image, mass, rank in zip(gallery.names, lit, case.box_mass, case.ranks):
                row.append((f"{name}\nBoxMass {100 * mass:.0f} %, rank {rank}", image))
            head = f"{case.caption.text}   [{case.phrase.text}]"
            written.append(
                _save(
                    panels([row[:4], row[4:]] if row[4:] else [row], [head, ""] if row[4:] else [head]),
                    folder / f"case-{number:02d}.png",
                )
            )
            if case.rule not in [other.rule for other in gallery.cases[: number - 1]]:
                firsts.append((f"{case.rule}: {head}", row))
        if firsts:
            heads, rows = zip(*firsts)
            written.append(_save(panels(rows, heads, height=190), folder / "qualitative.png"))
        for number, item in enumerate(gallery.regions, 1):
            boxes = image_boxes(gallery.records[item.image])
            image = picture(item.image)
            row = [("image, with all its boxes", draw_boxes(image, boxes))]
            row += [(name, regions_over(image, labels, gallery.grid, boxes)) for name, labels in item.assignments]
            regions.append([{"name": name, "source": _jpeg(drawing, EVIDENCE_SIDE)} for name, drawing in row])
            written.append(_save(panels([row], [""]), folder / f"regions-{number:02d}.png"))
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


def _case_words(case: Case, gallery: Gallery, lit: Sequence[Image.Image], picture) -> dict:
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
                {"source": _jpeg(picture(image), THUMBNAIL_SIDE), "true": image == case.image, "place": place}
                for place, image in enumerate(case.top[k], 1)
            ],
        }
        for k in shown
    ]
    return {
        "rule": case.rule,
        "boxed": _jpeg(draw_boxes(picture(case.image), phrase.boxes), EVIDENCE_SIDE),
        "before": text[: phrase.start],
        "phrase": text[phrase.start : phrase.end],
        "after": text[phrase.end :],
        "area": f"{100 * _smallest_area(phrase):.1f} %",
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
