"""The page of reduced towers, from the files that scripts/reduce.py and scripts/bench.py wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from samer.report.cells import difference, markdown_table

LIKE = 0.04  # shares of FLOPs so far apart are compared
NOTE = """AdaMerge's formula merges the most salient tokens first, against the principle that its paper states;
`inverse` (ours) merges the least salient first. `shared` merges as many in every image of a batch; `proportional` adds
token sizes to the attention, as ToMe does. CubistMerge merges once, before the block named. What the papers do not say
is in `samer/reducers/`, marked OURS."""


def page(results: Mapping[str, Any], speed: Sequence[Mapping[str, Any]], also: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page.

    Args:
        results: of scripts/reduce.py.
        speed: of `scripts/bench.py reduce --json`, one for each size that was timed.
        also: results of other models, of which features and retrieval are shown.
    """
    about, rows = results["about"], distinct(results["rows"])
    lines = [
        "# Fewer tokens inside the tower",
        "",
        f"{about['model_kind']}, pictures of {about['picture_size']} pixels ({about['patches']:,} patches), "
        f"{about['images']:,} photographs with {about['captions']:,} captions, text to image; 95 % bootstrap intervals "
        "over images, differences paired. FLOPs are counted, of one image at a time, the reducer's own among them.",
        "",
        f"    {about['command']}",
        "",
        *findings(rows, results.get("tuned", {})),
        *speed_tables(speed),
        "## What is kept",
        "",
        "Cosine to the plain tower's last features, of CLS and of every patch (that of its token); k-NN by CLS, "
        f"{about['knn']['images']:,} images of {about['knn']['kinds']} kinds (the last word of the phrase with the "
        f"largest box), {about['knn']['largest']:.0f} % by always saying the most frequent; R@1 with all tokens that "
        "are left, difference to the plain tower.",
        "",
        *kept_table(rows),
        "",
        NOTE,
        "",
        *(line for each in also for line in other_model(each)),
        "## Tower reduced, index merged",
        "",
        "R@1 with all tokens and with SaMer's K (farthest centres), projection untouched.",
        "",
        *crossed_table(rows),
        "",
        *tuned_tables(results.get("tuned", {})),
        *tower_tables(results.get("tower_tuned", {})),
    ]
    return "\n".join(lines).rstrip() + "\n"


