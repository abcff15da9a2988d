"""Token coordinates: a grid by hand, the published one, several in a batch, and what has no coordinates."""

import numpy as np
import pytest
import torch

from samer.config import InputError
from samer.coords import grid_layout, visual_coords


def test_two_rows_of_three_and_two_prompt_tokens_by_hand():
    expected = [[0, 0], [0.5, 0], [1, 0], [0, 1], [0.5, 1], [1, 1], [0.5, 0.5], [0.5, 0.5]]
    coords = visual_coords(2, 3, prompt_tokens=2)
    assert coords.dtype == torch.float32
    assert coords.tolist() == expected


def test_colpali_has_1024_patches_row_major_and_6_prompt_tokens():
    coords = visual_coords(32, 32, prompt_tokens=6)
    assert coords.shape == (1030, 2)
    axis = torch.linspace(0, 1, 32)
    for row, column in ((0, 0), (0, 31), (1, 0), (17, 5), (31, 31)):
        assert coords[32 * row + column].tolist() == [axis[column].item(), axis[row].item()]
    assert (coords[1024:] == 0.5).all()
    assert coords.min() == 0
    assert coords.max() == 1


def test_a_single_row_or_patch_stands_at_zero():
    assert visual_coords(1, 1).tolist() == [[0, 0]]
    assert visual_coords(1, 3).tolist() == [[0, 0], [0.5, 0], [1, 0]]
    assert visual_coords(3, 1).tolist() == [[0, 0], [0, 0.5], [0, 1]]


@pytest.mark.parametrize(("height", "width", "prompt_tokens"), [(0, 3, 0), (3, 0, 0), (-1, 3, 0), (3, 3, -1)])
def test_an_empty_grid_is_refused(height, width, prompt_tokens):
    with pytest.raises(InputError, match=f"patch grid of {height} x {width} with {prompt_tokens} prompt tokens"):
        visual_coords(height, width, prompt_tokens=prompt_tokens)


# --- layouts of several grids in a batch ----------------------------------------------------------------------------

GRIDS = [(3, 5), (4, 2), (1, 1), (3, 5)]


def written(grids, seed=0):
    """Sequences with prompt tokens before, between and after the patches, and each one's patch positions in order."""
    rng = np.random.default_rng(seed)
    counts = [rows * columns for rows, columns in grids]
    patches = torch.zeros(len(grids), max(counts) + 6, dtype=torch.bool)
    places = [sorted(rng.permutation(count + 4)[:count].tolist()) for count in counts]
    for row, own in zip(patches, places):
        row[own] = True
    return patches, places


@pytest.mark.parametrize("seed", range(5))
def test_a_layout_equals_a_loop_over_patches(seed):
    patches, places = written(GRIDS, seed)
    layout = grid_layout(patches, torch.tensor(GRIDS))
    assert torch.equal(layout.patches, patches)
    assert layout.grid.tolist() == [list(grid) for grid in GRIDS]
    assert (layout.coords.dtype, layout.coords.shape) == (torch.float32, (*patches.shape, 2))
    assert (layout.source.dtype, layout.source.shape) == (torch.long, (4, 15))
    for image, (rows, columns) in enumerate(GRIDS):
        across, down = torch.linspace(0, 1, columns), torch.linspace(0, 1, rows)
        own = places[image]
        for patch, token in enumerate(own):
            row, column = divmod(patch, columns)
            assert layout.coords[image, token].tolist() == [across[column].item(), down[row].item()]  # to the bit
        others = [token for token in range(patches.shape[1]) if token not in own]
        assert (layout.coords[image, others] == 0.5).all()
        assert layout.source[image].tolist() == own + [-1] * (15 - len(own))


def test_colpalis_layout_is_its_coordinates():
    patches = (torch.arange(1030) < 1024).expand(2, -1)
    layout = grid_layout(patches, torch.tensor([[32, 32], [32, 32]]))
    assert torch.equal(layout.coords, visual_coords(32, 32, prompt_tokens=6).expand(2, -1, -1))
    assert torch.equal(layout.source, torch.arange(1024).expand(2, -1))


@pytest.mark.parametrize(("wrong", "count"), [((3, 4), 15), ((5, 4), 15), ((2, 2), 15)])
def test_another_number_of_image_tokens_than_cells_is_refused(wrong, count):
    patches, _ = written(GRIDS)
    rows, columns = wrong
    words = f"image 3 of the batch has {count} image tokens, expected {rows * columns} \\({rows} x {columns}\\)"
    with pytest.raises(InputError, match=words):
        grid_layout(patches, torch.tensor([*GRIDS[:3], wrong]))


def test_a_layout_of_an_empty_grid_is_refused():
    with pytest.raises(InputError, match="patch grid of 0 x 3"):
        grid_layout(torch.zeros(1, 4, dtype=torch.bool), torch.tensor([[0, 3]]))
