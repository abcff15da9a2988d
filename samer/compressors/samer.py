"""SaMer: the feature-spatial soft merge, with the object prior where labels are given (METHOD sections 2-3)."""

from __future__ import annotations

from torch import Tensor

from samer.compressors.base import Compressor
from samer.merging import merge_tokens
from samer.tokens import MergedTokens, VisualTokens


class Samer(Compressor):
    """`merge_tokens` with all of `MergeConfig`."""

    uses_labels = True

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        return merge_tokens(
            visual.tokens, visual.coords, self.settings, mask=visual.mask, instance_labels=instance_labels
        )
