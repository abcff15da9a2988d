"""What is asked of a split: its captions, short phrases of its annotation, and which images answer them.

A phrase is answered by every image whose annotation holds it or one that ends in it: "a brown dog" is a dog, too.
Annotators named what they saw fit, so an image may show a dog that nobody wrote down: it then counts against whoever
finds it. The more images hold a phrase, the likelier that is, so phrases that at most `RARE` images hold are also
reported by themselves. Phrases that name nothing ("one", "others") are not asked. Shape letters: Q queries, I images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samer.compressors import COMPRESSORS
from samer.config import InputError, MergeConfig
from samer.data.records import ImageRecord, phrase_texts, told_phrases
from samer.evaluation import caption_grades, grade_matrix
from samer.grounding import box_coverage
from samer.retrievers.banks import Bank

RARE = 5  # images of a split that hold a phrase, at most, where it is taken as rare
NAMELESS = {"one", "ones", "two", "three", "four", "five", "both", "all", "some", "each", "another", "other", "others"}
NAMELESS |= {
    "someone",
    "somebody",
    "something",
    "thing",
    "things",
    "it",
    "this",
    "that",
    "these",
    "those",
    "them",
    "they",
}
NAMELESS |= {"he", "him", "his", "she", "her", "what", "who", "which"}
SIZE_EDGES = (0.01, 0.03, 0.1)  # shares of the picture


@dataclass(frozen=True)
class Phrases:
    """The phrases that have boxes in some image of a split, as queries.

    Attributes:
        texts: distinct, as they are typed (`Phrase.typed`).
        positives: (Q, I) bool, images whose annotation holds the phrase or one that ends in it, with or without a box.
        sizes: (Q,) share of the picture that the phrase's boxes cover, where it is largest: a query has succeeded with
            the easiest of its images.
    """

    texts: tuple[str, ...]
    positives: Tensor
    sizes: np.ndarray

    @property
    def held_by(self) -> np.ndarray:
        """How many images hold each, (Q,)."""
        return self.positives.sum(1).numpy()

    @property
    def owners(self) -> np.ndarray:
        """The first image that holds each, (Q,): phrases of one image are no independent queries."""
        return self.positives.int().argmax(1).numpy()


@dataclass(frozen=True)
class Asked:
    """What a measurement asks beside a split's captions, and what else answers these.

    Attributes:
        positives: (Q, I) bool, images that answer each caption, or uint8, how well; None: its own alone.
        phrases: None: none are asked.
        bank_texts: what a compressor that needs a bank of queries takes it from.
        banks: that are given instead, by the key of the compression (`Row.key`).
    """

    positives: Tensor | None = None
    phrases: Phrases | None = None
    bank_texts: tuple[str, ...] = ()
    banks: dict[str, Bank] = field(default_factory=dict)

    def stamp(self, merges: dict[str, MergeConfig]) -> dict[str, Any]:
        """What a measurement of some compressions depends on of it, if at all."""
        found: dict[str, Any] = {}
        if self.positives is not None:
            places = self.positives.nonzero()
            graded = self.positives.dtype != torch.bool
            values = self.positives[tuple(places.T)].tolist()
            found["relevant"] = _hash([places.tolist(), values] if graded else places.tolist())
        if self.phrases is not None:
            found["phrases"] = _hash([self.phrases.texts, self.phrases.positives.nonzero().tolist()])
        banked = [key for key, merge in merges.items() if COMPRESSORS[merge.compressor].needs_queries]
        if banked:
            found["bank"] = _hash(self.bank_texts)
        if given := {key: self.banks[key].hash for key in banked if key in self.banks}:
            found["banks"] = given
        return found


CAPTIONS_ONLY = Asked()


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def own_images(records: Sequence[ImageRecord]) -> np.ndarray:
    """The image of each caption of a split, (Q,)."""
    return np.array([k for k, record in enumerate(records) for _ in record.captions])


def caption_positives(records: Sequence[ImageRecord], relevant: dict[str, list[list[str]]]) -> Tensor | None:
    """Images that answer each caption, (Q, I) bool, its own first of all; None where no other one is known.

    Where captions have grades, these, (Q, I) uint8.

    Args:
        records: of the split.
        relevant: as `Reader.relevant` gives it; images of other splits, or left out, don't matter.

    Raises:
        InputError: another number of lists than an image has captions.
    """
    grades = grade_matrix(caption_grades(records), len(records))
    if grades is not None:
        return grades
    place = {record.image_id: k for k, record in enumerate(records)}
    positives = torch.from_numpy(own_images(records))[:, None] == torch.arange(len(records))
    query, own = 0, len(positives)
    for record in records:
        rows = relevant.get(record.image_id, [()] * len(record.captions))
        if len(rows) != len(record.captions):
            raise InputError(
                f"relevant.json: {record.image_id} has {len(rows)} lists for {len(record.captions)} captions; restore "
                "the file"
            )
        for row in rows:
            positives[query, [place[name] for name in row if name in place]] = True
            query += 1
    return positives if int(positives.sum()) > own else None


def phrase_queries(records: Sequence[ImageRecord]) -> Phrases:
    """The phrases of a split as queries.

    Raises:
        InputError: no phrase has a box.
    """
    texts = [text for text in phrase_texts(records) if names_something(text)]
    if not texts:
        raise InputError("no phrase has a box, so there are no phrases to ask; leave the section phrases out")
    number = {text: k for k, text in enumerate(texts)}
    positives = torch.zeros(len(texts), len(records), dtype=torch.bool)
    sizes = np.zeros(len(texts))
    for image, record in enumerate(records):
        for phrase in told_phrases(record):
            words = phrase.typed.split()
            for first in range(len(words)):
                query = number.get(" ".join(words[first:]))
                if query is not None:
                    positives[query, image] = True
                    if phrase.boxes:
                        sizes[query] = max(sizes[query], covered(phrase.boxes))
    return Phrases(tuple(texts), positives, sizes)


def names_something(text: str) -> bool:
    """Whether a word of a phrase, of two letters at least, is more than a pronoun or a number."""
    return any(word not in NAMELESS and sum(map(str.isalpha, word)) > 1 for word in text.split())


def covered(boxes: Sequence) -> float:
    """The share of the picture that boxes cover together."""
    return float(box_coverage(boxes, 1, 1)[0])


def size_bins(sizes: np.ndarray) -> np.ndarray:
    """Sizes (Q,) as 0 below the first of `SIZE_EDGES`, up to 3 from the last on; -1 where a size is NaN."""
    return np.where(np.isnan(sizes), -1, np.searchsorted(SIZE_EDGES, np.nan_to_num(sizes), side="right"))
