"""The numbers under any input: the merge, MaxSim, what an index scores, the loss and the metrics against float64.

What tests/test_merging.py, test_scoring.py, test_stored_scores.py, test_losses.py and test_metrics.py prove on chosen
inputs is not repeated; here are the laws that hold for all of them, and inputs at the edges of their ranges.

Shape letters: B images, N tokens, K regions, D embedding, Q queries, M query tokens, I images.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import examples, survey
from hypothesis import given
from hypothesis import strategies as st
from oracle import naive_merge

from samer.config import InputError, MergeConfig
from samer.losses import multi_positive_t2i_loss
from samer.merging import merge_tokens
from samer.metrics import query_metrics
from samer.products import unpack_signs
from samer.scoring import StoredImages, maxsim, pack_signs, quantise_rows, score_stored
from samer.tokens import QueryTokens

SEEDS = st.integers(0, 10**9)
INITS = st.sampled_from(["raster", "farthest"])


def drawn(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def images(seed, batch, count, width=8, *, copies=0, dtype=torch.float64):
    """Unit tokens and places; the first `copies` tokens of each image are the same."""
    tokens = F.normalize(drawn(seed, batch, count, width, dtype=torch.float64), dim=-1)
    coords = torch.rand(batch, count, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    tokens[:, :copies], coords[:, :copies] = tokens[:, :1], coords[:, :1]
    return tokens.to(dtype), coords.to(dtype)


def close(left, right, atol=1e-9):
    torch.testing.assert_close(left, right, atol=atol, rtol=atol)


def group(name, share, law, *strategies):
    """Runs a law over drawn inputs, counted as a group."""
    with survey(f"numerics: {name}") as found:

        @examples(share)
        @given(st.tuples(*strategies))
        def run(values):
            law(*values)
            found.count["cases"] += 1
            found.count["correct"] += 1

        run()


# --- the merge ------------------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 24), st.integers(1, 26))  # B, N, K
EXTREMES = st.tuples(  # gamma, tau, T
    st.sampled_from([0.0, 1e-30, 0.1, 1.0, 1e3, 1e12]),
    st.sampled_from([1e-12, 1e-4, 0.07, 1.0, 1e6, 1e30]),
    st.sampled_from([1, 3, 20]),
)


def test_any_sizes_and_settings_equal_the_naive_loop():
    """K = 1, N = K, N = K + 1 and all about them; gamma and tau at their extremes."""

    def law(seed, sizes, extremes, init):
        batch, count, regions = sizes
        gamma, tau, rounds = extremes
        config = MergeConfig(regions, rounds, gamma, tau, center_init=init)
        tokens, coords = images(seed, batch, count)
        merged = merge_tokens(tokens, coords, config)
        kept = min(count, regions)
        assert merged.tokens.shape == (batch, kept, 8)
        assert merged.mask.all()
        # rounding of float64 in d, blown up by 1 / tau: where that is large, the softmax may fall either way
        slack = 1e-13 * (1 + gamma) / tau
        if slack > 1e-3:
            assert merged.tokens.isfinite().all()
            assert merged.weights.isfinite().all()
            return
        for row in range(batch):
            m, p, w, c = naive_merge(tokens[row], coords[row], config)
            close(merged.weights[row], w.to(w.dtype), 1e-8 + 10 * slack)
            assert torch.equal(merged.assignments[row], c)
            heavy = w.sum(0) > 1e-200
            close(merged.tokens[row][heavy], m[heavy], 1e-7 + 100 * slack)
            close(merged.coords[row][heavy], p[heavy], 1e-7 + 100 * slack)

    group("merge, any sizes and settings", 0.04, law, SEEDS, SIZES, EXTREMES, INITS)


def test_the_shape_of_every_result():
    """Weights of a token sum to 1, vectors are unit or empty, places lie among the tokens', assignments are regions."""

    def law(seed, sizes, extremes, init, half):
        batch, count, regions = sizes
        gamma, tau, rounds = extremes
        config = MergeConfig(regions, rounds, gamma, tau, center_init=init)
        tokens, coords = images(seed, batch, count, dtype=torch.bfloat16 if half else torch.float32)
        merged = merge_tokens(tokens, coords, config)
        assert merged.tokens.dtype == torch.float32
        close(merged.weights.sum(-1), torch.ones(batch, count), 1e-5)
        assert (merged.weights >= 0).all()
        if count > regions:
            norms = merged.tokens.norm(dim=-1)
            assert ((norms - 1).abs().lt(1e-5) | merged.weights.sum(1).lt(1e-30)).all()
            inside = (merged.coords >= coords.float().amin(1, keepdim=True) - 1e-5) & (
                merged.coords <= coords.float().amax(1, keepdim=True) + 1e-5
            )
            assert (inside.all(-1) | merged.weights.sum(1).lt(1e-30)).all()
        assert (merged.assignments >= 0).all()
        assert (merged.assignments < min(count, regions)).all()

    group("merge, shape of results", 0.03, law, SEEDS, SIZES, EXTREMES, INITS, st.booleans())


