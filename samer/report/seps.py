"""The page of what is measured of SEPS, from the JSON that scripts/seps_evidence.py writes."""

from __future__ import annotations

from collections.abc import Sequence

from samer.report.cells import markdown_table, number

MODES = {
    "none": "none",
    "image": "the candidate's own",
    "query": "**the answer's (leak)**",
}
PAIRWISE = ("LAPS", "SEPS")  # how names of what scores pairs begin
COCO_PAIRS = 5_000 * 25_000
RECALLS = ("t2i_r@1", "t2i_r@5", "t2i_r@10", "i2t_r@1", "i2t_r@5", "i2t_r@10", "rsum")
HEAD = ("T2I R@1", "R@5", "R@10", "I2T R@1", "R@5", "R@10", "rSum")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread_cell(rows: Sequence[dict], key: str) -> str:
    """Mean over seeds, and lowest and highest where there are several."""
    values = [row[key] for row in rows]
    around = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return number(mean(values)) + around


def grouped(rows: Sequence[dict], *keys: str) -> list[list[dict]]:
    """Rows that are alike in these keys, in the order of the first."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.values())


def seps_page(found: dict) -> str:
    """The page in markdown: the leak, and photographs, each where it was measured."""
    lines = ["# SEPS, measured", ""]
    if "leak" in found:
        lines += leak_section(found["leak"])
    if "photos" in found:
        lines += photos_section(found["photos"])
    return "\n".join(lines).rstrip() + "\n"


def leak_section(leak: dict) -> list[str]:
    """What dense text gains, beside the best that captions allow."""
    best, rows = leak["ceiling"], grouped(leak["rows"], "variant", "dense")
    by_key = {(group[0]["variant"], group[0]["dense"]): mean([row["t2i_r@1"] for row in group]) for group in rows}
    table = [
        [group[0]["variant"], MODES[group[0]["dense"]], *(spread_cell(group, key) for key in RECALLS)] for group in rows
    ]
    table.append(["", "*best that captions allow*", *(number(best[k]) for k in ("r@1", "r@5", "r@10")), *[""] * 4])
    said = []
    for variant in dict.fromkeys(row["variant"] for row in leak["rows"]):
        values = [by_key.get((variant, mode)) for mode in MODES]
        if None not in values:
            none, image, query = map(number, values)
            said.append(f"`{variant}`: none {none}, the candidate's own {image}, the answer's {query}")
    seeds = len({row["seed"] for row in leak["rows"]})
    return [
        "## The leak",
        "",
        f"{leak['train']:,} generated pictures to train on, {leak['test']:,} to find, five things in each; a caption",
        "names two, the dense text all five (`samer/world/leak.py`). Small towers trained end to end from nothing,",
        f"{leak['epochs']} epochs, {seeds} seeds: the mean, lowest and highest. Captions fit several pictures, so that",
        f"the best possible R@1 is {number(best['r@1'])} whatever a system makes of them. R@1, text to image: "
        + "; ".join(said)
        + ".",
        "",
        "`code` compares the dense text's words with the picture, too; `paper` only chooses patches by it, so the leak",
        "can come through the choice alone. The candidate's own description says nothing of what is asked.",
        "",
        *beyond(by_key, best["r@1"]),
        *markdown_table(["system", "dense text", *HEAD], table),
        "",
    ]


def beyond(found: dict[tuple[str, str], float], best: float) -> list[str]:
    """Which systems find more than captions allow, and why that is."""
    above = [f"`{variant}` with {MODES[mode]}" for (variant, mode), value in found.items() if value > best]
    if not above:
        return []
    return [
        f"Above what captions allow: {', '.join(above)}. What goes beyond it comes out of the dense text, not of the",
        "captions.",
        "",
    ]


def photos_section(photos: dict) -> list[str]:
    """Pair-wise scores beside an index."""
    table = []
    for group in grouped(photos["rows"], "name", "k"):
        first = group[0]
        paces = [row["seconds_per_query_1m"] for row in group if row["seconds_per_query_1m"] is not None]
        cost = [f"{first['bytes_per_image']:,}", f"{mean(paces):,.1f}" if paces else ""]
        vectors = "all" if first["k"] is None else str(first["k"])
        table.append([first["name"], vectors, *(spread_cell(group, key) for key in RECALLS), *cost])
    limit = "" if photos["limit_images"] is None else f", of val and test the first {photos['limit_images']:,} pictures"
    return [
        "## Photographs: pair-wise scores beside an index",
        "",
        *beside_index(photos["rows"]),
        f"One retriever's features, trained on {photos['train_split']} alike{limit}; mean, lowest and highest",
        f"of the seeds. SEPS without dense text, {photos['epochs']} epochs, its towers frozen. Vectors: those that a",
        "pair is scored by. Bytes in halves: a pair-wise scorer keeps every patch, as each text chooses anew. Seconds:",
        "of one query against a million pictures, scaled from what was measured on the machine that ran it.",
        "",
        *markdown_table(["system", "vectors", *HEAD, "bytes a picture", "s a query, 1 M"], table),
        "",
        *fewer_seeds(photos["rows"]),
        *whole_coco(photos["rows"]),
    ]


def fewer_seeds(rows: Sequence[dict]) -> list[str]:
    """Which rows have fewer seeds than others."""
    groups = grouped(rows, "name", "k")
    most = max(len(group) for group in groups)
    few = [f"{group[0]['name']}, {group[0]['k']} vectors: {len(group)}" for group in groups if len(group) < most]
    return [f"Of {most} seeds, {'; '.join(few)}.", ""] if few else []


def beside_index(rows: Sequence[dict]) -> list[str]:
    """The best of both by rSum, and what they cost."""
    groups = grouped(rows, "name", "k")
    pairs = [group for group in groups if group[0]["name"].startswith(PAIRWISE)]
    indexed = [group for group in groups if not group[0]["name"].startswith(PAIRWISE)]
    if not pairs or not indexed:
        return []
    figure = lambda group, key: mean([row[key] for row in group])
    words = []
    for some, kind in ((indexed, "of an index"), (pairs, "of what scores pairs")):
        best = max(some, key=lambda group: figure(group, "rsum"))
        vectors = "" if best[0]["k"] is None else f", {best[0]['k']} vectors"
        cost = (
            f"{best[0]['bytes_per_image']:,} bytes a picture, {number(figure(best, 'seconds_per_query_1m'))} s a query"
        )
        words.append(f"{kind} {best[0]['name']}{vectors}: {number(figure(best, 'rsum'))}, {cost}")
    return [f"Best rSum {'; '.join(words)}.", ""]


def whole_coco(rows: Sequence[dict]) -> list[str]:
    """How long a pair-wise scorer takes for COCO 5K, from what a pair took here."""
    taken = {}
    for row in rows:
        if row["name"].startswith(PAIRWISE) and row["seconds_per_query_1m"] is not None:
            taken.setdefault(row["k"], []).append(row["seconds_per_query_1m"] / 1e6)
    if not taken:
        return []
    hours = [f"{mean(paces) * COCO_PAIRS / 3600:.1f} hours by {k} vectors" for k, paces in sorted(taken.items())]
    return [f"COCO 5K is {COCO_PAIRS:,} pairs: at this pace {', '.join(hours)}.", ""]
