"""The built-in world: generated scenes with captions and boxes, in Flickr30k-Entities layout.

Objects are drawn from a table of primitives (`KINDS`), placed by size on a ground, and named by captions that carry
entity markup, coreference chains and boxes. Two styles share the words and the objects: `page` (flat ground, terse
captions; the retriever in assets/ is pretrained on it) and `outdoor` (textured ground, clutter, changed light, noise,
full sentences; the demo adapts to it). A share of the outdoor scenes come as twins that differ by one small object, so
that only object evidence tells them apart.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from samer.config import InputError
from samer.runtime import Progress

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


def _place(rng: np.random.Generator, style: Style, width: int, height: int) -> list[SceneObject]:
    """Objects with boxes that hardly overlap; sides are drawn for the 128-pixel view that the small retriever has."""
    unit = (width * height) ** 0.5
    names = list(KINDS)
    placed: list[SceneObject] = []
    count = int(rng.integers(style.objects[0], style.objects[1] + 1))
    for _ in range(count * 12):
        if len(placed) == count:
            break
        kind = names[int(rng.integers(len(names)))]
        size = ("small", "", "big")[int(rng.choice(3, p=(0.45, 0.3, 0.25)))]
        low, high = {"small": (0.10, 0.14), "": (0.17, 0.23), "big": (0.28, 0.38)}[size]
        side = float(rng.uniform(low, high)) * unit
        aspect = KINDS[kind].aspect
        w, h = max(8, round(side * aspect**0.5)), max(8, round(side / aspect**0.5))
        if w >= width - 4 or h >= height - 4:
            continue
        x, y = int(rng.integers(2, width - w - 2)), int(rng.integers(2, height - h - 2))
        box = (x, y, x + w, y + h)
        if any(_overlap(box, other.box) > 0.05 for other in placed):
            continue
        pattern = ("striped", "spotted")[int(rng.integers(2))] if KINDS[kind].patterned and rng.random() < 0.4 else ""
        colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        placed.append(SceneObject(kind, colour, pattern, size, box, 0))
    return placed


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Intersection over the smaller area."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _smooth_noise(rng: np.random.Generator, width: int, height: int, cells: int) -> np.ndarray:
    """Low-frequency noise in [-1, 1], shape (height, width)."""
    coarse = rng.integers(0, 256, (cells, cells), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32) / 127.5 - 1.0


def _ground(rng: np.random.Generator, style: Style, ground: str, width: int, height: int) -> Image.Image:
    sky, soil = (np.array(c, dtype=np.float32) for c in GROUNDS[ground])
    horizon = int(height * rng.uniform(0.3, 0.55))
    canvas = np.empty((height, width, 3), dtype=np.float32)
    canvas[:horizon] = sky + np.linspace(12, -12, horizon, dtype=np.float32)[:, None, None]
    canvas[horizon:] = soil
    if style.texture:
        rough = 0.6 * _smooth_noise(rng, width, height, 7) + 0.4 * _smooth_noise(rng, width, height, 40)
        rough[:horizon] *= 0.5
        canvas += (rough * 55 * style.texture)[..., None]
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _draw(canvas: Image.Image, rng: np.random.Generator, item: SceneObject, hue: float) -> None:
    x0, y0, x1, y1 = item.box
    w, h = x1 - x0, y1 - y0
    kind = KINDS[item.kind]
    base = np.array(COLOURS[item.colour]) + rng.normal(0, hue, 3)
    body = tuple(int(v) for v in np.clip(base, 0, 255))
    paints = {
        **FIXED,
        "body": body,
        "shade": tuple(int(v * 0.72) for v in body),
        "skin": SKINS[int(rng.integers(len(SKINS)))],
        "hair": HAIRS[int(rng.integers(len(HAIRS)))],
    }
    body_mask = Image.new("L", (w, h), 0)
    layer = Image.new("RGBA", (w, h), (0, 0, 0, 0))
    draw, mask_draw = ImageDraw.Draw(layer), ImageDraw.Draw(body_mask)
    for paint, shape, unit in kind.parts:
        points = [v * (w - 1 if k % 2 == 0 else h - 1) for k, v in enumerate(unit)]
        targets = [(draw, (*paints["body" if paint == "ring" else paint], 255))]
        if paint == "body":
            targets.append((mask_draw, 255))
        for target, fill in targets:
            if shape == "polygon":
                target.polygon(points, fill=fill)
            elif shape == "pieslice":
                target.pieslice(points, 180, 360, fill=fill)
            elif shape == "rect":
                target.rectangle(points, fill=fill)
            elif paint == "ring":
                target.ellipse(points, outline=fill, width=max(1, w // 9))
            else:
                target.ellipse(points, fill=fill)
    if item.pattern:
        light = (250, 250, 250) if sum(body) < 600 else (90, 90, 90)
        marks = Image.new("L", (w, h), 0)
        mark_draw = ImageDraw.Draw(marks)
        step = max(4, round(h / 3.5))
        if item.pattern == "striped":
            for y in range(step // 2, h, step):
                mark_draw.rectangle((0, y, w, y + step * 0.42), fill=255)
        else:
            for row, y in enumerate(range(0, h + step, step)):
                for x in range(-(row % 2) * step // 2, w + step, step):
                    mark_draw.ellipse((x, y, x + step * 0.5, y + step * 0.5), fill=255)
        marks = Image.fromarray(np.minimum(np.asarray(marks), np.asarray(body_mask)))
        layer.paste(Image.new("RGBA", (w, h), (*light, 255)), (0, 0), marks)
    canvas.paste(layer, (x0, y0), layer)


def _clutter(canvas: Image.Image, rng: np.random.Generator, count: int) -> None:
    """Small marks that no caption names: strokes, leaves, pebbles."""
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    for _ in range(count):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        size = float(rng.uniform(0.015, 0.045)) * (width * height) ** 0.5
        colour = tuple(int(v) for v in rng.integers(40, 215, 3))
        dx, dy = (float(v) for v in rng.uniform(-size, size, 2))
        form = int(rng.integers(3))
        if form == 0:
            draw.line((x, y, x + 2 * dx, y + 2 * dy), fill=colour, width=2)
        elif form == 1:
            draw.ellipse((x, y, x + size, y + size * 0.6), fill=colour)
        else:
            draw.polygon((x, y, x + size, y + dy, x + dx, y + size), fill=colour)


def _finish(canvas: Image.Image, rng: np.random.Generator, style: Style) -> Image.Image:
    """Light, noise and blur over the whole picture."""
    if style.blur:
        canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, style.blur))))
    pixels = np.asarray(canvas, dtype=np.float32)
    gain = 1 + rng.normal(0, style.light, 3).astype(np.float32) * 0.6 + float(rng.normal(0, style.light)) * 0.6
    contrast = 1 - abs(float(rng.normal(0, style.light)))
    pixels = (pixels - 128) * contrast + 128
    pixels = pixels * np.clip(gain, 0.6, 1.4)
    pixels += rng.standard_normal((*pixels.shape[:2], 1), dtype=np.float32) * style.noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _phrase(rng: np.random.Generator, item: SceneObject, full: bool) -> list[tuple[str, int | None, str]]:
    """The parts that name one object; `full` keeps every attribute."""
    kind = KINDS[item.kind]
    size = item.size if full or rng.random() < 0.5 else ""
    if kind.clothing:
        who = " ".join(w for w in ("a", size, item.kind) if w)
        wear = f"a {item.colour} {kind.clothing}"
        return [(who, item.chain, kind.entity_type), ("in", None, ""), (wear, item.clothing_chain, "clothing")]
    words = [size, item.pattern if full or rng.random() < 0.7 else "", item.colour, item.kind]
    words = [w for w in words if w]
    article = "an" if words[0][0] in "aeiou" else "a"
    return [(" ".join([article, *words]), item.chain, kind.entity_type)]


def _relation(a: SceneObject, b: SceneObject) -> str:
    ax, ay = (a.box[0] + a.box[2]) / 2, (a.box[1] + a.box[3]) / 2
    bx, by = (b.box[0] + b.box[2]) / 2, (b.box[1] + b.box[3]) / 2
    if abs(ax - bx) > abs(ay - by):
        return "to the left of" if ax < bx else "to the right of"
    return "above" if ay < by else "below"


def _caption(
    rng: np.random.Generator,
    style: Style,
    objects: list[SceneObject],
    must: SceneObject | None,
    scene: tuple[str, int],
    sky_chain: int,
) -> tuple[tuple[str, int | None, str], ...]:
    count = min(len(objects), int(rng.integers(2, 5)))
    picked = [objects[int(k)] for k in rng.permutation(len(objects))[:count]]
    if must is not None and must not in picked:
        picked[int(rng.integers(len(picked)))] = must
    full = rng.random() < 0.3
    named = [_phrase(rng, item, full) for item in picked]
    plain = lambda text: [(text, None, "")]
    joined = lambda word, phrases: [part for phrase in phrases for part in (*plain(word), *phrase)]
    place = [("in front of" if scene[0].endswith("lake") else "on", None, ""), (scene[0], scene[1], "scene")]
    if rng.random() < style.terse:
        return tuple(joined(",", named)[1:])
    if style.natural:
        return _natural_caption(rng, picked, named, place, sky_chain)
    rest = joined(",", named[1:-1]) + joined("and", named[-1:])
    form = int(rng.integers(6))
    if form == 0:
        parts = named[0] + rest + place
    elif form == 1:
        parts = named[0] + plain("is " + _relation(picked[0], picked[1])) + named[1]
        parts += joined("near", named[2:]) + place
    elif form == 2:
        parts = plain("there is") + named[0] + plain("with") + named[1] + joined("and", named[2:])
    elif form == 3:
        parts = named[0] + rest + plain("can be seen") + place
    elif form == 4:
        parts = named[0] + plain("next to") + named[1]
        for phrase in named[2:3]:
            parts += plain("while") + phrase + plain("is near") + [("it", 0, "notvisual")]
    else:
        parts = plain("under") + [("the sky", sky_chain, "other")] + plain("there is") + named[0] + rest + place
    return (*parts, (".", None, ""))


def _natural_caption(
    rng: np.random.Generator,
    picked: list[SceneObject],
    named: list[list[tuple[str, int | None, str]]],
    place: list[tuple[str, int | None, str]],
    sky_chain: int,
) -> tuple[tuple[str, int | None, str], ...]:
    """A full sentence of the `outdoor` style: lead-in, what is where, and where all that was seen."""
    pick = lambda options: [(options[int(rng.integers(len(options)))], None, "")]
    lead = pick(_LEADS)
    sides = {"to the left of": "on the left hand side of", "to the right of": "on the right hand side of"}
    relation = _relation(picked[0], picked[1])
    form = int(rng.integers(3))
    if form == 0:
        parts = [*lead, *named[0], (sides.get(relation, f"right {relation}"), None, ""), *named[1]]
    elif form == 1:
        parts = [*lead, *named[0], *pick(_LINKS), *named[1]]
    else:
        parts = [*named[0], *pick(("was waiting", "stays quietly", "has been left")), *pick(_LINKS), *named[1]]
    for phrase in named[2:]:
        parts += [*pick(("and also", "as well as", "plus")), *phrase]
    ending = int(rng.integers(4))
    if ending == 0:
        parts += place
    elif ending == 1:
        parts += [*pick(("during a quiet afternoon", "early this morning", "while nobody was watching")), *place]
    elif ending == 2:
        parts += [(", far below", None, ""), ("the sky", sky_chain, "other")]
    else:
        parts += [(", and", None, ""), ("it", 0, "notvisual"), ("looks rather peaceful", None, "")]
    return (*parts, (".", None, ""))


_LEADS = (
    "in this photograph we can spot",
    "the camera caught",
    "somebody took a picture of",
    "look closely and you will find",
    "my favourite view shows",
)
_LINKS = ("together with", "standing close by", "not far from", "beside", "at some distance from")


def _group_rng(style: str, seed: int, group: int) -> np.random.Generator:
    """The group's generator; its first number decides whether the group is a pair of twins."""
    return np.random.default_rng([list(STYLES).index(style), seed, group])


