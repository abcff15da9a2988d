"""Which patch tokens a text keeps of a picture, and what they are merged into.

Shape letters: T texts, I pictures, t is T, or 1 where no text matters, N tokens, K merged vectors, d embedding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HIGHEST, LOWEST = 60.0, -87.0  # a vector's greatest logit is moved to, and the least told apart: e^88 is float32's end
STEEPEST = 20.0  # exponent of a dropped token's weight, which counts for the decisions' gradient only
LEAST_SHARE = 1e-4  # a draw's probability is that far from 0 and 1


def kept(tokens: int, sparse_ratio: float) -> int:
    """ceil(rho N)."""
    return math.ceil(sparse_ratio * tokens - 1e-9)


def merged_count(tokens: int, sparse_ratio: float, aggr_ratio: float) -> int:
    """int(N aggr rho), but 1 at least."""
    return max(1, int(tokens * aggr_ratio * sparse_ratio + 1e-9))


def pooled(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of the tokens (B, N, d) that the mask (B, N) has, (B, d)."""
    if mask is None:
        return tokens.mean(1)
    weights = mask.to(tokens.dtype)[..., None]
    return (tokens * weights).sum(1) / weights.sum(1)


def guided(tokens: Tensor, guide: Tensor, *, of_images: bool) -> Tensor:
    """Products of tokens (I, N, d) with a vector per text (T, d), (T, I, N); or with their picture's, (1, I, N)."""
    if of_images:
        return (tokens @ guide[..., None])[..., 0][None]
    return (tokens @ guide.T).permute(2, 0, 1)


def code_scores(tokens: Tensor, guide: Tensor, *, of_images: bool = False) -> Tensor:
    """Scores of the released code, (t, I, N): cosine with the picture's mean + cosine with the guide."""
    unit = F.normalize(tokens, dim=-1)
    own = guided(unit, F.normalize(pooled(tokens), dim=-1), of_images=True)
    return own + guided(unit, F.normalize(guide, dim=-1), of_images=of_images)


def stretched(scores: Tensor) -> Tensor:
    """Min-max over the tokens, to [0, 1]; 0 where all are equal."""
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return (scores - low) / (high - low).clamp(min=1e-9)


def paper_scores(
    tokens: Tensor, predicted: Tensor, sparse: Tensor, dense: Tensor | None, beta: float, *, of_images: bool = False
) -> Tensor:
    """Scores of the paper as a share of their greatest value, (T, I, N) in [0, 1].

    Args:
        tokens: (I, N, d).
        predicted: s_p, (I, N).
        sparse: the means of the texts, (T, d).
        dense: of the dense texts, (T, d), or with `of_images` (I, d); None: without s_dt.
        beta: the weights' one parameter. They add up to 1 + 2 beta, without dense text to 1 + beta.
    """
    own = stretched(guided(tokens, pooled(tokens), of_images=True))
    total = stretched(guided(tokens, sparse, of_images=False)) + 2 * own
    if dense is not None:
        total = total + stretched(guided(tokens, dense, of_images=of_images))
    return ((1 - 2 * beta) * predicted[None] + beta * total) / (1 + (1 if dense is None else 2) * beta)


def best(scores: Tensor, keep: int) -> Tensor:
    """1 for the `keep` highest of the last dimension, else 0; the first of equals."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return torch.zeros_like(scores).scatter(-1, order, 1.0)


def drawn(shares: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Decisions 0 or 1 by Gumbel-sigmoid, straight through: the gradient is that of the soft decision.

    Two classes' Gumbel noise differs by logistic noise. The best token is kept whatever the draw, so that one is left.

    Args:
        shares: probabilities, (T, I, N).
        noise: logistic, of the same shape.
    """
    shares = shares.clamp(LEAST_SHARE, 1 - LEAST_SHARE)
    soft = ((shares.log() - (-shares).log1p() + noise) / temperature).sigmoid()
    hard = torch.maximum((soft > 0.5).to(soft.dtype), best(shares.detach(), 1))
    return hard + soft - soft.detach()


def fused(tokens: Tensor, scores: Tensor, decisions: Tensor) -> Tensor:
    """The dropped tokens' mean weighted by softmax of their scores, (t, I, d)."""
    weights = scores.masked_fill(decisions > 0, -math.inf).softmax(-1)
    return (weights.transpose(0, 1) @ tokens).transpose(0, 1)


def aggregate(tokens: Tensor, logits: Tensor, decisions: Tensor) -> Tensor:
    """Kept tokens weighted by softmax over them, (t, I, K, d).

    Args:
        tokens: (I, N, d).
        logits: (I, N, K).
        decisions: (t, I, N), 1 kept, 0 dropped, with a gradient or without.
    """
    if not decisions.requires_grad:
        return _aggregate_decided(tokens, logits, decisions)
    logits = logits.transpose(1, 2)[None]  # (1, I, K, N)
    decisions = decisions[:, :, None]
    top = logits.detach().masked_fill(decisions.detach() <= 0, -math.inf).amax(-1, keepdim=True)
    weights = (logits - top).clamp(max=STEEPEST).exp() * decisions
    weights = weights / weights.sum(-1, keepdim=True)  # (t, I, K, N)
    t, images, count, width = weights.shape
    flat = weights.transpose(0, 1).reshape(images, t * count, width)
    return (flat @ tokens).reshape(images, t, count, -1).transpose(0, 1)


def _aggregate_decided(tokens: Tensor, logits: Tensor, decisions: Tensor) -> Tensor:
    """As `aggregate`, of decisions without a gradient: exponentials once for a picture, not for every pair.

    What is kept does not vanish beside a dropped token's, as long as 147 is not between their logits.
    """
    logits = logits.transpose(1, 2)  # (I, K, N)
    top = logits.detach().amax(-1, keepdim=True)
    decisions = decisions.transpose(0, 1).contiguous()  # (I, t, N), in the order in which they are multiplied
    weights = (logits - top + HIGHEST).clamp(min=LOWEST).exp()[:, None] * decisions[:, :, None]
    t, count = weights.shape[1:3]
    summed = weights.flatten(1, 2) @ F.pad(tokens, (0, 1), value=1.0)  # the last column: the sum of the weights
    return (summed[..., :-1] / summed[..., -1:]).unflatten(1, (t, count)).transpose(0, 1)
