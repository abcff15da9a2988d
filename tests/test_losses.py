"""The contrastive loss against hand-computed values and scipy's logsumexp.

Q queries, I images.
"""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from samer.config import InputError
from samer.losses import multi_positive_t2i_loss


def random_scores(seed=0, dtype=torch.float32):
    """(6, 9) scores; the first query has one positive, the last all of them."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(6, 9, generator=generator, dtype=dtype) * 2 - 1
    positives = torch.rand(6, 9, generator=generator) > 0.6
    positives[0] = torch.arange(9) == 4
    positives[1:, 0] = True
    positives[-1] = True
    return scores, positives


def test_golden_value():
    # temperature 1; row 0: log(1 + 2 + 3) - log 1 = log 6; row 1: log(4 + 1 + 3) - log(4 + 3) = log(8 / 7)
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.0, 3.0]]).log()
    positives = torch.tensor([[True, False, False], [True, False, True]])
    expected = (math.log(6) + math.log(8 / 7)) / 2
    assert multi_positive_t2i_loss(scores, positives, 1.0).item() == pytest.approx(expected, rel=1e-6)
    assert multi_positive_t2i_loss(scores * 0.5, positives, 0.5).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.07, 0.01, 1.0])
def test_matches_scipy(temperature):
    scores, positives = random_scores(dtype=torch.float64)
    logits = scores.numpy() / temperature
    per_query = [logsumexp(row) - logsumexp(row[mask]) for row, mask in zip(logits, positives.numpy())]
    loss = multi_positive_t2i_loss(scores, positives, temperature)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(np.mean(per_query), rel=1e-12)


def test_one_positive_each_is_cross_entropy_at_the_published_temperature():
    scores, _ = random_scores()
    target = torch.tensor([3, 1, 4, 1, 5, 8])
    positives = torch.nn.functional.one_hot(target, 9).bool()
    torch.testing.assert_close(
        multi_positive_t2i_loss(scores, positives), torch.nn.functional.cross_entropy(scores / 0.07, target)
    )


def test_all_positive_costs_nothing():
    scores, _ = random_scores()
    assert multi_positive_t2i_loss(scores, torch.ones(6, 9, dtype=torch.bool)).item() == 0.0


def test_gradcheck():
    scores, positives = random_scores(dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: multi_positive_t2i_loss(s, positives, 0.3), (scores.requires_grad_(),), atol=1e-7
    )


def test_gradient_is_softmax_minus_positive_softmax():
    scores, positives = random_scores(dtype=torch.float64)
    scores.requires_grad_()
    multi_positive_t2i_loss(scores, positives, 0.1).backward()
    weights = np.exp(scores.detach().numpy() / 0.1)
    positive_weights = np.where(positives.numpy(), weights, 0.0)
    expected = weights / weights.sum(1, keepdims=True) - positive_weights / positive_weights.sum(1, keepdims=True)
    np.testing.assert_allclose(scores.grad.numpy(), expected / 0.1 / 6, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_computed_in_float32(autocast):
    scores, positives = random_scores()
    scores = scores.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = multi_positive_t2i_loss(scores, positives)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, multi_positive_t2i_loss(scores.float(), positives))


def test_large_scores_stay_finite():
    scores = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = multi_positive_t2i_loss(scores, torch.tensor([[False, True]]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4 / 0.07, rel=1e-6)
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(6, 8), (9, 6), (6,)])
def test_unequal_shapes_are_refused(shape):
    with pytest.raises(InputError, match="must share one shape"):
        multi_positive_t2i_loss(torch.zeros(6, 9), torch.ones(shape, dtype=torch.bool))


def test_empty_batch_is_refused():
    with pytest.raises(InputError, match="without a 0"):
        multi_positive_t2i_loss(torch.zeros(0, 9), torch.ones(0, 9, dtype=torch.bool))


def test_integer_mask_is_refused():
    with pytest.raises(InputError, match="expected bool"):
        multi_positive_t2i_loss(torch.zeros(2, 2), torch.eye(2))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature_is_refused(temperature):
    with pytest.raises(InputError, match="temperature is"):
        multi_positive_t2i_loss(*random_scores(), temperature)


def test_query_without_a_positive_is_named():
    scores, positives = random_scores()
    positives[[2, 4]] = False
    with pytest.raises(InputError, match="query 2 has no positive"):
        multi_positive_t2i_loss(scores, positives)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_score_is_named(bad):
    scores, positives = random_scores()
    scores[3, 7] = bad
    with pytest.raises(InputError, match="query 3 has a score that is NaN or infinite"):
        multi_positive_t2i_loss(scores, positives)
