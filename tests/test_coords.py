"""Token coordinates: a grid by hand, the published grids, and what has no coordinates."""

import pytest
import torch

from samer.config import InputError
from samer.coords import batch_coords, dynamic_grids, visual_coords


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


def test_dynamic_grids_divide_height_and_width():
    """ColQwen2: 14-pixel patches, 2 x 2 of them to a token."""
    image_grid_thw = torch.tensor([[1, 38, 54], [1, 2, 2], [1, 26, 34]])
    grids = dynamic_grids(image_grid_thw, 2)
    assert grids == [(19, 27), (1, 1), (13, 17)]
    assert dynamic_grids(image_grid_thw, 1) == [(38, 54), (2, 2), (26, 34)]
    coords, mask = batch_coords(grids)
    assert coords.shape == (3, 19 * 27, 2)
    assert mask.sum(1).tolist() == [19 * 27, 1, 13 * 17]


@pytest.mark.parametrize("grid", [[2, 4, 4], [1, 3, 4], [1, 4, 3], [0, 4, 4]])
def test_videos_and_grids_that_do_not_divide_are_refused(grid):
    with pytest.raises(InputError, match=f"image grid {grid[0]} x {grid[1]} x {grid[2]} is no still image"):
        dynamic_grids(torch.tensor([[1, 4, 4], grid]), 2)


def test_batch_coords_pads_on_the_right_with_zeros():
    grids = [(2, 2), (3, 4), (1, 5)]
    coords, mask = batch_coords(grids)
    assert coords.shape == (3, 12, 2)
    assert coords.dtype == torch.float32
    assert mask.dtype == torch.bool
    for row, (height, width) in enumerate(grids):
        count = height * width
        assert torch.equal(coords[row, :count], visual_coords(height, width))
        assert (coords[row, count:] == 0).all()
        assert mask[row].tolist() == [True] * count + [False] * (12 - count)


def test_batch_coords_of_equal_grids_has_no_padding():
    coords, mask = batch_coords([(2, 3)] * 4)
    assert torch.equal(coords, visual_coords(2, 3).expand(4, -1, -1))
    assert mask.all()
    with pytest.raises(InputError, match="patch grid of 0 x 2"):
        batch_coords([(2, 3), (0, 2)])
