"""A comparison from its settings to its files: features if there are none, the rows, tables, plots and the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from samer.compare.plan import SECTIONS, plan, shown_methods
from samer.compare.run import compare, load_records
from samer.compressors import make_compressor
from samer.config import Config
from samer.data.records import phrase_texts
from samer.features.read import FeatureStore, check_reduction, open_encoder
from samer.features.write import write_features
from samer.report.cells import budget_words
from samer.report.gallery import Gallery, make_gallery
from samer.report.page import Table, write_report
from samer.report.results import write_tables
from samer.report.tables import recall_table
from samer.runtime.processes import print0, rank

TILES = {  # the figures in large
    "none": "all tokens",
    "none, trained": "all tokens, same training",
    "samer, farthest, trained": "SaMer, farthest, trained",
    "samer, raster, trained": "SaMer, raster, trained",
}


def write_comparison(
    config: Config,
    out: str | Path,
    *,
    seeds: Sequence[int],
    sections: Sequence[str] | None,
    split: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    at_budgets: Sequence[int] = (),
    methods: Sequence[str] = (),
    banks: Mapping[str, str] | None = None,
) -> dict:
    """Runs what is not there yet, and writes `results.json`, `results.md`, plots and `report.html`.

    Args:
        config: `data.root` is set; without `data.features` they are computed into `out`/features.
        out: folder of everything.
        seeds, split, at_budgets, methods, banks: as `compare` takes them.
        sections: as `compare` takes them; None: all, without phrases where the data or data.features has none.
        device: to compute on.
        dtype: that the model computes features in, where they have to be made; None: as `open_encoder` chooses.

    Returns:
        The results, as written.
    """
    started = time.monotonic()
    out = Path(out)
    records = load_records(config, split, config.data.limit_eval_images, boxes=True)
    phrases, every = phrase_texts(records), sections is None
    if every:
        sections = [name for name in SECTIONS if phrases or name != "phrases"]
    given = bool(config.data.features)
    if not given:
        config = replace(config, data=replace(config.data, features=str(out / "features")))
        rows = plan(config.merge, 1, at_budgets or [1], methods, list(banks or ()))
        rows = [row for row in rows if row.section in sections] or rows  # without one the gallery shows all methods
        asked = any(make_compressor(merge).needs for row in rows for merge in (row.merge, row.trained) if merge)
        _compute_features(config, split, device, dtype, phrases="phrases" in sections, signals=asked)
    store = FeatureStore(config.data.features, config.model.name, device, revision=config.model.revision)
    check_reduction(store, config.reduce)
    if every and given and store.lacking(phrases):
        sections = [name for name in SECTIONS if name != "phrases"]
        print0(f"note: {store.folder} holds no phrases of {split}, so none are asked; run features with --phrases")
    asked = {
        "seeds": seeds,
        "sections": sections,
        "split": split,
        "at_budgets": at_budgets,
        "methods": methods,
        "banks": banks,
    }
    results = compare(config, out, store, **asked)
    files = [out / "results.json", *(write_tables(results, out) if rank() == 0 else ()), out / "report.html"]
    compared = list({row["merge"]["compressor"]: None for row in results["rows"]})  # some may have been left out
    shown, regions = shown_methods(config.merge, out, store, sections, seeds[0], compared)
    gallery = make_gallery(store, records, shown, regions, batch_size=config.train.eval_batch_size)
    if rank() == 0:
        _write_page(files[-1], results, gallery, config.data.root, seeds)
    print0(f"{time.monotonic() - started:.0f} s; wrote {', '.join(map(str, files))}")
    return results


def _compute_features(
    config: Config, split: str, device: torch.device, dtype: torch.dtype | None, *, phrases: bool, signals: bool
) -> None:
    """The frozen hidden states of the splits trained and measured on; phrases of the latter; attention if asked for."""
    data, model = config.data, config.model
    where = {"local_files_only": model.local_files_only, "revision": model.revision, "dtype": dtype}
    encoder = open_encoder(model.name, device, **where, reduce=config.reduce)
    for name, limit in ((data.train_split, data.limit_train_images), (split, data.limit_eval_images)):
        write_features(
            data.features,
            data.root,
            [name],
            encoder,
            dtype=encoder.origin["computed_in"],
            limit_images=limit,
            reader=data.name,
            phrases=phrases and name == split,
            signals=signals,
        )


def _write_page(path: Path, results: dict, gallery: Gallery, root: str, seeds: Sequence[int]) -> None:
    """The report of a comparison."""
    about = results["about"]
    head, rows = recall_table(results)
    note = (
        f"In percent, text to image unless said otherwise, 95 % bootstrap intervals over images. Trained rows: mean of "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, ± standard deviation. Pictures below: seed {seeds[0]}."
    )
    data = f"{about['split']} of {root}: {about['images']:,} images, {about['captions']:,} captions"
    write_report(
        path,
        title=f"Compressors compared on {about['data']}",
        about=[
            ("data", data),
            ("retriever", f"{about['model']}, {about['tokens_per_image']} tokens per image"),
            ("compressed to", f"{budget_words(about['merge']['num_regions'])} vectors"),
            ("training", ", ".join(f"{name} {value:g}" for name, value in about["train"].items())),
            ("all tables", str(path.with_name("results.md"))),
        ],
        tiles=[(f"{float(row[1].split()[0]):.1f} %", f"R@1, {TILES[row[0]]}") for row in rows if row[0] in TILES],
        tables=[Table("Retrieval", note, head, rows)] if rows else [],
        results=results,
        gallery=gallery,
    )
