"""The report's pictures: cases chosen by rule, and what every method's winning vectors stand on.

Shape letters: Q queries (captions), I images, P patches of an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from samer.compressors import Compressor
from samer.config import InputError, MergeConfig
from samer.data.contents import named
from samer.data.records import Box, Caption, ImageRecord, Phrase
from samer.data.stamps import Stamps
from samer.evaluation import caption_grades, fitted_compressor, grade_matrix, score_records
from samer.grounding import PhraseIndex, ground
from samer.index.read import Index
from samer.metrics import query_metrics
from samer.retrievers.banks import Bank
from samer.retrievers.base import Encoder, Projector
from samer.runtime.processes import print0
from samer.runtime.progress import Progress
from samer.tokens import regions_of_patches

PER_RULE = 3  # cases that each rule chooses
TOP = 5


@dataclass(frozen=True)
class Shown:
    """A method in the gallery: how images are compressed, the projector, and its scores (Q, I) if they are at hand.

    `bank`: its query bank, where its compressor needs one.
    """

    name: str
    merge: MergeConfig
    projector: Projector
    scores: Tensor | None = None
    bank: Bank | None = None


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
    caption: Caption
    phrase: Phrase
    ranks: list[int]
    top: list[list[int]]
    evidence: list[np.ndarray]
    box_mass: list[float]


@dataclass(frozen=True)
class Regions:
    """An image's regions: (name, (rows, columns) long, the region of each patch, -1 for none) per method."""

    image: int
    assignments: list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Gallery:
    """Cases and regions of a split, with what is needed to draw them."""

    records: Sequence[ImageRecord]
    names: list[str]
    cases: list[Case]
    regions: list[Regions]
    note: str = ""  # what is to be known of its pictures

    @property
    def shown(self) -> list[int]:
        """Numbers of the images whose pictures it shows, each once."""
        found = [number for case in self.cases for number in (case.image, *itertools.chain(*case.top))]
        return list(dict.fromkeys([*found, *(item.image for item in self.regions)]))


def noting_replaced(gallery: Gallery, encoder: Encoder, split: str, indexes: Sequence[Index]) -> Gallery:
    """The gallery with a note, printed too, if it shows pictures that are not those that the indexes were made from.

    What can't be compared, as in indexes of earlier versions, is taken at its word.
    """
    records, stamps = [gallery.records[number] for number in gallery.shown], Stamps()
    known = [index.contents(split) for index in indexes]
    ours, disk = encoder.contents(records, stamps), Encoder.contents(encoder, records, stamps)
    replaced = []
    for record, *now in zip(records, ours, disk):
        hashes = {*now, *(contents.get(record.image_id) for contents in known)}
        if len({each for each in hashes if isinstance(each, str)}) > 1:
            replaced.append(record.image_id)
    if not replaced:
        return gallery
    note = (
        f"{len(replaced):,} of the {len(records):,} pictures shown were replaced since they were indexed "
        f"({named(replaced)}): ranks are of the pictures before; build the index again (it makes those shards anew)."
    )
    print0(note)
    return replace(gallery, note=note)


def check_images(index: Index, split: str, records: Sequence[ImageRecord], root: str | Path) -> None:
    """Refuses an index whose split holds other images than the records, in number or order."""
    if [image for ids, *_ in index.images(split) for image in ids] != [record.image_id for record in records]:
        raise InputError(f"{index.folder}: its images are not those of {split} in {root}")


def smallest_phrase(caption: Caption) -> Phrase | None:
    """The phrase with boxes whose smallest box is the smallest; None if no phrase has boxes."""
    return min((phrase for phrase in caption.phrases if phrase.boxes), key=smallest_area, default=None)


