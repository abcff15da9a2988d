"""An index made of another's vectors: fewer, stored otherwise, or with smaller budgets beside; no model is needed.

Shards are made one by one from those of the source and kept when they are finished, so a run that was stopped goes on;
the manifest comes last. Ids, captions, metadata, assignments and deletions are the source's.

Shape letters: n images, K vectors, D embedding.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from samer.budgets import smaller_budgets
from samer.codes import COMPONENTS, ENOUGH, Codebook, learn, second_moment
from samer.config import InputError
from samer.data.stamps import FILE as STAMPS
from samer.index.banks import keep_bank
from samer.index.codes import FILE, codes_hash, floats_of, read_codes, write_codes
from samer.index.columns import read_columns, write_columns
from samer.index.manifest import (
    DTYPES,
    NO_REGION,
    STORED,
    IndexManifest,
    IndexSummary,
    Making,
    QueryShard,
    Shard,
    Split,
    stamp_of,
    summarise,
    write_index_manifest,
)
from samer.index.read import Index
from samer.index.tensors import kept_vectors, stored_regions, stored_tensors
from samer.index.write import check_folder, write_image_shard
from samer.retrievers.banks import Bank
from samer.retrievers.projectors import write_projector
from samer.runtime.files import FileTrouble, atomic_path, is_file, lookup, only_writer
from samer.runtime.progress import Progress
from samer.runtime.shards import finished_shard, joined, write_shard
from samer.runtime.signals import stop_here, stoppable


def recode(
    source: str | Path,
    folder: str | Path,
    dtype: str = "",
    budgets: Sequence[int] = (),
    *,
    keep: int = 0,
    bank: Bank | None = None,
    assignments: bool = True,
) -> list[IndexSummary]:
    """Makes an index of another's vectors.

    Args:
        source: the index, of floats, int8 or signs with their exact file; it stays as it is.
        folder: of the new one.
        dtype: one of `STORED` but binary; empty: the source's own.
        budgets: smaller K whose vectors are stored besides, merged out of all as `samer.budgets` says.
        keep: only so many vectors of each image, those that the bank would miss most (as the greedy picks of METHOD
            section 2b, without votes, which lose some when what is picked from is merged already); 0: all.
        bank: query tokens in whose metric codes are learned, and that say what to keep; None: those of the index, of
            codes else its vectors.
        assignments: keep the region of every patch, where the source has it.

    Returns:
        What the splits of the new index hold.

    Raises:
        InputError: `folder` holds an index, or another source's tables; a source of codes, too few vectors; budgets
            or vectors to keep that are no fewer; nothing that says what to keep; a damaged shard.
    """
    index, folder = Index(source), lookup(folder)
    dtype = dtype or index.manifest.dtype
    bank = bank or (index.bank() if keep else None)
    _check(index, folder, dtype, budgets, keep, bank)
    budgets = tuple(sorted(set(budgets), reverse=True))
    with only_writer(folder), stoppable():
        codebook = _tables(index, folder, dtype, budgets, keep, bank) if dtype in COMPONENTS else None
        own = {each.name: getattr(index.manifest, each.name) for each in fields(Making)}
        own |= {"dtype": dtype, "codes": codes_hash(codebook) if codebook else ""}
        own |= {"budgets": budgets, "assignments": assignments and index.manifest.assignments}
        own |= {"kept": keep, "bank": bank.hash} if keep else {}
        making = Making(**own)
        splits = {}
        for name, held in index.manifest.splits.items():
            shards = _images(index, name, folder / name, making, codebook, bank if keep else None)
            queries = tuple(_queries(index, name, shard, folder / name, making) for shard in held.queries)
            splits[name] = Split(shards, queries, held.root, held.deleted)
            write_columns(folder, name, read_columns(index.folder, name))
            if is_file(index.folder / name / STAMPS):
                with atomic_path(folder / name / STAMPS) as temporary:
                    shutil.copyfile(index.folder / name / STAMPS, temporary)
        write_projector(folder / "projector.safetensors", index.projector())
        keep_bank(folder, bank if keep else index.bank())
        more = {each.name: getattr(index.manifest, each.name) for each in fields(IndexManifest)}
        more |= {"bank_source": bank.describe()} if keep else {}
        write_index_manifest(folder / "manifest.json", IndexManifest(**{**more, **own, "splits": splits}))
    return [summarise(name, split) for name, split in splits.items()]


def _check(index: Index, folder: Path, dtype: str, budgets: Sequence[int], keep: int, bank: Bank | None) -> None:
    """Refuses what can't be made, before any work."""
    held = index.manifest
    if dtype not in STORED or dtype == "binary":
        known = ", ".join(name for name in STORED if name != "binary")
        raise InputError(f"dtype {dtype!r}: vectors are stored again as {known}")
    if held.dtype not in DTYPES:
        raise InputError(
            f"{index.folder}: holds {held.dtype} codes, which have lost what others would be made of; start from the "
            "index that it was made of"
        )
    most = min(max(shard.regions for shard in split.images) for split in held.splits.values())
    if keep and not 1 <= keep < most:
        raise InputError(f"--keep {keep}: fewer vectors are from 1 to {most - 1}, as images have {most}")
    if keep and not bank:
        raise InputError(f"--keep {keep}: a query bank says which vectors; give one as --bank (scripts/bank.py)")
    if keep and held.bank not in ("", bank.hash):
        raise InputError(f"{index.folder}: it was made with bank {held.bank[:12]}, which has to say what to keep, too")
    most = keep or most
    if wrong := [each for each in budgets if not 1 <= each < most]:
        raise InputError(f"--budgets {wrong[0]}: smaller budgets lie between 1 and {most - 1}, as images have {most}")
    if bank and not keep and dtype not in COMPONENTS:
        raise InputError(f"a query bank says what codes, or --keep, should keep; leave it out for {dtype}")
    if bank and bank.projector != held.projector:
        raise InputError(
            f"the query bank is of projector {bank.projector[:12]}, {index.folder} of {held.projector[:12]}; make one "
            "with scripts/bank.py and that projector (--adapter-path)"
        )
    check_folder(folder)
    if is_file(folder / "manifest.json"):
        raise InputError(f"{folder} holds an index already; name a new folder for the one that is made")


