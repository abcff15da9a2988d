"""From pages to documents: a document's score is the mean of its best pages'.

Shape letters: I images (pages), M query tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samer.config import InputError
from samer.index.filters import only
from samer.index.read import Index
from samer.scoring import maxsim, score_stored
from samer.tokens import QueryTokens

CANDIDATES, LEAST = 10, 100  # 1-bit scores choose so many times the documents asked for, at least so many
PAGES = 10  # and of each the best so many pages at least, for exact re-ranking


@dataclass(frozen=True)
class Document:
    """A document that was found: its score, and the pages that it is the mean of, (id, score) each, best first."""

    name: str
    score: float
    pages: list[tuple[str, float]]


def find_documents(
    index: Index,
    split: str,
    query: QueryTokens,
    names: Mapping[str, str],
    top: int,
    *,
    pages: int = 1,
    keep: Tensor | None = None,
    device: torch.device | str = "cpu",
    budget: int = 0,
) -> list[Document]:
    """The best documents for a query; ties go by name.

    Memory: a score per page.

    Args:
        index, split: of the pages.
        query: one, (1, M, D).
        names: of the document, by id of a page; a page without one is a document by itself, named by its id.
        top: how many documents.
        pages: how many of a document's best pages count; of one that has fewer, all do.
        keep: (I,) bool by row, False for pages that may not be found; None: all may.
        device: to score on.
        budget: as of `Index.stored`.

    Raises:
        InputError: `top` or `pages` below 1; no such budget.
    """
    if top < 1 or pages < 1:
        raise InputError(f"{top} documents by {pages} pages: both must be at least 1")
    shards = index.stored(split, device, budget)
    ids: list[str] = []
    scores: list[Tensor] = []
    for own, images in shards if keep is None else only(shards, keep):
        found = score_stored(query, images)[0].cpu()
        live = torch.ones(len(own), dtype=torch.bool) if images.live is None else images.live.cpu()
        ids += [name for name, here in zip(own, live.tolist()) if here]
        scores.append(found[live])
    if not ids:
        return []
    if index.manifest.dtype != "binary":
        return best_documents(ids, torch.cat(scores), names, top, pages)
    rough = best_documents(ids, torch.cat(scores), names, max(LEAST, CANDIDATES * top), max(PAGES, 2 * pages))
    chosen = [name for document in rough for name, _ in document.pages]
    return best_documents(chosen, _exact(index, split, query, chosen, device), names, top, pages)


def best_documents(
    ids: Sequence[str], scores: Tensor, names: Mapping[str, str], top: int, pages: int
) -> list[Document]:
    """The documents of scored pages, best first.

    Args:
        ids: of the pages.
        scores: (I,).
        names, top, pages: as in `find_documents`.
    """
    order = sorted(range(len(ids)), key=lambda row: ids[row])  # equal pages go by id
    order = torch.tensor(order)[scores[order].argsort(descending=True, stable=True)].tolist()
    found: dict[str, list[tuple[str, float]]] = {}
    values = scores.tolist()
    for row in order:
        own = found.setdefault(names.get(ids[row], ids[row]), [])
        if len(own) < pages:
            own.append((ids[row], values[row]))
    documents = [Document(name, sum(score for _, score in own) / len(own), own) for name, own in found.items()]
    return sorted(documents, key=lambda document: (-document.score, document.name))[:top]


def _exact(index: Index, split: str, query: QueryTokens, ids: Sequence[str], device: torch.device | str) -> Tensor:
    """Scores (I,) of pages by their exact vectors."""
    numbers = index.numbers(split)
    stored = [index.vectors(split, numbers[name]) for name in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad([each.tokens for each in stored], batch_first=True).to(device)
    mask = pad([each.mask for each in stored], batch_first=True).to(device)
    return maxsim(query.tokens[0][query.mask[0]][None], tokens, None, mask)[0].cpu()
