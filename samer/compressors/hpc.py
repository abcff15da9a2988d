"""HPC, hierarchical patch compression (arXiv 2506.21601; METHOD section 7), at a budget of K vectors.

The K patches that receive most attention are kept, and each is replaced by its code of a corpus-level K-means codebook,
one byte per vector.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor

from samer.compressors.base import Compressor, keep_best
from samer.config import InputError
from samer.tokens import MergedTokens, VisualTokens

CODES = 256
FIT_TOKENS = 64 * CODES  # the corpus's tokens that the codebook is fitted on, evenly spaced
FIT_ITERATIONS = 20


class TopAttention(Compressor):
    """The K patches with the largest head-averaged attention in the language model's last layer."""

    needs = ("last",)

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        return keep_best(visual, visual.attention["last"], self.settings.num_regions)


class HPC(TopAttention):
    """The top K patches by attention, each as the unit vector of its code.

    A code passes no gradient, so a projector trains through the kept patches, and the codebook is fitted afterwards.
    """

    needs_corpus = True
    stored_bytes = 1

    codes: Tensor | None = None  # (C, D) of unit norm

    def fit(self, corpus: Iterable[VisualTokens]) -> None:
        """Fits the codebook on all valid tokens of a corpus; the same corpus gives the same codes."""
        kept = []
        for visual in corpus:
            tokens = visual.tokens if visual.mask is None else visual.tokens[visual.mask]
            kept.append(tokens.detach().reshape(-1, tokens.shape[-1]).float().cpu())
        tokens = torch.cat(kept)
        rows = torch.linspace(0, len(tokens) - 1, min(FIT_TOKENS, len(tokens))).round().long()
        sample = tokens[rows].numpy().astype(np.float64)
        count = min(CODES, len(sample))
        few = sample[:: max(1, len(sample) // (8 * CODES))]  # k-means++ on all would take 8 times as long
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a code that loses all its tokens stays where it was
            centres, _ = kmeans2(few, count, iter=1, minit="++", rng=np.random.default_rng(0))
            centres, _ = kmeans2(sample, centres, iter=FIT_ITERATIONS, minit="matrix")
        self.codes = F.normalize(torch.from_numpy(centres).float(), dim=-1)

    def state(self) -> dict[str, Tensor]:
        return {"codes": self.codes}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.codes = state["codes"]

    def for_training(self) -> Compressor:
        return TopAttention(self.settings)

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        if self.codes is None:
            raise InputError("hpc has no codebook yet; call fit with the corpus first")
        kept = super().compress(visual, instance_labels)
        codes = self.codes.to(kept.tokens)
        nearest = (kept.tokens.detach() @ codes.T).argmax(-1)  # (B, K); both of unit norm, so the nearest
        coded = codes[nearest] * kept.mask[..., None]
        return MergedTokens(coded, kept.coords, kept.mask, kept.weights, kept.assignments)
