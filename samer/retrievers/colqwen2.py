"""ColQwen2 of transformers: a grid that depends on the picture, and positions that transformers loses on the way.

Qwen2-VL turns a token by three positions: time, row and column for those of a picture, the same number three times for
those of a text. `ColQwen2ForRetrieval.forward` keeps `image_grid_thw` from the model that works them out (seen in
transformers 5.3 to 5.24), and without them that model counts tokens from left to right, and says nothing. So the
positions of pictures are worked out here, by that model's own `get_rope_index`, and handed through.

Shape letters: B images, N tokens per image, M query tokens."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from PIL import Image
from torch import Tensor

from samer.retrievers.family import Family, RefusedPicture

MOST_TOKENS = 768  # of a picture: as it was trained; the released processor's file would allow 16,384
MOST_LENGTHY = 200  # times as long as wide, or as wide as long: Qwen2-VL's processor takes no more
MODEL_MASK = "model_mask"  # in the inputs of pictures: the processor's attention mask, which counts the prompt


class ColQwen2(Family):
    """`vidore/colqwen2-v1.0-hf` and its like: a Qwen2-VL, whose patches alone are tokens of a picture.

    Of `image_inputs`, `attention_mask` holds the patches: the prompt around them is seen by the model, and then dropped
    (METHOD section 1).
    """

    architecture = "ColQwen2ForRetrieval"
    processor_class = "ColQwen2Processor"
    model_type = "colqwen2"
    required = ("image_grid_thw",)
    settings = MappingProxyType({"backend": "pil", "most_tokens": MOST_TOKENS})

    @classmethod
    def load_processor(cls, name: str, **where: Any) -> Any:
        """As `Family.load_processor`; pictures have `MOST_TOKENS` tokens at most, fewer where its files say so."""
        processor = super().load_processor(name, **where)
        pictures = processor.image_processor
        side = pictures.patch_size * pictures.merge_size  # of a token's square, in pixels
        most = min(pictures.size["longest_edge"], MOST_TOKENS * side**2)
        pictures.size = {"shortest_edge": pictures.size["shortest_edge"], "longest_edge": most}
        return processor

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """As `Family.image_inputs`, and what the model attends to.

        Raises:
            RefusedPicture: one that is longer than its processor takes.
        """
        for number, image in enumerate(images):
            if max(image.size) > MOST_LENGTHY * min(image.size):
                reason = f"is {image.width} x {image.height} pixels; one side may be {MOST_LENGTHY} times the other"
                raise RefusedPicture(number, f"{reason}, cut it in parts")
        inputs = super().image_inputs(images)
        patches = inputs["input_ids"] == self.image_token_id
        return {**inputs, MODEL_MASK: inputs["attention_mask"], "attention_mask": patches.long()}

    def model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """As `Family.model_inputs`, for pictures with their positions."""
        # of whatever used the model before: Qwen2-VL would shift the positions of queries by it
        self.backbone.rope_deltas = None
        given = super().model_inputs(inputs)
        if "image_grid_thw" in inputs:
            given["attention_mask"] = given.pop(MODEL_MASK)
            given["position_ids"] = self.positions(inputs).to(self.model.device)
        return given

    def positions(self, inputs: dict[str, Tensor]) -> Tensor:
        """Time, row and column of each token of pictures, (3, B, N) long, as Qwen2-VL was trained with; 0 at padding.

        Those of a picture begin where the prompt before it ended, and the prompt behind it goes on after the largest.
        """
        ids = inputs["input_ids"]
        found, _ = self.backbone.get_rope_index(
            ids,
            mm_token_type_ids=(ids == self.image_token_id).int(),
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs[MODEL_MASK],
        )
        return found

    def grids(self, inputs: dict[str, Tensor]) -> Tensor:
        """Rows and columns after the merge of patches inside the vision tower, (B, 2) long."""
        return inputs["image_grid_thw"][:, 1:] // self.model.config.vlm_config.vision_config.spatial_merge_size
