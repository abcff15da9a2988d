"""Token coordinates in the unit square, and layouts of batches whose images have grids of their own.

Shape letters: B images, N tokens per image, P patches per image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samer.config import InputError
from samer.settings import whole_number
from samer.tokens import ImageLayout


def visual_coords(height: int, width: int, *, prompt_tokens: int = 0) -> Tensor:
    """Coordinates of a row-major patch grid followed by prompt tokens (METHOD section 1).

    Args:
        height, width: patches per column and per row; ColPali has 32 x 32.
        prompt_tokens: how many non-patch tokens follow; they get (0.5, 0.5). ColPali has 6.

    Returns:
        (height * width + prompt_tokens, 2) float32, (x, y); linspace(0, 1) on each axis.

    Raises:
        InputError: an empty grid, a negative count, or no whole numbers.
    """
    height, width = whole_number("height", height), whole_number("width", width)
    prompt_tokens = whole_number("prompt_tokens", prompt_tokens)
    if height < 1 or width < 1 or prompt_tokens < 0:
        raise InputError(f"a patch grid of {height} x {width} with {prompt_tokens} prompt tokens has no coordinates")
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    patches = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return torch.cat([patches, torch.full((prompt_tokens, 2), 0.5)])


def grid_layout(patches: Tensor, grid: Tensor) -> ImageLayout:
    """The layout of sequences whose image tokens are a row-major grid, whatever stands between and around them.

    Args:
        patches: (B, N) bool, True at image tokens.
        grid: (B, 2) long, rows and columns of each image.

    Raises:
        InputError: an image whose grid has not as many cells as it has image tokens; names it by its row.
    """
    counts = grid.prod(1)
    wrong = (patches.sum(1) != counts).nonzero()
    if len(wrong):
        row = int(wrong[0])
        rows, columns = grid[row].tolist()
        raise InputError(
            f"image {row} of the batch has {int(patches[row].sum())} image tokens, expected {rows * columns} "
            f"({rows} x {columns})"
        )
    order = (~patches).to(torch.uint8).argsort(dim=1, stable=True)  # image tokens first, in order
    width = int(counts.max())
    real = torch.arange(width, device=patches.device) < counts[:, None]  # (B, P)
    source = torch.where(real, order[:, :width], -1)
    coords = torch.full((*patches.shape, 2), 0.5, device=patches.device)
    for rows, columns in grid.unique(dim=0).tolist():
        alike = (grid == torch.tensor([rows, columns], device=grid.device)).all(1)  # (B,)
        place = visual_coords(rows, columns).to(patches.device)
        coords[patches & alike[:, None]] = place.repeat(int(alike.sum()), 1)
    return ImageLayout(coords, patches, grid, source)
