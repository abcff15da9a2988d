"""What an index's manifest says, typed, and what is refused before anything believes it.

The format itself is described in `samer.index.write`.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from samer.codes import COMPONENTS
from samer.compressors import settings_used, settings_written
from samer.config import InputError, MergeConfig, ReduceConfig
from samer.reducers import settings_used as reduction_used
from samer.retrievers.identity import ModelIdentity
from samer.runtime.shards import bare_name, read_manifest, whole_number, write_manifest
from samer.settings import build_dataclass

FORMAT = "samer_cache"  # its first name; on disk it stays
# 1 had no projector, no int8, no signs and no deletions, 2 no checksum of the manifest; 3, with one int8 scale for all
# images and regions of tokens instead of patches, is still read
FORMAT_VERSION = 4
OLDER = (3,)
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = (*FLOATS, "int8", "binary")  # that an index is built in; codes are made of one that is there
STORED = (*DTYPES, *COMPONENTS)
NO_REGION = 255
SCALE_BYTES = 4
COMMON = ("bases", "scales")  # tensors of codes that all budgets of an image share
SHARD_NAME = re.compile(r"(images|queries)-(\d{5,9})(\.exact)?\.safetensors")


@dataclass(frozen=True)
class IndexSummary:
    """What a split of an index holds; `bytes_per_image` counts tokens, scale and mask, as a search reads them."""

    split: str
    images: int
    queries: int
    regions: int
    bytes_per_image: float
    reused_shards: int


@dataclass(frozen=True)
class ExactFile:
    """The file with the exact vectors of 1-bit ones; `bytes` of its tokens."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A file of images.

    Attributes:
        file: its name in the split's folder.
        count: how many images, deleted ones too.
        regions: K, the most vectors of one of them.
        bytes: of tokens, bases, scales and mask, those of smaller budgets too.
        sha256: of the whole file.
        version: of the format that its tensors have.
        scale: of int8 in format 3, one for all images; later formats keep a scale per image in the file.
        exact: only beside 1-bit tokens.
    """

    file: str
    count: int
    regions: int
    bytes: int
    sha256: str
    version: int = FORMAT_VERSION
    scale: float | None = None
    exact: ExactFile | None = None

    @property
    def number(self) -> int:
        """The number in its name."""
        return int(SHARD_NAME.fullmatch(self.file)[2])

    def files(self) -> list[tuple[str, str]]:
        """Names and checksums of its file and of the exact one."""
        return [(part.file, part.sha256) for part in (self, self.exact) if part]


@dataclass(frozen=True)
class QueryShard:
    """A file of queries."""

    file: str
    count: int
    sha256: str

    def files(self) -> list[tuple[str, str]]:
        """As of a `Shard`."""
        return [(self.file, self.sha256)]


@dataclass(frozen=True)
class Split:
    """What an index holds of a split.

    Attributes:
        images: the shards in order; an image's number counts over all of them.
        queries: likewise; empty for a folder of pictures.
        root: the folder that ids are paths under; None for a data set.
        deleted: rows of deleted images, by shard.
    """

    images: tuple[Shard, ...]
    queries: tuple[QueryShard, ...]
    root: str | None = None
    deleted: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Making:
    """What an index is made by: what may not change while it grows.

    Attributes:
        model: the retriever.
        projector: hash of the projection in use.
        merge: the compressor and its settings.
        dtype: of stored image tokens, one of `STORED`.
        embedding_dim: D.
        hidden_states: where they come from, as `Encoder.origin` says.
        assignments: whether the region of every patch is kept, if not the compressor's kind says it.
        bank: hash of the query bank, where the compressor has one, or where it says which vectors are `kept`.
        reduce: how the vision tower ran on fewer tokens.
        codes: hash of the tables, where vectors are stored as codes.
        budgets: smaller K, falling, whose vectors are stored besides.
        kept: of the compressor's vectors only so many are stored, those that the bank would miss most; 0: all.
    """

    model: ModelIdentity
    projector: str
    merge: MergeConfig
    dtype: str
    embedding_dim: int
    hidden_states: dict[str, str] = field(default_factory=dict)
    assignments: bool = False
    bank: str = ""
    reduce: ReduceConfig = field(default_factory=ReduceConfig)
    codes: str = ""
    budgets: tuple[int, ...] = ()
    kept: int = 0

    @property
    def has_regions(self) -> bool:
        """Whether images come with the region of every patch; where all tokens are kept they always do."""
        return self.assignments or self.merge.compressor == "none"

    def difference(self, other: Making) -> tuple[str, Any, Any] | None:
        """The first thing that differs and its two values; settings that the compressor does not use never do."""
        if part := self.model.difference(other.model):
            return f"model.{part}", getattr(self.model, part), getattr(other.model, part)
        for name in (each.name for each in fields(Making) if each.name != "model"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "merge" and mine != theirs:
                mine, theirs = settings_used(mine), settings_used(theirs)
            if name == "reduce":
                mine, theirs = reduction_used(mine), reduction_used(theirs)
            if mine != theirs:
                return name, mine, theirs
        return None


@dataclass(frozen=True)
class IndexManifest(Making):
    """A manifest: how the index was made, where its model is, and what it holds.

    Attributes:
        base_model: of the retriever, a name on the hub or a folder, as it was given.
        revision: of it on the hub.
        transformers: the version that computed the first images.
        bank_source: in words, what the query bank was made of.
        processing: what the retriever's processor does, as `Family.processing` says; for people to read.
        also_computed_in: dtypes beside that of `hidden_states` that images may have been computed in, as the index's
            owner allowed; a shard's header says in which its images were, unless it was compacted of both.
        splits: by name.
    """

    base_model: str = ""
    revision: str = "main"
    transformers: str = ""
    bank_source: str = ""
    processing: dict[str, str] = field(default_factory=dict)
    also_computed_in: tuple[str, ...] = ()
    splits: dict[str, Split] = field(default_factory=dict)

    def difference(self, other: Making) -> tuple[str, Any, Any] | None:
        """As `Making.difference`; what was computed in one of `also_computed_in` does not differ by that."""
        states = other.hidden_states
        if states.get("computed_in") in self.also_computed_in:
            states = {**states, "computed_in": self.hidden_states.get("computed_in", "")}
        return super().difference(replace(other, hidden_states=states))


def to_json(manifest: IndexManifest) -> dict:
    """A manifest as its file holds it; what a split or a shard does not have is left out."""
    found = _plain(manifest)
    for split in found["splits"].values():
        for entry in (split, *split["images"]):
            for key in [key for key in ("root", "deleted", "scale", "exact") if not entry.get(key, True)]:
                del entry[key]
    return {"format": FORMAT, "format_version": FORMAT_VERSION, **found}


def write_index_manifest(path: Path, manifest: IndexManifest) -> None:
    """Replaces a manifest in one step."""
    write_manifest(path, to_json(manifest))


def read_index_manifest(path: Path) -> IndexManifest:
    """A manifest of this format or an older one that can be read; keys that are missing get their defaults.

    Raises:
        InputError: not readable, damaged, of a newer SaMer, or impossible; names the file and what is wrong.
    """
    return manifest_from_json(read_manifest(path, FORMAT, FORMAT_VERSION, *OLDER), path)


def manifest_from_json(found: dict, path: Path) -> IndexManifest:
    """As `read_index_manifest`, of what its file at `path` holds, without the checksum."""
    found = dict(found)
    del found["format"]
    if found.pop("format_version") == 3:
        found = _from_version_3(found)
    try:
        if "splits" not in found:
            raise ValueError("splits is missing")
        manifest = _typed(IndexManifest, found, "")
        _check(manifest)
    except InputError as error:  # a key that this SaMer does not know, or a setting out of its range
        raise InputError(f"{path}: {error}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}; it is damaged: remove the index and build it anew") from None
    return manifest


def stamp_of(making: Making) -> dict:
    """What every shard's header says of how the index is made; of a manifest too, which is a `Making`."""
    own = Making(**{each.name: getattr(making, each.name) for each in fields(Making)})
    return {"format": FORMAT, "format_version": FORMAT_VERSION, **_plain(own)}


