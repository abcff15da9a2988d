"""What a training takes, compared: captions chosen by CPI, by score or by lot, and midpoint mixup.

    DIR/settings.json                           of the study; another one is refused
    DIR/scores/                                 of all captions (samer/selection/cpi.py)
    DIR/captions/<rule>.jsonl                   what each rule keeps; by lot, one per seed
    DIR/runs/<arm>-seed<s>/                     trained projectors
    DIR/foils/                                  hidden states of captions with a phrase of another image
    DIR/measured/<arm>-seed<s>.safetensors      per-query values
    DIR/results.json, results.md                of the seeds that all arms have finished

All arms train with one recipe and as many steps, but for rounding: half of the captions, twice the epochs. What is
finished is kept. Beside retrieval, foils are asked (`samer.compare.foils`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from samer.compare.foils import RETRIEVAL, VERSION, Asked, foils, measure
from samer.compare.pace import Pace
from samer.compare.run import load_records
from samer.compare.summarise import tested
from samer.compressors import make_compressor
from samer.config import Config, InputError, MergeConfig
from samer.data import training_records
from samer.metrics import bootstrap_intervals
from samer.retrievers.base import Encoder
from samer.retrievers.projectors import load_projector
from samer.runtime.files import is_file, read_json, write_json
from samer.runtime.processes import print0
from samer.runtime.shards import finished_shard, read_finished, write_shard
from samer.runtime.signals import stop_here, stoppable
from samer.selection.choose import check_choice, choose, write_chosen
from samer.selection.cpi import Scored, score_captions
from samer.selection.phrases import TYPES, WORD
from samer.training.loop import train


@dataclass(frozen=True)
class Arm:
    """What one projector is trained on; `rule` of `samer.selection.choose`, empty: all captions."""

    name: str
    rule: str = ""
    mixup: str = "none"
    trained: bool = True


ARMS = (
    Arm("untouched", trained=False),
    Arm("all"),
    Arm("random", "random"),
    Arm("alignment", "alignment"),
    Arm("cpi", "cpi"),
    Arm("all, mixup", mixup="midpoint"),
)
PAIRS = (  # (arm, arm that it is held against)
    ("cpi", "random"),
    ("cpi", "alignment"),
    ("alignment", "random"),
    ("cpi", "all"),
    ("random", "all"),
    ("all, mixup", "all"),
    ("all", "untouched"),
)


@dataclass(frozen=True)
class Settings:
    """Of a study: which captions are kept, and how they are scored."""

    share: float = 0.5
    drop: float = 0.1
    replacements: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("cpi", self.share, self.drop)


def study(
    config: Config,
    folder: str | Path,
    images: Encoder,
    texts: Encoder,
    *,
    settings: Settings,
    seeds: Sequence[int],
    split: str,
) -> dict:
    """Scores, chooses, trains and measures what is not there yet; writes results after every seed.

    Args:
        config: data.root and data.features are set; `merge` and `train` are those of every arm.
        folder: where everything goes.
        images: of data.features.
        texts: the retriever, for texts that no store holds.
        settings: of the choices.
        seeds: of the trainings, and of the choice by lot.
        split: measured on.

    Returns:
        The results, as written.

    Raises:
        InputError: bad data, no seed, or a folder that holds a study with other settings.
        Stopped: SIGTERM came; run again to go on.
    """
    folder, batch_size = Path(folder), config.train.eval_batch_size
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise InputError(f"seeds {list(seeds)}: give at least one, each once, none below 0")
    if make_compressor(config.merge).needs_queries:
        raise InputError(f"merge.compressor={config.merge.compressor} needs a bank of queries; take another here")
    _keep_settings(folder / "settings.json", config, settings, split)
    records = load_records(config, split, config.data.limit_eval_images, boxes=False)
    pool = training_records(replace(config.data, captions=""), boxes=False)
    images.check_records([*records, *pool])
    how = {"replacements": settings.replacements, "seed": settings.seed, "batch_size": batch_size}
    scored = score_captions(images, texts, pool, folder / "scores", **how)
    with stoppable():
        asked = Asked(records, foils(records, settings.seed), folder / "foils", texts, batch_size)
    arms = [arm for arm in ARMS if arm.trained]
    left = [(arm.name, seed) for seed in seeds for arm in arms if not is_file(_run(folder, arm, seed) / "history.json")]
    pace = Pace(dict.fromkeys(left, 1), {})
    results: dict = {}
    with stoppable():
        for done, seed in enumerate(seeds, start=1):
            for arm in ARMS:
                stop_here()
                print0(f"seed {seed}, {arm.name}: {pace}")
                if arm.trained:
                    with pace.timed("trainings", (arm.name, seed)):
                        train(_training(config, folder, arm, seed, scored, settings))
                _measured(folder, images, asked, config.merge, arm, seed)
            results = _summary(config, folder, asked, images, scored, settings, list(seeds[:done]), split)
            write_json(folder / "results.json", results)
    return results


def _keep_settings(path: Path, config: Config, settings: Settings, split: str) -> None:
    data = {name: getattr(config.data, name) for name in ("root", "name", "features", "train_split")}
    limits = [config.data.limit_train_images, config.data.limit_eval_images]
    now = {**asdict(settings), **data, "limits": limits, "model": config.model.name, "measured on": split}
    if is_file(path):
        before = read_json(path)
        for key, value in now.items():
            if before.get(key) != value:
                raise InputError(
                    f"{path}: this study has {key} {before.get(key)!r}, now {value!r}; name another folder, or remove "
                    "this one"
                )
    write_json(path, now)


def _run(folder: Path, arm: Arm, seed: int) -> Path:
    return folder / "runs" / f"{_slug(arm)}-seed{seed}"


def _slug(arm: Arm) -> str:
    return arm.name.replace(", ", "-")


def _training(
    config: Config, folder: Path, arm: Arm, seed: int, scored: Sequence[Scored], settings: Settings
) -> Config:
    """An arm's training; writes the file of its captions."""
    data, epochs = replace(config.data, eval_split="", captions=""), config.train.num_train_epochs
    if arm.rule:
        name = f"{arm.rule}-{seed}" if arm.rule == "random" else arm.rule
        path = folder / "captions" / f"{name}.jsonl"
        write_chosen(path, choose(scored, arm.rule, share=settings.share, drop=settings.drop, seed=seed))
        data, epochs = replace(data, captions=str(path)), epochs / settings.share
    place = _run(folder, arm, seed)
    own = {"output_dir": str(place), "run_name": place.name, "seed": seed, "mixup": arm.mixup}
    return replace(config, data=data, train=replace(config.train, num_train_epochs=epochs, budgets=(), **own))


