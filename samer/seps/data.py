"""What a run reads: records of a split, its pairs of picture and caption, and the dense texts of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from samer.config import InputError
from samer.data import reader_of, tell_once
from samer.data.chosen import only_chosen
from samer.data.dense import dense_texts
from samer.data.parts import split_part
from samer.data.records import ImageRecord
from samer.seps.settings import SepsData

# images and captions of the splits that published figures are of
COUNTS = {
    ("f30k", "train"): (29_000, 145_000),
    ("f30k", "dev"): (1_014, 5_070),
    ("f30k", "test"): (1_000, 5_000),
    ("coco", "dev"): (1_000, 5_000),
    ("coco", "testall"): (5_000, 25_000),
}


@dataclass(frozen=True)
class SplitData:
    """A split: its records, and each image's dense text, by image id; none where the mode asks for none."""

    split: str
    records: Sequence[ImageRecord]
    dense: dict[str, str]

    def pairs(self) -> list[tuple[int, int]]:
        """(record, caption) numbers of all captions that describe their image."""
        return [(k, m) for k, record in enumerate(self.records) for m, c in enumerate(record.captions) if c.related]


def read_split(data: SepsData, split: str, limit: int | None, *, dense: bool, captions: str = "") -> SplitData:
    """Reads a split, and its dense texts where they are asked for; `captions` names a file of those that are chosen.

    Raises:
        InputError: bad data, an image without a dense text, or with `data.strict` another number of images or captions
            than the published split has.
    """
    reader = reader_of(data)
    load = lambda name, most=None: reader.load_split(
        data.root, name, boxes=False, limit_images=most, strict=data.strict
    )
    records = load(split, limit)
    _check_counts(data, split, limit, records)
    texts = {}
    if dense:
        name = split_part(split)[0]
        whole = records if (name, limit) == (split, None) else load(name)
        texts = dense_texts(data.dense or data.root, split, records, [record.image_id for record in whole])
    return SplitData(split, only_chosen(records, captions) if captions else records, texts)


def _check_counts(data: SepsData, split: str, limit: int | None, records: Sequence[ImageRecord]) -> None:
    """Tells, or with `data.strict` refuses, a split that is not the published one."""
    wanted = COUNTS.get((data.published, split))
    found = len(records), sum(len(record.captions) for record in records)
    if limit is not None or wanted in (None, found):
        return
    line = (
        f"{split} of {data.root} has {found[0]:,} images and {found[1]:,} captions, the published {data.published} "
        f"{wanted[0]:,} and {wanted[1]:,}: figures don't compare"
    )
    if data.strict:
        raise InputError(f"{line}; restore the files, or set data.published=''")
    tell_once(f"note: {line}")
