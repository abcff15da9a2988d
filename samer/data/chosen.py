"""Captions chosen for a training (scripts/select_captions.py), as a file.

A JSON object a line, of a caption that is kept: `image_id`, `text`, and what it was chosen by. An image without a line
is left out. Lines of images that are not in the split, or in the part of it that is read, are for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from samer.config import InputError
from samer.data.records import ImageRecord
from samer.data.texts import field, rows_of


def only_chosen(records: Sequence[ImageRecord], path: str | Path) -> list[ImageRecord]:
    """The images of a split with those of their captions that a file of chosen ones names.

    Raises:
        InputError: the file can't be read, names a caption that an image does not have, or none of these images.
    """
    own = {record.image_id: {caption.text for caption in record.captions} for record in records}
    chosen: dict[str, set[str]] = {}
    for where, row in rows_of(path):
        image_id, text = (field(where, row, name, str) for name in ("image_id", "text"))
        if image_id not in own:
            continue
        if text not in own[image_id]:
            raise InputError(
                f"{where}: image {image_id[:40]!r} has no caption {text[:80]!r}; choose anew from the data set at hand"
            )
        chosen.setdefault(image_id, set()).add(text)
    if not chosen:
        raise InputError(
            f"{path}: no caption of these {len(records):,} images; choose from the split that is trained on"
        )
    kept = [record for record in records if record.image_id in chosen]
    return [
        replace(record, captions=tuple(c for c in record.captions if c.text in chosen[record.image_id]))
        for record in kept
    ]
