"""AdaMerge (arXiv 2605.27465): salience-weighted merging, as many tokens per image and layer as the image allows.

Before a block, on its input: salience is what a token receives from the row-softmaxed affinity X X^T; tokens of the
first half look for their most similar one in the second half, and those of the highest weighted similarity
s_i cos(x_i, x_j) merge, by a mean weighted with salience. How many is told by how that similarity stands against what
is usual in this layer (`rate`), which scripts/calibrate.py finds out.

What the paper does not say, OURS: the first half of odd N is floor(N / 2); a token of salience 0 takes the destination
of the largest cosine; several tokens that choose one merge in one weighted mean; without any weight it is the plain
mean; alpha is 1; r is at most the first half. Token sizes are not used unless asked for (`reduce.proportional`). The
paper wants salient tokens preserved, and its formula merges them first; `order="inverse"` (OURS) takes 1 - s_i in the
place of s_i when pairs are ordered, and is the paper's words instead of its formula.

Shape letters: B images, N tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from samer.config import InputError, ReduceConfig
from samer.reducers.base import Reducer, Tokens
from samer.reducers.pairs import check_r, merge_pairs, padded

ORDERS = ("salient", "inverse")


def salience(x: Tensor) -> Tensor:
    """How much each token receives, (B, N) float in [0, 1], of tokens (B, N, D); 0 where all receive alike."""
    return _salience(_affinity(x), torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))


def merge_step(
    x: Tensor, r: Tensor, *, mask: Tensor | None = None, order: str = "salient"
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's merge.

    Args:
        x: (B, N, D), patch tokens.
        r: (B,) long, tokens to merge away, at most half of an image's.
        mask: (B, N) bool, real tokens, all before the padding; None: all are.
        order: "salient", as published, or "inverse".

    Returns:
        y (B, N, D), survivors in their order, padding masked; mask (B, N); source (B, N) long, the place in `y` that
        each token went to, -1 at padding.

    Raises:
        InputError: r beyond the first half.
    """
    y, mask, source = Layer(x, mask, order).merge(r)
    return *padded(y, mask, x.shape[1]), source


def rate(similarity: Tensor, mean: float, deviation: float, r_max: int, temperature: float, alpha: float) -> Tensor:
    """How many tokens to merge, (B,) long: floor(r_max sigmoid(alpha z / T)), z the similarity (B,) standardised."""
    z = (similarity - mean) / max(deviation, 1e-12) / temperature
    return (r_max * torch.sigmoid(alpha * z)).floor().long()


class Layer:
    """What one layer's merge needs, computed once for the decision how many and for the merge.

    Attributes:
        similarity: (B,), the mean over the first half of the largest weighted similarity, as published whatever the
            order.
        most: (B,) long, tokens in the first half: the largest r.
    """

    def __init__(self, x: Tensor, mask: Tensor | None = None, order: str = "salient") -> None:
        """As `merge_step`."""
        if order not in ORDERS:
            raise InputError(f"reduce.order {order!r} is unknown; use one of {', '.join(ORDERS)}")
        self.x = x
        self.mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        affinity = _affinity(x)  # (B, N, N)
        self.salience = _salience(affinity, self.mask)
        self.most = self.mask.sum(1) // 2
        place = torch.arange(x.shape[1], device=x.device)
        first, half = place < self.most[:, None], int(self.most.max()) if len(x) else 0
        norm = affinity.diagonal(dim1=1, dim2=2).clamp(min=1e-24).rsqrt()  # 1 / |x|
        lowest = int(self.most.min()) if len(x) else 0  # no token before it is in any second half
        cosine = affinity[:, :half, lowest:] * norm[:, lowest:][:, None]  # times |x_i|, which no argmax sees
        second = (self.mask & ~first)[:, lowest:]
        if not bool(second.all()):
            cosine = cosine.masked_fill(~second[:, None], -torch.inf)
        if half:
            largest, nearest = cosine.max(-1)
            largest = largest * norm[:, :half]
        else:
            largest, nearest = (torch.zeros(len(x), 0, device=x.device) for _ in range(2))
        weighted = self.salience[:, :half] * largest  # (B, N / 2)
        used = first[:, :half]
        self.similarity = torch.where(used, weighted, 0).sum(1) / self.most.clamp(min=1)
        if order == "inverse":
            weighted = (1 - self.salience[:, :half]) * largest
        behind = x.shape[1] - half
        score = torch.where(used, weighted, -torch.inf)
        self.score = torch.nn.functional.pad(score, (0, behind), value=-torch.inf)
        self.best = torch.nn.functional.pad(nearest.long() + lowest, (0, behind))

    def merge(self, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `merge_step`, without padding behind the image with the most tokens."""
        check_r(r, self.most, "first half's tokens")
        return merge_pairs(self.x, self.salience, self.best, self.score, r, self.mask)


def _affinity(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x @ x.transpose(1, 2)


def _salience(affinity: Tensor, mask: Tensor) -> Tensor:
    """Column sums of the row-softmaxed affinity (B, N, N), as shares of their range; 0 at padding."""
    ragged = not bool(mask.all())
    if ragged:
        affinity = affinity.masked_fill(~mask[:, None], -torch.inf)
    # A row sums to 1, so what a token receives is 1 + what comes from others - what it gives them. On real features
    # most of the 1 is its own, and the differences, which alone count below, would drown in its rounding.
    given = affinity.softmax(-1)
    if ragged or given.requires_grad:  # a copy: the gradient of softmax needs what it gave
        given = given * mask[..., None]
    given.diagonal(dim1=1, dim2=2).zero_()
    received = given.sum(1) - given.sum(2)  # (B, N)
    low = received.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = received.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    span = high - low
    found = (received - low) / torch.where(span > 0, span, 1)
    return torch.where(mask, found, 0)


class AdaMerge(Reducer):
    """As many tokens as each image allows in each block, at most r, before the block."""

    used = (
        *("r", "layers", "unmerge", "order", "batch", "temperature", "alpha", "proportional"),
        *("mean", "deviation"),
    )

    def __init__(self, settings: ReduceConfig, blocks: int) -> None:
        """As `Reducer`.

        Raises:
            InputError: no statistics, or not as many as the tower has blocks.
        """
        super().__init__(settings, blocks)
        self.proportional = settings.proportional
        held = len(settings.mean), len(settings.deviation)
        if self.layers and held != (blocks, blocks):
            what = "needs statistics" if held == (0, 0) else f"has statistics of {held[0]} blocks, the tower {blocks}"
            raise InputError(
                f"reduce.method=adamerge {what}; make them with scripts/calibrate.py, and give the file as "
                "reduce.statistics"
            )

    def step(self, layer: int, x: Tensor, tokens: Tokens, keys: Tensor | None) -> Tensor:
        """As `Reducer.step`; a share is one of the picture's patches."""
        settings = self.settings
        found = Layer(x, tokens.mask, settings.order)
        tokens.similarity[layer] = found.similarity
        r = self.amount(tokens.source.shape[1])
        many = rate(
            found.similarity, settings.mean[layer], settings.deviation[layer], r, settings.temperature, settings.alpha
        )
        if settings.batch == "shared":
            many = many.float().mean().round().long().expand(len(x))
        many = many.minimum(found.most)
        if not bool(many.any()):
            return x
        y, _, source = found.merge(many)
        tokens.merge(source, y.shape[1])
        return y
