"""The cells of `samer.compare.reduction` as figures with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from samer.compare.reduction import PLAIN, Cell, kinds_of, neighbours_right
from samer.data.records import ImageRecord
from samer.metrics import bootstrap_intervals, bootstrap_tests

RETRIEVAL = ("r@1", "r@5", "ndcg@10")


def table(
    cells: Sequence[Cell],
    measured: Mapping[str, Mapping[str, np.ndarray]],
    records: Sequence[ImageRecord],
    regions: Sequence[int],
) -> list[dict[str, Any]]:
    """A row for each cell.

    Args:
        cells: the plain tower first.
        measured: of `measure_cells`.
        records: what was measured, with boxes.
        regions: K.

    Returns:
        Rows with `method`, `asked`, `saved`, `r`, `layers`, `layer_tokens` (means), and as {"value", "interval",
        "difference", "difference_interval", "p"}: `cls_cosine`, `patch_cosine`, `knn`, and under `retrieval` by K those
        of `RETRIEVAL`. Differences are paired, against the plain tower at the same K.
    """
    owner = np.array([image for image, record in enumerate(records) for _ in record.captions])
    kinds = kinds_of(records)
    known = bool((kinds >= 0).any())
    plain = {**measured[cells[0].key]}
    plain_knn = neighbours_right(plain["cls"], kinds) if known else None
    rows = []
    for cell in cells:
        values = measured[cell.key]
        row: dict[str, Any] = {
            "method": cell.method,
            "asked": cell.asked,
            "saved": cell.saved,
            "r": cell.settings.r,
            "layers": list(cell.settings.layers),
            "layer_tokens": [float(mean) for mean in values["layer_tokens"].mean(0)],
        }
        for name in ("cls_cosine", "patch_cosine"):
            row[name] = _figure(values[name].astype(np.float64), None, np.arange(len(records)))
        if plain_knn is not None:
            found = neighbours_right(values["cls"], kinds)
            row["knn"] = _figure(found, None if cell.method == PLAIN else plain_knn, np.arange(len(found)))
        row["retrieval"] = {}
        for k in ("all", *map(str, regions)):
            own = {"vectors": float(values[f"vectors {k}"].mean())}
            for metric in RETRIEVAL:
                name = f"{metric} {k}"
                own[metric] = _figure(values[name], None if cell.method == PLAIN else plain[name], owner)
            row["retrieval"][k] = own
        rows.append(row)
    return rows


def _figure(values: np.ndarray, plain: np.ndarray | None, groups: np.ndarray) -> dict[str, Any]:
    """A mean with its interval, and its difference to the plain tower's."""
    found: dict[str, Any] = {"value": float(values.mean())}
    found["interval"] = list(bootstrap_intervals({"x": values}, groups=groups)["x"])
    if plain is not None:
        intervals, p = bootstrap_tests((values - plain)[:, None], groups, resamples=2000)
        found["difference"] = float((values - plain).mean())
        found["difference_interval"], found["p"] = intervals[0].tolist(), float(p[0])
    return found


def kinds_said(records: Sequence[ImageRecord]) -> dict[str, int]:
    """How many images have a kind, of how many kinds, and what always the largest would be right in, in percent."""
    kinds = kinds_of(records)
    own = kinds[kinds >= 0]
    counts = np.bincount(own) if len(own) else np.zeros(1, int)
    return {"images": len(own), "kinds": len(counts), "largest": float(100 * counts.max() / max(1, len(own)))}