def _tables(index: Index, folder: Path, dtype: str, budgets: Sequence[int], keep: int, bank: Bank | None) -> Codebook:
    """The tables of an earlier try, or such as are learned now."""
    shards = [shard.sha256 for split in index.manifest.splits.values() for shard in split.images]
    about = [dtype, shards, budgets, bank.hash if bank else "", *([keep] if keep else [])]
    source = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    try:
        found, known = read_codes(folder / FILE)
        if known == source:
            return found
    except FileTrouble:
        raise
    except InputError:  # there is none, or it is damaged
        pass
    tokens, mask = sample(index, keep)
    if keep:
        tokens, mask, _ = kept_vectors(tokens, mask, None, bank, keep)
    moment = second_moment(bank.vectors, bank.weights) if bank else None
    codebook = learn(dtype, tokens, mask, moment, smaller_budgets(tokens, mask, None, budgets))
    write_codes(folder / FILE, codebook, source)
    return codebook


def sample(index: Index, keep: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors (n, K, D) float32 and their mask (n, K) of images spread over an index, some `ENOUGH` vectors.

    `keep`: so many vectors of an image will count; 0: all.
    """
    places = [(name, shard) for name, split in index.manifest.splits.items() for shard in split.images]
    images = sum(shard.count for _, shard in places)
    wanted = -(-ENOUGH // (keep or max(shard.regions for _, shard in places)))
    rows = torch.arange(min(images, wanted)) * images // min(images, wanted)  # spread evenly
    tokens, masks, start = [], [], 0
    for name, shard in places:
        own = rows[(rows >= start) & (rows < start + shard.count)] - start
        start += shard.count
        if len(own):
            tensors, _ = index._read(name, shard)
            exact = index._read(name, shard, exact=True)[0] if shard.exact else tensors
            tokens.append(floats_of(exact, own, index.codes))
            masks.append(tensors["mask"][own])
    return joined(tokens), joined(masks)


def _images(
    index: Index, split: str, place: Path, making: Making, codebook: Codebook | None, keeps: Bank | None
) -> tuple[Shard, ...]:
    """Writes the shards of a split that are not there; the entries of all."""
    found = []
    for shard in Progress(index.manifest.splits[split].images, f"{split} images", unit="shards"):
        stop_here()
        found.append(_image_shard(index, split, shard, place / shard.file, making, codebook, keeps))
    return tuple(found)


def _image_shard(
    index: Index, split: str, shard: Shard, path: Path, making: Making, codebook: Codebook | None, keeps: Bank | None
) -> Shard:
    tensors, held = index._read(split, shard)
    stamp = _stamp(held, making)
    if done := finished_shard(path, stamp):
        return Shard(**done)
    exact = index._read(split, shard, exact=True)[0] if shard.exact else tensors
    tokens, mask = floats_of(exact, slice(None), None), tensors["mask"]
    regions = tensors["assignments"].long() if index.manifest.has_regions else None
    if regions is not None and index.manifest.assignments:
        regions = regions.masked_fill(regions == NO_REGION, -1)
    if keeps:
        tokens, mask, regions = kept_vectors(tokens, mask, regions, keeps, making.kept)
    new = stored_tensors(making, tokens, mask, regions, codebook)
    new["grids"] = tensors["grids"]
    if making.has_regions:
        new["assignments"] = stored_regions(making, regions)
    return write_image_shard(path, new, {}, stamp)


def _queries(index: Index, split: str, shard: QueryShard, place: Path, making: Making) -> QueryShard:
    """A shard of queries, whose header says how the new index is made."""
    tensors, held = index._read(split, shard)
    stamp, path = _stamp(held, making), place / shard.file
    entry = finished_shard(path, stamp) or write_shard(path, tensors, stamp, {"count": shard.count})
    return QueryShard(**entry)


def _stamp(held: dict, making: Making) -> dict:
    """What the new shard's header says: what the old one's says of its images, and how the new index is made."""
    older = {"base_projector", "scale", *(each.name for each in fields(Making))}
    own = {key: value for key, value in held.items() if key not in older}
    stamp = {**own, **stamp_of(making), "hidden_states": held.get("hidden_states", making.hidden_states)}
    return json.loads(json.dumps(stamp))  # as it is read back
