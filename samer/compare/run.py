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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from samer.compare.measure import cost, measure, tokens_of
from samer.compare.pace import Pace
from samer.compare.plan import NO_BOXES, OBJECT, Row, budgets, check_request, plan, settings_of, slug
from samer.compare.queries import CAPTIONS_ONLY, RARE, Asked, caption_positives, phrase_queries
from samer.compare.significance import significance
from samer.compare.summarise import Measured, Values, summarise
from samer.compressors import COMPRESSORS, make_compressor
from samer.config import Config, InputError, MergeConfig
from samer.data import reader_of, training_records
from samer.data.records import ImageRecord, names_boxes
from samer.data.stamps import Stamps
from samer.evaluation import check_described
from samer.features.read import FeatureStore
from samer.reducers import settings_used
from samer.report.cells import budget_words
from samer.report.gallery import Shown
from samer.retrievers.attention import NoSignals
from samer.retrievers.banks import load_bank
from samer.retrievers.base import Encoder
from samer.retrievers.projectors import load_projector
from samer.runtime.files import is_file, write_json
from samer.runtime.processes import from_first, gather_objects, print0, rank, world_size
from samer.runtime.shards import finished_shard, load_header, load_shard, unreadable, write_shard
from samer.runtime.signals import stop_here, stoppable
from samer.settings import Budget
from samer.training.loop import Shared, train

VERSION = 1
RECIPE = ("train_batch_size", "grad_accum_steps", "learning_rate", "temperature", "num_train_epochs")  # as shown

# by projector's name and seed: what it is trained through (None: untouched), and the compressions measured with it
Jobs = dict[tuple[str, int], tuple[MergeConfig | None, dict[str, MergeConfig]]]


def sweep(
    encoder: Encoder,
    records: Sequence[ImageRecord],
    shown: Sequence[Shown],
    curves: Sequence[str],
    data: str,
    batch_size: int,
    undescribed: bool = False,
) -> dict:
    """Grounding of some methods over a split, and recall of some of them at all budgets with the projectors they have.

    Args:
        encoder: its projector is replaced.
        records: of the split, with boxes.
        shown: methods with a name (", trained" at its end if so), `merge` and `projector`.
        curves: names of those whose recall is measured at all budgets.
        data: the name of it.
        batch_size: images and captions per forward pass.
        undescribed: as in `check_described`.

    Returns:
        As `compare`, with rows in the sections untouched, adapted and budgets only.
    """
    check_described(records, undescribed)
    _, tokens_per_image, _ = tokens_of(encoder, records, batch_size)
    rows, jobs = [], {}
    for method in shown:
        trained = None if method.projector.hash == encoder.base_projector.hash else method.merge
        section = "untouched" if trained is None else "adapted"
        key = method.projector.hash
        own = [Row(section, method.name.removesuffix(", trained"), method.merge, trained, key)]
        if method.name in curves:
            every = budgets(tokens_per_image, method.merge.num_regions)
            at = {budget: replace(method.merge, num_regions=budget) for budget in every}
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
    at_budgets: Sequence[Budget] = (),
    methods: Sequence[str] = (),
    banks: Mapping[str, str] | None = None,
) -> dict:
    """Trains and measures every row and writes `results.json`; finished projectors and measurements are kept.

    Args:
        config: data.root and data.features are set; `merge` gives K, `train` the recipe of every trained row.
        folder: where everything goes.
        store: data.features, opened; holds the splits trained and measured on.
        seeds: of the trained rows.
        sections: of `SECTIONS`.
        split: measured on.
        at_budgets: K, or shares, of the sections budgets and cost; empty: N/2 to N/32, shares where K is one.
        methods: compressors whose rows are wanted; empty: all.
        banks: files of banks of queries by name, of the untouched projector, for the section banks.

    Returns:
        The results, as written.

    Raises:
        InputError: an unknown section, no seed, bad data, or a projector of another making in `folder`.
    """
    folder, batch_size, banks = Path(folder), config.train.eval_batch_size, banks or {}
    check_request(sections, seeds, at_budgets, methods, banks)
    records = load_records(config, split, config.data.limit_eval_images, boxes=True)
    check_described(records, reader_of(config.data).undescribed)
    store.check_records(records)
    fewest, tokens_per_image, most = tokens_of(store, records, batch_size)
    if any(k >= most for k in at_budgets if isinstance(k, int)):
        raise InputError(f"budgets {list(at_budgets)}: an image has {most} tokens at most; give smaller ones")
    at_budgets = list(at_budgets) or budgets(tokens_per_image, config.merge.num_regions)
    planned = plan(config.merge, tokens_per_image, at_budgets, methods, list(banks))
    rows = _with_signals(store, records, _with_boxes(config, records, [r for r in planned if r.section in sections]))
    asked = _asked(config, store, records, rows, split, "phrases" in sections, banks)
    jobs = _jobs(rows, seeds)
    trained = sum(through is not None for through, _ in jobs.values())
    measurements = sum(len(merges) for _, merges in jobs.values())
    print0(
        f"{len(rows)} rows: {trained} projectors to train ({len(seeds)} seeds), {measurements} measurements on "
        f"{len(records):,} images of {split}, {tokens_per_image} tokens each, "
        f"K = {budget_words(config.merge.num_regions)}; writing to {folder}"
    )
    for line in _plan_lines(folder, jobs):
        print0(line)
    if asked.phrases:
        print0(f"asked beside the captions: {len(asked.phrases.texts):,} phrases")
    measured = _train_and_measure(config, folder, store, records, jobs, asked)
    results = summarise(rows, measured, records, seeds, asked.phrases)
    results |= significance(rows, measured, records, seeds, asked.phrases)
    if "cost" in sections:
        budgeted = [most, *at_budgets]
        # the others wait: what is timed is this machine with one process at work
        results["cost"] = from_first(lambda: cost(store, records, config.merge, budgeted, batch_size))
    about = _about(config, store, records, split, seeds, (fewest, tokens_per_image, most))
    results = {"version": VERSION, "about": {**about, **_about_queries(asked, rows)}, **results}
    if rank() == 0:
        write_json(folder / "results.json", results)
    return results


