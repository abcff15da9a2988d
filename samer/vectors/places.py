"""Which kind of store a place is."""

from __future__ import annotations

from samer.config import InputError
from samer.vectors.arrays import NpzStore, SafetensorsStore
from samer.vectors.duck import DuckStore
from samer.vectors.lance import LanceStore
from samer.vectors.ours import IndexStore
from samer.vectors.parquet import ParquetStore
from samer.vectors.points import QdrantStore
from samer.vectors.stores import Store

STORES: tuple[type[Store], ...] = (
    QdrantStore,
    LanceStore,
    DuckStore,
    NpzStore,
    SafetensorsStore,
    ParquetStore,
    IndexStore,
)


def store_of(place: str) -> Store:
    """The store that a place names; whether something is there is seen when it is read.

    Raises:
        InputError: no kind of store is named so.
    """
    for kind in STORES:
        if kind.takes(place):
            return kind(place)
    forms = "; ".join(kind.form for kind in STORES)
    raise InputError(f"{place}: no place of embeddings is named so; known are {forms}")
