"""Graded relevance, many positives, image to text by the best of five, rSum: against naive loops and pytrec_eval.

Q queries, I candidates.
"""

import math

import numpy as np
import pytest
import torch

from samer import metrics
from samer.config import InputError
from samer.data.records import Caption, ImageRecord
from samer.evaluation import both_directions, caption_grades, grade_matrix, recall_sum
from samer.metrics import graded_metrics, query_metrics


def naive_ndcg(scores, grades, k):
    """Linear gains; of equal scores the lower grade comes first."""
    values = []
    for row, truth in zip(scores.tolist(), grades.tolist()):
        ranking = [grade for _, grade in sorted(zip(row, truth), key=lambda item: (-item[0], item[1]))]
        dcg = sum(grade / math.log2(place + 2) for place, grade in enumerate(ranking[:k]))
        ideal = sum(grade / math.log2(place + 2) for place, grade in enumerate(sorted(truth, reverse=True)[:k]))
        values.append(100.0 * dcg / ideal)
    return np.array(values)


def random_case(seed, queries=40, candidates=60, levels=None, most=3, share=0.15):
    """Random scores, distinct in a row or quantised to force ties, and grades; every query has an answer."""
    generator = np.random.default_rng(seed)
    scores = np.stack([generator.permutation(candidates) for _ in range(queries)]).astype(np.float32)
    if levels:
        scores = generator.integers(levels, size=scores.shape).astype(np.float32)
    grades = generator.integers(1, most + 1, size=scores.shape) * (generator.random(scores.shape) < share)
    grades[np.arange(queries), generator.integers(candidates, size=queries)] = most
    return scores, grades


@pytest.mark.parametrize("candidates", [4, 7, 60, 300])
@pytest.mark.parametrize("seed", range(5))
def test_agreement_with_pytrec_eval(seed, candidates):
    """Random graded qrels, judged irrelevant ones among them; nDCG@5 and @10, success at 1, 5, 10, reciprocal rank."""
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec_eval is not installed")
    scores, grades = random_case(seed, candidates=candidates)
    judged = (grades > 0) | (np.random.default_rng(seed).random(grades.shape) < 0.3)
    qrels = {str(q): {str(i): int(grades[q, i]) for i in np.flatnonzero(judged[q])} for q in range(len(scores))}
    runs = {str(q): {str(i): float(score) for i, score in enumerate(row)} for q, row in enumerate(scores)}
    asked = {"ndcg_cut.5,10", "success.1,5,10", "recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(qrels, asked).evaluate(runs)
    ours = graded_metrics(scores, grades)
    for name, theirs in (("ndcg@{}", "ndcg_cut_{}"), ("r@{}", "success_{}")):
        for k in (5, 10) if "ndcg" in name else (1, 5, 10):
            expected = [found[str(q)][theirs.format(k)] for q in range(len(scores))]
            np.testing.assert_allclose(ours[name.format(k)] / 100, expected, rtol=0, atol=1e-9)
    reciprocal = [found[str(q)]["recip_rank"] for q in range(len(scores))]
    np.testing.assert_allclose(1 / ours["median_rank"], reciprocal, rtol=0, atol=1e-9)
    assert len(set(ours["ndcg@10"].round(6))) > 5


def test_by_hand():
    """Grades 1, 2, 0 at ranks 1, 2, 3: (1 + 2 / log2 3) / (2 + 1 / log2 3); gains of 2^g - 1 would give another."""
    value = graded_metrics(np.array([[0.9, 0.8, 0.1]]), np.array([[1, 2, 0]]))["ndcg@5"]
    assert value == pytest.approx(100 * (1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)), abs=1e-12)
    assert value != pytest.approx(100 * (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)), abs=0.1)
    tied = graded_metrics(np.array([[0.9, 0.9, 0.9]]), np.array([[1, 2, 0]]))["ndcg@5"]  # 0, 1, 2
    assert tied == pytest.approx(100 * (1 / math.log2(3) + 1) / (2 + 1 / math.log2(3)), abs=1e-12)


