"""Grounding of scores in boxes: BoxMass, RegionHit, CoverageIoU, and OSR (METHOD sections 6 and 7).

Shape letters: B images, N tokens per image, K vectors, D embedding, T query tokens that concern an image, P patches per
image, p phrases, c captions, C captions of a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samer.config import InputError
from samer.data.records import Box, ImageRecord
from samer.tokens import MergedTokens, QueryTokens, VisualTokens, regions_of_patches, shared_by_patches

HIT_IOU = 0.1  # RegionHit counts phrases whose regions overlap their boxes at least so much


def box_coverage(boxes: Sequence[Box], rows: int, columns: int) -> np.ndarray:
    """How much of each patch's cell lies in the union of boxes, exactly.

    Args:
        boxes: (n, 4), x1, y1, x2, y2 as shares of the image.
        rows, columns: the patch grid; cells tile the image.

    Returns:
        (rows * columns,) float32 in [0, 1], row-major.
    """
    box = np.asarray(boxes, dtype=np.float64).reshape(-1, 4).clip(0, 1)
    # every edge of a box or cell cuts the image; a piece between neighbouring cuts is covered wholly or not at all
    cuts = [
        np.unique(np.concatenate([box[:, [axis, axis + 2]].ravel(), np.arange(count + 1) / count]))
        for axis, count in ((0, columns), (1, rows))
    ]
    middles = [(cut[1:] + cut[:-1]) / 2 for cut in cuts]
    inside = [(box[:, axis, None] < middle) & (middle < box[:, axis + 2, None]) for axis, middle in enumerate(middles)]
    covered = (inside[1][:, :, None] & inside[0][:, None, :]).any(0)  # (pieces down, pieces across)
    pieces = covered * np.outer(np.diff(cuts[1]), np.diff(cuts[0]))
    sizes = (columns, rows)  # a middle may round up to 1
    cells = [np.minimum(np.floor(m * count).astype(int), count - 1) for m, count in zip(middles, sizes)]
    area = np.zeros((rows, columns))
    np.add.at(area, (cells[1][:, None], cells[0][None, :]), pieces)
    return (area * rows * columns).clip(0, 1).astype(np.float32).ravel()


@dataclass(frozen=True)
class OwnTokens:
    """The query tokens of a batch's own captions.

    Attributes:
        tokens: (B, T, D).
        captions: (B, T) long, each token's caption, numbered over the split; -1 at padding.
        phrases: (B, T) long, its phrase, numbered over the split; -1 where it belongs to none with boxes.
    """

    tokens: Tensor
    captions: Tensor
    phrases: Tensor


class PhraseIndex:
    """The phrases with boxes of a split, and the query tokens that name them."""

    def __init__(self, records: Sequence[ImageRecord], queries: Sequence[QueryTokens]) -> None:
        """Reads phrases and offsets.

        Args:
            records: of the split, with boxes.
            queries: batches that hold all captions in order, with offsets.

        Raises:
            InputError: queries without offsets, or another number of them than of captions.
        """
        if any(query.offsets is None for query in queries):
            raise InputError("grounding needs each query token's character offsets; encode the captions anew")
        spans = [offsets[mask.to(offsets.device)].cpu() for q in queries for offsets, mask in zip(q.offsets, q.mask)]
        captions = [(image, caption) for image, record in enumerate(records) for caption in record.captions]
        if len(spans) != len(captions):
            raise InputError(f"{len(spans)} encoded queries for {len(captions)} captions")
        self._boxes: list[tuple[Box, ...]] = []  # of each phrase
        self._covered: dict[tuple[int, int, int], np.ndarray] = {}
        self._entries: list[list[tuple[int, int, int]]] = [[] for _ in records]  # caption, token, phrase
        for number, ((image, caption), span) in enumerate(zip(captions, spans)):
            named = [phrase for phrase in caption.phrases if phrase.boxes]
            phrase_of = [-1] * len(span)
            for phrase in named:
                tokens = ((span[:, 0] < phrase.end) & (span[:, 1] > phrase.start)).nonzero()[:, 0].tolist()
                for token in tokens:
                    phrase_of[token] = len(self._boxes)
                if tokens:
                    self._boxes.append(phrase.boxes)
            self._entries[image] += [(number, token, phrase) for token, phrase in enumerate(phrase_of)]

    def coverage(self, phrases: Tensor, grid: Tensor, width: int) -> Tensor:
        """How much of each patch lies in a phrase's boxes, (p, P) float32; 0 past an image's own patches.

        Args:
            phrases: (p,) long, their numbers.
            grid: (p, 2) long, rows and columns of the phrase's image.
            width: P.
        """
        covered = np.zeros((len(phrases), width), dtype=np.float32)
        for row, key in enumerate(zip(phrases.tolist(), *grid.t().tolist())):
            if key not in self._covered:
                self._covered[key] = box_coverage(self._boxes[key[0]], *key[1:])
            covered[row, : len(self._covered[key])] = self._covered[key]
        return torch.from_numpy(covered)

    def own_tokens(self, images: Sequence[int], tokens: Sequence[Tensor]) -> OwnTokens:
        """Query tokens of the captions of some images; an image without a caption has none.

        Args:
            images: their numbers, B of them.
            tokens: the valid tokens (m, D) of every caption of the split, as a projector made them.
        """
        rows = [torch.tensor(self._entries[image], dtype=torch.long).reshape(-1, 3) for image in images]  # each (t, 3)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)  # (B, T, 3)
        none = tokens[0][:0]
        vectors = [torch.cat([none, *(tokens[number] for number in row[:, 0].unique().tolist())]) for row in rows]
        vectors = torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True)
        return OwnTokens(vectors, padded[..., 0].to(vectors.device), padded[..., 2].to(vectors.device))


@torch.no_grad()
def ground(merged: MergedTokens, own: OwnTokens, index: PhraseIndex, visual: VisualTokens) -> dict[str, Tensor]:
    """What each phrase's winning vectors stand on, and how well each caption is matched by its own image.

    A vector's evidence is its weight over patches, renormalised; a vector without any patch (a prompt token kept as it
    is) has none, so it counts 0 in mass and overlap. A token of several patches shares its weight evenly among them.
    Areas are those of patch cells.

    Args:
        merged: of B images.
        own: query tokens of their captions.
        index: of the split.
        visual: what was merged; its `grid` and `source` are needed.

    Returns:
        `phrases` (p,) the phrases seen, in order; `box_mass` (p,) in [0, 1], mean over the phrase's tokens; `iou` (p,)
        of the union of the regions with the boxes; `captions` (c,) and `match` (c,), the sum over a caption's tokens of
        the best similarity, what OSR compares; `evidence` (p, P), what `box_mass` counts, per patch in row-major order
        and 0 past an image's own patches.

    Source: METHOD section 6 (definitions ours); RegionHit is the share of `iou` >= `HIT_IOU`.
    """
    products = own.tokens.to(merged.tokens) @ merged.tokens.transpose(1, 2)  # (B, T, K)
    products = products.masked_fill(~merged.mask[:, None], torch.finfo(products.dtype).min)
    best, chosen = products.max(dim=2)  # (B, T)
    real = own.captions >= 0
    captions, place = own.captions[real].unique(return_inverse=True)
    match = _sums(best[real], place, len(captions))
    images, tokens = (own.phrases >= 0).nonzero(as_tuple=True)  # (n,) phrase tokens
    phrases, place = own.phrases[images, tokens].unique(return_inverse=True)
    winner = chosen[images, tokens]
    weights = merged.weights.transpose(1, 2)[images, winner]  # (n, N)
    evidence = shared_by_patches(weights, visual.source[images])  # (n, P)
    evidence = evidence / evidence.sum(1, keepdim=True).clamp(min=torch.finfo(evidence.dtype).tiny)
    home = torch.empty_like(phrases)
    home[place] = images  # the image of each phrase
    covered = index.coverage(phrases, visual.grid[home], visual.source.shape[1]).to(evidence)  # (p, P)
    size = _sums(torch.ones_like(place, dtype=evidence.dtype), place, len(phrases))
    evidence = _sums(evidence, place, len(phrases)) / size[:, None]  # (p, P)
    mass = (evidence * covered).sum(1)
    regions = regions_of_patches(merged.assignments, visual.source)  # (B, P)
    stands = (regions[images] == winner[:, None]).to(evidence.dtype)  # (n, P)
    region = _sums(stands, place, len(phrases)) > 0  # (p, P)
    overlap = (region * covered).sum(1)
    union = region.sum(1) + covered.sum(1) - overlap
    return {
        "phrases": phrases,
        "box_mass": mass,
        "iou": overlap / union,
        "captions": captions,
        "match": match,
        "evidence": evidence,
    }


def _sums(values: Tensor, place: Tensor, count: int) -> Tensor:
    """Sums over the rows (n, ...) of each place, (count, ...)."""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, place, values)


def size_thirds(smallest: np.ndarray) -> tuple[tuple[float, float], np.ndarray]:
    """Captions in three equal parts by the smallest object they name.

    Args:
        smallest: (C,) areas, NaN where a caption names no box.

    Returns:
        The two edges (areas), and (C,) int: 0 small, 1 middle, 2 large, -1 none. Equal areas share a part.

    Raises:
        InputError: no caption names a box.
    """
    named = np.isfinite(smallest)
    if not named.any():
        raise InputError("no caption names an object with a box")
    low, high = (float(edge) for edge in np.quantile(smallest[named], [1 / 3, 2 / 3]))
    part = (smallest > low).astype(int) + (smallest > high)
    return (low, high), np.where(named, part, -1)
