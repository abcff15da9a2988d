"""The vision towers of transformers that can be reduced: where their blocks are, and what a block consists of.

A new one is an entry in `TOWERS`, if its blocks are two halves with a normalisation before each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samer.config import InputError

SEQUENCE, WINDOWS = "sequence", "windows"


@dataclass(frozen=True)
class Block:
    """Names of the parts of a block: x + after(attention(norm1(x))), then x + after(mlp(norm2(x)))."""

    norm1: str
    attention: str
    norm2: str
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower.

    Attributes:
        blocks: dotted name of the list of blocks.
        block: the parts of one.
        specials: tokens before the patches, besides register tokens.
        rope: dotted name of the module that makes rotary positions of a grid; empty: none.
        kind: whether tokens are a sequence or a grid with windows.
    """

    blocks: str
    block: Block
    specials: int
    rope: str = ""
    kind: str = SEQUENCE


_VIT = Block("layernorm_before", "attention", "layernorm_after", ("dropout",), ("dropout",))
_DINO = Block("norm1", "attention", "norm2", ("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
_SIGLIP = Block("layer_norm1", "self_attn", "layer_norm2")
_SAM = Block("layer_norm1", "attn", "layer_norm2")
TOWERS = {  # by the class in transformers
    "ViTModel": Tower("layers", _VIT, 1),
    "DeiTModel": Tower("layers", Block("layernorm_before", "attention", "layernorm_after"), 2),
    "Dinov2Model": Tower("encoder.layer", _DINO, 1),
    "Dinov2Backbone": Tower("encoder.layer", _DINO, 1),
    "Dinov2WithRegistersModel": Tower("encoder.layer", _DINO, 1),
    "Dinov2WithRegistersBackbone": Tower("encoder.layer", _DINO, 1),
    "DINOv3ViTModel": Tower("model.layer", _DINO, 1, "rope_embeddings"),
    "DINOv3ViTBackbone": Tower("model.layer", _DINO, 1, "rope_embeddings"),
    "SiglipVisionModel": Tower("encoder.layers", _SIGLIP, 0),
    "SamVisionEncoder": Tower("layers", _SAM, 0, kind=WINDOWS),
}


def find_tower(model: nn.Module) -> tuple[nn.Module, Tower]:
    """The vision tower in a model, which may be the model itself, and its kind.

    Raises:
        InputError: none that is known here, or several.
    """
    found = [module for module in model.modules() if type(module).__name__ in TOWERS]
    if not found:
        raise InputError(
            f"{type(model).__name__} is or holds no vision tower that can be reduced; there are {', '.join(TOWERS)}"
        )
    if len(found) > 1:
        names = ", ".join(type(each).__name__ for each in found)
        raise InputError(f"{type(model).__name__} holds several vision towers ({names}); give one of them")
    return found[0], TOWERS[type(found[0]).__name__]


def attend(block: nn.Module, names: Block, x: Tensor, bias: Tensor | None, keywords: dict) -> Tensor:
    """A block's first half: (B, N, D) -> (B, N, D)."""
    y = block.get_submodule(names.attention)(getattr(block, names.norm1)(x), attention_mask=bias, **keywords)[0]
    for name in names.after_attention:
        y = getattr(block, name)(y)
    return y + x


def feed(block: nn.Module, names: Block, x: Tensor) -> Tensor:
    """A block's second half: (B, N, D) -> (B, N, D)."""
    y = block.mlp(getattr(block, names.norm2)(x))
    for name in names.after_mlp:
        y = getattr(block, name)(y)
    return y + x


def tower_digest(model: nn.Module) -> str:
    """What tells one tower from another, whatever dtype it is loaded in: of its kind and some values of each weight."""
    tower, _ = find_tower(model)
    digest = hashlib.sha256(type(tower).__name__.encode())
    for name, weight in sorted(tower.named_parameters()):
        few = weight.detach().flatten()[:16].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {few.tolist()}\n".encode())
    return digest.hexdigest()
