"""Merging chosen tokens into others, batched: what ToMe and AdaMerge share.

Shape letters: B images, N tokens, D width, r how many tokens of an image are merged away."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
) -> tuple[Tensor, Tensor, Tensor]:
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
        y (B, n, D), survivors in their order, n of the image with the most, 0 behind them; mask (B, n); source (B, N)
        long, the place in `y` of each token, -1 at padding.
    """
    many = int(r.max()) if len(r) else 0
    places = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    moved = score.argsort(dim=1, descending=True, stable=True)[:, :many]  # (B, many)
    used = torch.arange(many, device=x.device) < r[:, None]
    removed = torch.zeros_like(mask).scatter_(1, moved, used)
    target = torch.where(removed, best, places)
    kept = ~removed & mask
    number = kept.sum(1)
    width = int(number.max()) if len(r) else 0
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]  # (B, n)
    source = (kept.cumsum(1) - 1).gather(1, target)
    own, share = _shares(weights.to(torch.promote_types(x.dtype, torch.float32)), target, moved, used)
    # a token on its own has the share 1, which leaves it bit by bit as it is
    survivors = x.gather(1, order[..., None].expand(-1, -1, x.shape[2])) * own.gather(1, order)[..., None]
    parts = x.gather(1, moved[..., None].expand(-1, -1, x.shape[2])) * share[..., None]
    rows = torch.arange(len(x), device=x.device)[:, None] * width
    to = (source.gather(1, moved) + rows).flatten()
    y = survivors.flatten(0, 1).index_add(0, to, parts.flatten(0, 1)).view(survivors.shape).to(x.dtype)
    after = torch.arange(width, device=x.device) < number[:, None]
    if int(number.min() if len(r) else 0) < width:
        y = torch.where(after[..., None], y, 0)
    return y, after, source.masked_fill(~mask, -1)


def _shares(weights: Tensor, target: Tensor, moved: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """What each token has of the mean it is in: of survivors (B, N), and of those moved (B, many), 0 if not `used`."""
    to = target.gather(1, moved)
    total = weights.scatter_add(1, to, weights.gather(1, moved) * used)
    count = torch.ones_like(weights).scatter_add(1, to, used.to(weights.dtype))
    plain = total == 0  # a group without weight: each token counts once
    whole = torch.where(plain, count, total)
    own = torch.where(plain, 1, weights) / whole
    part = torch.where(plain.gather(1, to), 1, weights.gather(1, moved)) / whole.gather(1, to)
    return own, part * used


def padded(y: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`y` (B, n, D) and its mask (B, n) with padding behind, n made `count`."""
    missing = count - y.shape[1]
    return F.pad(y, (0, 0, 0, missing)), F.pad(mask, (0, missing))
