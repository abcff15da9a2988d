"""Captions of generated scenes, with entities and their places in the text."""

from __future__ import annotations

import numpy as np

from samer.world.kinds import KINDS, SceneObject, Style


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


def make_caption(
    rng: np.random.Generator,
    style: Style,
    objects: list[SceneObject],
    must: SceneObject | None,
    scene: tuple[str, int],
    sky_chain: int,
) -> tuple[tuple[str, int | None, str], ...]:
    """A caption of some of a scene's objects, as parts (text, chain, types).

    Args:
        rng: decides which objects, which of their attributes, and the form of the sentence.
        style: of the scene.
        objects: all of it.
        must: one that is named whatever the rest; None: nobody is.
        scene: word and chain of the place.
        sky_chain: chain of the sky.
    """
    count = min(len(objects), int(rng.integers(2, 5)))
    picked = [objects[int(k)] for k in rng.permutation(len(objects))[:count]]
    if must is not None and must not in picked:
        picked[int(rng.integers(len(picked)))] = must
    full = rng.random() < 0.3
    named = [_phrase(rng, item, full) for item in picked]
    place = [("in front of" if scene[0].endswith("lake") else "on", None, ""), (scene[0], scene[1], "scene")]
    if rng.random() < style.terse:
        return tuple(_joined(",", named)[1:])
    if style.natural:
        return _natural_caption(rng, picked, named, place, sky_chain)
    rest = _joined(",", named[1:-1]) + _joined("and", named[-1:])
    form = int(rng.integers(6))
    if form == 0:
        parts = named[0] + rest + place
    elif form == 1:
        parts = named[0] + _plain("is " + _relation(picked[0], picked[1])) + named[1]
        parts += _joined("near", named[2:]) + place
    elif form == 2:
        parts = _plain("there is") + named[0] + _plain("with") + named[1] + _joined("and", named[2:])
    elif form == 3:
        parts = named[0] + rest + _plain("can be seen") + place
    elif form == 4:
        parts = named[0] + _plain("next to") + named[1]
        for phrase in named[2:3]:
            parts += _plain("while") + phrase + _plain("is near") + [("it", 0, "notvisual")]
    else:
        parts = _plain("under") + [("the sky", sky_chain, "other")] + _plain("there is") + named[0] + rest + place
    return (*parts, (".", None, ""))


def _plain(text: str) -> list[tuple[str, int | None, str]]:
    """Words that name nothing, as a part."""
    return [(text, None, "")]


def _joined(word: str, phrases: list[list[tuple[str, int | None, str]]]) -> list[tuple[str, int | None, str]]:
    """The parts of some phrases, a word before each."""
    return [part for phrase in phrases for part in (*_plain(word), *phrase)]


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> list[tuple[str, int | None, str]]:
    """One of some plain words, as a part."""
    return _plain(options[int(rng.integers(len(options)))])


def _natural_caption(
    rng: np.random.Generator,
    picked: list[SceneObject],
    named: list[list[tuple[str, int | None, str]]],
    place: list[tuple[str, int | None, str]],
    sky_chain: int,
) -> tuple[tuple[str, int | None, str], ...]:
    """A full sentence of the `outdoor` style: lead-in, what is where, and where all that was seen."""
    lead = _pick(rng, _LEADS)
    sides = {"to the left of": "on the left hand side of", "to the right of": "on the right hand side of"}
    relation = _relation(picked[0], picked[1])
    form = int(rng.integers(3))
    if form == 0:
        parts = [*lead, *named[0], (sides.get(relation, f"right {relation}"), None, ""), *named[1]]
    elif form == 1:
        parts = [*lead, *named[0], *_pick(rng, _LINKS), *named[1]]
    else:
        parts = [
            *named[0],
            *_pick(rng, ("was waiting", "stays quietly", "has been left")),
            *_pick(rng, _LINKS),
            *named[1],
        ]
    for phrase in named[2:]:
        parts += [*_pick(rng, ("and also", "as well as", "plus")), *phrase]
    ending = int(rng.integers(4))
    if ending == 0:
        parts += place
    elif ending == 1:
        parts += [*_pick(rng, ("during a quiet afternoon", "early this morning", "while nobody was watching")), *place]
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
