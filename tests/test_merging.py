"""The operator against a naive loop: with and without labels and masks, forward and backward."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from oracle import naive_merge

from samer.config import InputError
from samer.coords import visual_coords
from samer.merging import MergeConfig, merge_tokens

GRIDS = {5: (1, 5, 0), 64: (8, 8, 0), 262: (16, 16, 6), 729: (27, 27, 0), 1030: (32, 32, 6)}


def scene_tokens(batch, n, dim=32, seed=0, dtype=torch.float32):
    """Tokens with structure: a smooth field over the grid plus noise, unit norm."""
    generator = torch.Generator().manual_seed(seed)
    height, width, extra = GRIDS[n]
    coords = visual_coords(height, width, prompt_tokens=extra)
    basis = torch.randn(batch, 2, dim, generator=generator)
    tokens = torch.sin(3 * coords @ basis) + 0.7 * torch.randn(batch, n, dim, generator=generator)
    return F.normalize(tokens, dim=-1).to(dtype), coords.to(dtype)


def scene_labels(batch, n, seed=0):
    generator = torch.Generator().manual_seed(seed + 100)
    labels = torch.zeros(batch, n, dtype=torch.long)
    for row in range(batch):
        for label in range(1, 4):
            start = int(torch.randint(0, n, (1,), generator=generator))
            labels[row, start : start + max(1, n // 9)] = label
    return labels


@pytest.mark.parametrize("n", sorted(GRIDS))
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("center_init", ["raster", "farthest"])
def test_equals_the_naive_loop(n, with_labels, center_init):
    config = MergeConfig(num_regions=16 if n <= 262 else 32, center_init=center_init)
    if center_init == "farthest" and n > 262:
        config = dataclasses.replace(config, num_regions=6)  # the oracle's cost grows with K squared
    tokens, coords = scene_tokens(2, n)
    labels = scene_labels(2, n) if with_labels else None
    probe = torch.randn(2, min(config.num_regions, n), 32, generator=torch.Generator().manual_seed(5))
    ours = tokens.clone().requires_grad_()
    merged = merge_tokens(ours, coords, config, instance_labels=labels)
    (merged.tokens * probe).sum().backward()
    for row in range(2):
        theirs = tokens[row].clone().requires_grad_()
        m, p, w, c = naive_merge(theirs, coords, config, None if labels is None else labels[row])
        (m * probe[row]).sum().backward()
        torch.testing.assert_close(merged.tokens[row], m, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged.coords[row], p, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged.weights[row], w, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.grad[row], theirs.grad, atol=1e-5, rtol=1e-4)
        assert torch.equal(merged.assignments[row], c)
    assert merged.mask.all()


@pytest.mark.parametrize("center_init", ["raster", "farthest"])
@pytest.mark.parametrize("with_labels", [False, True])
def test_padded_batch_equals_single_images(center_init, with_labels):
    config = MergeConfig(num_regions=16, center_init=center_init)
    lengths = [262, 5, 17, 16, 100]
    tokens, coords = scene_tokens(5, 262)
    coords = coords.expand(5, -1, -1).clone()
    labels = scene_labels(5, 262)
    mask = torch.arange(262) < torch.tensor(lengths)[:, None]
    dirty = tokens.clone()
    dirty[~mask] = float("nan")  # what padding holds must not matter, nor leak into gradients
    dirty_coords = coords.clone()
    dirty_coords[~mask] = float("inf")
    dirty.requires_grad_()
    out = merge_tokens(dirty, dirty_coords, config, mask=mask, instance_labels=labels if with_labels else None)
    probe = torch.randn(5, 16, 32, generator=torch.Generator().manual_seed(1))
    (out.tokens * probe).sum().backward()
    assert torch.isfinite(dirty.grad).all()
    for row, n in enumerate(lengths):
        alone = tokens[row : row + 1, :n].clone().requires_grad_()
        one = merge_tokens(
            alone, coords[row, :n], config, instance_labels=labels[row : row + 1, :n] if with_labels else None
        )
        k = min(n, 16)
        assert out.mask[row].sum() == k == one.mask.sum()
        assert out.mask[row, :k].all()
        torch.testing.assert_close(out.tokens[row, :k], one.tokens[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(out.coords[row, :k], one.coords[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(out.weights[row, :n, :k], one.weights[0], atol=1e-5, rtol=0)
        assert torch.equal(out.assignments[row, :n], one.assignments[0])
        assert (out.assignments[row, n:] == -1).all()
        assert (out.weights[row, n:] == 0).all()
        assert (out.tokens[row, k:] == 0).all()
        (one.tokens * probe[row, :k]).sum().backward()
        torch.testing.assert_close(dirty.grad[row, :n], alone.grad[0], atol=1e-5, rtol=1e-4)
        assert (dirty.grad[row, n:] == 0).all()


def test_a_mask_with_holes_equals_the_compacted_image():
    tokens, coords = scene_tokens(1, 262)
    mask = torch.rand(1, 262, generator=torch.Generator().manual_seed(3)) < 0.6
    config = MergeConfig(num_regions=16)
    out = merge_tokens(tokens, coords, config, mask=mask)
    m, _, w, c = naive_merge(tokens[0, mask[0]], coords[mask[0]], config)
    torch.testing.assert_close(out.tokens[0], m, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.weights[0, mask[0]], w, atol=1e-5, rtol=0)
    assert torch.equal(out.assignments[0, mask[0]], c)


def test_few_tokens_are_returned_as_they_are():
    tokens, coords = scene_tokens(3, 64)
    for k in (64, 65, 1000):
        out = merge_tokens(tokens, coords, MergeConfig(num_regions=k))
        assert torch.equal(out.tokens, tokens)
        assert torch.equal(out.weights, torch.eye(64).expand(3, -1, -1))
        assert torch.equal(out.assignments, torch.arange(64).expand(3, -1))
        assert out.mask.all()


def test_labels_push_clusters_apart():
    tokens, coords = scene_tokens(1, 262)
    labels = scene_labels(1, 262)
    free = merge_tokens(tokens, coords, MergeConfig(num_regions=16))
    biased = merge_tokens(tokens, coords, MergeConfig(num_regions=16), instance_labels=labels)
    off = merge_tokens(tokens, coords, MergeConfig(num_regions=16, object_penalty=0.0), instance_labels=labels)
    assert torch.equal(free.assignments, biased.assignments)  # the clustering stays box-free
    assert torch.equal(free.tokens, off.tokens)
    assert not torch.allclose(free.weights, biased.weights, atol=1e-2)


def test_background_only_changes_nothing_but_empty_clusters():
    """One label everywhere: every non-empty cluster is pure, so the penalty is the same for all of them."""
    tokens, coords = scene_tokens(1, 262)
    config = MergeConfig(num_regions=8)
    free = merge_tokens(tokens, coords, config)
    flat = merge_tokens(tokens, coords, config, instance_labels=torch.zeros(1, 262, dtype=torch.long))
    assert len(free.assignments.unique()) == 8  # none is empty here
    torch.testing.assert_close(free.tokens, flat.tokens, atol=1e-5, rtol=0)


def test_half_precision_input_is_computed_in_float32():
    tokens, coords = scene_tokens(1, 262)
    half = tokens.to(torch.bfloat16)
    out = merge_tokens(half, coords.to(torch.bfloat16), MergeConfig(num_regions=16))
    same = merge_tokens(half.float(), coords.to(torch.bfloat16).float(), MergeConfig(num_regions=16))
    assert out.tokens.dtype == torch.float32
    assert torch.equal(out.tokens, same.tokens)
    with torch.autocast("cpu", torch.bfloat16):
        cast = merge_tokens(half, coords.to(torch.bfloat16), MergeConfig(num_regions=16))
    assert torch.equal(cast.tokens, same.tokens)


@pytest.mark.parametrize("with_labels", [False, True])
def test_gradcheck_in_float64(with_labels):
    tokens, coords = scene_tokens(2, 64, dim=6, dtype=torch.float64)
    labels = scene_labels(2, 64) if with_labels else None
    config = MergeConfig(num_regions=7)
    merge_tokens(tokens, coords, config)  # float64 in, float64 out
    # centres are constants of the gradient: hold them by a clustering that small steps do not change
    function = lambda v: _merge_with_fixed_centres(v, tokens, coords, config, labels)
    assert torch.autograd.gradcheck(function, tokens.clone().requires_grad_(), eps=1e-7, atol=1e-5)


def _merge_with_fixed_centres(variable, fixed, coords, config, labels):
    """The gradient that METHOD asks for is the one with centres constant; finite differences must see it so."""
    import samer.merging as merging

    original = merging._cluster
    held = lambda augmented: torch.cat([fixed, augmented[..., -3:].detach()], dim=-1)
    merging._cluster = lambda augmented, *more: original(held(augmented), *more)
    try:
        return merge_tokens(variable, coords, config, instance_labels=labels).tokens
    finally:
        merging._cluster = original


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_regions": 0}, "merge.num_regions must be at least 1"),
        ({"cluster_iters": 0}, "merge.cluster_iters"),
        ({"assignment_temperature": 0.0}, "merge.assignment_temperature"),
        ({"spatial_weight": -1.0}, "merge.spatial_weight"),
        ({"center_init": "random"}, "'raster' or 'farthest'"),
    ],
)
def test_bad_settings_are_refused_by_name(change, words):
    with pytest.raises(InputError, match=words):
        MergeConfig(**change)


def test_bad_tensors_are_refused():
    tokens, coords = scene_tokens(2, 64)
    config = MergeConfig(num_regions=8)
    broken = tokens.clone()
    broken[1, 3, 0] = float("nan")
    with pytest.raises(InputError, match="image 1 of the batch has NaN"):
        merge_tokens(broken, coords, config)
    with pytest.raises(InputError, match="no valid token"):
        merge_tokens(tokens, coords, config, mask=torch.tensor([[True], [False]]).expand(2, 64))
    with pytest.raises(InputError, match="coords of shape"):
        merge_tokens(tokens, coords[:5], config)
    with pytest.raises(InputError, match="mask of shape"):
        merge_tokens(tokens, coords, config, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(InputError, match="must be >= 0"):
        merge_tokens(tokens, coords, config, instance_labels=torch.full((2, 64), -1))
    with pytest.raises(InputError, match="at least one token"):
        merge_tokens(tokens[:, :0], coords[:0], config)


@pytest.mark.parametrize("init", ["raster", "farthest"])
def test_an_empty_cluster_keeps_its_centre(init):
    """Four centres on three distinct tokens: two are the same, the later one is empty, and both share the weights."""
    config = MergeConfig(num_regions=4, cluster_iters=3, spatial_weight=0.0, center_init=init)
    distinct = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(4)), dim=-1)
    tokens, coords = distinct[[0, 0, 1, 1, 2, 2, 0, 1]].double(), torch.rand(8, 2).double()
    expected = naive_merge(tokens, coords, config)
    found = merge_tokens(tokens[None], coords[None], config)
    assert (found.assignments[0][:, None] == torch.arange(4)).any(0).sum() == 3  # one is empty
    for ours, theirs in zip((found.tokens, found.coords, found.weights, found.assignments), expected):
        torch.testing.assert_close(ours[0], theirs)
    assert (found.weights[0] > 0.4).sum(1).max() == 2
