"""SAP (arXiv 2601.20107; METHOD section 7): keep the patches that the other patches look at."""

from __future__ import annotations

from torch import Tensor

from samer.compressors.base import Compressor, keep_best
from samer.tokens import MergedTokens, VisualTokens


class SapMean(Compressor):
    """The K patches with the largest column sums of visual attention in the middle layers, averaged over heads."""

    needs = ("middle_mean",)

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        return keep_best(visual, visual.attention[self.needs[0]], self.settings.num_regions)


class SapMax(SapMean):
    """The same with the largest head in place of the average."""

    needs = ("middle_max",)