def _about(
    config: Config,
    store: FeatureStore,
    records: Sequence[ImageRecord],
    split: str,
    seeds: Sequence[int],
    tokens: tuple[int, int, int],
) -> dict:
    """What is compared; `tokens` as `tokens_of` gives them."""
    processes = {"processes": world_size()} if world_size() > 1 else {}
    return {
        "data": Path(config.data.root).name,
        "split": split,
        "images": len(records),
        "captions": sum(len(record.captions) for record in records),
        "model": config.model.name,
        "tokens_per_image": tokens[1],
        "tokens_range": [tokens[0], tokens[2]],
        "embedding_dim": store.embedding_dim,
        "merge": asdict(config.merge),
        **({} if store.reduction.method == "none" else {"reduce": settings_used(store.reduction)}),
        "train": {name: getattr(config.train, name) for name in RECIPE} | processes,
        "seeds": list(seeds),
    }


def _plan_lines(folder: Path, jobs: Jobs) -> list[str]:
    """What will be done, a line a projector."""
    lines: dict[str, list] = {}
    for (name, seed), (through, merges) in jobs.items():
        there = through is None or is_file(_places(folder, name, seed)[0] / "projector.safetensors")
        row = lines.setdefault(name, [through, len(merges), [], 0])
        row[2].append(seed)
        row[3] += not there
    return [
        f"  {name}: {f'seeds {spaced(seeds)}, {left} to train, ' if through else ''}{rows} rows measured"
        for name, (through, rows, seeds, left) in lines.items()
    ]