def _measured(folder: Path, images: Encoder, asked: Asked, merge: MergeConfig, arm: Arm, seed: int) -> dict:
    """Values of an arm by what was measured, from its file where they are there."""
    projector = load_projector(_run(folder, arm, seed), images) if arm.trained else images.base_projector
    images.use_projector(projector)
    path = folder / "measured" / f"{_slug(arm)}-seed{seed if arm.trained else 0}.safetensors"
    stamp = {**asked.stamp, "projector": projector.hash, "merge": json.loads(json.dumps(asdict(merge)))}
    if finished_shard(path, stamp) is None:
        write_shard(path, measure(images, asked, merge), stamp, {"queries": len(asked.owner)})
    return {name: tensor.numpy() for name, tensor in read_finished(path).items()}


# --- results --------------------------------------------------------------------------------------------------------


def _summary(
    config: Config,
    folder: Path,
    asked: Asked,
    images: Encoder,
    scored: Sequence[Scored],
    settings: Settings,
    seeds: list[int],
    split: str,
) -> dict:
    runs = {
        arm.name: [_measured(folder, images, asked, config.merge, arm, s) for s in (seeds if arm.trained else [0])]
        for arm in ARMS
    }
    recipe = {name: getattr(config.train, name) for name in ("train_batch_size", "learning_rate", "num_train_epochs")}
    about = {
        "data": Path(config.data.root).name,
        "trained on": config.data.train_split,
        "measured on": split,
        "images": len(asked.records),
        "captions": len(asked.owner),
        "foils": {kind: sum(foil.type == kind for foil in asked.foils) for kind in TYPES},
        "merge": asdict(config.merge),
        "train": recipe,
        "choices": asdict(settings),
        "seeds": seeds,
    }
    return {
        "version": VERSION,
        "about": about,
        "choices": choices(scored, settings, seeds),
        **compared(runs, asked),
    }