def _plain(making: Making) -> dict:
    """A dataclass as files hold it; what bank, processor, reducer or codes say is left out where there is none."""
    reduce = {} if making.reduce.method == "none" else reduction_used(making.reduce)
    found = {**asdict(making), "merge": settings_written(making.merge), "reduce": reduce}
    found["budgets"] = list(making.budgets)
    optional = ("bank", "bank_source", "processing", "reduce", "codes", "budgets", "kept", "also_computed_in")
    return {key: value for key, value in found.items() if value or key not in optional}


def making_from_stamp(stamp: dict) -> Making:
    """How a shard was made, as its header says.

    Raises:
        ValueError: it does not say so.
    """
    names = {each.name for each in fields(Making)} | {"base_projector"}
    found = {key: value for key, value in stamp.items() if key in names}
    return _typed(Making, _from_version_3(found) if stamp.get("format_version") == 3 else found, "")


def _from_version_3(found: dict) -> dict:
    """What version 3 said, in today's words; what can't be true in it is left for the checks to find."""
    rest = {key: value for key, value in found.items() if key not in ("base_projector", "scale")}
    if "base_projector" in found:
        rest["model"] = {"architecture": "", "weights": "", "processor": "", "base_projector": found["base_projector"]}

    def older(shard: Any) -> Any:
        return {**shard, "version": 3, "scale": found.get("scale")} if isinstance(shard, dict) else shard

    if isinstance(found.get("splits"), dict):
        rest["splits"] = {
            name: {**split, "images": list(map(older, split["images"]))}
            if isinstance(split, dict) and isinstance(split.get("images"), list)
            else split
            for name, split in found["splits"].items()
        }
    return rest