def test_images_of_a_batch_do_not_see_each_other():
    def law(seed, sizes, init, order):
        batch, count, regions = sizes
        config = MergeConfig(regions, center_init=init)
        tokens, coords = images(seed, batch, count)
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(order))
        merged, moved = merge_tokens(tokens, coords, config), merge_tokens(tokens[order], coords[order], config)
        for name in ("tokens", "coords", "weights"):
            close(getattr(moved, name), getattr(merged, name)[order])
        assert torch.equal(moved.assignments, merged.assignments[order])

    group("merge, order of images", 0.02, law, SEEDS, SIZES, INITS, SEEDS)


def test_padding_anywhere_changes_nothing():
    """Padding before, between and after the tokens, of any content and coordinates."""

    def law(seed, sizes, init, more, junk):
        batch, count, regions = sizes
        config = MergeConfig(regions, center_init=init)
        tokens, coords = images(seed, batch, count)
        generator = torch.Generator().manual_seed(seed)
        wide = torch.full((batch, count + more, 8), junk, dtype=torch.float64)
        where = torch.full((batch, count + more, 2), junk, dtype=torch.float64)
        mask = torch.zeros(batch, count + more, dtype=torch.bool)
        for row in range(batch):
            places = torch.randperm(count + more, generator=generator)[:count].sort().values
            wide[row, places], where[row, places], mask[row, places] = tokens[row], coords[row], True
        merged, padded = merge_tokens(tokens, coords, config), merge_tokens(wide, where, config, mask=mask)
        kept = merged.tokens.shape[1]
        close(padded.tokens[:, :kept], merged.tokens)
        close(padded.coords[:, :kept], merged.coords)
        assert padded.mask[:, :kept].all()
        assert not padded.mask[:, kept:].any()
        close(padded.weights[mask][:, :kept].view(batch, count, kept), merged.weights)
        assert torch.equal(padded.assignments[mask].view(batch, count), merged.assignments)
        assert (padded.assignments[~mask] == -1).all()
        assert (padded.weights[~mask] == 0).all()

    junk = st.sampled_from([0.0, 1.0, -1e30, math.nan, math.inf, -math.inf])
    group("merge, padding", 0.03, law, SEEDS, SIZES, INITS, st.integers(1, 9), junk)


def test_a_rotation_of_the_space_rotates_the_result():
    """Only angles count: an orthogonal map of all tokens maps the merged ones and leaves the assignment."""

    def law(seed, sizes, init):
        batch, count, regions = sizes
        config = MergeConfig(regions, center_init=init)
        tokens, coords = images(seed, batch, count)
        turn = torch.linalg.qr(drawn(seed + 5, 8, 8, dtype=torch.float64)).Q
        merged, turned = merge_tokens(tokens, coords, config), merge_tokens(tokens @ turn, coords, config)
        close(turned.tokens, merged.tokens @ turn, 1e-8)
        close(turned.weights, merged.weights, 1e-8)
        assert torch.equal(turned.assignments, merged.assignments)

    group("merge, rotation", 0.02, law, SEEDS, SIZES, INITS)


