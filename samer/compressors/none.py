"""No compression: every token is kept, whatever the budget. The upper row of every table, and the training control."""

from __future__ import annotations

from torch import Tensor

from samer.compressors.base import Compressor
from samer.merging import keep_tokens
from samer.tokens import MergedTokens, VisualTokens


class NoCompression(Compressor):
    """All N tokens."""

    settings_used = ()

    def places(self, count: int) -> int:
        return count

    def compress(self, visual: VisualTokens, instance_labels: Tensor | None) -> MergedTokens:
        return keep_tokens(visual.tokens, visual.coords, visual.mask)
