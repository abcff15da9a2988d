"""The protocol of every compressor, and the two things that most of them are: a choice of tokens, a hard clustering.

Shape letters: B images, N tokens, K regions, D embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from samer.config import InputError, MergeConfig
from samer.merging import check_tokens, check_unit, each_budget, keep_short, keep_tokens
from samer.settings import vectors_of
from samer.tokens import MergedTokens, VisualTokens, check_tensor


class Compressor:
    """A way from N tokens per image to at most K: subclass, write `compress`, add a line to the registry.

    What holds for all (a test runs over the registry): float32 inside, unit vectors out, an image with at most K tokens
    keeps them as they are, and an image's result depends on neither its batch nor its padding.

    Attributes:
        needs: the attention signals that `VisualTokens.attention` must hold.
        uses_labels: whether instance labels change the result; the others ignore them.
        needs_corpus: whether `fit` must be called before use.
        needs_queries: whether `fit_queries` must be called before use.
        stored_bytes: bytes that an index needs per vector; None: D components of 2 bytes.
        settings_used: the settings that change the vectors of an image without labels. Those of an index may not differ
            in them; what they are in the others does not matter.
    """

    needs: tuple[str, ...] = ()
    uses_labels = False
    needs_corpus = False
    needs_queries = False
    stored_bytes: int | None = None
    settings_used: tuple[str, ...] = ("num_regions",)

    def __init__(self, settings: MergeConfig) -> None:
        self.settings = settings

    def places(self, count: int) -> int:
        """The width of the result for images of `count` tokens."""
        return min(vectors_of(self.settings.num_regions, count), count)

    def fit(self, corpus: Iterable[VisualTokens]) -> None:
        """Learns from a corpus what `compress` needs of it; only where `needs_corpus` says so."""

    def fit_queries(self, tokens: Tensor, weights: Tensor | None = None) -> None:
        """Learns from query tokens (T, D), asked `weights` (T,) times each; only where `needs_queries` says so."""

    def state(self) -> dict[str, Tensor]:
        """What was learned, on the CPU; another of the same settings that loads it compresses alike to the bit."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what another one's `state` returned, in place of learning."""

    def for_training(self) -> Compressor:
        """What a projector is trained through: the compressor itself, unless it has a part that no gradient passes."""
        return self

    def __call__(self, visual: VisualTokens, instance_labels: Tensor | None = None) -> MergedTokens:
        """Compresses a batch.

        Args:
            visual: tokens (B, N, D) of unit norm, and what the compressor needs beside them.
            instance_labels: (B, N) long, for a compressor that `uses_labels`; training only.

        Returns:
            `MergedTokens` with `places(N)` vectors, min(K, N) but for "none"; `mask` says which are filled. Where K is
            a share of N, that of the image's own tokens.

        Raises:
            InputError: as `merge_tokens`, tokens that are not of unit length or outside the unit square, a signal that
                is not there, or `fit` or `fit_queries` not called.
        """
        if not isinstance(visual, VisualTokens):
            raise InputError(f"a compressor takes VisualTokens, tokens with their coords; not {type(visual).__name__}")
        check_tokens(visual.tokens, visual.coords, visual.mask, instance_labels)
        check_unit(visual.tokens, visual.coords, visual.mask)
        self._check_sides(visual)
        missing = [name for name in self.needs if name not in visual.attention]
        if missing:
            raise InputError(
                f"compressor {self.settings.compressor!r} needs the attention signal {missing[0]!r} of each image; "
                "encode the images with it, or compute the features anew"
            )
        mask = visual.mask
        tokens = visual.tokens.to(torch.promote_types(visual.tokens.dtype, torch.float32))
        coords = visual.coords.to(tokens).expand(len(tokens), -1, -1)
        patches = visual.patches if visual.patches is not None else torch.ones_like(tokens[..., 0], dtype=torch.bool)
        if mask is not None:
            tokens = torch.where(mask[..., None], tokens, 0)
            coords = torch.where(mask[..., None], coords, 0)
            patches = patches & mask
        clean = VisualTokens(tokens, coords, mask, patches, visual.seeds, visual.attention, views=visual.views)
        with torch.autocast(tokens.device.type, enabled=False):
            share = self.settings.num_regions
            if isinstance(share, int) or "num_regions" not in self.settings_used:
                return self._at_most(clean, instance_labels)

            def merge(regions: int, rows: Tensor | slice) -> MergedTokens:
                fixed = copy.copy(self)  # with what it learned
                fixed.settings = replace(self.settings, num_regions=regions)
                labels = None if instance_labels is None else instance_labels[rows]
                return fixed._at_most(_rows(clean, rows), labels)

            return each_budget(share, tokens.shape[1], mask, merge)

    def _at_most(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        """Compresses a batch, as `compress` gets it, at one K; an image that has no more tokens keeps them."""
        tokens, coords, mask, regions = visual.tokens, visual.coords, visual.mask, self.settings.num_regions
        if isinstance(regions, int) and tokens.shape[1] <= regions:
            return keep_tokens(tokens, coords, mask)
        result = self.compress(visual, instance_labels)
        return result if mask is None else keep_short(result, tokens, coords, mask)

    @staticmethod
    def _check_sides(visual: VisualTokens) -> None:
        batch, count = visual.tokens.shape[:2]
        signals = {f"attention {name!r}": row for name, row in visual.attention.items()}
        sides = {"patches": visual.patches, "views": visual.views, **signals}
        expected = dict.fromkeys(sides, (batch, count)) | {"seeds": (batch,)}
        kinds = {"patches": torch.bool, "views": torch.bool, "seeds": torch.int64}
        for name, value in {**sides, "seeds": visual.seeds}.items():
            if value is None:
                continue
            check_tensor(name, value, kinds.get(name))
            if tuple(value.shape) != expected[name]:
                raise InputError(f"{name} of shape {tuple(value.shape)} for tokens {tuple(visual.tokens.shape)}")

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        """The work itself, for more than K tokens: float32, padding zeroed, coords (B, N, 2), patches a tensor.

        `settings.num_regions` is K then, never a share.
        """
        raise NotImplementedError


def _rows(visual: VisualTokens, rows: Tensor | slice) -> VisualTokens:
    """Some images of a batch as `compress` gets it."""
    own = {name: value[rows] for name, value in vars(visual).items() if isinstance(value, Tensor)}
    return VisualTokens(**own, attention={name: value[rows] for name, value in visual.attention.items()})


def keep_best(visual: VisualTokens, salience: Tensor, regions: int) -> MergedTokens:
    """Keeps the K tokens of highest salience in positional order, patches before prompt tokens; ties go to the first.

    Args:
        visual: as `Compressor.compress` gets it.
        salience: (B, N) float; NaN counts as lowest.
        regions: K < N.
    """
    tokens, valid = visual.tokens, visual.mask
    lowest = torch.finfo(torch.float64).min
    salience = salience.double().nan_to_num(nan=lowest, neginf=lowest)
    salience = salience.masked_fill(~visual.patches, float("-inf"))
    order = salience.argsort(dim=1, descending=True, stable=True)
    if valid is not None:  # padding behind everything else, -inf or not
        behind = (~valid).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True)
        order = order.gather(1, behind)
    chosen = order[:, :regions].sort(dim=1).values  # (B, K)
    filled = torch.ones_like(chosen, dtype=torch.bool) if valid is None else valid.gather(1, chosen)
    slots = torch.arange(regions, device=tokens.device).expand(len(tokens), -1)
    assignments = torch.full(tokens.shape[:2], -1, device=tokens.device).scatter(1, chosen, slots)
    weights = torch.zeros(*tokens.shape[:2], regions, dtype=tokens.dtype, device=tokens.device)
    weights = weights.scatter(1, chosen[:, None], filled[:, None].to(tokens.dtype))
    if valid is not None:
        assignments = assignments.masked_fill(~valid, -1)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    kept = tokens[rows, chosen] * filled[..., None]
    return MergedTokens(kept, visual.coords[rows, chosen], filled, weights, assignments)


def hard_merge(visual: VisualTokens, assignments: Tensor, regions: int) -> MergedTokens:
    """Replaces each cluster by the normalised mean of its tokens; a cluster without tokens is masked out.

    Args:
        visual: as `Compressor.compress` gets it.
        assignments: (B, N) long in [0, K), or -1 for a token that is dropped.
        regions: K.
    """
    tokens = visual.tokens
    if visual.mask is not None:
        assignments = assignments.masked_fill(~visual.mask, -1)
    weights = F.one_hot(assignments.clamp(min=0), regions).to(tokens.dtype) * (assignments >= 0)[..., None]
    size = weights.sum(1)[..., None]  # (B, K, 1)
    merged = F.normalize(weights.transpose(1, 2) @ tokens, dim=-1)
    places = weights.transpose(1, 2) @ visual.coords / size.clamp(min=1)
    return MergedTokens(merged, places, size[..., 0] > 0, weights, assignments)
