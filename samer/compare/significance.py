"""Whether queries can tell compressors apart, which differences from the controls hold, and what becomes of the claims.

Everything is paired: the same queries, seeds averaged, resampled by image (`bootstrap_tests`).

Shape letters: Q queries, C comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samer.compare.plan import CENTRES, NO_BOXES, Row
from samer.compare.queries import Phrases, own_images
from samer.compare.summarise import Key, Measured, phrase_sets, runs_of, tested
from samer.data.records import ImageRecord

CONTROLS = ("none", "kmeans", "hpool", "sap-mean")
CONTROLLING = ("untouched", "adapted", "budgets", "banks")  # sections that controls are taken from
CRUDE = ("random", "grid")  # what loses where queries can tell compressors apart
TESTED = ("r@1", "ndcg@10")
OTHERS = {
    "kmeans": "ahead of K-means",
    "hpool": "ahead of H-Pool",
    "sap-mean": "merging ahead of pruning (SAP-mean)",
    "random": "merging ahead of pruning (random)",
}
MARGIN = 0.5  # points of R@1 below all tokens that count as level


def significance(
    rows: Sequence[Row],
    measured: Measured,
    records: Sequence[ImageRecord],
    seeds: Sequence[int],
    phrases: Phrases | None = None,
) -> dict:
    """What the rows show against each other.

    Returns:
        `discriminates`: what random and grid lose against all tokens. `claims`: each with its verdict. `against`: every
        row's differences from its controls. A difference is by set of queries (captions, phrases, rare_phrases) and
        metric: {"difference", "interval", "p"}.
    """
    pairs = {
        "discriminates": _losses(rows),
        "claims": [(of, minus) for _, _, of, minus in _claims(rows)],
        "against": [(row_key(row), control) for row in rows for control in _controls_of(row, rows)],
    }
    every = list(dict.fromkeys(pair for some in pairs.values() for pair in some))
    found = _test(every, rows, measured, records, seeds, phrases)
    shown = {
        name: [{"of": of, "minus": minus, **found[of, minus]} for of, minus in some] for name, some in pairs.items()
    }
    for entry, (claim, kind, _, _) in zip(shown["claims"], _claims(rows)):
        tests = {name: entry[name]["r@1"] for name in _sets(entry)}
        entry |= {"claim": claim, "verdicts": {name: _verdict(kind, test) for name, test in tests.items()}}
    return shown


def row_key(row: Row) -> Key:
    """A row's section and name."""
    return row.section, row.name


def _sets(entry: dict) -> list[str]:
    return [name for name in ("captions", "phrases", "rare_phrases") if name in entry]


def _losses(rows: Sequence[Row]) -> list[tuple[Key, Key]]:
    """All tokens and each crude compressor, by projection."""
    known = {row_key(row) for row in rows}
    asked = [((section, "none"), (section, name)) for section in ("untouched", "adapted") for name in CRUDE]
    return [(of, minus) for of, minus in asked if of in known and minus in known]


def _controls_of(row: Row, rows: Sequence[Row]) -> list[Key]:
    """The rows that a row is held against: all tokens, and the usual compressors at its budget, trained if it is."""
    found: dict[str, Row] = {}
    for other in rows:
        name = other.merge.compressor
        trained_alike = (other.trained is None) == (row.trained is None)
        own_size = other.merge.num_regions == row.merge.num_regions and row.merge.compressor != "none"
        same_size = name == "none" or own_size
        if trained_alike and same_size and not other.bank and other.section in CONTROLLING:
            found.setdefault(name, other)
    same = row.merge, row.trained
    others = [found[name] for name in CONTROLS if name in found]
    own_bank = [other for other in rows if row.bank and other.section == row.section and other.name == "querybank"]
    return [row_key(other) for other in [*others, *own_bank] if row.bank or (other.merge, other.trained) != same]


