"""A query as a text: what is refused, and which of its tokens each word has."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from samer.config import InputError

LONGEST_QUERY = 1000  # characters


def check_query(text: str) -> None:
    """Refuses what no model should be asked.

    Raises:
        InputError: an empty query, one of more than 1,000 characters, one with NUL or lone surrogates.
    """
    if not text.strip():
        raise InputError("the query is empty; write what to look for")
    if len(text) > LONGEST_QUERY:
        raise InputError(f"the query has {len(text):,} characters; {LONGEST_QUERY:,} are the most")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError("the query holds characters that are no text (NUL or half of a pair); remove them")


@dataclass(frozen=True)
class Word:
    """A word of a query: its characters `start:end`, and its places among the valid query tokens."""

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]


def query_words(text: str, offsets: Tensor) -> list[Word]:
    """The words of a text, parted by white space, and the tokens that lie in them.

    Args:
        text: the query.
        offsets: (M, 2) of its valid tokens, first and last + 1 character, -1 for tokens that are not of the text.
    """
    spans = offsets.tolist()
    words = []
    for match in re.finditer(r"\S+", text):
        start, end = match.span()
        inside = (k for k, (first, last) in enumerate(spans) if first < end and last > start)  # -1, -1 never is
        words.append(Word(match.group(), start, end, tuple(inside)))
    return words