def compared(runs: dict[str, list[dict[str, np.ndarray]]], asked: Asked) -> dict:
    """Rows and paired differences of arms, each with what was measured of every seed."""
    groups = dict.fromkeys(RETRIEVAL, asked.owner) | {"back:r@1": np.arange(len(asked.records))}
    for kind in TYPES:
        groups[f"foil:{kind}"] = np.array([foil.image for foil in asked.foils if foil.type == kind], dtype=int)
    groups = {name: owner for name, owner in groups.items() if len(owner)}
    means = {arm: {name: np.mean([run[name] for run in own], axis=0) for name in groups} for arm, own in runs.items()}
    seeds = {arm: {name: [float(run[name].mean()) for run in own] for name in groups} for arm, own in runs.items()}
    rows = []
    for arm, values in means.items():
        row: dict = {"name": arm}
        for name, owner in groups.items():
            low, high = bootstrap_intervals({name: values[name]}, groups=owner)[name]
            shown = {"value": round(float(values[name].mean()), 4), "interval": [round(low, 4), round(high, 4)]}
            row[name] = {**shown, "seeds": [round(value, 4) for value in seeds[arm][name]]}
        for name in ("alignment", "uniformity"):
            row[name] = round(float(np.mean([run[name] for run in runs[arm]])), 4)
        rows.append(row)
    differences: list[dict] = [{"of": of, "minus": minus} for of, minus in PAIRS]
    for name, owner in groups.items():
        each = np.stack([means[of][name] - means[minus][name] for of, minus in PAIRS], axis=1)
        for entry, (of, minus), test in zip(differences, PAIRS, tested(each, owner)):
            both = (seeds[arm][name] for arm in (of, minus))
            count = max(len(seeds[of][name]), len(seeds[minus][name]))
            own, other = (values * (count // len(values)) for values in both)
            entry[name] = {**test, "seeds": [round(a - b, 4) for a, b in zip(own, other)]}
    return {"rows": rows, "differences": differences}


def choices(scored: Sequence[Scored], settings: Settings, seeds: Sequence[int]) -> dict:
    """What the rules keep: how many, of how many images, how long, how they score, and how much they share."""
    kept = {
        rule: choose(scored, rule, share=settings.share, drop=settings.drop, seed=seeds[0])
        for rule in ("random", "alignment", "cpi")
    }
    rows = {
        name: {
            "captions": len(own),
            "images": len({each.image_id for each in own}),
            "words": round(float(np.mean([len(WORD.findall(each.text)) for each in own])), 3),
            "score": round(float(np.mean([each.score for each in own])), 4),
            **{name: _mean_drop(own, name) for name in TYPES},
        }
        for name, own in {"all": list(scored), **kept}.items()
    }
    chosen = {name: {(each.image_id, each.text) for each in own} for name, own in kept.items()}
    known = [each for each in scored if each.cpi is not None]
    ranks = [np.argsort(np.argsort(values)) for values in ([e.cpi for e in known], [e.score for e in known])]
    return {
        "rules": rows,
        "without phrases": len(scored) - len(known),
        "shared by cpi and alignment": round(len(chosen["cpi"] & chosen["alignment"]) / len(chosen["cpi"]), 4),
        "rank correlation of cpi and score": round(float(np.corrcoef(*ranks)[0, 1]), 4),
    }


def _mean_drop(scored: Sequence[Scored], kind: str) -> float | None:
    held = [each.drops[kind] for each in scored if each.drops[kind] is not None]
    return round(float(np.mean(held)), 4) if held else None
