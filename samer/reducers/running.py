"""A vision tower that runs on fewer tokens: for a while, or for good.

    with reduced(tower, ReduceConfig("tome", r=8)) as run:     # any of `towers.TOWERS`, or a model that holds one
        states = tower(pixel_values=pixels).last_hidden_state  # special tokens, then what is left of the patches
    run.tokens.source, run.tokens.sizes, run.tokens.counts     # of that pass: which patch went where

    run = reduce_tower(tower, settings)                        # for good; run.detach() undoes it

Special tokens never merge. One pass at a time, and not with gradient checkpointing, which runs blocks twice.

Rotary positions: a smaller grid (cubist) gets those of a picture of that size; tokens that are no grid (OURS) those of
the mean place of their patches. SAM merges in each window, before whatever block (OURS), so that there are as many
windows as before, each smaller; behind the last block every cell has its token again, and masks keep their size.
SigLIP's pooling head is given every patch.

Shape letters: B images, S special tokens, N patch tokens, P patches, H rows, W columns, D width."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from samer.config import InputError, ReduceConfig
from samer.reducers import reducer_class
from samer.reducers.base import Tokens
from samer.reducers.cubist import reduce_windows
from samer.reducers.towers import WINDOWS, attend, feed, find_tower

ADDS_A_BIAS = ("sdpa", "eager", None)  # attention that takes a bias for each token


@contextmanager
def reduced(model: nn.Module, settings: ReduceConfig):
    """Within the block the vision tower runs on fewer tokens; yields the `Reduced` that says which are which.

    Raises:
        InputError: as `Reduced`.
    """
    run = Reduced(model, settings)
    run.attach()
    try:
        yield run
    finally:
        run.detach()


def reduce_tower(model: nn.Module, settings: ReduceConfig) -> Reduced:
    """As `reduced`, for good."""
    run = Reduced(model, settings)
    run.attach()
    return run


class Reduced:
    """A tower and how it is reduced.

    Attributes:
        tower: the module that takes `pixel_values`.
        reducer: what merges.
        specials: S.
        grid: H and W of the last pass's patches.
        tokens: of the last pass.
    """

    def __init__(self, model: nn.Module, settings: ReduceConfig) -> None:
        """Takes a tower, or a model that holds one.

        Raises:
            InputError: no tower that can be reduced, a reducer that is unknown or does not fit it, attention that
                takes no bias.
        """
        kind = reducer_class(settings.method)
        self.tower, self.layout = find_tower(model)
        self.blocks: list[nn.Module] = list(self.tower.get_submodule(self.layout.blocks))
        self.settings = settings
        self.reducer = kind(settings, len(self.blocks))
        self.specials = self.layout.specials + (getattr(self.tower.config, "num_register_tokens", 0) or 0)
        self.grid = (0, 0)
        self.tokens: Tokens | None = None
        self._hooks: list[Any] = []
        self._before: list[tuple[nn.Module, dict[str, Any]]] = []
        self._keys: Tensor | None = None
        self._windows: dict[int, int] = {}  # the windows' side before each merge
        name, attention = type(self.tower).__name__, getattr(self.tower.config, "_attn_implementation", None)
        if self.layout.kind == WINDOWS and self.reducer.layers and not self.reducer.grid:
            raise InputError(f"{name} attends within windows of a grid, and {settings.method} leaves none; use cubist")
        if self.reducer.layers and attention not in ADDS_A_BIAS:
            raise InputError(f"{name} computes attention by {attention!r}; reduced it needs 'sdpa' or 'eager'")

    def attach(self) -> None:
        """Has the tower run on fewer tokens from now on."""
        if "forward" in vars(self.blocks[0]) and isinstance(self.blocks[0].forward, partial):
            raise InputError(f"{type(self.tower).__name__} is reduced already; undo that first")
        self._hooks.append(self.tower.register_forward_pre_hook(self._start, with_kwargs=True))
        window = getattr(self.tower.config, "window_size", 0)
        run = self._run_grid if self.layout.kind == WINDOWS else self._run
        for number, block in enumerate(self.blocks):
            self._before.append((block, {name: vars(block).get(name) for name in ("forward", "window_size")}))
            if self.layout.kind == WINDOWS and number in self.reducer.layers:
                self._windows[number] = window
                window -= self.reducer.amount(window)
            if self.layout.kind == WINDOWS and block.window_size:
                block.window_size = window
            block.forward = partial(run, number, block.forward)
            if self.reducer.between and number in self.reducer.layers:
                keys = block.get_submodule(self.layout.block.attention).k_proj
                self._hooks.append(keys.register_forward_hook(self._note_keys))
        if isinstance(getattr(self.tower, "head", None), nn.Module):
            self._hooks.append(self.tower.head.register_forward_pre_hook(self._whole))

    def detach(self) -> None:
        """Has the tower run as it was."""
        for hook in self._hooks:
            hook.remove()
        for block, before in self._before:
            for name, value in before.items():
                if value is not None:
                    setattr(block, name, value)
                elif name in vars(block):
                    delattr(block, name)
        self._hooks, self._before = [], []

    def _start(self, _: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
        """Before the tower: all patches of these pictures are tokens."""
        pixels = arguments[0] if arguments else keywords["pixel_values"]
        patch = self.tower.config.patch_size
        high, wide = patch if isinstance(patch, (tuple, list)) else (patch, patch)
        self.grid = pixels.shape[-2] // high, pixels.shape[-1] // wide
        self.tokens = Tokens.of_grid(len(pixels), *self.grid, next(self.tower.parameters()).device)

    def _note_keys(self, _: nn.Module, __: tuple, keys: Tensor) -> None:
        self._keys = keys

    def _whole(self, _: nn.Module, arguments: tuple) -> tuple | None:
        """The pooling head sees every patch, whatever is left of them."""
        if self.tokens.merged and not self.settings.unmerge:
            return (self.tokens.spread(arguments[0]), *arguments[1:])
        return None

    def _run(self, number: int, plain: Any, x: Tensor, attention_mask: Tensor | None = None, **keywords: Any) -> Tensor:
        """A block: (B, S + N, D) in and out, N becoming less; P for N where the tower unmerges."""
        tokens, block = self.tokens, self.blocks[number]
        merges = number in self.reducer.layers
        if attention_mask is not None and self.reducer.layers:
            raise InputError(f"{type(self.tower).__name__}: a reduced tower takes no attention mask of its own")
        if self.reducer.layers and block.training and getattr(block, "gradient_checkpointing", False):
            raise InputError(f"{type(self.tower).__name__}: turn gradient checkpointing off while the tower is reduced")
        if tokens.merged and self.settings.unmerge:
            x = self._beside(x, tokens.collect)
        if merges and not self.reducer.between:
            x = self._beside(x, partial(self.reducer.step, number, tokens=tokens, keys=None))
        if tokens.merged and self.layout.rope:
            keywords["position_embeddings"] = self._rope(x)
        bias = self._bias(x) if tokens.merged else attention_mask
        if merges and self.reducer.between:
            x = attend(block, self.layout.block, x, bias, keywords)
            keys = self._keys[:, self.specials :].unflatten(-1, (self._heads(block), -1)).mean(2)
            x = self._beside(x, partial(self.reducer.step, number, tokens=tokens, keys=keys))
            x = feed(block, self.layout.block, x)
        else:
            x = plain(x, bias, **keywords)
        tokens.counts.append(tokens.number)
        return self._beside(x, tokens.spread) if tokens.merged and self.settings.unmerge else x

    def _run_grid(self, number: int, plain: Any, x: Tensor) -> Tensor:
        """A block of SAM: (B, H, W, D) in and out."""
        tokens = self.tokens
        if number in self.reducer.layers:
            window = self._windows[number]
            x, source = reduce_windows(x, window, self.reducer.amount(window))
            tokens.merge(source, x.shape[1] * x.shape[2], (x.shape[1], x.shape[2]))
        x = plain(x)
        tokens.counts.append(tokens.number)
        if tokens.merged and number == len(self.blocks) - 1:
            x = tokens.spread(x.flatten(1, 2)).unflatten(1, self.grid)
        return x

    def _beside(self, x: Tensor, change: Any) -> Tensor:
        """Patch tokens changed, special tokens kept before them."""
        if not self.specials:
            return change(x)
        return torch.cat([x[:, : self.specials], change(x[:, self.specials :])], dim=1)

    def _bias(self, x: Tensor) -> Tensor | None:
        """What attention adds to its logits, (B, 1, 1, S + N): log(size) where proportional, -inf at padding."""
        tokens = self.tokens
        if not self.reducer.proportional and tokens.mask is None:
            return None
        bias = tokens.sizes.log() if self.reducer.proportional else tokens.sizes.clamp(max=1).log()
        return nn.functional.pad(bias, (self.specials, 0))[:, None, None].to(x.dtype)

    def _heads(self, block: nn.Module) -> int:
        return self._keys.shape[-1] // block.get_submodule(self.layout.block.attention).head_dim

    def _rope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary positions of the tokens that are left."""
        rope, tokens = self.tower.get_submodule(self.layout.rope), self.tokens
        if tokens.grid:
            high, wide = (rope.config.patch_size * side for side in tokens.grid)
            return rope(x.new_empty(0, 0, high, wide))
        down, across = (2 * (torch.arange(side, device=x.device) + 0.5) / side - 1 for side in self.grid)
        places = torch.stack(torch.meshgrid(down, across, indexing="ij"), dim=-1).flatten(0, 1)  # (P, 2), (y, x)
        angles = 2 * math.pi * tokens.mean_places(places)[..., None] * rope.inv_freq  # (B, N, 2, d / 4)
        angles = angles.flatten(2).tile(2)[:, None]  # (B, 1, N, d)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
