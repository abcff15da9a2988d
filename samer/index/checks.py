"""What is refused of a shard of images before anything believes it: tensors that are not what the manifest says."""

from __future__ import annotations

import torch
from torch import Tensor

from samer.codes import COMPONENTS
from samer.data.records import MOST_GRADE
from samer.index.manifest import FLOATS, IndexManifest, Shard, level_name, vector_bytes


def check_images(manifest: IndexManifest, shard: Shard, tensors: dict[str, Tensor], exact: bool) -> None:
    """Raises ValueError or KeyError for tensors that are not what the manifest says; what may be missing is filled.

    Afterwards a shard of any format holds what `samer.index.write` says of today's, and every mask.
    """
    dtype, width = manifest.dtype, manifest.embedding_dim
    if exact:
        return check_tensors(tensors, {"tokens": (torch.bfloat16, (shard.count, shard.regions, width))})
    kind = FLOATS.get(dtype, torch.int8 if dtype == "int8" else torch.uint8)
    width = vector_bytes(manifest) // kind.itemsize
    wanted = {}
    for budget in (0, *manifest.budgets):
        regions = min(budget, shard.regions) if budget else shard.regions
        mask = level_name("mask", budget)
        if budget or dtype in COMPONENTS:  # left out where every vector is there
            tensors.setdefault(mask, torch.ones(1, 1, dtype=torch.bool).expand(shard.count, regions))
        wanted[level_name("tokens", budget)] = kind, (shard.count, regions, width)
        wanted[mask] = torch.bool, (shard.count, regions)
        if dtype == "int8" and budget:
            wanted[level_name("scales", budget)] = torch.float32, (shard.count,)
    check_tensors(tensors, wanted)
    if shard.version == 3:
        _fill(manifest, shard, tensors)
    scales = [level_name("scales", each) for each in (0, *manifest.budgets)] if dtype == "int8" else []
    wanted = {"grids": (torch.int32, (shard.count, 2))}
    if dtype in COMPONENTS:
        scales, wanted["bases"] = ["scales"], (torch.int8, (shard.count, manifest.embedding_dim))
    wanted |= dict.fromkeys(scales, (torch.float32, (shard.count,)))
    if manifest.has_regions:
        kind = torch.uint8 if manifest.assignments else torch.int32
        wanted["assignments"] = kind, (shard.count, tensors["assignments"].shape[-1])
    check_tensors(tensors, wanted)
    grids = tensors["grids"].long()
    right = bool(((grids > 0).all(1) | (grids == 0).all(1)).all())  # 0 where it is not known
    if manifest.has_regions:
        right = right and int(grids.prod(1).max()) <= tensors["assignments"].shape[1]
    right = right and all(bool((tensors[name] > 0).all() and tensors[name].isfinite().all()) for name in scales)
    if not right:
        raise ValueError("its grids or scales can't be true")


def _fill(manifest: IndexManifest, shard: Shard, tensors: dict[str, Tensor]) -> None:
    """Adds to a shard of format 3 what today's holds; it did not know grids."""
    tensors["grids"] = torch.zeros(shard.count, 2, dtype=torch.int32)
    if shard.scale is not None:
        tensors["scales"] = torch.full((shard.count,), shard.scale)
    if manifest.merge.compressor == "none":  # every token is a vector of its own
        tokens = torch.arange(shard.regions, dtype=torch.int32)
        tensors["assignments"] = torch.where(tensors["mask"], tokens, -1)


def check_tensors(tensors: dict[str, Tensor], wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Raises ValueError or KeyError unless the tensors have these dtypes and shapes."""
    if any((tensors[name].dtype, tuple(tensors[name].shape)) != about for name, about in wanted.items()):
        raise ValueError("its tensors are not what the manifest says")


def check_grades(held: object, count: int) -> None:
    """Raises ValueError unless `held` can be what a shard of so many queries says of the images that answer them."""
    rows = held if isinstance(held, list) and len(held) == count else [None]
    pairs = [pair for row in rows for pair in (row if isinstance(row, list) and row else [None])]
    right = (isinstance(pair, list) and [type(each) for each in pair] == [int, int] for pair in pairs)
    if not all(right) or not all(number >= 0 and 0 < grade <= MOST_GRADE for number, grade in pairs):
        raise ValueError("its grades can't be true")


def is_stamp(value: object) -> bool:
    """Whether a header of an earlier version may note an image's file so."""
    return value is None or (isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value))
