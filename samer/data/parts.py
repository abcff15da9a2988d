"""Parts of a data set's splits, named as `train[:50%]`."""

from __future__ import annotations

import re
from fractions import Fraction

from samer.config import InputError

_PART = re.compile(r"([^\[\]]+)\[(\d+%?)?:(\d+%?)?\]")  # `train[:50%]`


def split_part(split: str) -> tuple[str, slice]:
    """What a name of a split or a part of it says, such as `train`, `train[:50%]`, `train[50%:]`, `train[:1000]`.

    Returns:
        The split's own name, and bounds in images, in the split's order; as shares where they are fractions.

    Raises:
        InputError: brackets that hold something else.
    """
    if "[" not in split:
        return split, slice(None)
    match = _PART.fullmatch(split)
    if not match:
        raise InputError(f"split {split[:80]!r}: a part is written as train[:50%], train[50%:] or train[100:1100]")
    first, last = (_bound(text) for text in match.groups()[1:])
    return match[1], slice(first, last)


def _bound(text: str | None) -> int | Fraction | None:
    if not text:
        return None
    if not text.endswith("%"):
        return int(text)
    if int(text[:-1]) > 100:
        raise InputError(f"a part of a split ends at 100%, not at {text}")
    return Fraction(int(text[:-1]), 100)


def take_part(items: list, part: slice, split: str) -> list:
    """The items of a part; shares are of the whole, rounded down.

    Raises:
        InputError: nothing is left.
    """
    bounds = (int(len(items) * b) if isinstance(b, Fraction) else b for b in (part.start, part.stop))
    found = items[slice(*bounds)]
    if not found:
        raise InputError(f"split {split}: that part of {len(items):,} images is empty")
    return found
