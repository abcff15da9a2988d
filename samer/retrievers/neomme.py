"""NeoMME of transformers: one encoder for words and patches, pictures in their native grid, prompts by chat template.

Shape letters: B images or texts, N tokens, M query tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from samer.config import InputError
from samer.coords import grid_layout
from samer.retrievers.family import Family
from samer.tokens import ImageLayout

ORIGIN = 2  # the row and the column of the first patch: <doc> and <img> come before
# Of a picture, in patches; OURS, as the released processor's file sets no limit. With the ceilings of a grid, a <row>
# behind each row, <doc> and <img> a picture has at most 1,780 + 2 * 96 + 1,780 / 96 + 4 < 2,000 tokens.
MOST_PATCHES, LONGEST_SIDE = 1780, 96


class NeoMME(Family):
    """`Hcompany/NeoMME-260M` and its like: <doc> <img>, then each row's patches and a <row> behind them.

    The processor pads a picture with black below and on the right, to whole patches; the grid covers that as well. It
    has no picture pipeline but torchvision's.
    """

    architecture = "NeoMMEForRetrieval"
    processor_class = "NeoMMEProcessor"
    model_type = "neomme"
    projection = "multi_vector_head.proj"
    options: Mapping[str, Any] = {"output_dense": False}
    required = ("position_ids",)  # else patches get the positions of words
    settings: Mapping[str, Any] = {
        "backend": "torchvision",
        "most_patches": MOST_PATCHES,
        "longest_side_patches": LONGEST_SIDE,
    }

    @classmethod
    def load_processor(cls, name: str, **where: Any) -> Any:
        """As `Family.load_processor`; larger pictures are scaled to `MOST_PATCHES`, or less where its files say so.

        Raises:
            InputError: torchvision is not installed.
        """
        if find_spec("torchvision") is None:
            raise InputError("torchvision prepares its pictures, and is not installed: pip install torchvision")
        processor = super().load_processor(name, **where)
        pictures = processor.image_processor
        size, side = dict(pictures.size or {}), pictures.patch_size
        most = min(size.get("max_pixels") or MOST_PATCHES * side**2, MOST_PATCHES * side**2)
        pictures.size = {"min_pixels": size.get("min_pixels") or 1, "max_pixels": most}
        pictures.max_side = min(pictures.max_side or LONGEST_SIDE * side, LONGEST_SIDE * side)
        return processor

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    @property
    def backbone(self) -> nn.Module:
        return self.model.model

    @property
    def language_model(self) -> nn.Module:
        return self.backbone

    @property
    def attentions(self) -> tuple[Any, list[nn.Module]]:
        """Layers that attend within a window are left out: they say nothing of the whole picture."""
        config, modules = super().attentions
        return config, self.whole_attention(config, modules)

    @cached_property
    def query_start(self) -> int:
        """How many characters the template writes before a text, found by writing one that no template holds."""
        mark = "\x01"  # no space, which a template may cut off
        return self._prompts([mark])[0].index(mark)

    @property
    def processing(self) -> dict[str, str]:
        """As `Family.processing`; the side of a patch, the longest side, and prompts as the template writes them."""
        pictures = self.processor.image_processor
        page = [{"role": "user", "content": [{"type": "image"}]}]
        return {
            **super().processing,
            "patch_size": str(pictures.patch_size),
            "longest_side": str(pictures.max_side),
            "document_prompt": self.processor.apply_chat_template(page, task="document", tokenize=False),
            "query_prompt": self._prompts(["{query}"])[0],
        }

    def _prompts(self, texts: Sequence[str]) -> list[str]:
        return self.processor.apply_chat_template(_queries(texts), task="query", tokenize=False)

    def text_inputs(self, texts: list[str]) -> dict[str, Tensor]:
        """As `Family.text_inputs`; a template may cut off the space around a text."""
        inputs = self._apply(_queries(texts), "query", return_offsets_mapping=True)
        start = self.query_start
        for row, (text, prompt) in enumerate(zip(texts, self._prompts(texts))):
            if not prompt.startswith(text, start):
                places = inputs["offset_mapping"][row]  # (M, 2)
                own = (places[:, 1] > start) & (places[:, 0] < start + len(text.strip()))
                places[own] += len(text) - len(text.lstrip())
                places[~own] = 0
        return inputs

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        pages = [[{"role": "user", "content": [{"type": "image", "image": image}]}] for image in images]
        return self._apply(pages, "document")

    def _apply(self, conversations: list[list[dict]], task: str, **options: Any) -> dict[str, Tensor]:
        options = {"padding": True, "return_tensors": "pt", **options}
        found = self.processor.apply_chat_template(
            conversations, task=task, tokenize=True, return_dict=True, processor_kwargs=options
        )
        return {name: value for name, value in found.items() if name != "token_type_ids"}

    def _patches(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, N) bool: the first <img> behind <doc> is a mark and no patch."""
        ids = inputs["input_ids"]
        marked = torch.zeros_like(ids, dtype=torch.bool)
        marked[:, 1:] = ids[:, :-1] == self.model.config.document_token_id
        return (ids == self.image_token_id) & ~marked

    def grids(self, inputs: dict[str, Tensor]) -> Tensor:
        """By the positions of the last patch, which the processor counts from `ORIGIN`."""
        places = inputs["position_ids"].masked_fill(~self._patches(inputs), 0)  # (2, B, N)
        return (places.amax(2) + 1 - ORIGIN).clamp(min=0).T

    def layout(self, inputs: dict[str, Tensor]) -> ImageLayout:
        return grid_layout(self._patches(inputs), self.grids(inputs))


def _queries(texts: Sequence[str]) -> list[list[dict]]:
    return [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