def test_shifting_all_places_changes_no_assignment():
    """Only differences of places count; mirrored and shifted grids give the same regions, moved."""

    def law(seed, sizes, init, shift, mirrored):
        batch, count, regions = sizes
        config = MergeConfig(regions, center_init=init, spatial_weight=0.5)
        tokens, coords = images(seed, batch, count)
        other = (1 - coords if mirrored else coords) + shift
        merged, moved = merge_tokens(tokens, coords, config), merge_tokens(tokens, other, config)
        close(moved.weights, merged.weights, 1e-8)
        close(moved.tokens, merged.tokens, 1e-8)
        close(moved.coords, (1 - merged.coords if mirrored else merged.coords) + shift, 1e-8)

    group("merge, places", 0.02, law, SEEDS, SIZES, INITS, st.sampled_from([0.0, 0.25, -3.0]), st.booleans())


def test_distances_and_temperature_scale_together():
    """w = softmax(-d / tau): without places, tokens of half the length at half the temperature weigh the same."""

    def law(seed, count, regions, factor):
        tokens, coords = images(seed, 2, count)
        config = MergeConfig(regions, 1, 0.0, 0.5)
        merged = merge_tokens(tokens, coords, config)
        scaled = merge_tokens(tokens * factor, coords, MergeConfig(regions, 1, 0.0, 0.5 * factor))
        if count > regions:
            close(scaled.weights, merged.weights, 1e-8)
            close(scaled.tokens, merged.tokens, 1e-8)

    group(
        "merge, scale", 0.02, law, SEEDS, st.integers(2, 20), st.integers(1, 9), st.sampled_from([0.125, 0.5, 2.0, 8.0])
    )


def test_equal_tokens_are_treated_equally():
    """Tokens that are the same, place and all, have the same weights; an image of one vector gives that one."""

    def law(seed, sizes, init, copies):
        batch, count, regions = sizes
        config = MergeConfig(regions, center_init=init)
        copies = min(copies, count)
        tokens, coords = images(seed, batch, count, copies=copies)
        merged = merge_tokens(tokens, coords, config)
        if count > regions and copies:
            close(merged.weights[:, :copies], merged.weights[:, :1].expand(-1, copies, -1))
            # centres may be equal too, and rounding then picks among them; what is picked weighs the same
            own = merged.weights.gather(2, merged.assignments[..., None])[:, :copies]
            close(own, own[:, :1].expand_as(own))
        if copies == count:
            close(merged.tokens, tokens[:, :1].expand_as(merged.tokens))
            close(merged.coords, coords[:, :1].expand_as(merged.coords))

    group("merge, equal tokens", 0.03, law, SEEDS, SIZES, INITS, st.integers(0, 30))


def test_one_region_is_the_mean():
    def law(seed, batch, count, init):
        tokens, coords = images(seed, batch, count)
        merged = merge_tokens(tokens, coords, MergeConfig(1, center_init=init))
        close(merged.tokens[:, 0], F.normalize(tokens.sum(1), dim=-1))
        close(merged.coords[:, 0], coords.mean(1))

    group("merge, one region", 0.01, law, SEEDS, st.integers(1, 4), st.integers(1, 30), INITS)


