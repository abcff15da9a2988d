"""What an index's manifest says, and what is refused before anything believes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from samer.config import InputError
from samer.runtime.shards import bare_name, whole_number

FORMAT = "samer_cache"
FORMAT_VERSION = 3  # 1 had no projector, no int8, no signs and no deletions, 2 no checksum of the manifest
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = (*FLOATS, "int8", "binary")
NO_REGION = 255
SHARD_NAME = re.compile(r"(images|queries)-(\d{5,9})(\.exact)?\.safetensors")


@dataclass(frozen=True)
class IndexSummary:
    """What a split of a cache holds; `bytes_per_image` counts tokens and mask, as a search reads them."""

    split: str
    images: int
    queries: int
    regions: int
    bytes_per_image: float
    reused_shards: int


def _number(name: str) -> int:
    """The number in a shard's name."""
    return int(SHARD_NAME.fullmatch(name)[2])


def _summary(split: str, entry: dict, reused: int) -> IndexSummary:
    images = sum(shard["count"] for shard in entry["images"])
    size = sum(shard["bytes"] for shard in entry["images"]) / images
    regions = max(shard["regions"] for shard in entry["images"])
    live = images - sum(len(rows) for rows in entry.get("deleted", {}).values())
    return IndexSummary(split, live, sum(shard["count"] for shard in entry["queries"]), regions, size, reused)


def check_manifest(path: Path, manifest: dict) -> None:
    """Refuses a manifest that cannot be true, before anything believes its counts or opens what it names.

    Raises:
        InputError: names the manifest and what is wrong.
    """

    def check(right: bool, what: str) -> None:
        if not right:
            raise InputError(f"{path}: {what}; it is damaged: remove the cache and build it anew")

    whole, bare = whole_number, bare_name
    dtype, scale, width = manifest.get("dtype"), manifest.get("scale"), manifest.get("embedding_dim")
    check(dtype in DTYPES if isinstance(dtype, str) else False, f"dtype {str(dtype)[:40]!r} is unknown")
    check(scale is None or (type(scale) is float and 0 < scale < float("inf")), f"scale {str(scale)[:40]} is no scale")
    check((scale is not None) == (dtype == "int8"), "a scale belongs to int8, and to it only")
    check(whole(width, 1), f"embedding_dim {str(width)[:40]} is no width")
    for key in ("base_model", "base_projector", "projector"):
        check(isinstance(manifest.get(key), str), f"{key} is missing or no text")
    check(isinstance(manifest.get("merge"), dict), "merge is missing or no mapping")
    check(isinstance(manifest.get("assignments"), bool), "assignments is neither true nor false")
    check(isinstance(manifest.get("splits"), dict), "splits is missing or no mapping")
    stored = {"binary": width // 8, "int8": width}.get(dtype) or width * FLOATS.get(dtype, torch.int8).itemsize
    for split, entry in manifest["splits"].items():
        check(bare(split) and isinstance(entry, dict), f"split {split[:40]!r} is no split")
        check(isinstance(entry.get("root", ""), str), f"root of {split} is no text")
        counts: dict[str, int] = {}
        for kind in ("images", "queries"):
            check(isinstance(entry.get(kind), list), f"{kind} of {split} are missing or no list")
            for shard in entry[kind]:
                name = shard.get("file") if isinstance(shard, dict) else None
                match = SHARD_NAME.fullmatch(name) if isinstance(name, str) else None
                right = match and match[1] == kind and not match[3] and name not in counts
                check(bool(right), f"a shard of {split} has no name, or another's")
                right = whole(shard.get("count"), 1) and isinstance(shard.get("sha256"), str)
                if kind == "images":
                    right = right and whole(shard.get("regions"), 1) and whole(shard.get("bytes"), 1)
                    right = right and shard["bytes"] == shard["count"] * shard["regions"] * (stored + 1)
                right = right and ("exact" in shard) == (kind == "images" and dtype == "binary")
                if right and "exact" in shard:
                    exact = shard["exact"]
                    right = isinstance(exact, dict) and exact.get("file") == name.replace(".", ".exact.", 1)
                    right = right and whole(exact.get("bytes"), 1) and isinstance(exact.get("sha256"), str)
                check(
                    right and (kind == "images") == ("regions" in shard), f"the entry of {split}/{name} can't be true"
                )
                counts[name] = shard["count"]
        check(bool(entry["images"]), f"{split} has no shard of images")
        deleted, names = entry.get("deleted", {}), {shard["file"] for shard in entry["images"]}
        check(isinstance(deleted, dict) and set(deleted) <= names, f"deleted of {split} names no shard")
        for name, rows in deleted.items():
            right = isinstance(rows, list) and all(type(row) is int and 0 <= row < counts[name] for row in rows)
            check(right and len(set(rows)) == len(rows), f"deleted rows of {split}/{name} are not there")


def describe(summary: IndexSummary, folder: str | Path) -> str:
    """One line on a written split."""
    again = f", {summary.reused_shards} shards kept from an earlier try" if summary.reused_shards else ""
    where = Path(folder) / summary.split
    return (
        f"{summary.split}: {summary.images:,} images x at most {summary.regions} vectors "
        f"({summary.bytes_per_image:,.0f} bytes per image), {summary.queries:,} queries -> {where}{again}"
    )
