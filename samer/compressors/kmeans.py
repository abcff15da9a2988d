"""K-means on the tokens alone: what clustering brings without place, soft assignment or object prior."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from samer.compressors.base import Compressor, hard_merge
from samer.merging import merge_tokens
from samer.tokens import MergedTokens, VisualTokens

ITERATIONS = 20  # Lloyd's; SaMer's clustering stops after 3


class KMeans(Compressor):
    """Spherical K-means from farthest centres to (near) convergence, then hard means."""

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        settings = replace(
            self.settings,
            compressor="samer",
            cluster_iters=ITERATIONS,
            spatial_weight=0.0,
            center_init="farthest",
            assignment_temperature=1.0,  # only the nearest centre is taken from the weights
        )
        with torch.no_grad():
            clustered = merge_tokens(visual.tokens, visual.coords, settings, mask=visual.mask)
        return hard_merge(visual, clustered.weights.argmax(-1), self.settings.num_regions)
