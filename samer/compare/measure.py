"""Retrieval, grounding, size and cost of compressions of one split.

Shape letters: Q queries (captions), I images, P phrases, N tokens, K budget, D embedding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from samer.compare.queries import CAPTIONS_ONLY, Asked, own_images
from samer.compressors import make_compressor
from samer.config import MergeConfig
from samer.data.records import ImageRecord
from samer.evaluation import encode_texts, fitted_compressors, join_queries, relevance_metrics
from samer.grounding import PhraseIndex, ground
from samer.metrics import query_metrics
from samer.objects import instance_labels, object_diagnostics
from samer.retrievers.base import Encoder
from samer.runtime.processes import gather_objects, rank, world_size
from samer.runtime.progress import Progress, batched
from samer.runtime.shards import joined
from samer.scoring import maxsim
from samer.settings import Budget
from samer.tokens import MergedTokens, QueryTokens

MEASURED = ("box_mass", "iou", "mixed_clusters", "purity", "vectors")  # per phrase or image
METRICS = ("r@1", "r@5", "r@10", "ndcg@10")


def tokens_of(encoder: Encoder, records: Sequence[ImageRecord], batch_size: int) -> tuple[int, int, int]:
    """Tokens per image of a split: fewest, mean, most; one image is looked at where all have the same grid."""
    alike = encoder.grid is not None and encoder.reduction.method == "none"
    some = records[:1] if alike else records
    counts = [
        encoder.reduced(encoder.record_inputs(batch))["attention_mask"].sum(1) for batch in batched(some, batch_size)
    ]
    found = torch.cat(counts)
    return int(found.min()), round(float(found.double().mean())), int(found.max())


class _Scores:
    """Scores of one set of queries against the images of a split, by compression, (Q, I) each."""

    def __init__(self, queries: QueryTokens, keys: Sequence[str], images: int) -> None:
        self.queries = queries
        self.of = {key: torch.empty(len(queries.tokens), images) for key in keys}

    def add(self, key: str, images: slice, merged: MergedTokens) -> None:
        """Scores a batch of images."""
        found = maxsim(self.queries.tokens, merged.tokens, self.queries.mask, merged.mask)
        self.of[key][:, images] = found.cpu()


@torch.no_grad()
def measure(
    encoder: Encoder,
    records: Sequence[ImageRecord],
    merges: dict[str, MergeConfig],
    batch_size: int,
    asked: Asked = CAPTIONS_ONLY,
) -> dict[str, dict[str, Tensor]]:
    """Retrieval, grounding and size of several compressions of one split with the encoder's projector.

    Several processes share the compressions out; all of them must call this, and get all values.

    Args:
        encoder: images are encoded once, whatever the number of compressions.
        records: of the split, with boxes; compression does not see them.
        merges: key -> settings.
        batch_size: images, and captions, at a time.
        asked: which other images answer a caption, the phrases asked, the banks of queries.

    Returns:
        Per key: `r@1 r@5 r@10 ndcg@10` (Q,) text to image and `back:r@1` image to text, of images that answer a
        caption, in percent; `box_mass`, `iou` (P,); `osr` (Q,); `vectors` (I,); `mixed_clusters`, `purity` (I,), NaN
        where an image has no box. Where phrases are asked, `phrase:r@1` and so on and `phrase:mrr`, reciprocal ranks
        in percent, of each.
    """
    compressors = fitted_compressors(encoder, records, merges, batch_size, asked.bank_texts, asked.banks)
    every = list(merges)
    compressors = {key: compressors[key] for key in every[rank() :: world_size()]}
    texts = [caption.text for record in records for caption in record.captions]
    queries = list(encode_texts(encoder, texts, batch_size))
    sets = {"": _Scores(join_queries(queries), list(compressors), len(records))}
    if asked.phrases is not None:
        tokens = join_queries(list(encode_texts(encoder, asked.phrases.texts, batch_size)))
        sets["phrase:"] = _Scores(tokens, list(compressors), len(records))
    flat = [tokens[mask] for query in queries for tokens, mask in zip(query.tokens, query.mask)]
    index = PhraseIndex(records, queries)
    everything = make_compressor(MergeConfig(compressor="none"))
    needs = sorted({name for compressor in compressors.values() for name in compressor.needs})
    kept: dict[str, dict[str, list[Tensor]]] = {key: {} for key in compressors}
    whole: list[Tensor] = []
    for images in Progress(list(batched(range(len(records)), batch_size)), "measure", unit="batches", leave=False):
        batch = records[images.start : images.stop]
        visual = encoder.encode_images(encoder.record_inputs(batch), needs)
        own = index.own_tokens(images, flat)
        labels = _image_labels(batch, visual.coords)
        boxed = (labels > 0).any(1)
        whole.append(ground(everything(visual), own, index, visual)["match"].cpu())
        for key, compressor in compressors.items():
            merged = compressor(visual)
            for scores in sets.values():
                scores.add(key, slice(images.start, images.stop), merged)
            found = ground(merged, own, index, visual)
            mixing = object_diagnostics(merged, labels.to(merged.assignments.device))
            for name in ("mixed_clusters", "purity"):
                found[name] = mixing[name].cpu().masked_fill(~boxed, float("nan"))
            found["vectors"] = merged.mask.sum(1)
            for name in (*MEASURED, "match"):
                kept[key].setdefault(name, []).append(found[name].cpu())
    positives = asked.positives
    if positives is None:
        positives = torch.from_numpy(own_images(records))[:, None] == torch.arange(len(records))
    asking = (positives > 0).any(0)  # graded data has pages that answer nothing
    result = {}
    for key, parts in kept.items():
        values = {name: torch.cat(part) for name, part in parts.items() if name in MEASURED}
        forward = relevance_metrics(sets[""].of[key], positives)
        backward = relevance_metrics(sets[""].of[key].T[asking], positives.T[asking])
        values |= {name: torch.from_numpy(forward[name]) for name in METRICS}
        values["back:r@1"] = torch.from_numpy(backward["r@1"])
        values["osr"] = torch.cat(parts["match"]) / torch.cat(whole)
        if asked.phrases is not None:
            found = query_metrics(sets["phrase:"].of[key], asked.phrases.positives)
            values |= {f"phrase:{name}": torch.from_numpy(found[name]) for name in METRICS}
            values["phrase:mrr"] = torch.from_numpy(100.0 / found["median_rank"])  # the rank of the best positive
        result[key] = {name: value.float() for name, value in values.items()}
    parts = gather_objects(result)
    return {key: part[key] for key in every for part in parts if key in part}


def _image_labels(records: Sequence[ImageRecord], coords: Tensor) -> Tensor:
    """Instance labels (B, N) from all boxes that any caption of an image names, each chain once, and of its things."""
    boxes = []
    for record in records:
        chains = {
            phrase.chain_id: phrase.boxes for caption in record.captions for phrase in caption.phrases if phrase.boxes
        }
        every = [*chains.values(), *(things.boxes for things in record.things)]
        boxes.append(torch.tensor([box for each in every for box in each]).reshape(-1, 4))
    return instance_labels(coords.cpu(), boxes, min_area=0.0, max_phrases=10_000)


@torch.no_grad()
def cost(
    store: Encoder,
    records: Sequence[ImageRecord],
    merge: MergeConfig,
    budgets: Sequence[Budget],
    batch_size: int,
) -> dict:
    """Storage, MaxSim operations and measured queries per second at each budget, the first of which is all tokens.

    Vectors, bytes and operations are those of all images together, the latter 2 * D * sum(M) * sum(vectors), as
    published. Speed: every image of the split against 256 queries,
    float32, on this machine's device; median of 5 passes.
    """
    store.use_projector(store.base_projector)
    texts = [caption.text for record in records for caption in record.captions]
    queries = list(encode_texts(store, texts, batch_size))
    query_tokens = sum(int(query.mask.sum()) for query in queries)
    visual = [store.encode_images(store.record_inputs(batch)) for batch in batched(records, batch_size)]
    some = next(encode_texts(store, texts[:256], 256))
    images, times = [], [[] for _ in budgets]
    for budget in budgets:
        compressor = make_compressor(replace(merge, compressor="samer", num_regions=budget))
        kept = [(merged.tokens, merged.mask) for merged in map(compressor, visual)]  # not the weights, N x K each
        images.append(tuple(map(joined, zip(*kept))))
    for _ in range(6):  # in turn, so that a noisy moment hits all of them; the first round warms up
        for (tokens, mask), seconds in zip(images, times):
            started = time.perf_counter()
            maxsim(some.tokens, tokens, some.mask, mask)[0, 0].item()  # the item waits for a GPU
            seconds.append(time.perf_counter() - started)
    rows = [
        {
            "budget": budget,
            "vectors": int(mask.sum()),
            "bytes": int(mask.sum()) * store.embedding_dim * 2,
            "gb_per_million_images": round(int(mask.sum()) / len(records) * store.embedding_dim * 2 / 1e3, 4),
            "operations": 2 * store.embedding_dim * query_tokens * int(mask.sum()),
            "queries_per_second": round(len(some.tokens) / statistics.median(seconds[1:]), 1),
        }
        for budget, (_, mask), seconds in zip(budgets, images, times)
    ]
    return {"images": len(records), "queries": len(texts), "rows": rows}
