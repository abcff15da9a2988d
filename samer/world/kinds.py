"""What the generated scenes are made of: colours, grounds, kinds of objects, styles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

COLOURS = {
    "red": (214, 39, 40),
    "orange": (250, 140, 25),
    "yellow": (245, 215, 40),
    "green": (40, 155, 60),
    "blue": (40, 85, 210),
    "purple": (140, 60, 180),
    "pink": (248, 140, 190),
    "brown": (125, 78, 40),
    "white": (242, 242, 242),
    "black": (28, 28, 30),
}
GROUNDS = {  # scene phrase -> (sky or wall, ground)
    "a grassy field": ((178, 212, 240), (120, 170, 90)),
    "a sandy beach": ((190, 222, 245), (226, 205, 150)),
    "a snowy hill": ((205, 215, 228), (232, 236, 242)),
    "a paved street": ((200, 205, 210), (140, 140, 145)),
    "a calm lake": ((195, 220, 235), (110, 160, 190)),
}


@dataclass(frozen=True)
class Kind:
    """How one kind of object looks: primitives in the unit box, drawn in order ("body" takes the object's colour)."""

    entity_type: str
    aspect: float  # width / height
    parts: tuple[tuple[str, str, tuple[float, ...]], ...]
    patterned: bool = False
    clothing: str | None = None  # people: what carries the colour, boxed as its own entity
    clothing_box: tuple[float, float, float, float] | None = None


KINDS = {
    "man": Kind(
        "people",
        0.42,
        (
            ("trousers", "rect", (0.22, 0.58, 0.46, 1.0)),
            ("trousers", "rect", (0.54, 0.58, 0.78, 1.0)),
            ("skin", "rect", (0.0, 0.27, 0.17, 0.6)),
            ("skin", "rect", (0.83, 0.27, 1.0, 0.6)),
            ("body", "rect", (0.08, 0.24, 0.92, 0.62)),
            ("skin", "ellipse", (0.25, 0.0, 0.75, 0.24)),
            ("hair", "rect", (0.25, 0.0, 0.75, 0.08)),
        ),
        clothing="shirt",
        clothing_box=(0.08, 0.24, 0.92, 0.62),
    ),
    "woman": Kind(
        "people",
        0.5,
        (
            ("hair", "ellipse", (0.2, 0.0, 0.8, 0.36)),
            ("skin", "rect", (0.34, 0.8, 0.45, 1.0)),
            ("skin", "rect", (0.55, 0.8, 0.66, 1.0)),
            ("skin", "rect", (0.12, 0.3, 0.88, 0.38)),
            ("body", "polygon", (0.36, 0.24, 0.64, 0.24, 1.0, 0.84, 0.0, 0.84)),
            ("skin", "ellipse", (0.3, 0.03, 0.7, 0.24)),
        ),
        clothing="dress",
        clothing_box=(0.0, 0.24, 1.0, 0.84),
    ),
    "dog": Kind(
        "animals",
        1.4,
        (
            ("body", "rect", (0.18, 0.6, 0.28, 1.0)),
            ("body", "rect", (0.62, 0.6, 0.72, 1.0)),
            ("body", "ellipse", (0.1, 0.32, 0.8, 0.75)),
            ("body", "polygon", (0.0, 0.1, 0.08, 0.06, 0.22, 0.45, 0.12, 0.5)),
            ("body", "ellipse", (0.64, 0.05, 1.0, 0.46)),
            ("dark", "polygon", (0.66, 0.0, 0.78, 0.06, 0.7, 0.3)),
            ("dark", "ellipse", (0.94, 0.2, 1.0, 0.3)),
        ),
    ),
    "bird": Kind(
        "animals",
        1.3,
        (
            ("body", "ellipse", (0.15, 0.35, 0.75, 0.95)),
            ("body", "ellipse", (0.58, 0.15, 0.88, 0.55)),
            ("gold", "polygon", (0.86, 0.28, 1.0, 0.36, 0.86, 0.44)),
            ("body", "polygon", (0.0, 0.5, 0.25, 0.45, 0.25, 0.75)),
            ("shade", "polygon", (0.25, 0.6, 0.62, 0.55, 0.35, 0.0)),
        ),
    ),
    "car": Kind(
        "vehicles",
        2.0,
        (
            ("body", "polygon", (0.16, 0.45, 0.3, 0.0, 0.7, 0.0, 0.86, 0.45)),
            ("body", "rect", (0.0, 0.42, 1.0, 0.8)),
            ("glass", "polygon", (0.25, 0.42, 0.35, 0.1, 0.48, 0.1, 0.48, 0.42)),
            ("glass", "polygon", (0.53, 0.42, 0.53, 0.1, 0.66, 0.1, 0.76, 0.42)),
            ("tyre", "ellipse", (0.12, 0.58, 0.34, 1.0)),
            ("tyre", "ellipse", (0.66, 0.58, 0.88, 1.0)),
        ),
    ),
    "truck": Kind(
        "vehicles",
        1.7,
        (
            ("body", "rect", (0.0, 0.0, 0.64, 0.76)),
            ("shade", "rect", (0.67, 0.25, 1.0, 0.76)),
            ("glass", "rect", (0.78, 0.32, 0.97, 0.5)),
            ("tyre", "ellipse", (0.1, 0.62, 0.32, 1.0)),
            ("tyre", "ellipse", (0.7, 0.62, 0.92, 1.0)),
        ),
    ),
    "boat": Kind(
        "vehicles",
        1.2,
        (
            ("body", "polygon", (0.0, 0.68, 1.0, 0.68, 0.82, 1.0, 0.18, 1.0)),
            ("wood", "rect", (0.47, 0.0, 0.53, 0.68)),
            ("cloth", "polygon", (0.55, 0.05, 0.55, 0.6, 0.95, 0.6)),
            ("cloth", "polygon", (0.44, 0.15, 0.44, 0.6, 0.12, 0.6)),
        ),
    ),
    "ball": Kind("other", 1.0, (("body", "ellipse", (0, 0, 1, 1)),), patterned=True),
    "kite": Kind(
        "other",
        0.7,
        (
            ("dark", "polygon", (0.48, 0.7, 0.52, 0.7, 0.62, 1.0, 0.56, 1.0)),
            ("body", "polygon", (0.5, 0.0, 1.0, 0.32, 0.5, 0.75, 0.0, 0.32)),
        ),
        patterned=True,
    ),
    "umbrella": Kind(
        "other",
        1.0,
        (
            ("wood", "rect", (0.47, 0.4, 0.53, 1.0)),
            ("wood", "rect", (0.47, 0.93, 0.68, 1.0)),
            ("body", "pieslice", (0.0, 0.0, 1.0, 1.0)),
        ),
        patterned=True,
    ),
    "balloon": Kind(
        "other",
        0.6,
        (
            ("dark", "rect", (0.47, 0.6, 0.53, 1.0)),
            ("body", "ellipse", (0.0, 0.0, 1.0, 0.68)),
            ("body", "polygon", (0.5, 0.62, 0.68, 0.76, 0.32, 0.76)),
        ),
        patterned=True,
    ),
    "house": Kind(
        "other",
        1.1,
        (
            ("body", "rect", (0.1, 0.42, 0.9, 1.0)),
            ("roof", "polygon", (0.0, 0.44, 0.5, 0.0, 1.0, 0.44)),
            ("wood", "rect", (0.42, 0.65, 0.6, 1.0)),
            ("glass", "rect", (0.18, 0.55, 0.34, 0.72)),
            ("glass", "rect", (0.68, 0.55, 0.84, 0.72)),
        ),
    ),
    "chair": Kind(
        "other",
        0.75,
        (
            ("body", "rect", (0.0, 0.0, 0.2, 1.0)),
            ("body", "rect", (0.0, 0.5, 1.0, 0.66)),
            ("body", "rect", (0.8, 0.5, 1.0, 1.0)),
        ),
    ),
    "cup": Kind(
        "other",
        1.0,
        (
            ("ring", "ellipse", (0.55, 0.2, 1.0, 0.75)),
            ("body", "polygon", (0.0, 0.0, 0.78, 0.0, 0.66, 1.0, 0.12, 1.0)),
            ("dark", "ellipse", (0.05, 0.0, 0.73, 0.14)),
        ),
        patterned=True,
    ),
    "star": Kind(
        "other",
        1.0,
        (
            (
                "body",
                "polygon",
                tuple(
                    value
                    for k in range(10)
                    for value in (
                        0.5 + (0.5 if k % 2 == 0 else 0.2) * float(np.sin(np.pi * k / 5)),
                        0.5 - (0.5 if k % 2 == 0 else 0.2) * float(np.cos(np.pi * k / 5)),
                    )
                ),
            ),
        ),
    ),
    "flower": Kind(
        "other",
        0.65,
        (
            ("leaf", "rect", (0.46, 0.4, 0.54, 1.0)),
            ("leaf", "ellipse", (0.5, 0.7, 0.9, 0.86)),
            ("body", "ellipse", (0.3, 0.0, 0.7, 0.27)),
            ("body", "ellipse", (0.0, 0.12, 0.42, 0.4)),
            ("body", "ellipse", (0.58, 0.12, 1.0, 0.4)),
            ("body", "ellipse", (0.1, 0.3, 0.5, 0.58)),
            ("body", "ellipse", (0.5, 0.3, 0.9, 0.58)),
            ("gold", "ellipse", (0.36, 0.2, 0.64, 0.4)),
        ),
    ),
}
FIXED = {
    "trousers": (60, 60, 85),
    "dark": (45, 40, 40),
    "gold": (240, 190, 40),
    "glass": (190, 220, 235),
    "tyre": (30, 30, 32),
    "wood": (110, 75, 45),
    "cloth": (238, 234, 224),
    "roof": (120, 55, 45),
    "leaf": (60, 130, 60),
}
SKINS = ((240, 205, 175), (205, 155, 120), (140, 95, 65), (95, 62, 45))
HAIRS = ((40, 30, 25), (95, 60, 35), (205, 170, 95), (120, 120, 125))


@dataclass(frozen=True)
class Style:
    """One distribution of scenes: how they look and how they are described."""

    sizes: tuple[tuple[int, int], ...]
    objects: tuple[int, int]  # how many, inclusive
    texture: float  # contrast of the ground's texture, 0..1
    clutter: tuple[int, int]
    light: float  # spread of the global light (gain per channel, contrast)
    hue: float  # spread of an object's own colour, in 8-bit steps
    noise: float  # pixel noise, 8-bit steps
    blur: float
    twins: float  # share of groups that come as two scenes differing by one small object
    terse: float  # share of captions that only list phrases
    natural: bool  # sentences as people write them, with words that the other style never uses


STYLES = {
    "page": Style(((256, 256), (320, 240), (240, 320)), (3, 6), 0.05, (0, 3), 0.04, 8, 2, 0.0, 0.0, 0.5, False),
    "outdoor": Style(
        ((320, 240), (240, 320), (300, 300), (400, 260), (260, 380), (360, 240)),
        (3, 6),
        0.6,
        (6, 18),
        0.16,
        20,
        8,
        0.4,
        0.35,
        0.0,
        True,
    ),
}


@dataclass(frozen=True)
class SceneObject:
    """One drawn thing: its box is in pixels (x0, y0, x1, y1), half-open."""

    kind: str
    colour: str
    pattern: str  # "", "striped" or "spotted"
    size: str  # "small", "" or "big"
    box: tuple[int, int, int, int]
    chain: int
    clothing_chain: int | None = None


@dataclass(frozen=True)
class Entity:
    """A caption's entity as the annotation lists it: boxes in pixels, half-open; `flag` marks what has none."""

    chain: int
    boxes: tuple[tuple[int, int, int, int], ...]
    flag: str = ""  # "scene" or "nobndbox"


@dataclass(frozen=True)
class Scene:
    """A rendered scene: RGB picture, captions as parts (text, chain, types; chain None is plain), entities."""

    image: Image.Image
    captions: tuple[tuple[tuple[str, int | None, str], ...], ...]
    entities: tuple[Entity, ...]
