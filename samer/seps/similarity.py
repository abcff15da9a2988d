"""How alike the words of a text and the merged vectors of a picture are, and the losses of a batch.

Shape letters: T texts, I pictures, t is T, or 1 where no text matters, M words, K vectors, d embedding."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def alike(words: Tensor, vectors: Tensor) -> Tensor:
    """Cosines of words (T, M, d) with vectors (t, I, K, d), (T, I, M, K)."""
    words = F.normalize(words, dim=-1)
    lengths = vectors.norm(dim=-1).clamp(min=1e-12)[:, :, None]  # products are fewer than a text's vectors have numbers
    if len(vectors) == 1:
        found = words.flatten(0, 1) @ vectors[0].flatten(0, 1).T
    else:
        found = words @ vectors.flatten(1, 2).transpose(1, 2)
    return found.reshape(*words.shape[:2], *vectors.shape[1:3]).transpose(1, 2) / lengths


def best_matches(cosines: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of each word the best vector (T, I, M), 0 at padding, and of each vector the best word (T, I, K).

    Args:
        cosines: (T, I, M, K).
        mask: (T, M) bool, True at words.
    """
    seen = mask[:, None, :]
    by_word = cosines.amax(-1).masked_fill(~seen, 0)
    return by_word, cosines.masked_fill(~seen[..., None], -math.inf).amax(2)


def mean_matches(by_word: Tensor, by_vector: Tensor, mask: Tensor) -> Tensor:
    """Mean over the words + mean over the vectors, (T, I)."""
    return by_word.sum(-1) / mask.sum(1)[:, None] + by_vector.mean(-1)


def top_matches(best: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """The `count` greatest of (T, I, J), of what the mask (T, J) has, descending; 0 where there are fewer."""
    if mask is not None:
        best = best.masked_fill(~mask[:, None], -math.inf)
    found = best.topk(min(count, best.shape[-1]), dim=-1).values
    found = found.masked_fill(found == -math.inf, 0)
    return F.pad(found, (0, count - found.shape[-1]))


def alignment_loss(scores: Tensor, images: Tensor, margin: float, *, hardest: bool) -> Tensor:
    """Sum of hinges of both directions, [margin + S - S of the pair]+.

    Args:
        scores: (B, B), text by picture; the pairs are the diagonal.
        images: (B,) whole numbers; two of one picture are no negatives.
        margin: of the hinge.
        hardest: of each text and each picture only the greatest.
    """
    same = images[:, None] == images
    pairs = scores.diagonal()
    by_text = (margin + scores - pairs[:, None]).clamp(min=0).masked_fill(same, 0)
    by_image = (margin + scores - pairs[None]).clamp(min=0).masked_fill(same, 0)
    if hardest:
        return by_text.amax(1).sum() + by_image.amax(0).sum()
    return by_text.sum() + by_image.sum()


def ratio_loss(shares: Tensor, sparse_ratio: float) -> Tensor:
    """(rho - mean share of tokens kept)^2."""
    return (sparse_ratio - shares.mean()).square()
