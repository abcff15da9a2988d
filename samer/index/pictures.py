"""An index of a folder of pictures that changes: adding, deleting, compacting.

Shape letters: K regions, N tokens, D embedding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig
from samer.data.pictures import load_image
from samer.data.records import ImageRecord
from samer.index.manifest import NO_REGION, SHARD_NAME, IndexSummary, _number, _summary
from samer.index.read import Index
from samer.index.write import _check_settings, _joined, _write_images, _writing
from samer.retrievers.base import image_seeds
from samer.retrievers.hf import Retriever
from samer.runtime.files import only_writer
from samer.runtime.progress import Progress, batched, prefetched
from samer.runtime.shards import load_header, parts_of, write_manifest
from samer.runtime.signals import stop_here, stoppable

PICTURES_PER_SHARD = 256  # of a folder: what a kill can cost
FOLDER_SPLIT = "images"  # where pictures without captions go


def add_images(
    folder: str | Path,
    root: str | Path,
    paths: Sequence[str],
    retriever: Retriever,
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
        retriever, merge, batch_size, dtype, assignments: as in `build_index`; the compressor must need no corpus.

    Returns:
        What the index holds now, and one line per picture that could not be read; those are skipped.

    Raises:
        InputError: as `build_index`; no readable picture at all.
    """
    _check_settings(retriever, merge, batch_size, dtype, assignments)
    compressor = make_compressor(merge)
    if compressor.needs_corpus:
        raise InputError(f"{merge.compressor} learns from a whole corpus; an index that grows needs another compressor")
    skipped: list[str] = []

    def prepare(batch: Sequence[ImageRecord]) -> tuple[list[ImageRecord], dict[str, Tensor], list[str]]:
        good, images, bad = [], [], []
        for record in batch:
            try:
                record.image_id.encode()
                images.append(load_image(record.image_path))
                good.append(record)
            except UnicodeEncodeError:
                bad.append(f"{record.image_id!a}: its name is not UTF-8; rename it")
            except InputError as error:
                bad.append(str(error))
        return good, {**retriever.image_inputs(images), "seeds": image_seeds(good)} if good else {}, bad

    with _writing(Path(folder), retriever, merge, batch_size, dtype, assignments) as writer:
        split = writer.manifest["splits"].get(FOLDER_SPLIT, {"images": [], "queries": [], "root": str(root)})
        if split.get("root") != str(root):
            raise InputError(f"{folder} holds the pictures of {split.get('root')}; name another index for {root}")
        held = set(_ids(Path(folder) / FOLDER_SPLIT, split))
        fresh = [ImageRecord(path, Path(root) / path, ()) for path in dict.fromkeys(paths) if path not in held]
        with Progress(total=len(fresh), desc="images", unit="images") as progress:
            for chunk in batched(fresh, PICTURES_PER_SHARD):
                stop_here()
                records, parts = [], []
                for batch, (good, inputs, bad) in prefetched(prepare, batched(chunk, batch_size)):
                    skipped += bad
                    if good:
                        with torch.no_grad():
                            visual = retriever.encode_images(inputs, compressor.needs)
                            parts.append(writer.kept(compressor(visual)))
                        records += good
                    progress.update(len(batch))
                if not records:
                    continue
                writer.choose_scale_from(parts)
                number = 1 + max((_number(entry["file"]) for entry in split["images"]), default=-1)
                entry = writer.write_shard(FOLDER_SPLIT, number, records, parts)
                split = {**split, "images": [*split["images"], entry]}
                writer.commit(FOLDER_SPLIT, split)
        if not split["images"]:
            why = f"; first: {skipped[0]}" if skipped else ""
            raise InputError(f"{root}: not one readable picture among {len(paths)} files{why}")
    return _summary(FOLDER_SPLIT, split, 0), skipped


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
        cache = Index(folder)
        entry = dict(cache._split(split))
        places = {}
        for shard in entry["images"]:
            gone = set(entry.get("deleted", {}).get(shard["file"], []))
            names = cache._header(split, shard)["stamp"]["ids"]
            places |= {name: (shard["file"], row) for row, name in enumerate(names) if row not in gone}
        missing = [name for name in ids if name not in places]
        if missing:
            raise InputError(f"{folder}: no image {missing[0]!r} in {split} ({len(missing)} such); nothing was deleted")
        deleted = {file: set(rows) for file, rows in entry.get("deleted", {}).items()}
        for name in ids:
            file, row = places[name]
            deleted.setdefault(file, set()).add(row)
        entry["deleted"] = {file: sorted(rows) for file, rows in sorted(deleted.items())}
        manifest = {**cache.manifest, "splits": {**cache.manifest["splits"], split: entry}}
        write_manifest(folder / "manifest.json", manifest)
    return len(places) - len(set(ids))


