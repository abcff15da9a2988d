"""A comparison's results as plots."""

from __future__ import annotations

import io
from collections.abc import Callable

from samer.report.cells import budget_words, label
from samer.report.tables import budget_lines, budgets_of, stored_bytes
from samer.runtime.signals import held, stoppable
from samer.settings import vectors_of

# Okabe and Ito's colours, told apart with the common colour vision deficiencies; and markers, for print
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F7F", "#B8A000")
MARKERS = "osD^vP*X<>"


def plots(results: dict) -> dict[str, tuple[bytes, bytes]]:
    """The plots that the results have rows for: name -> SVG for a light and for a dark page."""
    found = {name: tuple(plot(draw, results, "svg", dark) for dark in (False, True)) for name, draw in PLOTS.items()}
    return {name: pair for name, pair in found.items() if pair[0] is not None}


def plot(draw: Callable, results: dict, kind: str, dark: bool = False) -> bytes | None:
    """Draws with `draw(axes, results)`, which says False where it has no rows (None then); PNG or SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ink = "#e6e8eb" if dark else "#000000"
    settings = {"svg.hashsalt": "samer", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    if dark:
        settings |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none")
    # matplotlib's compiled parts turn what a signal raises in them into an error of their own
    with stoppable(), held(), pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
        try:
            if draw(axes, results) is False:
                return None
            content = io.BytesIO()
            figure.savefig(
                content,
                format=kind,
                dpi=150,
                bbox_inches="tight",
                metadata={"png": {"Software": None}, "svg": {"Date": None}}[kind],
            )
            return content.getvalue()
        finally:
            pyplot.close(figure)


def _colour(number: int) -> str:
    """A line's colour; the first is that of the text, so that it shows on a dark page."""
    from matplotlib import rcParams

    return COLOURS[number % len(COLOURS)] if number % len(COLOURS) else rcParams["text.color"]


def _asked(row: dict, queries: str) -> dict:
    """A row's figures of captions, or of `queries`."""
    return row[queries] if queries else row


def _reference(axes, results: dict, queries: str) -> None:
    """All tokens as horizontal lines."""
    for section, style, words in (("untouched", ":", "all tokens"), ("adapted", "--", "all tokens, same training")):
        for row in results["rows"]:
            if (row["section"], row["compressor"]) == (section, "none"):
                height = _asked(row, queries)["r@1"]
                axes.axhline(height, color=_colour(0), alpha=0.65, linestyle=style, linewidth=1.2, label=words)


def _draw_lines(axes, results: dict, place: Callable[[dict], float], queries: str = "") -> bool:
    lines = budget_lines(results)
    if not lines:
        return False
    _reference(axes, results, queries)
    compressors = list(dict.fromkeys(name.removesuffix(", trained") for name in lines))
    for name, rows in lines.items():
        number = compressors.index(name.removesuffix(", trained"))
        trained = name.endswith(", trained")
        own = [_asked(row, queries) for row in rows]
        low_high = [[each["r@1"] - each["interval"][0], each["interval"][1] - each["r@1"]] for each in own]
        axes.errorbar(
            [place(row) for row in rows],
            [each["r@1"] for each in own],
            yerr=list(zip(*low_high)) if trained else None,
            color=_colour(number),
            marker=MARKERS[number % len(MARKERS)],
            linestyle="-" if trained else (0, (4, 2)),
            linewidth=2 if trained else 1.2,
            markersize=6 if trained else 5,
            capsize=2,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_ylabel("R@1, text to image (%)")
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=8, ncol=1, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return True


def _recall_by_budget(axes, results: dict, queries: str = "") -> bool:
    tokens = results["about"]["tokens_per_image"]
    if not _draw_lines(axes, results, lambda row: vectors_of(row["merge"]["num_regions"], tokens), queries):
        return False
    budgets = budgets_of(results)
    axes.set_xticks([vectors_of(k, tokens) for k in budgets], [*map(budget_words, budgets)])
    axes.set_xlabel(f"K, vectors per image at most (of {tokens})")
    axes.set_title(f"Recall {'of short phrases ' * bool(queries)}against budget, {results['about']['data']}")
    return True


def _phrases_by_budget(axes, results: dict) -> bool:
    if not any("phrases" in row for row in results["rows"]):
        return False
    return _recall_by_budget(axes, results, "phrases")


def _recall_by_bytes(axes, results: dict) -> bool:
    if not _draw_lines(axes, results, lambda row: stored_bytes(row, results)):
        return False
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("bytes per image in the index (2 per component; HPC: 1 per vector)")
    axes.set_title(f"Recall against bytes, {results['about']['data']}")
    return True


def _grounding_bars(axes, results: dict) -> bool:
    rows = [
        row for row in results["rows"] if row["section"] in ("untouched", "adapted") and row["box_mass"] is not None
    ]
    if not rows:
        return False
    axes.figure.set_size_inches(8, 0.32 * len(rows) + 1.6)
    places = range(len(rows))
    for offset, (name, words) in enumerate(
        (("box_mass", "BoxMass"), ("region_hit", "RegionHit"), ("iou", "CoverageIoU"))
    ):
        values = [row[name] for row in rows]
        axes.barh(
            [p + 0.27 * (offset - 1) for p in places], values, 0.25, label=words, color=COLOURS[(2, 5, 3)[offset]]
        )
    axes.set_yticks(list(places), [label(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("percent")
    axes.set_title(f"What winning vectors stand on, {results['about']['data']}")
    axes.grid(True, axis="x", alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return True


PLOTS = {
    "recall_budget": _recall_by_budget,
    "recall_bytes": _recall_by_bytes,
    "phrases_budget": _phrases_by_budget,
    "grounding": _grounding_bars,
}
