"""The contrastive loss against hand-computed values and scipy's logsumexp.

Q queries, I images.
"""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from samer import losses
from samer.config import InputError
from samer.losses import (
    alignment,
    midpoint_mixup,
    midpoint_share,
    mixup_partners,
    multi_positive_t2i_loss,
    pooled,
    uniformity,
)


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


# --- midpoint mixup -------------------------------------------------------------------------------------------------


def unit(*shape, seed=0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made / made.norm(dim=-1, keepdim=True)


def test_the_share_goes_from_one_to_a_half():
    shares = [midpoint_share(k / 10) for k in range(11)]
    assert (shares[0], shares[5], shares[10]) == (1.0, pytest.approx(0.75), pytest.approx(0.5))
    assert shares == sorted(shares, reverse=True)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="progress is"):
            midpoint_share(wrong)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([7, 3, 9, 3, 7], [2, 0, 1, 0, 2]), ([4, 1], [1, 0]), ([5, 5], [0, 0]), ([2], [0])],
)
def test_partners_are_of_the_next_image_of_the_batch(numbers, expected):
    assert mixup_partners(torch.tensor(numbers)).tolist() == expected


def test_who_meets_whom_does_not_depend_on_the_order():
    numbers = torch.tensor([7, 3, 9, 3, 7, 1, 20])
    met = lambda some: set(zip(some.tolist(), some[mixup_partners(some)].tolist()))
    assert met(numbers) == met(numbers.flip(0)) == {(1, 3), (3, 7), (7, 9), (9, 20), (20, 1)}


def naive_mixup(features, partners, share, mask):
    """A vector at a time; what is masked stays."""
    rows = []
    for image, partner in enumerate(partners.tolist()):
        own = []
        for k, vector in enumerate(features[image]):
            if not mask[image, k]:
                own.append(vector)
                continue
            there = [j for j in range(features.shape[1]) if mask[partner, j]]
            best = max(there, key=lambda j: float((vector * features[partner, j]).detach().sum()))
            between = share * vector + (1 - share) * features[partner, best]
            own.append(between / between.square().sum().sqrt())
        rows.append(torch.stack(own))
    return torch.stack(rows)


@pytest.mark.parametrize("most", [2**25, 1])  # in one block, and image by image
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_mixup_of_ragged_tokens_equals_loops_with_its_gradient(monkeypatch, most, share):
    monkeypatch.setattr(losses, "_MATCH_ELEMENTS", most)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]
    partners, weights = torch.tensor([2, 0, 3, 1]), unit(4, 6, 5, seed=9)
    found, expected = (unit(4, 6, 5).requires_grad_() for _ in range(2))
    made = midpoint_mixup(found, partners, share, mask)
    naive = naive_mixup(expected, partners, share, mask)
    torch.testing.assert_close(made, naive, atol=1e-12, rtol=0)
    for result in (made, naive):
        (result * weights)[mask].sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, atol=1e-12, rtol=0)
    whole = torch.ones_like(mask)
    torch.testing.assert_close(
        midpoint_mixup(found, partners, share), naive_mixup(found, partners, share, whole), atol=1e-12, rtol=0
    )


def test_what_padding_holds_does_not_matter():
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]
    features, partners = unit(4, 6, 5), torch.tensor([1, 2, 3, 0])
    spoiled = torch.where(mask[..., None], features, math.nan)
    made, expected = (midpoint_mixup(each, partners, 0.6, mask) for each in (spoiled, features))
    assert torch.equal(made[mask], expected[mask])


def test_mixup_of_pooled_features_by_hand():
    features, partners = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 0])
    half = math.sqrt(0.5)
    torch.testing.assert_close(midpoint_mixup(features, partners, 0.5), torch.full((2, 2), half))
    own, other = 0.75 / math.hypot(0.75, 0.25), 0.25 / math.hypot(0.75, 0.25)
    torch.testing.assert_close(midpoint_mixup(features, partners, 0.75), torch.tensor([[own, other], [other, own]]))
    assert torch.equal(midpoint_mixup(features, partners, 1.0), features)


@pytest.mark.parametrize(
    ("shape", "partners", "share", "mask", "words"),
    [
        ((3,), 3, 0.7, None, "expected"),
        ((3, 4), 2, 0.7, None, "expected"),
        ((3, 4), 3, 0.7, (3, 4), "expected"),
        ((3, 4), 3, 0.4, None, "share is 0.4"),
        ((3, 4, 2), 3, 1.1, None, "share is 1.1"),
    ],
)
def test_what_can_not_be_mixed_is_refused(shape, partners, share, mask, words):
    mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(InputError, match=words):
        midpoint_mixup(torch.ones(shape), torch.zeros(partners, dtype=torch.long), share, mask)


def test_alignment_uniformity_and_pooling_equal_loops():
    queries, images = unit(3, 5, seed=1), unit(4, 5, seed=2)
    positives = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]).bool()
    near = [
        float((q - i).square().sum()) for q, row in zip(queries, positives) for i, right in zip(images, row) if right
    ]
    assert alignment(queries, images, positives).item() == pytest.approx(sum(near) / 4)
    pairs = [math.exp(-2 * float((a - b).square().sum())) for k, a in enumerate(images) for b in images[:k]]
    assert uniformity(images).item() == pytest.approx(math.log(sum(pairs) / 6))
    assert uniformity(images[:1]).item() == 0
    tokens, mask = unit(2, 3, 5, seed=3), torch.tensor([[True, True, False], [True, True, True]])
    for row, kept in ((0, tokens[0, :2]), (1, tokens[1])):
        mean = kept.sum(0) / len(kept)
        torch.testing.assert_close(pooled(tokens, mask)[row], mean / mean.norm())
    torch.testing.assert_close(pooled(tokens)[1], pooled(tokens, mask)[1])
