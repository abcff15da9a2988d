"""Generated scenes: objects placed, drawn and named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from samer.world.captions import make_caption
from samer.world.kinds import COLOURS, FIXED, GROUNDS, HAIRS, KINDS, SKINS, STYLES, Entity, Scene, SceneObject, Style


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


def group_rng(style: str, seed: int, group: int) -> np.random.Generator:
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
    rng = group_rng(style_name, seed, group)
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
            make_caption(
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
