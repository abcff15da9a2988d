"""Indexes made by separate jobs as one: shards are linked or copied as they are, only captions are written anew.

A job of many makes the index of its part of the images (`samer.index.parts`); `merge_indexes` joins them. Parts in
order give the images of one job byte for byte; vectors of captions differ by rounding where their batches did.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samer.config import InputError
from samer.index.banks import keep_bank
from samer.index.codes import FILE as CODES
from samer.index.codes import write_codes
from samer.index.columns import read_columns, write_columns
from samer.index.manifest import (
    IndexManifest,
    IndexSummary,
    QueryShard,
    Shard,
    Split,
    stamp_of,
    summarise,
    write_index_manifest,
)
from samer.index.parts import check_parts
from samer.index.read import Index
from samer.index.write import QUERIES_PER_SHARD, check_folder
from samer.retrievers.projectors import write_projector
from samer.runtime.files import TEMPORARY, about, atomic_path, file_hash, is_file, lookup, only_writer, trouble
from samer.runtime.progress import Progress
from samer.runtime.shards import write_shard
from samer.runtime.signals import stop_here, stoppable


def merge_indexes(folder: str | Path, sources: Sequence[str | Path]) -> list[IndexSummary]:
    """Joins indexes that were made alike into one; their images keep their order, and what was deleted stays so.

    Shards are linked where the file system can, else copied; a run that was interrupted goes on.

    Args:
        folder: of the new index.
        sources: folders of indexes; a split comes from each that has it.

    Returns:
        What the splits of the new index hold.

    Raises:
        InputError: indexes of other models, projectors or settings, of several folders of pictures, or that hold an
            image twice; `folder` holds an index already.
    """
    folder = lookup(folder)
    check_folder(folder)
    if is_file(folder / "manifest.json"):
        raise InputError(f"{folder} holds an index already; name a new folder for the joined one")
    first = Index(sources[0])
    kept = _checked(first, sources)
    own = first.manifest.hidden_states.get("computed_in", "")
    also = tuple(sorted({name for source in sources for name in Index(source).manifest.also_computed_in} - {own}))
    with only_writer(folder), stoppable():
        splits = {name: _joined(folder, name, sources) for name in kept}
        for name in kept:
            _join_columns(folder, name, sources)
        write_projector(folder / "projector.safetensors", first.projector())
        keep_bank(folder, first.bank())
        if first.codes:
            write_codes(folder / CODES, first.codes, "")
        write_index_manifest(folder / "manifest.json", replace(first.manifest, splits=splits, also_computed_in=also))
    return [summarise(name, split) for name, split in splits.items()]


def _checked(first: Index, sources: Sequence[str | Path]) -> list[str]:
    """The names of the splits of all indexes, which can be joined.

    Raises:
        InputError: they can't.
    """
    check_parts(first.manifest.merge)
    roots: dict[str, tuple[str | None, Path]] = {}
    for source in sources:
        index = Index(source)
        if found := first.manifest.difference(index.manifest):
            name, before, now = found
            raise InputError(
                f"{index.folder}: made with {name}={now!r}, {first.folder} with {before!r}; only indexes that were "
                "made alike can be joined"
            )
        for name, split in index.manifest.splits.items():
            root, other = roots.setdefault(name, (split.root, index.folder))
            if root != split.root:
                raise InputError(
                    f"{index.folder}: its {name} are of {split.root}, those of {other} of {root}; index the folder "
                    "above both instead"
                )
    for name in roots:
        check_unique(lambda split=name: _live_names(split, sources))
    return list(roots)


def _live_names(split: str, sources: Sequence[str | Path]) -> Iterator[tuple[str, list[str]]]:
    for index in _with_split(split, sources):
        for _, stamp, here in index._named(split):
            yield str(index.folder), [name for name, live in zip(stamp["ids"], here.tolist()) if live]


def check_unique(named: Callable[[], Iterable[tuple[str, Sequence[str]]]]) -> None:
    """Refuses ids that come twice; of a hundred million it needs a gigabyte.

    Args:
        named: yields places and the ids in them; called a second time only if some seem to come twice.

    Raises:
        InputError: names the first and both places.
    """
    parts = [np.array([_short(name) for name in ids], dtype=np.uint64) for _, ids in named()]
    hashes = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.uint64)
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: dict[str, str] = {}
    for where, ids in named() if twice else ():
        for name in ids:
            if _short(name) not in twice:
                continue
            if name in seen:
                raise InputError(f"{where}: image {name!r} is in {seen[name]} as well; an index holds an image once")
            seen[name] = where


def _short(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _with_split(split: str, sources: Sequence[str | Path]) -> Iterator[Index]:
    """Indexes that hold a split, opened one at a time: each maps its shards."""
    for source in sources:
        index = Index(source)
        if split in index.manifest.splits:
            yield index


def _joined(folder: Path, split: str, sources: Sequence[str | Path]) -> Split:
    """Places the shards of a split, and returns what the manifest says of it."""
    images: list[Shard] = []
    deleted: dict[str, tuple[int, ...]] = {}
    for index in _with_split(split, sources):
        held = index.manifest.splits[split]
        root = held.root
        for shard in Progress(held.images, f"{split} of {index.folder}", unit="shards", leave=False):
            stop_here()
            name = f"images-{len(images):05d}.safetensors"
            exact = shard.exact and replace(shard.exact, file=name.replace(".", ".exact.", 1))
            images.append(replace(shard, file=name, exact=exact))
            for (old, checksum), (new, _) in zip(shard.files(), images[-1].files()):
                _place(index.folder / split / old, folder / split / new, checksum)
            if rows := held.deleted.get(shard.file):
                deleted[name] = rows
    return Split(tuple(images), _queries(folder / split, split, sources), root, deleted)


def _join_columns(folder: Path, split: str, sources: Sequence[str | Path]) -> None:
    """Joins the metadata of a split's images; a line of an image that its index doesn't hold any more is left out."""
    columns: dict[str, Mapping[str, Any]] = {}
    for index in _with_split(split, sources):
        found = read_columns(index.folder, split)
        for _, names in _live_names(split, [index.folder]) if found else ():
            columns.update((name, found[name]) for name in names if name in found)
    write_columns(folder, split, columns)


def _place(source: Path, target: Path, checksum: str) -> None:
    """Puts a shard where it belongs: a link to it, or where there can't be one, a copy."""
    if about(target) and (os.path.samefile(source, target) or file_hash(target) == checksum):
        return  # of a run that was interrupted
    try:
        target.parent.mkdir(exist_ok=True)
        with suppress(OSError):  # another file system, or one without links
            link = target.with_name(f".{target.name}{TEMPORARY}")
            os.link(source, link)
            return os.replace(link, target)
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    except OSError as error:
        raise trouble(target, error, "written") from None


