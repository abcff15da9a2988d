"""ImageCoDe on disk -> records: sets of ten near-duplicate pictures, and captions that single one of them out.

`train_data.json` and `valid_data.json`, here or in data/: {set: {"<index>": caption}}; the test file has no indices and
can't be evaluated. The pictures of a set lie in a folder of its name anywhere below, as `img<number>.jpg`; index k is
the picture with the k-th smallest number, from 0. All pictures of a split are its records, in the order of the file,
with ids `<set>/img<number>`: retrieval is over all of them, and accuracy within a set (scripts/eval.py --sets) tells
the sets apart by what stands before the slash. There are no boxes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.data.parts import split_part, take_part
from samer.data.reader import Defects, RowReader
from samer.data.records import Caption, ImageRecord, plain_caption
from samer.data.texts import folder_of, read_object
from samer.runtime.files import is_file, listing

PICTURES = 10  # of a set
_SPLITS = {"train": "train", "val": "valid", "valid": "valid"}
_NAME = re.compile(r"img(\d+)\.(?:jpg|jpeg|png)", re.IGNORECASE)


def _file(root: Path, split: str) -> Path | None:
    places = (folder / f"{_SPLITS[split]}_data.json" for folder in (root, root / "data"))
    return next(filter(is_file, places), None)


def _folders(root: Path, wanted: set[str]) -> dict[str, Path]:
    """Set -> its folder, the first that is found; those of sets are not entered."""
    found: dict[str, Path] = {}
    for place, folders, _ in os.walk(root, followlinks=True):
        for name in sorted(wanted.intersection(folders)):
            found.setdefault(name, Path(place) / name)
        if found.keys() == wanted:
            break
        folders[:] = sorted(set(folders) - wanted)
    return found


def _pictures(folder: Path) -> list[Path]:
    """A set's pictures in the order that indices count in.

    Raises:
        InputError: they are not ten.
    """
    numbered = sorted((int(match[1]), path) for path in listing(folder) if (match := _NAME.fullmatch(path.name)))
    if len(numbered) != PICTURES:
        raise InputError(f"{folder}: {len(numbered)} pictures img<number>.jpg, not {PICTURES}; restore the set")
    return [path for _, path in numbered]


def _captions(where: str, value: Any, defects: Defects) -> dict[int, Caption]:
    """A set's captions by the index of their picture."""
    found: dict[int, Caption] = {}
    if not isinstance(value, dict) or not value:
        raise InputError(f"{where}: expected an object of captions by index; restore the file")
    for index, text in value.items():
        with defects.spared():
            if not re.fullmatch("[0-9]", index):
                raise InputError(f"{where}: index {index[:20]!r} is not 0 to {PICTURES - 1}; correct it")
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{where}: index {index} has no caption; write one")
            found[int(index)] = plain_caption(text)
    return found


class ImageCode(RowReader):
    """ImageCoDe; parts of a split, and `limit_images`, count pictures."""

    undescribed = True
    signs = "data/{train,valid}_data.json"

    def holds(self, root: Path) -> bool:
        return any(_file(root, split) for split in ("train", "valid"))

    def check(self, root: str | Path) -> bool:
        folder_of(root, "ImageCoDe copy")
        return False

    def splits(self, root: str | Path) -> list[str]:
        return [split for split in ("train", "valid") if _file(folder_of(root, "ImageCoDe copy"), split)]

    def read(
        self, root: str | Path, split: str, *, boxes: bool, limit_images: int | None, defects: Defects
    ) -> list[ImageRecord]:
        name, part = split_part(split)
        root = folder_of(root, "ImageCoDe copy")
        if name not in _SPLITS:
            raise InputError(f"{root}: no split {name!r}; use train or valid (test has no published answers)")
        path = _file(root, name)
        if path is None:
            raise InputError(f"{root}: no {_SPLITS[name]}_data.json, here or in data; restore it")
        sets = read_object(path)
        folders = _folders(root, set(sets))
        records = []
        for group, value in sets.items():
            with defects.spared():
                captions = _captions(f"{path}: set {group[:80]}", value, defects)
                if group not in folders:
                    raise InputError(f"{root}: no folder {group[:80]!r} with the pictures of that set; restore it")
                for index, picture in enumerate(_pictures(folders[group])):
                    own = (captions[index],) if index in captions else ()
                    records.append(ImageRecord(f"{group}/{picture.stem}", picture, own))
        return take_part(records, part, split)[:limit_images]
