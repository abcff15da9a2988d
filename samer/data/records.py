"""Records that readers make and everything else takes: boxes, phrases, captions, images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in [0, 1]


@dataclass(frozen=True, slots=True)
class Phrase:
    """A marked phrase of a caption; `start:end` are character offsets into the caption's plain text."""

    text: str
    chain_id: str
    types: tuple[str, ...]
    start: int
    end: int
    boxes: tuple[Box, ...]  # empty where the phrase has none, or where boxes were not read


@dataclass(frozen=True, slots=True)
class Caption:
    """One sentence about an image; `related` is False where UNRELATED_CAPTIONS lists it."""

    text: str
    phrases: tuple[Phrase, ...]
    related: bool


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a split with its five captions."""

    image_id: str
    image_path: Path
    captions: tuple[Caption, ...]
