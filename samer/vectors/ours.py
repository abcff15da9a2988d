"""Embeddings in an index of ours: `FOLDER`, or `FOLDER#SPLIT` where it holds several.

An index that is written is made from one that keeps all tokens (compressor none), so it is what the retriever would
have made with the new settings: it grows, syncs and is searched as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path

import torch

from samer.config import InputError
from samer.index.columns import read_columns, write_columns
from samer.index.manifest import (
    DTYPES,
    FLOATS,
    NO_REGION,
    IndexManifest,
    Making,
    QueryShard,
    Shard,
    Split,
    stamp_of,
    write_index_manifest,
)
from samer.index.read import Index
from samer.index.tensors import Part, image_tensors
from samer.index.write import check_folder, write_image_shard
from samer.retrievers.projectors import write_projector
from samer.runtime.files import exists, is_file, only_writer
from samer.runtime.processes import print0
from samer.runtime.progress import Progress
from samer.runtime.shards import load_shard, write_shard
from samer.runtime.signals import stop_here
from samer.vectors.merge import renumbered
from samer.vectors.parts import Parts
from samer.vectors.rows import OWN, Row
from samer.vectors.stores import Plan, Store, split_table


class IndexStore(Store):
    """A split of an index."""

    form = "an index's FOLDER or FOLDER#SPLIT"
    dtypes = DTYPES
    stores_itself = True

    def __init__(self, place: str) -> None:
        super().__init__(place)
        folder, self._named = split_table(place, "")
        self.folder = Path(folder)
        self._plan: Plan | None = None

    @classmethod
    def takes(cls, place: str) -> bool:
        name = place.partition("#")[0]
        return "://" not in name and (not Path(name).suffix or is_file(Path(name) / "manifest.json"))

    @cached_property
    def index(self) -> Index:
        """The index, open."""
        return Index(self.folder)

    @property
    def split(self) -> str:
        """The split that is named, or the only one.

        Raises:
            InputError: several and none named, or no such split.
        """
        held = list(self.index.manifest.splits)
        if self._named in held:
            return self._named
        if self._named or len(held) != 1:
            raise InputError(f"{self.place}: the index holds {', '.join(held)}; name one as {self.folder}#{held[0]}")
        return held[0]

    def ids(self) -> Iterator[str]:
        named = {name for own in read_columns(self.folder, self.split).values() for name in own}
        self.left_out = tuple(sorted(named & set(OWN)))
        yield from self.index.numbers(self.split)

    def rows(self) -> Iterator[Row]:
        columns = read_columns(self.folder, self.split)
        numbers = self.index.numbers(self.split)
        for ids, *_ in self.index.images(self.split):  # checks each shard
            for name in ids:
                stored = self.index.vectors(self.split, numbers[name])
                source = None
                if stored.regions is not None and stored.grid is not None:
                    source = renumbered(stored.regions, stored.mask)
                grid = None if source is None else stored.grid
                own = {key: value for key, value in columns.get(name, {}).items() if key not in OWN}
                yield Row(name, stored.tokens[stored.mask], grid, None, source, own)

    def check_target(self, plan: Plan) -> None:
        super().check_target(plan)
        if not isinstance(plan.source, IndexStore):
            raise InputError(
                f"{self.place}: an index says which model made it, and {plan.source.place} does not; write parquet, "
                "npz or a database, or start from an index"
            )
        held = plan.source.index.manifest.merge.compressor
        if held != "none":
            raise InputError(
                f"{plan.source.place}: an index of merged vectors ({held}) makes no other index, which says how its "
                "own images are merged; start from one with merge.compressor=none, or write parquet"
            )
        if plan.merge.compressor == "querybank":
            raise InputError(f"{self.place}: an index with a query bank is made by scripts/index.py --bank")
        if self._named or exists(self.folder / "manifest.json"):
            raise InputError(f"{self.place}: names a split, or an index that is there; name a folder for a new one")
        check_folder(self.folder)
        self._plan = plan

    def dtype_for(self, source: Store) -> str:
        own = source.index.manifest.dtype if isinstance(source, IndexStore) else ""
        return own if own in DTYPES else super().dtype_for(source)  # codes have an index's own tables

    def write(self, parts: Parts) -> None:
        source, plan = self._plan.source, self._plan
        held, split = source.index.manifest, source.split
        with only_writer(self.folder):
            places = all(bool((parts.read(file)[0]["patches"] > 0).all()) for file in parts.files)
            few = isinstance(plan.merge.num_regions, str) or plan.merge.num_regions <= NO_REGION
            merge = (
                plan.merge if places or plan.merge.compressor != "samer" else replace(plan.merge, spatial_weight=0.0)
            )
            own = {each.name: getattr(held, each.name) for each in fields(Making)}
            keeps = places and few and plan.merge.compressor != "none"
            making = Making(
                **{**own, "merge": merge, "dtype": plan.dtype, "assignments": keeps, "codes": "", "budgets": ()}
            )
            contents = source.index.contents(split)
            shards = []
            for number, file in enumerate(Progress(parts.files, "writing", unit="shards")):
                stop_here()
                shards.append(self._write_shard(making, split, number, parts, file, contents))
            queries = self._queries(making, source, split)
            root = held.splits[split].root
            more = {key: getattr(held, key) for key in ("base_model", "revision", "transformers", "processing")}
            mine = {each.name: getattr(making, each.name) for each in fields(Making)}
            splits = {split: Split(tuple(shards), queries, root)}
            write_columns(self.folder, split, read_columns(source.folder, split))
            write_projector(self.folder / "projector.safetensors", source.index.projector())
            write_index_manifest(self.folder / "manifest.json", IndexManifest(**mine, **more, splits=splits))

    def _write_shard(self, making: Making, split: str, number: int, parts: Parts, file: Path, contents: dict) -> Shard:
        tensors, header = parts.read(file)
        ids, lengths = header["stamp"]["ids"], tensors["lengths"].tolist()
        pad = torch.nn.utils.rnn.pad_sequence
        tokens = pad(tensors["tokens"].split(lengths), batch_first=True)
        mask = torch.arange(tokens.shape[1]) < tensors["lengths"][:, None]
        grids = tensors["patches"]
        regions = torch.empty(len(ids), 0, dtype=torch.long)
        if making.has_regions:
            regions = pad(tensors["regions"].split(grids.prod(1).tolist()), batch_first=True, padding_value=-1)
        part = Part(tokens, mask, grids.to(torch.int32), regions)
        stored, half = image_tensors(making, [part])
        stamp = {**stamp_of(making), "ids": ids, "texts": []}
        known = [contents.get(name) for name in ids]
        if any(isinstance(content, str) for content in known):
            stamp["contents"] = [content if isinstance(content, str) else None for content in known]
        return write_image_shard(self.folder / split / f"images-{number:05d}.safetensors", stored, half, stamp)

    def _queries(self, making: Making, source: IndexStore, split: str) -> tuple[QueryShard, ...]:
        """The source's queries, which say how the index is made and name images by their rows."""
        held = source.index.manifest.splits[split]
        if any(held.deleted.values()) and held.queries:
            print0(f"note: images of {source.place} were deleted, so its captions are left out")
            return ()
        found = []
        kind = FLOATS.get(making.dtype, torch.bfloat16)
        for shard in held.queries:
            tensors, header = load_shard(source.folder / split / shard.file)
            stamp = {**header["stamp"], **stamp_of(making)}
            tensors = {**tensors, "tokens": tensors["tokens"].to(kind)}
            found.append(
                QueryShard(**write_shard(self.folder / split / shard.file, tensors, stamp, {"count": shard.count}))
            )
        return tuple(found)
