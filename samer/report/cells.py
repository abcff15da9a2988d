"""Cells of a comparison's tables, and tables in markdown."""

from __future__ import annotations

from collections.abc import Sequence

from samer.settings import Budget


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or nothing where there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def budget_words(regions: Budget) -> str:
    """K as tables say it: 64, N/16, 3N/16."""
    if isinstance(regions, int):
        return str(regions)
    part, whole = regions.split("/")
    return f"{part if part != '1' else ''}N/{whole}"


def recall(row: dict) -> str:
    """R@1 with its spread over seeds and its interval over images."""
    spread = f" ± {row['spread']:.1f}" if row["spread"] is not None else ""
    return f"{row['r@1']:.1f}{spread} [{row['interval'][0]:.1f}, {row['interval'][1]:.1f}]"


def label(row: dict) -> str:
    """A row's name where untouched and trained ones stand together."""
    return row["name"] + (", trained" if row["section"] == "adapted" else "")


WHERE = {"untouched": ", untouched", "adapted": ", trained", "components": ", trained"}


def named(key: Sequence[str]) -> str:
    """A row's name where rows of any section stand together, from its section and name."""
    return f"{key[1]}{WHERE.get(key[0], '')}"


def difference(value: float, interval: Sequence[float], p: float | None = None) -> str:
    """A paired difference with its interval and, where it is given, p."""
    said = "" if p is None else " p < 0.001" if p < 0.001 else f" p {p:.3f}"
    return f"{value:+.1f} [{interval[0]:+.1f}, {interval[1]:+.1f}]{said}"
