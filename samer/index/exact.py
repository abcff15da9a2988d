"""The vectors of an index as numbers: int8 times its scale, codes looked up, of signs the exact file, block by block.

Shape letters: n images of a block, K regions, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from samer.index.codes import floats_of
from samer.index.manifest import Shard
from samer.index.read import Index
from samer.runtime.progress import batched


@dataclass(frozen=True)
class ExactBlock:
    """Some images: ids; tokens (n, K, D) float32; mask (n, K) bool; grids (n, 2) int32, 0 where none is known."""

    ids: list[str]
    tokens: Tensor
    mask: Tensor
    grids: Tensor


def exact_blocks(index: Index, split: str, shard: Shard, size: int) -> Iterator[ExactBlock]:
    """The images of a shard in order, without deleted ones, at most `size` at a time; its checksum is held first.

    Raises:
        InputError: a damaged shard.
    """
    tensors, stamp = index._read(split, shard)
    own = index._read(split, shard, exact=True)[0] if shard.exact else tensors
    gone = set(index.manifest.splits[split].deleted.get(shard.file, ()))
    for rows in batched([row for row in range(shard.count) if row not in gone], size):
        block = floats_of(own, rows, index.codes)
        yield ExactBlock([stamp["ids"][row] for row in rows], block, tensors["mask"][rows], tensors["grids"][rows])