def compact_images(folder: str | Path, split: str) -> int:
    """Rewrites a split's images without deleted ones, in shards of `PICTURES_PER_SHARD`; order and vectors stay.

    An index that pictures are added to and deleted from for long collects small shards and dead rows; this makes it
    what it would be if built at once with the same scale. New shards are written beside the old ones, and the manifest
    is replaced in one step; then the old ones go. A reader that has the index open goes on with what it has mapped.

    Returns:
        How many bytes of files it saved.

    Raises:
        InputError: damaged shards, no image left, or a split with captions, which say by number what they describe.
    """
    folder = Path(folder)
    Index(folder)  # nothing is made or locked where there is no index
    with only_writer(folder), stoppable():
        cache = Index(folder)
        entry = cache._split(split)
        if entry["queries"]:
            raise InputError(f"{folder}: {split} has captions, so it can't be compacted; build it anew instead")
        place = folder / split
        image_files = lambda: {file for file in place.glob("images-*") if SHARD_NAME.fullmatch(file.name)}
        files = image_files()
        before = sum(file.stat().st_size for file in files)
        number = 1 + max(_number(file.name) for file in files)
        rows = []
        for shard in entry["images"]:
            live = cache._live(split, shard)
            kept = range(shard["count"]) if live is None else live.nonzero().flatten().tolist()
            rows += [(shard, row) for row in kept]
        if not rows:
            raise InputError(f"{folder}: every image of {split} was deleted; remove the index instead")
        shards = []
        try:
            for chunk in batched(rows, PICTURES_PER_SHARD):
                stop_here()
                shards.append(_rewritten(cache, split, chunk, place / f"images-{number + len(shards):05d}.safetensors"))
            manifest = {**cache.manifest, "splits": {**cache.manifest["splits"]}}
            manifest["splits"][split] = {**{k: v for k, v in entry.items() if k != "deleted"}, "images": shards}
            write_manifest(folder / "manifest.json", manifest)
        finally:  # the old ones, or the new ones if it came to nothing, and those of a compaction that was killed
            entry = Index(folder).manifest["splits"][split]
            named = {place / part["file"] for shard in entry["images"] for part in parts_of(shard)}
            for file in image_files() - named:
                file.unlink()
        return before - sum(file.stat().st_size for file in named)


def _rewritten(cache: Index, split: str, rows: Sequence[tuple[dict, int]], path: Path) -> dict:
    """Writes rows of several shards, each checked, as one shard, and returns its manifest entry."""
    found: dict[bool, dict[str, list[Tensor]]] = {False: {}, True: {}}
    ids: list[str] = []
    for _, group in itertools.groupby(rows, lambda pair: pair[0]["file"]):
        pairs = list(group)
        entry, picked = pairs[0][0], [row for _, row in pairs]
        for exact in (False, True) if "exact" in entry else (False,):
            tensors, stamp = cache._read(split, entry, exact)
            for name, tensor in tensors.items():
                found[exact].setdefault(name, []).append(tensor[picked])
        ids += [stamp["ids"][row] for row in picked]
    stamp = {**stamp, "ids": ids}
    tensors, half = (
        {name: _joined(parts, NO_REGION if name == "assignments" else 0) for name, parts in found[exact].items()}
        for exact in (False, True)
    )
    return _write_images(path, tensors, half, stamp)


def _ids(folder: Path, split: dict) -> list[str]:
    """Ids of the images that a split holds, deleted ones left out."""
    found = []
    for entry in split["images"]:
        gone = set(split.get("deleted", {}).get(entry["file"], []))
        path = folder / entry["file"]
        try:
            header = load_header(path)
            found += [name for row, name in enumerate(header["stamp"]["ids"]) if row not in gone]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: not readable ({str(error)[:120]}); build the index anew") from None
    return found
