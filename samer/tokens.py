"""The values that flow: visual tokens in, merged tokens out, query tokens beside them.

Shape letters: B images, N tokens per image, K regions, D embedding, Q queries, M query tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class VisualTokens:
    """An image batch after the projection: unit vectors, where they stand, which are real.

    Attributes:
        tokens: (B, N, D), unit norm.
        coords: (B, N, 2) or (N, 2), (x, y) in the unit square.
        mask: (B, N) bool, False at padding; None if nothing is padded.
        patches: (B, N) bool, True at image patches, False at prompt tokens and padding; None if all are patches.
        seeds: (B,) long, one per image, made from its id: what a random choice about an image depends on.
        attention: signals by name, (B, N) float each: how much attention a patch receives (`colpali.Attention`).
    """

    tokens: Tensor
    coords: Tensor
    mask: Tensor | None = None
    patches: Tensor | None = None
    seeds: Tensor | None = None
    attention: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class QueryTokens:
    """A query batch after the projection.

    Attributes:
        tokens: (Q, M, D), unit norm where valid.
        mask: (Q, M) bool; prompt and augmentation tokens count, padding does not.
        offsets: (Q, M, 2) long, first and last + 1 character of each token in its text, -1 if it is not of the text;
            None where nobody kept them.
    """

    tokens: Tensor
    mask: Tensor
    offsets: Tensor | None = None


@dataclass(frozen=True)
class MergedTokens:
    """A compressed image batch; the merge carries which token went where.

    Attributes:
        tokens: (B, K, D), unit norm where valid, zero elsewhere.
        coords: (B, K, 2), weighted mean positions.
        mask: (B, K) bool, False where an image has fewer vectors than K.
        weights: (B, N, K), the assignment, soft or hard; rows sum to 1, rows of padding and of dropped tokens are 0.
        assignments: (B, N) long, the hard cluster of each token, -1 at padding and at dropped tokens.
    """

    tokens: Tensor
    coords: Tensor
    mask: Tensor
    weights: Tensor
    assignments: Tensor
