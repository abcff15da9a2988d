"""An index of a folder of pictures that changes: deleting and compacting; `samer.index.sync` brings it up to date."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from samer.config import InputError
from samer.index.manifest import (
    NO_REGION,
    SHARD_NAME,
    Shard,
    Split,
    stamp_of,
    write_index_manifest,
)
from samer.index.read import Index
from samer.index.tensors import without_full_masks
from samer.index.write import write_image_shard
from samer.runtime.files import only_writer
from samer.runtime.progress import batched
from samer.runtime.shards import joined
from samer.runtime.signals import stop_here, stoppable

PICTURES_PER_SHARD = 256  # of a folder: what a kill can cost
FOLDER_SPLIT = "images"  # where pictures without captions go


def delete_images(folder: str | Path, split: str, ids: Sequence[str]) -> int:
    """Takes images out of an index without rewriting a shard: their rows are noted in the manifest.

    Returns:
        How many images the split still holds.

    Raises:
        InputError: an id that the split does not hold.
    """
    folder = Path(folder)
    Index(folder)  # nothing is made or locked where there is no index
    with only_writer(folder):
        index = Index(folder)
        held = index._split(split)
        places = {}
        for shard in held.images:
            gone = set(held.deleted.get(shard.file, ()))
            names = index._header(split, shard)["stamp"]["ids"]
            places |= {name: (shard.file, row) for row, name in enumerate(names) if row not in gone}
        missing = [name for name in ids if name not in places]
        if missing:
            raise InputError(f"{folder}: no image {missing[0]!r} in {split} ({len(missing)} such); nothing was deleted")
        deleted = {file: set(rows) for file, rows in held.deleted.items()}
        for name in ids:
            file, row = places[name]
            deleted.setdefault(file, set()).add(row)
        held = replace(held, deleted={file: tuple(sorted(rows)) for file, rows in sorted(deleted.items())})
        _replace_split(index, split, held)
    return len(places) - len(set(ids))


def _replace_split(index: Index, name: str, split: Split) -> None:
    manifest = replace(index.manifest, splits={**index.manifest.splits, name: split})
    write_index_manifest(index.folder / "manifest.json", manifest)


def compact_images(folder: str | Path, split: str) -> int:
    """Rewrites a split's images without deleted ones, in shards of `PICTURES_PER_SHARD`; order and vectors stay.

    An index that pictures are added to and deleted from for long collects small shards and dead rows; this makes it
    what it would be if built at once. Shards of format 3 become ones of today's, with what they know. New shards are
    written beside the old ones, and the manifest is replaced in one step; then the old ones go. A reader that has the
    index open goes on with what it has mapped.

    Returns:
        How many bytes of files it saved.

    Raises:
        InputError: damaged shards, no image left, or a split with captions, which say by number what they describe.
    """
    folder = Path(folder)
    Index(folder)  # nothing is made or locked where there is no index
    with only_writer(folder), stoppable():
        index = Index(folder)
        held = index._split(split)
        if held.queries:
            raise InputError(f"{folder}: {split} has captions, so it can't be compacted; build it anew instead")
        place = folder / split
        files = _image_files(place)
        before = sum(file.stat().st_size for file in files)
        number = 1 + max(int(SHARD_NAME.fullmatch(file.name)[2]) for file in files)
        rows = []
        for shard in held.images:
            live = index._live(split, shard)
            kept = range(shard.count) if live is None else live.nonzero().flatten().tolist()
            rows += [(shard, row) for row in kept]
        if not rows:
            raise InputError(f"{folder}: every image of {split} was deleted; remove the index instead")
        shards = []
        try:
            for chunk in batched(rows, PICTURES_PER_SHARD):
                stop_here()
                shards.append(copy_rows(index, split, chunk, place / f"images-{number + len(shards):05d}.safetensors"))
            _replace_split(index, split, replace(held, images=tuple(shards), deleted={}))
        finally:  # the old ones, or the new ones if it came to nothing, and those of a compaction that was killed
            images = Index(folder).manifest.splits[split].images
            named = {place / file for shard in images for file, _ in shard.files()}
            for file in _image_files(place) - named:
                file.unlink()
        return before - sum(file.stat().st_size for file in named)


def _image_files(place: Path) -> set[Path]:
    """The shards of images in a split's folder, whether or not the manifest names them."""
    return {file for file in place.glob("images-*") if SHARD_NAME.fullmatch(file.name)}


def copy_rows(
    index: Index, split: str, rows: Sequence[tuple[Shard, int]], path: Path, names: Sequence[str] = ()
) -> Shard:
    """Writes rows of several shards, each checked, as one shard, and returns its manifest entry.

    Args:
        index: open.
        split: of it.
        rows: shards and rows in them; a row may come twice, if it gets two names.
        path: of the new shard.
        names: ids for the rows instead of their own.
    """
    found: dict[bool, dict[str, list[Tensor]]] = {False: {}, True: {}}
    told: dict[str, list] = {"ids": [], "contents": [], "files": []}
    making, states = stamp_of(index.manifest), []
    for _, group in itertools.groupby(rows, lambda pair: pair[0].file):
        pairs = list(group)
        shard, picked = pairs[0][0], [row for _, row in pairs]
        for exact in (False, True) if shard.exact else (False,):
            tensors, stamp = index._read(split, shard, exact)
            for name, tensor in tensors.items():
                found[exact].setdefault(name, []).append(tensor[picked])
        states.append(stamp.get("hidden_states", making["hidden_states"]))
        for key, values in told.items():
            own = stamp.get(key) or [None] * shard.count
            values += [own[row] for row in picked]
    fill = {"assignments": NO_REGION if index.manifest.assignments else -1}
    tensors, half = (
        {
            name: torch.cat(parts) if parts[0].ndim == 1 else joined(parts, fill.get(name, 0))
            for name, parts in found[exact].items()
        }
        for exact in (False, True)
    )
    known = {key: values for key, values in told.items() if any(value is not None for value in values)}
    if all(each == states[0] for each in states):  # else images of both dtypes lie in it, and it says the index's own
        making["hidden_states"] = states[0]
    stamp = {**making, **known, "texts": []}
    tensors = without_full_masks(index.manifest, tensors)
    return write_image_shard(path, tensors, half, {**stamp, "ids": list(names)} if names else stamp)
