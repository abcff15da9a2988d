"""What trains: the projection, the merge and the loss of one batch.

Shape letters: B captions of this process, U distinct images, N tokens, K regions, D embedding, I images scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samer.compressors import Compressor, make_compressor
from samer.config import MergeConfig
from samer.losses import (
    alignment,
    first_rows,
    midpoint_mixup,
    mixup_partners,
    multi_positive_t2i_loss,
    pooled,
    uniformity,
)
from samer.objects import object_diagnostics
from samer.retrievers.banks import QueryStates
from samer.retrievers.base import Encoder, Projection
from samer.runtime.gather import gather_ragged, gather_with_grad
from samer.scoring import maxsim
from samer.settings import Budget
from samer.tokens import MergedTokens, VisualTokens

CHUNK_ELEMENTS = 2**27  # floats that one slice of merging or scoring may take: 512 MB
DIAGNOSED = 64  # captions of a batch that the object diagnostics look at


class ProjectorModel(nn.Module):
    """The shared projection, the only thing that trains; the frozen retriever stands beside it, not in it."""

    def __init__(
        self,
        retriever: Encoder,
        merge: MergeConfig,
        temperature: float,
        gather_negatives: bool,
        budgets: Sequence[Budget] = (),
        queries: QueryStates | None = None,
    ) -> None:
        """`queries`: the tokens of the query bank, for a compressor that needs one."""
        super().__init__()
        self.projection = Projection(retriever.base_projector)
        self.retriever = retriever  # no nn.Module: neither registered, nor trained, nor saved
        self.merge = merge
        every = [replace(merge, num_regions=k) for k in budgets or (merge.num_regions,)]
        self.compressors = [make_compressor(each).for_training() for each in every]
        # what diagnostics look at
        self.largest = max(self.compressors, key=lambda each: Fraction(each.settings.num_regions))
        self.queries = queries
        self.temperature = temperature
        self.gather_negatives = gather_negatives
        self.mixup_share: float | None = None  # of an image's own vectors in what is scored; None: they alone
        self.diagnose = False
        self.diagnostics: dict[str, float] = {}

    def forward(
        self,
        image_inputs: dict[str, Tensor],
        query_inputs: dict[str, Tensor],
        image_of: Tensor,
        image_numbers: Tensor,
        labels: Tensor,
        real: Tensor,
        answers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of METHOD section 4 for one `Collator` batch; each caption's image is merged with its own labels.

        Rows that only fill up are no images to score and have no loss; what this process returns is weighted so that
        the mean over processes is the mean over all real rows.

        A compressor that labels do not change compresses each distinct image once. Merging and scoring take bounded
        memory for any batch: what does not fit `CHUNK_ELEMENTS` is computed in slices, and again in the backward pass.
        The batch's hidden states themselves are held whole.
        """
        if self.queries is not None:
            self._project_bank()
        needs = self.compressors[0].needs
        image_inputs = self.retriever.reduced(image_inputs)
        image_hidden, attention = self.retriever.image_states(image_inputs, needs)  # (U, N, H), distinct images
        query_hidden = self.retriever.hidden_states(query_inputs)  # (B, M, H)
        layout = self.retriever.image_layout(image_inputs)
        coords, patches, views = (x.to(image_hidden.device) for x in (layout.coords, layout.patches, layout.views))
        seeds = image_inputs.get("seeds")
        mask = image_inputs["attention_mask"].bool().to(image_hidden.device)  # (U, N)
        query_mask = query_inputs["attention_mask"].bool().to(image_hidden.device)
        whole = bool(mask.all())

        # several budgets share one projection of the states; of one budget, slices project what they need
        projected = self._projected(image_hidden) if len(self.compressors) > 1 else None

        def compress(compressor: Compressor, rows: Tensor, row_labels: Tensor | None) -> MergedTokens:
            tokens = self._tokens_of(image_hidden, rows) if projected is None else projected[rows]  # (b, N, D)
            signals = {name: value[rows] for name, value in attention.items()}
            some_mask = None if whole else mask[rows]
            chosen = None if seeds is None else seeds[rows]
            visual = VisualTokens(tokens, coords[rows], some_mask, patches[rows], chosen, signals, views=views[rows])
            return compressor(visual, row_labels)

        self.diagnostics = {}
        if self.diagnose and self.largest.uses_labels:
            self._log_objects(compress, image_of[:DIAGNOSED], labels[:DIAGNOSED], None if whole else mask)
        numbers = gather_with_grad(image_numbers) if self.gather_negatives else image_numbers
        counted = gather_with_grad(real.to(torch.uint8)).bool()  # of all processes
        scored = counted if self.gather_negatives else real if real.any() else torch.ones_like(real)
        positives = _positives(image_numbers, numbers[scored], real, answers)
        queries = self.projection(query_hidden)  # (B, M, D)
        count = image_hidden.shape[1]
        losses = []
        for compressor in self.compressors:

            def regions(rows: Tensor, row_labels: Tensor, compressor: Compressor = compressor) -> tuple[Tensor, Tensor]:
                if compressor.uses_labels:
                    merged = compress(compressor, rows, row_labels)
                    return merged.tokens, merged.mask
                distinct, place = rows.unique(return_inverse=True)
                merged = compress(compressor, distinct, None)
                return merged.tokens.index_select(0, place), merged.mask[place]

            width = image_hidden.shape[2] + 3 * queries.shape[2] + 4 * compressor.places(count)
            images, valid = _in_chunks(regions, CHUNK_ELEMENTS // (count * width), image_of, labels)
            if self.gather_negatives:
                images, valid = gather_ragged(images, valid)
            images, valid = (images, valid) if scored.all() else (images[scored], valid[scored])
            if self.diagnose and compressor is self.largest:
                self._log_spread(pooled(queries, query_mask), pooled(images, valid), positives, numbers[scored], real)
            images = self._mixed(images, valid, numbers[scored])

            def score(some: Tensor, some_mask: Tensor, images: Tensor = images, valid: Tensor = valid) -> tuple[Tensor]:
                return (maxsim(some, images, some_mask, valid),)

            pairs = images.shape[0] * images.shape[1] * queries.shape[1]
            (scores,) = _in_chunks(score, CHUNK_ELEMENTS // pairs, queries, query_mask)  # (B, I)
            losses.append(multi_positive_t2i_loss(scores, positives, self.temperature))
        return {"loss": torch.stack(losses).mean() * (len(counted) / counted.sum())}

    def _tokens_of(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Unit tokens (b, N, D) of some images (b,), each projected once, of hidden states (U, N, H)."""
        distinct, place = rows.unique(return_inverse=True)
        some = hidden if len(distinct) == len(hidden) else hidden[distinct]
        return self.projection(some).index_select(0, place)

    def _projected(self, hidden: Tensor) -> Tensor:
        """Unit tokens (U, N, D) of hidden states (U, N, H), in slices as `_in_chunks`."""
        width = hidden.shape[1] * (hidden.shape[2] + self.projection.out_features)

        def project(some: Tensor) -> tuple[Tensor]:
            return (self.projection(some),)

        return _in_chunks(project, CHUNK_ELEMENTS // width, hidden)[0]

    def _mixed(self, images: Tensor, valid: Tensor, numbers: Tensor) -> Tensor:
        """The images (I, K, D), or what midpoint mixup makes of them; `numbers` (I,) tells which are one image."""
        if self.mixup_share is None:
            return images
        return midpoint_mixup(images, mixup_partners(numbers), self.mixup_share, valid)

    @torch.no_grad()
    def _log_objects(self, compress: Callable, rows: Tensor, labels: Tensor, mask: Tensor | None) -> None:
        """How whole the objects of some captions (b,) are after merging, with their labels and without."""
        biased, free = (compress(self.largest, rows, use) for use in (labels, None))
        self.diagnostics |= _diagnostics(biased, free, labels, None if mask is None else mask[rows])

    @torch.no_grad()
    def _log_spread(self, queries: Tensor, images: Tensor, positives: Tensor, numbers: Tensor, real: Tensor) -> None:
        """Alignment of pooled captions (B, D) with their pooled images (I, D), uniformity of the distinct images."""
        values = {
            "alignment": alignment(queries, images, positives & real[:, None]),
            "uniformity": uniformity(images[first_rows(numbers)]),
        }
        self.diagnostics |= {name: float(value) for name, value in values.items() if value.isfinite()}

    @torch.no_grad()
    def _project_bank(self) -> None:
        """Has the query bank follow the projection, as a constant of this step."""
        hidden = self.queries.hidden.to(self.projection.weight.device)
        state = {"vectors": self.projection(hidden), "weights": self.queries.weights}
        for compressor in self.compressors:
            compressor.load_state(state)


def _positives(own: Tensor, images: Tensor, real: Tensor, answers: Tensor | None) -> Tensor:
    """Which images (I,) are right for captions with these own images (B,), or with these answers (B, A), (B, I) bool.

    All are for a row that is not real: a loss of 0 and no gradient, in a process that takes part in every exchange.
    """
    positives = (own[:, None] == images) | ~real[:, None]
    return positives if answers is None else positives | (answers[..., None] == images).any(1)


def _in_chunks(function: Callable[..., tuple[Tensor, ...]], size: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """`function` over slices of at most `size` rows, its results concatenated.

    One slice is a plain call. Several are recomputed in the backward pass, so that one at a time is held; values and
    gradients are those of the plain call.
    """
    size = max(1, size)
    if len(rows[0]) <= size:
        return function(*rows)
    parts = [
        checkpoint(function, *(row[start : start + size] for row in rows), use_reentrant=False)
        for start in range(0, len(rows[0]), size)
    ]
    return tuple(torch.cat(column) for column in zip(*parts))


def _diagnostics(biased: MergedTokens, free: MergedTokens, labels: Tensor, mask: Tensor | None) -> dict[str, float]:
    values = object_diagnostics(biased, labels, mask=mask, box_free=free)
    means = {name: float(value.nanmean()) for name, value in values.items()}
    return {name: value for name, value in means.items() if math.isfinite(value)}
