"""Settings of SEPS: towers, data, head, training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from samer.config import MIXUPS, DataConfig, InputError

VARIANTS = ("code", "paper")
DENSE = ("none", "image", "query")
PUBLISHED = ("", "f30k", "coco")


def _among(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(each or repr(each) for each in allowed)}; it is {value!r}")


def _bounded(settings: object, section: str, least: float, names: str, *, above: bool = False) -> None:
    for name in names.split():
        value = getattr(settings, name)
        if not least <= value < math.inf or (above and value == least):
            raise InputError(f"{section}.{name} must be {'above' if above else 'at least'} {least}; it is {value}")


@dataclass(frozen=True)
class SepsTowers:
    """The two towers and the space that they meet in.

    Attributes:
        vision, text: of transformers, on the hub or folders: any vision model with patch tokens, any text encoder.
        vision_revision, text_revision: on the hub.
        image_size: pixels of a side; pictures are stretched to it.
        embed_size: d. A tower of that width needs no projection (identity, as released).
        max_words: token vectors of a text that count at evaluation, dense text among them; training takes all. The
            tower itself sees the whole text. 0: all.
    """

    vision: str = "google/vit-base-patch16-224-in21k"
    text: str = "google-bert/bert-base-uncased"
    vision_revision: str = "main"
    text_revision: str = "main"
    image_size: int = 224
    embed_size: int = 512
    max_words: int = 90

    def __post_init__(self) -> None:
        _bounded(self, "towers", 1, "image_size embed_size")
        _bounded(self, "towers", 0, "max_words")


@dataclass(frozen=True)
class SepsData(DataConfig):
    """A data set of captions; `eval_split` picks the epoch.

    Attributes:
        published: f30k or coco, whose counts whole splits are held against; "": none.
        dense: a folder with `*_SPLIT.jsonl`, or a file for all splits, of dense texts; "": beside the captions.
        features: a store of what the towers give (scripts/features.py), which then stay as they are.
        workers: threads that read pictures.
    """

    eval_split: str = "dev"
    published: str = ""
    dense: str = ""
    workers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _among("data.published", self.published, PUBLISHED)
        _bounded(self, "data", 1, "workers")


@dataclass(frozen=True)
class HeadSettings:
    """Selection, aggregation and similarity; `samer.seps` says what they mean.

    Attributes:
        variant: code or paper.
        dense: none, image, or query (the leak).
        sparse_ratio: rho, the share of the tokens that is kept.
        aggr_ratio: vectors per kept token.
        select_gradient: whether the chosen tokens pass gradient on.
        ratio_weight: of the ratio loss; null: 1 in `paper`, 0 in `code`, where it is a constant (published: 2).
        ratio_sum: the published target, the sum over both texts' decisions instead of their mean.
        beta, temperature: of `paper`.
        margin: of the hinge.
    """

    variant: str = "code"
    dense: str = "none"
    sparse_ratio: float = 0.5
    aggr_ratio: float = 0.4
    select_gradient: bool = True
    ratio_weight: float | None = None
    ratio_sum: bool = False
    beta: float = 0.25
    temperature: float = 1.0
    margin: float = 0.2

    def __post_init__(self) -> None:
        _among("seps.variant", self.variant, VARIANTS)
        _among("seps.dense", self.dense, DENSE)
        for name in ("sparse_ratio", "aggr_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"seps.{name} must be in (0, 1]; it is {getattr(self, name)}")
        if not 0 <= self.beta <= 0.5:
            raise InputError(f"seps.beta must be in [0, 0.5]; it is {self.beta}")
        _bounded(self, "seps", 0, "temperature", above=True)
        _bounded(self, "seps", 0, "margin")
        if self.ratio_weight is not None:
            _bounded(self, "seps", 0, "ratio_weight")

    @property
    def weight_of_ratio(self) -> float:
        """Of the ratio loss, by the variant where nothing is set."""
        return float(self.variant == "paper") if self.ratio_weight is None else self.ratio_weight


@dataclass(frozen=True)
class SepsTraining:
    """Training as released, but for its traps; batch_size counts captions per process.

    Attributes:
        tower_rate: of the learning rate, for the towers; 0: they stay as they are.
        decay_epochs, decay: the learning rate is multiplied by `decay` at each of these epochs, from 0.
        warmup: in the first epoch the loss grows from 0.
        sum_epochs: in so many epochs all violations of the margin count, then only the greatest of each text and each
            picture. From the greatest alone towers that know nothing yet learn that all pairs are alike.
        augment: share of a text's words that training alters.
        mixup: none, or midpoint: a picture's tokens move towards another's during training (METHOD section 4c).
        nan_as_zero: as released: a loss that is not finite is left out instead of being an error.
        save_steps: between checkpoints, besides one after every epoch; 0: none besides.
        eval_block: pictures that are scored at once.
        report_to: none, or trackers that accelerate knows, by comma, such as tensorboard.
    """

    output_dir: str = "checkpoints/seps"
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 2e-4
    tower_rate: float = 0.1
    weight_decay: float = 1e-4
    decay_epochs: tuple[int, ...] = (9, 15, 20, 25)
    decay: float = 0.3
    warmup: bool = True
    sum_epochs: int = 1
    max_grad_norm: float = 2.0
    augment: float = 0.2
    mixup: str = "none"
    nan_as_zero: bool = False
    bf16: bool = False
    save_steps: int = 0
    eval_batch_size: int = 64
    eval_block: int = 64
    report_to: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        _bounded(self, "train", 1, "epochs batch_size eval_batch_size eval_block")
        _bounded(self, "train", 0, "learning_rate max_grad_norm decay", above=True)
        _bounded(self, "train", 0, "tower_rate weight_decay sum_epochs save_steps seed augment")
        _among("train.mixup", self.mixup, MIXUPS)
        if self.augment > 1:
            raise InputError(f"train.augment must be at most 1; it is {self.augment}")


@dataclass(frozen=True)
class SepsConfig:
    """Everything that one run needs; written to OUTPUT_DIR/seps.yaml as resolved."""

    towers: SepsTowers = field(default_factory=SepsTowers)
    data: SepsData = field(default_factory=SepsData)
    seps: HeadSettings = field(default_factory=HeadSettings)
    train: SepsTraining = field(default_factory=SepsTraining)
