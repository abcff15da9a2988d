"""What is said of a collage, and of which collages it is true.

A thing is called by its name, and by its size, colour and place where these are clear: a "small" one fills 2.5 % of the
scene at most. What is said in one scene holds in another with some tolerance (`small` up to 4 %), so that a scene is
not counted as wrong for a hair's breadth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from samer.world.collage_names import Name, covers

COLOURS = ("black", "white", "grey", "red", "orange", "brown", "yellow", "green", "blue", "purple", "pink")
SAID_COLOUR, HOLDS_COLOUR = 0.6, 0.45  # shares of what is seen of a thing
SIZES = {  # shares of the scene: from, to, as said; from, to, as it holds
    "tiny": (0, 0.010, 0, 0.016),
    "small": (0, 0.025, 0, 0.040),
    "large": (0.10, 1, 0.07, 1),
    "huge": (0.20, 1, 0.15, 1),
}
_LOW, _HIGH, _WIDE = (0, 0.33), (0.67, 1), (0, 1)
_LOW_HOLDS, _HIGH_HOLDS = (0, 0.45), (0.55, 1)
PLACES = {  # of a thing's centre: x and y, as said; x and y, as it holds
    "on the left": (_LOW, _WIDE, _LOW_HOLDS, _WIDE),
    "on the right": (_HIGH, _WIDE, _HIGH_HOLDS, _WIDE),
    "at the top": (_WIDE, _LOW, _WIDE, _LOW_HOLDS),
    "at the bottom": (_WIDE, _HIGH, _WIDE, _HIGH_HOLDS),
    "in the middle": ((0.4, 0.6), (0.4, 0.6), (0.3, 0.7), (0.3, 0.7)),
    "in the top left corner": (_LOW, _LOW, _LOW_HOLDS, _LOW_HOLDS),
    "in the top right corner": (_HIGH, _LOW, _HIGH_HOLDS, _LOW_HOLDS),
    "in the bottom left corner": (_LOW, _HIGH, _LOW_HOLDS, _HIGH_HOLDS),
    "in the bottom right corner": (_HIGH, _HIGH, _HIGH_HOLDS, _HIGH_HOLDS),
}
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
SAID_APART, HOLDS_APART = 0.15, 0.05  # between two centres, in sides of the scene
SAID_HIDES, HOLDS_HIDES = 0.08, 0.03  # share of the thing behind that the one in front hides
_LEADS = ("", "", "", "a photo of", "a picture with", "you can see", "this shows", "look at")


@dataclass(frozen=True)
class Seen:
    """A thing as it is seen in a scene.

    Attributes:
        name: what it is called.
        box: around what is seen of it, in pixels, half-open: left, top, right, bottom.
        area: share of the scene that is seen of it.
        colours: share of its seen pixels by colour.
        hides: share of others' pixels that it hides, by their number.
    """

    name: Name
    box: tuple[int, int, int, int]
    area: float
    colours: dict[str, float]
    hides: dict[int, float]

    def centre(self, size: int) -> tuple[float, float]:
        """Of its box, in sides of the scene."""
        return (self.box[0] + self.box[2]) / (2 * size), (self.box[1] + self.box[3]) / (2 * size)


@dataclass(frozen=True)
class Mention:
    """A thing, by its number in the scene, and what a caption says of it; empty: nothing."""

    thing: int
    size: str = ""
    colour: str = ""
    place: str = ""


@dataclass(frozen=True)
class Told:
    """What a caption says: of things, and how the first stands to the second; `parts` as in `kinds.Scene`."""

    mentions: tuple[Mention, ...]
    relation: str
    parts: tuple[tuple[str, int | None, str], ...]


def colour_shares(pixels: np.ndarray) -> dict[str, float]:
    """Shares of some pixels, (M, 3) of 8 bits, by colour; those of 5 % and more, largest first."""
    rgb = pixels.astype(np.float32) / 255
    high, low = rgb.max(-1), rgb.min(-1)
    spread = high - low
    saturation = spread / np.maximum(high, 1e-6)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    safe = np.maximum(spread, 1e-6)
    hue = np.select([high == red, high == green], [(green - blue) / safe % 6, (blue - red) / safe + 2])
    hue = 60 * np.where((high != red) & (high != green), (red - green) / safe + 4, hue)
    plain = saturation < np.where(high < 0.4, 0.3, 0.16)
    dull = (high < 0.62) | ((saturation < 0.55) & (high < 0.8))
    rules = [
        (high < 0.16) | (plain & (high < 0.25)),
        plain & (high > 0.8),
        plain,
        ((hue < 14) | (hue >= 345)) & ((saturation > 0.5) | (high < 0.7)),
        (hue < 14) | (hue >= 325),
        (hue < 46) & dull,
        hue < 42,
        (hue < 70) & (high < 0.45),
        hue < 66,
        hue < 165,
        hue < 255,
    ]
    names = ("black", "white", "grey", "red", "pink", "brown", "orange", "brown", "yellow", "green", "blue")
    found = np.select(rules, [COLOURS.index(name) for name in names], COLOURS.index("purple"))
    counts = np.bincount(found, minlength=len(COLOURS)) / max(1, len(found))
    order = sorted(range(len(COLOURS)), key=lambda k: (-counts[k], k))
    return {COLOURS[k]: round(float(counts[k]), 3) for k in order if counts[k] >= 0.05}


_SAYS_SIZE = {"tiny", "small", "little", "large", "big", "huge", "giant", "baby", "lesser", "greater"}
_SAYS_COLOUR = {*COLOURS, "gray", "golden", "silver", "colorful", "colourful", "albino", "turquoise", "violet"}


def tell(
    rng: np.random.Generator, things: Sequence[Seen], size: int, must: int | None, chains: Sequence[tuple[int, str]]
) -> Told:
    """A caption of one to three things of a scene.

    Args:
        rng: decides which things, what of them, and the form of the sentence.
        things: all of them.
        size: of the scene's sides, in pixels.
        must: one that is named whatever the rest; None: nobody is.
        chains: of each thing, its chain and its type.
    """
    count = min(len(things), int(rng.choice(3, p=(0.25, 0.4, 0.35))) + 1)
    picked = [int(k) for k in rng.permutation(len(things))[:count]]
    if must is not None and must not in picked:
        picked[int(rng.integers(count))] = must
    relation = _relation(rng, things, picked, size) if count > 1 and rng.random() < 0.7 else ""
    # of two things that stand to each other somehow, a place would be read as the second's
    free = picked[2:] if relation else picked
    mentions = [_mention(rng, things[k], k, size, k in free) for k in picked]
    if not relation:  # "a yak and a bear on the right" is read as both of them on the right
        for k in range(1, count):
            if not mentions[k - 1].place:
                mentions[k] = replace(mentions[k], place="")
    phrases = [_phrase(things[m.thing].name, m, chains[m.thing]) for m in mentions]
    if relation:
        parts = [*phrases[0], (relation, None, ""), *phrases[1]]
        for phrase in phrases[2:]:
            parts += [(", and", None, ""), *phrase]
    else:
        parts = list(phrases[0])
        for k, phrase in enumerate(phrases[1:], 1):
            parts += [("and" if k == count - 1 else ",", None, ""), *phrase]
    lead = _LEADS[int(rng.integers(len(_LEADS)))]
    if lead:
        parts = [(lead, None, ""), *parts]
    words, chain, types = parts[0]
    return Told(tuple(mentions), relation, ((words[0].upper() + words[1:], chain, types), *parts[1:], (".", None, "")))


def _phrase(name: Name, mention: Mention, chain: tuple[int, str]) -> list[tuple[str, int | None, str]]:
    parts: list[tuple[str, int | None, str]] = [(name.phrase(mention.size, mention.colour), *chain)]
    return parts + ([(mention.place, None, "")] if mention.place else [])


def _mention(rng: np.random.Generator, thing: Seen, number: int, size: int, free: bool) -> Mention:
    """What is said of a thing: of all that clearly holds, some."""
    words = set(thing.name.key.split())
    # of "the baby of a gnu" or "grandma's doll" an adjective could be the other's
    owned = words & {"of"} or "'s " in thing.name.key
    sizes = [word for word, (low, high, _, _) in SIZES.items() if low <= thing.area <= high]
    said_size = sizes[int(rng.integers(len(sizes)))] if sizes and rng.random() < 0.5 else ""
    colour = next(iter(thing.colours), "")
    clear = colour and thing.colours[colour] >= SAID_COLOUR and rng.random() < 0.5
    centre = thing.centre(size)
    places = [
        place for place, ranges in PLACES.items() if all(lo <= v <= hi for v, (lo, hi) in zip(centre, ranges[:2]))
    ]
    said_place = places[int(rng.integers(len(places)))] if places and free and rng.random() < 0.7 else ""
    return Mention(
        number,
        "" if owned or words & _SAYS_SIZE else said_size,
        colour if clear and not owned and not words & _SAYS_COLOUR else "",
        said_place,
    )


def _relation(rng: np.random.Generator, things: Sequence[Seen], picked: list[int], size: int) -> str:
    """How the first of some things clearly stands to the second, if somehow."""
    one, other = things[picked[0]], things[picked[1]]
    said = [word for word in ("in front of", "behind") if _hidden(things, picked[0], picked[1], word) >= SAID_HIDES]
    (x, y), (x2, y2) = one.centre(size), other.centre(size)
    dx, dy = x - x2, y - y2
    for word, (right, down) in RELATIONS.items():
        along, across = dx * right + dy * down, dx * down + dy * right
        if along >= SAID_APART and along > abs(across):
            said.append(word)
    return said[int(rng.integers(len(said)))] if said else ""


def _hidden(things: Sequence[Seen], one: int, other: int, word: str) -> float:
    """The share of the thing behind that the one in front hides, if `one` is `word` ("behind") the other."""
    front, back = (one, other) if word == "in front of" else (other, one)
    return things[front].hides.get(back, 0.0)


def holds(told: Told, own: Sequence[Seen], things: Sequence[Seen], size: int) -> bool:
    """Whether a scene of some things is as a caption says, which was made of a scene of its `own` things."""
    fitting = [
        [k for k, thing in enumerate(things) if _fits(mention, own[mention.thing].name, thing, size)]
        for mention in told.mentions
    ]
    return any(_stands(told.relation, things, chosen, size) for chosen in _assigned(fitting))


def _assigned(fitting: list[list[int]]) -> Iterator[tuple[int, ...]]:
    """Every choice of one thing a mention, no thing twice."""
    candidates = sorted(set().union(*fitting))
    if len(candidates) >= len(fitting):
        for chosen in permutations(candidates, len(fitting)):
            if all(k in fits for k, fits in zip(chosen, fitting)):
                yield chosen


def _fits(mention: Mention, name: Name, thing: Seen, size: int) -> bool:
    if not covers(name.key, thing.name.key):
        return False
    if mention.size and not SIZES[mention.size][2] <= thing.area <= SIZES[mention.size][3]:
        return False
    if mention.colour and thing.colours.get(mention.colour, 0.0) < HOLDS_COLOUR:
        return False
    ranges = PLACES[mention.place][2:] if mention.place else (_WIDE, _WIDE)
    return all(low <= value <= high for value, (low, high) in zip(thing.centre(size), ranges))


def _stands(relation: str, things: Sequence[Seen], chosen: tuple[int, ...], size: int) -> bool:
    if not relation:
        return True
    if relation in RELATIONS:
        right, down = RELATIONS[relation]
        (x, y), (x2, y2) = things[chosen[0]].centre(size), things[chosen[1]].centre(size)
        return (x - x2) * right + (y - y2) * down >= HOLDS_APART
    return _hidden(things, chosen[0], chosen[1], relation) >= HOLDS_HIDES
