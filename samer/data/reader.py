"""What every reader of a kind of data set can do."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from samer.data.records import ImageRecord


class Reader:
    """A kind of data set on disk: subclass, write `load_split`, add a line to `samer.data.READERS`.

    Everything that a reader reads comes from outside, so every defect of a file is an `InputError` that names the file.
    """

    def load_split(
        self, root: str | Path, split: str, *, boxes: bool, limit_images: int | None = None
    ) -> list[ImageRecord]:
        """The records of a split, in its own order.

        Args:
            root: the data set's folder.
            split: a name, such as "test".
            boxes: whether phrases need their boxes; without, no annotation of them is opened.
            limit_images: the first so many images; None: all.

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


@lru_cache(maxsize=4)
def _by_id(reader: Reader, root: str, split: str) -> dict[str, ImageRecord]:
    return {record.image_id: record for record in reader.load_split(root, split, boxes=reader.check(root))}
