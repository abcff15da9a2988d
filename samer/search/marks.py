"""Which pictures of an index are gone or changed on disk, as far as a look at their files tells."""

from __future__ import annotations

import os
import stat
from functools import cached_property
from pathlib import Path

from samer.data.stamps import FILE, Stamps
from samer.index.read import Index

GONE, CHANGED = "gone", "changed"
MOST_BYTES = 32 * 10**6  # of remembered times, for some 200,000 pictures; reading more would hold a search up


class Marks:
    """What became of the pictures of a split since they were indexed; no picture is read for it.

    Times are those that the index's writer remembers beside it; where it remembers none, nothing is said of a change.
    """

    def __init__(self, index: Index, split: str) -> None:
        self._index, self._split = index, split
        self._stamps: tuple[tuple[int, ...], dict[str, list]] = (), {}

    @cached_property
    def _contents(self) -> dict[str, str | tuple[int, int] | None]:
        return self._index.contents(self._split)

    def _times(self) -> dict[str, list]:
        """What is remembered now, by picture: bytes, two times, and the hash of what was in the file."""
        path = self._index.folder / self._split / FILE
        try:
            about = os.stat(path)
            now = about.st_mtime_ns, about.st_ino, about.st_size
        except OSError:
            now = ()
        if now != self._stamps[0]:
            self._stamps = now, Stamps(path).rows() if now and now[-1] <= MOST_BYTES else {}
        return self._stamps[1]

    def state(self, name: str, path: Path) -> str | None:
        """Whether the file at `path` is "gone" or "changed" since the picture `name` was indexed; None: not known so.

        Only its size and time of change are looked at, so a file that was written again as it was counts as changed
        until the index is updated.
        """
        try:
            about = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return GONE
        except (OSError, ValueError):  # it may be well again
            return None
        if not stat.S_ISREG(about.st_mode):
            return GONE
        now, held = (about.st_size, about.st_mtime_ns), self._contents.get(name)
        if isinstance(held, str):
            size, changed, _, content = self._times().get(name, [*now, 0, held])
            return None if (size, changed, content) == (*now, held) else CHANGED
        return None if held in (None, now) else CHANGED
