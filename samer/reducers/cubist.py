"""CubistMerge (arXiv 2509.21764): merging that leaves a grid a grid, for windows, relative positions and RoPE.

A row of N tokens loses exactly r: tokens at odd places (from 0) may merge into a neighbour, the more similar of the
two, and the r of them that are most similar to theirs do. A merged token has in every dimension the value of the
largest magnitude. Columns are taken out of every row first, then rows out of every column of what is left.

The largest magnitude is over all that merge into one token, two at most, and itself, as intended; the public code loses
one of two. OURS: of equally similar neighbours the left one, of equally similar tokens the one more to the left; of
values of equal magnitude that of the destination, then of its left neighbour.

Shape letters: B images, H rows, W columns, M rows of tokens, N tokens in a row, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from samer.config import InputError, ReduceConfig
from samer.reducers.base import Reducer, Tokens


def reduce_rows(x: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Takes exactly r tokens out of each row.

    Args:
        x: (M, N, D).
        r: at most N // 2.

    Returns:
        y (M, N - r, D), in order; source (M, N) long, the place in its row of `y` that each token went to.

    Raises:
        InputError: a row has less than r tokens that can merge.
    """
    count, half = x.shape[1], x.shape[1] // 2
    if not 0 <= r <= half:
        raise InputError(f"a row of {count} tokens can lose 0 to {half} of them, not {r}; take less")
    places = torch.arange(count, device=x.device).expand(x.shape[:2])
    if not r:
        return x, places
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    similar = F.cosine_similarity(exact[:, :-1], exact[:, 1:], dim=-1)  # (M, N - 1)
    if count % 2 == 0:
        similar = F.pad(similar, (0, 1), value=-torch.inf)  # the last token has no right neighbour
    best, side = similar.unflatten(1, (half, 2)).max(-1)  # of the token at 2k + 1: 0 left, 1 right
    chosen = best.argsort(dim=1, descending=True, stable=True)[:, :r]
    merges = torch.zeros_like(best, dtype=torch.bool).scatter_(1, chosen, True)  # (M, half)
    left, right = merges & (side == 0), merges & (side == 1)
    even, odd = x[:, ::2], x[:, 1::2]
    # the token at 2j takes from 2j - 1, where that goes right, and from 2j + 1, where that goes left
    width = even.shape[1]
    from_left = F.pad(odd, (0, 0, 1, 0))[:, :width], F.pad(right, (1, 0))[:, :width]
    from_right = F.pad(odd, (0, 0, 0, 1))[:, :width], F.pad(left, (0, 1))[:, :width]
    for value, wanted in (from_left, from_right):
        even = torch.where(wanted[..., None] & (value.abs() > even.abs()), value, even)
    whole = x.clone()
    whole[:, ::2] = even
    removed, target = torch.zeros_like(places, dtype=torch.bool), places.clone()
    removed[:, 1::2] = merges
    target[:, 1::2] += torch.where(merges, 2 * side - 1, 0)
    kept = removed.to(torch.uint8).argsort(dim=1, stable=True)[:, : count - r]
    y = whole.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
    return y, ((~removed).cumsum(1) - 1).gather(1, target)


