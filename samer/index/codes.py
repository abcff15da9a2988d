"""The tables of an index of codes, in a file beside its manifest, and what an index of codes is made and grown by.

codes.safetensors    tables (G, 256, W) int8; scale (1,), images and queries (D, D), costs (D,), float32: what
                     `samer.codes` says of them. Its header is that of a shard
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from samer.codes import COMPONENTS, ENTRIES, TENSORS, Codebook, Codes
from samer.config import InputError
from samer.index.manifest import Making
from samer.runtime.files import DiskError, is_file
from samer.runtime.shards import load_shard, tensors_checksum, unreadable, write_shard

FILE = "codes.safetensors"
FORMAT, FORMAT_VERSION = "samer_codes", 1
REMEDY = "make the index of codes anew with scripts/recode.py"


def codes_state(codebook: Codebook) -> dict[str, Tensor]:
    """What the file holds."""
    return {"scale": torch.tensor([codebook.scale]), **{name: getattr(codebook, name) for name in TENSORS}}


def codes_hash(codebook: Codebook) -> str:
    """SHA-256 of the contents of its tensors; names the tables in an index."""
    return tensors_checksum(codes_state(codebook))


def write_codes(file: Path, codebook: Codebook, source: str) -> None:
    """Writes tables in one step; `source`: a hash of what they were learned from."""
    stamp = {"format": FORMAT, "format_version": FORMAT_VERSION, "source": source}
    write_shard(file, codes_state(codebook), stamp, {})


def read_codes(file: Path) -> tuple[Codebook, str]:
    """The tables in a file, whose checksum holds, and what `write_codes` was told of their source.

    Raises:
        InputError: missing, damaged, or something else.
    """
    try:
        tensors, header = load_shard(file)
        stamp = header.get("stamp", {})
        if (stamp.get("format"), stamp.get("format_version")) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"it holds no tables of format {FORMAT} {FORMAT_VERSION}")
        if header["checksum"] != tensors_checksum(tensors):
            raise ValueError("contents differ from their checksum")
        tables, images, queries, costs = (tensors[name] for name in TENSORS)
        width = len(images)
        right = tables.dtype == torch.int8 and tables.ndim == 3 and tables.shape[1] == ENTRIES
        right = right and tables.shape[2] in COMPONENTS.values() and tables.shape[0] * tables.shape[2] == width
        right = right and all(
            each.dtype == torch.float32 and each.shape == shape and bool(each.isfinite().all())
            for each, shape in ((images, (width, width)), (queries, (width, width)), (costs, (width,)))
        )
        scale = float(tensors["scale"])
        if not (right and 0 < scale < float("inf")):
            raise ValueError("its tensors can be no tables")
        return Codebook(tables, scale, images, queries, costs), stamp.get("source", "")
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise unreadable(file, error, REMEDY) from None


def held_codes(folder: Path, manifest: Making) -> Codebook | None:
    """The tables of an index; None: it is none of codes.

    Raises:
        InputError: missing, damaged, or not those that the index was made with.
    """
    if not manifest.codes:
        return None
    codebook, _ = read_codes(folder / FILE)
    right = codes_hash(codebook) == manifest.codes and codebook.width == manifest.embedding_dim
    if not right or codebook.tables.shape[2] != COMPONENTS[manifest.dtype]:
        raise DiskError(f"{folder / FILE}: not the tables that this index was made with; restore them, or {REMEDY}")
    return codebook


def refuse_new_codes(folder: Path, dtype: str) -> None:
    """Refuses to begin an index of codes from pictures: its tables are learned from vectors.

    Raises:
        InputError: says how to get one.
    """
    if dtype in COMPONENTS and not is_file(folder / "manifest.json"):
        raise InputError(
            f"{folder}: an index in {dtype} is made of one that is there, whose vectors its tables are learned from; "
            f"make it in int8 or float32 and then scripts/recode.py --cache-dir THAT --out {folder} --dtype {dtype}"
        )


def floats_of(tensors: dict[str, Tensor], rows: Tensor | list[int] | slice, codebook: Codebook | None) -> Tensor:
    """Vectors (n, K, D) float32 of rows of a shard, as numbers: int8 times its scale, codes looked up."""
    tokens = tensors["tokens"][rows]
    if codebook:
        images = Codes(tokens, tensors["bases"][rows], tensors["scales"][rows])
        return codebook.vectors(images, tensors["mask"][rows])
    tokens = tokens.float()
    return tokens * tensors["scales"][rows, None, None] if "scales" in tensors else tokens