def _claims(rows: Sequence[Row]) -> list[tuple[str, str, Key, Key]]:
    """(what is claimed, "ahead" or "level", row, row that it is held against) where both were run."""
    known = {row_key(row) for row in rows}
    asked = []
    for name in [*(f"samer, {init}" for init in CENTRES), "querybank"]:
        for section, how in (("adapted", "trained"), ("untouched", "untouched")):
            asked.append((f"{name}, {how}: level with all tokens", "level", (section, name), (section, "none")))
            for other, words in OTHERS.items():
                asked.append((f"{name}, {how}: {words}", "ahead", (section, name), (section, other)))
    for init in CENTRES:
        name = f"samer, {init}"
        asked.append((f"{name}: boxes help", "ahead", ("adapted", name), ("adapted", f"{name}, {NO_BOXES}")))
        parts = ("components", f"{init}: feature + spatial"), ("components", f"{init}: feature")
        asked.append((f"{name}: places help", "ahead", *parts))
    asked.append(("farthest centres ahead of raster", "ahead", *(("adapted", f"samer, {c}") for c in CENTRES[::-1])))
    for row in rows:
        if row.section == "adapted" and row.trained == row.merge:
            asked.append((f"{row.name}: training helps", "ahead", row_key(row), ("untouched", row.name)))
    return [claim for claim in asked if claim[2] in known and claim[3] in known]


def _verdict(kind: str, test: dict) -> str:
    """`yes`, `no` or `undecided`, by the interval of the difference; of trained rows every seed must agree.

    The interval is over images, for the trainings that were run: it does not hold what another seed would change, so
    one seed decides nothing.
    """
    low, high = test["interval"]
    least = -MARGIN if kind == "level" else 0.0
    verdict = "yes" if (low >= least if kind == "level" else low > 0) else "no" if high < least else "undecided"
    seeds = test.get("seeds", [])
    agree = len(seeds) > 1 and all(value >= least if verdict == "yes" else value < least for value in seeds)
    return verdict if agree or not seeds else "undecided"


def _test(
    pairs: Sequence[tuple[Key, Key]],
    rows: Sequence[Row],
    measured: Measured,
    records: Sequence[ImageRecord],
    seeds: Sequence[int],
    phrases: Phrases | None,
) -> dict[tuple[Key, Key], dict[str, dict[str, dict]]]:
    """The differences of pairs of rows, by set of queries and by metric."""
    found: dict[tuple[Key, Key], dict[str, dict[str, dict]]] = {pair: {} for pair in pairs}
    if not pairs:
        return found
    needed = {key for pair in pairs for key in pair}
    trained = {row_key(row) for row in rows if row.trained}
    runs = {row_key(row): runs_of(row, measured, seeds) for row in rows if row_key(row) in needed}
    owner = own_images(records)
    sets = {"captions": ("", np.ones(len(owner), dtype=bool), owner)}
    for name, chosen in (phrase_sets(phrases) if phrases else {}).items():
        sets[name] = "phrase:", chosen, phrases.owners
    for name, (prefix, chosen, groups) in sets.items():
        for metric in TESTED:
            # one row of values per compared row: seeds averaged
            means = {key: np.mean([r[prefix + metric][chosen] for r in own], axis=0) for key, own in runs.items()}
            differences = np.stack([means[of] - means[minus] for of, minus in pairs], axis=1)  # (Q, C)
            single = {key: [float(r[prefix + metric][chosen].mean()) for r in own] for key, own in runs.items()}
            for pair, test in zip(pairs, tested(differences, groups[chosen])):
                found[pair].setdefault(name, {})[metric] = test | _by_seed(
                    *(single[key] for key in pair), pair, trained
                )
    return found


def _by_seed(of: Sequence[float], minus: Sequence[float], pair: tuple[Key, Key], trained: set[Key]) -> dict:
    """`seeds`: the difference of each, where one of two rows was trained; an untouched row is the same for all."""
    if not trained.intersection(pair):
        return {}
    count = max(len(of), len(minus))
    both = (list(values) * (count // len(values)) for values in (of, minus))
    return {"seeds": [round(a - b, 4) for a, b in zip(*both)]}
