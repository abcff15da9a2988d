"""What every store is given and what it must do.

A store is written in parts, one a shard of the index: writing a part again leaves the store as it was. Shape letters:
k vectors of an image, D embedding, M query tokens.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samer.config import InputError
from samer.index.names import point_id

BATCH_BYTES = 8_000_000  # of vectors in a request; Qdrant refuses 32 MB by default, Milvus 64 MB
JSON_BYTES = 21  # of a number in JSON, at most about


@dataclass(frozen=True)
class Facts:
    """What is the same for all images of an export, and what its vectors are useless without.

    Attributes:
        model, revision: of the retriever, as the index names it.
        projector: hash of the projection that queries need.
        prompts: what the retriever's processor puts around texts and pictures, as the index says.
        dim: D.
        dtype: of the exported vectors, float16 or float32.
        root: folder that ids are paths under; empty for a data set.
        coarse: how many coarse vectors every image has besides; 0: none.
    """

    model: str
    revision: str
    projector: str
    prompts: dict[str, str]
    dim: int
    dtype: str
    root: str
    coarse: int = 0

    def words(self) -> dict[str, str]:
        """As stores keep it that know names with texts only."""
        own = {"model": self.model, "revision": self.revision, "projector": self.projector}
        return {**own, "prompts": json.dumps(self.prompts, ensure_ascii=False), "dtype": self.dtype}


@dataclass(frozen=True)
class Point:
    """An image: its id, file (empty: not known), rows and columns (0: not known), vectors (k, D) in the facts' dtype.

    `coarse` holds the few vectors of a first stage, where they were asked for; `metadata` what `samer.index.columns`
    says.
    """

    id: str
    path: str
    grid: tuple[int, int]
    vectors: np.ndarray
    coarse: np.ndarray | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uuid(self) -> str:
        """The same for the same id, always."""
        return point_id(self.id)

    def payload(self, facts: Facts) -> dict:
        """What a store keeps beside the vectors; `metadata` as an object."""
        words = facts.words()
        kept = {"id": self.id, "path": self.path, "rows": self.grid[0], "columns": self.grid[1]}
        made = {"projector": words["projector"], "prompts": words["prompts"]}
        return {**kept, **made, "metadata": dict(self.metadata)}

    def texts(self, facts: Facts) -> dict:
        """As `payload`, for stores without objects: `metadata` is JSON, as are the prompts."""
        return {**self.payload(facts), "metadata": json.dumps(dict(self.metadata), ensure_ascii=False)}


class Store(ABC):
    """A place that an index is exported to."""

    name = ""
    has_coarse = False  # whether it has a first stage that coarse vectors serve
    in_json = False  # whether vectors go to it as JSON, which makes numbers many times longer

    def __init__(self, place: str, collection: str, facts: Facts) -> None:
        if facts.coarse and not self.has_coarse:
            raise InputError(f"{self.name} has no first stage for coarse vectors; leave --coarse out")
        self.place, self.collection, self.facts = place, collection, facts

    @property
    def number_bytes(self) -> int:
        """What a number takes on the way to it."""
        return JSON_BYTES if self.in_json else np.dtype(self.facts.dtype).itemsize

    @abstractmethod
    def open(self) -> None:
        """Connects, and makes the collection or holds what is there against the facts.

        Raises:
            InputError: it is down, or a collection of that name has another size or dtype.
        """

    @abstractmethod
    def write(self, part: str, batches: Iterable[list[Point]]) -> None:
        """Writes a part; what is there already of the same ids is replaced."""

    @abstractmethod
    def has_others(self, parts: set[str], live: set[str]) -> bool:
        """Whether something is there that is of no part and no live image of the index."""

    @abstractmethod
    def settle(self, parts: set[str], live: set[str]) -> int:
        """Removes what belongs to no part and no live image of the index; returns how many images it holds then."""

    @abstractmethod
    def search(self, query: np.ndarray, top: int) -> list[tuple[str, float]]:
        """The best images of a query (M, D) float32, best first, with our score: the mean of the best similarities."""

    @abstractmethod
    def query_code(self) -> str:
        """Lines of Python that search the store with the query tokens `query`, (M, D) float32 numpy."""

    def schema(self) -> str:
        """The file that the store wants before the export; most make their collection themselves.

        Raises:
            InputError: this one does.
        """
        raise InputError(f"{self.name} needs no schema beforehand; leave --schema out")

    def close(self) -> None:  # noqa: B027 - a folder has none
        """Ends the connection."""


class Database(Store):
    """A store that takes points one batch at a time and can list what it holds."""

    def write(self, part: str, batches: Iterable[list[Point]]) -> None:
        for batch in batches:
            self.put(batch)

    def has_others(self, parts: set[str], live: set[str]) -> bool:
        return any(name not in live for name in self.ids())

    def settle(self, parts: set[str], live: set[str]) -> int:
        held, gone = 0, []
        for name in self.ids():
            held += 1
            if name not in live:
                gone.append(name)
        for start in range(0, len(gone), 1000):
            self.delete(gone[start : start + 1000])
        return held - len(gone)

    @abstractmethod
    def put(self, batch: list[Point]) -> None:
        """Writes points; those of the same ids are replaced."""

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """Ids of all images that are there."""

    @abstractmethod
    def delete(self, ids: list[str]) -> None:
        """Removes images by id."""


@contextmanager
def needing(package: str):
    """Around the import of an optional library.

    Raises:
        InputError: it is not installed; says what to install.
    """
    try:
        yield
    except ImportError:
        raise InputError(f"{package} is not installed; pip install {package}, or the extra samer[export]") from None


def down(place: str, error: Exception) -> InputError:
    """One line for a store that does not answer, or refuses."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"{place}: the store does not take that ({reason}); see that it runs, then run the same again")


@contextmanager
def telling(place: str):
    """Tells in one line what a store's library raises; they have no base class for what goes wrong on the way.

    Raises:
        InputError: names the place and the reason. What can only be a defect of ours stays as it is.
    """
    try:
        yield
    except (InputError, TypeError, AttributeError, NameError):
        raise
    except Exception as error:
        raise down(place, error) from None
