"""ColPali of transformers: one grid for all pictures, the patches first, a prompt behind them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from samer.retrievers.family import STATES, Family


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
    def vision_tower(self) -> nn.Module:
        """SigLIP."""
        return self.backbone.vision_tower

    def see(self, inputs: dict[str, Tensor]) -> Tensor:
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        return self.vision_tower(pixels).last_hidden_state

    def model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """As `Family.model_inputs`; after a reduced tower its states in the place of the pictures.

        Positions then count the tokens that are left (OURS), as if the picture had as many patches.
        """
        given = super().model_inputs(inputs)
        if STATES in inputs:
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            del given["pixel_values"]
            states = inputs[STATES]
            features = self.backbone.multi_modal_projector(states)
            given["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(states, features)}
            given["position_ids"] = given["attention_mask"].cumsum(1).clamp(min=1)  # PaliGemma counts from 1
        return given

    @property
    def query_start(self) -> int:
        """The processor writes <bos>, a prefix, the text, augmentation tokens."""
        return len(self.processor.tokenizer.bos_token) + len(self.processor.query_prefix)
