"""From scored captions to those that are kept, as a file that every trainer reads (data.captions)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from samer.config import InputError
from samer.runtime.files import atomic_path
from samer.selection.cpi import Scored

RULES = ("cpi", "alignment", "random")


def check_choice(rule: str, share: float, drop: float) -> None:
    """Refuses what can't be chosen, before any caption is scored.

    Raises:
        InputError: an unknown rule, or shares that do not fit.
    """
    if rule not in RULES:
        raise InputError(f"rule {rule!r} is unknown; use one of {', '.join(RULES)}")
    if not (share > 0 and drop >= 0 and share + drop <= 1):
        raise InputError(f"share {share} and drop {drop}: share must be above 0, drop at least 0, their sum at most 1")


def choose(scored: Sequence[Scored], rule: str, *, share: float, drop: float = 0.0, seed: int = 0) -> list[Scored]:
    """The share of captions that a rule keeps, in their order.

    Args:
        scored: all captions.
        rule: `cpi`: without the lowest `drop` by score, the largest by CPI, those without phrases last; `alignment`:
            the largest by score; `random`.
        share: kept, of all captions, so that every rule keeps as many: OURS, as the source does not say whether its
            half is of all or of those that survive.
        drop: share of the lowest scores that CPI does not look at.
        seed: of `random`.

    Raises:
        InputError: as `check_choice`.
    """
    check_choice(rule, share, drop)
    count = max(1, round(share * len(scored)))
    scores = np.array([each.score for each in scored])
    if rule == "random":
        order = np.random.default_rng(seed).permutation(len(scored))
    elif rule == "alignment":
        order = np.argsort(-scores, kind="stable")
    else:
        values = np.array([-np.inf if each.cpi is None else each.cpi for each in scored])
        survivors = np.sort(np.argsort(scores, kind="stable")[int(drop * len(scored)) :])
        order = survivors[np.argsort(-values[survivors], kind="stable")]
    return [scored[k] for k in sorted(order[:count])]


def write_chosen(path: str | Path, chosen: Sequence[Scored]) -> None:
    """Writes kept captions as `samer.data.chosen` reads them, with their scores."""
    rows = [{"image_id": c.image_id, "text": c.text, "score": c.score, "cpi": c.cpi, **c.drops} for c in chosen]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
