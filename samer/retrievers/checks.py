"""What a retriever must show when it is loaded: that it is trained at all, and that model and processor agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from samer.config import InputError
from samer.retrievers.base import Projector
from samer.runtime.commands import is_memory
from samer.tokens import ImageLayout, VisualTokens

NOISE = (96, 64)  # pixels of the pictures that are tried, where the family does not scale them to one size
ALIKE = 1e-4  # components of unit tokens; of pictures that a model sees at all they differ by 0.01 and more


class Loaded(Protocol):
    """What is needed of a retriever."""

    name: str
    base_projector: Projector
    picture_size: tuple[int, int] | None

    def image_inputs(self, images: Sequence[Image.Image]) -> dict[str, Tensor]: ...
    def reduced(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]: ...
    def image_layout(self, inputs: dict[str, Tensor]) -> ImageLayout: ...
    def encode_images(self, inputs: dict[str, Tensor]) -> VisualTokens: ...


def check_model(retriever: Loaded, pictures: bool = True) -> None:
    """Refuses a retriever whose tokens would say nothing: a projection or a model without content.

    Such files exist: a base without its adapter, weights under other names. It runs on two small pictures of noise,
    unless it is for texts alone (`pictures` is False): then only the projection is looked at.

    Raises:
        InputError: all rows of the projection are equal; tokens of two pictures are equal; a picture has not as many
            image tokens as its grid has cells; the model does not take what its processor makes.
    """
    remedy = "use a checkpoint made for this transformers version, or restore its files"
    weight = retriever.base_projector.weight
    if len(weight) > 1 and bool((weight == weight[0]).all()):
        raise InputError(f"model {retriever.name!r}: all rows of its projection are equal; {remedy}")
    if not pictures:
        return
    try:
        inputs = {**retriever.image_inputs(noise(retriever.picture_size or NOISE)), "seeds": torch.arange(2)}
        inputs = retriever.reduced(inputs)
        patches = retriever.image_layout(inputs).patches  # refuses another number of tokens than the grid has cells
        tokens = retriever.encode_images(inputs).tokens
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, InputError) or is_memory(error) or "CUDA" in str(error):
            raise  # of the machine, not of the model
        reason = f"does not take its processor's pictures ({' '.join(str(error).split())[:160]})"
        raise InputError(f"model {retriever.name!r} {reason}; {remedy}") from None
    one, other = (tokens[row][patches[row].to(tokens.device)] for row in (0, 1))
    few = min(len(one), len(other))  # a reducer may leave them different numbers
    if (one[:few] - other[:few]).abs().max() <= ALIKE:  # NaN is refused where hidden states are made
        raise InputError(f"model {retriever.name!r} gives the same tokens for two different pictures; {remedy}")


def noise(size: tuple[int, int]) -> list[Image.Image]:
    """Two pictures of that width and height, the same ones always."""
    points = torch.randint(256, (2, size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [Image.fromarray(picture.numpy()) for picture in points]
