"""Names of cut-outs: a line of English -> the words that a caption can use.

Such a line may be a label ("red bus") or a sentence ("A mince pie is a traditional Christmas food."). What is taken is
the noun phrase that it begins with; a line that begins with none ("Eat your broccoli!") names nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MOST_WORDS = 6  # of a name
_ARTICLES = {"a", "an", "the"}
_OWNERS = {"my", "your", "his", "her", "its", "our", "their", "this", "that", "these", "those"}
_COUNTS = {"two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "some", "several", "many"}
_PREPOSITIONS = {"about", "as", "at", "by", "for", "from", "in", "inside", "into", "like", "near", "of", "on", "over"}
_PREPOSITIONS |= {"to", "under", "with", "without"}
_BE = {"is", "are", "was", "were", "has", "have", "means", "mean", "stands"}
_CLAUSES = {"to", "that", "which", "who", "used", "called", "named", "known", "when", "while", "if", "because", "but"}
# a line that begins so is no name
_OPENINGS = _PREPOSITIONS | _CLAUSES | {"i", "we", "you", "he", "she", "it", "they", "it's", "there", "no", "not"}
_OPENINGS |= {"what", "how", "where", "this", "these", "those", "don't", "let's", "please"}
_QUOTES = str.maketrans(dict.fromkeys("\u201c\u201d\u201e", '"') | dict.fromkeys("\u2018\u2019", "'"))
_END = re.compile(r"[.!?](?=\s|$)|[.!?]{2,}|[;:\u2013\u2014]|\s-+\s")


# names that are not what their last word alone says, and things that are also called by another word
_OTHER_THINGS = {"sea lion", "rubber duck", "roast turkey", "red plastic flower", "edward bear", "american football"}
_ALSO = {"seagull": {"silver gull"}, "silver gull": {"seagull"}, "cow": {"bull"}, "duck": {"drake"}}
_ALSO |= {"flower": {"daffodil", "rose", "iris", "hibiscus", "marigold"}, "hibiscus": {"hibiscus flower"}}


@dataclass(frozen=True)
class Name:
    """What a cut-out shows.

    Attributes:
        determiner: "a", "an", "the", "two", "some" and the like; empty where there is none ("Santa Claus", "confetti").
        words: the rest, such as "great blue heron".
    """

    determiner: str
    words: str

    @property
    def key(self) -> str:
        """By which names are compared."""
        return self.words.casefold()

    def phrase(self, *adjectives: str) -> str:
        """As a caption says it, such as "a small red bus"."""
        adjectives = [word for word in adjectives if word]
        determiner = self.determiner
        if adjectives and determiner in ("a", "an"):
            determiner = _article(adjectives[0])
        return " ".join(word for word in (determiner, *adjectives, self.words) if word)


def parse_name(line: str) -> Name | None:
    """The name in a line of text; None: it holds none of at most six words."""
    text = " ".join(line.translate(_QUOTES).split())
    if text.startswith('"'):  # what is written on a sign, not what it is
        return None
    if any(letter in "[]" or not letter.isprintable() for letter in text):  # brackets are markup of captions
        return None
    sentence = bool(_END.search(text))
    text = re.sub(r"\([^)]*\)?", " ", text.replace('"', ""))
    end = _END.search(text)
    called_out = bool(end) and end[0].startswith(("!", "?"))
    words = _before_comma(text[: end.start()] if end else text)
    first = words[0].casefold() if words else ""
    if not words or first in _OPENINGS:
        return None
    determiner = ""
    if first in _ARTICLES | _COUNTS or first in ("our", "another"):
        determiner = {"our": "the", "another": "a"}.get(first, first)
        words = words[1:]
    cut = _noun_phrase(words, bool(determiner))
    if not cut or (called_out and not determiner and len(cut) == len(words)):
        return None
    if not determiner:
        if not any(letter.isupper() for letter in " ".join(cut)[1:]):  # else a name of its own, or "FM radio"
            cut = [cut[0][0].lower() + cut[0][1:], *cut[1:]]
        if not sentence and not _plural(cut[-1]):
            determiner = _article(cut[0])
    return Name(determiner, " ".join(cut)) if len(cut) <= MOST_WORDS else None


def related(one: str, other: str) -> bool:
    """Whether what one key names may be called by the other: "green apple" and "apple"."""
    return covers(one, other) or covers(other, one)


def covers(general: str, key: str) -> bool:
    """Whether a thing of that key may be called by the more general one, as a rule by its last words.

    Not "lion" of a sea lion, nor "gnu" of the baby of a gnu; but "flower" of a daffodil.
    """
    ends = key.endswith(f" {general}") and key not in _OTHER_THINGS and " of " not in key
    return key == general or ends or any(key == word or key.endswith(f" {word}") for word in _ALSO.get(general, ()))


def _before_comma(text: str) -> list[str]:
    """The words up to a comma, unless it stands between adjectives: "a ripe, red tomato"."""
    parts = [part.split() for part in text.split(",")]
    words = parts[0]
    for part in parts[1:]:
        lone = len([word for word in words if word.casefold() not in _ARTICLES]) == 1
        if not lone or not part or part[0].casefold() in _ARTICLES | _OPENINGS | _OWNERS | {"also", "or", "and"}:
            break
        words = [*words, *part]
    return words


def _noun_phrase(words: list[str], determined: bool) -> list[str]:
    """The words up to the first verb; nothing where they turn out to be no name."""
    low = [word.casefold() for word in words]
    for k, word in enumerate(low):
        if word in _BE:
            return words[:k]
        if word in _CLAUSES:
            return words[:k] if determined else []
        if word in _ARTICLES | _OWNERS and k and low[k - 1] not in _PREPOSITIONS | {"and"}:
            # the object of a verb, which is the word before it: "resembles a drone"
            if not determined and word in _OWNERS:
                return []
            return words[: k - 1] if k > 1 else words
    if len(words) > MOST_WORDS - 1:
        places = [k for k, word in enumerate(low) if k and word in _PREPOSITIONS and word != "of"]
        return words[: places[0]] if places else words
    return words


def _plural(word: str) -> bool:
    return word.endswith("s") and not word.endswith(("ss", "us", "is"))


def _article(word: str) -> str:
    """ "a" or "an", by the sound that a word begins with, as far as letters tell it."""
    low = word.casefold()
    if low.startswith(("uni", "use", "usu", "euro", "eu", "one", "ut")):
        return "a"
    if low.startswith(("hour", "honest", "heir")):
        return "an"
    if len(word) > 1 and word[:2].isupper():  # letters spoken one by one
        return "an" if word[0] in "AEFHILMNORSX" else "a"
    return "an" if low[0] in "aeiou" else "a"
