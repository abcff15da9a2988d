"""Pictures: evidence and regions drawn over images, panels side by side, and the architecture figure.

Shape letters: B images, N tokens, K regions.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from samer import flickr, scenes
from samer.colpali import Retriever
from samer.config import MergeConfig
from samer.merging import merge_tokens

INK, SOFT, PAPER = (32, 38, 46), (112, 122, 134), (255, 255, 255)
BOX, LIGHT = (86, 180, 233), (230, 159, 0)
FROZEN, TRAINED, PRIOR, VECTOR = (226, 232, 240), (253, 216, 165), (196, 226, 208), (205, 219, 245)
# Okabe and Ito's colours, told apart with the common colour vision deficiencies
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def region_colours(assignments: torch.Tensor, grid: int) -> Image.Image:
    """A picture of grid x grid pixels, coloured by region; neighbours in number differ in colour or shade.

    Args:
        assignments: (N,) long; the first grid * grid tokens are patches in row-major order.
        grid: patches per side.
    """
    numbers = assignments[: grid * grid].reshape(grid, grid).numpy()
    colours = np.array(PALETTE, dtype=np.float32)[numbers % len(PALETTE)]
    shade = 1 - 0.16 * ((numbers // len(PALETTE)) % 4)
    return Image.fromarray((colours * shade[..., None]).astype(np.uint8))


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """A copy whose longer side is `side` pixels."""
    scale = side / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.LANCZOS)


def draw_boxes(image: Image.Image, boxes: Sequence[flickr.Box]) -> Image.Image:
    """Boxes (shares of the image) as blue lines within a dark halo, seen on light and on dark ground."""
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    for box in boxes:
        corners = [edge * size for edge, size in zip(box, (*image.size, *image.size))]
        for colour, width in (((20, 24, 30), 5), (BOX, 3)):
            grown = [corners[0] - 3, corners[1] - 3, corners[2] + 2, corners[3] + 2]
            inset = (5 - width) / 2
            draw.rectangle(
                [grown[0] + inset, grown[1] + inset, grown[2] - inset, grown[3] - inset], None, colour, width
            )
    return drawn


def spotlight(image: Image.Image, evidence: np.ndarray, boxes: Sequence[flickr.Box] = ()) -> Image.Image:
    """An image with its colours where the evidence is, and dim and grey elsewhere.

    Args:
        image: any size.
        evidence: (rows, columns) float, >= 0, one value per patch; brightest patch = full colour.
        boxes: drawn over it.
    """
    strength = evidence / max(float(evidence.max()), 1e-12)
    # the square root keeps weak evidence visible; patches stay sharp, as nothing finer is known
    alpha = Image.fromarray((255 * np.sqrt(strength)).astype(np.uint8)).resize(image.size, Image.NEAREST)
    dim = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, PAPER), 0.55)
    lit = Image.composite(image, dim, alpha)
    on = Image.fromarray(strength > 0.25).convert("L").resize(image.size, Image.NEAREST)
    core = ImageOps.expand(on, 3).filter(ImageFilter.MinFilter(5)).crop((3, 3, on.width + 3, on.height + 3))
    line = ImageChops.subtract(on, core)  # two pixels, within what is lit, along the picture's edge too
    lit.paste(Image.new("RGB", image.size, LIGHT), mask=line)
    return draw_boxes(lit, boxes)


def regions_over(image: Image.Image, assignments: torch.Tensor, grid: int, boxes: Sequence[flickr.Box]) -> Image.Image:
    """An image under the colours of its regions, as `region_colours`, with boxes."""
    colours = region_colours(assignments, grid).resize(image.size, Image.NEAREST)
    return draw_boxes(Image.blend(image, colours, 0.55), boxes)


def panels(rows: Sequence[Sequence[tuple[str, Image.Image]]], heads: Sequence[str], height: int = 300) -> Image.Image:
    """Rows of captioned pictures of one height, each row under a heading: a figure for a paper or a README."""
    font, small, gap = ImageFont.load_default(20), ImageFont.load_default(16), 14
    scaled = [
        [
            (text, picture.resize((max(1, round(picture.width * height / picture.height)), height), Image.LANCZOS))
            for text, picture in row
        ]
        for row in rows
    ]
    cell = [[max(picture.width, 150) for _, picture in row] for row in scaled]
    width = max(sum(widths) + gap * (len(widths) + 1) for widths in cell)
    heads = ["\n".join(textwrap.wrap(head, round(width / 10.5))) for head in heads]
    tall = [28 * (1 + head.count("\n")) for head in heads]
    canvas = Image.new("RGB", (width, sum(tall) + len(rows) * (height + 74)), PAPER)
    draw, top = ImageDraw.Draw(canvas), 0
    for head, extra, row, widths in zip(heads, tall, scaled, cell):
        draw.multiline_text((gap, top + 12), head, INK, font, spacing=8)
        top += extra + 18
        left = gap
        for (text, picture), room in zip(row, widths):
            canvas.paste(picture, (left, top))
            draw.multiline_text((left, top + height + 6), text, SOFT, small, spacing=3)
            left += room + gap
        top += height + 56
    return canvas


def architecture_figure(retriever: Retriever, *, seed: int = 11, group: int = 4) -> Image.Image:
    """Draws the method: frozen retriever, trained projection, box-biased merge, MaxSim.

    Args:
        retriever: its regions of a generated scene are what the right-hand picture shows.
        seed, group: which scene.

    Returns:
        RGB picture, 1800 pixels wide.
    """
    scene = scenes.make_group("outdoor", seed, group)[0]
    inputs = retriever.image_inputs([scene.image])
    visual = retriever.encode_images(inputs)
    merged = merge_tokens(visual.tokens, visual.coords, MergeConfig(num_regions=16, center_init="farthest"))
    regions = region_colours(merged.assignments[0].cpu(), retriever.grid)

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
    overlay = Image.blend(picture, regions.resize((300, 300), Image.Resampling.NEAREST), 0.62)
    canvas.paste(overlay, (1210, 150))
    _text(draw, (1360, 475), "K regions instead of N tokens\n(these: K = 16 of N = 262)", 20, SOFT)
    caption = _wrapped(scenes.caption_text(scene.captions[0])[0], 26)
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