def make_group(style_name: str, seed: int, group: int) -> list[Scene]:
    """Renders one group of scenes: one scene, or two twins that differ by one small object.

    Args:
        style_name: `page` or `outdoor`.
        seed, group: together they fix every pixel and word.

    Returns:
        One or two `Scene`s; each has five captions.
    """
    style = STYLES[style_name]
    rng = _group_rng(style_name, seed, group)
    twins = rng.random() < style.twins
    width, height = style.sizes[int(rng.integers(len(style.sizes)))]
    ground = list(GROUNDS)[int(rng.integers(len(GROUNDS)))]
    objects: list[SceneObject] = []
    while len(objects) < 2:
        objects = _place(rng, style, width, height)
    first = group * 100 + 1
    objects = [
        replace(item, chain=first + 2 * k, clothing_chain=first + 2 * k + 1 if KINDS[item.kind].clothing else None)
        for k, item in enumerate(objects)
    ]
    variants = [objects]
    changed = None
    if twins:
        changed = min(range(len(objects)), key=lambda k: _area(objects[k].box))
        other = objects[changed]
        # not the colour of another such object: the captions of one twin must not fit the other
        taken = {item.colour for item in objects if item.kind == other.kind}
        colours = [c for c in COLOURS if c not in taken]
        swapped = replace(other, colour=colours[int(rng.integers(len(colours)))])
        variants.append([swapped if k == changed else item for k, item in enumerate(objects)])
    look = int(rng.integers(2**31))
    scenes = []
    for number, items in enumerate(variants):
        paint = np.random.default_rng(look)  # twins share ground, clutter and noise
        canvas = _ground(paint, style, ground, width, height)
        _clutter(canvas, paint, int(paint.integers(style.clutter[0], style.clutter[1] + 1)))
        for k, item in sorted(enumerate(items), key=lambda pair: -_area(pair[1].box)):
            _draw(canvas, np.random.default_rng([look, k]), item, style.hue)
        image = _finish(canvas, paint, style)
        words = np.random.default_rng([look, 1000 + number])
        sky = first + 98
        captions = tuple(
            _caption(
                words,
                style,
                items,
                items[changed] if changed is not None and k < 3 else None,
                (ground, first + 97),
                sky,
            )
            for k in range(5)
        )
        scenes.append(Scene(image, captions, tuple(_entities(items, captions, first + 97, sky))))
    return scenes


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _entities(
    items: list[SceneObject], captions: tuple[tuple[tuple[str, int | None, str], ...], ...], scene: int, sky: int
) -> Iterator[Entity]:
    """The entities that any caption names, as an annotator would box them."""
    named = {chain for caption in captions for _, chain, _ in caption}
    for item in items:
        if item.chain in named:
            yield Entity(item.chain, (item.box,))
        clothing = KINDS[item.kind].clothing_box
        if item.clothing_chain in named and clothing is not None:
            x0, y0, x1, y1 = item.box
            w, h = x1 - x0, y1 - y0
            box = (x0 + clothing[0] * w, y0 + clothing[1] * h, x0 + clothing[2] * w, y0 + clothing[3] * h)
            yield Entity(item.clothing_chain, (tuple(round(v) for v in box),))
    if scene in named:
        yield Entity(scene, (), "scene")
    if sky in named:
        yield Entity(sky, (), "nobndbox")


