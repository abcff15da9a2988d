"""Other images that satisfy a caption, where a data set says so (`relevant.json`)."""

from __future__ import annotations

from pathlib import Path

from samer.config import InputError
from samer.runtime.files import is_file, read_json


def read_relevant(path: Path) -> dict[str, list[list[str]]]:
    """Reads `{"<image id>": [["<other id>", ...] per caption]}`; empty where there is no such file.

    Raises:
        InputError: something else is in it.
    """
    if not is_file(path):
        return {}
    found = read_json(path)
    for image_id, rows in found.items():
        right = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
        if not right or not all(isinstance(other, str) for row in rows for other in row):
            raise InputError(f"{path}: {image_id[:80]!r} has no list of image ids per caption; restore the file")
    return found
