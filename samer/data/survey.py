"""All that is wrong with a data set, in one report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samer.config import InputError
from samer.data import guess_name, make_reader
from samer.data.pictures import load_image
from samer.data.reader import Defects
from samer.runtime.progress import Progress


@dataclass(frozen=True)
class Survey:
    """What a data set holds and what is wrong with it.

    Attributes:
        name: of its kind.
        splits: images, captions and boxes of each split, sound ones.
        defects: a line each, as `Defects.lines`.
        notes: of what is otherwise than expected and does no harm, as `Defects.notes`.
    """

    name: str
    splits: dict[str, tuple[int, int, int]]
    defects: list[str]
    notes: list[str]


def survey(root: str | Path, name: str = "") -> Survey:
    """Reads every split of a data set, with boxes where there are any, and decodes every picture once.

    Args:
        root: the data set's folder.
        name: of its kind, in `samer.data.READERS`; empty: guessed.

    Raises:
        InputError: no data set of that kind, or one whose reader can't say which splits it has.
    """
    name = name or guess_name(root)
    reader = make_reader(name)
    if not (splits := reader.splits(root)):
        raise InputError(f"{root}: no split of a data set of kind {name} to look at; restore its files")
    defects, counts, pictures = Defects(collect=True), {}, {}
    for split in splits:
        records = reader.survey(root, split, defects)
        boxes = 0
        for record in records:
            phrases = {phrase.chain_id: phrase.boxes for caption in record.captions for phrase in caption.phrases}
            boxes += sum(map(len, phrases.values())) + sum(len(things.boxes) for things in record.things)
            pictures[record.image_path] = None
        counts[split] = len(records), sum(len(record.captions) for record in records), boxes
    for path in Progress(pictures, f"pictures of {root}", unit="files", leave=False):
        with defects.spared():
            load_image(path, (1, 1))
    return Survey(name, counts, defects.lines(), defects.notes())
