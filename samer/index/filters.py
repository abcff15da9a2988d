"""Conditions on the metadata of images: which of them a search may find.

    language=en      language=en|de      page!=0      year>=2020      day<2024-05-01

A column, =, !=, <, <=, > or >=, and a value; `|` parts several, of which one is enough. Numbers are compared as
numbers, texts as texts (dates as 2024-05-01 then come in order). An image without the column meets no condition but !=.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from samer.config import InputError
from samer.index.columns import as_number
from samer.scoring import StoredImages

_FORM = re.compile(r"\s*([^=!<>]+?)\s*(<=|>=|!=|==?|<|>)\s*(.*?)\s*", re.DOTALL)
_ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Condition:
    """A condition as it was written, in parts."""

    column: str
    comparison: str
    values: tuple[str, ...]

    def met_by(self, value: Any) -> bool:
        """Whether a column's value meets it; None: the image has none."""
        if self.comparison == "!=":
            return value is None or not any(_equal(value, each) for each in self.values)
        if value is None:
            return False
        if self.comparison == "=":
            return any(_equal(value, each) for each in self.values)
        return any(_ordered(value, each, _ORDER[self.comparison]) for each in self.values)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _equal(value: Any, text: str) -> bool:
    if isinstance(value, bool):
        return _TRUTH.get(text.lower()) == value
    return value == as_number(text) if _number(value) else value == text


def _ordered(value: Any, text: str, compare: Any) -> bool:
    if isinstance(value, str):
        return compare(value, text)
    limit = as_number(text)
    return _number(value) and _number(limit) and compare(value, limit)


def parse_condition(text: str) -> Condition:
    """A condition.

    Raises:
        InputError: it is none.
    """
    match = _FORM.fullmatch(text)
    if not match:
        raise InputError(f"{text[:80]!r} is no condition; write a column, =, !=, <, <=, > or >=, and a value: page>=2")
    return Condition(match[1], match[2].replace("==", "="), tuple(each.strip() for each in match[3].split("|")))


def rows_that_meet(
    conditions: Sequence[Condition], columns: Mapping[str, Mapping[str, Any]], numbers: Mapping[str, int], rows: int
) -> Tensor:
    """Which rows of a split a search may find, (rows,) bool.

    Args:
        conditions: all must be met.
        columns: by name, by id, as `samer.index.columns.read_columns` gives them.
        numbers: of the images by id, as `Index.numbers`.
        rows: how many the split has, deleted ones too.

    Raises:
        InputError: a column that no image has; names those that there are.
    """
    known = {name for own in columns.values() for name in own}
    for condition in conditions:
        if condition.column not in known:
            held = ", ".join(sorted(known)) or "none; scripts/index.py --metadata FILE gives it some"
            raise InputError(f"no image has a column {condition.column[:40]!r}; the columns are {held}")
    keep = torch.zeros(rows, dtype=torch.bool)
    met = [
        number
        for name, number in numbers.items()
        if all(each.met_by(columns.get(name, {}).get(each.column)) for each in conditions)
    ]
    keep[met] = True
    return keep


def only(shards: Iterable[tuple[list[str], StoredImages]], keep: Tensor) -> Iterator[tuple[list[str], StoredImages]]:
    """Shards whose images outside `keep` (rows,) are marked as deleted ones are."""
    start = 0
    for ids, images in shards:
        own = keep[start : start + len(ids)].to(images.tokens.device)
        start += len(ids)
        if own.any():
            yield ids, replace(images, live=own if images.live is None else images.live & own)
