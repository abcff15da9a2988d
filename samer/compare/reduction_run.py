"""The whole measurement of scripts/reduce.py: cells, table, and the projection tuned."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from samer.compare.reduction import USUAL, WHOLE, Cell, choose_cells, measure_cells
from samer.compare.reduction_table import kinds_said, table
from samer.compare.tower_tuning import tune_tower
from samer.compressors import make_compressor
from samer.config import Config, InputError, MergeConfig
from samer.data import make_reader
from samer.data.pictures import limit_pixels
from samer.data.records import ImageRecord
from samer.evaluation import score_records
from samer.features.read import FeatureStore, open_encoder
from samer.features.write import write_features
from samer.metrics import bootstrap_intervals, query_metrics
from samer.reducers.cost import TIERS
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector
from samer.runtime.commands import compute_dtype
from samer.runtime.files import is_file, read_json, write_json
from samer.runtime.processes import print0
from samer.runtime.signals import stoppable
from samer.training.loop import train


def measure_reduction(config: Config, asked: argparse.Namespace, device: torch.device) -> dict:
    """Measures what is not there yet and writes `results.json`.

    Args:
        config: with the model.
        asked: of scripts/reduce.py.
        device: to compute on.
    """
    started = time.monotonic()
    out, data, model = Path(asked.out), config.data, config.model
    limit_pixels(data.max_megapixels)
    reader = make_reader(data.name, asked.data_root)
    records = reader.load_split(asked.data_root, asked.split, boxes=True, limit_images=asked.limit_images)
    seen = reader.load_split(asked.data_root, data.train_split, boxes=False)
    seen = seen[:: max(1, len(seen) // asked.calibrate)][: asked.calibrate]
    where = {"local_files_only": model.local_files_only, "revision": model.revision}
    where["dtype"] = compute_dtype(asked)
    retriever = open_encoder(model.name, device, **where)
    if not isinstance(retriever, Retriever):
        raise InputError(f"{model.name}: reads no pictures")
    methods, shares = asked.methods or list(USUAL), asked.tiers or list(TIERS)
    passes = 1 + len(methods) * len(shares)
    print0(f"{passes} passes over {len(records):,} images, after the settings are found, for AdaMerge by calibrating")
    with stoppable():
        cells = choose_cells(retriever, seen, out, methods, shares, asked.batch_size)
        measured = measure_cells(retriever, records, cells, asked.regions, out / "cells", asked.batch_size)
        results = {
            "about": {
                "model": model.name,
                "model_kind": type(retriever.tower).__name__ + f" {retriever.tower.config.hidden_size} wide",
                "picture_size": retriever.picture_size[0],
                "patches": retriever.grid[0] * retriever.grid[1],
                "images": len(records),
                "captions": sum(len(record.captions) for record in records),
                "knn": kinds_said(records),
                "calibrated_on": len(seen),
                "command": "python scripts/reduce.py --data-root DATA --out OUT model.name=RETRIEVER",
            },
            "rows": table(cells, measured, records, asked.regions),
        }
        write_json(out / "results.json", results)
        if asked.tune:
            few = [cell for cell in cells if cell.asked in (0, asked.tune_tier) and cell.method in WHOLE]
            results["tuned"] = _tuned(config, asked, retriever, records, few)
            write_json(out / "results.json", results)
        if asked.tune_tower:
            few = [cell for cell in cells if cell.asked == asked.tune_tier and cell.method in WHOLE]
            results["tower_tuned"] = _towers_tuned(config, asked, records, few, results["rows"], device)
            write_json(out / "results.json", results)
    print0(f"{time.monotonic() - started:.0f} s; wrote {out / 'results.json'}")
    return results


def _tuned(
    config: Config, asked: argparse.Namespace, retriever: Retriever, records: Sequence[ImageRecord], cells: list[Cell]
) -> dict:
    """The projection trained for an epoch on the tokens of each cell's tower; features go once it is done."""
    rows, images = [], 0
    for cell in cells:
        place = Path(asked.out) / "tuned" / cell.key
        done = place / "row.json"
        if is_file(done):
            rows.append(read_json(done))
            images = rows[-1]["images"]
            continue
        retriever.use_reduction(cell.settings)
        splits = [f"{config.data.train_split}[50%:]", asked.split]
        for split, limit in zip(splits, (None, asked.limit_images)):
            write_features(
                place / "features", asked.data_root, [split], retriever, batch_size=asked.batch_size,
                dtype="float16", limit_images=limit,
            )  # fmt: skip
        store = FeatureStore(place / "features", config.model.name, retriever.device)
        before = _found(store, records)
        data = replace(
            config.data, root=asked.data_root, train_split=splits[0], eval_split="", features=str(store.folder)
        )
        merge = replace(config.merge, compressor="none")
        recipe = replace(
            config.train, output_dir=str(place / "projector"), num_train_epochs=1.0, train_batch_size=64,
            grad_accum_steps=1, learning_rate=1e-3, temperature=0.05, bf16=False, dataloader_num_workers=0,
        )  # fmt: skip
        train(replace(config, data=data, merge=merge, train=recipe))
        store.use_projector(load_projector(place / "projector", store))
        images = sum(shard.count for shard in store.manifest.splits[splits[0]].images)
        rows.append({"name": cell.method, "saved": cell.saved, "images": images, "before": before})
        rows[-1]["after"] = _found(store, records)
        write_json(done, rows[-1])
        shutil.rmtree(place / "features")
    return {"rows": rows, "images": images}


