"""Token coordinates in the unit square, for fixed and dynamic patch grids.

Shape letters: B images, N tokens per image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samer.config import InputError


def visual_coords(height: int, width: int, *, prompt_tokens: int = 0) -> Tensor:
    """Coordinates of a row-major patch grid followed by prompt tokens (METHOD section 1).

    Args:
        height, width: patches per column and per row; ColPali has 32 x 32.
        prompt_tokens: how many non-patch tokens follow; they get (0.5, 0.5). ColPali has 6.

    Returns:
        (height * width + prompt_tokens, 2) float32, (x, y); linspace(0, 1) on each axis.

    Raises:
        InputError: an empty grid or a negative count.
    """
    if height < 1 or width < 1 or prompt_tokens < 0:
        raise InputError(f"a patch grid of {height} x {width} with {prompt_tokens} prompt tokens has no coordinates")
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    patches = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return torch.cat([patches, torch.full((prompt_tokens, 2), 0.5)])


def dynamic_grids(image_grid_thw: Tensor, spatial_merge_size: int) -> list[tuple[int, int]]:
    """Merged patch grids (height, width) of dynamic-resolution images (METHOD section 1).

    Args:
        image_grid_thw: (B, 3) long, temporal, height and width in patches before the vision tower's own merging.
        spatial_merge_size: patches that become one token, per axis.

    Raises:
        InputError: several frames, or a grid that the merge size does not divide.
    """
    grids = []
    for t, h, w in image_grid_thw.tolist():
        if t != 1 or h % spatial_merge_size or w % spatial_merge_size:
            raise InputError(f"image grid {t} x {h} x {w} is no still image that {spatial_merge_size} divides")
        grids.append((h // spatial_merge_size, w // spatial_merge_size))
    return grids


def batch_coords(grids: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Right-padded coordinates and mask of images whose grids differ.

    Args:
        grids: (height, width) per image.

    Returns:
        coords (B, N, 2) float32 with zeros at padding, mask (B, N) bool; N is the largest height * width.
    """
    rows = [visual_coords(height, width) for height, width in grids]
    coords = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return coords, torch.arange(coords.shape[1]) < lengths[:, None]