def test_float32_is_close_to_float64():
    """Where no decision is near a tie: at high temperature rounding can only move values by rounding."""

    def law(seed, sizes, init):
        batch, count, regions = sizes
        config = MergeConfig(regions, 1, 0.1, 1.0, center_init=init)
        tokens, coords = images(seed, batch, count, dtype=torch.float32)
        exact = merge_tokens(tokens.double(), coords.double(), config)
        merged = merge_tokens(tokens, coords, config)
        if torch.equal(merged.assignments, exact.assignments):  # else a tie fell the other way
            close(merged.tokens.double(), exact.tokens, 5e-5)
            close(merged.weights.double(), exact.weights, 1e-5)

    group("merge, float32", 0.02, law, SEEDS, SIZES, INITS)


def test_opposite_tokens_cancel_without_nan():
    """v and -v: a region whose sum is nothing gives no NaN, forward or backward."""

    def law(seed, pairs, regions, init):
        tokens, coords = images(seed, 2, pairs)
        both = torch.cat([tokens, -tokens], 1).requires_grad_()
        merged = merge_tokens(both, coords.repeat(1, 2, 1), MergeConfig(regions, center_init=init))
        assert merged.tokens.isfinite().all()
        merged.tokens.sum().backward()
        assert both.grad.isfinite().all()

    group("merge, opposite tokens", 0.02, law, SEEDS, st.integers(1, 8), st.integers(1, 6), INITS)


def test_gradients_of_the_soft_assignment():
    """gradcheck in float64 against the naive formula with centres held, at random sizes and both starts, masked too.

    tests/test_merging.py does this for one size without a mask.
    """
    import samer.merging as merging

    def law(seed, count, regions, init, holes):
        regions = min(regions, count - 1)
        config = MergeConfig(regions, 2, 0.2, 0.3, center_init=init)
        tokens, coords = images(seed, 1, count, 4)
        mask = torch.ones(1, count, dtype=torch.bool)
        mask[:, : min(holes, count - regions - 1)] = False
        centre = merging._cluster
        fixed = tokens.masked_fill(~mask[..., None], 0)
        hold = lambda augmented, *rest: centre(torch.cat([fixed, augmented[..., -3:]], -1), *rest)
        try:
            merging._cluster = hold
            function = lambda v: merge_tokens(v, coords, config, mask=mask).tokens
            assert torch.autograd.gradcheck(function, (tokens.requires_grad_(),), eps=1e-6, atol=1e-5)
        finally:
            merging._cluster = centre

    group("merge, gradcheck", 0.01, law, SEEDS, st.integers(3, 9), st.integers(1, 5), INITS, st.integers(0, 4))


def test_numbers_near_the_end_of_the_range_are_refused_or_right():
    """Tokens of any length: what overflows is refused, nothing comes out as NaN."""

    def law(seed, size, dtype, init):
        tokens, coords = images(seed, 2, 12)
        tokens = (tokens * size).to(dtype)
        try:
            merged = merge_tokens(tokens, coords, MergeConfig(4, center_init=init))
        except InputError:
            assert not tokens.float().isfinite().all() or size > 1e30
            return
        assert merged.tokens.isfinite().all()
        assert merged.weights.isfinite().all()

    sizes = st.sampled_from([1e-45, 1e-30, 1e-12, 1.0, 1e6, 1e15])
    kinds = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
    group("merge, lengths", 0.01, law, SEEDS, sizes, kinds, INITS)


# --- MaxSim ---------------------------------------------------------------------------------------------------------


def batch_of(seed, q, m, i, k, width, dtype):
    queries, pictures = drawn(seed, q, m, width, dtype=dtype), drawn(seed + 1, i, k, width, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 2)
    masks = [torch.rand(shape, generator=generator) > 0.4 for shape in ((q, m), (i, k))]
    for mask in masks:
        mask[torch.arange(len(mask)), torch.randint(mask.shape[1], (len(mask),), generator=generator)] = True
    return F.normalize(queries.float(), dim=-1).to(dtype), F.normalize(pictures.float(), dim=-1).to(dtype), *masks


