"""A comparison's results as files: tables and plots."""

from __future__ import annotations

from pathlib import Path

from samer.report.plots import PLOTS, plot
from samer.report.tables import markdown
from samer.runtime.files import atomic_path


def write_tables(results: dict, folder: str | Path) -> list[Path]:
    """Writes `results.md` and, where there are rows for them, the plots as PNG and SVG.

    Args:
        results: as `comparison.compare` returns them.
        folder: made if missing.

    Returns:
        The files written.
    """
    folder = Path(folder)
    files = [folder / "results.md"]
    with atomic_path(files[0]) as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    for name, draw in PLOTS.items():
        for suffix in (".png", ".svg"):
            content = plot(draw, results, suffix[1:])
            if content is not None:
                files.append((folder / name).with_suffix(suffix))
                with atomic_path(files[-1]) as temporary:
                    temporary.write_bytes(content)
    return files
