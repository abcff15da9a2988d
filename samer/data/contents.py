"""Which pictures were replaced since something was made of them, by the content hashes that it holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.data.records import ImageRecord
from samer.data.stamps import FILE, Stamps
from samer.runtime.processes import gather_objects, print0, rank

_HASH = re.compile("[0-9a-f]{32}")


def check_contents(held: Any, count: int) -> None:
    """Raises ValueError unless `held` can be what a shard of so many pictures says of their contents."""
    right = isinstance(held, list) and len(held) == count
    if not right or not all(each is None or (isinstance(each, str) and _HASH.fullmatch(each)) for each in held):
        raise ValueError("its contents can't be true")


class Contents:
    """Content hashes of a split's pictures while its shards are compared with them and written.

    Each process of a job has its own, for the shards that are its share; all of them `tell` and `remember` together.
    """

    def __init__(self, folder: Path, contents: Callable[[Sequence[ImageRecord], Stamps], list[str | None]]) -> None:
        """Nothing is read yet.

        Args:
            folder: of the split.
            contents: of records, as `Encoder.contents` says them.
        """
        self._folder, self._contents = folder, contents
        self._stamps = Stamps(folder / FILE)
        self._seen: set[str] = set()
        self._counts = {"changed": 0, "shards": 0, "unknown": 0, "unread": 0}

    def of(self, records: Sequence[ImageRecord]) -> list[str | None]:
        """The hash of every picture as it is now, None where it is not known; to be asked for before it is decoded."""
        self._seen.update(record.image_id for record in records)
        return self._contents(records, self._stamps)

    def same(self, held: Any, records: Sequence[ImageRecord], learned: bool = True) -> bool:
        """Whether a finished shard, whose stamp says `held`, was made from these pictures as they are now.

        What can't be compared is counted and taken at its word. `learned`: what a compressor learned is the same, too.

        Raises:
            ValueError: a stamp can't say that.
        """
        if held is None:  # written before shards kept contents
            held = [None] * len(records)
        check_contents(held, len(records))
        unknown = held.count(None)
        now = self.of(records) if unknown < len(records) else held
        changed = sum(None not in pair and pair[0] != pair[1] for pair in zip(held, now))
        unread = sum(old is not None and new is None for old, new in zip(held, now))
        stale = bool(changed) or not learned
        more = {"changed": changed, "shards": stale, "unknown": unknown, "unread": unread}
        self._counts = {key: value + more[key] for key, value in self._counts.items()}
        return not stale

    def tell(self, since: str) -> None:
        """Says what came of comparing, over all processes; `since` says what was done then, as "they were indexed"."""
        parts = gather_objects(self._counts)
        changed, shards, unknown, unread = (sum(part[key] for part in parts) for key in self._counts)
        split = self._folder.name
        if shards:
            what = _counted(changed, "picture") if changed else "what the compressor learned from has"
            print0(f"{split}: {what} changed since {since}: {_counted(shards, 'shard')} made anew")
        if unknown:
            print0(
                f"{split}: {_counted(unknown, 'picture')} can't be compared with what {since} from, as earlier "
                "versions kept no content hashes, and taken at their word; name another folder to make all anew"
            )
        if unread:
            print0(f"{split}: {_counted(unread, 'picture')} can't be read now and kept as before; restore them")

    def remember(self) -> None:
        """Writes what all processes know of their pictures beside the shards; it only saves reading them again."""
        self._stamps.forget_others(self._seen)
        parts = gather_objects(self._stamps.rows())
        if rank() == 0:
            for rows in parts:
                self._stamps.merge(rows)
            with suppress(InputError):
                self._stamps.write()


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def named(names: Sequence[str], most: int = 5) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
