"""An index of a folder of pictures that changes: adding, deleting, compacting.

Shape letters: K regions, N tokens, D embedding."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig
from samer.data.pictures import load_image
from samer.data.records import ImageRecord
from samer.index.manifest import (
    NO_REGION,
    SHARD_NAME,
    IndexSummary,
    Shard,
    Split,
    stamp_of,
    summarise,
    write_index_manifest,
)
from samer.index.read import Index
from samer.index.write import check_settings, write_image_shard, writing
from samer.retrievers.base import Encoder, image_seeds
from samer.runtime.files import only_writer
from samer.runtime.progress import Progress, batched, prefetched
from samer.runtime.shards import joined, load_header
from samer.runtime.signals import stop_here, stoppable

PICTURES_PER_SHARD = 256  # of a folder: what a kill can cost
FOLDER_SPLIT = "images"  # where pictures without captions go


def add_images(
    folder: str | Path,
    root: str | Path,
    paths: Sequence[str],
    retriever: Encoder,
    merge: MergeConfig,
    *,
    batch_size: int = 32,
    dtype: str = "int8",
    assignments: bool = False,
) -> tuple[IndexSummary, list[str]]:
    """Adds pictures without captions to an index, which is made if it is missing.

    A picture's id is its path under `root`; ids that the index holds are left out, deleted ones are not: a picture that
    is still in the folder comes back. After each shard the index on disk holds what is written so far, so an
    interrupted run loses at most `PICTURES_PER_SHARD` pictures' work.

    Args:
        folder: the index.
        root: the pictures' folder.
        paths: of pictures, relative to `root`.
        retriever: with the projector to use; it has `image_inputs`, of pictures at hand.
        merge, batch_size, dtype, assignments: as in `build_index`; the compressor must need no corpus.

    Returns:
        What the index holds now, and one line per picture that could not be read; those are skipped.

    Raises:
        InputError: as `build_index`; no readable picture at all.
    """
    check_settings(retriever, merge, batch_size, dtype, assignments)
    compressor = make_compressor(merge)
    if compressor.needs_corpus:
        raise InputError(f"{merge.compressor} learns from a whole corpus; an index that grows needs another compressor")
    skipped: list[str] = []
    with writing(Path(folder), retriever, merge, batch_size, dtype, assignments) as writer:
        split = writer.manifest.splits.get(FOLDER_SPLIT, Split((), (), str(root)))
        if split.root != str(root):
            raise InputError(f"{folder} holds the pictures of {split.root}; name another index for {root}")
        held = set(_ids(Path(folder) / FOLDER_SPLIT, split))
        fresh = [ImageRecord(path, Path(root) / path, ()) for path in dict.fromkeys(paths) if path not in held]
        with Progress(total=len(fresh), desc="images", unit="images") as progress:
            for chunk in batched(fresh, PICTURES_PER_SHARD):
                stop_here()
                records, parts, files = [], [], []
                batches = batched(chunk, batch_size)
                for batch, (good, inputs, stamps, bad) in prefetched(lambda rows: _prepared(rows, retriever), batches):
                    skipped += bad
                    if good:
                        with torch.no_grad():
                            visual = retriever.encode_images(inputs, compressor.needs)
                            parts.append(writer.kept(visual, compressor(visual)))
                        records += good
                        files += stamps
                    progress.update(len(batch))
                if not records:
                    continue
                number = 1 + max((shard.number for shard in split.images), default=-1)
                shard = writer.write_shard(FOLDER_SPLIT, number, records, parts, files)
                split = replace(split, images=(*split.images, shard))
                writer.commit(FOLDER_SPLIT, split)
        if not split.images:
            why = f"; first: {skipped[0]}" if skipped else ""
            raise InputError(f"{root}: not one readable picture among {len(paths)} files{why}")
    return summarise(FOLDER_SPLIT, split), skipped


def _prepared(
    batch: Sequence[ImageRecord], retriever: Encoder
) -> tuple[list[ImageRecord], dict[str, Tensor], list[list[int] | None], list[str]]:
    """Readable pictures of a batch, what the model needs of them, their files' stamps, and a line per other one.

    Stamps are taken before the files are read, so that a later change differs from them.
    """
    good, images, stamps, bad = [], [], [], []
    for record in batch:
        try:
            record.image_id.encode()
            stamp = _file_stamp(record.image_path)
            images.append(load_image(record.image_path))
            good.append(record)
            stamps.append(stamp)
        except UnicodeEncodeError:
            bad.append(f"{record.image_id!a}: its name is not UTF-8; rename it")
        except InputError as error:
            bad.append(str(error))
    return good, {**retriever.image_inputs(images), "seeds": image_seeds(good)} if good else {}, stamps, bad


def _file_stamp(path: Path) -> list[int] | None:
    """[bytes, time of change in ns] of a file; None if it is not there."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return [stat.st_size, stat.st_mtime_ns]


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
                shards.append(_rewritten(index, split, chunk, place / f"images-{number + len(shards):05d}.safetensors"))
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


def _rewritten(index: Index, split: str, rows: Sequence[tuple[Shard, int]], path: Path) -> Shard:
    """Writes rows of several shards, each checked, as one shard, and returns its manifest entry."""
    found: dict[bool, dict[str, list[Tensor]]] = {False: {}, True: {}}
    ids: list[str] = []
    files: list[list[int] | None] = []
    for _, group in itertools.groupby(rows, lambda pair: pair[0].file):
        pairs = list(group)
        shard, picked = pairs[0][0], [row for _, row in pairs]
        for exact in (False, True) if shard.exact else (False,):
            tensors, stamp = index._read(split, shard, exact)
            for name, tensor in tensors.items():
                found[exact].setdefault(name, []).append(tensor[picked])
        ids += [stamp["ids"][row] for row in picked]
        own = stamp.get("files") or [None] * shard.count
        files += [own[row] for row in picked]
    fill = {"assignments": NO_REGION if index.manifest.assignments else -1}
    tensors, half = (
        {
            name: torch.cat(parts) if parts[0].ndim == 1 else joined(parts, fill.get(name, 0))
            for name, parts in found[exact].items()
        }
        for exact in (False, True)
    )
    return write_image_shard(path, tensors, half, {**stamp_of(index.manifest), "ids": ids, "texts": [], "files": files})


def _ids(folder: Path, split: Split) -> list[str]:
    """Ids of the images that a split holds, deleted ones left out."""
    found = []
    for shard in split.images:
        gone = set(split.deleted.get(shard.file, ()))
        path = folder / shard.file
        try:
            header = load_header(path)
            found += [name for row, name in enumerate(header["stamp"]["ids"]) if row not in gone]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: not readable ({str(error)[:120]}); build the index anew") from None
    return found