def reduce_grid(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Takes columns out of every row, then rows out of every column; each row and column chooses for itself.

    Args:
        x: (B, H, W, D).
        rows: r_h, rows fewer, at most H // 2.
        columns: r_w, columns fewer, at most W // 2.

    Returns:
        y (B, H - r_h, W - r_w, D); source (B, H * W) long, the flat place in `y` that each cell went to.

    Raises:
        InputError: more than the grid can lose.
    """
    images, height, width = x.shape[:3]
    y, column = reduce_rows(x.flatten(0, 1), columns)  # source (B * H, W)
    y = y.unflatten(0, (images, height)).transpose(1, 2)  # (B, W - r_w, H, D)
    y, row = reduce_rows(y.flatten(0, 1), rows)  # source (B * (W - r_w), H)
    y = y.unflatten(0, (images, width - columns)).transpose(1, 2)
    column = column.view(images, height, width)
    row = row.view(images, width - columns, height).transpose(1, 2)  # (B, H, W - r_w)
    return y, (row.gather(2, column) * (width - columns) + column).flatten(1)


def reduce_windows(x: Tensor, window: int, r: int) -> tuple[Tensor, Tensor]:
    """Takes r rows and columns out of each window of a grid, so that all windows stay windows (OURS).

    Windows stand from the first row and column on, as SAM cuts them; those at the end may be smaller, and lose as much.

    Args:
        x: (B, H, W, D).
        window: rows and columns of a window.
        r: rows and columns that each loses.

    Returns:
        y (B, H', W', D), which windows of `window` - r cut alike; source (B, H * W) long, as `reduce_grid`.

    Raises:
        InputError: a window that can't lose as much.
    """
    images, height, width, _ = x.shape
    for name, length in (("rows", height), ("columns", width)):
        small = min(length % window or window, length)
        if r > small // 2:
            raise InputError(
                f"a grid of {length} {name} in windows of {window} has one of {small}, which can lose {small // 2}, "
                f"not {r}: the grid would not be whole; take less"
            )
    down, across = -(-height // window), -(-width // window)  # windows
    left = window - r
    y = x.new_empty(images, height - down * r, width - across * r, x.shape[3])
    place = torch.empty(images, height, width, dtype=torch.long, device=x.device)
    for rows in _parts(height, window):  # whole windows and the smaller ones at the end, at most two parts each way
        for columns in _parts(width, window):
            size = min(window, rows.stop - rows.start), min(window, columns.stop - columns.start)
            part = x[:, rows, columns].unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
            many = part.shape[1], part.shape[3]  # windows of this size, down and across
            found, source = reduce_grid(part.transpose(2, 3).flatten(0, 2), r, r)
            found = found.unflatten(0, (images, *many)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
            top, first = rows.start // window * left, columns.start // window * left
            y[:, top : top + found.shape[1], first : first + found.shape[2]] = found
            row, column = source // (size[1] - r), source % (size[1] - r)
            steps = (
                torch.arange(many[0], device=x.device)[:, None, None],
                torch.arange(many[1], device=x.device)[:, None],
            )
            row = top + steps[0] * left + row.unflatten(0, (images, *many))
            column = first + steps[1] * left + column.unflatten(0, (images, *many))
            cells = (row * y.shape[2] + column).unflatten(3, size).transpose(2, 3).flatten(3, 4).flatten(1, 2)
            place[:, rows, columns] = cells
    return y, place.flatten(1)


def unmerge(y: Tensor, source: Tensor) -> Tensor:
    """Every cell with the token that it went to.

    Args:
        y: (B, N, D), reduced tokens.
        source: (B, P) long.

    Returns:
        (B, P, D).
    """
    return y.gather(1, source[..., None].expand(-1, -1, y.shape[2]))


class Cubist(Reducer):
    """r rows and r columns out of the grid, before one block or several."""

    grid = True

    def __init__(self, settings: ReduceConfig, blocks: int) -> None:
        """As `Reducer`; it merges once, before block 1, if `layers` says nothing, as the published DeiT does."""
        super().__init__(settings, blocks)
        if settings.r and not settings.layers:
            self.layers = frozenset({min(1, blocks - 1)})

    def step(self, layer: int, x: Tensor, tokens: Tokens, keys: Tensor | None) -> Tensor:
        """As `Reducer.step`; a share is one of the rows and of the columns that are left."""
        rows, columns = (self.amount(length) for length in tokens.grid)
        y, source = reduce_grid(x.unflatten(1, tokens.grid), rows, columns)
        grid = y.shape[1], y.shape[2]
        tokens.merge(source, grid[0] * grid[1], grid)
        return y.flatten(1, 2)


def _parts(length: int, window: int) -> list[slice]:
    """Whole windows, and what is left at the end."""
    whole = length // window * window
    return [part for part in (slice(0, whole), slice(whole, length)) if part.stop > part.start]
