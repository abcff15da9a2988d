"""H-Pool, ColPali's hierarchical token pooler (METHOD section 7).

Cosine distances D = 1 - E E^T go into Ward's linkage as if they were observations, a row each, not as distances: that
is how the pooler that people use behaves, so it is how it is compared here.
"""

from __future__ import annotations

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from samer.compressors.base import Compressor, hard_merge
from samer.tokens import MergedTokens, VisualTokens


class HPool(Compressor):
    """Ward clusters of the distance matrix's rows, cut at K, means, normalised; all tokens take part."""

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        tokens = visual.tokens.detach().double().cpu()
        assignments = torch.full(tokens.shape[:2], -1)
        for row, image in enumerate(tokens):  # a dendrogram per image: scipy has no batched linkage
            valid = slice(None) if visual.mask is None else visual.mask[row].cpu()
            own = image[valid]
            if len(own) > self.settings.num_regions:  # else it is kept as it is
                assignments[row, valid] = torch.from_numpy(ward_labels(own.numpy(), self.settings.num_regions)).long()
        return hard_merge(visual, assignments.to(visual.tokens.device), self.settings.num_regions)


def ward_labels(tokens, regions: int):
    """Cluster numbers (N,) from 0 of unit tokens (N, D), at most `regions` of them; numpy in, numpy out."""
    distances = 1.0 - tokens @ tokens.T
    tree = linkage(distances, method="ward", metric="euclidean")
    return fcluster(tree, t=regions, criterion="maxclust") - 1
