"""Means, spreads, intervals over images and paired differences, from per-query values.

Shape letters: Q queries (captions), I images.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from samer.compare.measure import METRICS
from samer.compare.plan import CENTRES, NO_BOXES, Row
from samer.compare.queries import RARE, SIZE_EDGES, Phrases, covered, own_images, size_bins
from samer.compressors import COMPRESSORS
from samer.data.records import ImageRecord
from samer.grounding import HIT_IOU, size_thirds
from samer.metrics import bootstrap_intervals, bootstrap_tests

PHRASED = (*METRICS, "mrr")  # of phrases
Key = tuple[str, str]  # section and name of a row
Values = dict[str, np.ndarray]  # by what was measured
Measured = dict[tuple[str, int], dict[str, Values]]  # by projector's name and seed, and by compression


def runs_of(row: Row, measured: Measured, seeds: Sequence[int]) -> list[Values]:
    """What was measured of a row, seed by seed."""
    return [measured[row.measured_with, seed][row.key] for seed in (seeds if row.trained else [0])]


def summarise(
    rows: Sequence[Row],
    measured: Measured,
    records: Sequence[ImageRecord],
    seeds: Sequence[int],
    phrases: Phrases | None = None,
) -> dict:
    """Means, spreads over seeds, intervals over images, and paired differences, from per-query values.

    Where no caption names an object with a box, `sizes` is empty, and what needs one is None.
    """
    owner = own_images(records)
    smallest, count = named_objects(records)
    boxed = bool(np.isfinite(smallest).any())
    edges, part = size_thirds(smallest) if boxed else ((), np.full(len(smallest), -1))
    bins = size_bins(smallest_named(records))
    table, per_query = [], {}
    for row in rows:
        runs = runs_of(row, measured, seeds)
        per_query[row.section, row.name] = np.stack([run["r@1"] for run in runs])  # (seeds, Q)
        r1 = per_query[row.section, row.name].mean(0)
        by_seed = [float(run["r@1"].mean()) for run in runs]
        entry = {
            "section": row.section,
            "name": row.name,
            "compressor": row.merge.compressor,
            "merge": asdict(row.merge),
            "trained_through": asdict(row.trained) if row.trained else None,
            "vectors": _mean([run["vectors"].mean() for run in runs]),
            "stored_bytes_per_vector": COMPRESSORS[row.merge.compressor].stored_bytes,
            "r@1": _mean([run["r@1"].mean() for run in runs]),
            "interval": None,  # all rows' at once, below
            "seeds": [round(value, 4) for value in by_seed],
            "spread": _spread(by_seed),
        }
        for name in (*METRICS[1:], "back:r@1"):
            entry[name] = _mean([run[name].mean() for run in runs])
        for name in ("box_mass", "iou", "osr", "mixed_clusters", "purity"):
            entry[name] = _mean([100 * _known_mean(run[name]) for run in runs])
        entry["region_hit"] = _mean([100 * _known_mean(run["iou"] >= HIT_IOU) for run in runs])
        entry["r@1_by_size"] = _by_part(r1, part, 3)
        entry["r@1_by_bin"] = _by_part(r1, bins, len(SIZE_EDGES) + 1)
        table.append(entry)
    intervals = _intervals({key: runs.mean(0) for key, runs in per_query.items()}, owner)
    for entry in table:
        entry["interval"] = intervals[entry["section"], entry["name"]]
    sizes = (
        {}
        if not boxed
        else {
            "edges": [round(edge, 6) for edge in edges],
            "captions": [int((part == k).sum()) for k in range(3)],
            "bin_edges": list(SIZE_EDGES),
            "captions_by_bin": [int((bins == k).sum()) for k in range(len(SIZE_EDGES) + 1)],
        }
    )
    if phrases is not None:
        sizes["phrases_by_bin"] = _add_phrases(table, rows, measured, seeds, phrases)
    return {"sizes": sizes, "rows": table, "differences": _differences(per_query, owner, part, count)}


def _add_phrases(
    table: Sequence[dict], rows: Sequence[Row], measured: Measured, seeds: Sequence[int], phrases: Phrases
) -> list[int]:
    """Puts `phrases` and `rare_phrases` into each row's entry; returns how many phrases are in each bin of sizes."""
    bins = size_bins(phrases.sizes)
    for name, chosen in phrase_sets(phrases).items():
        means = {}
        for row, entry in zip(rows, table):
            runs = runs_of(row, measured, seeds)
            found = {metric: _mean([run[f"phrase:{metric}"][chosen].mean() for run in runs]) for metric in PHRASED}
            r1 = np.mean([run["phrase:r@1"][chosen] for run in runs], axis=0)
            by_seed = [float(run["phrase:r@1"][chosen].mean()) for run in runs]
            found |= {"seeds": [round(value, 4) for value in by_seed], "spread": _spread(by_seed)}
            found["r@1_by_bin"] = _by_part(r1, bins[chosen], len(SIZE_EDGES) + 1)
            means[row.section, row.name] = r1
            entry[name] = found
        intervals = _intervals(means, phrases.owners[chosen])
        for entry in table:
            entry[name]["interval"] = intervals[entry["section"], entry["name"]]
    return [int((bins == k).sum()) for k in range(len(SIZE_EDGES) + 1)]


def phrase_sets(phrases: Phrases) -> dict[str, np.ndarray]:
    """All phrases, and those that few images hold, where there are any, (Q,) bool each."""
    sets = {"phrases": np.ones(len(phrases.texts), dtype=bool), "rare_phrases": phrases.held_by <= RARE}
    return {name: chosen for name, chosen in sets.items() if chosen.any()}


