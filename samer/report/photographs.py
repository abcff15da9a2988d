"""The README's pictures of photographs: regions, and what the winning vectors of a phrase stand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from samer.config import InputError, MergeConfig
from samer.data import make_reader
from samer.data.pictures import load_image
from samer.data.records import Caption, ImageRecord
from samer.report.drawing import draw_boxes, panels, regions_over, spotlight, thumbnail
from samer.report.gallery import Shown, image_boxes, make_gallery, smallest_area
from samer.retrievers.hf import Retriever

SPLITS = ("train", "val", "test")
LEAST_AREA = 0.01  # of a thing whose evidence is shown, as a share of the picture: a few patches
HEIGHT = 240  # of a picture, in pixels


def photographs(root: str | Path, wanted: Sequence[str]) -> list[ImageRecord]:
    """The records with these ids, in this order, from whichever split of a Flickr30k-Entities folder holds each.

    Raises:
        InputError: an id that is in no split.
    """
    reader = make_reader("flickr")
    records: dict[str, ImageRecord] = {}
    for split in SPLITS:
        if not set(wanted) <= records.keys():
            records |= {each.image_id: each for each in reader.load_split(root, split, boxes=True)}
    for image_id in wanted:
        if image_id not in records:
            raise InputError(f"--images {image_id}: in no split of {root}; give an id that is in one")
    return [records[image_id] for image_id in wanted]


def small_thing(record: ImageRecord) -> Caption:
    """The caption that names the smallest thing of at least `LEAST_AREA`, with this phrase only.

    Raises:
        InputError: no caption names a thing with a box that large.
    """
    named = [
        (smallest_area(phrase), replace(caption, phrases=(phrase,)))
        for caption in record.captions
        for phrase in caption.phrases
        if phrase.boxes and smallest_area(phrase) >= LEAST_AREA
    ]
    if not named:
        raise InputError(
            f"{record.image_id}: no caption names a thing with a box of {LEAST_AREA:.0%} of the picture; choose another"
        )
    return min(named, key=lambda pair: pair[0])[1]


def photograph_figures(
    retriever: Retriever, records: Sequence[ImageRecord], num_regions: int
) -> tuple[Image.Image, Image.Image]:
    """Draws, a row per photograph, SaMer's regions, and the evidence of the phrase that `small_thing` finds.

    Args:
        retriever: with its own projector.
        records: the photographs, with boxes.
        num_regions: K.

    Returns:
        The regions from raster and from farthest centres; the evidence of all tokens and of both.

    Raises:
        InputError: a photograph of which nothing can be shown.
    """
    merges = {
        "all tokens": MergeConfig(compressor="none"),
        f"SaMer, K = {num_regions}": MergeConfig(num_regions=num_regions),
        f"SaMer, farthest, K = {num_regions}": MergeConfig(num_regions=num_regions, center_init="farthest"),
    }
    shown = [Shown(name, merge, retriever.base_projector) for name, merge in merges.items()]
    heads, regions, evidence = [], [], []
    for record in records:
        caption = small_thing(record)
        (phrase,) = caption.phrases
        found = make_gallery(retriever, [replace(record, captions=(caption,))], shown, shown[1:])
        if not found.cases:
            raise InputError(f"{record.image_id}: the retriever's tokenizer drops {phrase.text!r}; choose another")
        (case,), (item,) = found.cases, found.regions
        picture = load_image(record.image_path)
        picture = thumbnail(picture, round(2 * HEIGHT * max(picture.size) / picture.height))
        heads.append(f"{caption.text}   [{phrase.text}]")
        regions.append([("all its boxes", draw_boxes(picture, image_boxes(record)))])
        regions[-1] += [(name, regions_over(picture, numbers, ())) for name, numbers in item.assignments]
        evidence.append([("boxed", draw_boxes(picture, phrase.boxes))])
        evidence[-1] += [
            (f"{name}\nBoxMass {100 * mass:.0f} %", spotlight(picture, lit, phrase.boxes))
            for name, lit, mass in zip(merges, case.evidence, case.box_mass)
        ]
    named = [record.captions[0].text for record in records]
    return panels(regions, named, height=HEIGHT), panels(evidence, heads, height=HEIGHT)
