"""Average pooling on the patch grid: the least that uses where a patch stands."""

from __future__ import annotations

import torch
from torch import Tensor

from samer.compressors.base import Compressor, hard_merge
from samer.tokens import MergedTokens, VisualTokens


class GridPooling(Compressor):
    """The mean of each cell of a coarser grid with at most K cells; prompt tokens, which have no place, are dropped.

    The coarser grid does not know the patches': with nearly as many cells as patches some stay empty.
    """

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        rows, columns = cells(self.settings.num_regions)
        size = torch.tensor([columns, rows], device=visual.coords.device)
        cell = (visual.coords * size + 1e-4).long().clamp(min=torch.zeros_like(size), max=size - 1)  # (B, N, 2)
        number = cell[..., 1] * columns + cell[..., 0]
        return hard_merge(visual, number.masked_fill(~visual.patches, -1), self.settings.num_regions)


def cells(regions: int) -> tuple[int, int]:
    """(rows, columns) of the grid with most cells within the budget, no side over twice the other; then the squarest.

    Rows <= columns.
    """
    pairs = [(rows, regions // rows) for rows in range(1, regions + 1) if rows * rows <= regions]
    pairs = [(rows, min(columns, 2 * rows)) for rows, columns in pairs]
    return max(pairs, key=lambda pair: (pair[0] * pair[1], pair[0]))
