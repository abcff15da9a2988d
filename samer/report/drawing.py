"""Pictures: evidence and regions drawn over images, and panels side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from samer.data.records import Box

INK, SOFT, PAPER = (32, 38, 46), (112, 122, 134), (255, 255, 255)
BOX, LIGHT = (86, 180, 233), (230, 159, 0)
# Okabe and Ito's colours, told apart with the common colour vision deficiencies
PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def region_colours(regions: torch.Tensor | np.ndarray) -> Image.Image:
    """A picture of a pixel per patch, coloured by region; neighbours in number differ in colour or shade.

    Args:
        regions: (rows, columns) integers, the region of each patch; -1, for a patch of none, stays paper.
    """
    numbers = np.asarray(regions)
    colours = np.array(PALETTE, dtype=np.float32)[numbers % len(PALETTE)]
    shade = 1 - 0.16 * ((numbers // len(PALETTE)) % 4)
    painted = np.where(numbers[..., None] < 0, PAPER, colours * shade[..., None])
    return Image.fromarray(painted.astype(np.uint8))


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """A copy whose longer side is `side` pixels."""
    scale = side / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.LANCZOS)


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
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


def spotlight(image: Image.Image, evidence: np.ndarray, boxes: Sequence[Box] = ()) -> Image.Image:
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


def regions_over(image: Image.Image, regions: torch.Tensor | np.ndarray, boxes: Sequence[Box]) -> Image.Image:
    """An image under the colours of its regions, as `region_colours`, with boxes."""
    colours = region_colours(regions).resize(image.size, Image.NEAREST)
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
