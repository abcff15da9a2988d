"""Parts of splits: what their names say, and what a reader gives for them."""

import pytest

from samer.config import InputError
from samer.data import make_reader


def ids(world, split, **more):
    return [record.image_id for record in make_reader("flickr").load_split(world, split, boxes=False, **more)]


def test_parts_are_slices_of_the_whole_in_its_order(world):
    whole = ids(world, "train")  # 12 images
    assert ids(world, "train[:50%]") == whole[:6]
    assert ids(world, "train[50%:]") == whole[6:]
    assert ids(world, "train[3:7]") == whole[3:7]
    assert ids(world, "train[90%:]") == whole[10:]  # bounds are rounded down
    assert ids(world, "train[:100%]") == whole
    assert ids(world, "train[:]") == whole
    assert ids(world, "train[4:]", limit_images=2) == whole[4:6]


@pytest.mark.parametrize("name", ["train[", "train[5]", "train[:5%%]", "train[-3:]", "[:5]", "train[:5]x"])
def test_what_is_no_part_is_refused_by_name(world, name):
    with pytest.raises(InputError, match="a part is written as"):
        ids(world, name)


def test_an_empty_part_and_an_unknown_split_are_refused(world):
    with pytest.raises(InputError, match="that part of 12 images is empty"):
        ids(world, "train[20:]")
    with pytest.raises(InputError, match="no split 'trian'"):
        ids(world, "trian[:50%]")
