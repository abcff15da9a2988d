"""The values that flow: visual tokens in, merged tokens out, query tokens beside them.

Shape letters: B images, N tokens per image, P patches per image, K regions, D embedding, Q queries, M query tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samer.config import InputError


def check_tensor(name: str, value: object, dtype: torch.dtype | None = None, like: Tensor | None = None) -> None:
    """Refuses what is no dense tensor of real numbers, of another dtype, or on another device than `like`.

    Raises:
        InputError: names it and says what it is.
    """
    if not isinstance(value, Tensor):
        kind = type(value)
        found = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        remedy = "give its tokens" if hasattr(value, "tokens") else "torch.as_tensor makes one of numbers"
        raise InputError(f"{name} must be a torch tensor; it is of type {found} ({remedy})")
    if value.is_complex() or value.layout != torch.strided:
        raise InputError(f"{name} must be a dense tensor of real numbers; it is {value.dtype}, {value.layout}")
    if dtype is not None and value.dtype != dtype:
        raise InputError(f"{name} is {value.dtype}; expected {str(dtype).removeprefix('torch.')}")
    if like is not None and value.device != like.device:
        raise InputError(f"{name} must be on {like.device}; it is on {value.device}")


@dataclass(frozen=True)
class ImageLayout:
    """Where the tokens of an image batch stand, and which token each patch of the picture went to.

    Attributes:
        coords: (B, N, 2), (x, y) in the unit square; (0.5, 0.5) for a token that stands nowhere.
        patches: (B, N) bool, True at image tokens, False at prompt tokens and padding.
        grid: (B, 2) long, rows and columns of the patch grid, per image.
        source: (B, P) long, the token that holds each patch, in row-major order; -1 past an image's own patches. Patch
            p of a retriever's untouched tower is its p-th image token; a reducer sends several patches to one token.
    """

    coords: Tensor
    patches: Tensor
    grid: Tensor
    source: Tensor

    @property
    def views(self) -> Tensor:
        """(B, N) bool, True at image tokens that hold no patch of the grid: a second view of the whole picture."""
        named = torch.zeros(*self.patches.shape[:1], self.patches.shape[1] + 1, device=self.source.device)
        place = torch.where(self.source < 0, self.patches.shape[1], self.source)
        return self.patches & (named.scatter_(1, place, 1)[:, :-1] == 0)


@dataclass(frozen=True)
class VisualTokens:
    """An image batch after the projection: unit vectors, where they stand, which are real.

    Attributes:
        tokens: (B, N, D), unit norm.
        coords: (B, N, 2) or (N, 2), (x, y) in the unit square.
        mask: (B, N) bool, False at padding; None if nothing is padded.
        patches: (B, N) bool, True at image patches, False at prompt tokens and padding; None if all are patches.
        seeds: (B,) long, one per image, made from its id: what a random choice about an image depends on.
        attention: signals by name, (B, N) float each: how much attention a patch receives (`retrievers.attention`).
        grid: (B, 2) long, rows and columns, as in `ImageLayout`; None where nobody asks for pictures.
        source: (B, P) long, the token of each patch, as in `ImageLayout`; None likewise.
        views: (B, N) bool, as `ImageLayout.views`; None if there are none.
        layer_tokens: (B, L) long, how many patch tokens leave each block of the vision tower; None where no reducer
            works in it.
    """

    tokens: Tensor
    coords: Tensor
    mask: Tensor | None = None
    patches: Tensor | None = None
    seeds: Tensor | None = None
    attention: Mapping[str, Tensor] = field(default_factory=dict)
    grid: Tensor | None = None
    source: Tensor | None = None
    views: Tensor | None = None
    layer_tokens: Tensor | None = None


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
        weights: (B, N, K), the assignment, soft or hard; rows sum to 1, rows of padding and of dropped tokens are 0. Of
            `querybank` the votes: columns sum to 1, rows to anything.
        assignments: (B, N) long, the hard cluster of each token, -1 at padding and at dropped tokens.
    """

    tokens: Tensor
    coords: Tensor
    mask: Tensor
    weights: Tensor
    assignments: Tensor


def shared_by_patches(values: Tensor, source: Tensor) -> Tensor:
    """What tokens hold, spread over the patches that they came from; each token's is shared evenly by its patches.

    Args:
        values: (B, N) float.
        source: (B, P) long, as in `ImageLayout`.

    Returns:
        (B, P), 0 past an image's own patches.
    """
    real = source >= 0
    place = source.clamp(min=0)
    holders = torch.zeros(values.shape, dtype=values.dtype, device=values.device)
    holders = holders.scatter_add_(1, place, real.to(values.dtype))  # (B, N) patches per token
    return values.gather(1, place) / holders.gather(1, place).clamp(min=1) * real


def regions_of_patches(assignments: Tensor, source: Tensor) -> Tensor:
    """The region of every patch, (B, P) long: that of its token; -1 for none, and past an image's own patches.

    Args:
        assignments: (B, N) long, -1 at dropped tokens.
        source: (B, P) long, as in `ImageLayout`.
    """
    return assignments.gather(1, source.clamp(min=0)).masked_fill(source < 0, -1)