def smallest_area(phrase: Phrase) -> float:
    """Of the phrase's smallest box, as a share of the image."""
    return min((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in phrase.boxes)


def choose_cases(
    records: Sequence[ImageRecord], ranks: Sequence[np.ndarray], names: Sequence[str], *, seed: int = 0
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
        ("Smallest object named", sorted(order, key=lambda k: smallest_area(phrases[k]))),
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
    records: Sequence[ImageRecord],
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
    grades = grade_matrix(caption_grades(records), len(records))
    own = torch.tensor([image for image, _ in captions])[:, None] == torch.arange(len(records))
    positives = own if grades is None else grades > 0
    ranks, tops, methods = [], [], []
    for method in shown:
        encoder.use_projector(method.projector)
        compressor = fitted_compressor(encoder, records, method.merge, batch_size, bank=method.bank)
        methods.append((method.projector, compressor))
        scores = method.scores
        if scores is None:
            scores = score_records(encoder, records, compressor, batch_size=batch_size)
        ranks.append(query_metrics(scores, positives)["median_rank"])
        tops.append(scores.topk(min(TOP, len(records)), dim=1).indices)
    names = [method.name for method in shown]
    cases = []
    for rule, number in Progress(choose_cases(records, ranks, names, seed=seed), "gallery", unit="captions"):
        image, caption = captions[number]
        phrase = smallest_phrase(caption)
        found = _evidence(encoder, replace(records[image], captions=(caption,)), phrase, methods)
        if found is not None:
            top = [rows[number].tolist() for rows in tops]
            places = [int(values[number]) for values in ranks]
            cases.append(Case(rule, image, caption, phrase, places, top, *found))
    firsts = {case.rule: case.image for case in reversed(cases)}
    images = list(dict.fromkeys(reversed(firsts.values()))) if regions else []
    return Gallery(records, names, cases, _regions(encoder, records, images, regions, batch_size))


def _evidence(
    encoder: Encoder, record: ImageRecord, phrase: Phrase, methods: Sequence[tuple[Projector, Compressor]]
) -> tuple[list[np.ndarray], list[float]] | None:
    """What a phrase's winning vectors stand on and the share of it inside its boxes, per method, as `Case` holds them.

    Args:
        encoder: its projector is replaced.
        record: of one image and one caption.
        phrase: of the caption, with boxes.
        methods: projector and fitted compressor of each.

    Returns:
        None if no token belongs to the phrase: the tokenizer drops every character of it.
    """
    (caption,) = record.captions
    alone = [replace(record, captions=(replace(caption, phrases=(phrase,)),))]
    inputs = encoder.record_inputs(alone)
    evidence, mass = [], []
    for projector, compressor in methods:
        encoder.use_projector(projector)
        query = encoder.encode_queries(encoder.query_inputs([caption.text]))
        index = PhraseIndex(alone, [query])
        visual = encoder.encode_images(inputs, compressor.needs)
        own = index.own_tokens([0], [query.tokens[0][query.mask[0]]])
        found = ground(compressor(visual), own, index, visual)
        if not len(found["phrases"]):
            return None
        evidence.append(_on_grid(found["evidence"][0], visual.grid[0]).float().numpy())
        mass.append(float(found["box_mass"][0]))
    return evidence, mass


def _regions(
    encoder: Encoder, records: Sequence[ImageRecord], images: Sequence[int], methods: Sequence[Shown], batch_size: int
) -> list[Regions]:
    """The regions of some images by each method; the encoder's projector is replaced."""
    drawn = [Regions(image, []) for image in images]
    for method in methods if drawn else ():
        encoder.use_projector(method.projector)
        compressor = fitted_compressor(encoder, records, method.merge, batch_size, bank=method.bank)
        for item in drawn:
            visual = encoder.encode_images(encoder.record_inputs([records[item.image]]), compressor.needs)
            regions = regions_of_patches(compressor(visual).assignments, visual.source)
            item.assignments.append((method.name, _on_grid(regions[0], visual.grid[0])))
    return drawn


def _on_grid(values: Tensor, grid: Tensor) -> Tensor:
    """Values (P,) of an image's patches as its grid (2,) has them, (rows, columns), on the CPU."""
    rows, columns = grid.tolist()
    return values[: rows * columns].reshape(rows, columns).cpu()


def image_boxes(record: ImageRecord) -> list[Box]:
    """All boxes that any caption of the image names, and of its things, each once."""
    phrases = [phrase for caption in record.captions for phrase in caption.phrases]
    return list(dict.fromkeys(box for each in (*phrases, *record.things) for box in each.boxes))
