"""The export itself: shards one by one, a cursor after each, deletions, and the check against our exact search.

Shape letters: Q queries, M tokens, K regions, D embedding.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from samer.config import InputError, MergeConfig
from samer.export import STORES
from samer.export.base import BATCH_BYTES, Facts, Point, Store
from samer.index.columns import Columns, read_columns
from samer.index.exact import ExactBlock, exact_blocks
from samer.index.manifest import Shard
from samer.index.read import Index
from samer.merging import merge_tokens
from samer.runtime.files import exists, read_json, write_json
from samer.runtime.progress import Progress
from samer.runtime.signals import stop_here
from samer.scoring import StoredImages, search
from samer.tokens import QueryTokens

TIE = 1e-6  # scores no further apart are equal: stores order them as they like


@dataclass(frozen=True)
class Exported:
    """What came of an export: images in the store, shards written now, shards kept from earlier runs."""

    images: int
    written: int
    kept: int


@dataclass(frozen=True)
class Agreement:
    """A store against our exact search: queries, their kind in words, the mean overlap@10, the largest difference."""

    queries: int
    kind: str
    overlap: float
    difference: float


def facts_of(index: Index, split: str, dtype: str, coarse: int = 0) -> Facts:
    """What an index says of its vectors.

    Raises:
        InputError: no such split.
    """
    made = index.manifest
    index.size(split)  # refuses a split that is not there
    root = made.splits[split].root or ""
    return Facts(
        made.base_model, made.revision, made.projector, made.processing, made.embedding_dim, dtype, root, coarse
    )


def make_store(kind: str, place: str, collection: str, facts: Facts) -> Store:
    """A store, not yet connected.

    Raises:
        InputError: an unknown kind, or facts that it has no place for.
    """
    if kind not in STORES:
        raise InputError(f"store {kind!r} is unknown; use one of {', '.join(STORES)}")
    file, name = STORES[kind]
    return getattr(importlib.import_module(f"samer.export.{file}"), name)(place, collection, facts)


def open_store(kind: str, place: str, collection: str, facts: Facts) -> Store:
    """A store, connected.

    Raises:
        InputError: as `make_store`; a store that is down, a collection that holds something else.
    """
    store = make_store(kind, place, collection, facts)
    store.open()
    return store


def export(index: Index, split: str, store: Store, cursor: str | Path) -> Exported:
    """Brings a store to what the index holds: changed shards are written, what is gone is removed.

    `cursor` is a file that says after every shard what the store has; it is tied to store, collection and facts.
    Without it everything is written again, which changes nothing in the store.

    Raises:
        InputError: a damaged shard, a store that refuses, a cursor of another export.
    """
    held = index.manifest.splits[split]
    own = {"store": store.name, "place": store.place, "collection": store.collection, "split": split}
    own |= {"facts": asdict(store.facts)}
    done = _read_cursor(cursor, own)
    metadata = read_columns(index.folder, split)
    states = {}
    for shard, stamp, _ in index._named(split):
        columns = {name: metadata[name] for name in stamp["ids"] if name in metadata}
        states[shard.file] = _state(shard, held.deleted.get(shard.file, ()), columns)
    todo = [shard for shard in held.images if done.get(shard.file) != states[shard.file]]
    live = set(index.numbers(split))
    parts = {_part(split, each) for each in held.images if len(held.deleted.get(each.file, ())) < each.count}
    if not exists(cursor) and store.has_others(parts, live):
        raise InputError(
            f"{store.place}: {store.collection!r} holds what this index does not, and no cursor at {cursor} says that "
            "an export put it there; nothing was changed: name another --collection"
        )
    for shard in Progress(todo, f"export {split} to {store.name}", unit="shards", leave=False):
        stop_here()
        if _part(split, shard) in parts:
            store.write(_part(split, shard), _batches(index, split, shard, store, metadata))
        done[shard.file] = states[shard.file]
        write_json(cursor, {**own, "done": done})
    images = store.settle(parts, live)
    if images != len(live):
        raise InputError(
            f"{store.place}: holds {images:,} images of {len(live):,} after the export; somebody else wrote to it, or "
            f"removed from it: delete {cursor} and run it again"
        )
    write_json(cursor, {**own, "done": states})
    return Exported(images, len(todo), len(states) - len(todo))


def _part(split: str, shard: Shard) -> str:
    return f"{split}-{shard.file.partition('.')[0]}"


def _state(shard: Shard, deleted: tuple[int, ...], columns: Columns) -> str:
    """Changes with what a shard holds, with what is deleted of it, and with its images' metadata."""
    rows = json.dumps([sorted(deleted), columns], sort_keys=True).encode()
    return f"{shard.sha256[:32]}-{hashlib.sha256(rows).hexdigest()[:16]}"


