"""Every compressor at the same budget and with the same training: what is run, kept, and measured.

    DIR/features/                          frozen hidden states of train and test, if no store is given
    DIR/projectors/<name>-seed<s>/         one per compressor setting and seed (samer/training.py)
    DIR/measured/<name>-seed<s>.safetensors    per-query, per-phrase and per-image values of all rows of one projector
    DIR/results.json, results.md, *.png, *.svg (samer/tables.py)

Each image is encoded once per projector and shared by all compressors measured with it (a codebook is fitted on up to
256 images before); what is finished is kept. The rows of one projector are measured together, so another set of rows
measures that projector's anew. One process: a trained row's batch is train_batch_size x grad_accum_steps.

Shape letters: Q queries (captions), I images, P phrases, N tokens, K budget, D embedding.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from samer import flickr
from samer.colpali import Encoder, load_projector
from samer.compressors import COMPRESSORS, make_compressor
from samer.config import Config, InputError, MergeConfig
from samer.evaluation import encode_texts, fitted_compressor, join_queries
from samer.features import FeatureStore
from samer.grounding import HIT_IOU, PhraseIndex, ground, size_thirds
from samer.metrics import bootstrap_intervals, query_metrics
from samer.objects import instance_labels, object_diagnostics
from samer.report import Shown
from samer.runtime import Progress, print0, stop_here, stoppable, write_json
from samer.scoring import maxsim
from samer.shards import finished_shard, load_shard, write_shard
from samer.train_data import batched
from samer.training import train

VERSION = 1
SHARES = (2, 4, 8, 16, 32)  # budgets are N / share
SECTIONS = ("untouched", "adapted", "budgets", "components", "crossed", "cost")
HARD = 1e-4  # a temperature at which the soft assignment is all but hard
CENTRES = ("raster", "farthest")
MEASURED = ("box_mass", "iou", "mixed_clusters", "purity", "vectors")  # per phrase or image
METRICS = ("r@1", "r@5", "r@10", "ndcg@10")


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a compression, and what the projector was trained through (None: untouched)."""

    section: str
    name: str
    merge: MergeConfig
    trained: MergeConfig | None = None
    projector: str = ""  # its name among the measurements; empty: that of `trained`

    @property
    def measured_with(self) -> str:
        return self.projector or slug(self.trained)


