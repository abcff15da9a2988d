"""Collages: cut-outs laid out on a photograph, matched to it in light and sharpness, and drawn.

Scenes come in pairs of twins, which differ in one thing: another cut-out stands at the same place. Sizes are drawn
log-uniformly, thing by thing, until a third of the scene is filled, so that those of all things together are
log-uniform, too: no thing is dropped for being hard to place. Where twelve layouts of some sizes fail, others are
drawn, which takes some of the largest (measured: a twelfth of those above 16 %).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from samer.config import InputError
from samer.world.collage_captions import Seen, Told, colour_shares, tell
from samer.world.collage_names import related
from samer.world.collage_sources import SOLID, Background, Cutout
from samer.world.kinds import Entity, Scene

SMALLEST, LARGEST = 0.005, 0.30  # sizes of things, in shares of the scene
FILLED, FULL = 0.35, 0.75  # sizes are drawn until this share is taken; so much is not
FEWEST, MOST = 4, 8  # things of a scene
VISIBLE = 0.65  # share of each thing that stays visible, at least
SMALL = 0.05  # a thing up to this size may be the one that differs between twins
LEAST_CROP = 0.45  # of a background's shorter side
TURN = 12  # degrees
_BLURS = (0.0, 0.5, 0.8, 1.1, 1.4)
_GRAIN = 1.5  # of 255
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Studio:
    """All that scenes are made of and with.

    Attributes:
        cutouts: all that are used.
        backgrounds: all that are used.
        size: of a scene's sides, in pixels.
        seed: fixes every pixel and word, with what is above.
    """

    cutouts: tuple[Cutout, ...]
    backgrounds: tuple[Background, ...]
    size: int
    seed: int


@dataclass(frozen=True)
class Group:
    """What is known of a pair of twins before it is made.

    Attributes:
        number: its own.
        background: its number.
        cutouts: the numbers of those that it may use.
        ids: of its images; one where only the first of the twins is wanted.
    """

    number: int
    background: int
    cutouts: tuple[int, ...]
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A cut-out as it lies in a scene.

    Attributes:
        cutout: its number.
        size: its solid share of the scene, before anything hides a part of it.
        pixels: (h, w, 3) of 0..255, before it is lit.
        alpha: (h, w) of 0..1.
        flipped, turned, blur: what was done to it; degrees, pixels.
        left, top: where it lies.
    """

    cutout: int
    size: float
    pixels: np.ndarray
    alpha: np.ndarray
    flipped: bool
    turned: float
    blur: float
    left: int = 0
    top: int = 0

    @property
    def solid(self) -> np.ndarray:
        """(h, w), where it belongs to the thing."""
        return self.alpha >= SOLID / 255

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the scene that it covers."""
        high, wide = self.alpha.shape
        return slice(self.top, self.top + high), slice(self.left, self.left + wide)


@dataclass(frozen=True)
class Collage:
    """A scene that was made, and all that is known of it; `layers`, `things` and `chains` go together, back to front.

    Attributes:
        scene: picture, captions and boxes.
        layers: what lies on the background.
        things: the same as they are seen.
        told: what its captions say.
        chains: of each thing, its chain and its type.
        changed: the thing that is another in the twin.
        crop: of the background: left, top, side, in its own reduced pixels; and whether it is flipped.
        shadows: whether things cast any.
    """

    scene: Scene
    layers: tuple[Layer, ...]
    things: tuple[Seen, ...]
    told: tuple[Told, ...]
    chains: tuple[tuple[int, str], ...]
    changed: int
    crop: tuple[int, int, int, bool]
    shadows: bool


@lru_cache(maxsize=256)
def _cutout(file: str) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGBA")


@lru_cache(maxsize=2)
def _background(file: str) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def make_group(studio: Studio, group: Group) -> tuple[Collage, Collage]:
    """Makes the twins of a group; what they are depends on the studio, the group and nothing else."""
    rng = np.random.default_rng([studio.seed, 1, group.number])
    ground, crop = _crop(rng, studio.backgrounds[group.background], studio.size)
    shadows = bool(rng.random() < 0.5)
    sharp = sharpness(ground, np.ones(ground.shape[:2], bool))
    reach = largest_size([studio.cutouts[k] for k in group.cutouts])
    for _ in range(1000):
        sizes = draw_sizes(rng, reach)
        for _ in range(12):
            layers = _lay_out(rng, studio, group, sizes, sharp)
            if layers:
                return _twins(rng, studio, group, layers, ground, (crop, shadows))
    raise InputError("cut-outs: too few names that are not kinds of each other (red bus, bus); give more")


def draw_sizes(rng: np.random.Generator, largest: float) -> list[float]:
    """Sizes of a scene's things, log-uniform, in falling order."""
    while True:
        sizes: list[float] = []
        while len(sizes) < FEWEST or (len(sizes) < MOST and sum(sizes) < FILLED):
            sizes.append(float(SMALLEST * (largest / SMALLEST) ** rng.random()))
        if sum(sizes) <= FULL:
            return sorted(sizes, reverse=True)


