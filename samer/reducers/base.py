"""What every reducer is, and what is known of a tower's tokens while it runs.

Shape letters: B images, N tokens now, P patches, D width."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from samer.config import InputError, ReduceConfig


@dataclass
class Tokens:
    """The patch tokens of one pass through a tower: which patches each holds.

    Attributes:
        source: (B, P) long, the token of each patch.
        sizes: (B, N) float, patches in each token; 0 at padding.
        grid: rows and columns, while the tokens are a grid; else None.
        mask: (B, N) bool, real tokens, all before the padding; None: all are.
        merged: whether any two have merged.
        counts: (B,) long a block, the tokens that leave it.
        similarity: (B,) float a block, what AdaMerge's rate is about, where it was asked for.
    """

    source: Tensor
    sizes: Tensor
    grid: tuple[int, int] | None
    mask: Tensor | None = None
    merged: bool = False
    counts: list[Tensor] = field(default_factory=list)
    similarity: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of_grid(cls, images: int, rows: int, columns: int, device: torch.device) -> Tokens:
        """All patches of a batch, a token each."""
        source = torch.arange(rows * columns, device=device).expand(images, -1)
        return cls(source, torch.ones(source.shape, device=device), (rows, columns))

    @property
    def number(self) -> Tensor:
        """(B,) long, tokens of each image now."""
        if self.mask is not None:
            return self.mask.sum(1)
        return torch.full((len(self.sizes),), self.sizes.shape[1], device=self.sizes.device)

    def merge(self, source: Tensor, count: int, grid: tuple[int, int] | None = None) -> None:
        """Notes a merge.

        Args:
            source: (B, N) long, where each token went, -1 at padding.
            count: N afterwards, of the image with the most.
            grid: rows and columns afterwards.
        """
        self.source = source.gather(1, self.source)
        ones = torch.ones(self.source.shape, device=source.device)
        self.sizes = torch.zeros(len(source), count, device=source.device).scatter_add(1, self.source, ones)
        real = self.sizes > 0
        self.mask, self.grid, self.merged = (None if bool(real.all()) else real), grid, True

    def mean_places(self, places: Tensor) -> Tensor:
        """The mean place (B, N, 2) of each token's patches, which stand at (P, 2) or (B, P, 2); 0 at padding."""
        index = self.source[..., None].expand(-1, -1, 2)
        sums = torch.zeros(*self.sizes.shape, 2, device=places.device)
        sums = sums.scatter_add(1, index, places.expand(len(index), -1, -1).to(sums.dtype))
        return sums / self.sizes.clamp(min=1)[..., None]

    def spread(self, x: Tensor) -> Tensor:
        """Every patch with its token: (B, N, D) -> (B, P, D)."""
        return x.gather(1, self.source[..., None].expand(-1, -1, x.shape[2]))

    def collect(self, x: Tensor) -> Tensor:
        """Undoes `spread`: (B, P, D) -> (B, N, D), 0 at padding."""
        patches = torch.arange(self.source.shape[1], device=x.device).expand_as(self.source)
        one = torch.zeros(self.sizes.shape, dtype=torch.long, device=x.device).scatter(1, self.source, patches)
        found = x.gather(1, one[..., None].expand(-1, -1, x.shape[2]))
        return found if self.mask is None else torch.where(self.mask[..., None], found, 0)


class Reducer:
    """One way to merge the patch tokens of a tower, block by block.

    Attributes:
        between: merges between a block's attention and its MLP, on what `keys` are like; else before the block.
        proportional: attention counts a token as often as it holds patches.
        grid: leaves a grid.
        used: the settings that it uses.
        layers: the blocks at which it merges.
    """

    between = False
    proportional = False
    grid = False
    used: tuple[str, ...] = ("r", "layers", "unmerge")

    def __init__(self, settings: ReduceConfig, blocks: int) -> None:
        """`blocks`: how many the tower has.

        Raises:
            InputError: a block that is not there.
        """
        self.settings = settings
        wrong = [layer for layer in settings.layers if layer >= blocks]
        if wrong:
            raise InputError(f"reduce.layers names block {wrong[0]}; the tower has {blocks}, from 0 to {blocks - 1}")
        self.layers = frozenset(settings.layers or range(blocks)) if settings.r else frozenset()

    def step(self, layer: int, x: Tensor, tokens: Tokens, keys: Tensor | None) -> Tensor:
        """Merges at a block and notes it in `tokens`.

        Args:
            layer: of the block, one of `layers`.
            x: (B, N, D), patch tokens.
            tokens: what they are.
            keys: (B, N, any), the mean over heads of the attention's keys, where `between`.
        """
        raise NotImplementedError

    def amount(self, whole: int) -> int:
        """`r` of so many: itself, or that share, rounded."""
        r = self.settings.r
        return int(r) if r >= 1 else round(r * whole)


class NoReduction(Reducer):
    """The tower as it is."""

    used = ()

    def __init__(self, settings: ReduceConfig, blocks: int) -> None:
        super().__init__(settings, blocks)
        self.layers = frozenset()
