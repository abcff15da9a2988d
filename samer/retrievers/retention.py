"""Which layers SAP reads, by how much of the scores their choice of patches retains (the second version of its paper).

    layers = anchor_layers(retention_curve(retriever, records))   # then merge.sap_layers="{layers[0]}-{layers[1]}"

scripts/layers.py does that.

Layer by layer, a tenth of an image's patches is kept, those that its other patches look at most, and a caption of the
image is scored by them: retention is that score over the score by all patches. The layers just before the last fall
below the median are taken. The paper calibrates on 500 pairs of its model's training set.

Shape letters: L layers, B images, N tokens, M query tokens, D embedding.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from samer.config import InputError
from samer.data.records import ImageRecord
from samer.retrievers.hf import Retriever
from samer.runtime.progress import Progress, batched
from samer.runtime.signals import stop_here

KEPT = 0.10  # of an image's patches


def first_pairs(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """The first so many pairs of an image and a caption of it, by image; those without captions are left out."""
    found = []
    for record in records:
        captions = record.captions[:count]
        count -= len(captions)
        if captions:
            found.append(replace(record, captions=captions))
    return found


@torch.no_grad()
def retention_curve(retriever: Retriever, records: Sequence[ImageRecord], batch_size: int = 8) -> list[float]:
    """The mean score retention of every layer, over all pairs of an image and a caption of it.

    Args:
        retriever: with the projector in use.
        records: images with captions.
        batch_size: images per forward pass.

    Raises:
        InputError: no image has a caption.
    """
    if not any(record.captions for record in records):
        raise InputError(f"none of {len(records):,} images has a caption, so there is nothing to calibrate on")
    found = []
    total = -(-len(records) // batch_size)
    for batch in Progress(batched(records, batch_size), "calibration", total=total, unit="batches"):
        stop_here()
        inputs = retriever.reduced(retriever.record_inputs(batch))
        hidden, attention = retriever.layer_attention(inputs)
        tokens = retriever.project(hidden)  # (B, N, D)
        patches = retriever.image_layout(inputs).patches.to(tokens.device)
        for record, image, seen, own in zip(batch, tokens, attention.unbind(1), patches):
            for caption in record.captions:
                queries = retriever.encode_queries(retriever.query_inputs([caption.text]))
                found.append(score_retention(queries.tokens[0, queries.mask[0]], image[own], seen[:, own]))
    return torch.stack(found).mean(0).tolist()


def score_retention(query: Tensor, patches: Tensor, attention: Tensor) -> Tensor:
    """Score by the patches that each layer keeps over the score by all, (L,); 1 where the latter is 0.

    Args:
        query: (M, D), valid tokens.
        patches: (N, D).
        attention: (L, N), what each patch receives.
    """
    similarity = (query @ patches.T).double()  # (M, N)
    kept = attention.topk(max(1, round(len(patches) * KEPT)), dim=1).indices  # (L, k)
    after = similarity[:, kept].amax(2).sum(0)  # (L,)
    before = similarity.amax(1).sum()
    return after / before if before != 0 else torch.ones_like(after)


def anchor_layers(curve: Sequence[float]) -> tuple[int, int]:
    """First and last of the layers to read: a fifth of all, before the longest end of the curve below its median.

    Args:
        curve: of `retention_curve`, (L,).
    """
    median, end = statistics.median(curve), len(curve)
    while curve[end - 1] < median:  # not all are below it
        end -= 1
    return max(0, end - -(-len(curve) // 5)), end - 1