def largest_size(cutouts: Sequence[Cutout]) -> float:
    """The largest size that is drawn: so many names as a scene has things can have it."""
    reaches: dict[str, float] = {}
    for cutout in cutouts:
        reaches[cutout.name.key] = max(reaches.get(cutout.name.key, 0.0), cutout.reach)
    return min(LARGEST, sorted(reaches.values(), reverse=True)[:MOST][-1])


def _crop(rng: np.random.Generator, background: Background, size: int) -> tuple[np.ndarray, tuple[int, int, int, bool]]:
    """A square of a background as (size, size, 3) of 0..255, and where it is from."""
    image = _background(background.image)
    short = min(image.size)
    side = int(rng.integers(max(min(size, short), int(LEAST_CROP * short)), short + 1))
    left, top = (int(rng.integers(length - side + 1)) for length in image.size)
    flipped = bool(rng.random() < 0.5)
    box = (left, top, left + side, top + side)
    cropped = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if flipped:
        cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(cropped, dtype=np.float32), (left, top, side, flipped)


def sharpness(pixels: np.ndarray, inside: np.ndarray) -> float:
    """How steep the steeper edges of a picture are: the 95th percentile of steps of luminance, (h, w, 3) and (h, w)."""
    luma = pixels @ _LUMA
    down = np.abs(np.diff(luma, axis=0))[inside[1:] & inside[:-1]]
    across = np.abs(np.diff(luma, axis=1))[inside[:, 1:] & inside[:, :-1]]
    steps = np.concatenate((down, across))
    return float(np.percentile(steps, 95)) if len(steps) else 0.0


def _lay_out(
    rng: np.random.Generator, studio: Studio, group: Group, sizes: list[float], sharp: float
) -> tuple[list[Layer], int, Layer] | None:
    """Things of some sizes with their places, which of them differs, and the other's thing there; None: in vain."""
    small = [k for k, size in enumerate(sizes) if size <= SMALL] or [len(sizes) - 1]
    changed = small[int(rng.integers(len(small)))]
    owner = np.full((studio.size, studio.size), -1)
    reserved = np.zeros(owner.shape, bool)
    layers: list[Layer] = []
    other = None
    for k, size in enumerate(sizes):
        used = [studio.cutouts[layer.cutout].name.key for layer in layers]
        if other:
            used.append(studio.cutouts[other.cutout].name.key)
        layer = _pick(rng, studio, group, size, used, sharp)
        if layer is None:
            return None
        if k == changed:
            used.append(studio.cutouts[layer.cutout].name.key)
            other = _pick(rng, studio, group, size, used, sharp)
            pair = _place_pair(rng, layer, other, owner) if other else None
            if pair is None:
                return None
            layer, other = pair
            reserved[_reach_of(layer, studio.size)] = reserved[_reach_of(other, studio.size)] = True
        else:
            layer = _place(rng, layer, layers, owner, reserved)
            if layer is None:
                return None
        owner[layer.window][layer.solid] = k
        layers.append(layer)
    return layers, changed, other


def _pick(
    rng: np.random.Generator, studio: Studio, group: Group, size: float, used: list[str], sharp: float
) -> Layer | None:
    """A cut-out that can have a size, in it, of a name that is none of the used ones nor related to one."""
    named: dict[str, list[int]] = {}
    for number in group.cutouts:
        cutout = studio.cutouts[number]
        if cutout.reach >= size and not any(related(cutout.name.key, key) for key in used):
            named.setdefault(cutout.name.key, []).append(number)
    if not named:
        return None
    numbers = list(named.values())[int(rng.integers(len(named)))]
    number = numbers[int(rng.integers(len(numbers)))]
    flipped, turned = bool(rng.random() < 0.5), round(float(rng.uniform(-TURN, TURN)), 1)
    return make_layer(studio, number, size, flipped, turned, sharp)


