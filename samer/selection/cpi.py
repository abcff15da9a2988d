"""Contrastive phrase influence of captions: how much of a caption's score with its image goes with each phrase.

CPI (arXiv 2605.22651) as far as its abstract tells it: the global score removes coarse mismatches only; object,
attribute and relation phrases are replaced by nonce tokens, and the change of the score is the phrase's sensitivity;
pairs that survive are ranked by it. The formula is UNVERIFIED. OURS, with MaxSim s(I, c) of all tokens of the image:

    drop(p) = s(I, c) - mean over n replacements of s(I, c with p replaced)
    CPI(c)  = mean over the types that c has of the mean over its phrases p of that type of drop(p)

A first-order sensitivity of the scorer, no proof that the phrase is true of the image.

    FOLDER/part-00003.safetensors    scores (C,) of 64 images' captions and drops (P,) of their phrases, in order

Shape letters: C captions, P phrases, N tokens of an image, M tokens of a caption, D embedding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from samer.config import InputError, ModelConfig
from samer.data.records import ImageRecord
from samer.data.stamps import FILE, Stamps
from samer.evaluation import encode_texts
from samer.features.read import open_encoder
from samer.retrievers.base import Encoder
from samer.runtime.progress import Progress, batched
from samer.runtime.shards import finished_shard, read_finished, write_shard
from samer.runtime.signals import stop_here, stoppable
from samer.scoring import maxsim
from samer.selection.nonce import with_nonce
from samer.selection.phrases import TYPES, WORD, Span, phrases_of

VERSION = 1
PART = 64  # images of a part


@dataclass(frozen=True, slots=True)
class Scored:
    """A caption, its score with its image, and the mean drop by type of its phrases, None where it has none."""

    image_id: str
    text: str
    score: float
    drops: dict[str, float | None]

    @property
    def cpi(self) -> float | None:
        """Mean over the types that the caption has; None where it has no phrase."""
        known = [drop for drop in self.drops.values() if drop is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True, slots=True)
class _Told:
    """A caption of an image, by its number in a part, with its phrases."""

    image: int
    text: str
    spans: tuple[Span, ...]


def open_scorers(
    model: ModelConfig, device: torch.device, features: str, dtype: torch.dtype | None = None
) -> tuple[Encoder, Encoder]:
    """What encodes images, from a feature store where one is given, and what encodes texts.

    Raises:
        InputError: as `open_encoder`.
    """
    where = {"local_files_only": model.local_files_only, "revision": model.revision, "dtype": dtype}
    texts = open_encoder(model.name, device, pictures=not features, **where)
    return open_encoder(model.name, device, features=features, **where) if features else texts, texts


def score_captions(
    images: Encoder,
    texts: Encoder,
    records: Sequence[ImageRecord],
    folder: str | Path,
    *,
    replacements: int,
    seed: int,
    batch_size: int,
) -> list[Scored]:
    """Scores every caption that describes its image, distinct ones of an image once; finished parts are kept.

    Args:
        images: encodes pictures, or reads their features from a store.
        texts: encodes captions and what replacements make of them, by the same projection: a retriever.
        records: of the split.
        folder: of the parts.
        replacements: per phrase, n.
        seed: of the nonce words.
        batch_size: images, and texts, per forward pass.

    Raises:
        InputError: no caption, no replacement, or encoders of different projections.
        Stopped: SIGTERM came; the part at hand is computed again.
    """
    if replacements < 1:
        raise InputError(f"replacements is {replacements}; it must be at least 1")
    if images.current_projector().hash != texts.current_projector().hash:
        raise InputError(f"{images.name} and {texts.name} project by different weights; take both from one model")
    parts = [_told(records[start : start + PART]) for start in range(0, len(records), PART)]
    if not any(parts):
        raise InputError(f"none of {len(records):,} images has a caption that describes it")
    known = {match[0].lower() for part in parts for told in part for match in WORD.finditer(told.text)}
    substitute = partial(with_nonce, seed=seed, known=known)
    how = {
        "version": VERSION,
        "texts": [asdict(texts.identity), texts.current_projector().hash],
        "images": [asdict(images.identity), images.origin],
        "replacements": [replacements, seed, hashlib.sha256(" ".join(sorted(known)).encode()).hexdigest()],
    }
    found: list[Scored] = []
    stamps = Stamps(Path(folder) / FILE)
    with stoppable():
        for number, part in enumerate(Progress(parts, "scoring captions", unit=f"parts of {PART} images")):
            stop_here()
            own = records[number * PART : (number + 1) * PART]
            asked = [[own[told.image].image_id, told.text, *map(astuple, told.spans)] for told in part]
            stamp = {**how, "captions": hashlib.sha256(repr(asked).encode()).hexdigest()}
            if images is texts:  # a store tells by itself whether pictures were replaced (`check_records`)
                stamp["pictures"] = images.contents(own, stamps)
                stamps.write()
            path = Path(folder) / f"part-{number:05d}.safetensors"
            if finished_shard(path, json.loads(json.dumps(stamp))) is None:
                rows = [(told.image, text) for told in part for text in _variants(told, substitute, replacements)]
                scores = _scores(images, texts, own, rows, batch_size)
                write_shard(path, _drops(part, scores, replacements), stamp, {"images": len(own)})
            found += _read(own, part, read_finished(path))
    return found


def _told(records: Sequence[ImageRecord]) -> list[_Told]:
    rows = []
    for number, record in enumerate(records):
        own = {caption.text: caption for caption in record.captions if caption.related}
        rows += [_Told(number, text, tuple(phrases_of(caption))) for text, caption in own.items()]
    return rows


def _variants(told: _Told, substitute: Callable[[str, Span, int], str], replacements: int) -> list[str]:
    """A caption, and what replacing each of its phrases makes of it, phrase by phrase."""
    return [told.text, *(substitute(told.text, span, k) for span in told.spans for k in range(replacements))]


@torch.no_grad()
def _scores(
    images: Encoder, texts: Encoder, records: Sequence[ImageRecord], rows: Sequence[tuple[int, str]], batch_size: int
) -> Tensor:
    """MaxSim (R,) of each row's text with the image of its number."""
    order = sorted(range(len(rows)), key=lambda k: len(rows[k][1]))  # alike in length: little padding
    batches = encode_texts(texts, [rows[k][1] for k in order], batch_size)
    flat = [tokens[mask] for batch in batches for tokens, mask in zip(batch.tokens, batch.mask)]
    tokens = dict(zip(order, flat))
    own: list[list[int]] = [[] for _ in records]
    for k, (image, _) in enumerate(rows):
        own[image].append(k)
    scores = torch.empty(len(rows))
    for numbers in batched(range(len(records)), batch_size):
        visual = images.encode_images(images.record_inputs([records[k] for k in numbers]))
        for place, image in enumerate(numbers):
            if own[image]:
                asked = [tokens[k] for k in own[image]]
                mask = pad_sequence([torch.ones(len(each), dtype=torch.bool) for each in asked], batch_first=True)
                seen = None if visual.mask is None else visual.mask[place, None]
                padded = pad_sequence(asked, batch_first=True)
                found = maxsim(padded, visual.tokens[place, None], mask.to(padded.device), seen)  # (T, 1)
                scores[own[image]] = found[:, 0].cpu()
    return scores


def _drops(part: Sequence[_Told], scores: Tensor, replacements: int) -> dict[str, Tensor]:
    """Scores of a part's captions, and what each of their phrases costs."""
    own, drops, first = [], [], 0
    for told in part:
        count = len(told.spans) * replacements
        own.append(scores[first])
        drops.append(scores[first] - scores[first + 1 : first + 1 + count].reshape(-1, replacements).mean(1))
        first += 1 + count
    return {"scores": torch.stack(own), "drops": torch.cat(drops)} if part else {}


def _read(records: Sequence[ImageRecord], part: Sequence[_Told], tensors: dict[str, Tensor]) -> list[Scored]:
    found, first = [], 0
    for told, score in zip(part, tensors["scores"].tolist() if part else ()):
        drops = tensors["drops"][first : first + len(told.spans)].tolist()
        first += len(told.spans)
        by_type = {name: [d for d, span in zip(drops, told.spans) if span.type == name] for name in TYPES}
        means = {name: sum(own) / len(own) if own else None for name, own in by_type.items()}
        found.append(Scored(records[told.image].image_id, told.text, score, means))
    return found
