"""Whether a picture is the one that was annotated, as far as the shapes of both tell."""

from __future__ import annotations

Size = tuple[float, float]  # width, height


def same_shape(one: Size, two: Size) -> bool:
    """Whether one of two sizes is the other scaled, each side rounded by up to two pixels.

    A scale s with |w - s W| <= 2 and |h - s H| <= 2 exists if |w H - h W| <= 2 (W + H); likewise the other way round.
    """
    (w, h), (wide, high) = one, two
    return abs(w * high - h * wide) <= 2 * max(w + h, wide + high)


def shape_of(picture: Size, annotated: Size) -> str:
    """How a picture's shape is related to that of what was annotated; both as displayed.

    Returns:
        "same"; "square" where one of them is a square, as copies that were stretched to a model's input are: boxes as
        shares of the picture fit both; "other" where it is turned, cut, padded or another picture: they don't.
    """
    if same_shape(picture, annotated):
        return "same"
    return "square" if any(width == height for width, height in (picture, annotated)) else "other"