def naive64(queries, pictures, query_mask, image_mask):
    """float64 by numpy, one pair at a time over valid tokens."""
    left, right = queries.double().numpy(), pictures.double().numpy()
    return torch.from_numpy(
        np.array(
            [
                [(left[a][query_mask[a]] @ right[b][image_mask[b]].T).max(1).mean() for b in range(len(right))]
                for a in range(len(left))
            ]
        )
    )


KINDS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
FIVE = st.tuples(*[st.integers(1, 7)] * 4, st.sampled_from([1, 5, 16, 128]))


def test_maxsim_is_that_of_float64():
    def law(seed, sizes, kind, block):
        *batch, query_mask, image_mask = batch_of(seed, *sizes, kind)
        scores = maxsim(*batch, query_mask, image_mask, block_elements=block)
        error = (scores.double() - naive64(*batch, query_mask.numpy(), image_mask.numpy())).abs().max()
        assert error < (1e-12 if kind == torch.float64 else 2e-6)

    group("maxsim, float64", 0.04, law, SEEDS, FIVE, KINDS, st.sampled_from([None, 1, 7, 1000]))


def test_maxsim_obeys_its_laws():
    """Linear in a query's length; more image tokens never lower a score; the order of anything is no matter."""

    def law(seed, sizes, factor):
        queries, pictures, query_mask, image_mask = batch_of(seed, *sizes, torch.float64)
        scores = maxsim(queries, pictures, query_mask, image_mask)
        close(maxsim(queries * factor, pictures, query_mask, image_mask), scores * factor)
        assert (maxsim(queries, pictures, query_mask, None) >= scores - 1e-12).all()
        close(maxsim(queries, pictures.flip(1), query_mask, image_mask.flip(1)), scores)
        close(maxsim(queries.flip(1), pictures, query_mask.flip(1), image_mask), scores)
        close(maxsim(queries.flip(0), pictures.flip(0), query_mask.flip(0), image_mask.flip(0)), scores.flip(0, 1))
        twice = maxsim(queries, pictures.repeat(1, 2, 1), query_mask, image_mask.repeat(1, 2))
        close(twice, scores)

    group("maxsim, laws", 0.02, law, SEEDS, FIVE, st.sampled_from([1e-6, 0.5, 3.0, 1e6]))


def test_stored_scores_are_within_their_bound_of_float64():
    """Floats to rounding; int8 and signs to half a step of the query's quantisation, whatever the scale."""

    def law(seed, sizes, kind, scale, block):
        q, m, i, k, width = sizes
        width = -(-width // 8) * 8
        queries, pictures, query_mask, image_mask = batch_of(seed, q, m, i, k, width, torch.float32)
        if kind == "int8":
            whole = (pictures * 127 / pictures.abs().max()).round().to(torch.int8)
            stored, values = StoredImages(whole, scale, image_mask), whole.double() * scale
        elif kind == "signs":
            stored = StoredImages(pack_signs(pictures), None, image_mask)
            values = unpack_signs(stored.tokens).double() * width**-0.5
        else:
            stored = StoredImages(pictures.to(kind), None, image_mask)
            values = stored.tokens.double()
        scores = score_stored(QueryTokens(queries, query_mask), stored, block_elements=block)
        exact = naive64(queries, values, query_mask.numpy(), image_mask.numpy())
        step = queries.abs().amax(-1).double() / 127 / 2 if isinstance(kind, str) else torch.zeros(q, m).double()
        longest = values.abs().sum(-1).masked_fill(~image_mask, 0).amax(1)  # (I,)
        mean_step = (step * query_mask).sum(1) / query_mask.sum(1)
        bound = mean_step[:, None] * longest * (1 + 1e-5) + 1e-5 * (1 + longest)
        assert ((scores.double() - exact).abs() <= bound).all()

    kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, "int8", "signs"])
    scales = st.sampled_from([1e-30, 1e-6, 0.0079, 1.0, 1e20])
    group("score_stored, float64", 0.04, law, SEEDS, FIVE, kinds, scales, st.sampled_from([None, 1, 50, 4000]))