def _typed(kind: Any, value: Any, name: str) -> Any:
    """A value from JSON as type `kind`, strictly; `name` says where it stands.

    Raises:
        InputError: a key that is unknown.
        ValueError: a key that is missing, or a value of another type.
    """
    if kind is MergeConfig and isinstance(value, dict):
        return build_dataclass(MergeConfig, value, "the index's settings", "merge.")
    if kind is ReduceConfig and isinstance(value, dict):
        found = build_dataclass(ReduceConfig, value, "the index's settings", "reduce.")
        reduction_used(found)  # a method that this SaMer knows
        return found
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if value is None else _typed(inner[0], value, name)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints, prefix = typing.get_type_hints(kind), f"{name}." if name else ""
        if unknown := sorted(value.keys() - hints.keys()):
            raise InputError(f"unknown key {prefix}{unknown[0][:40]}; a newer SaMer may have written it")
        for each in fields(kind):
            if each.name not in value and each.default is each.default_factory is dataclasses.MISSING:
                raise ValueError(f"{prefix}{each.name} is missing")
        return kind(**{key: _typed(hints[key], entry, f"{prefix}{key}") for key, entry in value.items()})
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_typed(inner[0], entry, f"{name} {row}") for row, entry in enumerate(value))
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {key: _typed(inner[1], entry, f"{name} {key[:40]!r}") for key, entry in value.items()}
    if type(value) is not kind:
        raise ValueError(f"{name} can't be {str(value)[:40]!r}")
    return value


def _require(right: bool, what: str) -> None:
    if not right:
        raise ValueError(what)


def _check(manifest: IndexManifest) -> None:
    """Raises ValueError for what has the right types and can't be true."""
    _require(manifest.dtype in STORED, f"dtype {manifest.dtype[:40]!r} is unknown")
    _require(whole_number(manifest.embedding_dim, 1), f"embedding_dim {manifest.embedding_dim} is no width")
    _require(bool(manifest.codes) == (manifest.dtype in COMPONENTS), f"{manifest.dtype} and codes do not fit")
    falling = sorted({each for each in manifest.budgets if each >= 1}, reverse=True)
    _require(falling == list(manifest.budgets), "budgets are no falling numbers")
    _require(manifest.kept >= 0 and bool(manifest.bank or not manifest.kept), "so many vectors kept, by no bank")
    for name, split in manifest.splits.items():
        _require(bare_name(name), f"split {name[:40]!r} is no split")
        _require(bool(split.images), f"{name} has no shard of images")
        counts: dict[str, int] = {}
        for shard in (*split.images, *split.queries):
            kind = "images" if isinstance(shard, Shard) else "queries"
            match = SHARD_NAME.fullmatch(shard.file)
            right = match and match[1] == kind and not match[3] and shard.file not in counts
            _require(bool(right), f"a shard of {name} has no name, or another's")
            right = shard.count >= 1 and (kind == "queries" or _shard_can_be(shard, manifest))
            _require(right, f"the entry of {name}/{shard.file} can't be true")
            counts[shard.file] = shard.count
        names = {shard.file for shard in split.images}
        _require(set(split.deleted) <= names, f"deleted of {name} names no shard")
        for file, rows in split.deleted.items():
            right = len(set(rows)) == len(rows) and all(0 <= row < counts[file] for row in rows)
            _require(right, f"deleted rows of {name}/{file} are not there")