def spaced(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _jobs(rows: Sequence[Row], seeds: Sequence[int]) -> Jobs:
    """Rows by the projector that they are measured with."""
    jobs: Jobs = {}
    for row in rows:
        for seed in seeds if row.trained else [0]:
            jobs.setdefault((slug(row.trained), seed), (row.trained, {}))[1][row.key] = row.merge
    return jobs


def _with_boxes(config: Config, records: Sequence[ImageRecord], rows: list[Row]) -> list[Row]:
    """The rows that differ by what the data set's boxes are; a note says what can't be told without boxes."""
    if not names_boxes(records):
        print0("note: no caption names an object with a box, so nothing is said of grounding, sizes and short phrases")
    if reader_of(config.data).check(config.data.root):
        return rows
    print0(f"note: {config.data.root} has no boxes, so rows with and without object labels are one")
    return [row for row in rows if not row.name.endswith((NO_BOXES, OBJECT))]


def _with_signals(store: FeatureStore, records: Sequence[ImageRecord], rows: list[Row]) -> list[Row]:
    """The rows whose attention signals the store has; of others a note says that they are left out."""
    wanting = [row for row in rows if any(make_compressor(m).needs for m in (row.merge, row.trained) if m)]
    needs = sorted({name for row in wanting for name in make_compressor(row.merge).needs})
    try:
        store.image_states(store.record_inputs(records[:1]), needs)
    except NoSignals as error:
        left = dict.fromkeys(row.merge.compressor for row in wanting)
        print0(f"note: {', '.join(left)} left out, which need attention ({error})")
        return [row for row in rows if row not in wanting]
    return rows


def load_records(config: Config, split: str, limit: int | None, *, boxes: bool) -> list[ImageRecord]:
    """A split of the data compared on, its first `limit` images."""
    data = config.data
    return reader_of(data).load_split(data.root, split, boxes=boxes, limit_images=limit, strict=data.strict)


def _asked(
    config: Config,
    store: FeatureStore,
    records: Sequence[ImageRecord],
    rows: Sequence[Row],
    split: str,
    phrases: bool,
    banks: Mapping[str, str],
) -> Asked:
    """What is asked beside the captions of the split measured; all of it is looked for before anything is trained.

    Raises:
        InputError: phrases or a bank that are not stored, a bank of captions of the images measured, or one of another
            model or projector.
    """
    positives = caption_positives(records, reader_of(config.data).relevant(config.data.root))
    queries = phrase_queries(records) if phrases else None
    if queries and (missing := store.lacking(queries.texts)):
        raise InputError(
            f"{store.folder}: no features of {len(missing):,} of {len(queries.texts):,} phrases of {split}; run "
            "features with --phrases for that split, or name the --sections without phrases"
        )
    bank: tuple[str, ...] = ()
    if any(COMPRESSORS[row.merge.compressor].needs_queries for row in rows):
        train_split = config.data.train_split
        bank_records = training_records(config.data, boxes=False)
        if {record.image_id for record in bank_records} & {record.image_id for record in records}:
            raise InputError(f"splits {train_split} and {split} share images, and a bank of queries must not know them")
        bank = tuple(dict.fromkeys(caption.text for record in bank_records for caption in record.captions))
        if missing := store.lacking(bank):
            raise InputError(
                f"{store.folder}: no features of {len(missing):,} of {len(bank):,} captions of {train_split}, of which "
                "the bank of queries is made; run features for that split"
            )
    given = {name: load_bank(file, store) for name, file in banks.items()}
    return Asked(positives, queries, bank, {row.key: given[row.bank] for row in rows if row.bank})


def _about_queries(asked: Asked, rows: Sequence[Row]) -> dict:
    """How many phrases are asked and how ambiguous they are; captions that other images satisfy, too; banks given."""
    about: dict = {}
    if asked.banks:
        about["banks"] = {row.name: asked.banks[row.key].describe() for row in rows if row.bank}
    if asked.positives is not None:
        others = (asked.positives > 0).sum(1) - 1
        about["relevant"] = {"captions": int((others > 0).sum()), "others": int(others.sum())}
        if asked.positives.dtype != torch.bool:
            about["relevant"]["grades"] = int(asked.positives.max())
    if asked.phrases is not None:
        held = asked.phrases.held_by
        about["phrases"] = {
            "count": len(held),
            "of_one_image": int((held == 1).sum()),
            "rare": int((held <= RARE).sum()),
            "rare_images": RARE,
            "most_images": int(held.max()),
        }
    return about


def _train_and_measure(
    config: Config, folder: Path, store: FeatureStore, records: Sequence[ImageRecord], jobs: Jobs, asked: Asked
) -> Measured:
    """Values of all rows, projector by projector; what is finished in `folder` is kept."""
    pace, measured = _pace(folder, jobs, [record.image_id for record in records], asked), {}
    shared: Shared | None = None
    with stoppable():
        for number, ((name, seed), (through, merges)) in enumerate(jobs.items(), 1):
            stop_here()
            print0(f"[{number}/{len(jobs)}] {name}, seed {seed}: {len(merges)} rows, {pace}")
            place, path = _places(folder, name, seed)
            projector = store.base_projector
            if through is not None:
                settings = replace(config.train, output_dir=str(place), run_name=place.name, seed=seed, budgets=())
                data = replace(config.data, eval_split="")  # nothing is selected on a split, so none is looked at
                one = replace(config, merge=through, train=settings, data=data)
                if shared is None and pace.left["trainings"]:
                    shared = _shared(config, store)
                with pace.timed("trainings", (name, seed)):
                    train(one, shared, pace.expect)
                gather_objects(None)  # nobody reads it before it is there
                projector = load_projector(place, store)
            store.use_projector(projector)
            with pace.timed("measurements", (name, seed)):
                measured[name, seed] = _measured(path, store, records, merges, config.train.eval_batch_size, asked)
    return measured


def _shared(config: Config, store: FeatureStore) -> Shared:
    """What every training reads, opened and looked at once."""
    records = training_records(config.data, boxes=True)
    store.check_records(records)
    return Shared(store, records)


def _places(folder: Path, name: str, seed: int) -> tuple[Path, Path]:
    """Where a projector and what is measured with it are kept."""
    return folder / "projectors" / f"{name}-seed{seed}", folder / "measured" / f"{name}-seed{seed}.safetensors"


def _pace(folder: Path, jobs: Jobs, ids: list[str], asked: Asked) -> Pace:
    """What of the jobs is not in `folder` yet, or was measured of other images, rows or queries."""
    trainings, measurements = {}, {}
    for (name, seed), (through, merges) in jobs.items():
        place, path = _places(folder, name, seed)
        if through is not None and not is_file(place / "projector.safetensors"):
            trainings[name, seed] = 1
        wanted = {"ids": ids, "merges": {key: settings_of(merge) for key, merge in merges.items()}}
        wanted |= asked.stamp(merges)
        try:
            held = load_header(path)["stamp"] if is_file(path) else {}
        except (OSError, SafetensorError, ValueError, KeyError):
            held = {}
        if any(held.get(key) != wanted.get(key) for key in ("ids", "merges", "phrases", "relevant", "bank", "banks")):
            measurements[name, seed] = len(merges)
    return Pace(trainings, measurements)


def _measured(
    path: Path,
    store: Encoder,
    records: Sequence[ImageRecord],
    merges: dict[str, MergeConfig],
    batch_size: int,
    asked: Asked = CAPTIONS_ONLY,
) -> dict[str, Values]:
    """Values of all rows of the projector in use, from `path` if they are there, else measured and written."""
    held = [[p.boxes for c in r.captions for p in c.phrases] + [things.boxes for things in r.things] for r in records]
    boxes = json.dumps(held)
    older = {
        "version": VERSION,
        "projector": store.current_projector().hash,
        "source": store.origin,
        "merges": {key: settings_of(merge) for key, merge in merges.items()},
        "ids": [record.image_id for record in records],
        "texts": hashlib.sha256("\n".join(c.text for r in records for c in r.captions).encode()).hexdigest(),
        "boxes": hashlib.sha256(boxes.encode()).hexdigest(),
        "batch_size": batch_size,
        **asked.stamp(merges),
    }
    contents = hashlib.sha256(repr(store.contents(records, Stamps())).encode()).hexdigest()
    stamp = {**older, "contents": contents}
    # earlier versions had no hash
    there = from_first(lambda: finished_shard(path, stamp, lambda found, _: found in (stamp, older)) is not None)
    if not there:
        values = measure(store, records, merges, batch_size, asked)
        tensors = {f"{key}/{name}": value for key, row in values.items() for name, value in row.items()}
        if rank() == 0:
            write_shard(path, tensors, stamp, {"rows": len(merges)})
        gather_objects(None)  # nobody reads it before it is there
    try:
        tensors, _ = load_shard(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(path, error, "run again") from None
    found: dict[str, Values] = {key: {} for key in merges}
    for name, tensor in tensors.items():
        key, _, value = name.rpartition("/")
        found[key][value] = tensor.numpy()
    return found