def test_quantised_queries_of_any_size():
    """A query token's scale is found at any magnitude, zeros included, and nothing overflows int8."""

    def law(seed, size, count):
        tokens = (drawn(seed, count, 16, dtype=torch.float64) * size).float()
        whole, scale = quantise_rows(tokens)
        assert whole.abs().max() <= 127
        assert scale.isfinite().all()
        assert (scale > 0).all()
        largest = tokens.abs().amax(-1)
        normal = largest >= 127 * torch.finfo(torch.float32).tiny
        assert (whole.abs().amax(-1)[normal] == 127).all()
        error = (whole.double() * scale[:, None].double() - tokens.double()).abs()
        assert (error[normal] <= scale[normal, None].double() * 0.5001).all()

    sizes = st.sampled_from([0.0, 1e-44, 1e-38, 1e-30, 1.0, 1e30, 1e37])
    group("quantised queries", 0.01, law, SEEDS, sizes, st.integers(1, 9))


# --- the loss -------------------------------------------------------------------------------------------------------


def naive_loss(scores, positives, temperature):
    """float64, by numpy, query by query, with the maximum taken out."""
    rows = []
    for row, mask in zip(scores.double().numpy() / temperature, positives.numpy()):
        top = row.max()
        best = row[mask].max()
        rows.append((top + math.log(np.exp(row - top).sum())) - (best + math.log(np.exp(row[mask] - best).sum())))
    return sum(rows) / len(rows)


def pairs(seed, queries, count, spread, share):
    scores = drawn(seed, queries, count, dtype=torch.float64) * spread
    generator = torch.Generator().manual_seed(seed + 1)
    positives = torch.rand(queries, count, generator=generator) < share
    positives[torch.arange(queries), torch.randint(count, (queries,), generator=generator)] = True
    return scores, positives


def test_the_loss_is_that_of_float64():
    """Batches of one, one positive to all positives, any spread and temperature."""

    def law(seed, queries, count, spread, share, temperature, kind):
        scores, positives = pairs(seed, queries, count, spread, share)
        scores = scores.to(kind)
        loss = multi_positive_t2i_loss(scores, positives, temperature)
        exact = naive_loss(scores, positives, temperature)
        size = float(scores.double().abs().max()) / temperature
        assert loss.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
        assert abs(float(loss) - exact) <= (1e-12 if kind == torch.float64 else 4e-7) * (1 + size)
        assert float(loss) >= -1e-6 * (1 + size)
        if positives.all() or count == 1:
            assert float(loss) == 0

    group(
        "loss, float64",
        0.04,
        law,
        SEEDS,
        st.integers(1, 6),
        st.integers(1, 9),
        st.sampled_from([0.0, 1e-3, 1.0, 50.0]),
        st.sampled_from([0.0, 0.3, 1.0]),
        st.sampled_from([1e-3, 0.07, 1.0, 100.0]),
        KINDS,
    )


def test_the_loss_obeys_its_laws():
    """A constant added to a query's scores is no matter, nor is the order; batches of equal size average."""

    def law(seed, queries, count, share, shift):
        scores, positives = pairs(seed, queries, count, 1.0, share)
        loss = multi_positive_t2i_loss(scores, positives)
        close(multi_positive_t2i_loss(scores + shift, positives), loss, 1e-7)
        close(multi_positive_t2i_loss(scores.flip(1), positives.flip(1)), loss)
        alone = [multi_positive_t2i_loss(s[None], p[None]) for s, p in zip(scores, positives)]
        close(torch.stack(alone).mean(), loss)
        close(multi_positive_t2i_loss(scores * 0.5, positives, 0.035), loss)

    shares, shifts = st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([-5.0, 0.0, 1e3])
    group("loss, laws", 0.02, law, SEEDS, st.integers(1, 6), st.integers(1, 9), shares, shifts)


