"""Queries as vectors: of a place, of an index's captions, or images that stand for them.

Shape letters: M vectors of a query, D embedding, T vectors of all queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from samer.compressors.random import scramble
from samer.config import InputError
from samer.tokens import QueryTokens
from samer.vectors.merge import id_seeds
from samer.vectors.ours import IndexStore
from samer.vectors.places import store_of
from samer.vectors.rows import Row, check_vectors
from samer.vectors.stores import Store

RELEVANT = "relevant"
PSEUDO_VECTORS = 32  # of an image that stands for a query
MOST_PSEUDO = 200


@dataclass(frozen=True)
class Queries:
    """Queries and, where it is known, the ids of the images that answer each.

    Attributes:
        tokens: per query (M, D) float32 of unit norm.
        relevant: per query the ids that answer it; None: not known.
        words: what they are, for people.
        held_out: ids of images that stand for them, and may not be found.
    """

    tokens: list[Tensor]
    relevant: list[frozenset[str]] | None
    words: str
    held_out: frozenset[str] = frozenset()

    def every_other(self) -> Queries:
        """The second, the fourth and so on: the others are learned from.

        Raises:
            InputError: there is one only.
        """
        if len(self.tokens) < 2:
            raise InputError("one query is too few to learn from some and ask others; give more with --queries")
        relevant = None if self.relevant is None else self.relevant[1::2]
        return replace(self, tokens=self.tokens[1::2], relevant=relevant, words=f"half of {self.words}")

    def padded(self) -> QueryTokens:
        """All of them as one batch."""
        lengths = torch.tensor([len(each) for each in self.tokens])
        padded = torch.nn.utils.rnn.pad_sequence(self.tokens, batch_first=True)
        return QueryTokens(padded, torch.arange(padded.shape[1]) < lengths[:, None])


def read_queries(place: str, normalise: bool = False) -> Queries:
    """Queries at a place, a row each; a column `relevant` names the id, or ids by comma, that answer it.

    Raises:
        InputError: nothing is there, or a row that is no query.
    """
    tokens: list[Tensor] = []
    relevant: list[frozenset[str]] = []
    for number, row in enumerate(store_of(place).rows()):
        where = f"{place}: row {number} ({row.id[:80]})"
        width = tokens[0].shape[1] if tokens else None
        tokens.append(check_vectors(where, row.vectors, width, normalise))
        named = row.columns.get(RELEVANT)
        relevant.append(frozenset([str(named), *str(named).split(",")] if named not in (None, "") else ()))
    if not tokens:
        raise InputError(f"{place}: holds no queries; leave --queries out to have images stand for them")
    return Queries(tokens, relevant if any(relevant) else None, f"{len(tokens):,} queries of {place}")


def query_bank(place: str, normalise: bool = False) -> Tensor:
    """The vectors of all queries of a place, (T, D), which a compressor may learn from."""
    return torch.cat(read_queries(place, normalise).tokens)


def own_queries(store: Store) -> Queries | None:
    """The captions of an index's split; None where there are none."""
    if not isinstance(store, IndexStore) or not store.index.manifest.splits[store.split].queries:
        return None
    names = {number: name for name, number in store.index.numbers(store.split).items()}
    tokens: list[Tensor] = []
    relevant: list[frozenset[str]] = []
    for block, images, _ in store.index.queries(store.split):
        for own, mask, image in zip(block.tokens, block.mask, images.tolist()):
            if image in names:
                tokens.append(torch.nn.functional.normalize(own[mask].float(), dim=-1))
                relevant.append(frozenset([names[image]]))
    return Queries(tokens, relevant, f"{len(tokens):,} captions of {store.place}")


def held_out(ids: Sequence[str]) -> frozenset[str]:
    """Which of a sample's images stand for queries: a tenth, at most `MOST_PSEUDO`, evenly spaced.

    Raises:
        InputError: too few images to leave some out.
    """
    if len(ids) < 20:
        raise InputError(f"{len(ids)} images are too few to leave some out as queries; give queries with --queries")
    count = min(MOST_PSEUDO, len(ids) // 10)
    return frozenset(ids[number * len(ids) // count] for number in range(count))


def pseudo_queries(rows: Iterable[Row]) -> Queries:
    """Images as queries: some vectors of each, always the same ones."""
    tokens, names = [], []
    for row in rows:
        order = scramble(id_seeds([row.id]), torch.arange(len(row.vectors))).argsort()
        tokens.append(row.vectors[order[:PSEUDO_VECTORS].sort().values])
        names.append(row.id)
    words = f"{len(tokens):,} pseudo-queries: images left out of the sample, {PSEUDO_VECTORS} vectors of each"
    return Queries(tokens, None, words, frozenset(names))
