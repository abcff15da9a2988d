"""Retrieval metrics against hand-computed values and naive loops; the bootstrap against its definition.

Q queries, I candidates, G groups, R resamples.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samer import metrics
from samer.config import InputError
from samer.metrics import bootstrap_intervals, query_metrics, retrieval_metrics

KEYS = ["r@1", "r@5", "r@10", "median_rank", "mrr@10", "ndcg@5", "ndcg@10"]

# 3 queries x 4 candidates, worked by hand in test_golden_values
SCORES = np.array([[0.9, 0.1, 0.8, 0.3], [0.5, 0.7, 0.7, 0.2], [0.1, 0.2, 0.3, 0.4]], dtype=np.float32)
POSITIVES = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]], dtype=bool)


def naive_metrics(scores, positives):
    """Sort with every negative before an equally scored positive, and read the metrics off the list."""
    result = {key: [] for key in KEYS}
    for row, mask in zip(scores.tolist(), positives.tolist()):
        ranking = [hit for _, hit in sorted(zip(row, mask), key=lambda item: (-item[0], item[1]))]
        first = ranking.index(True) + 1
        for k in (1, 5, 10):
            result[f"r@{k}"].append(100.0 if any(ranking[:k]) else 0.0)
        result["median_rank"].append(float(first))
        result["mrr@10"].append(100.0 / first if first <= 10 else 0.0)
        for k in (5, 10):
            dcg = sum(1 / math.log2(place + 2) for place, hit in enumerate(ranking[:k]) if hit)
            ideal = sum(1 / math.log2(place + 2) for place in range(min(sum(mask), k)))
            result[f"ndcg@{k}"].append(100.0 * dcg / ideal)
    return {key: np.array(values) for key, values in result.items()}


def random_case(seed, queries, candidates, share, levels=None):
    """Random scores, quantised to `levels` values to force ties; every query has a positive."""
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal((queries, candidates)).astype(np.float32)
    if levels:
        scores = generator.integers(levels, size=scores.shape).astype(np.float32)
    positives = generator.random(scores.shape) < share
    positives[np.arange(queries), generator.integers(candidates, size=queries)] = True
    return scores, positives


def assert_matches_naive(scores, positives):
    ours, naive = query_metrics(scores, positives), naive_metrics(scores, positives)
    assert list(ours) == KEYS
    for key in KEYS:
        np.testing.assert_allclose(ours[key], naive[key], rtol=1e-12, err_msg=key)


def test_golden_values():
    # query 0: positives at ranks 1 and 3 (0.9, then 0.8 is negative, then 0.3)
    #   nDCG = (1 + 1 / log2(4)) / (1 + 1 / log2(3)) = 1.5 / 1.6309298 = 0.9197208
    # query 1: 0.7 ties with a negative, so rank 2; nDCG = 1 / log2(3) = 0.6309298
    # query 2: the positive is last, rank 4; nDCG = 1 / log2(5) = 0.4306766
    result = retrieval_metrics(SCORES, POSITIVES)
    assert list(result) == KEYS
    assert result == pytest.approx(
        {
            "r@1": 100 / 3,
            "r@5": 100.0,
            "r@10": 100.0,
            "median_rank": 2.0,
            "mrr@10": 100 * (1 + 1 / 2 + 1 / 4) / 3,
            "ndcg@5": 66.04424,
            "ndcg@10": 66.04424,
        },
        abs=1e-5,
    )
    assert all(type(value) is float for value in result.values())
    per_query = query_metrics(SCORES, POSITIVES)
    assert per_query["median_rank"].tolist() == [1, 2, 4]
    assert per_query["r@1"].tolist() == [100, 0, 0]
    np.testing.assert_allclose(per_query["ndcg@5"], [91.97208, 63.09298, 43.06766], atol=1e-5)


def test_cutoffs_by_hand():
    """The only positive at rank 1, 5, 6, 10, 11 of 12."""
    ranks = [1, 5, 6, 10, 11]
    scores = -np.tile(np.arange(12.0), (5, 1))
    positives = np.zeros((5, 12), dtype=bool)
    positives[np.arange(5), np.array(ranks) - 1] = True
    per_query = query_metrics(scores, positives)
    assert per_query["median_rank"].tolist() == ranks
    assert per_query["r@1"].tolist() == [100, 0, 0, 0, 0]
    assert per_query["r@5"].tolist() == [100, 100, 0, 0, 0]
    assert per_query["r@10"].tolist() == [100, 100, 100, 100, 0]
    np.testing.assert_allclose(per_query["mrr@10"], [100, 20, 100 / 6, 10, 0])
    np.testing.assert_allclose(per_query["ndcg@5"], [100, 100 / math.log2(6), 0, 0, 0])
    np.testing.assert_allclose(
        per_query["ndcg@10"], [100, 100 / math.log2(6), 100 / math.log2(7), 100 / math.log2(11), 0]
    )
    assert retrieval_metrics(scores, positives)["median_rank"] == 6.0


def test_median_rank_of_an_even_number_of_queries_is_the_midpoint():
    assert retrieval_metrics(SCORES[[0, 2]], POSITIVES[[0, 2]])["median_rank"] == 2.5


def test_equal_scores_are_never_a_hit():
    scores = np.full((3, 20), 0.25, dtype=np.float32)
    positives = np.eye(3, 20, dtype=bool)
    result = retrieval_metrics(scores, positives)
    assert result == {key: 20.0 if key == "median_rank" else 0.0 for key in KEYS}


def test_tied_positives_do_not_push_each_other_down():
    per_query = query_metrics(np.zeros((1, 3)), np.array([[True, False, True]]))
    assert per_query["median_rank"].tolist() == [2.0]
    # ranks 2 and 3
    expected = 100 * (1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    np.testing.assert_allclose(per_query["ndcg@5"], [expected])


def test_only_positives_is_perfect():
    result = retrieval_metrics(np.random.default_rng(0).standard_normal((4, 25)), np.ones((4, 25), dtype=bool))
    assert result == pytest.approx({key: 1.0 if key == "median_rank" else 100.0 for key in KEYS})


@given(
    seed=st.integers(0, 10_000),
    queries=st.integers(1, 8),
    candidates=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    levels=st.sampled_from([None, 1, 3, 10]),
)
@settings(max_examples=150, deadline=None)
def test_matches_naive(seed, queries, candidates, share, levels):
    assert_matches_naive(*random_case(seed, queries, candidates, share, levels))


@given(seed=st.integers(0, 10_000), levels=st.sampled_from([None, 4]))
@settings(max_examples=30, deadline=None)
def test_properties(seed, levels):
    scores, positives = random_case(seed, 6, 30, 0.1, levels)
    result = query_metrics(scores, positives)
    order = np.random.default_rng(seed).permutation(30)
    shuffled = query_metrics(scores[:, order], positives[:, order])
    rescaled = query_metrics(scores * 4 - 2, positives)
    raised = query_metrics(scores + np.where(positives, np.float32(1), np.float32(0)), positives)
    for key in KEYS:
        assert np.array_equal(result[key], shuffled[key])  # the order of the candidates is no information
        assert np.array_equal(result[key], rescaled[key])  # nor is the scale of the scores
        sign = -1 if key == "median_rank" else 1
        assert (sign * (raised[key] - result[key]) >= -1e-9).all()  # better scores of positives never hurt
    assert (result["r@1"] <= result["r@5"]).all()
    assert (result["r@5"] <= result["r@10"]).all()


@pytest.mark.parametrize("block", [1, 100, 10_000])
def test_blocks_change_nothing(block, monkeypatch):
    scores, positives = random_case(0, 57, 30, 0.1, 8)
    expected = query_metrics(scores, positives)
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", block)
    result = query_metrics(scores, positives)
    assert all(np.array_equal(result[key], expected[key]) for key in KEYS)


def test_image_to_text_by_transposing():
    """Five captions per image: text -> image has one positive per row, image -> text five."""
    generator = np.random.default_rng(3)
    scores = generator.standard_normal((40, 8)).astype(np.float32)
    positives = np.arange(40)[:, None] // 5 == np.arange(8)
    scores[positives] += 1
    assert_matches_naive(scores.T, positives.T)
    ours = query_metrics(torch.from_numpy(scores).T, torch.from_numpy(positives).T)
    assert np.array_equal(ours["ndcg@10"], query_metrics(scores.T, positives.T)["ndcg@10"])


def test_tensors_arrays_and_views_agree():
    scores, positives = random_case(1, 9, 12, 0.2)
    expected = retrieval_metrics(scores, positives)
    assert retrieval_metrics(torch.from_numpy(scores).requires_grad_(), torch.from_numpy(positives)) == expected
    assert retrieval_metrics(torch.from_numpy(scores), positives) == expected
    assert retrieval_metrics(scores[:, ::-1], positives[:, ::-1]) == expected
    scores.setflags(write=False)  # as a memory-mapped file
    assert retrieval_metrics(scores, positives) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.int8])
def test_other_dtypes_are_compared_in_float32(dtype):
    scores, positives = random_case(2, 20, 30, 0.1, 6)
    assert retrieval_metrics(torch.from_numpy(scores).to(dtype), positives) == retrieval_metrics(scores, positives)


def test_float64_keeps_differences_that_float32_loses():
    scores = np.array([[1.0 + 1e-12, 1.0]])
    positives = np.array([[True, False]])
    assert retrieval_metrics(scores, positives)["r@1"] == 100.0
    assert retrieval_metrics(scores.astype(np.float32), positives)["r@1"] == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 1])
def test_non_finite_scores_are_named(bad, column, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 1)  # the row is counted across blocks
    scores = SCORES.copy()
    scores[1, column] = bad
    with pytest.raises(InputError, match="query 1 has a score that is NaN or infinite"):
        retrieval_metrics(scores, POSITIVES)


def test_query_without_a_positive_is_named(monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 1)
    positives = POSITIVES.copy()
    positives[2] = False
    with pytest.raises(InputError, match="query 2 has no positive"):
        retrieval_metrics(SCORES, positives)


@pytest.mark.parametrize("shape", [(3, 5), (4, 3), (12,), (0, 4), (3, 0)])
def test_shapes_must_fit(shape):
    with pytest.raises(InputError, match="must share one shape"):
        retrieval_metrics(SCORES, np.ones(shape, dtype=bool))
    if 0 in shape:
        with pytest.raises(InputError, match="without a 0"):
            retrieval_metrics(np.ones(shape), np.ones(shape, dtype=bool))


def test_positives_must_be_bool():
    with pytest.raises(InputError, match="expected bool"):
        retrieval_metrics(SCORES, POSITIVES.astype(np.int64))


def naive_bootstrap(values, resamples, level, seed, groups, statistic):
    """Draw, concatenate the members of the drawn groups, take the statistic; one resample at a time."""
    generator = np.random.default_rng(seed)
    members = [values[groups == group] for group in np.unique(groups)]
    results = [
        statistic(np.concatenate([members[draw] for draw in generator.integers(len(members), size=len(members))]))
        for _ in range(resamples)
    ]
    return np.quantile(results, [(1 - level) / 2, (1 + level) / 2])


@pytest.mark.parametrize("block", [1, 150, 2**21])
@pytest.mark.parametrize("grouped", [False, True])
def test_bootstrap_matches_naive(grouped, block, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", block)
    generator = np.random.default_rng(5)
    per_query = {"r@1": 100.0 * (generator.random(31) < 0.4), "median_rank": generator.integers(1, 9, 31).astype(float)}
    groups = generator.choice([-3, 7, 8, 100, 41, 5], size=31) if grouped else None
    ours = bootstrap_intervals(per_query, resamples=80, level=0.9, seed=11, groups=groups)
    assert list(ours) == list(per_query)
    for name, statistic in (("r@1", np.mean), ("median_rank", np.median)):
        members = groups if grouped else np.arange(31)
        expected = naive_bootstrap(per_query[name], 80, 0.9, 11, members, statistic)
        np.testing.assert_allclose(ours[name], expected, rtol=1e-12, err_msg=name)


def test_bootstrap_width_is_the_binomial_standard_error():
    values = 100.0 * (np.arange(1000) < 300)
    low, high = bootstrap_intervals({"r@1": values}, resamples=2000)["r@1"]
    error = 100 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(30 - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(30 + 1.96 * error, abs=0.15 * error)


def test_bootstrap_of_duplicated_queries_needs_the_groups():
    """Each query five times: alone the interval shrinks by sqrt(5), grouped it stays what it was."""
    values = np.random.default_rng(0).standard_normal(400)
    repeated = np.repeat(values, 5)

    def width(per_query, groups=None):
        low, high = bootstrap_intervals({"ndcg@10": per_query}, groups=groups)["ndcg@10"]
        return high - low

    single, alone, grouped = width(values), width(repeated), width(repeated, np.repeat(np.arange(400), 5))
    assert grouped == pytest.approx(single, rel=1e-9)  # the same draws, each query merely five times
    assert grouped / alone == pytest.approx(math.sqrt(5), rel=0.12)


def test_bootstrap_of_real_metrics():
    scores, positives = random_case(4, 200, 30, 0.05)
    per_query, summary = query_metrics(scores, positives), retrieval_metrics(scores, positives)
    intervals = bootstrap_intervals(per_query, seed=1)
    assert list(intervals) == KEYS
    for name, (low, high) in intervals.items():
        assert low <= summary[name] <= high
    assert intervals["r@1"][0] < intervals["r@1"][1]
    assert bootstrap_intervals(per_query, seed=1) == intervals
    assert bootstrap_intervals(per_query, seed=2) != intervals
    narrow = bootstrap_intervals(per_query, seed=1, level=0.5)
    assert all(intervals[k][0] <= narrow[k][0] and narrow[k][1] <= intervals[k][1] for k in KEYS)


def test_metrics_share_their_resamples():
    """A metric's interval does not depend on its company, so intervals of differences are paired."""
    values = np.random.default_rng(0).random(50)
    both = bootstrap_intervals({"a": values, "b": values + 1})
    assert both["a"] == pytest.approx(bootstrap_intervals({"a": values})["a"], rel=1e-12)
    assert both["b"] == pytest.approx([bound + 1 for bound in both["a"]], rel=1e-12)


@pytest.mark.parametrize(
    ("per_query", "arguments", "message"),
    [
        ({}, {}, "no metric"),
        ({"a": np.zeros(0)}, {}, "one length above 0"),
        ({"a": np.zeros(3), "b": np.zeros(4)}, {}, "one length above 0"),
        ({"a": np.zeros((3, 1))}, {}, "one length above 0"),
        ({"a": np.zeros(3), "b": np.array([0.0, 1.0, math.nan])}, {}, r"per_query\['b'\]: query 2 is nan"),
        ({"a": np.zeros(3)}, {"resamples": 0}, "resamples is 0"),
        ({"a": np.zeros(3)}, {"level": 1.0}, r"level 1\.0"),
        ({"a": np.zeros(3)}, {"level": 95}, "level 95"),
        ({"a": np.zeros(3)}, {"groups": np.zeros(4, dtype=int)}, "expected integers"),
        ({"a": np.zeros(3)}, {"groups": np.zeros(3)}, "expected integers"),
    ],
)
def test_bootstrap_refuses_bad_input(per_query, arguments, message):
    with pytest.raises(InputError, match=message):
        bootstrap_intervals(per_query, **arguments)
