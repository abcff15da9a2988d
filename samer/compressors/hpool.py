"""H-Pool, ColPali's hierarchical token pooler (METHOD section 7).

Cosine distances D = 1 - E E^T go into Ward's linkage as if they were observations, a row each, not as distances: that
is how the pooler that people use behaves, so it is how it is compared here. Its distances between rows of N numbers are
what takes the time; here they come from one product of width D:

    |d_i - d_j| = |E (e_i - e_j)|, as the 1 of every entry cancels, so |d_i - d_j|^2 = (e_i - e_j)^T (E^T E) (e_i - e_j)
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from samer.compressors.base import Compressor, hard_merge
from samer.tokens import MergedTokens, VisualTokens

# squared distances up to this share of the largest square are rounding: equal tokens are at distance 0
ROUNDING = 1e-13
BLOCK = 128  # rows of a product that stays in cache


class HPool(Compressor):
    """Ward clusters of the distance matrix's rows, cut at K, means, normalised; all tokens take part."""

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        tokens = visual.tokens.detach().cpu().double()
        assignments = torch.full(tokens.shape[:2], -1)
        for row, image in enumerate(tokens):  # a dendrogram per image: scipy has no batched linkage
            valid = slice(None) if visual.mask is None else visual.mask[row].cpu()
            own = image[valid]
            if len(own) > self.settings.num_regions:  # else it is kept as it is
                assignments[row, valid] = ward_labels(own, self.settings.num_regions)
        return hard_merge(visual, assignments.to(visual.tokens.device), self.settings.num_regions)


def ward_labels(tokens: Tensor, regions: int) -> Tensor:
    """Cluster numbers (N,) from 0 of unit tokens (N, D) float64 on the CPU, at most `regions` of them."""
    tree = linkage(row_distances(tokens), method="ward")
    return torch.from_numpy(fcluster(tree, t=regions, criterion="maxclust")).long() - 1


def row_distances(tokens: Tensor) -> np.ndarray:
    """Euclidean distances between the rows of 1 - E E^T, in scipy's condensed form (N (N - 1) / 2,).

    They differ from those of the rows themselves by rounding, some 1e-15 of the largest square, so that a tie may be
    decided otherwise than there. Equal tokens are at distance 0, where the rows' rounding would part them.

    Args:
        tokens: E, (N, D) float64 on the CPU.
    """
    count = len(tokens)
    apart = tokens - tokens.mean(0)  # differences stay as they are, and squares become small beside them
    left = apart @ (tokens.T @ tokens)
    squares = (left * apart).sum(1, keepdim=True)  # (N, 1)
    ones = torch.ones_like(squares)
    # s_i + s_j - 2 g_ij in one product, above the diagonal only
    left, right = torch.cat([-2 * left, squares, ones], 1), torch.cat([apart, ones, squares], 1).T
    condensed, place = np.empty(count * (count - 1) // 2), 0
    for start in range(0, count, BLOCK):
        for row, found in enumerate((left[start : start + BLOCK] @ right[:, start:]).numpy(), 1):
            condensed[place : place + len(found) - row] = found[row:]
            place += len(found) - row
    condensed[condensed <= ROUNDING * float(squares.max())] = 0
    return np.sqrt(condensed, out=condensed)