def budgets(tokens_per_image: int) -> list[int]:
    """N / 2 to N / 32, each once, largest first."""
    return list(dict.fromkeys(max(1, tokens_per_image // share) for share in SHARES))


def variants(base: MergeConfig) -> dict[str, MergeConfig]:
    """Every registered compressor at `base`'s budget; SaMer with both kinds of centres."""
    every = {}
    for name in COMPRESSORS:
        if name == "samer":
            every |= {f"samer, {init}": replace(base, compressor=name, center_init=init) for init in CENTRES}
        else:
            every[name] = replace(base, compressor=name)
    return every


def plan(base: MergeConfig, tokens_per_image: int) -> list[Row]:
    """The rows of the published tables and figures, and the crossings that take the gain apart.

    Args:
        base: the budget K of the tables, and SaMer's settings.
        tokens_per_image: N, of which the budgets are shares.
    """
    every = variants(base)
    samer = {init: every[f"samer, {init}"] for init in CENTRES}
    rows = [Row("untouched", name, merge) for name, merge in every.items()]
    rows += [Row("adapted", name, merge, merge) for name, merge in every.items()]
    for budget in budgets(tokens_per_image):
        at = {name: replace(merge, num_regions=budget) for name, merge in every.items() if name != "none"}
        rows += [Row("budgets", f"{name} @ {budget}", merge) for name, merge in at.items()]
        trained = [at[f"samer, {init}"] for init in CENTRES]
        rows += [Row("budgets", f"samer, {m.center_init}, trained @ {budget}", m, m) for m in trained]
    for init, full in samer.items():
        spatial = replace(full, object_penalty=0.0)
        feature = replace(spatial, spatial_weight=0.0)
        parts = (("feature", feature), ("feature + spatial", spatial), ("feature + spatial + object", full))
        rows += [Row("components", f"{init}: {name}", merge, merge) for name, merge in parts]
    hard = {init: replace(merge, assignment_temperature=HARD) for init, merge in samer.items()}
    for init, merge in samer.items():
        rows.append(Row("crossed", f"untouched, samer, {init}, hard assignment", hard[init]))
        rows.append(Row("crossed", f"trained with all tokens, samer, {init}", merge, every["none"]))
        through = f"trained through samer, {init}"
        rows.append(Row("crossed", f"{through}, all tokens", every["none"], merge))
        rows.append(Row("crossed", f"{through}, hpool", every["hpool"], merge))
        rows.append(Row("crossed", f"{through}, hard assignment", hard[init], merge))
    rows.append(Row("crossed", "trained with all tokens, hpool", every["hpool"], every["none"]))
    return rows


def sweep(
    encoder: Encoder,
    records: Sequence[flickr.ImageRecord],
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
    tokens_per_image = encoder.record_inputs(records[:1])["input_ids"].shape[1]
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


def shown_methods(
    base: MergeConfig, folder: str | Path, store: Encoder, sections: Sequence[str], seed: int
) -> tuple[list[Shown], list[Shown]]:
    """What a comparison's report shows: the methods of its gallery, the baseline first, and those with regions.

    Args:
        base, folder, sections: as in `compare`.
        store: gives the untouched projector.
        seed: whose trained projectors are taken.
    """
    every = variants(base)
    plain = store.base_projector
    named = {"all tokens": "none", "H-Pool": "hpool", "SAP-mean": "sap-mean", "HPC": "hpc"}
    methods = [Shown(name, every[key], plain) for name, key in named.items()]
    methods.append(Shown("SaMer, farthest", every["samer, farthest"], plain))
    regions = []
    for init in CENTRES:
        merge = every[f"samer, {init}"]
        regions.append(Shown(f"{init}, untouched", merge, plain))
        if "adapted" in sections:
            projector = load_projector(Path(folder) / "projectors" / f"{slug(merge)}-seed{seed}", store)
            methods.append(Shown(f"SaMer, {init}, trained", merge, projector))
            regions.append(Shown(f"{init}, trained", merge, projector))
    return methods, regions


def slug(merge: MergeConfig | None) -> str:
    """A folder name for what a projector was trained through."""
    if merge is None:
        return "untouched"
    digest = hashlib.sha256(json.dumps(asdict(merge), sort_keys=True).encode()).hexdigest()[:8]
    centres = f"-{merge.center_init}" if merge.compressor == "samer" else ""
    return f"{merge.compressor}{centres}-{merge.num_regions}-{digest}"


def check_request(sections: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuses an unknown section, none at all, no seed or one given twice; before anything long is done."""
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown or not sections:
        raise InputError(f"sections {', '.join(unknown) or '(none given)'}: use some of {', '.join(SECTIONS)}")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise InputError(f"seeds {list(seeds)}: give at least one, each once, none below 0")


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
    records = flickr.load_split(config.data.root, split, boxes=True, limit_images=config.data.limit_eval_images)
    size_thirds(_named_objects(records)[0])  # data without a box is refused before anything is trained
    tokens_per_image = store.record_inputs(records[:1])["input_ids"].shape[1]
    rows = [row for row in plan(config.merge, tokens_per_image) if row.section in sections]
    jobs: dict[tuple[str, int], tuple[MergeConfig | None, dict[str, MergeConfig]]] = {}
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
    started = time.monotonic()
    measured: dict[tuple[str, int], dict[str, dict[str, np.ndarray]]] = {}
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
    results = summarise(rows, measured, records, seeds)
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


def _measured(
    path: Path, store: Encoder, records: Sequence[flickr.ImageRecord], merges: dict[str, MergeConfig], batch_size: int
) -> dict[str, dict[str, np.ndarray]]:
    """Values of all rows of the projector in use, from `path` if they are there, else measured and written."""
    boxes = json.dumps([[p.boxes for c in r.captions for p in c.phrases] for r in records])
    stamp = {
        "version": VERSION,
        "projector": store.current_projector().hash,
        "source": store.source,
        "merges": {key: asdict(merge) for key, merge in merges.items()},
        "ids": [record.image_id for record in records],
        "texts": hashlib.sha256("\n".join(c.text for r in records for c in r.captions).encode()).hexdigest(),
        "boxes": hashlib.sha256(boxes.encode()).hexdigest(),
        "batch_size": batch_size,
    }
    if finished_shard(path, stamp) is None:
        values = measure(store, records, merges, batch_size)
        tensors = {f"{key}/{name}": value for key, row in values.items() for name, value in row.items()}
        write_shard(path, tensors, stamp, {"rows": len(merges)})
    try:
        tensors, _ = load_shard(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path}: not readable ({str(error)[:120]}); remove it and run again") from None
    found: dict[str, dict[str, np.ndarray]] = {key: {} for key in merges}
    for name, tensor in tensors.items():
        key, _, value = name.rpartition("/")
        found[key][value] = tensor.numpy()
    return found


@torch.no_grad()
def measure(
    encoder: Encoder, records: Sequence[flickr.ImageRecord], merges: dict[str, MergeConfig], batch_size: int
) -> dict[str, dict[str, Tensor]]:
    """Retrieval, grounding and size of several compressions of one split with the encoder's projector.

    Args:
        encoder: images are encoded once, whatever the number of compressions.
        records: of the split, with boxes; compression does not see them.
        merges: key -> settings.
        batch_size: images, and captions, at a time.

    Returns:
        Per key: `r@1 r@5 r@10 ndcg@10` (Q,) text to image and `back:r@1` (I,) image to text, in percent; `box_mass`,
        `iou` (P,); `osr` (Q,); `vectors` (I,); `mixed_clusters`, `purity` (I,), NaN where an image has no box.
    """
    texts = [caption.text for record in records for caption in record.captions]
    owner = torch.tensor([k for k, record in enumerate(records) for _ in record.captions])
    queries = list(encode_texts(encoder, texts, batch_size))
    joined = join_queries(queries)
    flat = [tokens[mask] for query in queries for tokens, mask in zip(query.tokens, query.mask)]
    index = PhraseIndex(records, queries, encoder.grid)
    compressors = {key: fitted_compressor(encoder, records, merge, batch_size) for key, merge in merges.items()}
    everything = make_compressor(MergeConfig(compressor="none"))
    needs = sorted({name for compressor in compressors.values() for name in compressor.needs})
    scores = {key: torch.empty(len(texts), len(records)) for key in merges}
    kept: dict[str, dict[str, list[Tensor]]] = {key: {} for key in merges}
    whole: list[Tensor] = []
    for images in Progress(list(batched(range(len(records)), batch_size)), "measure", unit="batches", leave=False):
        batch = records[images.start : images.stop]
        visual = encoder.encode_images(encoder.record_inputs(batch), needs)
        own = index.own_tokens(images, flat)
        labels = _image_labels(batch, visual.coords)
        boxed = (labels > 0).any(1)
        whole.append(ground(everything(visual), own, index, visual.patches)["match"].cpu())
        for key, compressor in compressors.items():
            merged = compressor(visual)
            found_scores = maxsim(joined.tokens, merged.tokens, joined.mask, merged.mask)
            scores[key][:, images.start : images.stop] = found_scores.cpu()
            found = ground(merged, own, index, visual.patches)
            mixing = object_diagnostics(merged, labels.to(merged.assignments.device))
            for name in ("mixed_clusters", "purity"):
                found[name] = mixing[name].cpu().masked_fill(~boxed, float("nan"))
            found["vectors"] = merged.mask.sum(1)
            for name in (*MEASURED, "match"):
                kept[key].setdefault(name, []).append(found[name].cpu())
    result = {}
    positives = owner[:, None] == torch.arange(len(records))
    for key, parts in kept.items():
        values = {name: torch.cat(part) for name, part in parts.items() if name in MEASURED}
        forward, backward = query_metrics(scores[key], positives), query_metrics(scores[key].T, positives.T)
        values |= {name: torch.from_numpy(forward[name]) for name in METRICS}
        values["back:r@1"] = torch.from_numpy(backward["r@1"])
        values["osr"] = torch.cat(parts["match"]) / torch.cat(whole)
        result[key] = {name: value.float() for name, value in values.items()}
    return result


def _image_labels(records: Sequence[flickr.ImageRecord], coords: Tensor) -> Tensor:
    """Instance labels (B, N) from all boxes that any caption of an image names, each chain once."""
    boxes = []
    for record in records:
        chains = {
            phrase.chain_id: phrase.boxes for caption in record.captions for phrase in caption.phrases if phrase.boxes
        }
        boxes.append(torch.tensor([box for chain in chains.values() for box in chain]).reshape(-1, 4))
    return instance_labels(coords.cpu(), boxes, min_area=0.0, max_phrases=10_000)


def summarise(
    rows: Sequence[Row],
    measured: dict[tuple[str, int], dict[str, dict[str, np.ndarray]]],
    records: Sequence[flickr.ImageRecord],
    seeds: Sequence[int],
) -> dict:
    """Means, spreads over seeds, intervals over images, and paired differences, from per-query values."""
    owner = np.array([k for k, record in enumerate(records) for _ in record.captions])
    smallest, count = _named_objects(records)
    edges, part = size_thirds(smallest)
    table, per_query = [], {}
    for row in rows:
        runs = [measured[row.measured_with, seed][slug(row.merge)] for seed in (seeds if row.trained else [0])]
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
            "spread": round(statistics.stdev(by_seed), 4) if len(by_seed) > 1 else None,
        }
        for name in (*METRICS[1:], "back:r@1"):
            entry[name] = _mean([run[name].mean() for run in runs])
        for name in ("box_mass", "iou", "osr", "mixed_clusters", "purity"):
            entry[name] = _mean([100 * np.nanmean(run[name]) for run in runs])
        entry["region_hit"] = _mean([100 * (run["iou"] >= HIT_IOU).mean() for run in runs])
        entry["r@1_by_size"] = [_mean([r1[part == k].mean()]) if (part == k).any() else None for k in range(3)]
        table.append(entry)
    intervals = _intervals({key: runs.mean(0) for key, runs in per_query.items()}, owner)
    for entry in table:
        entry["interval"] = intervals[entry["section"], entry["name"]]
    differences = _differences(per_query, owner, part, count)
    sizes = {"edges": [round(edge, 6) for edge in edges], "captions": [int((part == k).sum()) for k in range(3)]}
    return {"sizes": sizes, "rows": table, "differences": differences}


def _named_objects(records: Sequence[flickr.ImageRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Per caption: area of the smallest box it names (NaN if none), and how many boxed phrases it has."""
    smallest, count = [], []
    for caption in (caption for record in records for caption in record.captions):
        boxes = [box for phrase in caption.phrases for box in phrase.boxes]
        smallest.append(min(((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes), default=float("nan")))
        count.append(sum(bool(phrase.boxes) for phrase in caption.phrases))
    return np.array(smallest), np.array(count)


def _pairs(rows: dict[tuple[str, str], np.ndarray]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
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


def _differences(
    rows: dict[tuple[str, str], np.ndarray], owner: np.ndarray, part: np.ndarray, count: np.ndarray
) -> list[dict]:
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
        some = {pair: value[chosen] for pair, value in values.items()}
        intervals = _intervals(some, owner[chosen])
        return {pair: {"r@1": _mean([some[pair].mean()]), "interval": intervals[pair]} for pair in pairs}

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


def _mean(values: Sequence[float]) -> float | None:
    mean = float(np.mean(values))
    return round(mean, 4) if np.isfinite(mean) else None


@torch.no_grad()
def cost(
    store: Encoder, records: Sequence[flickr.ImageRecord], merge: MergeConfig, tokens_per_image: int, batch_size: int
) -> dict:
    """Storage, MaxSim operations and measured queries per second, of all tokens and of each budget.

    Operations are 2 * D * sum(M) * sum(vectors), as published. Speed: every image of the split against 256 queries,
    float32, on this machine's device; median of 5 passes.
    """
    store.use_projector(store.base_projector)
    texts = [caption.text for record in records for caption in record.captions]
    queries = list(encode_texts(store, texts, batch_size))
    query_tokens = sum(int(query.mask.sum()) for query in queries)
    visual = [store.encode_images(store.record_inputs(batch)) for batch in batched(records, batch_size)]
    some = next(encode_texts(store, texts[:256], 256))
    all_budgets = [tokens_per_image, *budgets(tokens_per_image)]
    images, times = [], [[] for _ in all_budgets]
    for budget in all_budgets:
        compressor = make_compressor(replace(merge, compressor="samer", num_regions=budget))
        kept = [(merged.tokens, merged.mask) for merged in map(compressor, visual)]  # not the weights, N x K each
        images.append(tuple(map(torch.cat, zip(*kept))))
    for _ in range(6):  # in turn, so that a noisy moment hits all of them; the first round warms up
        for (tokens, mask), seconds in zip(images, times):
            started = time.perf_counter()
            maxsim(some.tokens, tokens, some.mask, mask)[0, 0].item()  # the item waits for a GPU
            seconds.append(time.perf_counter() - started)
    rows = [
        {
            "budget": budget,
            "gb_per_million_images": round(int(mask.sum()) / len(records) * store.embedding_dim * 2 / 1e3, 4),
            "operations": 2 * store.embedding_dim * query_tokens * int(mask.sum()),
            "queries_per_second": round(len(some.tokens) / statistics.median(seconds[1:]), 1),
        }
        for budget, (_, mask), seconds in zip(all_budgets, images, times)
    ]
    return {"images": len(records), "queries": len(texts), "rows": rows}