def make_layer(studio: Studio, number: int, size: float, flipped: bool, turned: float, sharp: float) -> Layer | None:
    """A cut-out in a size, turned, no sharper than `sharp` as far as it bears it, soft at its edge; None: too long."""
    image = _cutout(studio.cutouts[number].image)
    if flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    wanted = size * studio.size**2
    rough = 2 * (wanted / max(1, _solid(image))) ** 0.5
    if rough < 1:  # turned in less than all its pixels
        image = image.resize([max(8, round(length * rough)) for length in image.size], Image.Resampling.BICUBIC)
    image = image.rotate(turned, Image.Resampling.BICUBIC, expand=True)
    alpha = np.asarray(image.getchannel("A"))
    image = image.crop(Image.fromarray(alpha > 8).getbbox())
    factor = (wanted / max(1, _solid(image))) ** 0.5
    blur = None
    for _ in range(2):  # what the soft edge takes is given back
        wide, high = (max(2, round(length * factor)) for length in image.size)
        if max(wide, high) > studio.size - 8:
            return None
        small = Image.new("RGBA", (wide + 6, high + 6))
        small.paste(image.resize((wide, high), Image.Resampling.BICUBIC), (3, 3))
        small = small.convert("RGBa")
        if blur is None:
            blur = _blur_of(small, sharp, wanted)
        if blur:
            small = small.filter(ImageFilter.GaussianBlur(blur))
        pixels = np.asarray(small.convert("RGBA"))
        alpha = np.asarray(small.getchannel("a").filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float32) / 255
        alpha = np.clip(alpha * 1.2 - 0.15, 0, 1)
        solid = int((alpha >= SOLID / 255).sum())
        factor *= (wanted / max(1, solid)) ** 0.5
    share = solid / studio.size**2
    return Layer(number, share, pixels[..., :3].astype(np.float32), alpha, flipped, turned, blur)


def _solid(image: Image.Image) -> int:
    return sum(image.getchannel("A").histogram()[SOLID:])


def _blur_of(small: Image.Image, sharp: float, wanted: float) -> float:
    """The least blur at which a layer (premultiplied) is no sharper than its scene; small ones bear less."""
    most = 0.025 * wanted**0.5
    *blurs, last = [blur for blur in _BLURS if blur <= most] or [0.0]
    for blur in blurs:
        pixels = np.asarray((small.filter(ImageFilter.GaussianBlur(blur)) if blur else small).convert("RGBA"))
        if sharpness(pixels[..., :3].astype(np.float32), pixels[..., 3] >= 250) <= max(1.15 * sharp, 10):
            return blur
    return last


def _place(
    rng: np.random.Generator, layer: Layer, layers: list[Layer], owner: np.ndarray, reserved: np.ndarray
) -> Layer | None:
    """The layer at a place where it leaves enough of all others visible, often without hiding anything."""
    alone = rng.random() < 0.5
    solid = layer.solid
    for attempt in range(80):
        layer = replace(layer, **_somewhere(rng, layer, owner))
        if reserved[layer.window][solid].any():
            continue
        hidden = np.bincount(owner[layer.window][solid] + 1, minlength=len(layers) + 1)[1:]
        if alone and attempt < 40 and hidden.any():
            continue
        if all(_stays(owner, layers, k, int(hidden[k])) for k in np.flatnonzero(hidden)):
            return layer
    return None


def _stays(owner: np.ndarray, layers: list[Layer], k: int, hidden: int) -> bool:
    """Whether enough of a layer is seen if so many more of its pixels are hidden."""
    seen = int((owner[layers[k].window] == k).sum()) - hidden
    return seen >= max(VISIBLE * int(layers[k].solid.sum()), SMALLEST * owner.size)


def _somewhere(rng: np.random.Generator, layer: Layer, owner: np.ndarray) -> dict[str, int]:
    size, (high, wide) = len(owner), layer.alpha.shape
    return {"left": int(rng.integers(size - wide + 1)), "top": int(rng.integers(size - high + 1))}


def _place_pair(rng: np.random.Generator, one: Layer, other: Layer, owner: np.ndarray) -> tuple[Layer, Layer] | None:
    """Two layers at one place where neither, nor its shadow, reaches any other thing."""
    size = len(owner)
    for _ in range(80):
        one = replace(one, **_somewhere(rng, one, owner))
        high, wide = other.alpha.shape
        left = one.left + (one.alpha.shape[1] - wide) // 2
        top = one.top + (one.alpha.shape[0] - high) // 2
        if not (0 <= left <= size - wide and 0 <= top <= size - high):
            continue
        other = replace(other, left=left, top=top)
        if all((owner[_reach_of(layer, size)] < 0).all() for layer in (one, other)):
            return one, other
    return None


def _shadow(layer: Layer, size: int) -> tuple[int, float]:
    """How far a layer's shadow falls, down and to the right, and how soft it is, in pixels."""
    side = layer.size**0.5 * size
    return max(1, round(0.05 * side)), max(1.0, 0.05 * side)


def _reach_of(layer: Layer, size: int) -> tuple[slice, slice]:
    """Rows and columns of a scene that a layer and its shadow can change."""
    shift, soft = _shadow(layer, size)
    pad = shift + int(3 * soft) + 2
    rows, columns = layer.window
    return (
        slice(max(0, rows.start - pad), min(size, rows.stop + pad)),
        slice(max(0, columns.start - pad), min(size, columns.stop + pad)),
    )


