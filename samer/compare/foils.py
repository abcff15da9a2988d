"""Foils, captions with a phrase of another image, and what a projector is asked beside a split's captions.

A foil asks: does an image score higher with its caption than with the same caption in which one phrase is that of
another image? By types of phrases (`samer.selection.phrases`), in the manner of SugarCrepe's replacements, which the
authors of CPI measure. Ours are made by lot: some are true of the image, and some are no English.

Shape letters: Q queries (captions), I images, F foils, M tokens, H hidden, D embedding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from samer.compare.queries import own_images
from samer.config import MergeConfig
from samer.data.records import ImageRecord
from samer.evaluation import compress_images, encode_texts, fitted_compressor, join_queries, relevance_metrics
from samer.losses import alignment, pooled, uniformity
from samer.retrievers.base import Encoder
from samer.runtime.progress import Progress, batched
from samer.runtime.shards import finished_shard, read_finished, write_shard
from samer.runtime.signals import stop_here
from samer.scoring import maxsim
from samer.selection.phrases import TYPES, WORD, phrases_of

VERSION = 1
PART = 256  # texts of a part
RETRIEVAL = ("r@1", "r@5", "r@10", "ndcg@10")


@dataclass(frozen=True)
class Foil:
    """A caption of an image, and the same with a phrase of another image's caption in place of one of its own."""

    image: int
    type: str
    text: str
    foil: str


def foils(records: Sequence[ImageRecord], seed: int) -> list[Foil]:
    """A foil of every type that one caption of an image has, drawn by lot; no phrase is replaced by itself."""
    told = []  # (image, text, type, phrase's place) of one caption an image
    for number, record in enumerate(records):
        related = [caption for caption in record.captions if caption.related]
        if related:
            caption = related[number % len(related)]
            told += [(number, caption.text, span) for span in phrases_of(caption)]
    random, found = np.random.default_rng(seed), []
    for kind in TYPES:
        own = [(image, text, span) for image, text, span in told if span.type == kind]
        held = sorted({text[span.start : span.end].lower() for _, text, span in own})
        by_image: dict[int, list] = {}
        for image, text, span in own:
            by_image.setdefault(image, []).append((text, span))
        for image, choices in by_image.items():
            text, span = choices[random.integers(len(choices))]
            others = [phrase for phrase in held if phrase not in _words(text)]
            if others:
                other = others[random.integers(len(others))]
                found.append(Foil(image, kind, text, text[: span.start] + other + text[span.end :]))
    return found


def _words(text: str) -> str:
    return " ".join(match[0].lower() for match in WORD.finditer(text))


class Asked:
    """What every projector is asked: captions of the split, and foils, whose hidden states are kept in a folder."""

    def __init__(
        self, records: Sequence[ImageRecord], asked: Sequence[Foil], folder: Path, texts: Encoder, batch_size: int
    ) -> None:
        self.records, self.foils, self.batch_size = records, asked, batch_size
        self.owner = own_images(records)
        self.lines = list(dict.fromkeys(text for foil in asked for text in (foil.text, foil.foil)))
        model = json.loads(json.dumps(asdict(texts.identity)))
        self.stamp = {"version": VERSION, "model": model, "captions": _digest(records), "foils": _digest(asked)}
        hidden = _hidden(texts, self.lines, folder, {"version": VERSION, "model": model}, batch_size)
        self.hidden = dict(zip(self.lines, hidden))


def _digest(values: Sequence) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


@torch.no_grad()
def _hidden(texts: Encoder, lines: Sequence[str], folder: Path, how: dict, batch_size: int) -> list[Tensor]:
    """Hidden states (M, H) of each text; finished parts of `folder` are kept."""
    found: list[Tensor] = []
    parts = [lines[start : start + PART] for start in range(0, len(lines), PART)]
    for number, part in enumerate(Progress(parts, "encoding foils", unit=f"parts of {PART} texts", leave=False)):
        stop_here()
        path, stamp = folder / f"part-{number:05d}.safetensors", {**how, "texts": _digest(part)}
        if finished_shard(path, stamp) is None:
            queries = [texts.query_inputs(batch) for batch in batched(part, batch_size)]
            states = [(texts.hidden_states(each).cpu(), each["attention_mask"].bool().cpu()) for each in queries]
            rows = [row[mask] for hidden, valid in states for row, mask in zip(hidden, valid)]
            lengths = torch.tensor([len(row) for row in rows])
            write_shard(path, {"hidden": torch.cat(rows), "lengths": lengths}, stamp, {"texts": len(rows)})
        tensors = read_finished(path)
        found += tensors["hidden"].split(tensors["lengths"].tolist())
    return found


@torch.no_grad()
def measure(encoder: Encoder, asked: Asked, merge: MergeConfig) -> dict[str, Tensor]:
    """Retrieval of every caption (Q,) in percent, foils (F,) told apart, 100 or 0, alignment and uniformity (1,).

    `back:r@1` (I,): an image finds one of its captions. A foil that ties counts as not told apart. Alignment and
    uniformity are of the pooled vectors of the split, images after the merge.
    """
    records, texts = asked.records, [caption.text for record in asked.records for caption in record.captions]
    queries = join_queries(list(encode_texts(encoder, texts, asked.batch_size)))
    compressor = fitted_compressor(encoder, records, merge, asked.batch_size)
    told = {text: encoder.project(hidden.to(encoder.device).float()) for text, hidden in asked.hidden.items()}
    by_image: list[list[int]] = [[] for _ in records]
    for number, foil in enumerate(asked.foils):
        by_image[foil.image].append(number)
    scores, means, right, first = [], [], torch.zeros(len(asked.foils)), 0
    for batch, _, merged in compress_images(encoder, batched(records, asked.batch_size), compressor):
        scores.append(maxsim(queries.tokens, merged.tokens, queries.mask, merged.mask).cpu())
        means.append(pooled(merged.tokens, merged.mask))
        for place in range(len(batch)):
            own = [asked.foils[number] for number in by_image[first + place]]
            if own:
                pair = [told[text] for foil in own for text in (foil.text, foil.foil)]
                mask = pad_sequence([torch.ones(len(t), dtype=torch.bool) for t in pair], batch_first=True)
                image, seen = merged.tokens[place, None], merged.mask[place, None]
                found = maxsim(pad_sequence(pair, batch_first=True), image, mask.to(image.device), seen).view(-1, 2)
                right[by_image[first + place]] = 100.0 * (found[:, 0] > found[:, 1]).float().cpu()
        first += len(batch)
    matrix = torch.cat(scores, dim=1)
    positives = torch.from_numpy(asked.owner)[:, None] == torch.arange(len(records))
    forward, backward = relevance_metrics(matrix, positives), relevance_metrics(matrix.T, positives.T)
    values = {name: torch.from_numpy(forward[name]).float() for name in RETRIEVAL}
    values["back:r@1"] = torch.from_numpy(backward["r@1"]).float()
    for kind in TYPES:
        values[f"foil:{kind}"] = right[[k for k, foil in enumerate(asked.foils) if foil.type == kind]]
    every = torch.cat(means)
    near = alignment(pooled(queries.tokens, queries.mask), every, positives.to(every.device))
    return {**values, "alignment": near.cpu().view(1), "uniformity": uniformity(every).cpu().view(1)}
