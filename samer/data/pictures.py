"""Picture files -> RGB images as they are displayed, or an error that names the file."""

from __future__ import annotations

import errno
import os
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from samer.config import InputError

# raster formats only: Pillow would start another program for PostScript, whatever its name
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
MOST_PIXELS = 64 * 10**6  # of an image; a small file can claim many
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def load_image(path: str | Path) -> Image.Image:
    """Opens an image as it is displayed, as 8-bit RGB: EXIF rotation applied, transparency over white, 16 bits scaled.

    Raises InputError for a file that is missing, truncated, not an image or of floating-point pixels.
    """
    try:
        regular_file(path)
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels; {MOST_PIXELS:,} are the most")
            image = ImageOps.exif_transpose(opened)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no fixed range, 8 or 16 bits have")
        if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
            image = Image.fromarray(np.clip(np.asarray(image) / 257 + 0.5, 0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such image; restore it") from error
    # What Pillow's decoders raise on damaged input.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(f"{path}: not a readable image ({one_line(error)}); replace the file") from error


def find_pictures(folder: str | Path) -> list[str]:
    """Paths under a folder, subfolders too, of all that is named like a picture, in order; not opened here.

    Raises:
        InputError: no such folder, or none in it.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise InputError(f"{folder}: no such folder; name one that holds pictures")
    found = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    paths = sorted(path.relative_to(root).as_posix() for path in found)
    if not paths:
        raise InputError(f"{root}: no pictures in it (looked for {', '.join(SUFFIXES)})")
    return paths


def regular_file(path: str | Path) -> None:
    """Refuses what would be waited for or read without end: a pipe, a device, a socket; says so by OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def one_line(value: object) -> str:
    return " ".join(str(value).split())
