"""Dense texts: a long description of each image of a split, in a file of JSON lines beside the captions or elsewhere.

A line is {"text": ...} with "image_id" (scripts/describe.py writes so), or without it, one for each image in the order
of the split, as D2S-VSE and SEPS ship them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.data.parts import split_part
from samer.data.records import ImageRecord
from samer.data.texts import field, rows_of
from samer.runtime.files import is_dir, listing, lookup


def dense_file(folder: Path, split: str) -> Path:
    """The one file `*_SPLIT.jsonl` of a folder.

    Raises:
        InputError: there is none, or several.
    """
    files = [path for path in listing(folder) if path.name.endswith(f"_{split}.jsonl")]
    if len(files) != 1:
        raise InputError(
            f"{folder}: {len(files)} files *_{split}.jsonl with long captions; there must be one: restore it, or make "
            "one with scripts/describe.py"
        )
    return files[0]


def dense_rows(path: Path, image_ids: Sequence[str]) -> list[tuple[str, str, Any]]:
    """(image id, where it stands, the row) of every line; ids that are not among `image_ids` are the caller's matter.

    Args:
        path: the file.
        image_ids: of the split, whose order says whose a line is where lines have no id.

    Raises:
        InputError: lines without ids, whose number is another.
    """
    rows = list(rows_of(path))
    if all(isinstance(row, dict) and "image_id" in row for _, row in rows):
        return [(str(row["image_id"]), where, row) for where, row in rows]
    if len(rows) != len(image_ids):
        raise InputError(
            f"{path}: {len(rows):,} lines for {len(image_ids):,} images of the split; restore the file, or write an "
            "image_id in every line"
        )
    return [(image_id, where, row) for image_id, (where, row) in zip(image_ids, rows)]


def dense_texts(source: str | Path, split: str, records: Sequence[ImageRecord], whole: Sequence[str]) -> dict[str, str]:
    """The dense text of every record's image, by image id.

    Args:
        source: a folder with `*_SPLIT.jsonl`, or a file.
        split: of the records; a part of one has the lines of the whole.
        records: that need one.
        whole: image ids of the whole split, in its order.

    Raises:
        InputError: none for an image, two for one, or no text.
    """
    source = lookup(source)
    path = dense_file(source, split_part(split)[0]) if is_dir(source) else source
    found: dict[str, str] = {}
    for image_id, where, row in dense_rows(path, whole):
        if image_id in found:
            raise InputError(f"{where}: a second text for image {image_id[:40]!r}; remove one")
        text = " ".join(field(where, row, "text", str).split())
        if not text:
            raise InputError(f"{where}: empty text; write one")
        found[image_id] = text
    lacking = [record.image_id for record in records if record.image_id not in found]
    if lacking:
        raise InputError(
            f"{path}: no text of {len(lacking):,} of {len(records):,} images, the first is {lacking[0]}; make them "
            "with scripts/describe.py, or set seps.dense=none"
        )
    return {record.image_id: found[record.image_id] for record in records}
