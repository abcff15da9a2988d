"""Smaller budgets out of a larger one, against a plain loop over pairs."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from samer.budgets import smaller_budgets


def images(count, width, dim, seed, short=True):
    generator = torch.Generator().manual_seed(seed)
    tokens = normalize(torch.randn(count, width, dim, generator=generator), dim=-1)
    mass = torch.randint(1, 9, (count, width), generator=generator).float()
    lengths = torch.randint(1, width + 1, (count,), generator=generator) if short else torch.full((count,), width)
    mask = torch.arange(width) < lengths[:, None]
    return tokens * mask[..., None], mask, mass


def naive(tokens, mass, budget):
    """Clusters of one image's vectors as lists of numbers, in the order of their first."""
    sums = [m * v for m, v in zip(mass.double(), tokens.double())]
    clusters = [[k] for k in range(len(tokens))]
    while len(clusters) > budget:
        cost = {
            (a, b): float(sums[a].norm() + sums[b].norm() - (sums[a] + sums[b]).norm())
            for a, b in itertools.combinations(range(len(clusters)), 2)
        }
        a, b = min(cost, key=cost.get)
        sums[a], clusters[a] = sums[a] + sums[b], clusters[a] + clusters[b]
        del sums[b], clusters[b]
    return clusters, normalize(torch.stack(sums), dim=-1)


@given(st.integers(2, 7), st.integers(1, 70), st.integers(0, 1000))
def test_levels_are_those_of_the_greedy_tree(width, count, seed):
    tokens, mask, mass = images(count, width, 5, seed)
    budgets = [b for b in (5, 3, 1) if b < width]
    for budget, (found, here) in zip(budgets, smaller_budgets(tokens, mask, mass, budgets)):
        assert found.shape == (count, budget, 5)
        for row in {0, count // 2, count - 1}:
            own = mask[row]
            _, expected = naive(tokens[row][own], mass[row][own], budget)
            assert int(here[row].sum()) == len(expected)
            torch.testing.assert_close(found[row][here[row]].double(), expected, atol=1e-5, rtol=0)
            assert (found[row][~here[row]] == 0).all()


def test_equal_vectors_join_first_whatever_they_weigh():
    tokens = normalize(torch.tensor([[[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]]), dim=-1)
    mask = torch.ones(1, 5, dtype=torch.bool)
    ((found, here),) = smaller_budgets(tokens, mask, torch.tensor([[9.0, 1, 2, 5, 70]]), [3])
    assert here.all()
    torch.testing.assert_close(found[0], torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]))


def test_a_heavy_vector_hardly_moves():
    tokens = normalize(torch.tensor([[[1.0, 0.3], [0.3, 1.0]]]), dim=-1)
    mask = torch.ones(1, 2, dtype=torch.bool)
    ((even, _),) = smaller_budgets(tokens, mask, None, [1])
    ((heavy, _),) = smaller_budgets(tokens, mask, torch.tensor([[1000.0, 1]]), [1])
    torch.testing.assert_close(even[0, 0], torch.full((2,), 0.5**0.5))
    assert float(heavy[0, 0] @ tokens[0, 0]) > 0.9999


def test_levels_nest():
    tokens, mask, mass = images(20, 12, 6, 3, short=False)
    (eight, _), (three, _) = smaller_budgets(tokens, mask, mass, [8, 3])
    ((alone, _),) = smaller_budgets(tokens, mask, mass, [3])
    torch.testing.assert_close(three, alone)
    assert not torch.allclose(eight[:, :3], three)


@pytest.mark.parametrize("budget", [4, 9])
def test_an_image_that_has_as_few_keeps_what_it_has(budget):
    tokens, mask, mass = images(5, 4, 6, 2)
    ((found, here),) = smaller_budgets(tokens, mask, mass, [budget])
    assert torch.equal(here, mask)
    torch.testing.assert_close(found, tokens)