def caption_text(parts: tuple[tuple[str, int | None, str], ...]) -> tuple[str, list[tuple[int, int, int]]]:
    """The caption as plain text, and (chain, start, end) character spans of its entities."""
    text, spans = "", []
    for words, chain, _ in parts:
        if text:
            text += " "
        if chain is not None:
            spans.append((chain, len(text), len(text) + len(words)))
        text += words
    return text, spans


def _markup(parts: tuple[tuple[str, int | None, str], ...]) -> str:
    return " ".join(words if chain is None else f"[/EN#{chain}/{types} {words}]" for words, chain, types in parts)


def _annotation(image_id: str, scene: Scene) -> bytes:
    """PASCAL VOC style XML with 1-based inclusive pixels."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{image_id}.jpg"
    size = ElementTree.SubElement(root, "size")
    for name, value in (("width", scene.image.width), ("height", scene.image.height), ("depth", 3)):
        ElementTree.SubElement(size, name).text = str(value)
    for entity in scene.entities:
        for box in entity.boxes or (None,):
            node = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(node, "name").text = str(entity.chain)
            if box is None:
                for flag in ("scene", "nobndbox"):
                    ElementTree.SubElement(node, flag).text = str(int(flag == entity.flag or flag == "nobndbox"))
            else:
                bounds = ElementTree.SubElement(node, "bndbox")
                values = (box[0] + 1, box[1] + 1, box[2], box[3])
                for name, value in zip(("xmin", "ymin", "xmax", "ymax"), values):
                    ElementTree.SubElement(bounds, name).text = str(value)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8") + b"\n"


def _write_group(job: tuple[str, str, int, int, int]) -> int:
    folder, style, seed, group, count = job
    root = Path(folder)
    scenes = make_group(style, seed, group)[:count]
    for number, scene in enumerate(scenes):
        image_id = f"{group * 2 + number + 1:08d}"
        scene.image.save(root / "images" / "Images" / f"{image_id}.jpg", quality=90)
        sentences = "".join(_markup(caption) + "\n" for caption in scene.captions)
        (root / "annotations" / "Sentences" / f"{image_id}.txt").write_text(sentences, encoding="utf-8")
        (root / "annotations" / "Annotations" / f"{image_id}.xml").write_bytes(_annotation(image_id, scene))
    return len(scenes)


def write_world(
    root: str | Path, counts: dict[str, int], *, style: str = "outdoor", seed: int = 0, workers: int | None = None
) -> bool:
    """Writes a generated world in Flickr30k-Entities layout (METHOD section 8); it appears whole or not at all.

    Args:
        root: the folder to make; kept as it is if it already holds this very world.
        counts: images per split, e.g. `{"train": 1000, "val": 100, "test": 500}`.
        style: `page` or `outdoor`.
        seed: fixes every pixel and word; the number of `workers` does not matter.

    Returns:
        True if the world was written, False if it was already there.

    Raises:
        InputError: unknown style, a count below 1, or a folder that holds something else.
    """
    root = Path(root)
    if style not in STYLES:
        raise InputError(f"scenes style '{style}' is unknown; use one of {', '.join(STYLES)}")
    for split, count in counts.items():
        if count < 1:
            raise InputError(f"scenes: {split} asks for {count} images; ask for at least 1")
    stamp = json.dumps({"generator": 1, "style": style, "seed": seed, "counts": counts}, indent=2) + "\n"
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        found = root / "world.json"
        if found.is_file() and found.read_bytes() == stamp.encode():
            return False
        raise InputError(f"{root} exists and holds something else; name another folder or remove it")
    partial = root.with_name(root.name + f".partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_files(partial, counts, style, seed, workers)
        (partial / "world.json").write_text(stamp)
        if root.exists():
            root.rmdir()
        partial.rename(root)
    finally:  # nothing is left of an interrupted write; after the rename there is nothing to remove
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _write_files(partial: Path, counts: dict[str, int], style: str, seed: int, workers: int | None) -> None:
    for folder in ("images/Images", "annotations/Sentences", "annotations/Annotations"):
        (partial / folder).mkdir(parents=True)
    jobs: list[tuple[str, str, int, int, int]] = []
    group = 0
    for split, count in counts.items():
        ids: list[str] = []
        while len(ids) < count:
            twins = _group_rng(style, seed, group).random() < STYLES[style].twins
            fit = min(1 + twins, count - len(ids))
            ids += [f"{group * 2 + k + 1:08d}" for k in range(fit)]
            jobs.append((str(partial), style, seed, group, fit))
            group += 1
        (partial / "annotations" / f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
    with ProcessPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for _ in Progress(pool.map(_write_group, jobs, chunksize=16), "scenes", len(jobs)):
            pass