def distinct(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows without those of a method whose r was measured for another share already."""
    seen: dict[tuple, Mapping[str, Any]] = {}
    for row in rows:
        seen.setdefault((row["method"], row["r"], *row["layers"]), row)
    return list(seen.values())


PAIRS = (
    ("adamerge", "tome", "AdaMerge - ToMe, which the paper puts below it at every tier (ImageNet, ViT-B)"),
    ("cubist", "tome", "CubistMerge - ToMe"),
    ("adamerge, inverse", "adamerge", "`inverse`, which merges the least salient first - the formula"),
    ("adamerge, shared", "adamerge", "One r for all images of a batch - each image's own"),
    ("adamerge, proportional", "adamerge", "Sizes in the attention - none"),
)


def findings(rows: Sequence[Mapping[str, Any]], tuned: Mapping[str, Any]) -> list[str]:
    """What the tables say: methods against each other at like shares of FLOPs, what merging the index adds, and what a
    trained projection makes good."""
    found = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    ndcg = lambda row, k="all": row["retrieval"][k]["ndcg@10"]["value"]
    lines = []
    for one, other, words in PAIRS:
        parts = []
        for row in found.get(one, ()):
            near = min(found.get(other, ()), key=lambda each, at=row["saved"]: abs(each["saved"] - at), default=None)
            if near is not None and abs(near["saved"] - row["saved"]) < LIKE:
                parts.append(f"{ndcg(row) - ndcg(near):+.1f} at {row['saved']:.0%}")
        if parts:
            lines.append(f"- {words}: {', '.join(parts)}.")
    smallest = list(rows[0]["retrieval"])[-1]
    ends = [(name, min(each, key=lambda row: abs(row["saved"] - 0.25))) for name, each in found.items()]
    added = [
        f"{_named(name)} {ndcg(row, smallest) - ndcg(row):+.1f}"
        for name, row in ends
        if name == "none" or abs(row["saved"] - 0.25) < LIKE
    ]
    lines.append(f"- K = {smallest} - all tokens, of towers with a quarter of FLOPs saved: {', '.join(added)}.")
    if tuned:
        parts = [
            f"{_named(row['name'])} {row['before']['value']:.1f} to {row['after']['value']:.1f}"
            for row in tuned["rows"]
        ]
        lines.append(
            f"- R@1 where the projection is trained for an epoch on what the reduced tower gives: {', '.join(parts)}."
        )
    return ["## What is found", "", "nDCG@10, at like shares of FLOPs saved:", "", *lines, ""]


def _named(method: str) -> str:
    return "plain" if method == "none" else method


def _where(row: Mapping[str, Any]) -> str:
    """r, and the block where it is not every one."""
    r = f"{row['r']:g}"
    return f"{r} before block {row['layers'][0]}" if row["layers"] else r


def other_model(results: Mapping[str, Any]) -> list[str]:
    """What is kept elsewhere: by a retriever of larger pictures, or by other methods."""
    about = results["about"]
    return [
        f"### {about['picture_size']} pixels, {about['patches']:,} patches",
        "",
        f"{about['images']:,} photographs with {about['captions']:,} captions, and the retriever of these pictures.",
        "",
        *kept_table(distinct(results["rows"])),
        "",
    ]


def kept_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Features and retrieval by method and tier."""
    head = [
        "",
        "FLOPs saved",
        "r",
        "tokens at the end",
        "cosine, CLS",
        "cosine, patches",
        "k-NN, %",
        "R@1",
        "difference",
    ]
    cells = []
    for row in rows:
        found = row["retrieval"]["all"]["r@1"]
        knn = row.get("knn")
        cells.append(
            [
                _named(row["method"]),
                f"{row['saved']:.1%}",
                _where(row) if row["r"] else "",
                f"{row['layer_tokens'][-1]:.0f}",
                f"{row['cls_cosine']['value']:.4f}",
                f"{row['patch_cosine']['value']:.4f}",
                _interval(knn) if knn else "",
                _interval(found),
                difference(found["difference"], found["difference_interval"], found["p"]) if "p" in found else "",
            ]
        )
    return markdown_table(head, cells)


def crossed_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """R@1 by what the tower keeps and what the index keeps."""
    budgets = list(rows[0]["retrieval"])
    head = ["tower", "FLOPs saved", *(f"K = {k}" if k != "all" else "all tokens" for k in budgets)]
    cells = []
    for row in rows:
        found = [row["retrieval"][k]["r@1"] for k in budgets]
        cells.append([_named(row["method"]), f"{row['saved']:.1%}"])
        cells[-1] += [_interval(each) for each in found]
    return markdown_table(head, cells)


def speed_tables(speed: Sequence[Mapping[str, Any]]) -> list[str]:
    """Images per second, by size."""
    lines = []
    for each in speed:
        rows = [
            [
                row["method"],
                f"{row['saved']:.1%}",
                f"{row['r']:g}",
                f"{each['batch'] / row['seconds']:.2f}",
                f"{row['speedup']:.2f}",
            ]
            for row in each["rows"]
        ]
        lines += [
            f"## Speed at {each['picture_size']} pixels",
            "",
            f"{each['tower']}, {each['threads']} threads of {each['device']}, batches of {each['batch']}, median of "
            f"{each['runs']} runs in turn, the plain tower in the same process.",
            "",
            f"    {each['command']}",
            "",
            *markdown_table(["", "FLOPs saved", "r", "images/s", "times as fast"], rows),
            "",
        ]
    return lines


def tuned_tables(tuned: Mapping[str, Any]) -> list[str]:
    """The projection after an epoch of training on the reduced tower's tokens."""
    if not tuned:
        return []
    rows = [
        [row["name"], f"{row['saved']:.1%}", _interval(row["before"]), _interval(row["after"])] for row in tuned["rows"]
    ]
    return [
        "## The projection after one epoch",
        "",
        f"Trained on what the same reduced tower gives of {tuned['images']:,} other images; R@1 with all tokens.",
        "",
        *markdown_table(["tower", "FLOPs saved", "untouched", "trained"], rows),
    ]


def tower_tables(tuned: Mapping[str, Any]) -> list[str]:
    """The tower after an epoch of being told what it gave without a reducer."""
    if not tuned:
        return []
    head = ["", "FLOPs saved", "cosine, CLS", "cosine, patches", "R@1"]
    rows = []
    for row in tuned["rows"]:
        for key, words in (("before", row["name"]), ("after", f"{row['name']}, trained")):
            part = row[key]
            cosines = [f"{part[name]['value']:.4f}" for name in ("cls_cosine", "patch_cosine")]
            rows.append([words, f"{row['saved']:.1%}", *cosines, _interval(part["r@1"])])
    return [
        "",
        "## The tower after one epoch",
        "",
        f"Trained on {tuned['images']:,} other images to give each patch what it gave without (ours); the projection "
        "untouched.",
        "",
        *markdown_table(head, rows),
    ]


def _interval(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{figure['value']:.1f} [{low:.1f}, {high:.1f}]"
