"""Every compressor at the same budget and with the same training: what is run, kept, and measured.

    DIR/features/                          frozen hidden states of train and test, if no store is given
    DIR/projectors/<name>-seed<s>/         one per compressor setting and seed (samer/training)
    DIR/measured/<name>-seed<s>.safetensors    per-query, per-phrase and per-image values of all rows of one projector
    DIR/results.json, results.md, *.png, *.svg (samer/report/results.py)

Each image is encoded once per projector and shared by all compressors measured with it (a codebook is fitted on up to
256 images before); what is finished is kept. The rows of one projector are measured together, so another set of rows
measures that projector's anew. One process: a trained row's batch is train_batch_size x grad_accum_steps.

Shape letters: Q queries (captions), I images, P phrases, N tokens, K budget, D embedding.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from samer.compare.measure import cost, measure
from samer.compare.plan import Row, budgets, check_request, plan, slug
from samer.compare.summarise import named_objects, summarise
from samer.config import Config, MergeConfig
from samer.data import make_reader
from samer.data.records import ImageRecord
from samer.data.stamps import Stamps
from samer.evaluation import check_described
from samer.features.read import FeatureStore
from samer.grounding import size_thirds
from samer.report.gallery import Shown
from samer.retrievers.base import Encoder
from samer.retrievers.projectors import load_projector
from samer.runtime.files import write_json
from samer.runtime.processes import print0
from samer.runtime.shards import finished_shard, load_shard, unreadable, write_shard
from samer.runtime.signals import stop_here, stoppable
from samer.training.loop import train

VERSION = 1

Measured = dict[str, dict[str, np.ndarray]]  # by compression and by value, as `measure` names them
# by projector's name and seed: what it is trained through (None: untouched), and the compressions measured with it
Jobs = dict[tuple[str, int], tuple[MergeConfig | None, dict[str, MergeConfig]]]


def sweep(
    encoder: Encoder,
    records: Sequence[ImageRecord],
    shown: Sequence[Shown],
    curves: Sequence[str],
    data: str,
    batch_size: int,
) -> dict:
    """Grounding of some methods over a split, and recall of some of them at all budgets with the projectors they have.

    Args:
        encoder: its projector is replaced.
        records: of the split, with boxes.
        shown: methods with a name (", trained" at its end if so), `merge` and `projector`.
        curves: names of those whose recall is measured at all budgets.
        data: the name of it.
        batch_size: images and captions per forward pass.

    Returns:
        As `compare`, with rows in the sections untouched, adapted and budgets only.
    """
    check_described(records)
    tokens_per_image = encoder.record_inputs(records[:1])["attention_mask"].shape[1]
    rows, jobs = [], {}
    for method in shown:
        trained = None if method.projector.hash == encoder.base_projector.hash else method.merge
        section = "untouched" if trained is None else "adapted"
        key = method.projector.hash
        own = [Row(section, method.name.removesuffix(", trained"), method.merge, trained, key)]
        if method.name in curves:
            at = {budget: replace(method.merge, num_regions=budget) for budget in budgets(tokens_per_image)}
            own += [Row("budgets", f"{method.name} @ {budget}", merge, trained, key) for budget, merge in at.items()]
        _, merges = jobs.setdefault(key, (method.projector, {}))
        merges |= {slug(row.merge): row.merge for row in own}
        rows += own
    measured = {}
    for number, (key, (projector, merges)) in enumerate(jobs.items(), 1):
        print0(f"[{number}/{len(jobs)}] projector {key[:8]}: {len(merges)} compressions of {len(records):,} images")
        encoder.use_projector(projector)
        values = measure(encoder, records, merges, batch_size)
        measured[key, 0] = {name: {n: v.numpy() for n, v in row.items()} for name, row in values.items()}
    about = {"data": data, "tokens_per_image": tokens_per_image, "embedding_dim": encoder.embedding_dim}
    return {"about": about, **summarise(rows, measured, records, [0])}


def compare(
    config: Config,
    folder: str | Path,
    store: FeatureStore,
    *,
    seeds: Sequence[int],
    sections: Sequence[str],
    split: str,
) -> dict:
    """Trains and measures every row and writes `results.json`; finished projectors and measurements are kept.

    Args:
        config: data.root and data.features are set; `merge` gives K, `train` the recipe of every trained row.
        folder: where everything goes.
        store: data.features, opened; holds the splits trained and measured on.
        seeds: of the trained rows.
        sections: of `SECTIONS`.
        split: measured on.

    Returns:
        The results, as written.

    Raises:
        InputError: an unknown section, no seed, bad data, or a projector of another making in `folder`.
    """
    folder = Path(folder)
    check_request(sections, seeds)
    records = make_reader(config.data.reader).load_split(
        config.data.root, split, boxes=True, limit_images=config.data.limit_eval_images, strict=config.data.strict
    )
    check_described(records)
    store.check_records(records)
    size_thirds(named_objects(records)[0])  # data without a box is refused before anything is trained
    tokens_per_image = store.record_inputs(records[:1])["attention_mask"].shape[1]
    rows = [row for row in plan(config.merge, tokens_per_image) if row.section in sections]
    jobs: Jobs = {}
    for row in rows:
        for seed in seeds if row.trained else [0]:
            jobs.setdefault((slug(row.trained), seed), (row.trained, {}))[1][slug(row.merge)] = row.merge
    trained = sum(through is not None for through, _ in jobs.values())
    measurements = sum(len(merges) for _, merges in jobs.values())
    print0(
        f"{len(rows)} rows: {trained} projectors to train ({len(seeds)} seeds), {measurements} measurements on "
        f"{len(records):,} images of {split}, {tokens_per_image} tokens each, K = {config.merge.num_regions}; "
        f"writing to {folder}"
    )
    results = summarise(rows, _train_and_measure(config, folder, store, records, jobs), records, seeds)
    if "cost" in sections:
        results["cost"] = cost(store, records, config.merge, tokens_per_image, config.train.eval_batch_size)
    shown = ("train_batch_size", "grad_accum_steps", "learning_rate", "temperature", "num_train_epochs")
    results = {
        "version": VERSION,
        "about": {
            "data": Path(config.data.root).name,
            "split": split,
            "images": len(records),
            "captions": sum(len(record.captions) for record in records),
            "model": config.model.name,
            "tokens_per_image": tokens_per_image,
            "embedding_dim": store.embedding_dim,
            "merge": asdict(config.merge),
            "train": {name: getattr(config.train, name) for name in shown},
            "seeds": list(seeds),
        },
        **results,
    }
    write_json(folder / "results.json", results)
    return results


def _train_and_measure(
    config: Config, folder: Path, store: FeatureStore, records: Sequence[ImageRecord], jobs: Jobs
) -> dict[tuple[str, int], Measured]:
    """Values of all rows, projector by projector; what is finished in `folder` is kept."""
    started = time.monotonic()
    measured = {}
    with stoppable():
        for number, ((name, seed), (through, merges)) in enumerate(jobs.items(), 1):
            stop_here()
            print0(
                f"[{number}/{len(jobs)}] {name}, seed {seed}: {len(merges)} rows, {time.monotonic() - started:.0f} s"
            )
            place = folder / "projectors" / f"{name}-seed{seed}"
            projector = store.base_projector
            if through is not None:
                settings = replace(config.train, output_dir=str(place), run_name=place.name, seed=seed, budgets=())
                data = replace(config.data, eval_split="")  # nothing is selected on a split, so none is looked at
                train(replace(config, merge=through, train=settings, data=data))
                projector = load_projector(place, store)
            store.use_projector(projector)
            path = folder / "measured" / f"{place.name}.safetensors"
            measured[name, seed] = _measured(path, store, records, merges, config.train.eval_batch_size)
    return measured


def _measured(
    path: Path, store: Encoder, records: Sequence[ImageRecord], merges: dict[str, MergeConfig], batch_size: int
) -> Measured:
    """Values of all rows of the projector in use, from `path` if they are there, else measured and written."""
    boxes = json.dumps([[p.boxes for c in r.captions for p in c.phrases] for r in records])
    older = {
        "version": VERSION,
        "projector": store.current_projector().hash,
        "source": store.origin,
        "merges": {key: asdict(merge) for key, merge in merges.items()},
        "ids": [record.image_id for record in records],
        "texts": hashlib.sha256("\n".join(c.text for r in records for c in r.captions).encode()).hexdigest(),
        "boxes": hashlib.sha256(boxes.encode()).hexdigest(),
        "batch_size": batch_size,
    }
    contents = hashlib.sha256(repr(store.contents(records, Stamps())).encode()).hexdigest()
    stamp = {**older, "contents": contents}
    if finished_shard(path, stamp, lambda found, _: found in (stamp, older)) is None:  # earlier versions had no hash
        values = measure(store, records, merges, batch_size)
        tensors = {f"{key}/{name}": value for key, row in values.items() for name, value in row.items()}
        write_shard(path, tensors, stamp, {"rows": len(merges)})
    try:
        tensors, _ = load_shard(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(path, error, "run again") from None
    found: Measured = {key: {} for key in merges}
    for name, tensor in tensors.items():
        key, _, value = name.rpartition("/")
        found[key][value] = tensor.numpy()
    return found
