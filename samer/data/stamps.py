"""What is in a picture file, by its content: hashes, and what is remembered of them so that no file is read twice.

An index and a feature store keep, per image, the hash of the file that it was made from. That is the truth. Beside it a
small JSON file remembers at which size and times a file had which hash, so that a file that nothing touched is not read
again; without it every file is read once more, and nothing else changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from samer.data.pictures import digest_of, regular_file, state_of
from samer.runtime.files import trouble, write_json

FILE = "stamps.json"  # in a split's folder
_RACY = 2 * 10**9  # ns; a file changed so shortly before it was read may change again within the clock's step


class Stamps:
    """Content hashes of files by name, remembered in a file.

    A remembered hash holds while a file's size, time of change and time of its inode's change are what they were, and
    it had not changed within the 2 seconds before it was read.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        """What the file at `path` remembers; nothing where it is missing or damaged, as it only saves time."""
        self.path = Path(path) if path else None
        self._known: dict[str, list] = {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8")) if self.path else {}
            if found.get("checksum") == _checksum(found.get("files")):
                self._known = {name: row for name, row in found["files"].items() if _is_row(row)}
        except (OSError, ValueError, KeyError, AttributeError, RecursionError):
            pass
        self._written = dict(self._known)

    def content(self, name: str, file: str | Path) -> str:
        """The content hash of `file`, read only where it is not known.

        Raises:
            InputError: it can't be read; says why.
        """
        try:
            about = os.stat(file)
            known = self._known.get(name)
            if known and known[:3] == state_of(about):
                return known[3]
            regular_file(file)
            with open(file, "rb") as handle:
                about = os.fstat(handle.fileno())
                digest = digest_of(handle)
        except OSError as error:
            raise trouble(file, error) from None
        self.note(name, about, digest)
        return digest

    def note(self, name: str, about: os.stat_result, digest: str) -> None:
        """Remembers that a file which looked so (before it was read) had this hash."""
        late = time.time_ns() - _RACY
        # a picture may be dated in the future by a camera; writing to it would date it now
        if about.st_ctime_ns < late and not late <= about.st_mtime_ns <= late + 2 * _RACY:
            self._known[name] = [*state_of(about), digest]
        else:
            self._known.pop(name, None)

    def forget_others(self, names: set[str]) -> None:
        """Keeps what is known of these names only."""
        self._known = {name: row for name, row in self._known.items() if name in names}

    def rows(self) -> dict[str, list]:
        """What is known, by name; for `merge` in another process."""
        return self._known

    def merge(self, rows: dict[str, list]) -> None:
        """Takes over what another process knows."""
        self._known |= rows

    def write(self) -> None:
        """Writes what is known, atomically, to the file given at first, if it is not what the file says.

        Raises:
            InputError: it can't be written.
        """
        if self.path and self._known != self._written:
            rows = dict(sorted(self._known.items()))
            write_json(self.path, {"checksum": _checksum(rows), "files": rows})
            self._written = dict(self._known)


def _checksum(rows: object) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _is_row(row: object) -> bool:
    right = isinstance(row, list) and len(row) == 4 and all(type(number) is int for number in row[:3])
    return right and isinstance(row[3], str) and len(row[3]) == 32