def _shard_can_be(shard: Shard, manifest: IndexManifest) -> bool:
    """Whether a shard's entry fits its own numbers and the index's dtype."""
    dtype = manifest.dtype
    one = shard.version == 3 and dtype == "int8"  # scale for all images
    right = shard.version in (FORMAT_VERSION, *OLDER) and (shard.scale is not None) == one
    right = right and (not one or 0 < shard.scale < float("inf"))
    right = right and shard.regions >= 1 and shard.bytes in _sizes(shard, manifest, one)
    if not right or (shard.exact is not None) != (dtype == "binary"):
        return False
    return shard.exact is None or (shard.exact.file == shard.file.replace(".", ".exact.", 1) and shard.exact.bytes >= 1)


def _sizes(shard: Shard, manifest: IndexManifest, one: bool) -> range:
    """What a shard's tensors may take; masks are left out of codes and of budgets where all vectors are there.

    `one`: all images have one scale, which the manifest holds.
    """
    coded, stored = manifest.dtype in COMPONENTS, vector_bytes(manifest)
    smaller = [min(each, shard.regions) for each in manifest.budgets]
    scaled = 0 if one else 1 + len(smaller) if manifest.dtype == "int8" else int(coded)
    each = (shard.regions + sum(smaller)) * stored + scaled * SCALE_BYTES + (manifest.embedding_dim if coded else 0)
    masks = sum(smaller) + (shard.regions if coded else 0)
    least = shard.count * (each + (0 if coded else shard.regions))
    return range(least, least + shard.count * masks + 1)


def most_scanned(making: Making, shard: Shard, budget: int) -> int:
    """Bytes of a shard that a scan reads at most, at a smaller budget or (0) of all vectors."""
    regions = min(budget, shard.regions) if budget else shard.regions
    base = making.embedding_dim if making.codes else 0
    return shard.count * (regions * (vector_bytes(making) + 1) + base + SCALE_BYTES)


def level_name(name: str, budget: int) -> str:
    """What a shard's tensor is called: `name` of the index's own K (0), or that of a smaller budget."""
    return f"{name}_{budget}" if budget else name


def check_regions(regions: int) -> None:
    """Refuses more regions than a byte per patch tells apart.

    Raises:
        InputError: says how many there may be.
    """
    if regions > NO_REGION:
        raise InputError(
            f"assignments take a byte per patch, so at most {NO_REGION} regions, not {regions}; leave --assignments "
            "out, or say --no-assignments"
        )


def vector_bytes(making: Making) -> int:
    """Bytes of a stored vector."""
    dtype, width = making.dtype, making.embedding_dim
    if dtype in COMPONENTS:
        return width // COMPONENTS[dtype]
    return {"binary": width // 8, "int8": width}.get(dtype) or width * FLOATS.get(dtype, torch.int8).itemsize


def files_of(manifest: IndexManifest) -> Iterator[tuple[str, str]]:
    """Every shard's path below the index, and its checksum."""
    for name, split in manifest.splits.items():
        for shard in (*split.images, *split.queries):
            yield from ((f"{name}/{file}", checksum) for file, checksum in shard.files())


def summarise(name: str, split: Split, reused: int = 0) -> IndexSummary:
    """What a split holds; `reused` shards were kept from an earlier try."""
    images = sum(shard.count for shard in split.images)
    size = sum(shard.bytes for shard in split.images) / images
    regions = max(shard.regions for shard in split.images)
    live = images - sum(len(rows) for rows in split.deleted.values())
    return IndexSummary(name, live, sum(shard.count for shard in split.queries), regions, size, reused)


def describe(summary: IndexSummary, folder: str | Path) -> str:
    """One line on a written split."""
    again = f", {summary.reused_shards} shards kept from an earlier try" if summary.reused_shards else ""
    where = Path(folder) / summary.split
    return (
        f"{summary.split}: {summary.images:,} images x at most {summary.regions} vectors "
        f"({summary.bytes_per_image:,.0f} bytes per image), {summary.queries:,} queries -> {where}{again}"
    )
