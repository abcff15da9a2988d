"""What AdaMerge's rate is measured against: mean and deviation of the weighted similarity in each block, over images.

They are found in passes. In the first nothing is merged (OURS: the paper's start is not given); in each that follows
the tower merges by what the pass before found, so that deep blocks are measured on what really comes to them. Two of
these are what the paper recommends. They hold for one tower, one r_max and one number of patches.

Shape letters: B images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samer.config import InputError, ReduceConfig
from samer.reducers.running import reduced
from samer.reducers.towers import find_tower, tower_digest
from samer.runtime.files import read_json, write_json
from samer.settings import build_dataclass

ALIKE = ("order", "batch", "temperature", "alpha", "proportional", "layers")  # settings that statistics depend on, too


@dataclass(frozen=True)
class Statistics:
    """What a file of them says.

    Attributes:
        model: name of the model, for people.
        tower: `tower_digest` of its vision tower.
        r_max: `reduce.r`.
        patches: of a picture.
        images: how many were looked at in each pass.
        passes: with merging.
        order, batch, temperature, alpha, proportional, layers: as in `ReduceConfig`.
        mean, deviation: of each block, after the last pass.
        history: the means after every pass, the one without merging first.
    """

    model: str = ""
    tower: str = ""
    r_max: float = 0.0
    patches: int = 0
    images: int = 0
    passes: int = 0
    order: str = "salient"
    batch: str = "masked"
    temperature: float = 1.0
    alpha: float = 1.0
    proportional: bool = False
    layers: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    history: tuple[tuple[float, ...], ...] = ()


@torch.no_grad()
def calibrate(
    model: nn.Module,
    name: str,
    settings: ReduceConfig,
    batches: Sequence[Any],
    see: Callable[[Any], Any],
    passes: int = 2,
) -> Statistics:
    """Measures the statistics of a tower.

    Args:
        model: that holds the tower.
        name: of the model.
        settings: with method "adamerge" and r.
        batches: of images, whatever `see` takes.
        see: runs the tower on one.
        passes: with merging.

    Raises:
        InputError: another method, no r, less than one pass, or no image.
    """
    if settings.method != "adamerge" or not settings.r or passes < 1 or not batches:
        raise InputError(
            f"reduce.method={settings.method} reduce.r={settings.r:g}, {passes} passes over {len(batches)} batches: "
            "statistics are of adamerge, an r above 0, at least one pass and one image"
        )
    tower, kind = find_tower(model)
    blocks = len(tower.get_submodule(kind.blocks))
    mean, deviation = [math.inf] * blocks, [1.0] * blocks  # nothing is as similar as that, so nothing merges
    history: list[tuple[float, ...]] = []
    images = patches = 0
    for _ in range(passes + 1):
        seen: list[list[Tensor]] = [[] for _ in range(blocks)]
        with reduced(model, replace(settings, statistics="", mean=mean, deviation=deviation)) as run:
            for batch in batches:
                see(batch)
                for block, value in run.tokens.similarity.items():
                    seen[block].append(value.double().cpu())
                patches = run.tokens.source.shape[1]
        values = [torch.cat(rows) if rows else torch.zeros(1) for rows in seen]
        images = max(len(rows) for rows in values)
        mean = [float(rows.mean()) for rows in values]
        deviation = [float(rows.std(correction=0)) for rows in values]
        history.append(tuple(mean))
    own = {key: getattr(settings, key) for key in ALIKE}
    found = {"mean": tuple(mean), "deviation": tuple(deviation), "history": tuple(history)}
    return Statistics(name, tower_digest(model), settings.r, patches, images, passes, **own, **found)


def write_statistics(path: str | Path, statistics: Statistics) -> None:
    """Writes them as JSON."""
    write_json(Path(path), asdict(statistics))


def read_statistics(path: str | Path) -> Statistics:
    """What a file says.

    Raises:
        InputError: not readable, or no such file.
    """
    found = build_dataclass(Statistics, read_json(Path(path)), str(path))
    if not found.tower or len(found.mean) != len(found.deviation) or not all(map(math.isfinite, found.mean)):
        raise InputError(f"{path}: no statistics of a tower; make them with scripts/calibrate.py")
    return found


def with_statistics(settings: ReduceConfig, model: nn.Module | None = None) -> ReduceConfig:
    """Settings that hold what `settings.statistics` names, so that they say by themselves how a tower is reduced.

    Args:
        settings: of a reduction.
        model: that holds the tower; None: it is not here, and not compared.

    Raises:
        InputError: statistics of another tower, r_max or setting; names both.
    """
    if settings.method != "adamerge" or not settings.statistics:
        return replace(settings, statistics="")
    path = settings.statistics
    found = read_statistics(path)
    if model is not None and found.tower != tower_digest(model):
        raise InputError(f"{path}: statistics of {found.model}, another tower; run scripts/calibrate.py for this one")
    if found.r_max != settings.r:
        raise InputError(
            f"{path}: statistics at r_max {found.r_max:g}, reduce.r is {settings.r:g}; run scripts/calibrate.py with it"
        )
    for name in ALIKE:
        held, asked = getattr(found, name), getattr(settings, name)
        if held != asked:
            raise InputError(
                f"{path}: statistics at reduce.{name}={held}, now {asked}; run scripts/calibrate.py with it"
            )
    return replace(settings, statistics="", mean=found.mean, deviation=found.deviation)
