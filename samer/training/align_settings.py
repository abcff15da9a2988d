"""Settings of an alignment of two towers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from samer.config import DataConfig, InputError
from samer.retrievers.pretrained import TowerConfig


@dataclass(frozen=True)
class AlignSettings:
    """How adapters and projection are trained.

    Attributes:
        output_dir: the retriever, and the files of the run.
        start: a retriever of the same towers and sizes to go on from, as one aligned on smaller pictures; "": none.
        images_per_step: of all processes, each with all its captions.
        captions: of an image that a step takes, drawn anew each time; 0: all. Scores cost most on a CPU.
        phrases: of an image with boxes that a step asks for as queries of their own, drawn anew each time.
        patches: of an image that a step looks at, drawn anew each time; 0: all.
        epochs, learning_rate, weight_decay, warmup_ratio, max_grad_norm, seed: of AdamW with a cosine.
        dropout: in the adapters.
        word_dropout: share of a query's tokens that its score leaves out, drawn anew each time.
        learn_temperature: train the temperature, from `towers.temperature` on.
        phrase_weight: of the term that draws phrases to their boxes; 0, and no `phrases`, need no boxes.
        phrase_temperature: that its similarities are divided by.
        features_dtype: of the store of the towers' outputs, where it has to be made.
        batch_size: images, and captions, per forward pass of the towers.
    """

    output_dir: str = "checkpoints/towers"
    start: str = ""
    images_per_step: int = 64
    captions: int = 0
    phrases: int = 2
    patches: int = 0
    epochs: int = 20
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    dropout: float = 0.1
    word_dropout: float = 0.0
    learn_temperature: bool = True
    phrase_weight: float = 0.2
    phrase_temperature: float = 0.1
    features_dtype: str = "float16"
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images_per_step", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"align.{name} must be at least 1; it is {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "phrase_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"align.{name} must be a number above 0; it is {getattr(self, name)}")
        for name in ("captions", "phrases", "patches", "weight_decay", "phrase_weight", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"align.{name} must be at least 0; it is {getattr(self, name)}")
        for name in ("warmup_ratio", "dropout", "word_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"align.{name} must be in [0, 1); it is {getattr(self, name)}")


@dataclass(frozen=True)
class AlignConfig:
    """Everything that one alignment needs; written to OUTPUT_DIR/align.yaml as resolved."""

    towers: TowerConfig = field(default_factory=TowerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    align: AlignSettings = field(default_factory=AlignSettings)
