"""What people call the pictures of an index: ids, and paths as a search prints them or a shell completes them."""

from __future__ import annotations

import os
import unicodedata
import uuid
from collections.abc import Sequence
from pathlib import Path

from samer.config import InputError
from samer.index.read import Index

SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "samer:image")  # of the ids of stores that take uuids only


def point_id(name: str) -> str:
    """The uuid of an image by its id, the same always, for stores that take no other ids."""
    return str(uuid.uuid5(SPACE, name))


def store_key() -> str | None:
    """The key of a hosted store that wants one (Qdrant, Weaviate, Milvus), from the environment: SAMER_STORE_KEY."""
    return os.environ.get("SAMER_STORE_KEY") or None


def picture_ids(folder: str | Path, split: str, words: Sequence[str]) -> list[str]:
    """Ids of the pictures that words name.

    A word may be an id, a path under the folder of pictures, or one from the working folder; the file need not be there
    any more. Links are followed where that leads into the folder, and accents may be composed or not, as file systems
    differ in that.

    Args:
        folder: the index.
        split: of it.
        words: as people gave them.

    Raises:
        InputError: no index, no word, or one that names nothing in it, or two pictures.
    """
    index = Index(folder)
    if not words:
        raise InputError(f"{folder}: no picture was named; nothing was deleted")
    held = index.numbers(split)
    composed = {unicodedata.normalize("NFC", name): name for name in held}
    root = index.manifest.splits[split].root or ""  # none: a data set's, whose ids are no paths
    found, missing = [], []
    for word in words:
        candidates = [word, *(_below(root, word) if root else ())]
        names = [name if name in held else composed.get(unicodedata.normalize("NFC", name)) for name in candidates]
        names = [name for name in dict.fromkeys(names) if name is not None]
        if len(names) > 1:
            both = " and ".join(os.path.join(root, name) for name in names)
            raise InputError(f"{word!r} can be {both}: give the whole path; nothing was deleted")
        found += names
        missing += [] if names else [word]
    if missing:
        raise InputError(
            f"{folder}: no image {missing[0]!r} in {split} ({len(missing)} such); give paths as a search prints "
            f"them, or under {root or 'its folder'}; nothing was deleted"
        )
    return list(dict.fromkeys(found))


def _below(root: str, word: str) -> list[str]:
    """What a path can be called under a folder: as it is written, and with the links in its folders followed."""
    path = os.path.abspath(os.path.expanduser(word))
    written = [path, os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))]
    names = [os.path.relpath(each, root) for each in written]
    if not os.path.isabs(word):
        names.append(os.path.normpath(word))  # ./trips/a.jpg
    return [name for name in names if name.split(os.sep)[0] != os.pardir]