def _queries(place: Path, split: str, sources: Sequence[str | Path]) -> tuple[QueryShard, ...]:
    """Writes the captions of a split, which name images by their number in it."""
    shards: list[QueryShard] = []
    rows: list[tuple] = []
    manifest: IndexManifest | None = None
    for manifest, row in _query_rows(split, sources):
        rows.append(row)
        if len(rows) == QUERIES_PER_SHARD:
            shards.append(_write_queries(place, len(shards), manifest, rows))
            rows = []
    if rows:
        shards.append(_write_queries(place, len(shards), manifest, rows))
    return tuple(shards)


def _query_rows(split: str, sources: Sequence[str | Path]) -> Iterator[tuple[IndexManifest, tuple]]:
    """Captions in order: tokens (M, D), number of the image, its id, text, grades."""
    start = 0
    for index in _with_split(split, sources):
        held = index.manifest.splits[split]
        for shard in held.queries:
            stop_here()
            tensors, stamp = index._read(split, shard)
            tokens = tensors["tokens"].split(tensors["lengths"].tolist())
            numbers = [start + number for number in tensors["image"].tolist()]
            graded = stamp.get("grades", [[]] * shard.count)
            grades = [[[start + number, grade] for number, grade in row] for row in graded]
            for row in zip(tokens, numbers, stamp["ids"], stamp["texts"], grades):
                yield index.manifest, row
        start += sum(shard.count for shard in held.images)


def _write_queries(place: Path, number: int, manifest: IndexManifest, rows: Sequence[tuple]) -> QueryShard:
    tokens, images, ids, texts, grades = (list(column) for column in zip(*rows))
    tensors: dict[str, Tensor] = {
        "tokens": torch.cat(tokens),
        "lengths": torch.tensor([len(each) for each in tokens]),
        "image": torch.tensor(images),
    }
    more = {"grades": grades} if any(grades) else {}
    stamp = {**stamp_of(manifest), "ids": ids, "texts": texts, **more}
    path = place / f"queries-{number:05d}.safetensors"
    return QueryShard(**write_shard(path, tensors, stamp, {"count": len(rows)}))