def _by_part(values: np.ndarray, part: np.ndarray, count: int) -> list[float | None]:
    return [_mean([values[part == k].mean()]) if (part == k).any() else None for k in range(count)]


def _spread(by_seed: Sequence[float]) -> float | None:
    return round(statistics.stdev(by_seed), 4) if len(by_seed) > 1 else None


def smallest_named(records: Sequence[ImageRecord]) -> np.ndarray:
    """Per caption the share of the picture that its smallest phrase's boxes cover together, NaN without a box, (Q,)."""
    captions = [caption for record in records for caption in record.captions]
    sizes = [[covered(phrase.boxes) for phrase in caption.phrases if phrase.boxes] for caption in captions]
    return np.array([min(own, default=float("nan")) for own in sizes])


def named_objects(records: Sequence[ImageRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Per caption: area of the smallest box it names (NaN if none), and how many boxed phrases it has."""
    smallest, count = [], []
    for caption in (caption for record in records for caption in record.captions):
        boxes = [box for phrase in caption.phrases for box in phrase.boxes]
        smallest.append(min(((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes), default=float("nan")))
        count.append(sum(bool(phrase.boxes) for phrase in caption.phrases))
    return np.array(smallest), np.array(count)


def _pairs(rows: dict[Key, np.ndarray]) -> list[tuple[Key, Key]]:
    """The differences worth asking for, where both rows were run."""
    asked = []
    for init in CENTRES:
        own, control = ("adapted", f"samer, {init}"), ("adapted", "none")
        through = f"trained through samer, {init}"
        asked += [
            (control, ("untouched", "none")),
            (("untouched", f"samer, {init}"), ("untouched", "none")),
            (own, ("untouched", f"samer, {init}")),
            (own, control),
            (own, ("adapted", f"samer, {init}, {NO_BOXES}")),
            (own, ("crossed", f"trained with all tokens, samer, {init}")),
            (own, ("crossed", f"{through}, all tokens")),
            (own, ("crossed", f"{through}, hpool")),
            (own, ("crossed", f"{through}, hard assignment")),
            (("untouched", f"samer, {init}"), ("crossed", f"untouched, samer, {init}, hard assignment")),
            (("components", f"{init}: feature + spatial"), ("components", f"{init}: feature")),
            (("components", f"{init}: feature + spatial + object"), ("components", f"{init}: feature + spatial")),
        ]
        for section in ("untouched", "adapted"):
            others = [key for key in rows if key[0] == section and key[1] not in ("none", f"samer, {init}")]
            asked += [((section, f"samer, {init}"), key) for key in others]
    return [pair for pair in dict.fromkeys(asked) if pair[0] in rows and pair[1] in rows]


def _intervals(values: dict[tuple, np.ndarray], owner: np.ndarray) -> dict[tuple, list[float]]:
    """95 % intervals of means, (Q,) each, over images; all of them see the same resamples."""
    if not values:
        return {}
    found = bootstrap_intervals({str(k): value for k, value in enumerate(values.values())}, groups=owner)
    return {key: [round(edge, 4) for edge in found[str(k)]] for k, key in enumerate(values)}


def _differences(rows: dict[Key, np.ndarray], owner: np.ndarray, part: np.ndarray, count: np.ndarray) -> list[dict]:
    """Paired differences of R@1, in all and by what the captions name.

    Seeds are averaged, the 95 % interval is over images; `seeds` has the difference seed by seed.

    Args:
        rows: (seeds or 1, Q) each.
        owner, part, count: (Q,), each caption's image, size third and number of boxed phrases.
    """
    pairs = _pairs(rows)
    values = {pair: rows[pair[0]].mean(0) - rows[pair[1]].mean(0) for pair in pairs}  # (Q,) each

    def on(chosen: np.ndarray) -> dict[tuple, dict | None]:
        if not chosen.any() or not pairs:
            return dict.fromkeys(pairs)
        some = np.stack([value[chosen] for value in values.values()], axis=1)
        found = tested(some, owner[chosen])
        return {
            pair: {"r@1": test["difference"], "interval": test["interval"], "p": test["p"]}
            for pair, test in zip(values, found)
        }

    whole = on(np.ones(len(owner), dtype=bool))
    by_size = [on(part == k) for k in range(3)]
    by_objects = {name: on(chosen) for name, chosen in (("1", count == 1), ("2", count == 2), ("3+", count > 2))}
    return [
        {
            "of": pair[0],
            "minus": pair[1],
            **whole[pair],
            "seeds": [round(float(value), 4) for value in (rows[pair[0]] - rows[pair[1]]).mean(1)],
            "by_size": [third[pair] for third in by_size],
            "by_objects": {name: found[pair] for name, found in by_objects.items()},
        }
        for pair in pairs
    ]


def tested(differences: np.ndarray, owner: np.ndarray) -> list[dict]:
    """Mean paired differences (Q, C) with 95 % intervals over images and p, as results hold them."""
    intervals, p = bootstrap_tests(differences, owner)
    return [
        {"difference": _mean([mean]), "interval": [round(float(edge), 4) for edge in edges], "p": round(float(each), 5)}
        for mean, edges, each in zip(differences.mean(0), intervals, p)
    ]


def _known_mean(values: np.ndarray) -> float:
    """The mean of what is not NaN; NaN where nothing is known, as of boxes that there are none of."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _mean(values: Sequence[float]) -> float | None:
    mean = float(np.mean(values))
    return round(mean, 4) if np.isfinite(mean) else None
