"""Smaller budgets out of a larger one: the vectors of an image merged pair by pair, so that one index serves all.

Ward's tree (1963) in its form for unit vectors: what is joined next are the two clusters whose joining costs least of
the sum of lengths |m_1 v_1 + m_2 v_2 + ...|, where m is how many patches a vector stands for. That sum is what
spherical k-means raises, so each level of the tree is a partition like the one that a merge to so few would look for.
Levels nest: a vector of a smaller budget stands for whole vectors of the larger.

Shape letters: n images, K vectors, D embedding, B a smaller budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_IMAGES = 64  # merged at a time: what is looked at of them, n x K x K, fits a cache


@torch.no_grad()
def smaller_budgets(
    tokens: Tensor, mask: Tensor, mass: Tensor | None, budgets: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Each image's vectors at smaller budgets; one that has as few keeps those that it has.

    Args:
        tokens: (n, K, D), of any length; directions count.
        mask: (n, K) bool, False where an image has fewer vectors.
        mass: (n, K), what each vector stands for, positive where `mask` is True; None: all for the same.
        budgets: falling, each at least 1.

    Returns:
        Per budget tokens (n, min(B, K), D) of unit norm, 0 where missing, and mask (n, min(B, K)).
    """
    mass = torch.ones(mask.shape) if mass is None else mass
    rows = zip(tokens.split(_IMAGES), mask.split(_IMAGES), mass.split(_IMAGES))
    found = [_block(*block, budgets) for block in rows]
    return [tuple(torch.cat(part) for part in zip(*level)) for level in zip(*found)]


def _block(tokens: Tensor, mask: Tensor, mass: Tensor, budgets: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    count, width = mask.shape
    weight = (mass * mask).double()[..., None]
    sums = F.normalize(tokens.double(), dim=-1) * weight
    gram = sums @ sums.transpose(1, 2)  # (n, K, K)
    here = mask.clone()
    owner = torch.arange(width).repeat(count, 1)  # (n, K), the cluster of every vector, named by its first
    levels = []
    for budget in budgets:
        for _ in range(max(0, min(width, int(here.sum(1).max())) - budget)):
            _join(gram, here, owner, budget)
        levels.append(_level(sums, here, owner, min(budget, width)))
    return levels


def _join(gram: Tensor, here: Tensor, owner: Tensor, budget: int) -> None:
    """Joins the two nearest clusters of each image that has more than `budget`; in place.

    Args:
        gram: (n, K, K), products of the clusters' sums.
        here: (n, K) bool, True at clusters.
        owner: (n, K).
    """
    todo = (here.sum(1) > budget).nonzero()[:, 0]
    count, width = len(todo), gram.shape[1]
    own, live = gram[todo], here[todo]
    squares = own.diagonal(dim1=1, dim2=2)
    lengths = squares.clamp(min=0).sqrt()
    together = squares[:, :, None] + squares[:, None] + 2 * own
    loss = lengths[:, :, None] + lengths[:, None] - together.clamp(min=0).sqrt()
    pairs = (live[:, :, None] & live[:, None]).triu(1)
    first = loss.masked_fill(~pairs, float("inf")).flatten(1).argmin(1)
    left, right = first // width, first % width
    rows = torch.arange(count)
    own[rows, left] += own[rows, right]
    own[rows, :, left] += own[rows, :, right]
    gram[todo] = own
    here[todo, right] = False
    owner[todo] = torch.where(owner[todo] == right[:, None], left[:, None], owner[todo])


def _level(sums: Tensor, here: Tensor, owner: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Vectors of the clusters, (n, B, D) float32 of unit norm, in the order of their first vectors, and their mask."""
    place = (here.long().cumsum(1) - 1).gather(1, owner).clamp(0, budget - 1)  # (n, K)
    found = torch.zeros(len(sums), budget, sums.shape[2], dtype=sums.dtype)
    found.scatter_add_(1, place[..., None].expand_as(sums), sums)
    mask = torch.arange(budget) < here.sum(1, keepdim=True)
    return F.normalize(found, dim=-1).float() * mask[..., None], mask
