"""Settings: dataclasses <- YAML <- dotted overrides; unknown keys and wrong types are refused by name."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from samer.settings import (
    Budget,
    InputError,
    as_budget,
    build_dataclass,
    kinds_of,
    load_yaml,
    parse_yaml,
    require,
    settle,
)

MIXUPS = ("none", "midpoint")  # of train.mixup


@dataclass(frozen=True)
class MergeConfig:
    """How images are compressed: the merge of METHOD sections 2-3, or another compressor at the same budget.

    Attributes:
        num_regions: K, the budget of vectors per image; or "1/16": a 16th of its N tokens, rounded up.
        cluster_iters: T, clustering iterations.
        spatial_weight: gamma, weight of the squared distance in the unit square.
        assignment_temperature: tau_a of the soft assignment.
        object_penalty: eta, weight of the instance inconsistency (training with labels only).
        center_init: "raster" (published) or "farthest".
        compressor: a name in `samer.compressors.COMPRESSORS`; all but "samer" take `num_regions` and what names them.
        global_view: where a retriever sees a page in tiles and once as a whole, "joined" merges the tokens of both with
            each other, "apart" puts no token of the one into a region of the other ("samer" only).
        bank_size: R, the most query tokens in a bank ("querybank" only).
        sap_layers: first and last layer whose attention is averaged, such as "11-14" ("sap-mean", "sap-max" only);
            empty: the middle ones. From 0 on, of those that see the whole picture where others see a window of it;
            scripts/layers.py finds those of SAP's second version.

    Raises:
        InputError: a value outside its range.
    """

    num_regions: Budget = 64
    cluster_iters: int = 3
    spatial_weight: float = 0.1
    assignment_temperature: float = 0.07
    object_penalty: float = 1.0
    center_init: str = "raster"
    compressor: str = "samer"
    bank_size: int = 2048
    sap_layers: str = ""
    global_view: str = "joined"

    def __post_init__(self) -> None:
        settle(self, "merge.")
        require(self.bank_size >= 1, "merge.bank_size", "at least 1", self.bank_size)
        require(self.cluster_iters >= 1, "merge.cluster_iters", "at least 1", self.cluster_iters)
        for name in ("spatial_weight", "object_penalty"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"merge.{name}", "a finite number >= 0", value)
        value = self.assignment_temperature
        require(math.isfinite(value) and value > 0, "merge.assignment_temperature", "a finite number > 0", value)
        ends = re.fullmatch(r"([0-9]{1,4})-([0-9]{1,4})", self.sap_layers)
        rule = "first and last layer, such as 11-14, or empty"
        right = not self.sap_layers or (bool(ends) and int(ends[1]) <= int(ends[2]))
        require(right, "merge.sap_layers", rule, self.sap_layers)
        rule = "'raster' or 'farthest'"
        require(self.center_init in ("raster", "farthest"), "merge.center_init", rule, self.center_init)
        rule = "'joined' or 'apart'"
        require(self.global_view in ("joined", "apart"), "merge.global_view", rule, self.global_view)


@dataclass(frozen=True)
class ReduceConfig:
    """How a vision tower runs on fewer tokens (`samer.reducers`).

    Attributes:
        method: a name in `samer.reducers.REDUCERS`; "none" leaves the tower as it is.
        r: how many tokens a block merges away ("tome"), at most ("adamerge"), rows and columns ("cubist"); below 1 a
            share of a picture's patches, or of its rows and columns.
        layers: blocks, from 0 on, at which it merges; empty: all ("cubist": before block 1, once).
        unmerge: the tower gives every patch the token that it went to, so that nothing behind it sees a difference.
        statistics: a file of scripts/calibrate.py ("adamerge"); what it holds is kept as `mean` and `deviation`.
        order: which tokens merge first, "salient" (published) or "inverse" ("adamerge").
        batch: "masked", as many as each image asks for, or "shared", the mean of a batch ("adamerge").
        temperature, alpha: of the rate ("adamerge").
        proportional: attention counts a token as often as it holds patches ("adamerge"; "tome" always does).
    """

    method: str = "none"
    r: float = 0.0
    layers: tuple[int, ...] = ()
    unmerge: bool = False
    statistics: str = ""
    order: str = "salient"
    batch: str = "masked"
    temperature: float = 1.0
    alpha: float = 1.0
    proportional: bool = False
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        settle(self, "reduce.")
        require(0 <= self.r < 1 or self.r in range(10**6), "reduce.r", "a whole number, or a share below 1", self.r)
        require(self.r == 0 or self.method != "none", "reduce.method", "given where reduce.r is", self.method)
        require(all(n >= 0 for n in self.layers), "reduce.layers", "numbers from 0 on", list(self.layers))
        for name, words in (("order", ("salient", "inverse")), ("batch", ("masked", "shared"))):
            require(getattr(self, name) in words, f"reduce.{name}", " or ".join(map(repr, words)), getattr(self, name))
        for name in ("temperature", "alpha"):
            require(0 < getattr(self, name) < math.inf, f"reduce.{name}", "a finite number > 0", getattr(self, name))


@dataclass(frozen=True)
class ObjectsConfig:
    """Which boxes become instance labels (METHOD section 3): areas are shares of the image."""

    min_area: float = 0.005
    max_area: float = 1.0
    max_phrases: int = 4

    def __post_init__(self) -> None:
        settle(self, "objects.")
        rule = "0 <= objects.min_area <= objects.max_area <= 1"
        require(0 <= self.min_area <= self.max_area <= 1, "objects", rule, (self.min_area, self.max_area))
        require(self.max_phrases >= 1, "objects.max_phrases", "at least 1", self.max_phrases)


@dataclass(frozen=True)
class ModelConfig:
    """The frozen retriever: a hub id or a folder in transformers format; `revision`: of the hub id."""

    name: str = "vidore/colpali-v1.3-hf"
    revision: str = "main"
    local_files_only: bool = False

    def __post_init__(self) -> None:
        settle(self, "model.")


@dataclass(frozen=True)
class DataConfig:
    """A data set on disk, how it is read, and how much of it; `features` names a feature store to train from.

    `captions`: a file of scripts/select_captions.py; what is trained on are the captions in it, empty: all.
    `name`: of its kind, in `samer.data.READERS`; empty: guessed from the folder, and told. `reader`: an older word for
    `name`, which takes its value. `max_megapixels`: larger pictures are refused before they are decoded, as
    a small file can claim any size. `strict`: refuse what a reader otherwise leaves out and tells, such as a box
    outside its picture.
    """

    root: str = ""
    name: str = ""
    reader: str = ""
    features: str = ""
    train_split: str = "train"
    captions: str = ""
    eval_split: str = "val"
    limit_train_images: int | None = None
    limit_eval_images: int | None = None
    max_megapixels: float = 256.0
    strict: bool = False

    def __post_init__(self) -> None:
        settle(self, "data.")
        if self.reader:
            rule = f"what data.name says, {self.name!r}, or left out"
            require(self.name in ("", self.reader), "data.reader", rule, self.reader)
            object.__setattr__(self, "name", self.reader)
            object.__setattr__(self, "reader", "")
        most = self.max_megapixels
        require(math.isfinite(most) and most > 0, "data.max_megapixels", "a finite number > 0", most)
        for name in ("limit_train_images", "limit_eval_images"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name}", "at least 1, or null for all", value)


@dataclass(frozen=True)
class TrainConfig:
    """Projector-only training (METHOD section 4); batch sizes count captions per device.

    `budgets`: train one projector for all of these K, the loss averaged over them; written as a list in
    merge.num_regions, all whole numbers or all shares, whose largest is then the K of validation and index.
    `select_best`: keep the projector of the epoch with the best validation R@1; `early_stop_patience`: stop after so
    many epochs without a better one.
    `mixup`: none, or midpoint: an image's vectors move towards another's during training (METHOD section 4c).
    `report_to`: none, or trackers that accelerate knows, by comma, such as tensorboard,wandb; each must be installed.
    """

    output_dir: str = "checkpoints/samer_k64_colpali"
    run_name: str = "samer_k64_colpali"
    train_batch_size: int = 32
    eval_batch_size: int = 32
    grad_accum_steps: int = 2
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    warmup_ratio: float = 0.1
    num_train_epochs: float = 3.0
    max_grad_norm: float = 1.0
    temperature: float = 0.07
    bf16: bool = True
    gather_negatives: bool = True
    mixup: str = "none"
    seed: int = 0
    report_to: str = "none"
    dataloader_num_workers: int = 4
    logging_steps: int = 10
    save_steps: int = 500
    resume: bool = True
    budgets: tuple[Budget, ...] = ()
    select_best: bool = False
    early_stop_patience: int | None = None

    def __post_init__(self) -> None:
        settle(self, "train.")
        alike = len({type(k) for k in self.budgets}) < 2
        require(alike, "merge.num_regions", "a list of whole numbers or one of shares", list(self.budgets))
        patience = self.early_stop_patience
        require(patience is None or patience >= 1, "train.early_stop_patience", "at least 1, or null", patience)
        require(self.mixup in MIXUPS, "train.mixup", f"one of {', '.join(MIXUPS)}", self.mixup)
        at_least_one = ("train_batch_size", "eval_batch_size", "grad_accum_steps", "logging_steps", "save_steps")
        for name in at_least_one:
            require(getattr(self, name) >= 1, f"train.{name}", "at least 1", getattr(self, name))
        for name in ("learning_rate", "num_train_epochs", "temperature", "max_grad_norm"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"train.{name}", "a finite number > 0", value)
        for name in ("weight_decay", "dataloader_num_workers", "seed"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"train.{name}", "a finite number >= 0", value)
        require(0 <= self.warmup_ratio < 1, "train.warmup_ratio", "in [0, 1)", self.warmup_ratio)


@dataclass(frozen=True)
class Config:
    """Everything that one training run needs; written to OUTPUT_DIR/config.yaml as resolved."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    objects: ObjectsConfig = field(default_factory=ObjectsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    reduce: ReduceConfig = field(default_factory=ReduceConfig)

    def __post_init__(self) -> None:
        settle(self, "")
        budgets = self.train.budgets
        rule = "the largest of train.budgets; give the list as merge.num_regions instead"
        require(
            not budgets or max(budgets, key=Fraction) == self.merge.num_regions,
            "merge.num_regions",
            rule,
            self.merge.num_regions,
        )


