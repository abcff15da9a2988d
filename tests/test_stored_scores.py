"""Scores of what an index stores, int8 and signs, against a naive loop over integers; search against brute force.

Q queries, M query tokens, I images, K image tokens, D embedding width.
"""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ask, best_of, unit

from samer import products, scoring
from samer.config import InputError
from samer.products import unpack_signs
from samer.scoring import (
    StoredImages,
    maxsim,
    pack_signs,
    quantise_images,
    quantise_rows,
    score_stored,
    search,
)
from samer.tokens import QueryTokens

DIM = 16
CPU = torch.device("cpu")


def stored_int8(count, regions, width, seed=0, masked=True):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-127, 128, (count, regions, width), generator=generator, dtype=torch.int8)
    mask = torch.rand(count, regions, generator=generator) > 0.4
    mask[:, 0] = True
    return StoredImages(tokens, 0.0071, mask if masked else None)


def stored_own(count, *sizes, **rest):
    """int8 with a scale per image."""
    images = stored_int8(count, *sizes, **rest)
    scales = torch.rand(count, generator=torch.Generator().manual_seed(1)) / 50 + 1e-4
    return StoredImages(images.tokens, scales, images.mask)


def stored_signs(*sizes, **rest):
    images = stored_int8(*sizes, **rest)
    return StoredImages(pack_signs(images.tokens), None, images.mask)


def naive_scores(queries, values, mask, factor):
    """One query token against one vector at a time: exact integers, then float32 products and the mean."""
    rows = []
    for query, valid in zip(queries.tokens.numpy(), queries.mask.numpy()):
        row = []
        for i, image in enumerate(values.long().numpy()):
            best = []
            for token in query[valid]:
                scale = np.abs(token).max() / np.float32(127)
                whole = np.rint(token / scale).astype(np.int64)
                shown = [k for k in range(len(image)) if mask is None or mask[i, k]]
                top = max(sum(int(a) * int(b) for a, b in zip(whole, image[k])) for k in shown)
                best.append(np.float32(top) * scale)
            own = factor[i].item() if isinstance(factor, torch.Tensor) else factor
            row.append(torch.tensor(np.array(best)).sum() * np.float32(own) / len(best))
        rows.append(torch.stack(row))
    return torch.stack(rows)


# --- signs and int8 -------------------------------------------------------------------------------------------------


def test_signs_pack_lowest_bit_first():
    row = torch.tensor([1.0, -1, -1, -1, -1, -1, -1, -1, 0.5, 2, -0.1, 0, -0.0, -1, -1, 3])
    assert pack_signs(row).tolist() == [1, 1 + 2 + 128]  # 0 counts as negative
    assert pack_signs(row).dtype == torch.uint8
    assert unpack_signs(torch.tensor([[1], [131]], dtype=torch.uint8)).tolist() == [
        [1, -1, -1, -1, -1, -1, -1, -1],
        [1, 1, -1, -1, -1, -1, -1, 1],
    ]
    with pytest.raises(InputError, match="width divisible by 8; it is 12"):
        pack_signs(torch.zeros(2, 12))


