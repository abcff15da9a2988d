"""A store of embeddings: what every kind must do, and what a run is to write there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from samer.config import InputError, MergeConfig
from samer.runtime.files import exists
from samer.vectors.parts import Parts
from samer.vectors.rows import Row

DTYPES = ("float32", "float16", "int8", "binary")


@dataclass(frozen=True)
class Plan:
    """What a run is to write: merged how, as which dtype, of which store's rows."""

    source: Store
    merge: MergeConfig
    dtype: str


class Store:
    """Embeddings at a place: a subclass a kind, listed in `samer.vectors.places`.

    Attributes:
        form: how such a place is written, for people.
        dtypes: what can be written there.
        stores_itself: whether it is given float32, whatever it is to hold, and makes its dtype of that.
        left_out: columns that are not carried along, known when its ids have been read.
    """

    form = ""
    dtypes: tuple[str, ...] = DTYPES
    stores_itself = False
    left_out: tuple[str, ...] = ()

    def __init__(self, place: str) -> None:
        self.place = place

    @classmethod
    def takes(cls, place: str) -> bool:
        """Whether a place is of this kind."""
        raise NotImplementedError

    def ids(self) -> Iterator[str]:
        """The ids of all rows in order, without their vectors.

        Raises:
            InputError: nothing is there, or it is something else.
        """
        raise NotImplementedError

    def rows(self) -> Iterator[Row]:
        """The rows in order, a few at a time in memory; raises as `ids`."""
        raise NotImplementedError

    def check_target(self, plan: Plan) -> None:
        """Refuses, before any work, what could not be written there.

        Raises:
            InputError: a dtype that it does not have, a place that can't be written to.
        """
        if plan.dtype not in self.dtypes:
            raise InputError(f"{self.place}: can't hold {plan.dtype}; use --dtype {' or '.join(self.dtypes)}")

    def dtype_for(self, source: Store) -> str:
        """What is written there of a source where nobody says it."""
        return "float32"

    def write(self, parts: Parts) -> None:
        """Writes all rows, whole or not at all where the store can do that, else so that writing again goes on."""
        raise NotImplementedError


class FileStore(Store):
    """Embeddings in one file, told by the end of its name."""

    suffix = ""

    @classmethod
    def takes(cls, place: str) -> bool:
        return place.lower().endswith(cls.suffix)

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.place)

    def check_there(self) -> None:
        """Refuses a file that is not there."""
        if not exists(self.path):
            raise InputError(f"{self.place}: no such file; name the embeddings with --in")


def split_table(place: str, default: str) -> tuple[str, str]:
    """A place and the table or collection in it: `shop.duckdb#pages` names both."""
    name, _, table = place.partition("#")
    return name, table or default