def _spread_budgets(values: Any, where: str) -> Any:
    """A list in merge.num_regions means: train for all of these budgets, validate and index with the largest."""
    merge = values.get("merge") if isinstance(values, dict) else None
    regions = merge.get("num_regions") if isinstance(merge, dict) else None
    if not isinstance(regions, list):
        return values
    if not regions:
        raise InputError(f"{where}: merge.num_regions must be a whole number, a share, or a list of such; it is []")
    regions = [as_budget(f"{where}: merge.num_regions", k) for k in regions]
    train = values.get("train") or {}
    if isinstance(train, dict):  # else it is refused by name when the settings are built
        train = {**train, "budgets": regions}
    return {**values, "merge": {**merge, "num_regions": max(regions, key=Fraction)}, "train": train}


def load_config(path: str | Path | None, overrides: typing.Sequence[str] = (), kind: type = Config) -> Any:
    """Reads a config file and applies `section.key=value` overrides, values read as YAML, text as it is.

    Args:
        path: a YAML file; None starts from the defaults.
        overrides: e.g. `["merge.num_regions=32", "train.learning_rate=5e-5"]`.
        kind: a dataclass of sections.

    Returns:
        Checked settings, a `Config` or another `kind`.

    Raises:
        InputError: unreadable file, unknown key, wrong type or value out of range, named.
    """
    values = load_yaml(path) if path is not None else {}
    where = str(path) if path is not None else "config"
    values = _spread_budgets(values, where)
    build_dataclass(kind, values, where)  # the file is checked by itself, so that a message names it rightly
    values = dict(values or {})
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not equals or not dot or not section or not name:
            raise InputError(f"override {override!r} is not of the form section.key=value, e.g. merge.num_regions=32")
        if _is_text(kind, section, name):
            value = text  # a path stays as it was typed, whatever YAML would make of it
        else:
            try:
                value = parse_yaml(text) if text else ""
            except yaml.YAMLError:
                raise InputError(f"override {override!r}: the value is not valid YAML") from None
        values[section] = {**(values.get(section) or {}), name: value}
        if key == "merge.num_regions" and isinstance(values.get("train"), dict):
            values["train"] = {k: v for k, v in values["train"].items() if k != "budgets"}  # it replaces a list too
    values = _spread_budgets(values, " ".join([f"{where} with", *overrides]))
    # the overrides are checked together: a range may hold only with the file's value or another override's
    return build_dataclass(kind, values, " ".join([f"{where} with", *overrides]) if overrides else where)


def _is_text(settings: type, section: str, name: str) -> bool:
    """Whether a setting is plain text."""
    kind = kinds_of(settings).get(section)
    return kind is not None and kinds_of(kind).get(name) is str


def dump_config(config: Any) -> str:
    """The config as YAML text that `load_config` reads back to an equal config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
