"""ToMe's bipartite soft matching (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023), the baseline.

Tokens at even places are set A, those at odd places set B; every token of A finds its most similar one in B, by the
cosine of the attention's keys (mean over heads, before any rotation); the r most similar pairs merge, weighted by how
many patches each token holds. Attention then counts a token as often as it holds patches: log(size) is added to its
logits.

OURS: special tokens are set aside before, so that the first patch is even; the published code counts them along and
protects them. Survivors stay in their order, where that code puts A before B; attention does not see the difference.

Shape letters: B images, N tokens, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from samer.config import InputError
from samer.reducers.base import Reducer, Tokens
from samer.reducers.pairs import check_r, merge_pairs, padded


def merge_step(
    x: Tensor, r: Tensor, sizes: Tensor | None = None, *, metric: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer's merge.

    Args:
        x: (B, N, D), patch tokens.
        r: (B,) long, tokens to merge away, at most N // 2.
        sizes: (B, N), patches in each token; None: one.
        metric: (B, N, any), what similarity is measured on; None: `x`.

    Returns:
        y (B, N, D), survivors in their order, padding masked; mask (B, N); source (B, N) long, the place in `y` that
        each token went to; sizes (B, N), 0 at padding.

    Raises:
        InputError: r beyond the number of tokens that can be merged.
    """
    check_r(r, torch.full((len(x),), x.shape[1] // 2, device=r.device), f"{x.shape[1]} tokens")
    sizes = torch.ones(x.shape[:2], device=x.device) if sizes is None else sizes
    y, mask, source = _merged(x, r, sizes, x if metric is None else metric)
    after = torch.zeros_like(sizes).scatter_add(1, source, sizes)
    return *padded(y, mask, x.shape[1]), source, after


def _merged(x: Tensor, r: Tensor, sizes: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `merge_pairs`."""
    unit = F.normalize(unit.to(torch.promote_types(unit.dtype, torch.float32)), dim=-1)
    score = torch.full(x.shape[:2], -torch.inf, dtype=unit.dtype, device=x.device)
    best = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    if x.shape[1] > 1:
        similar, nearest = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)  # (B, ceil(N / 2))
        score[:, ::2], best[:, ::2] = similar, 2 * nearest + 1
    return merge_pairs(x, sizes, best, score, r, torch.ones_like(best, dtype=torch.bool))


class ToMe(Reducer):
    """The same r in every block, between attention and MLP."""

    between = True
    proportional = True

    def step(self, layer: int, x: Tensor, tokens: Tokens, keys: Tensor | None) -> Tensor:
        """As `Reducer.step`; a share is one of the picture's patches.

        Raises:
            InputError: r beyond the number of tokens that are left at this block.
        """
        r = self.amount(tokens.source.shape[1])
        if r > x.shape[1] // 2:
            raise InputError(
                f"reduce.r={self.settings.r:g} merges {r} tokens a block; block {layer} has {x.shape[1]}, of which "
                f"{x.shape[1] // 2} can merge: take less"
            )
        many = torch.full((len(x),), r, device=x.device)
        y, _, source = _merged(x, many, tokens.sizes, keys)
        tokens.merge(source, y.shape[1])
        return y
