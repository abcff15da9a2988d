"""Nonce words: what a phrase is replaced by to see how much a score owes to it.

CPI (arXiv 2605.22651) replaces phrases by nonce tokens; its list and how lengths match are UNVERIFIED. OURS: every word
of the phrase becomes a pronounceable word that no caption holds, of as many letters (3 at least) and the same case at
its head; what stands between words stays. A tokenizer splits such words into more pieces than known ones, so a MaxSim
score, a mean over tokens, shifts towards them: the more, the more words are replaced and the fewer others there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import numpy as np

from samer.selection.phrases import WORD, Span

_CONSONANTS, _VOWELS = "bdfgklmnprtvz", "aeiou"
_SHORTEST = 3
_TRIES = 100  # before a nonce word grows by a letter


def with_nonce(text: str, span: Span, number: int, seed: int, known: Collection[str]) -> str:
    """A caption whose phrase is replaced by nonce words.

    Args:
        text: of the caption.
        span: the phrase in it.
        number: of the replacement; each has other words.
        seed: of all.
        known: words in lower case that are none.

    Returns:
        The text; which words, depends on the arguments alone, wherever and in whatever order they are asked for.
    """
    digest = hashlib.sha256(f"{seed}\0{number}\0{span.start}\0{span.end}\0{text}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    made = WORD.sub(lambda match: _like(match[0], random, known), text[span.start : span.end])
    return text[: span.start] + made + text[span.end :]


def _like(word: str, random: np.random.Generator, known: Collection[str]) -> str:
    length, tries = max(_SHORTEST, len(word)), 0
    while (made := _made(length, random)) in known:
        tries += 1
        length += tries % _TRIES == 0
    return made.capitalize() if word[0].isupper() else made


def _made(length: int, random: np.random.Generator) -> str:
    """Consonants and vowels in turn."""
    first = int(random.integers(2))
    letters = (_VOWELS if (place + first) % 2 else _CONSONANTS for place in range(length))
    return "".join(each[random.integers(len(each))] for each in letters)