@pytest.mark.parametrize("block", [1, 150, 2**21])
@pytest.mark.parametrize("levels", [None, 2, 9])
def test_it_equals_the_loops(block, levels, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", block)
    for seed in range(3):
        scores, grades = random_case(seed, queries=11, candidates=23, levels=levels)
        ours = graded_metrics(torch.from_numpy(scores), torch.from_numpy(grades).to(torch.uint8))
        for k in (5, 10):
            np.testing.assert_allclose(ours[f"ndcg@{k}"], naive_ndcg(scores, grades, k), rtol=1e-12)


@pytest.mark.parametrize("levels", [None, 4])
def test_grades_of_one_are_binary_relevance(levels):
    scores, grades = random_case(1, levels=levels, most=1)
    graded, binary = graded_metrics(scores, grades), query_metrics(scores, grades > 0)
    assert list(graded) == list(binary)
    for name, values in binary.items():
        np.testing.assert_allclose(graded[name], values, rtol=1e-12, err_msg=name)


def test_recall_does_not_ask_how_well():
    scores, grades = random_case(2)
    graded, binary = graded_metrics(scores, grades), query_metrics(scores, grades > 0)
    for name in ("r@1", "r@5", "r@10", "median_rank", "mrr@10"):
        assert np.array_equal(graded[name], binary[name])
    assert not np.allclose(graded["ndcg@10"], binary["ndcg@10"])


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ([[1, 0], [0, 0]], "query 1 has no positive"),
        ([[1, 0], [-1, 1]], "grades hold -1; expected at least 0"),
        ([[1.0, 0.0], [0.0, 1.0]], "expected whole numbers"),
        ([[True, False], [False, True]], "expected whole numbers"),
        ([[1, 0, 1], [0, 1, 1]], "must share one shape"),
        ([1, 0], "must share one shape"),
        ([["a", "b"], ["c", "d"]], "no table of numbers"),
    ],
)
def test_what_is_no_grade_is_refused(grades, message):
    with pytest.raises(InputError, match=message):
        graded_metrics(np.array([[0.1, 0.2], [0.3, 0.4]]), grades)


# --- from records to both directions ----------------------------------------------------------------------------------


def record(name, *grades):
    captions = tuple(Caption("text", (), True, f"{name}-{k}", tuple(each)) for k, each in enumerate(grades))
    return ImageRecord(name, None, captions)


def test_grades_of_captions_as_a_matrix():
    records = [record("a", [("a", 2), ("c", 1)], [("b", 1), ("a", 1)]), record("b"), record("c", [("c", 3), ("x", 1)])]
    matrix = grade_matrix(caption_grades(records), 3)
    assert matrix.tolist() == [[2, 0, 1], [1, 1, 0], [0, 0, 3]]
    own = caption_grades([record("a", []), record("b", [("b", 2)])])  # one without grades: its own image
    assert grade_matrix(own, 2).tolist() == [[1, 0], [0, 2]]
    assert grade_matrix(caption_grades([record("a", []), record("b", [])]), 2) is None
    assert grade_matrix([], 3) is None


def test_both_directions_of_grades_equal_the_loops():
    scores, grades = random_case(3, queries=12, candidates=9, share=0.2)
    grades[:, 4] = 0  # answers nothing
    grades[np.arange(12), np.arange(12) % 4] = 2
    scores = torch.from_numpy(scores)
    found = both_directions(scores, torch.from_numpy(grades.argmax(1)), grades=torch.from_numpy(grades))
    asking = np.flatnonzero(grades.any(0))
    assert 4 not in asking
    for name, (matrix, truth) in {
        "text_to_image": (scores.numpy(), grades),
        "image_to_text": (scores.numpy().T[asking], grades.T[asking]),
    }.items():
        for k in (5, 10):
            expected = naive_ndcg(matrix, truth, k).mean()
            assert found[name][f"ndcg@{k}"]["value"] == pytest.approx(expected, abs=1e-6)
            low, high = found[name][f"ndcg@{k}"]["interval"]
            assert low <= expected <= high
    with pytest.raises(InputError, match="must have the shape of scores"):
        both_directions(scores, torch.zeros(12, dtype=torch.long), grades=torch.ones(12, 8, dtype=torch.uint8))


def test_image_to_text_is_the_best_of_five_and_rsum_adds_up():
    """As the field counts it: 5 i to 5 i + 4 are image i's captions, its rank that of the best, ties against it."""
    generator = np.random.default_rng(6)
    scores = generator.standard_normal((200, 40)).astype(np.float32)  # 40 images of five captions
    scores[np.arange(200), np.arange(200) // 5] += 1.5
    total = 0.0
    found = both_directions(torch.from_numpy(scores), torch.arange(200) // 5)
    for k in (1, 5, 10):
        ranks = [int((row >= row[q // 5]).sum()) for q, row in enumerate(scores)]
        forward = 100.0 * np.mean([rank <= k for rank in ranks])
        best = []
        for image in range(40):
            order = np.argsort(-scores[:, image])
            best.append(min(int(np.flatnonzero(order == caption)[0]) for caption in range(5 * image, 5 * image + 5)))
        back = 100.0 * np.mean([rank < k for rank in best])
        assert found["text_to_image"][f"r@{k}"]["value"] == pytest.approx(forward, abs=1e-6)
        assert found["image_to_text"][f"r@{k}"]["value"] == pytest.approx(back, abs=1e-6)
        total += forward + back
    assert recall_sum(found) == pytest.approx(total, abs=1e-5)
    assert 100 < total < 600
