"""What stored embeddings are: rows in, rows out, and what a row must be.

Shape letters: N vectors of an image, K merged ones, D embedding, P patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samer.config import InputError
from samer.merging import LENGTH_ERROR

ID, EMBEDDING, SCALE, GRID, COORDS = "id", "embedding", "scale", "grid", "coords"
OWN = (ID, EMBEDDING, SCALE, GRID, COORDS)  # columns with a meaning; the others are metadata, and are carried along
KINDS = {str: "text", bool: "truth", int: "whole", float: "number"}


@dataclass(frozen=True)
class Row:
    """One image, or page, as it is stored.

    Attributes:
        id: unique in its store.
        vectors: (N, D) float32.
        grid: rows and columns of its patches; None: not known.
        coords: (N, 2) in the unit square; None: not known.
        source: (P,) long, the vector of each patch in row-major order, -1 for none; None: not known.
        columns: what else is known of it, by name: texts, numbers, truth values, None.
    """

    id: str
    vectors: Tensor
    grid: tuple[int, int] | None = None
    coords: Tensor | None = None
    source: Tensor | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Merged:
    """One image as it is written.

    Attributes:
        id: as it was read.
        values: (K, D) float32, float16 or int8; or (K, D / 8) uint8, signs as `samer.scoring.pack_signs` packs them.
        scale: of int8, by which its values are multiplied; else None.
        columns: as they were read.
    """

    id: str
    values: np.ndarray
    scale: float | None
    columns: Mapping[str, Any]


def check_vectors(where: str, vectors: Tensor, width: int | None, normalise: bool) -> Tensor:
    """Vectors of one row as they are merged: finite, of unit length, of one width.

    Args:
        where: names the row in messages.
        vectors: (N, D) float32.
        width: D of the rows before; None: this is the first.
        normalise: divide by their lengths what is not of unit length.

    Raises:
        InputError: no vector, NaN or infinity, another width, lengths that are not 1.
    """
    if vectors.ndim != 2 or 0 in vectors.shape:
        shape = " x ".join(map(str, vectors.shape))
        raise InputError(f"{where}: its embedding is {shape or 'no list'}; expected a list of vectors, at least one")
    if width is not None and vectors.shape[1] != width:
        raise InputError(f"{where}: vectors of {vectors.shape[1]} numbers, those before have {width}; take the row out")
    bad = (~vectors.isfinite().all(1)).nonzero()
    if len(bad):
        raise InputError(f"{where}: vector {int(bad[0])} holds NaN or infinity; embed it again, or take the row out")
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    if (lengths == 0).any():
        number = int((lengths == 0).nonzero()[0])
        raise InputError(f"{where}: vector {number} is all 0; padding is no vector: take it out")
    if normalise:
        return vectors / lengths[:, None]
    off = ((lengths - 1).abs() > LENGTH_ERROR).nonzero()
    if len(off):
        raise InputError(
            f"{where}: vector {int(off[0])} has length {float(lengths[off[0]]):.3g}, not 1; --normalise divides every "
            "vector by its length"
        )
    return vectors


def check_ids(place: str, ids: Sequence[str]) -> None:
    """Refuses a store without rows, and an id that comes twice."""
    if not ids:
        raise InputError(f"{place}: holds no rows; name a place with embeddings")
    seen: set[str] = set()
    for number, name in enumerate(ids):
        if name in seen:
            first = ids.index(name)
            raise InputError(f"{place}: row {number} has the id {name[:80]!r}, as has row {first}; make ids unique")
        seen.add(name)


def plain_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row's columns can be carried along: texts, numbers and truth values."""
    return {name: value for name, value in values.items() if value is None or type(value) in KINDS}


def pair(where: str, name: str, value: Any) -> tuple[int, int] | None:
    """A grid as it is stored, [rows, columns]; None where there is none.

    Raises:
        InputError: something else.
    """
    if value is None:
        return None
    found = [int(each) for each in value if isinstance(each, (int, np.integer))] if not isinstance(value, str) else []
    if len(found) != 2 or len(value) != 2 or min(found) < 1:
        raise InputError(f"{where}: {name} is {str(value)[:60]}; expected two whole numbers, rows and columns")
    return found[0], found[1]


def places_of(where: str, value: Any, count: int) -> Tensor | None:
    """Coordinates as they are stored, N pairs in the unit square; None where there are none.

    Raises:
        InputError: something else, or not one pair a vector.
    """
    if value is None:
        return None
    try:
        found = torch.as_tensor(np.asarray([list(each) for each in value], dtype=np.float32))
    except (TypeError, ValueError):
        found = torch.empty(0)
    right = found.shape == (count, 2) and bool(((found - 0.5).abs() <= 0.501).all())
    if not right:
        raise InputError(f"{where}: coords must be {count} pairs (x, y) between 0 and 1, one a vector; correct them")
    return found
