"""Searches and scores in two stages: few bytes of every image choose candidates, more bytes of those rank them.

With signs the second stage reads the exact file; with `coarse` it reads all vectors of an index that keeps smaller
budgets, too. What the first stage does not choose is not found: of images whose scores the stages order differently
some are missed. No bound tells which are safe to leave out: a query token's best product with an image is at most its
product with a cluster's vector plus the cluster's radius, and radii of real images leave more than half of them open
(`python scripts/bench.py coarse` measures how many).

Shape letters: Q queries, M tokens, I images, K vectors, D embedding.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from samer.runtime.shards import joined, rows_of
from samer.scoring import StoredImages, maxsim, score_stored
from samer.tokens import QueryTokens

CANDIDATES, LEAST = 10, 100  # of signs: so many times the results asked for, at least so many
COARSE, COARSE_LEAST = 100, 1000  # of a smaller budget
_COLUMNS = 8192  # scores of a query that are gathered before the best of them are kept
_TOGETHER = 2**26  # bytes of candidates that are in memory at once


def exact_scores(
    scores: Tensor, queries: Iterable[tuple[Tensor, Tensor]], tokens: list[Tensor], masks: list[Tensor], device: object
) -> Tensor:
    """Scores (Q, I) by signs, whose best candidates are scored exactly and rank above the others; in place.

    Args:
        scores: (Q, I) on the CPU.
        queries: of each tokens (M, D) and mask (M,).
        tokens, masks: (n, K, D) and (n, K) of all images.
        device: to score on.
    """
    tokens, masks = joined(tokens), joined(masks)
    count = min(CANDIDATES * 10, scores.shape[1])
    chosen = scores.topk(count, dim=1).indices  # (Q, candidates)
    scores -= 4  # below any exact score of unit tokens
    for row, (query, mask) in enumerate(queries):
        exact = maxsim(query[mask][None], tokens[chosen[row]].to(device), None, masks[chosen[row]].to(device))
        scores[row, chosen[row]] = exact[0].cpu()
    return scores


def search_signs(
    queries: QueryTokens,
    shards: Iterable[tuple[list[str], StoredImages]],
    top: int,
    numbers: dict[str, int],
    exact: list[StoredImages],
) -> list[list[tuple[str, float]]]:
    """As `samer.scoring.search`; candidates by signs, then ranked by `exact`, the shards of the second file."""
    return _ranked(queries, *_candidates(queries, shards, max(LEAST, CANDIDATES * top), numbers), exact, top)


def search_coarse(
    queries: QueryTokens,
    shards: Iterable[tuple[list[str], StoredImages]],
    top: int,
    numbers: dict[str, int],
    whole: list[StoredImages],
    candidates: int = 0,
) -> list[list[tuple[str, float]]]:
    """As `samer.scoring.search`; candidates by `shards` of a smaller budget, then ranked by `whole`.

    Args:
        queries: (Q, M, D).
        shards: ids and images at a smaller budget.
        top: how many images per query.
        numbers: of the images, by id.
        whole: all shards with all vectors.
        candidates: how many per query; 0: `COARSE` times `top`, at least `COARSE_LEAST`.
    """
    count = max(top, candidates or max(COARSE_LEAST, COARSE * top))
    return _ranked(queries, *_candidates(queries, shards, count, numbers), whole, top)


def _candidates(
    queries: QueryTokens, shards: Iterable[tuple[list[str], StoredImages]], count: int, numbers: dict[str, int]
) -> tuple[list[Tensor], list[tuple[int, list[str]]]]:
    """Rows of the best `count` images of each query, rising; and per shard its first row and its ids."""
    best, names = _Best(len(queries.tokens), count), []
    for ids, images in shards:
        found, live = score_stored(queries, images), 0
        if images.live is not None:
            if not images.live.any():
                continue
            found, live = found.masked_fill(~images.live, float("-inf")), int(images.live.int().argmax())
        names.append((numbers[ids[live]] - live, ids))  # a deleted id has no number, or that of another row
        best.add(found.cpu(), names[-1][0])
    return best.rows(), names


class _Best:
    """The best images of each query among those that come shard by shard."""

    def __init__(self, queries: int, count: int) -> None:
        """`count` are wanted of each of so many queries."""
        self.count, self.most = count, max(4 * count, _COLUMNS)
        self.scores, self.places = [torch.empty(queries, 0)], [torch.empty(queries, 0, dtype=torch.long)]
        self.held = 0

    def add(self, scores: Tensor, start: int) -> None:
        """Scores (Q, n) of the n images whose rows begin at `start`; -inf of one that may not be found."""
        self.scores.append(scores)
        self.places.append(torch.arange(start, start + scores.shape[1]).expand(scores.shape))
        self.held += scores.shape[1]
        if self.held > self.most:
            self._sift()

    def _sift(self) -> None:
        scores, places = torch.cat(self.scores, dim=1), torch.cat(self.places, dim=1)
        if scores.shape[1] > self.count:
            scores, kept = scores.topk(self.count, dim=1, sorted=False)
            places = places.gather(1, kept)
        self.scores, self.places, self.held = [scores], [places], scores.shape[1]

    def rows(self) -> list[Tensor]:
        """Of each query the rows of its best, rising."""
        self._sift()
        return [own[held.isfinite()].sort().values for own, held in zip(self.places[0], self.scores[0])]


def _ranked(
    queries: QueryTokens,
    found: list[Tensor],
    names: list[tuple[int, list[str]]],
    shards: list[StoredImages],
    top: int,
) -> list[list[tuple[str, float]]]:
    """The best of each query's candidates, by what shards store of them; ties by id."""
    starts, result = [start for start, _ in names], []
    for number, (rows, images) in enumerate(_each_picked(shards, found, queries.tokens.device)):
        if not len(rows):  # every image was deleted
            result.append([])
            continue
        own = queries.mask[number]
        one = QueryTokens(queries.tokens[number][own][None], own[own][None])
        scores = score_stored(one, images)[0].cpu()
        cut = scores >= scores.topk(min(top, len(scores))).values[-1]  # all that tie with the last: the id decides
        pairs = []
        for row, score in zip(rows[cut].tolist(), scores[cut].tolist()):
            start, ids = names[bisect.bisect_right(starts, row) - 1]
            pairs.append((ids[row - start], score))
        result.append(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:top])
    return result


