"""What scores pairs of pictures and texts: selection, aggregation and similarity, in the variant of the settings.

Shape letters: T texts, I pictures, D dense texts, N tokens, M words, K merged vectors, d embedding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samer.config import InputError
from samer.seps import selection, similarity
from samer.seps.settings import HeadSettings

SLOPE = 0.1  # of the leaky ReLU
NARROW = 0.2  # hidden width of the aggregation network, of d
TOP = 5  # best matches that the paper's MLPs see
SLICE_ELEMENTS = 2**23  # floats of the largest of a slice's tensors, 32 MB: larger ones are slower on a CPU
HELD_ELEMENTS = 2**26  # floats that such tensors of all slices may be for the backward pass not to compute them again


@dataclass(frozen=True)
class Images:
    """Encoded pictures: tokens (I, N, d), [CLS] (I, d) where there is one, the mean of their own dense text (I, d)."""

    tokens: Tensor
    cls: Tensor | None = None
    guide: Tensor | None = None


@dataclass(frozen=True)
class Texts:
    """Encoded texts: tokens (T, M, d) and which are words, (T, M) bool, with the dense texts (D, ...) they bring along.

    Attributes:
        dense_of: (T,) whole numbers, which of the dense texts.
        noise: logistic, of a draw in training, (2, T, I, N) for the two decisions; None: the best tokens are kept.
    """

    tokens: Tensor
    mask: Tensor
    dense: Texts | None = None
    dense_of: Tensor | None = None
    noise: Tensor | None = None

    def some(self, rows: slice) -> Texts:
        """A slice of the texts, with the dense texts that they need."""
        dense, dense_of = self.dense, self.dense_of
        if dense is not None:
            needed, dense_of = dense_of[rows].unique(return_inverse=True)
            dense = Texts(dense.tokens[needed], dense.mask[needed])
        noise = None if self.noise is None else self.noise[:, rows]
        return Texts(self.tokens[rows], self.mask[rows], dense, dense_of, noise)


class Aggregator(nn.Module):
    """Logits of each token for each merged vector, (I, N, K): W2 GELU(W1 LN(token)), times a learned scalar.

    They don't depend on a text, so they are computed once for a picture.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        hidden = max(1, int(NARROW * width))
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, count))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens) * self.scale


