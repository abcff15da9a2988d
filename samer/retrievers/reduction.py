"""What a retriever is given once its reduced vision tower has run: fewer patches, and where they stand.

Shape letters: B images, N tokens per image, P patches, n what is left of them, L blocks of the tower."""

from __future__ import annotations

import torch
from torch import Tensor

from samer.config import InputError, ReduceConfig
from samer.reducers.base import Tokens
from samer.reducers.running import reduced
from samer.retrievers.family import STATES, Family
from samer.tokens import ImageLayout


def reduced_inputs(family: Family, settings: ReduceConfig, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with the tower's tokens: all that a model of this family still has to compute from.

    Where the tower unmerges, every patch is there and nothing else changes. Else the language model gets as many
    placeholders as the image with the most tokens, masked where another has fewer, and the layout says where they are.

    Args:
        family: with a vision tower.
        settings: of the reduction.
        inputs: of the processor, a picture an image.

    Returns:
        The inputs, and `vision_states` (B, n, W), `layer_tokens` (B, L) long; where patches merged `coords`, `patches`,
        `grid`, `source`, as in `ImageLayout`.
    """
    with reduced(family.vision_tower, settings) as run:
        states = family.see(inputs)
    tokens = run.tokens
    layout = family.layout(inputs)
    if layout.source.shape != tokens.source.shape:
        raise InputError(f"{family.architecture}: its tower sees another grid than its processor says")
    found = {**inputs, STATES: states, "layer_tokens": torch.stack(tokens.counts, dim=1)}
    if settings.unmerge or not tokens.merged:
        return found
    layout = ImageLayout(*(value.to(states.device) for value in vars(layout).values()))
    return {**found, **_shortened(inputs, layout, tokens)}


def _shortened(inputs: dict[str, Tensor], layout: ImageLayout, tokens: Tokens) -> dict[str, Tensor]:
    """The sequences (B, N) without the placeholders that no token is left for, and the layout of what stays."""
    device, count = layout.source.device, tokens.sizes.shape[1]
    shape = layout.patches.shape
    number = torch.full(shape, -1, device=device)  # which patch stands where
    order = torch.arange(layout.source.shape[1], device=device).expand_as(layout.source)
    number.scatter_(1, layout.source, order)
    kept = (number < count).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    kept = kept[:, : shape[1] - layout.source.shape[1] + count]  # (B, N'), in order
    found = {
        name: value.to(device).gather(1, kept)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == shape
    }
    slots = (number.gather(1, kept) >= 0).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    real = tokens.sizes > 0  # (B, n)
    places = layout.coords.gather(1, layout.source[..., None].expand(-1, -1, 2))  # (B, P, 2)
    coords = torch.full((*kept.shape, 2), 0.5, device=device)
    means = torch.where(real[..., None], tokens.mean_places(places), 0.5)
    found["attention_mask"] = found["attention_mask"].scatter(1, slots, real.to(found["attention_mask"].dtype))
    return {
        **found,
        "coords": coords.scatter(1, slots[..., None].expand(-1, -1, 2), means),
        "patches": torch.zeros(kept.shape, dtype=torch.bool, device=device).scatter(1, slots, real),
        "grid": layout.grid,
        "source": slots.gather(1, tokens.source),
    }
