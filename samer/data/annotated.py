"""What readers of annotated pictures share: boxes in pixels to shares, and whether they belong to a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from samer.data.pictures import PictureError, displayed_size
from samer.data.reader import Defects
from samer.data.records import LONGEST_CAPTION, Box
from samer.data.sizes import Size, shape_of

# what is left out or doubted, as it is told at the end of a load
BAD_BOXES = "{count} boxes of {files} images are empty, inverted or outside the picture, and left out"
OTHER_SHAPE = "{files} pictures have another shape than what was annotated, and their boxes are left out"
STRETCHED = (
    "{files} pictures, or what was annotated, were stretched to a square; boxes are taken as shares of the picture"
)
LONG_CAPTIONS = f"{{count}} captions of {{files}} images are cut to {LONGEST_CAPTION:,} characters"


def box_shares(corners: Sequence[float], size: Size) -> Box | None:
    """A box as shares of the picture; up to one pixel outside is clamped.

    Args:
        corners: x1, y1, x2, y2 in pixels, edges counted from 0.
        size: width and height of what was annotated.

    Returns:
        None where it is empty, inverted or further outside.
    """
    (x1, y1, x2, y2), (width, height) = corners, size
    outside = min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    return None if outside or x2 <= x1 or y2 <= y1 else (x1 / width, y1 / height, x2 / width, y2 / height)


def boxes_fit(path: str | Path, picture: Path, annotated: Size, defects: Defects) -> bool:
    """Whether boxes can be used on a picture, by the shapes of both; what speaks against it goes to `defects`.

    The size must be that of the picture as it is displayed, since that is how it is decoded.

    Args:
        path: what `defects` names.
        picture: the file; one that can't be read fits, as whoever decodes it says what is wrong.
        annotated: width and height.
    """
    try:
        size = displayed_size(picture)
    except PictureError:
        return True
    shape = shape_of(size, annotated)
    if shape != "same":
        message = (
            f"a picture of {annotated[0]:g} x {annotated[1]:g} was annotated, and {picture.name} is displayed as "
            f"{size[0]} x {size[1]}; restore one of them"
        )
        square = shape == "square"
        defects.add(STRETCHED if square else OTHER_SHAPE, path, message, harmless=square)
    return shape != "other"
