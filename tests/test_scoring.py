"""MaxSim against hand-computed values and a naive loop over pairs and tokens.

Q queries, M query tokens, I images, K image tokens, D embedding width.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samer.config import InputError
from samer.scoring import maxsim


def naive_maxsim(queries, images, query_mask=None, image_mask=None):
    """One pair and one query token at a time, only over valid tokens."""
    rows = []
    for q in range(len(queries)):
        query = queries[q] if query_mask is None else queries[q][query_mask[q]]
        row = []
        for i in range(len(images)):
            image = images[i] if image_mask is None else images[i][image_mask[i]]
            row.append(sum((image @ token).max() for token in query) / len(query))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def random_batch(seed=0, q=5, m=4, i=7, k=6, d=8, dtype=torch.float32):
    """Tokens and ragged masks; every row keeps at least one token, not always the first."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(q, m, d, generator=generator, dtype=dtype)
    images = torch.randn(i, k, d, generator=generator, dtype=dtype)
    query_mask = torch.rand(q, m, generator=generator) > 0.5
    image_mask = torch.rand(i, k, generator=generator) > 0.5
    query_mask[:, -1] = True
    image_mask[:, -1] = True
    return queries, images, query_mask, image_mask


def test_golden_values():
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.6, 0.8]]])
    images = torch.tensor([[[0.6, 0.8], [1.0, 0.0]], [[0.0, -1.0], [-0.8, 0.6]], [[1.0, 0.0], [1.0, 0.0]]])
    # query 0: (1.0 + 0.8) / 2, (0.0 + 0.6) / 2, (1 + 0) / 2
    # query 1: (-0.6 + 1.0) / 2, (0.8 + 0.0) / 2, (-1 + 0.6) / 2
    expected = torch.tensor([[0.9, 0.3, 0.5], [0.2, 0.4, -0.2]])
    torch.testing.assert_close(maxsim(queries, images), expected)