class Head(nn.Module):
    """Scores (T, I) of all pairs, and the share of tokens kept for each text."""

    def __init__(self, settings: HeadSettings, tokens: int, width: int) -> None:
        """Takes N of a picture and d.

        Raises:
            InputError: so few tokens are kept that none could be chosen.
        """
        super().__init__()
        if tokens < 2:
            raise InputError(f"the vision tower gives {tokens} patch tokens; there is nothing to select from")
        self.settings, self.tokens = settings, tokens
        self.keep = selection.kept(tokens, settings.sparse_ratio)
        self.count = selection.merged_count(tokens, settings.sparse_ratio, settings.aggr_ratio)
        self.aggregators = nn.ModuleList([Aggregator(width, self.count)])
        if settings.variant == "paper":
            hidden = max(1, width // 4)
            self.predictor = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1))
            if settings.dense != "none":
                self.aggregators.append(Aggregator(width, self.count))
            make = lambda: nn.Sequential(nn.Linear(TOP, 2 * TOP), nn.GELU(), nn.Linear(2 * TOP, 1))
            self.by_word, self.by_vector = make(), make()

    @property
    def draws(self) -> bool:
        """Whether decisions are drawn in training."""
        return self.settings.variant == "paper"

    def forward(self, images: Images, texts: Texts) -> tuple[Tensor, Tensor]:
        """Computes the pairs in slices of texts, so that memory is bounded; the backward pass computes many again.

        Returns:
            Scores (T, I), and of each text the tokens kept as a share, (T,): the mean over both texts' decisions, or
            their sum where `ratio_sum` says so.

        Raises:
            InputError: `seps.dense` asks for dense texts that are not given.
        """
        self._check(images, texts)
        score = self._code if self.settings.variant == "code" else self._paper
        logits = [aggregator(self._chosen(images.tokens)) for aggregator in self.aggregators]
        rows, count = self._rows(images, texts, SLICE_ELEMENTS), len(texts.tokens)
        if count <= rows:
            return score(images, texts, logits)
        again = torch.is_grad_enabled() and count > self._rows(images, texts, HELD_ELEMENTS)
        part = partial(checkpoint, score, use_reentrant=False) if again else score
        parts = [part(images, texts.some(slice(start, start + rows)), logits) for start in range(0, count, rows)]
        return tuple(torch.cat(column) for column in zip(*parts))

    def _check(self, images: Images, texts: Texts) -> None:
        mode = self.settings.dense
        if mode == "query" and texts.dense is None:
            raise InputError("seps.dense=query needs the dense text that each text brings along")
        if mode == "image" and images.guide is None:
            raise InputError("seps.dense=image needs the dense text of each picture")

    def _rows(self, images: Images, texts: Texts, elements: int) -> int:
        """Texts whose largest tensor is of so many floats."""
        words = max(texts.tokens.shape[1], 0 if texts.dense is None else texts.dense.tokens.shape[1])
        largest = max(self.count * self.tokens, (self.count + 2) * max(words, images.tokens.shape[2]))
        return max(1, elements // (len(images.tokens) * largest))

    def _chosen(self, tokens: Tensor) -> Tensor:
        """The tokens as what follows the selection sees them."""
        return tokens if self.settings.select_gradient else tokens.detach()

    # --- the released code ------------------------------------------------------------------------------------------

    def _code(self, images: Images, texts: Texts, logits: list[Tensor]) -> tuple[Tensor, Tensor]:
        sparse = selection.pooled(texts.tokens, texts.mask)
        scores, share = self._branch(images, texts, sparse, logits[0])
        shares = [share.expand(len(texts.tokens))]
        if self.settings.dense == "query":
            dense = texts.dense
            more, share = self._branch(images, dense, selection.pooled(dense.tokens, dense.mask), logits[0])
            scores = scores + more[texts.dense_of]
            shares.append(share[texts.dense_of])
        elif self.settings.dense == "image":
            more, share = self._branch(images, texts, images.guide, logits[0], of_images=True)
            scores = scores + more
            shares.append(share.expand(len(texts.tokens)))
        return scores, self._joined(shares)

    def _branch(
        self, images: Images, texts: Texts, guide: Tensor, logits: Tensor, *, of_images: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Scores of texts against pictures whose tokens a guide chooses, and the share of tokens kept."""
        tokens = self._chosen(images.tokens)
        with torch.no_grad():
            scores = selection.code_scores(images.tokens, guide, of_images=of_images)
            decisions = selection.best(scores, self.keep)
        vectors = [selection.aggregate(tokens, logits, decisions)]
        if images.cls is not None:
            vectors.insert(0, images.cls[None, :, None].expand(len(scores), -1, -1, -1))
        if self.keep < self.tokens:
            vectors.append(selection.fused(tokens, scores, decisions)[:, :, None])
        cosines = F.leaky_relu(similarity.alike(texts.tokens, torch.cat(vectors, 2)), SLOPE)
        found = similarity.best_matches(cosines, texts.mask)
        return similarity.mean_matches(*found, texts.mask), decisions.mean((1, 2))

    # --- the paper --------------------------------------------------------------------------------------------------

    def _paper(self, images: Images, texts: Texts, logits: list[Tensor]) -> tuple[Tensor, Tensor]:
        tokens, of_images, dense = images.tokens, self.settings.dense == "image", None
        if of_images:
            dense = images.guide
        elif self.settings.dense == "query":
            dense = selection.pooled(texts.dense.tokens, texts.dense.mask)[texts.dense_of]
        predicted = self.predictor(tokens)[..., 0].sigmoid()
        sparse = selection.pooled(texts.tokens, texts.mask)
        scores = selection.paper_scores(tokens, predicted, sparse, dense, self.settings.beta, of_images=of_images)
        vectors, shares = 0, []
        for number, network in enumerate(logits):
            if texts.noise is None:
                decisions = selection.best(scores, self.keep)
            else:
                decisions = selection.drawn(scores, texts.noise[number], self.settings.temperature)
            used = decisions if self.settings.select_gradient else decisions.detach()
            vectors = vectors + selection.aggregate(self._chosen(tokens), network, used)
            shares.append(decisions.mean((1, 2)))
        by_word, by_vector = similarity.best_matches(similarity.alike(texts.tokens, vectors), texts.mask)
        found = similarity.mean_matches(by_word, by_vector, texts.mask)
        found = found + self.by_word(similarity.top_matches(by_word, texts.mask, TOP))[..., 0]
        found = found + self.by_vector(similarity.top_matches(by_vector, None, TOP))[..., 0]
        return found, self._joined(shares)

    def _joined(self, shares: list[Tensor]) -> Tensor:
        total = torch.stack([share.expand(len(shares[0])) for share in shares]).sum(0)
        return total if self.settings.ratio_sum else total / len(shares)