def _read_cursor(cursor: str | Path, own: dict) -> dict[str, str]:
    """What an earlier run noted, shard by shard; nothing where there was none."""
    if not exists(cursor):
        return {}
    found = read_json(cursor)
    done = found.pop("done", None)
    if found != own or not isinstance(done, dict):
        raise InputError(f"{cursor}: the cursor of another export, or of another index; name another --cursor")
    return done


def _batches(index: Index, split: str, shard: Shard, store: Store, metadata: Columns) -> Iterator[list[Point]]:
    """The images of a shard as points, some `BATCH_BYTES` of vectors, as the store is sent them, at a time."""
    size = (shard.regions + store.facts.coarse) * store.facts.dim * store.number_bytes
    for block in exact_blocks(index, split, shard, max(1, BATCH_BYTES // size)):
        yield list(_points(block, store.facts, metadata))


def _points(block: ExactBlock, facts: Facts, metadata: Columns) -> Iterator[Point]:
    tokens = block.tokens.to(getattr(torch, facts.dtype)).numpy()  # numpy takes far longer to halve
    mask, grids = block.mask.numpy(), block.grids.tolist()
    coarse = _coarse(block, facts.coarse) if facts.coarse else None
    for row, name in enumerate(block.ids):
        path = str(Path(facts.root) / name) if facts.root else ""
        few = None if coarse is None else coarse[0][row][coarse[1][row]].astype(facts.dtype)
        yield Point(name, path, tuple(grids[row]), tokens[row][mask[row]], few, metadata.get(name, {}))


def _coarse(block: ExactBlock, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of every image merged further, by direction alone: (n, count, D) and their mask."""
    tokens = torch.nn.functional.normalize(block.tokens, dim=-1)
    places = torch.full((tokens.shape[1], 2), 0.5)  # all the same: no place counts
    merged = merge_tokens(tokens, places, MergeConfig(num_regions=count, center_init="farthest"), mask=block.mask)
    return merged.tokens.numpy(), merged.mask.numpy()


def verify(index: Index, split: str, store: Store, count: int) -> Agreement:
    """Asks a store and our exact search the same queries, over the same vectors in the exported dtype.

    Queries are the split's captions; where it holds none, the vectors of its own images, at most 16 each.

    Raises:
        InputError: fewer than one query, a damaged shard, a store that does not answer.
    """
    if count < 1:
        raise InputError(f"--verify is {count}; it must be at least 1")
    queries, kind = _queries(index, split, count)
    exact = search(queries, _stored(index, split, store.facts), top=20)
    overlaps, largest = [], 0.0
    for number, wanted in enumerate(exact):
        found = store.search(queries.tokens[number][queries.mask[number]].float().numpy(), 10)
        scores = dict(wanted)
        last = wanted[:10][-1][1]
        same = [name for name, _ in found if scores.get(name, -2.0) >= last - TIE]
        overlaps.append(len(same) / len(wanted[:10]))
        largest = max([largest, *(abs(score - scores[name]) for name, score in found if name in scores)])
    return Agreement(len(exact), kind, sum(overlaps) / len(overlaps), largest)


def _stored(index: Index, split: str, facts: Facts) -> Iterator[tuple[list[str], StoredImages]]:
    """What was exported, as our search reads it."""
    kind = getattr(torch, facts.dtype)
    for shard in index.manifest.splits[split].images:
        for block in exact_blocks(index, split, shard, 1024):
            yield block.ids, StoredImages(block.tokens.to(kind).float(), None, block.mask, None)


def _queries(index: Index, split: str, count: int) -> tuple[QueryTokens, str]:
    """The first captions of a split, or vectors of its images, spread over the split."""
    rows: list[torch.Tensor] = []
    for block, _, _ in index.queries(split):
        rows += [tokens[mask].float() for tokens, mask in zip(block.tokens, block.mask)]
        if len(rows) >= count:
            break
    kind = "captions"
    if not rows:
        kind = "vectors of the index's own images"
        numbers = list(index.numbers(split).values())
        chosen = [numbers[k * len(numbers) // count] for k in range(count)] if len(numbers) > count else numbers
        stored = [index.vectors(split, number) for number in chosen]
        rows = [torch.nn.functional.normalize(each.tokens[each.mask][:16], dim=-1) for each in stored]
    rows = rows[:count]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return QueryTokens(padded, torch.arange(padded.shape[1]) < lengths[:, None]), kind


def query_side(store: Store, folder: str | Path) -> str:
    """Lines of Python that ask the store a question in words."""
    made = f"index = Index({str(folder)!r})\nencoder = Models('cpu').load(index)\n"
    asked = "tokens, _ = Models('cpu').query(encoder, index.projector(), 'two dogs on a beach')\n"
    query = "query = tokens.tokens[0][tokens.mask[0]].numpy()\n"
    head = "from samer.index.read import Index\nfrom samer.search.models import Models\n"
    return f"{head}{made}{asked}{query}{store.query_code()}\n"