def _twins(
    rng: np.random.Generator,
    studio: Studio,
    group: Group,
    laid: tuple[list[Layer], int, Layer],
    ground: np.ndarray,
    how: tuple[tuple[int, int, int, bool], bool],
) -> tuple[Collage, Collage]:
    layers, changed, other = laid
    grain = rng.normal(0, _GRAIN, ground.shape[:2]).astype(np.float32)
    second = [other if k == changed else layer for k, layer in enumerate(layers)]
    words = [np.random.default_rng([studio.seed, 2, group.number, twin]) for twin in range(2)]
    made = []
    for twin, chosen in enumerate((layers, second)):
        pixels = draw(ground, chosen, how[1])
        image = Image.fromarray(np.clip(pixels + grain[..., None], 0, 255).astype(np.uint8))
        things = look(studio, chosen, np.asarray(image))
        first = (2 * group.number + twin) * 2 * MOST + 1
        chains = tuple((first + k, studio.cutouts[layer.cutout].kind) for k, layer in enumerate(chosen))
        told = tuple(tell(words[twin], things, studio.size, changed if k < 3 else None, chains) for k in range(5))
        named = {mention.thing for each in told for mention in each.mentions}
        entities = tuple(Entity(chains[k][0], (things[k].box,)) for k in sorted(named))
        scene = Scene(image, tuple(each.parts for each in told), entities)
        made.append(Collage(scene, tuple(chosen), things, told, chains, changed, *how))
    return made[0], made[1]


def draw(ground: np.ndarray, layers: Sequence[Layer], shadows: bool) -> np.ndarray:
    """The picture of some layers on a background: (size, size, 3) of 0..255."""
    canvas = ground.copy()
    size = len(canvas)
    for layer in layers:
        if shadows:
            _cast(canvas, layer, size)
        alpha = layer.alpha[..., None]
        canvas[layer.window] = canvas[layer.window] * (1 - alpha) + lit(layer, ground) * alpha
    return canvas


def _cast(canvas: np.ndarray, layer: Layer, size: int) -> None:
    rows, columns = _reach_of(layer, size)
    shift, soft = _shadow(layer, size)
    shape = np.zeros((size, size), np.float32)
    high, wide = layer.alpha.shape
    top, left = layer.top + shift, layer.left + shift // 2
    part = layer.alpha[: max(0, size - top), : max(0, size - left)]
    shape[top : top + high, left : left + wide] = part
    reach = Image.fromarray((shape[rows, columns] * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(soft))
    canvas[rows, columns] *= 1 - 0.45 * np.asarray(reach, dtype=np.float32)[..., None] / 255


def lit(layer: Layer, ground: np.ndarray) -> np.ndarray:
    """A layer's pixels in the light of the background around it: brightness, contrast and tint half-way to its own."""
    rows, columns = layer.window
    high, wide = (part // 4 for part in layer.alpha.shape)
    around = ground[max(0, rows.start - high) : rows.stop + high, max(0, columns.start - wide) : columns.stop + wide]
    back = around.reshape(-1, 3) @ _LUMA
    own = layer.pixels[layer.solid] @ _LUMA
    mean, spread = float(own.mean()), float(own.std())
    aim = mean + float(np.clip(0.35 * (back.mean() - mean), -40, 35))
    contrast = float(np.clip(((back.std() + 8) / (spread + 8)) ** 0.3, 0.75, 1.15))
    tint = around.mean((0, 1)) + 20
    tint = (tint / (tint @ _LUMA)) ** 0.15
    brightness = float(np.clip(aim / max(mean, 1.0), 0.65, 1.4))
    return np.clip(((layer.pixels - mean) * contrast + mean) * brightness * tint, 0, 255)


def look(studio: Studio, layers: Sequence[Layer], pixels: np.ndarray) -> tuple[Seen, ...]:
    """Things as they are seen: each pixel belongs to the topmost that is solid there."""
    owner = np.full(pixels.shape[:2], -1)
    for k, layer in enumerate(layers):
        owner[layer.window][layer.solid] = k
    things = []
    for k, layer in enumerate(layers):
        seen = owner == k
        left, top, right, bottom = Image.fromarray(seen).getbbox()
        hides = {}
        for j, below in enumerate(layers[:k]):
            share = float((seen[below.window] & below.solid).sum() / below.solid.sum())
            if share:
                hides[j] = round(share, 4)
        name = studio.cutouts[layer.cutout].name
        area = round(float(seen.mean()), 5)
        things.append(Seen(name, (left, top, right, bottom), area, colour_shares(pixels[seen]), hides))
    return tuple(things)
