"""SAP (arXiv 2601.20107; METHOD section 7): keep the patches that the other patches look at.

The layers are the middle ones, as in the first version, or `merge.sap_layers`, as the second version's calibration
finds them (`samer.retrievers.retention`).
"""

from __future__ import annotations

from torch import Tensor

from samer.compressors.base import Compressor, keep_best
from samer.config import MergeConfig
from samer.tokens import MergedTokens, VisualTokens


class SapMean(Compressor):
    """The K patches with the largest column sums of visual attention in the middle layers, averaged over heads."""

    needs = ("middle_mean",)
    settings_used = ("num_regions", "sap_layers")
    over_heads = "mean"

    def __init__(self, settings: MergeConfig) -> None:
        super().__init__(settings)
        if settings.sap_layers:
            self.needs = (f"{self.over_heads}:{settings.sap_layers}",)

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        return keep_best(visual, visual.attention[self.needs[0]], self.settings.num_regions)


class SapMax(SapMean):
    """The same with the largest head in place of the average."""

    needs = ("middle_max",)
    over_heads = "max"
