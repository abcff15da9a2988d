"""ColPali of transformers: one grid for all pictures, the patches first, a prompt behind them."""

from __future__ import annotations

from typing import Any

from torch import nn

from samer.retrievers.family import Family


class ColPali(Family):
    """`vidore/colpali-v1.3-hf` and its like: a PaliGemma, a square picture, and prompt tokens after its patches."""

    architecture = "ColPaliForRetrieval"
    processor_class = "ColPaliProcessor"
    model_type = "colpali"
    required = ("token_type_ids",)  # they keep PaliGemma's attention full; without them it turns causal

    def __init__(self, model: nn.Module, processor: Any) -> None:
        super().__init__(model, processor)
        vision = model.config.vlm_config.vision_config
        side = vision.image_size // vision.patch_size
        self.grid = (side, side)

    @property
    def query_start(self) -> int:
        """The processor writes <bos>, a prefix, the text, augmentation tokens."""
        return len(self.processor.tokenizer.bos_token) + len(self.processor.query_prefix)
