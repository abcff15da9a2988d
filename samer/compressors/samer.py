"""SaMer: the feature-spatial soft merge, with the object prior where labels are given (METHOD sections 2-3)."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor

from samer.compressors.base import Compressor
from samer.config import MergeConfig
from samer.merging import merge_tokens
from samer.tokens import MergedTokens, VisualTokens


class Samer(Compressor):
    """`merge_tokens` with all of `MergeConfig`."""

    uses_labels = True
    # all of its own, new ones too; the object penalty acts on labels, which only training has, the bank is querybank's
    settings_used = tuple(
        f.name for f in fields(MergeConfig) if f.name not in ("compressor", "object_penalty", "bank_size", "sap_layers")
    )

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        more = {"mask": visual.mask, "instance_labels": instance_labels, "views": visual.views}
        return merge_tokens(visual.tokens, visual.coords, self.settings, **more)