@pytest.mark.parametrize("shape", [(8,), (3, 24), (2, 5, 128), (32, 8, 8)])
def test_signs_round_trip(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = pack_signs(values)
    assert packed.shape == (*shape[:-1], shape[-1] // 8)
    assert torch.equal(unpack_signs(packed), torch.where(values > 0, 1, -1).to(torch.int8))
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(pack_signs(unpack_signs(every)), every)


def test_queries_are_quantised_by_their_largest_component():
    whole, scale = quantise_rows(torch.tensor([[1.0, -0.3, 0.0, 0.25], [0.0, -0.02, 0.011, 0.0], [0.0] * 4]))
    assert whole.tolist() == [[127, -38, 0, 32], [0, -127, 70, 0], [0] * 4]
    torch.testing.assert_close(scale[:2], torch.tensor([1.0, 0.02]) / 127)


SIZES = [(3, 4, 5, 3, 16), (1, 1, 1, 1, 8), (1, 7, 21, 1, 24), (9, 1, 2, 9, 12), (2, 3, 4, 2, 5), (2, 9, 3, 6, 64)]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("block_elements", [None, 1, 50, 1000])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_int8_and_signs_equal_a_naive_loop(sizes, block_elements, masked):
    q, m, i, k, width = sizes
    queries = ask(q, m, width)
    for images in [stored_int8, stored_own, *([stored_signs] if width % 8 == 0 else [])]:
        images = images(i, k, width, masked=masked)
        scores = score_stored(queries, images, block_elements=block_elements)
        assert (scores.shape, scores.dtype) == ((q, i), torch.float32)
        values = images.tokens if images.scale is not None else unpack_signs(images.tokens)
        factor = width**-0.5 if images.scale is None else images.scale
        expected = naive_scores(queries, values, images.mask, factor)
        if m == 1:
            assert torch.equal(scores, expected)
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-7)


def test_images_are_quantised_by_their_largest_component():
    tokens = torch.tensor([[[0.6, -1.0], [0.25, 0.004]], [[0.0, 0.02], [-0.005, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    whole, scales = quantise_images(tokens)
    assert whole.tolist() == [[[76, -127], [32, 1]], [[0, 127], [-32, 0]], [[0, 0], [0, 0]]]
    torch.testing.assert_close(scales, torch.tensor([1 / 127, 0.02 / 127, 0.0]))
    assert (scales > 0).all()
    assert torch.equal(quantise_images(tokens[1:2])[0], whole[1:2])
    for factor in (1e-30, 1e30):  # nothing is clipped, whatever the size
        assert torch.equal(quantise_images(tokens[:2] * factor)[0], whole[:2])


@given(seed=st.integers(0, 10_000), block_elements=st.integers(1, 3000), width=st.sampled_from([8, 13, 128]))
@settings(max_examples=30)
def test_int8_is_within_the_rounding_of_the_query(seed, block_elements, width):
    """A query component moves by at most half a step, so a product by at most half a step times |v|_1."""
    queries, images = ask(4, 6, width, seed), stored_int8(9, 5, width, seed)
    values = images.tokens.double() * images.scale
    exact = maxsim(queries.tokens.double(), values, queries.mask, images.mask)
    step = queries.tokens.double().abs().amax(-1) / 127  # (Q, M)
    mean_step = (step * queries.mask).sum(1) / queries.mask.sum(1)
    longest = values.abs().sum(-1).masked_fill(~images.mask, 0).amax(1)
    bound = mean_step[:, None] / 2 * longest + 1e-5
    scores = score_stored(queries, images, block_elements=block_elements)
    assert ((scores - exact).abs() <= bound).all()


def test_padding_and_other_queries_never_matter():
    queries, images = ask(6, 5), stored_int8(7, 3, DIM)
    scores = score_stored(queries, images)
    for garbage in (float("nan"), 1e30):
        spoilt = queries.tokens.masked_fill(~queries.mask[..., None], garbage)
        assert torch.equal(score_stored(QueryTokens(spoilt, queries.mask), images), scores)
    tokens = images.tokens.masked_fill(~images.mask[..., None], 127)
    assert torch.equal(score_stored(queries, StoredImages(tokens, images.scale, images.mask)), scores)
    alone = [score_stored(QueryTokens(t[m][None], m[m][None]), images) for t, m in zip(queries.tokens, queries.mask)]
    assert torch.equal(torch.cat(alone), scores)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_floats_are_scored_by_maxsim(kind):
    queries, tokens, mask = ask(), unit(7, 3, DIM).to(kind), stored_int8(7, 3, DIM).mask
    expected = maxsim(queries.tokens, tokens, queries.mask, mask)
    assert torch.equal(score_stored(queries, StoredImages(tokens, None, mask)), expected)


@pytest.fixture
def fresh_check():
    products.int8_product_works.cache_clear()
    yield
    products.int8_product_works.cache_clear()


def written(result, out):
    """`result` where a kernel puts it; one of another dtype is handed back as it is."""
    return out.copy_(result) if result.dtype == out.dtype else result


REAL = torch._int_mm
WRONG = {
    "missing": None,
    "of 16 bits": lambda a, b: REAL(a, b).clamp(-(2**15), 2**15 - 1),
    "of 21 bits": lambda a, b: REAL(a, b).clamp(-(2**20), 2**20 - 1),  # only the extremes tell
    "unsigned": lambda a, b: (a.int() & 255) @ b.int(),
    "float": lambda a, b: REAL(a, b).float(),
    "transposed wrongly": lambda a, b: REAL(a, b).flip(1),
    "refused": lambda a, b: (_ for _ in ()).throw(RuntimeError("not implemented for this machine")),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_product_that_does_not_work_is_not_used(how, monkeypatch, fresh_check):
    cases = [(ask(9, 4, 24), images(40, 3, 24)) for images in (stored_int8, stored_signs)]
    expected = [score_stored(*case) for case in cases]
    products.int8_product_works.cache_clear()
    if WRONG[how] is None:
        monkeypatch.delattr(torch, "_int_mm")
    else:
        monkeypatch.setattr(torch, "_int_mm", lambda a, b, out: written(WRONG[how](a, b), out))
    assert not products.int8_product_works(CPU)
    for case, scores in zip(cases, expected):
        assert torch.equal(score_stored(*case), scores)


def test_sizes_that_the_kernel_refuses_are_multiplied_otherwise(monkeypatch, fresh_check):
    case = ask(9, 4, 24), stored_int8(40, 3, 24)
    expected = score_stored(*case)
    assert products.int8_product_works(CPU)
    refused = []

    def refuse(left, right, out):
        refused.append(left.shape)
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    assert torch.equal(score_stored(*case), expected)
    assert refused


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_both_products_give_the_same_scores(sizes, monkeypatch):
    q, m, i, k, width = sizes
    queries, images = ask(q, m, width), stored_int8(i, k, width)
    images.tokens[0] = 127  # the largest sums
    scores = score_stored(queries, images)
    monkeypatch.setattr(products, "int8_product_works", lambda device: False)
    assert torch.equal(score_stored(queries, images), scores)


def test_a_width_that_float32_cannot_sum_is_refused(monkeypatch):
    monkeypatch.setattr(products, "int8_product_works", lambda device: False)
    images = StoredImages(torch.full((1, 1, 1040), 127, dtype=torch.int8), 1.0)
    ones = QueryTokens(torch.ones(1, 1, 1040), torch.ones(1, 1, dtype=torch.bool))
    assert score_stored(ones, images).item() == np.float32(127 * 127 * 1040) * (np.float32(1) / np.float32(127))
    with pytest.raises(InputError, match=r"width 1048: .*at most 1,040"):
        score_stored(ask(1, 1, 1048), StoredImages(torch.zeros(1, 1, 1048, dtype=torch.int8), 1.0))


@pytest.mark.parametrize(
    ("queries", "images", "words"),
    [
        (ask(), stored_int8(2, 3, 24), "width 16 do not fit"),
        (ask(), stored_signs(2, 3, 24), "width 16 do not fit"),
        (ask(), StoredImages(torch.zeros(2, 3, DIM, dtype=torch.int32)), "torch.int32"),
        (ask(), StoredImages(torch.zeros(2, 3, DIM, dtype=torch.int8)), "torch.int8 with scale None"),
        (ask(), StoredImages(torch.zeros(2, 3, 2, dtype=torch.uint8), 0.1), "torch.uint8 with scale 0.1"),
        (
            ask(),
            StoredImages(torch.zeros(2, 3, 2, dtype=torch.uint8), torch.ones(2)),
            r"scale of shape \(2,\); expected",
        ),
        (ask(), StoredImages(torch.zeros(2, 3, DIM, dtype=torch.int8), torch.ones(3)), r"scale of shape \(3,\) on cpu"),
        (ask(), StoredImages(torch.zeros(2, 3, DIM, dtype=torch.int8), torch.ones(2, 1)), r"scale of shape \(2, 1\)"),
        (QueryTokens(torch.full((1, 1, DIM), float("nan")), torch.ones(1, 1, dtype=torch.bool)), None, "NaN"),
        (QueryTokens(torch.ones(2, 1, DIM), torch.tensor([[True], [False]])), None, "row 1 has no valid token"),
        (ask(), StoredImages(torch.zeros(2, 1, DIM, dtype=torch.int8), 1.0, torch.tensor([[True], [False]])), "row 1"),
        (QueryTokens(torch.ones(1, DIM), torch.ones(1, dtype=torch.bool)), None, "expected three dimensions"),
    ],
)
def test_what_does_not_fit_is_refused(queries, images, words):
    with pytest.raises(InputError, match=words):
        score_stored(queries, images or stored_int8(2, 3, DIM))


# --- the ragged product of maxsim -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_elements", [None, 1, 30, 500])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_ragged_products_equal_padded_ones(block_elements, masked, kind, monkeypatch):
    queries, images = ask(12, 7), stored_int8(9, 5, DIM)
    spoilt = queries.tokens.masked_fill(~queries.mask[..., None], float("nan")).to(kind)
    tokens, mask = images.tokens.to(kind) * images.scale, images.mask if masked else None
    padded = maxsim(spoilt.clone().requires_grad_(), tokens, queries.mask, mask, block_elements=block_elements)
    original, sizes = scoring._ValidTokens.score, []

    def spy(self, block, *rest):
        sizes.extend(len(part) * block.shape[0] * block.shape[1] for part in self.blocks)
        return original(self, block, *rest)

    monkeypatch.setattr(scoring._ValidTokens, "score", spy)
    ragged = maxsim(spoilt, tokens, queries.mask, mask, block_elements=block_elements)
    assert ragged.dtype == kind
    torch.testing.assert_close(ragged, padded.detach())
    assert sum(sizes) == int(queries.mask.sum()) * 9 * 5  # padding is not multiplied
    assert block_elements is None or max(sizes) <= max(block_elements, 5)


# --- search ---------------------------------------------------------------------------------------------------------


def cut(ids, images, places):
    """The same images as shards that end at these places."""
    for start, end in zip([0, *places], [*places, len(ids)]):
        if start < end:
            part = [None if t is None else t[start:end] for t in (images.tokens, images.mask, images.live)]
            scale = images.scale[start:end] if isinstance(images.scale, torch.Tensor) else images.scale
            yield ids[start:end], StoredImages(part[0], scale, part[1], part[2])


@given(
    seed=st.integers(0, 1000),
    places=st.lists(st.integers(0, 30), max_size=5),
    top=st.integers(1, 40),
    levels=st.sampled_from([0, 1, 127]),
    packed=st.booleans(),
)
@settings(max_examples=60)
def test_search_is_the_head_of_all_scores_sorted(seed, places, top, levels, packed):
    """Few levels make many equal scores, which straddle shards and the cut."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-levels, levels + 1, (30, 2, 8), generator=generator).to(torch.int8)
    live = torch.rand(30, generator=generator) > 0.3 if seed % 2 else None
    ids = [f"i{k}" for k in torch.randperm(30, generator=generator).tolist()]
    scale = None if packed else 0.01 + torch.rand(30, generator=generator).round(decimals=1)
    images = StoredImages(pack_signs(tokens) if packed else tokens, scale, None, live)
    queries = ask(3, 3, 8, seed)
    expected = best_of(score_stored(queries, images), ids, top, live)
    assert search(queries, cut(ids, images, sorted(places)), top) == expected


def test_search_breaks_ties_by_id_whatever_the_shards():
    ids = [f"{k:03}" for k in range(100)][::-1]
    images = StoredImages(torch.ones(100, 1, 8, dtype=torch.int8), 1.0)
    for places in ([], [50], [1, 2, 99], list(range(1, 100))):
        found = search(ask(2, 2, 8), cut(ids, images, places), 3)
        assert [[name for name, _ in row] for row in found] == [["000", "001", "002"]] * 2


def test_search_never_holds_all_scores(monkeypatch):
    results, shapes = [], []

    def spy(queries, images, **rest):
        assert sum(result() is not None for result in results) <= 1  # the shard before, until it is replaced
        scores = score_stored(queries, images, **rest)
        results.append(weakref.ref(scores))
        shapes.append(tuple(scores.shape))
        return scores

    monkeypatch.setattr(scoring, "score_stored", spy)
    images = stored_int8(100, 3, DIM)
    search(ask(4), cut(list(map(str, range(100))), images, list(range(10, 100, 10))), 5)
    assert shapes == [(4, 10)] * 10


def test_search_of_nothing_and_of_no_results():
    assert search(ask(2), [], 3) == [[], []]
    images = stored_int8(3, 2, DIM)
    gone = StoredImages(images.tokens, images.scale, None, torch.zeros(3, dtype=torch.bool))
    assert search(ask(2), [(["a", "b", "c"], gone)], 3) == [[], []]
    with pytest.raises(InputError, match="top is 0; it must be at least 1"):
        search(ask(2), [], 0)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_halves_are_multiplied_as_they_are_where_the_device_can(monkeypatch, kind):
    """The tensor-core path with its product replaced: it must see halves, and its scores must be float32's."""
    seen = []

    def product(left, right):
        seen.append((left.dtype, right.dtype))
        return left.float() @ right.float()

    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1).to(kind)
    queries, images = draw(5, 7, 16), draw(9, 4, 16)
    query_mask, image_mask = torch.rand(5, 7, generator=generator) > 0.3, torch.rand(9, 4, generator=generator) > 0.3
    query_mask[:, 0] = image_mask[:, 0] = True
    plain = scoring.maxsim(queries, images, query_mask, image_mask)
    monkeypatch.setattr(scoring, "half_product", product)
    monkeypatch.setattr(scoring, "half_product_works", lambda device, dtype: dtype == kind)
    fast = scoring.maxsim(queries, images, query_mask, image_mask)
    assert fast.dtype == torch.float32
    assert seen
    assert set(seen) == {(kind, kind)}
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-6)
    seen.clear()
    scoring.maxsim(queries.float(), images, query_mask, image_mask)  # other dtypes, or a gradient, go on in float32
    scoring.maxsim(queries.requires_grad_(), images, query_mask, image_mask).sum().backward()
    assert not seen


def test_a_product_of_halves_is_checked_before_it_is_used(monkeypatch):
    products.half_product_works.cache_clear()
    try:
        assert not products.half_product_works(CPU, torch.bfloat16)  # torch has none on a CPU
        products.half_product_works.cache_clear()
        monkeypatch.setattr(products, "half_product", lambda left, right: left.float() @ right.float())
        assert products.half_product_works(CPU, torch.bfloat16)
        assert not products.half_product_works(CPU, torch.float32)
        products.half_product_works.cache_clear()
        monkeypatch.setattr(products, "half_product", lambda left, right: (left @ right).float())  # rounded sums
        assert not products.half_product_works(CPU, torch.bfloat16)
    finally:
        products.half_product_works.cache_clear()
