"""Merging chosen tokens into others, batched: what ToMe and AdaMerge share.

Shape letters: B images, N tokens, D width, r how many tokens of an image are merged away."""

from __future__ import annotations

import torch
from torch import Tensor

from samer.config import InputError


def check_r(r: Tensor, most: Tensor, what: str) -> None:
    """Refuses an r below 0 or above what the tokens allow.

    Args:
        r: (B,) long.
        most: (B,) long, the largest possible.
        what: the tokens that can be merged, in words.

    Raises:
        InputError: names the image by its row.
    """
    if r.dtype != torch.long or r.shape != most.shape:
        raise InputError(f"r must be ({len(most)},) long, one number an image; it is {tuple(r.shape)} {r.dtype}")
    wrong = ((r < 0) | (r > most)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"r is {int(r[row])} for image {row} of the batch; its {what} allow 0 to {int(most[row])}, so take less"
        )


def merge_pairs(
    x: Tensor, weights: Tensor, best: Tensor, score: Tensor, r: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merges the r best tokens of each image into their destinations, by a weighted mean over all that go to one.

    A destination is never a source: the two sets are apart. Where the weights of a group sum to 0 it is the plain mean.
    A token that nothing is merged into stays as it is, bit by bit.

    Args:
        x: (B, N, D).
        weights: (B, N), not negative.
        best: (B, N) long, the destination of each source; anything at other tokens.
        score: (B, N), higher goes first, the earlier token where two are equal; -inf at what is no source.
        r: (B,) long, at most the number of sources.
        mask: (B, N) bool, real tokens.

    Returns:
        y (B, N, D), survivors in their order, 0 behind them; their weights (B, N), summed; mask (B, N); source (B, N)
        long, the place in `y` of each token, -1 at padding.
    """
    many = int(r.max()) if len(r) else 0
    places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    order = score.argsort(dim=1, descending=True, stable=True)[:, :many]  # (B, many)
    used = torch.arange(many, device=x.device) < r[:, None]
    removed = torch.zeros_like(mask).scatter_(1, order, used)
    target = torch.where(removed, best, places)
    to = target.gather(1, order)
    exact = torch.promote_types(x.dtype, torch.float32)
    weights = weights.to(exact)
    share = weights.gather(1, order) * used
    total = weights.scatter_add(1, to, share)
    count = torch.ones_like(weights).scatter_add(1, to, used.to(exact))
    plain = total == 0
    # in a group without weight every token counts once
    own = torch.where(plain, torch.ones_like(weights), weights)
    share = torch.where(plain.gather(1, to), used.to(exact), share)
    rows = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    moved = x.gather(1, order[..., None].expand(-1, -1, x.shape[2])).to(exact) * share[..., None]
    sums = (x.to(exact) * own[..., None]).flatten(0, 1).index_add(0, (to + rows).flatten(), moved.flatten(0, 1))
    merged = sums.view(x.shape) / torch.where(plain, count, total)[..., None]
    y = torch.where((count > 1)[..., None], merged.to(x.dtype), x)
    return *packed(y, total, ~removed & mask), placed(target, ~removed & mask, mask)


def packed(x: Tensor, weights: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kept tokens (B, N, D), their weights (B, N) in front and in order, 0 behind, and the mask (B, N) of them."""
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    mask = torch.arange(kept.shape[1], device=kept.device) < kept.sum(1)[:, None]
    tokens = x.gather(1, order[..., None].expand_as(x))
    return torch.where(mask[..., None], tokens, 0), torch.where(mask, weights.gather(1, order), 0), mask


def placed(target: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    """Where each token's target (B, N) stands among the kept ones; -1 at padding."""
    return (kept.cumsum(1) - 1).gather(1, target).masked_fill(~mask, -1)
