"""What a tower's pass costs, counted, and the r of a reducer that saves a given share of it.

FLOPs are those of all matrix products, attention's among them, as torch counts them: two a multiplication. AdaMerge's
affinity and ToMe's similarities count as well; the paper of AdaMerge does not say whether its figures do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from samer.config import InputError, ReduceConfig
from samer.reducers.running import reduced
from samer.reducers.towers import find_tower

# FLOPs saved in AdaMerge's Table 1 (15.91, 15.54, 14.98, 14.39, 13.94, 13.42 of 17.45 G), then ours
PUBLISHED = (0.088, 0.109, 0.142, 0.175, 0.201, 0.231)
TIERS = (*PUBLISHED, 0.25, 0.5)
NEAR, TRIES = 0.004, 8  # a tier is met this near, or after so many tries


@dataclass(frozen=True)
class Tier:
    """Settings that come nearest to a share of FLOPs saved, and the share that they do save."""

    asked: float
    saved: float
    settings: ReduceConfig


@torch.no_grad()
def flops(see: Callable[[], object]) -> int:
    """FLOPs of a call."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # whose products are all counted
        see()
    return counter.get_total_flops()


class Meter:
    """Counts a tower's FLOPs under settings, relative to the plain tower.

    Args:
        model: that holds the tower.
        images: what each of these, called, has it see: a picture, so that no padding is counted. Only AdaMerge treats
            them differently; others are counted on the first.
    """

    def __init__(self, model: nn.Module, images: Sequence[Callable[[], object]]) -> None:
        self.model, self.images = model, images
        self.plain = [flops(image) for image in images]
        self.patches = 0
        with reduced(model, ReduceConfig()) as run:
            images[0]()
            self.patches = run.tokens.source.shape[1]
        tower, kind = find_tower(model)
        self.blocks = len(tower.get_submodule(kind.blocks))

    def saved(self, settings: ReduceConfig) -> float:
        """The share of FLOPs that settings save; that of settings which ask for too much is 1."""
        count = len(self.images) if settings.method == "adamerge" else 1
        try:
            with reduced(self.model, settings):
                return 1 - sum(map(flops, self.images[:count])) / sum(self.plain[:count])
        except InputError:
            return 1.0


def tiers(
    meter: Meter,
    base: ReduceConfig,
    calibrated: Callable[[ReduceConfig], ReduceConfig],
    asked: Sequence[float] = TIERS,
) -> list[Tier]:
    """For each share of FLOPs the settings that save the one nearest to it.

    ToMe and AdaMerge by r; CubistMerge by r and the block before which it merges once, the published block 1 first.

    Args:
        meter: of the tower.
        base: method and other settings.
        calibrated: adds the statistics that settings need ("adamerge").
        asked: shares.
    """
    if base.method == "cubist":
        every = list(_places(meter, base, max(asked) + NEAR))
        return [_nearest(share, every) for share in asked]
    found: dict[int, tuple[float, ReduceConfig]] = {0: (0.0, replace(base, r=0))}

    def look(r: int) -> None:
        settings = calibrated(replace(base, r=r))
        found[r] = meter.saved(settings), settings

    for share in asked:
        for _ in range(TRIES):
            low = max(r for r in found if found[r][0] < share)
            higher = [r for r in found if r > low]
            high = min(higher) if higher else min(meter.patches // 2, max(8, 2 * low))
            if higher and (high - low == 1 or min(abs(each - share) for each, _ in found.values()) < NEAR):
                break
            if not higher:
                look(high)
                continue
            (before, _), (after, _) = found[low], found[high]
            guess = low + round((share - before) / (after - before) * (high - low))
            look(min(max(guess, low + 1), high - 1))
    return [_nearest(share, list(found.values())) for share in asked]


def _places(meter: Meter, base: ReduceConfig, most: float) -> Iterator[tuple[float, ReduceConfig]]:
    """CubistMerge before each block of the first half, from block 1 on, by every r that saves no more than `most`."""
    side = int(meter.patches**0.5)
    for block in range(1, max(2, meter.blocks // 2 + 1)):
        for r in range(1, side // 2 + 1):
            settings = replace(base, r=r, layers=(block,))
            saved = meter.saved(settings)
            yield saved, settings
            if saved > most:
                break


def _nearest(share: float, every: Sequence[tuple[float, ReduceConfig]]) -> Tier:
    """The nearest, the first of several."""
    saved, settings = min(every, key=lambda each: round(abs(each[0] - share), 3))
    return Tier(share, saved, settings)


@torch.no_grad()
def pace(model: nn.Module, see: Callable[[], object], chosen: Sequence[ReduceConfig], runs: int) -> list[float]:
    """Median seconds of a call: of the plain tower, then under each settings; in turn, so that a noisy moment hits all.

    `see` must wait for what it computes, as a GPU does not by itself.
    """
    times: list[list[float]] = [[] for _ in range(len(chosen) + 1)]
    for turn in range(runs + 1):
        for row, settings in zip(times, (ReduceConfig(), *chosen)):
            with reduced(model, settings):
                started = time.perf_counter()
                see()
                row.append(time.perf_counter() - started)
        if not turn:
            times = [[] for _ in times]
    return [statistics.median(row) for row in times]
