"""Records that readers make and everything else takes: boxes, phrases, captions, images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in [0, 1]
LONGEST_CAPTION = 1000  # characters, as of a query; a batch is as wide as its longest caption
MOST_GRADE = 100  # of relevance; benchmarks have 1 to 3
_ARTICLE = re.compile(r"(an?|the) ")


@dataclass(frozen=True, slots=True)
class Phrase:
    """A marked phrase of a caption; `start:end` are character offsets into the caption's plain text."""

    text: str
    chain_id: str
    types: tuple[str, ...]
    start: int
    end: int
    boxes: tuple[Box, ...]  # empty where the phrase has none, or where boxes were not read

    @property
    def visible(self) -> bool:
        """Whether it names something to be seen: chain 0 and type `notvisual` ("each other") do not."""
        return self.chain_id != "0" and "notvisual" not in self.types

    @property
    def typed(self) -> str:
        """The phrase as a search for it: lower case, single spaces, no leading article.

        "A brown dog" and "the brown dog" are one search, so every image of either answers it.
        """
        text = " ".join(self.text.lower().split())
        article = _ARTICLE.match(text)
        return text[article.end() :] if article else text


@dataclass(frozen=True, slots=True)
class Caption:
    """One sentence about an image, or a query that it answers.

    Attributes:
        text: of it.
        phrases: that are marked in it.
        related: False where UNRELATED_CAPTIONS lists it.
        query_id: the data set's own id, where it has one.
        grades: (image id, grade from 1 to `MOST_GRADE`) of every image of the split that answers it, its own among
            them; empty where the data set does not say: its own does.
    """

    text: str
    phrases: tuple[Phrase, ...]
    related: bool
    query_id: str = ""
    grades: tuple[tuple[str, int], ...] = ()

    def within(self, most: int) -> Caption:
        """The caption cut after its last whole word within so many characters, with the phrases that it still holds."""
        if len(self.text) <= most:
            return self
        end = self.text.rfind(" ", 0, most + 1)
        text = self.text[: end if end > 0 else most]  # one word that is longer has no better place
        return replace(self, text=text, phrases=tuple(each for each in self.phrases if each.end <= len(text)))


@dataclass(frozen=True, slots=True)
class Things:
    """What of one kind an image holds, by the data set's word ("dog"), whether or not a caption names it."""

    name: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a split with its captions, five in most data sets; `things` where boxes belong to no phrase."""

    image_id: str
    image_path: Path
    captions: tuple[Caption, ...]
    things: tuple[Things, ...] = ()


def told_phrases(record: ImageRecord) -> Iterator[Phrase]:
    """The visible phrases of an image's captions, of those that describe it."""
    for caption in record.captions:
        if caption.related:
            yield from (phrase for phrase in caption.phrases if phrase.visible)


def plain_caption(text: str) -> Caption:
    """A caption without marked phrases: words joined by single spaces, cut as `Caption.within`."""
    return Caption(" ".join(text.split()), (), related=True).within(LONGEST_CAPTION)


def names_boxes(records: Iterable[ImageRecord]) -> bool:
    """Whether a caption of these images names an object that has a box."""
    return any(phrase.boxes for record in records for caption in record.captions for phrase in caption.phrases)


def phrase_texts(records: Iterable[ImageRecord]) -> list[str]:
    """Distinct phrases that have boxes in some image, as they are typed, in the order of their first use."""
    return list(dict.fromkeys(phrase.typed for r in records for phrase in told_phrases(r) if phrase.boxes))