def test_golden_values_with_masks():
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    images = torch.tensor([[[0.6, 0.8], [1.0, 0.0]]])
    only_first = torch.tensor([[True, False]])
    assert maxsim(queries, images, only_first).item() == pytest.approx(1.0)
    assert maxsim(queries, images, None, only_first).item() == pytest.approx(0.7)
    assert maxsim(queries, images, only_first, only_first).item() == pytest.approx(0.6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block_elements", [None, 1, 24, 100, 10_000])
def test_matches_naive_whatever_the_block(block_elements, masked):
    queries, images, query_mask, image_mask = random_batch()
    masks = (query_mask, image_mask) if masked else (None, None)
    scores = maxsim(queries, images, *masks, block_elements=block_elements)
    assert scores.shape == (5, 7)
    torch.testing.assert_close(scores, naive_maxsim(queries, images, *masks))


@given(
    seed=st.integers(0, 10_000),
    sizes=st.tuples(*[st.integers(1, 6)] * 5),
    block_elements=st.integers(1, 300),
)
@settings(max_examples=40, deadline=None)
def test_matches_naive_on_any_shape(seed, sizes, block_elements):
    q, m, i, k, d = sizes
    batch = random_batch(seed, q, m, i, k, d, dtype=torch.float64)
    torch.testing.assert_close(maxsim(*batch, block_elements=block_elements), naive_maxsim(*batch))


def test_query_blocks_narrower_than_the_default_width():
    """More query tokens than one product's columns: the query split by width, not by budget."""
    queries, images, _, _ = random_batch(q=40, m=50, i=3)
    torch.testing.assert_close(maxsim(queries, images), naive_maxsim(queries, images))


@pytest.mark.parametrize("block_elements", [24, 100, 1000])
def test_no_product_exceeds_the_budget(block_elements, monkeypatch):
    from samer import scoring

    sizes = []
    original = scoring._score_block

    def spy(queries, images, *masks):
        sizes.append(queries.shape[0] * queries.shape[1] * images.shape[0] * images.shape[1])
        return original(queries, images, *masks)

    monkeypatch.setattr(scoring, "_score_block", spy)
    queries, images, _, _ = random_batch()
    maxsim(queries, images, block_elements=block_elements)
    assert max(sizes) <= block_elements
    assert sum(sizes) == 5 * 4 * 7 * 6


def test_ragged_equals_padded():
    generator = torch.Generator().manual_seed(1)
    queries = [torch.randn(n, 8, generator=generator) for n in (1, 3, 4)]
    images = [torch.randn(n, 8, generator=generator) for n in (5, 2, 1, 6)]

    def pad(items):
        padded = torch.nn.utils.rnn.pad_sequence(items, batch_first=True)
        lengths = torch.tensor([len(item) for item in items])
        return padded, torch.arange(padded.shape[1]) < lengths[:, None]

    (padded_queries, query_mask), (padded_images, image_mask) = pad(queries), pad(images)
    scores = maxsim(padded_queries, padded_images, query_mask, image_mask)
    ragged = torch.cat([torch.cat([maxsim(q[None], i[None]) for i in images], dim=1) for q in queries])
    torch.testing.assert_close(scores, ragged)


def test_negative_similarity_survives_zero_padding():
    queries = torch.tensor([[[1.0, 0.0]]])
    images = torch.tensor([[[-1.0, 0.0], [0.0, 0.0]]])
    assert maxsim(queries, images, None, torch.tensor([[True, False]])).item() == -1.0
    assert maxsim(queries, images).item() == 0.0  # the same zeros count when they are not masked


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_garbage_in_padding_changes_neither_scores_nor_gradients(garbage):
    clean = random_batch()
    results = []
    for fill in (0.0, garbage):
        queries, images, query_mask, image_mask = (part.clone() for part in clean)
        queries[~query_mask] = fill
        images[~image_mask] = fill
        queries.requires_grad_()
        images.requires_grad_()
        scores = maxsim(queries, images, query_mask, image_mask)
        scores.square().sum().backward()
        results.append((scores.detach(), queries.grad, images.grad))
        assert not queries.grad[~query_mask].any()
        assert not images.grad[~image_mask].any()
    for with_zeros, with_garbage in zip(*results):
        assert torch.equal(with_zeros, with_garbage)


@pytest.mark.parametrize("block_elements", [None, 24, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked, block_elements):
    queries, images, query_mask, image_mask = random_batch(q=3, m=2, i=3, k=4, d=3, dtype=torch.float64)
    masks = (query_mask, image_mask) if masked else (None, None)
    assert torch.autograd.gradcheck(
        lambda q, i: maxsim(q, i, *masks, block_elements=block_elements),
        (queries.requires_grad_(), images.requires_grad_()),
    )


def test_gradient_equals_naive():
    gradients = []
    for score in (maxsim, naive_maxsim):
        queries, images, *masks = random_batch()
        queries.requires_grad_()
        images.requires_grad_()
        score(queries, images, *masks).logsumexp(dim=1).sum().backward()
        gradients.append((queries.grad, images.grad))
    for ours, naive in zip(*gradients):
        torch.testing.assert_close(ours, naive)


def test_with_and_without_gradient_score_the_same():
    queries, images, *masks = random_batch()
    with torch.no_grad():
        without = maxsim(queries, images, *masks)
    assert not without.requires_grad
    assert torch.equal(maxsim(queries.requires_grad_(), images, *masks).detach(), without)


def test_tied_image_tokens_send_the_gradient_to_the_first():
    queries = torch.tensor([[[1.0, 2.0]]])
    images = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]], requires_grad=True)
    maxsim(queries, images).sum().backward()
    assert images.grad.tolist() == [[[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]]


@pytest.mark.parametrize(
    ("query_dtype", "image_dtype", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_low_precision_is_scored_in_float32(query_dtype, image_dtype, expected):
    queries, images, *masks = random_batch()
    queries, images = queries.to(query_dtype), images.to(image_dtype)
    scores = maxsim(queries, images, *masks)
    assert scores.dtype == expected
    assert torch.equal(scores, maxsim(queries.to(expected), images.to(expected), *masks))


def test_autocast_does_not_lower_the_precision():
    queries, images, *masks = random_batch()
    expected = maxsim(queries, images, *masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = maxsim(queries, images, *masks)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)


def test_bfloat16_ties_are_told_apart():
    """bf16 steps by 0.125 in [16, 32): these two images would tie if scored there."""
    queries = torch.ones(1, 1, 4, dtype=torch.bfloat16)
    images = torch.tensor([[[16.0, 0.0, 0.0, 0.0]], [[16.0, 0.03125, 0.0, 0.0]]], dtype=torch.bfloat16)
    assert maxsim(queries, images).tolist() == [[16.0, 16.03125]]


@pytest.mark.parametrize(
    ("query_shape", "image_shape"),
    [
        ((0, 4, 8), (7, 6, 8)),
        ((5, 4, 8), (0, 6, 8)),
        ((5, 0, 8), (7, 6, 8)),
        ((5, 4, 8), (7, 0, 8)),
        ((5, 4, 8), (7, 6, 9)),
        ((4, 8), (7, 6, 8)),
    ],
)
def test_empty_or_unequal_shapes_are_refused(query_shape, image_shape):
    with pytest.raises(InputError, match=r"queries|images"):
        maxsim(torch.ones(query_shape), torch.ones(image_shape))


def test_masks_must_fit():
    queries, images, query_mask, image_mask = random_batch()
    with pytest.raises(InputError, match="mask of queries"):
        maxsim(queries, images, query_mask[:, :-1], image_mask)
    with pytest.raises(InputError, match="mask of images"):
        maxsim(queries, images, query_mask, query_mask)
    with pytest.raises(InputError, match=r"int64.*expected bool"):  # an int mask would negate to -1 and -2
        maxsim(queries, images, query_mask.long(), image_mask)


def test_rows_without_a_valid_token_are_named():
    queries, images, query_mask, image_mask = random_batch()
    query_mask[3] = False
    with pytest.raises(InputError, match="queries: row 3 has no valid token"):
        maxsim(queries, images, query_mask, image_mask)
    image_mask[2] = False
    with pytest.raises(InputError, match="images: row 2 has no valid token"):
        maxsim(queries, images, None, image_mask)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_non_finite_valid_tokens_are_named(which, bad):
    batch = random_batch()
    batch[which][4, -1, 0] = bad
    with pytest.raises(InputError, match=rf"{('queries', 'images')[which]}: row 4 holds NaN or infinity"):
        maxsim(*batch, block_elements=50)


def test_infinity_that_loses_every_maximum_is_still_refused():
    queries = torch.tensor([[[-1.0, 1.0]]])
    images = torch.tensor([[[float("inf"), 0.0], [0.0, 1.0]]])  # products -inf and 1
    with pytest.raises(InputError, match="images: row 0"):
        maxsim(queries, images)


def test_overflow_is_refused():
    with pytest.raises(InputError, match="overflow"):
        maxsim(torch.full((1, 1, 2), 1e30), torch.full((1, 1, 2), 1e30))


def test_block_elements_must_be_positive():
    queries, images, *_ = random_batch()
    with pytest.raises(InputError, match="block_elements is 0"):
        maxsim(queries, images, block_elements=0)


@pytest.mark.gpu
def test_cuda_equals_cpu():
    values = []
    for device in ("cpu", "cuda"):
        queries, images, *masks = (part.to(device) for part in random_batch(q=40, m=50, i=30))
        queries.requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            scores = maxsim(queries, images, *masks)
        scores.square().sum().backward()
        values.append((scores.detach().cpu(), queries.grad.cpu()))
    for on_cpu, on_cuda in zip(*values):
        torch.testing.assert_close(on_cuda, on_cpu)
