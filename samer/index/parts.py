"""Which part of the images one of many jobs takes, each of which makes an index of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig
from samer.data.records import ImageRecord

PartOfMany = tuple[int, int]  # the first of three parts: (1, 3)


def part_named(text: str) -> PartOfMany:
    """A part as it is written, "3/100": the third of a hundred.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"part {text!r}: give K/N, the Kth of N parts, such as 3/100")
    return int(match[1]), int(match[2])


def check_parts(merge: MergeConfig) -> None:
    """Refuses a compressor that would learn other codes from each part.

    Raises:
        InputError: it does.
    """
    if make_compressor(merge).needs_corpus:
        raise InputError(
            f"{merge.compressor} learns from a whole corpus, and each part would have codes of its own; use another "
            "compressor, or one job (NNODES machines)"
        )


def share_of(jobs: Sequence, part: PartOfMany) -> Sequence:
    """The jobs in a part: parts are contiguous, differ by at most one job, and are all jobs together."""
    number, count = part
    return jobs[(number - 1) * len(jobs) // count : number * len(jobs) // count]


def own_part(split: str, records: Sequence[ImageRecord], part: PartOfMany, size: int) -> list[ImageRecord]:
    """The records of a split that are in a part, in whole shards of `size`.

    Raises:
        InputError: none is, or what answers its queries is in other parts.
    """
    starts = share_of(range(0, len(records), size), part)
    own = [record for start in starts for record in records[start : start + size]]
    if not own:
        shards = -(-len(records) // size)
        raise InputError(f"{split}: part {part[0]}/{part[1]} is empty; its {shards:,} shards allow as many parts")
    names, here = ({record.image_id for record in some} for some in (records, own))
    graded = (name for record in own for caption in record.captions for name, _ in caption.grades)
    if any(name in names and name not in here for name in graded):
        raise InputError(f"{split}: images of several parts answer its queries; build it in one job (NNODES machines)")
    return own
