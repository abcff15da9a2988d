"""What a run has merged so far: files of its own beside the place that is written, so that a killed run goes on.

    OUT.parts/part-00000.safetensors    rows in order; a shard as `samer.runtime.shards` says:
        tokens       (sum of K, D) in the dtype that is written, or (sum of K, D / 8) uint8
        lengths      (n,) int64, K of each row
        scales       (n,) float32, int8 only
        regions      (sum of P,) int64, the merged vector of every patch, -1 for none; only for an index
        patches      (n, 2) int64, rows and columns of each row's patches, 0 where not known; likewise

Its stamp holds the settings, the ids and a hash of the vectors that were read, so a part is taken over only where it is
what would be made again. The folder goes when the place is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samer.runtime.shards import finished_shard, load_header, load_shard, unreadable, write_shard
from samer.vectors.rows import KINDS, Merged, Row

FORMAT, FORMAT_VERSION = "samer_part", 1


class Parts:
    """Finished parts in order: iterating gives the rows of one at a time.

    Attributes:
        files: of the parts.
        dtype: of what is written.
        width: D.
        columns: name -> kind of all metadata columns, "text" where a column has values of several kinds.
        count: rows.
        vectors: their merged vectors together.
    """

    def __init__(self, files: Sequence[Path], dtype: str, width: int) -> None:
        self.files, self.dtype, self.width = list(files), dtype, width
        self.columns: dict[str, str] = {}
        self.count = self.vectors = 0
        for file in self.files:
            entry = load_header(file)["entry"]
            self.count += entry["count"]
            self.vectors += entry["vectors"]
            for name, kind in entry["columns"].items():
                self.columns[name] = _common(self.columns.get(name, kind), kind)

    @property
    def stored_width(self) -> int:
        """How many numbers a stored vector has."""
        return self.width // 8 if self.dtype == "binary" else self.width

    def __iter__(self) -> Iterator[list[Merged]]:
        for file in self.files:
            yield self.rows_of(file)

    def read(self, file: Path) -> tuple[dict[str, Tensor], dict]:
        """The tensors of one part, and its header."""
        try:
            return load_shard(file)
        except OSError as error:
            raise unreadable(file, error, "run the same command again") from None

    def rows_of(self, file: Path) -> list[Merged]:
        """The rows of one part."""
        tensors, header = self.read(file)
        entry, ids = header["entry"], header["stamp"]["ids"]
        values = tensors["tokens"].split(tensors["lengths"].tolist())
        scales = tensors["scales"].tolist() if "scales" in tensors else [None] * len(ids)
        told = entry["rows"]
        rows = []
        for name, own, scale, columns in zip(ids, values, scales, told):
            plain = {key: _as_kind(value, self.columns[key]) for key, value in columns.items()}
            rows.append(Merged(name, own.numpy(), scale, plain))
        return rows


def _kind(value: Any) -> str:
    if type(value) is int and not -(2**63) <= value < 2**63:  # databases have no such numbers
        return "text"
    return "" if value is None else KINDS[type(value)]


def _common(first: str, second: str) -> str:
    """The kind that holds values of both; "" is that of a column without any."""
    if first == second or not second:
        return first
    if not first:
        return second
    return "number" if {first, second} == {"whole", "number"} else "text"


def _as_kind(value: Any, kind: str) -> Any:
    """A value as its column holds it."""
    if value is None or kind in ("truth", "whole"):
        return value
    if kind == "number":
        return float(value)
    return value if isinstance(value, str) else json.dumps(value)


def input_hash(rows: Sequence[Row]) -> str:
    """A hash of what rows are merged from."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(repr((row.id, tuple(row.vectors.shape), row.grid, sorted(row.columns.items()))).encode())
        for part in (row.vectors, row.coords, row.source):
            if part is not None:
                digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def part_stamp(settings: dict, rows: Sequence[Row]) -> dict:
    """What a part is made from."""
    own = {"ids": [row.id for row in rows], "input": input_hash(rows), "settings": settings}
    return {"format": FORMAT, "format_version": FORMAT_VERSION, **own}


def part_is_there(path: Path, stamp: dict) -> bool:
    """Whether a part was finished, whole, of this."""
    return finished_shard(path, stamp) is not None


def write_part(path: Path, stamp: dict, rows: Sequence[Row], tensors: dict[str, Tensor]) -> None:
    """Writes a part: `tensors` as this file's head says, `rows` for what is carried along."""
    kinds: dict[str, str] = {}
    for row in rows:
        for name, value in row.columns.items():
            kinds[name] = _common(kinds.get(name, ""), _kind(value))
    facts = {"count": len(rows), "vectors": int(tensors["lengths"].sum())}
    write_shard(path, tensors, stamp, {**facts, "columns": kinds, "rows": [dict(row.columns) for row in rows]})


def part_tensors(values: Sequence[Tensor], scales: Sequence[float] | None) -> dict[str, Tensor]:
    """The tensors of a part of its rows' values, each (K, D) as it is stored."""
    tensors = {"tokens": torch.cat(list(values)), "lengths": torch.tensor([len(each) for each in values])}
    if scales is not None:
        tensors["scales"] = torch.tensor(scales, dtype=torch.float32)
    return tensors
