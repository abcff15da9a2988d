"""Retrieval metrics and their bootstrap intervals.

Q queries, I candidates, P positives of a query, J positives looked at, b queries of a block; G groups, R resamples.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from samer.config import InputError
from samer.settings import whole_number
from samer.tokens import check_tensor

_RECALL_CUTOFFS = (1, 5, 10)
_MRR_CUTOFF = 10
_NDCG_CUTOFFS = (5, 10)
# The j-th best positive ranks j or worse, so no cutoff sees a positive beyond this many.
_DEEPEST_CUTOFF = 10
_MEDIAN_RANK = "median_rank"
# Scores, or resampled weights, held at once: bounds the memory and keeps a block near the cache.
_BLOCK_ELEMENTS = 2**21


def retrieval_metrics(scores: Tensor | np.ndarray, positives: Tensor | np.ndarray) -> dict[str, float]:
    """Summarise how well each query ranks its positives: recall, median rank, MRR and nDCG.

    Ties never favour a positive: the j-th best positive has rank j + the number of negatives that score at least as
    high. A query's rank is that of its best positive. nDCG has binary gains and an ideal of min(P, k) hits.

    Args:
        scores: (Q, I), higher is better; below float32 they are compared in float32, float64 as they are. Anything that
            numpy makes an array of numbers of is taken.
        positives: (Q, I) bool, True where the candidate answers the query. For the other direction transpose both.

    Returns:
        `r@1 r@5 r@10`, `mrr@10`, `ndcg@5 ndcg@10` in percent, and `median_rank` (1 is best).

    Raises:
        InputError: no numbers, shapes differ or are empty, positives are not bool, a score is not finite, a query
            has no positive.

    Source: METHOD section 5 (the figures reported, ties, scores that are not finite).
    """
    return {name: summary(name, values) for name, values in query_metrics(scores, positives).items()}


def query_metrics(scores: Tensor | np.ndarray, positives: Tensor | np.ndarray) -> dict[str, np.ndarray]:
    """Return the per-query values behind `retrieval_metrics`, for a bootstrap or a paired comparison.

    Args:
        scores: (Q, I), as in `retrieval_metrics`.
        positives: (Q, I) bool.

    Returns:
        The keys of `retrieval_metrics`, each (Q,) float64; `median_rank` holds the rank of the query's best positive.
        The summary is their mean, for `median_rank` their median.

    Raises:
        InputError: as in `retrieval_metrics`.

    Source: METHOD section 5.
    """
    scores, positives = _matrix("scores", scores), _matrix("positives", positives)
    if scores.ndim != 2 or scores.shape != positives.shape or 0 in scores.shape:
        raise InputError(
            f"scores {tuple(scores.shape)} and positives {tuple(positives.shape)} "
            "must share one shape (queries, candidates) without a 0"
        )
    if positives.dtype not in (torch.bool, np.bool_):
        raise InputError(f"positives are {positives.dtype}; expected bool")

    query_count, candidate_count = scores.shape
    ranks = np.full((query_count, _DEEPEST_CUTOFF), np.inf)  # (Q, J); a positive that is not there never ranks
    counts = np.empty(query_count, dtype=np.int64)  # (Q,) P
    rows_per_block = max(1, _BLOCK_ELEMENTS // candidate_count)
    for start in range(0, query_count, rows_per_block):
        rows = slice(start, start + rows_per_block)
        block_ranks, counts[rows] = _positive_ranks(_rows(scores, rows), _rows(positives, rows), start)
        ranks[rows, : block_ranks.shape[1]] = block_ranks

    best = ranks[:, 0]  # (Q,)
    values = {f"r@{k}": 100.0 * (best <= k) for k in _RECALL_CUTOFFS}
    values[_MEDIAN_RANK] = best
    values[f"mrr@{_MRR_CUTOFF}"] = np.where(best <= _MRR_CUTOFF, 100.0 / best, 0.0)
    gains = 1.0 / np.log2(ranks + 1.0)  # (Q, J); 0 at rank inf
    ideal = np.cumsum(1.0 / np.log2(np.arange(_DEEPEST_CUTOFF) + 2.0))  # (J,)
    for k in _NDCG_CUTOFFS:
        dcg = np.where(ranks <= k, gains, 0.0).sum(axis=1)  # (Q,)
        values[f"ndcg@{k}"] = 100.0 * dcg / ideal[np.minimum(counts, k) - 1]
    return values


def graded_metrics(scores: Tensor | np.ndarray, grades: Tensor | np.ndarray) -> dict[str, np.ndarray]:
    """Return per-query values where candidates answer a query better or worse.

    Every metric but nDCG asks only whether a candidate answers at all, as `query_metrics`. nDCG's gain is the grade
    itself (linear, as trec_eval; some tools take 2^grade - 1), its ideal the best order of all that answer. Of equal
    scores the lower grade comes first.

    Args:
        scores: (Q, I), as in `retrieval_metrics`.
        grades: (Q, I) whole numbers of at least 0, 0 where a candidate does not answer.

    Returns:
        As `query_metrics`.

    Raises:
        InputError: as `query_metrics`; grades that are no whole numbers, or below 0.
    """
    scores, grades = _matrix("scores", scores), torch.as_tensor(_matrix("grades", grades))
    if grades.is_floating_point() or grades.is_complex() or grades.dtype == torch.bool:
        raise InputError(f"grades are {grades.dtype}; expected whole numbers")
    if grades.numel() and int(grades.min()) < 0:
        raise InputError(f"grades hold {int(grades.min())}; expected at least 0")
    values = query_metrics(scores, grades > 0)
    depth = min(_DEEPEST_CUTOFF, scores.shape[1])
    gains, ideal = np.empty((len(scores), depth)), np.empty((len(scores), depth))  # (Q, J)
    rows_per_block = max(1, _BLOCK_ELEMENTS // scores.shape[1])
    for start in range(0, len(scores), rows_per_block):
        rows = slice(start, start + rows_per_block)
        block, truth = _rows(scores, rows), _rows(grades, rows).double()  # (b, I)
        block = block.to(torch.promote_types(block.dtype, torch.float32)).to(truth.device)
        ascending, order = truth.sort(dim=1, stable=True)
        ranked = block.gather(1, order).argsort(dim=1, descending=True, stable=True)[:, :depth]
        gains[rows] = ascending.gather(1, ranked).cpu().numpy()
        ideal[rows] = ascending.flip(1)[:, :depth].cpu().numpy()
    discounts = 1.0 / np.log2(np.arange(depth) + 2.0)  # (J,)
    for k in _NDCG_CUTOFFS:
        values[f"ndcg@{k}"] = 100.0 * (gains[:, :k] @ discounts[:k]) / (ideal[:, :k] @ discounts[:k])
    return values


def bootstrap_intervals(
    per_query: dict[str, np.ndarray],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> dict[str, tuple[float, float]]:
    """Bound each metric's sampling error by the percentile bootstrap over queries.

    Every metric sees the same resamples. The statistic is the mean, for `median_rank` the median. Differences of two
    systems' per-query means give a paired interval (a difference of medians is not the median of differences).

    Args:
        per_query: metric name -> (Q,) values, as `query_metrics` returns them.
        resamples: how many times Q queries (or G groups) are drawn with replacement.
        level: the coverage asked for, in (0, 1).
        seed: seeds numpy's default generator; the same seed gives the same intervals.
        groups: (Q,) integers; queries that share one are drawn together. Captions of one image are not independent,
            so text -> image passes the image index. None: every query by itself.

    Returns:
        Metric name -> (low, high), in the metric's unit.

    Raises:
        InputError: no metric or no query, lengths differ, a value is not finite, or an argument is out of its range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), percentile intervals, section 13.3.
    """
    resamples, seed = whole_number("resamples", resamples), whole_number("seed", seed)
    if resamples < 1 or seed < 0 or not isinstance(level, (int, float)) or not 0 < level < 1:
        raise InputError(
            f"resamples is {resamples}, seed {seed} and level {level!r:.80}; expected at least 1, at least 0, and a "
            "share in (0, 1)"
        )
    if not isinstance(per_query, Mapping):
        raise InputError(f"per_query must be a dict of metrics; it is {per_query!r:.80}")
    if not per_query:
        raise InputError("per_query holds no metric")
    names = list(per_query)
    shapes = {name: np.shape(per_query[name]) for name in names}
    query_count = shapes[names[0]][0] if len(shapes[names[0]]) == 1 else 0
    if query_count == 0 or any(shape != (query_count,) for shape in shapes.values()):
        raise InputError(f"per_query values have shapes {shapes}; expected one length above 0")
    try:
        values = np.stack([np.asarray(per_query[name], dtype=np.float64) for name in names], axis=1)  # (Q, metrics)
    except (TypeError, ValueError):
        raise InputError(f"per_query holds what is no number, in one of {', '.join(names)}") from None
    if not np.isfinite(values).all():
        bad_row, bad_metric = np.argwhere(~np.isfinite(values))[0]
        raise InputError(f"per_query[{names[bad_metric]!r}]: query {bad_row} is {values[bad_row, bad_metric]}")

    member = np.arange(query_count)  # (Q,) the group of each query
    if groups is not None:
        groups = np.asarray(groups)
        if groups.shape != (query_count,) or not np.issubdtype(groups.dtype, np.integer):
            raise InputError(
                f"groups are {groups.dtype} of shape {groups.shape}; expected integers of ({query_count},)"
            )
        member = np.unique(groups, return_inverse=True)[1]
    group_count = int(member.max()) + 1

    generator = np.random.default_rng(seed)
    statistics = np.empty((resamples, len(names)))  # (R, metrics)
    rows_per_block = max(1, _BLOCK_ELEMENTS // query_count)
    for start in range(0, resamples, rows_per_block):
        rows = min(rows_per_block, resamples - start)
        draws = generator.integers(group_count, size=(rows, group_count))  # (rows, G)
        draws += np.arange(rows)[:, None] * group_count  # one range of bins per resample
        times = np.bincount(draws.ravel(), minlength=rows * group_count).reshape(rows, group_count)
        weights = times[:, member]  # (rows, Q) how often each query was drawn
        means = (weights @ values) / weights.sum(axis=1, keepdims=True)  # (rows, metrics)
        for column, name in enumerate(names):
            statistics[start : start + rows, column] = (
                _weighted_medians(values[:, column], weights) if name == _MEDIAN_RANK else means[:, column]
            )
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: (float(low[column]), float(high[column])) for column, name in enumerate(names)}


def bootstrap_tests(
    differences: np.ndarray, groups: np.ndarray, *, resamples: int = 10_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Bound mean paired differences, and test each against 0, by the bootstrap over groups of queries.

    Args:
        differences: (Q, C), C comparisons of two systems on the same queries.
        groups: (Q,) integers; queries that share one are drawn together, as in `bootstrap_intervals`.
        resamples, seed: as there; intervals are those that it gives with as many resamples.

    Returns:
        95 % intervals (C, 2), and two-sided p values (C,): twice the share of resampled means on the far side of 0, the
        sample itself counted as one of them. So p < 0.05 where the 95 % interval leaves 0 out, up to its steps.

    Raises:
        InputError: no query, or shapes that differ.

    Source: Efron and Tibshirani (1993), sections 13.3 and 15.4 (achieved significance levels from percentiles).
    """
    if differences.ndim != 2 or len(differences) == 0 or np.shape(groups) != differences.shape[:1]:
        raise InputError(
            f"differences {differences.shape} and groups {np.shape(groups)}: expected (Q, C) and (Q,), Q above 0"
        )
    member = np.unique(groups, return_inverse=True)[1]
    count = int(member.max()) + 1
    sums = np.zeros((count, differences.shape[1]))
    np.add.at(sums, member, differences.astype(np.float64))
    sizes = np.bincount(member, minlength=count)  # (G,)
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, differences.shape[1]))
    rows_per_block = max(1, _BLOCK_ELEMENTS // count)
    for start in range(0, resamples, rows_per_block):
        rows = min(rows_per_block, resamples - start)
        draws = generator.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        times = np.bincount(draws.ravel(), minlength=rows * count).reshape(rows, count)
        means[start : start + rows] = (times @ sums) / (times @ sizes)[:, None]
    means[np.abs(means) < 1e-9] = 0.0  # what sums of opposite differences leave
    share = np.minimum((means <= 0).sum(0), (means >= 0).sum(0))
    p = np.minimum(1.0, 2.0 * (1 + share) / (resamples + 1))
    return np.quantile(means, [0.025, 0.975], axis=0).T, p


def _matrix(name: str, values: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """A tensor as it is, anything else as an array of a kind that torch has."""
    if isinstance(values, Tensor):
        check_tensor(name, values)
        return values
    try:
        array = np.asarray(values)
    except ValueError:  # rows of unequal length
        raise InputError(f"{name} are no table of numbers: {values!r:.80}") from None
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name} are no table of numbers, but of {array.dtype}")
    wide = array.dtype.itemsize > 8  # of C's long double
    return array.astype(np.float64 if wide else array.dtype.newbyteorder("="), copy=False)


def summary(name: str, values: np.ndarray) -> float:
    """Reduce per-query values to the metric."""
    return float(np.median(values) if name == _MEDIAN_RANK else np.mean(values))


def _rows(matrix: Tensor | np.ndarray, rows: slice) -> Tensor:
    """Return a block of rows as a contiguous tensor; an array is copied, for its strides may not suit torch."""
    block = matrix[rows]
    return (
        torch.from_numpy(np.array(block, order="C")) if isinstance(block, np.ndarray) else block.detach().contiguous()
    )


def _positive_ranks(scores: Tensor, positives: Tensor, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks of each row's best positives, (b, J) ascending with inf where none is left, and P, (b,)."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # (b, I); bf16 has too few steps to compare in
    positives = positives.to(scores.device)
    finite = scores.amax(dim=1).isfinite() & scores.amin(dim=1).isfinite()  # NaN wins both
    if not finite.all():
        # NaN compares false with everything, so it would count as a hit.
        raise InputError(f"scores: query {start + int((~finite).nonzero()[0])} has a score that is NaN or infinite")
    counts = positives.sum(dim=1)  # (b,)
    if not counts.all():
        raise InputError(f"positives: query {start + int((counts == 0).nonzero()[0])} has no positive")

    depth = min(_DEEPEST_CUTOFF, int(counts.max()))
    best = scores.masked_fill(~positives, -torch.inf).topk(depth, dim=1).values  # (b, J)
    negatives = scores.masked_fill(positives, -torch.inf)  # (b, I)
    ranks = torch.stack([j + 1 + (negatives >= best[:, j, None]).sum(dim=1) for j in range(depth)], dim=1)  # (b, J)
    present = torch.arange(depth, device=scores.device) < counts[:, None]
    return ranks.double().masked_fill(~present, torch.inf).cpu().numpy(), counts.cpu().numpy()


def _weighted_medians(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return per row of weights (rows, Q) the median of the values (Q,), each repeated as often as its weight says."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[:, order], axis=1)  # (rows, Q) repeated values up to and including this one
    total = reached[:, -1:]
    lower, upper = (total - 1) // 2, total // 2  # the two middle positions, the same one when total is odd
    middle = [values[order][(reached <= position).sum(axis=1)] for position in (lower, upper)]
    return (middle[0] + middle[1]) / 2