def _towers_tuned(
    config: Config,
    asked: argparse.Namespace,
    records: Sequence[ImageRecord],
    cells: list[Cell],
    untouched: list[dict],
    device: torch.device,
) -> dict:
    """Each cell's tower trained for an epoch, measured as the cells are; `before` is the cell's own row."""
    rows = []
    model, data = config.model, config.data
    split = f"{data.train_split}[50%:]"
    images = make_reader(data.name, asked.data_root).load_split(asked.data_root, split, boxes=False)
    for cell in cells:
        place = Path(asked.out) / "tower_tuned" / cell.key
        done = place / "row.json"
        if not is_file(done):
            where = {"local_files_only": model.local_files_only, "revision": model.revision}
            where["dtype"] = compute_dtype(asked)
            retriever = open_encoder(model.name, device, **where)
            losses = tune_tower(retriever, cell.settings, images, asked.batch_size)
            shutil.copytree(Path(asked.out) / "cells" / "plain", place / "plain", dirs_exist_ok=True)
            found = measure_cells(retriever, records, [cell], asked.regions, place, asked.batch_size)
            (row,) = table([cell], found, records, asked.regions)
            (before,) = [each for each in untouched if (each["method"], each["asked"]) == (cell.method, cell.asked)]
            names = ("cls_cosine", "patch_cosine")
            parts = {"before": before, "after": row}
            said = {key: {name: part[name] for name in names} for key, part in parts.items()}
            for key, part in parts.items():
                said[key]["r@1"] = part["retrieval"]["all"]["r@1"]
            write_json(done, {"name": cell.method, "saved": cell.saved, "first_losses": losses[:8], **said})
            shutil.rmtree(place / "plain")
        rows.append(read_json(done))
    return {"rows": rows, "images": len(images)}


def _found(store: FeatureStore, records: Sequence[ImageRecord]) -> dict:
    """R@1 of the captions with all tokens, and its interval."""
    scores = score_records(store, records, make_compressor(MergeConfig(compressor="none")), batch_size=32)
    owner = torch.tensor([image for image, record in enumerate(records) for _ in record.captions])
    values = query_metrics(scores, owner[:, None] == torch.arange(len(records)))["r@1"]
    low, high = bootstrap_intervals({"x": values}, groups=owner.numpy())["x"]
    return {"value": float(values.mean()), "interval": [low, high]}
