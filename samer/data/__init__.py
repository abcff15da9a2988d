"""Data sets on disk. A new kind is a file beside these with a `Reader`, and a line in `READERS`."""

from __future__ import annotations

from samer.config import InputError
from samer.data.flickr import Flickr
from samer.data.reader import Reader
from samer.data.vidore import Vidore

READERS: dict[str, Reader] = {"flickr": Flickr(), "vidore": Vidore()}


def make_reader(name: str) -> Reader:
    """The reader of that name (data.reader).

    Raises:
        InputError: a name that is not in the registry.
    """
    if name not in READERS:
        raise InputError(f"data.reader {name!r} is unknown; use one of {', '.join(sorted(READERS))}")
    return READERS[name]
