"""The architecture figure of the README, drawn around a generated scene."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from samer.config import MergeConfig
from samer.merging import merge_tokens
from samer.report.drawing import INK, PAPER, SOFT, region_colours
from samer.retrievers.hf import Retriever
from samer.tokens import regions_of_patches
from samer.world.captions import caption_text
from samer.world.scenes import make_group

FROZEN, TRAINED, PRIOR, VECTOR = (226, 232, 240), (253, 216, 165), (196, 226, 208), (205, 219, 245)


def architecture_figure(retriever: Retriever, *, seed: int = 11, group: int = 4) -> Image.Image:
    """Draws the method: frozen retriever, trained projection, box-biased merge, MaxSim.

    Args:
        retriever: its regions of a generated scene are what the right-hand picture shows.
        seed, group: which scene.

    Returns:
        RGB picture, 1800 pixels wide.
    """
    scene = make_group("outdoor", seed, group)[0]
    inputs = retriever.image_inputs([scene.image])
    visual = retriever.encode_images(inputs)
    merged = merge_tokens(visual.tokens, visual.coords, MergeConfig(num_regions=16, center_init="farthest"))
    regions = regions_of_patches(merged.assignments, visual.source)[0].view(*visual.grid[0].tolist())

    canvas = Image.new("RGB", (1800, 800), PAPER)
    draw = ImageDraw.Draw(canvas)
    _text(draw, (900, 40), "SaMer: merge image tokens into K regions that keep objects apart", 34)
    picture = scene.image.resize((300, 300))
    boxed = picture.copy()
    marks = ImageDraw.Draw(boxed)
    scale = np.array([300 / scene.image.width, 300 / scene.image.height] * 2)
    for entity in scene.entities:
        for box in entity.boxes:
            marks.rectangle((np.array(box) * scale).tolist(), outline=(20, 120, 60), width=3)
    canvas.paste(boxed, (40, 150))
    _text(draw, (190, 475), "image, with boxes\n(boxes: training only)", 20, SOFT)
    _block(draw, (385, 215, 605, 385), "vision encoder\n+ language model\n\nfrozen", FROZEN)
    _block(draw, (660, 215, 830, 385), "projection\n+ L2 norm\n\nthe only part\nthat trains", TRAINED)
    _block(draw, (910, 215, 1130, 385), "cluster T = 3 times\ncosine + place,\nthen soft\nassignment", VECTOR)
    _block(draw, (860, 95, 1180, 180), "object prior: mixing\ninstances costs (training)", PRIOR)
    colours = region_colours(regions.cpu()).resize((300, 300), Image.Resampling.NEAREST)
    overlay = Image.blend(picture, colours, 0.62)
    canvas.paste(overlay, (1210, 150))
    _text(draw, (1360, 475), "K regions instead of N tokens\n(these: K = 16 of N = 262)", 20, SOFT)
    caption = _wrapped(caption_text(scene.captions[0])[0], 26)
    _block(draw, (40, 575, 340, 725), caption, PAPER)
    _block(draw, (385, 585, 605, 715), "language model\n\nfrozen", FROZEN)
    _block(draw, (660, 585, 830, 715), "the same\nprojection", TRAINED)
    _block(draw, (1270, 570, 1450, 730), "MaxSim\nmean over\nquery tokens", VECTOR)
    _block(draw, (1560, 570, 1770, 730), "training: loss\n\nafterwards: rank,\nno boxes needed", PAPER)
    for line in (
        ((342, 300), (383, 300)),
        ((607, 300), (658, 300)),
        ((832, 300), (908, 300)),
        ((1132, 300), (1208, 300)),
        ((1020, 182), (1020, 213)),
        ((342, 650), (383, 650)),
        ((607, 650), (658, 650)),
        ((832, 650), (1268, 650)),
        ((1360, 530), (1360, 568)),
        ((1452, 650), (1558, 650)),
    ):
        _arrow(draw, *line)
    _text(draw, (870, 275), "N", 20, SOFT)
    _text(draw, (1050, 632), "M query tokens", 20, SOFT)
    _text(draw, (1665, 300), "the index holds\nK vectors per image:\n64 of 1,030 with\nColPali, 16 x less", 22)
    _arrow(draw, (1512, 300), (1560, 300))
    return canvas


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < width else [lines[-1], word]
    return "\n".join(lines)


def _text(draw: ImageDraw.ImageDraw, centre: Sequence[float], text: str, size: int, colour=INK) -> None:
    font = ImageFont.load_default(size)
    draw.multiline_text(tuple(centre), text, fill=colour, font=font, anchor="mm", align="center", spacing=6)


def _block(draw: ImageDraw.ImageDraw, box: Sequence[float], text: str, fill) -> None:
    draw.rounded_rectangle(tuple(box), radius=14, fill=fill, outline=SOFT, width=2)
    _text(draw, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text, 21)


def _arrow(draw: ImageDraw.ImageDraw, start: Sequence[float], end: Sequence[float]) -> None:
    draw.line((*start, *end), fill=INK, width=3)
    (x0, y0), (x1, y1) = start, end
    length = max(1.0, ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5)
    ux, uy = (x1 - x0) / length, (y1 - y0) / length
    wing = [(x1 - 12 * ux + s * 7 * uy, y1 - 12 * uy - s * 7 * ux) for s in (1, -1)]
    draw.polygon([(x1, y1), *wing], fill=INK)