def _each_picked(
    shards: list[StoredImages], found: list[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, StoredImages | None]]:
    """Per query its candidates' rows, and those images on a device; None where no query has any.

    Many queries have candidates in all shards, so what several queries want is read at once, within `_TOGETHER` bytes.
    """
    each = sum(tensor[0].nbytes for tensor in (shards[0].tokens, shards[0].bases) if tensor is not None)
    begin = 0
    while begin < len(found):
        end, size = begin + 1, len(found[begin])
        while end < len(found) and (size + len(found[end])) * each <= _TOGETHER:
            end, size = end + 1, size + len(found[end])
        images, start = picked(shards, torch.cat(found[begin:end]), device) if size else None, 0
        for rows in found[begin:end]:
            yield rows, images and images.part(slice(start, start + len(rows)))
            start += len(rows)
        begin = end


def picked(shards: list[StoredImages], rows: Tensor, device: torch.device) -> StoredImages:
    """Some images of an index's shards on a device, by their rows, counted over all; only those are read."""
    tokens, masks = [shard.tokens for shard in shards], [shard.mask for shard in shards]
    mask = None
    if len({each.shape[1] for each in tokens}) > 1 or any(each is not None for each in masks):
        full = torch.ones(1, 1, dtype=torch.bool)
        masks = [full.expand(own.shape[:2]) if each is None else each for own, each in zip(tokens, masks)]
        mask = rows_of(masks, rows).to(device)
    scale = bases = codebook = None
    if shards[0].scale is not None:
        scale = rows_of([shard.scale[:, None] for shard in shards], rows)[:, 0].to(device)
    if shards[0].codebook is not None:
        bases, codebook = rows_of([shard.bases for shard in shards], rows).to(device), shards[0].codebook.to(device)
    return StoredImages(rows_of(tokens, rows).to(device), scale, mask, None, bases, codebook)
