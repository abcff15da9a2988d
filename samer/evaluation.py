"""From tokens to metrics: encode a split without boxes, score every query against every image, summarise.

Shape letters: Q queries, I images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from samer.compressors import Compressor, make_compressor
from samer.config import InputError, MergeConfig
from samer.data.records import ImageRecord
from samer.metrics import bootstrap_intervals, graded_metrics, query_metrics, summary
from samer.retrievers.banks import Bank, query_states
from samer.retrievers.base import Encoder
from samer.retrievers.stream import read_images
from samer.runtime.processes import from_first, gather_objects, rank, world_size
from samer.runtime.progress import batched, prefetched
from samer.scoring import maxsim
from samer.tokens import MergedTokens, QueryTokens, VisualTokens, check_tensor

FIT_IMAGES = 256  # what a compressor with a codebook is fitted on, evenly spaced over the corpus


def fit_records(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """What a compressor with a codebook learns from: `FIT_IMAGES` of a corpus, evenly spaced."""
    steps = np.linspace(0, len(records) - 1, min(FIT_IMAGES, len(records))).round().astype(int)
    return [records[k] for k in steps]


def fitted_compressor(
    retriever: Encoder,
    records: Sequence[ImageRecord],
    merge: MergeConfig,
    batch_size: int,
    bank_texts: Sequence[str] = (),
    bank: Bank | None = None,
) -> Compressor:
    """The compressor that `merge` names, fitted on the corpus `records` where it has something to learn from one.

    The first process fits it and the others take over what it learned: two devices need not agree in the last bit, and
    codes that differ in one would mix in an index. So every process must call this, with the same corpus.

    Args:
        retriever: with the projector in use.
        records: the corpus.
        merge: compressor and settings.
        batch_size: images, or texts, per forward pass.
        bank_texts: what a query bank is made of; only where the compressor `needs_queries`.
        bank: one that is there already, instead.

    Raises:
        InputError: an unknown compressor, or one that needs queries and gets none.
    """
    banks = {} if bank is None else {"": bank}
    return fitted_compressors(retriever, records, {"": merge}, batch_size, bank_texts, banks)[""]


@torch.no_grad()
def fitted_compressors(
    retriever: Encoder,
    records: Sequence[ImageRecord],
    merges: Mapping[str, MergeConfig],
    batch_size: int,
    bank_texts: Sequence[str] = (),
    banks: Mapping[str, Bank] = MappingProxyType({}),
) -> dict[str, Compressor]:
    """As `fitted_compressor`, several by name; what they learn from is encoded once for all of them.

    `banks` are those that are there already, by the compressor's name.
    """
    compressors = {key: make_compressor(merge) for key, merge in merges.items()}
    seen: dict[tuple[str, ...], list[VisualTokens]] = {}
    made: dict[int, Bank] = {}  # by the most vectors asked for
    few = sum(compressor.needs_corpus for compressor in compressors.values()) < 2

    def corpus(needs: Sequence[str]) -> Iterable[VisualTokens]:
        batches = batched(fit_records(records), batch_size)
        encoded = (retriever.encode_images(retriever.record_inputs(batch), needs) for batch in batches)
        if few:
            return encoded
        if tuple(needs) not in seen:
            seen[tuple(needs)] = list(encoded)
        return seen[tuple(needs)]

    def learned(compressor: Compressor) -> dict[str, Tensor]:
        compressor.fit(corpus(compressor.needs))
        return compressor.state()

    for key, compressor in compressors.items():
        if compressor.needs_corpus:
            compressor.load_state(from_first(partial(learned, compressor)))
        if compressor.needs_queries:
            size, bank = merges[key].bank_size, banks.get(key)
            if bank is None and size not in made:
                states = query_states(retriever, bank_texts, size, "given texts", batch_size)
                made[size] = states.bank(retriever.current_projector())
            compressor.load_state((bank or made[size]).state)
    return compressors


@torch.no_grad()
def compress_images(
    retriever: Encoder, batches: Iterable[Sequence[ImageRecord]], compressor: Compressor
) -> Iterator[tuple[Sequence[ImageRecord], VisualTokens, MergedTokens]]:
    """Encodes and compresses batches of images, without boxes; the next ones are read meanwhile.

    Yields:
        (records of the batch, their tokens before and after, on the retriever's device).
    """
    with closing(read_images(retriever, list(batches))) as stream:
        for batch, (_, inputs) in stream:
            visual = retriever.encode_images(inputs, compressor.needs)
            yield batch, visual, compressor(visual)


@torch.no_grad()
def encode_texts(retriever: Encoder, texts: Sequence[str], batch_size: int) -> Iterator[QueryTokens]:
    """Encodes queries in batches."""
    for _, inputs in prefetched(retriever.query_inputs, batched(texts, batch_size)):
        yield retriever.encode_queries(inputs)


def join_queries(batches: Sequence[QueryTokens]) -> QueryTokens:
    """Batches of queries as one, padded to the longest, without offsets: scored in one call, images are read once."""
    width = max(batch.mask.shape[1] for batch in batches)
    short = [width - batch.mask.shape[1] for batch in batches]
    tokens = torch.cat([F.pad(batch.tokens, (0, 0, 0, missing)) for batch, missing in zip(batches, short)])
    return QueryTokens(tokens, torch.cat([F.pad(batch.mask, (0, missing)) for batch, missing in zip(batches, short)]))


def check_described(records: Sequence[ImageRecord], undescribed: bool = False) -> None:
    """Refuses images without captions where both directions are measured, before any work.

    Args:
        records: of the split.
        undescribed: whether such images belong to the data set (`Reader.undescribed`): they are what else can be found.

    Raises:
        InputError: names the first.
    """
    bare = [record.image_id for record in records if not record.captions]
    if bare and not (undescribed and len(bare) < len(records)):
        raise InputError(
            f"{len(bare):,} of {len(records):,} images have no caption, the first is {bare[0]}; image to text needs "
            "one of each: take them out of the split"
        )


@torch.no_grad()
def score_records(
    retriever: Encoder, records: Sequence[ImageRecord], compressor: Compressor, *, batch_size: int
) -> Tensor:
    """Scores (Q, I) of every caption against every image of a split, on the CPU; images are compressed without boxes.

    The images are shared out over the processes; every process returns the same scores.
    """
    texts = [caption.text for record in records for caption in record.captions]
    if not texts:
        raise InputError(f"none of {len(records):,} images has a caption, so there is nothing to evaluate")
    queries = join_queries(list(encode_texts(retriever, texts, batch_size)))
    own_batches = batched(records[rank() :: world_size()], batch_size)
    own = [
        maxsim(queries.tokens, merged.tokens, queries.mask, merged.mask).cpu()
        for _, _, merged in compress_images(retriever, own_batches, compressor)
    ]
    scores = torch.empty(len(texts), len(records))
    for number, columns in enumerate(gather_objects(own)):
        if columns:
            scores[:, number :: world_size()] = torch.cat(columns, dim=1)
    return scores


def evaluate_records(
    retriever: Encoder, records: Sequence[ImageRecord], merge: MergeConfig, *, batch_size: int, bank: Bank | None = None
) -> dict[str, float]:
    """Text-to-image metrics of a split, from `score_records`; every process returns the same ones.

    Images that answer a caption are those that its `grades` name, or its own.

    `bank` as in `fitted_compressor`.
    """
    compressor = fitted_compressor(retriever, records, merge, batch_size, bank=bank)
    scores = score_records(retriever, records, compressor, batch_size=batch_size)
    owner = torch.tensor([k for k, record in enumerate(records) for _ in record.captions])
    grades = grade_matrix(caption_grades(records), len(records))
    values = relevance_metrics(scores, owner[:, None] == torch.arange(len(records)) if grades is None else grades)
    return {name: summary(name, value) for name, value in values.items()}


def caption_grades(records: Sequence[ImageRecord]) -> list[list[list[int]]]:
    """[number of an image, grade] of every image that answers a caption, per caption; all [] where none has grades.

    Images that are not among the records are left out; a caption that is left with none has its own, at 1.
    """
    place = {record.image_id: k for k, record in enumerate(records)}
    rows = [
        [[place[name], grade] for name, grade in caption.grades if name in place]
        for record in records
        for caption in record.captions
    ]
    own = (k for k, record in enumerate(records) for _ in record.captions)
    return [row or [[k, 1]] for k, row in zip(own, rows)] if any(rows) else rows


def grade_matrix(rows: Sequence[Sequence[Sequence[int]]], images: int) -> Tensor | None:
    """Grades (Q, I) uint8 of `caption_grades`; None where a query has none, as relevance is not graded then."""
    if not rows or not all(rows):
        return None
    grades = torch.zeros(len(rows), images, dtype=torch.uint8)
    for query, row in enumerate(rows):
        numbers, values = zip(*row)
        grades[query, list(numbers)] = torch.tensor(values, dtype=torch.uint8)
    return grades


def relevance_metrics(scores: Tensor, truth: Tensor) -> dict[str, np.ndarray]:
    """Per-query metrics: `graded_metrics` of grades, `query_metrics` of bool."""
    return query_metrics(scores, truth) if truth.dtype == torch.bool else graded_metrics(scores, truth)


def recall_sum(directions: dict[str, dict]) -> float:
    """rSum: R@1, R@5 and R@10 of both directions of `both_directions`, added up, at most 600."""
    return round(sum(metrics[f"r@{k}"]["value"] for metrics in directions.values() for k in (1, 5, 10)), 6)


def both_directions(
    scores: Tensor, image_of: Tensor, *, grades: Tensor | None = None, resamples: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """Metrics of a score matrix in both directions, with 95 % bootstrap intervals over queries.

    Args:
        scores: (Q, I) float32.
        image_of: (Q,) whole numbers, the image that each query describes.
        grades: (Q, I) whole numbers, how well each image answers each query; None: its own does, no other.

    Returns:
        `{"text_to_image": {metric: {"value": v, "interval": [low, high]}}, "image_to_text": {...}}`; captions of one
        image are resampled together. Image to text asks the images that answer some query; recall is that of the best
        of an image's captions, of its five where it has five.
    """
    scores = torch.from_numpy(scores) if isinstance(scores, np.ndarray) else scores
    check_tensor("scores", scores)
    if scores.dim() != 2 or 0 in scores.shape:
        raise InputError(f"scores must be (queries, images) without a 0; they are {tuple(scores.shape)}")
    image_of = torch.as_tensor(image_of)
    if image_of.shape != scores.shape[:1] or image_of.is_floating_point() or image_of.dtype == torch.bool:
        raise InputError(
            f"image_of must be {len(scores)} whole numbers, a query's image each; it is {image_of.dtype} "
            f"{tuple(image_of.shape)}"
        )
    truth = image_of[:, None] == torch.arange(scores.shape[1]) if grades is None else grades
    if truth.shape != scores.shape:
        raise InputError(f"grades {tuple(truth.shape)} must have the shape of scores, {tuple(scores.shape)}")
    described = (truth > 0).any(0)
    directions = {
        "text_to_image": (scores, truth, image_of.numpy()),
        "image_to_text": (scores.T[described], truth.T[described], None),
    }
    result: dict[str, dict] = {}
    for name, (matrix, truth, groups) in directions.items():
        values = relevance_metrics(matrix, truth)
        intervals = bootstrap_intervals(values, resamples=resamples, seed=seed, groups=groups)
        result[name] = {
            metric: {
                "value": round(summary(metric, value), 6),
                "interval": [round(float(edge), 6) for edge in intervals[metric]],
            }
            for metric, value in values.items()
        }
    return result