def test_gradients_of_the_loss():
    """gradcheck in float64: batches of one, all positives, any temperature (test_losses.py does one case)."""

    def law(seed, queries, count, share, temperature):
        scores, positives = pairs(seed, queries, count, 1.0, share)
        function = lambda s: multi_positive_t2i_loss(s, positives, temperature)
        assert torch.autograd.gradcheck(function, (scores.requires_grad_(),), atol=1e-6)

    shares, temperatures = st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.07, 1.0])
    group("loss, gradcheck", 0.01, law, SEEDS, st.integers(1, 4), st.integers(1, 6), shares, temperatures)


def test_gradients_of_merge_score_and_loss_together():
    """The chain that training follows, in float64, away from ties: merge with held centres, MaxSim, loss."""
    import samer.merging as merging

    def law(seed, init):
        tokens, coords = images(seed, 3, 7, 4)
        queries = F.normalize(drawn(seed + 9, 3, 2, 4, dtype=torch.float64), dim=-1)
        centre = merging._cluster
        hold = lambda augmented, *rest: centre(torch.cat([tokens.detach(), augmented[..., -3:]], -1), *rest)
        config = MergeConfig(3, 2, 0.1, 0.5, center_init=init)
        truth = torch.eye(3, dtype=torch.bool)

        def chain(v):
            merged = merge_tokens(v, coords, config)
            products = torch.einsum("qmd,ikd->qimk", queries, merged.tokens.detach()).sort(-1).values
            nonlocal near
            near = bool((products[..., -1] - products[..., -2] < 1e-4).any())
            return multi_positive_t2i_loss(maxsim(queries, merged.tokens), truth, 0.5)

        near = False
        try:
            merging._cluster = hold
            chain(tokens)
            if not near:
                assert torch.autograd.gradcheck(chain, (tokens.clone().requires_grad_(),), eps=1e-6, atol=1e-5)
        finally:
            merging._cluster = centre

    group("chain, gradcheck", 0.003, law, SEEDS, INITS)


# --- metrics --------------------------------------------------------------------------------------------------------


def worst_ranks(row, mask):
    """Ranks of a query's positives, best first, each behind every other image that scores as much or more."""
    ranks = []
    for number, place in enumerate(sorted(np.flatnonzero(mask), key=lambda k: -row[k]), start=1):
        ranks.append(number + sum(bool(row[k] >= row[place]) for k in range(len(row)) if not mask[k]))
    return ranks


def test_metrics_with_ties_equal_a_count_of_ranks():
    """Another oracle than test_metrics.py's, by counting instead of sorting; ties everywhere, signed zeros, float16."""

    def law(seed, queries, count, levels, share, kind):
        generator = np.random.default_rng(seed)
        scores = (generator.integers(levels, size=(queries, count)) - levels // 2).astype(kind) * kind(0.125)
        scores[generator.random(scores.shape) < 0.2] *= kind(-1)  # -0.0 ties with 0.0
        positives = generator.random(scores.shape) < share
        positives[np.arange(queries), generator.integers(count, size=queries)] = True
        found = query_metrics(scores, positives)
        for q in range(queries):
            ranks = worst_ranks(scores[q].astype(float), positives[q])
            assert found["median_rank"][q] == ranks[0]
            for k in (1, 5, 10):
                assert found[f"r@{k}"][q] == 100 * (ranks[0] <= k)
            assert found["mrr@10"][q] == pytest.approx(100 / ranks[0] if ranks[0] <= 10 else 0)
            for k in (5, 10):
                gain = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= k)
                ideal = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(ranks))))
                assert found[f"ndcg@{k}"][q] == pytest.approx(100 * gain / ideal)

    group(
        "metrics, ties",
        0.03,
        law,
        SEEDS,
        st.integers(1, 4),
        st.integers(1, 30),
        st.sampled_from([1, 2, 5, 50]),
        st.sampled_from([0.0, 0.2, 1.0]),
        st.sampled_from([np.float16, np.float32, np.float64]),
    )
