"""What every reader of a kind of data set can do, and how it tells what it could not take as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from samer.config import InputError
from samer.data.records import ImageRecord
from samer.runtime.processes import print0

_TOLD: set[str] = set()  # a comparison reads its data once per row


def tell_once(line: str) -> None:
    """Prints a line that this process has not told yet."""
    if line not in _TOLD:
        _TOLD.add(line)
        print0(line)


class Defects:
    """What a load left out or doubts: counted and told together at its end, or, if `strict`, refused at the first.

    For what is known in full and can be done without, such as a box that is turned around. A file that can't be read
    says nothing of how much is missing and is refused at once.

    Where all of them are wanted (`collect`), nothing is refused: what is wrong is left out, and `lines` tells of it.
    """

    def __init__(self, *, strict: bool = False, collect: bool = False) -> None:
        self.strict, self.collect = strict, collect
        self._refused: dict[str, None] = {}  # a line for each, once
        self._doubted: dict[str, None] = {}
        self._found: dict[str, dict[str, int]] = {}  # how many by kind and file

    @contextmanager
    def spared(self) -> Iterator[None]:
        """Around what stands for itself, such as a row: where all defects are collected, its refusal is noted only."""
        try:
            yield
        except InputError as error:
            if not self.collect:
                raise
            self._refused[str(error)] = None

    def lines(self) -> list[str]:
        """A line for each that was collected: first what a load refuses, then what it leaves out or doubts."""
        return [*self._refused, *self._doubted]

    def add(self, kind: str, path: str | Path, message: str, count: int = 1, *, harmless: bool = False) -> None:
        """Notes what is wrong in a file.

        Args:
            kind: what is told at the end; its `{count}` and `{files}` are replaced by numbers.
            path: of the file.
            message: what is wrong with this one and what to do, for the refusal.
            count: how many of them.
            harmless: nothing is left out for it; it is among the `notes` where all defects are collected, too.

        Raises:
            InputError: always, if strict.
        """
        if self.collect and not harmless:
            self._doubted[f"{path}: {message}"] = None
            return
        if self.strict:
            raise InputError(f"{path}: {message}")
        files = self._found.setdefault(kind, {})
        name = Path(path).name
        files[name] = files.get(name, 0) + count

    def notes(self) -> list[str]:
        """A line per kind: how many, and the first three files."""
        lines = []
        for kind, files in self._found.items():
            what = kind.format(count=f"{sum(files.values()):,}", files=f"{len(files):,}")
            names = ", ".join([*list(files)[:3], *(["..."] if len(files) > 3 else [])])
            lines.append(f"{what} ({names})")
        return lines

    def tell(self, where: str) -> None:
        """Prints the notes; what this process has told, not again."""
        for line in self.notes():
            tell_once(f"note: {where}: {line}; data.strict=true refuses that")

    def absent(self, path: str | Path, found: list[str], of: int, remedy: str) -> None:
        """Refuses pictures that are nowhere, the first of them named; a line for each where all are collected.

        Raises:
            InputError: there are some, and they are not collected.
        """
        if self.collect:
            self._refused |= {f"{path}: no picture {name}; {remedy}": None for name in found}
        elif found:
            raise InputError(f"{path}: {len(found):,} of {of:,} images are absent, the first is {found[0]}; {remedy}")


class Reader:
    """A kind of data set on disk: subclass, write `load_split`, add a line to `samer.data.READERS`.

    Everything that a reader reads comes from outside, so every defect of a file is an `InputError` that names the file.
    """

    undescribed = False  # whether images without a caption belong to it, which only others are told apart from
    signs = ""  # by what a folder of this kind is known, for messages; where it is empty, the kind is never guessed

    def holds(self, root: Path) -> bool:
        """Whether a folder looks like a data set of this kind, to guess it; what is wrong within is found later."""
        return False

    def splits(self, root: str | Path) -> list[str]:
        """Names of the splits that are there, for whoever goes through all of them; nothing if a reader can't say."""
        return []

    def survey(self, root: str | Path, split: str, defects: Defects) -> list[ImageRecord]:
        """The sound records of a split; all that is wrong goes to `defects`, which collects. Here the first only."""
        with defects.spared():
            return self.load_split(root, split, boxes=self.check(root), strict=True)
        return []

    def load_split(
        self, root: str | Path, split: str, *, boxes: bool, limit_images: int | None = None, strict: bool = False
    ) -> list[ImageRecord]:
        """The records of a split, in its own order; captions are at most `LONGEST_CAPTION` long (`Caption.within`).

        Args:
            root: the data set's folder.
            split: a name, such as "test", or a part of one (`samer.data.parts`).
            boxes: whether phrases need their boxes; without, no annotation of them is opened.
            limit_images: the first so many images; None: all.
            strict: refuse what is otherwise left out and told at the end (`Defects`).

        Raises:
            InputError: anything missing or malformed, named.
        """
        raise NotImplementedError

    def check(self, root: str | Path) -> bool:
        """Whether the data set under `root` has boxes.

        Raises:
            InputError: no data set of this kind there.
        """
        return True

    def find(self, root: str | Path, split: str, image_id: str) -> ImageRecord | None:
        """One image's record, with boxes where there are any, for whoever asks for a few; None where it is not there.

        Here by reading the split, once; a reader that can do with less overrides it.
        """
        return _by_id(self, str(root), split).get(image_id)

    def relevant(self, root: str | Path) -> dict[str, list[list[str]]]:
        """Other images that satisfy an image's captions, by image id, a list per caption; empty where none are known.

        Raises:
            InputError: the file of them holds something else.
        """
        return {}

    def grades(self, root: str | Path, split: str) -> dict[str, dict[str, int]] | None:
        """Graded relevance of a split as evaluation tools take it: query id -> image id -> grade; None: it has none."""
        captions = [c for record in self.load_split(root, split, boxes=False) for c in record.captions if c.grades]
        return {caption.query_id: dict(caption.grades) for caption in captions} or None


class RowReader(Reader):
    """A reader that goes row by row and can leave one out: subclass, write `read` instead of `load_split`."""

    def read(
        self, root: str | Path, split: str, *, boxes: bool, limit_images: int | None, defects: Defects
    ) -> list[ImageRecord]:
        """As `Reader.load_split`, with each row `Defects.spared`."""
        raise NotImplementedError

    def load_split(
        self, root: str | Path, split: str, *, boxes: bool, limit_images: int | None = None, strict: bool = False
    ) -> list[ImageRecord]:
        if limit_images is not None and limit_images < 1:
            raise InputError(f"limit_images is {limit_images}; give at least 1, or leave it out for the whole split")
        defects = Defects(strict=strict)
        records = self.read(root, split, boxes=boxes, limit_images=limit_images, defects=defects)
        defects.tell(f"{split} of {root}")
        return records

    def survey(self, root: str | Path, split: str, defects: Defects) -> list[ImageRecord]:
        with defects.spared():
            return self.read(root, split, boxes=self.check(root), limit_images=None, defects=defects)
        return []


@lru_cache(maxsize=4)
def _by_id(reader: Reader, root: str, split: str) -> dict[str, ImageRecord]:
    return {record.image_id: record for record in reader.load_split(root, split, boxes=reader.check(root))}
