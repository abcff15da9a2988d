"""Data sets on disk. A new kind is a file beside these with a `Reader`, and a line in `READERS`."""

from __future__ import annotations

import os
from pathlib import Path

from samer.config import DataConfig, InputError
from samer.data.captions import CaptionFiles
from samer.data.chosen import only_chosen
from samer.data.coco import Coco
from samer.data.flickr import Flickr
from samer.data.imagecode import ImageCode
from samer.data.jsonl import JsonLines
from samer.data.reader import Reader, tell_once
from samer.data.records import ImageRecord
from samer.data.vidore import Vidore
from samer.runtime.files import is_dir

# the order in which a folder's kind is guessed
READERS: dict[str, Reader] = {
    "flickr": Flickr(),
    "coco": Coco(),
    "imagecode": ImageCode(),
    "vidore": Vidore(),
    "captions": CaptionFiles(),
    "jsonl": JsonLines(),
}


def make_reader(name: str, root: str | Path | None = None) -> Reader:
    """The reader of that name (data.name), or where it is empty the one that knows the folder, which is told.

    Raises:
        InputError: a name that is not in the registry, or none and a folder of no known kind.
    """
    if not name and root is not None:
        name = guess_name(root)
        tell_once(f"note: {root} is read as {name} (data.name={name})")
    if name not in READERS:
        raise InputError(f"data.name {name!r} is unknown; use one of {', '.join(sorted(READERS))}")
    return READERS[name]


def reader_of(data: DataConfig) -> Reader:
    """The reader of the data set that settings name, as `make_reader`."""
    return make_reader(data.name, data.root)


def training_records(data: DataConfig, *, boxes: bool) -> list[ImageRecord]:
    """What a training reads: data.train_split, its first images where limited, of their captions those chosen.

    Raises:
        InputError: as `Reader.load_split`, and `only_chosen` for the file data.captions.
    """
    limit = data.limit_train_images
    records = reader_of(data).load_split(
        data.root, data.train_split, boxes=boxes, limit_images=limit, strict=data.strict
    )
    return only_chosen(records, data.captions) if data.captions else records


def guess_name(root: str | Path) -> str:
    """The kind of data set that a folder looks like: the first of `READERS` that knows it.

    Raises:
        InputError: no folder, or of no known kind.
    """
    folder = Path(os.path.expanduser(root))
    if not is_dir(folder):
        raise InputError(f"{root}: not a folder; point DATA_ROOT at the data set")
    for name, reader in READERS.items():
        if reader.holds(folder):
            return name
    kinds = "; ".join(f"{name}: {reader.signs}" for name, reader in READERS.items() if reader.signs)
    raise InputError(f"{root}: no data set of a known kind ({kinds}); point DATA_ROOT at one, or give data.name")
