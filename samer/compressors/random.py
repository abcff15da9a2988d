"""Random pruning: the floor that every choice of tokens must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from samer.compressors.base import Compressor, keep_best
from samer.config import InputError
from samer.tokens import MergedTokens, VisualTokens


class RandomPruning(Compressor):
    """K patches drawn without replacement, by the image's id: the same image always keeps the same ones.

    A smaller budget keeps a subset of a larger one's patches.
    """

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        if visual.seeds is None:
            raise InputError("random pruning draws by image: give VisualTokens.seeds, one per image")
        valid = torch.ones_like(visual.patches) if visual.mask is None else visual.mask
        place = valid.long().cumsum(1)  # 1..n, whatever side the padding is on
        return keep_best(visual, scramble(visual.seeds[:, None], place), self.settings.num_regions)


def scramble(seeds: Tensor, places: Tensor) -> Tensor:
    """Numbers in [0, 2^32) that look random, a function of (seed, place) alone; int64 in, int64 out.

    Multiply, fold and multiply again with odd constants, as integer hashes do; the same on every device.
    """
    mixed = seeds * 0x2545F4914F6CDD1D + places * 0x9E3779B97F4A7C1
    for factor in (0x4CF5AD432745937F, 0x52DCE729DA3ED7A9):
        mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * factor
    return (mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)) >> 16 & 0xFFFFFFFF
