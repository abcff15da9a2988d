"""Bytes of a picture file -> an RGB image as it is displayed, in little memory.

Read are JPEG (and the first picture of an MPO), PNG, GIF, WebP (their first frame), BMP, TIFF, AVIF, and HEIC where
pillow-heif is installed: by what the file holds, whatever its name says. EXIF orientation is applied and transparency
laid over white.

Grey of more than 8 bits, and colour of 16, is scaled by what it holds (ours; files rarely say it): white is the largest
value of the smallest of 8, 10, 12, 14 and 16 bits, beyond them of any number of bits, that holds the picture's largest
value, or of as many bits as the file states (BitsPerSample of a TIFF, sBIT of a PNG), if they hold it. Black is 0, or
where there are negative values the least value of the smallest signed range that holds both ends. Colour whose values
need more than 14 bits is read by its upper bytes, as Pillow does.

A caller says to which width and height it will scale a picture. A larger one comes reduced by whole factors, never
below twice that size: JPEGs by their decoder (at a half, a quarter or an eighth), then all by the mean of whole boxes,
strip by strip. What a picture takes while it is decoded is bounded by `MOST_IN_FLIGHT` pixels over the threads of a
process; a larger one is decoded alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import math
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from samer.config import DataConfig, InputError

# raster formats only: Pillow would start another program for PostScript, whatever its name
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
NO_HEIC = "HEIC without pillow-heif"  # a reason; the remedy:
HEIC_REMEDY = "install it to read HEIC: pip install pillow-heif, or pip install 'samer[heic]'"
MOST_IN_FLIGHT = 64 * 10**6  # pixels
_COPIES = {"WEBP": 4, "AVIF": 3, "HEIF": 3}  # of its pixels that a decoder holds at once, as measured
_STRIP = 10**6  # pixels converted at once
_DEPTHS = (8, 10, 12, 14, 16, *range(17, 33))
_TOP_BYTE = 2**6  # upper bytes all below this: the values may be of 14 bits or fewer
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# "N", this machine's order of a sample's two bytes, is one of these; the other gives the lower byte
_OTHER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
_DEEP = [f"{bands};16{order}" for bands in ("R", "RGB", "RGBA", "RGBX") for order in "LBN"] + ["LA;16B"]
_limit = {"pixels": int(DataConfig.max_megapixels * 10**6)}
_opening = threading.Lock()  # while Pillow's own limit is lifted


class RefusedError(Exception):
    """Why a picture can't be decoded: its kind in a few words, and what is wrong and what to do."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Gate:
    """Lets threads hold so many pixels at once, in the order of their coming; one that holds more is alone."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self._changed, self._queue = threading.Condition(), deque()

    @contextmanager
    def room(self, pixels: int) -> Iterator[None]:
        """Waits until there is room for `pixels`, and holds it for the block."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._queue[0] is ticket and self._fits(pixels))
                self.held += pixels
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.held -= pixels
                self._changed.notify_all()

    def _fits(self, pixels: int) -> bool:
        return not self.held or self.held + pixels <= self.most


_gate = Gate(MOST_IN_FLIGHT)


def _after_fork() -> None:
    """A forked child has none of the threads that held these."""
    global _gate, _opening
    _gate, _opening = Gate(MOST_IN_FLIGHT), threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _quiet() -> None:
    """Pillow and libtiff tell of odd tags without a file's name; what can't be read is an error that has it."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    try:
        library = ctypes.CDLL(Image.core.__file__)
        for name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):
            handler = getattr(library, name)
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)
    except (OSError, AttributeError):  # a Pillow that hides its libtiff, or has none
        pass


_quiet()
# Pixels lie in blocks of so many bytes: those of 32 MiB and more are given back when they are freed, while smaller ones
# stay with each thread that decodes (measured: ten threads kept 600 MB for one picture of 48 megapixels at a time).
Image.core.set_block_size(2**26)
PngImagePlugin.MAX_TEXT_CHUNK = 2**24  # edited pictures carry histories of megabytes, and Pillow refuses 1 MB


@cache
def heic_is_read() -> bool:
    """Whether pillow-heif is installed; Pillow is told of it."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif  # an extra, and not quick to import

    pillow_heif.register_heif_opener()
    return True


def limit_pixels(megapixels: float) -> None:
    """Sets how large a picture may be, in this process (`data.max_megapixels`); larger ones are refused unread.

    Raises:
        InputError: not a finite number above 0.
    """
    if not 0 < megapixels < math.inf:
        raise InputError(f"the most megapixels of a picture must be a finite number > 0; they are {megapixels}")
    _limit["pixels"] = int(megapixels * 10**6)


def decode(handle: BinaryIO, needs: tuple[int, int] | None = None, *, inside: bool = False) -> Image.Image:
    """The picture in an open file, RGB.

    Args:
        handle: the file, from its start on.
        needs: (width, height) that it will be scaled to; it may come reduced, to no less than twice that on either
            side. None: as it is.
        inside: it will be scaled to fit inside `needs` instead, in its own shape, and is reduced alike on both sides.

    Raises:
        RefusedError: no picture that is read here, a damaged one, one too large. OSError: of the file system.
    """
    opened = _open(handle)
    pixels = opened.width * opened.height
    if pixels > _limit["pixels"]:
        raise RefusedError(
            "too many pixels",
            f"{opened.width} x {opened.height} pixels; data.max_megapixels allows {_limit['pixels'] / 1e6:g} "
            "million, set it higher or make the picture smaller",
        )
    turn, least = None, None
    if opened.format in ("JPEG", "MPO"):
        turn = _turn(opened)
        least = _least(opened.size, needs, inside, turn)
        progressive = bool(opened.info.get("progressive"))
        with _pillow():
            opened.draft(None, least)
        if not progressive:  # else the decoder holds the coefficients of all pixels, whatever it gives
            pixels = opened.width * opened.height
    with _gate.room(pixels * _COPIES.get(opened.format, 1)):
        tiles = opened.tile = _tiles(opened)
        with _pillow():
            opened.load()
        if turn is None:  # a PNG may say it at its end; a TIFF has been turned by now
            turn = _turn(opened)
            least = _least(opened.size, needs, inside, turn)
        factors = max(1, opened.width // least[0]), max(1, opened.height // least[1])
        if inside:
            factors = (min(factors),) * 2
        try:
            image = _Source(opened, handle, tiles).reduced(factors)
            return image.transpose(_TURNS[turn]) if turn in _TURNS else image
        except MemoryError:
            raise _no_memory() from None


def _least(size: tuple[int, int], needs: tuple[int, int] | None, inside: bool, turn: int) -> tuple[int, int]:
    """(width, height) as stored below which a picture of that size must not come."""
    if needs is None:
        return size
    if turn >= 5:  # it lies on its side
        needs = needs[::-1]
    if inside:
        share = min(need / side for need, side in zip(needs, size))
        needs = tuple(max(1, -(-side * share // 1)) for side in size)
    return int(2 * needs[0]), int(2 * needs[1])


def displayed(handle: BinaryIO) -> tuple[int, int]:
    """Width and height, as displayed, of the picture in an open file, by its headers alone.

    What a PNG says of its turning behind its pixels is not seen: they would have to be decoded.

    Raises:
        RefusedError: as `decode`, as far as headers tell. OSError: of the file system.
    """
    opened = _open(handle)
    told = "exif" in opened.info if opened.format == "PNG" else opened.format != "TIFF"  # whose size is the turned one
    turned = told and _turn(opened) in (5, 6, 7, 8)
    return opened.size[::-1] if turned else opened.size


@contextmanager
def _pillow() -> Iterator[None]:
    """What Pillow and its plugins raise, of many types, on input that is damaged."""
    try:
        yield
    except MemoryError:
        raise _no_memory() from None
    except UnidentifiedImageError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system
            raise
        text = " ".join(str(error).split())[:200] or type(error).__name__
        if "truncated" in text.lower() or isinstance(error, EOFError):
            raise RefusedError(
                "cut short", f"not a readable image ({text}): it ends too early; copy it again"
            ) from None
        raise RefusedError("damaged", f"not a readable image ({text}); replace the file") from None


def _no_memory() -> RefusedError:
    return RefusedError("out of memory", "not enough memory to decode it; make it smaller, or free some")


def _open(handle: BinaryIO) -> Image.Image:
    """The picture, not decoded yet. Pillow's own limit of pixels would warn of what ours allows."""
    handle.seek(0)
    start = handle.read(12)
    if not start:
        raise RefusedError("empty file", "not a readable image (it is empty); copy it again")
    handle.seek(0)
    formats = [*FORMATS, "HEIF"] if heic_is_read() else FORMATS
    with _opening:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with _pillow():
                return Image.open(handle, formats=formats)
        except UnidentifiedImageError:
            pass
        finally:
            Image.MAX_IMAGE_PIXELS = before
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS and not heic_is_read():
        raise RefusedError(NO_HEIC, f"not a readable image (it is HEIC); {HEIC_REMEDY}")
    if not start.strip(b"\0"):
        raise RefusedError("empty file", "not a readable image (it begins with zeros); copy it again")
    raise RefusedError("not a picture", f"not a readable image (of none of {', '.join(formats)}); replace the file")


def _turn(opened: Image.Image) -> int:
    """How the picture is to be turned, 1 to 8 of EXIF; what says it and is damaged turns nothing."""
    try:
        with _pillow():
            found = opened.getexif().get(ExifTags.Base.Orientation)
    except RefusedError:
        return 1
    return found if found in _TURNS else 1


class _Source:
    """A decoded picture of any mode, from which RGB is taken strip by strip.

    Attributes:
        image: as Pillow gives it.
        low: the lower bytes of 16-bit colour, where the upper ones don't say enough; else None.
        span: the values that are black and white; None: 8 bits.
    """

    def __init__(self, opened: Image.Image, handle: BinaryIO, tiles: list) -> None:
        """`tiles`: how its samples were read."""
        self.image, self.low, self.span = opened, None, None
        if opened.mode == "F":
            text = "not a readable image: floating-point pixels have no fixed range, 8 or 16 bits have; convert it"
            raise RefusedError("floating-point pixels", text)
        tags = getattr(opened, "tag_v2", {})
        self.unsigned = opened.mode == "I" and tags.get(339, (1,))[0] == 1
        if opened.mode.startswith("I"):
            black, white = _span(*self._ends(), stated_bits(opened, handle))
            self.span = (white, black) if tags.get(262) == 0 else (black, white)  # WhiteIsZero
        elif tiles and _raw(tiles[0]) in _DEEP and max(high for _, high in opened.getextrema()[:3]) < _TOP_BYTE:
            self.low = _lower_bytes(handle, tiles)
            self.span = _span(*self._ends(), stated_bits(opened, handle))

    def reduced(self, factors: tuple[int, int]) -> Image.Image:
        """The whole as RGB, each pixel the mean of a box of `factors` (wide, high) pixels."""
        width, height = self.image.size
        wide, high = factors
        rows = max(1, _STRIP // width // high) * high
        if height <= rows:
            return self._rgb(0, height).reduce(factors)
        found = Image.new("RGB", (-(-width // wide), -(-height // high)))
        for top in range(0, height, rows):
            found.paste(self._rgb(top, min(top + rows, height)).reduce(factors), (0, top // high))
        return found

    def _rgb(self, top: int, end: int) -> Image.Image:
        """Rows of the picture as 8-bit RGB over white."""
        image = self.image.crop((0, top, self.image.width, end))
        if self.span:
            black, white = self.span
            values = (self._values(top, end).astype(np.float64) - black) * (255 / (white - black))
            scaled = Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8))
            if image.mode == "RGBA":
                scaled.putalpha(image.getchannel("A"))
            image = scaled
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

    def _values(self, top: int, end: int) -> np.ndarray:
        """Samples of more than 8 bits, (rows, width) or (rows, width, 3)."""
        box = 0, top, self.image.width, end
        values = np.asarray(self.image.crop(box))
        if self.low is not None:
            upper, lower = values[..., :3].astype(np.uint16), np.asarray(self.low.crop(box))[..., :3]
            return upper * np.uint16(256) + lower
        return values.view(np.uint32) if self.unsigned else values

    def _ends(self) -> tuple[int, int]:
        """Least and largest value."""
        width, height = self.image.size
        rows, ends = max(1, _STRIP // width), []
        for top in range(0, height, rows):
            strip = self._values(top, min(top + rows, height))
            ends.append((int(strip.min()), int(strip.max())))
        return min(low for low, _ in ends), max(high for _, high in ends)


def _span(low: int, high: int, stated: int | None) -> tuple[int, int]:
    """Black and white of samples from `low` to `high` in a file that states so many bits."""
    if low < 0:
        bits = next(bits for bits in _DEPTHS if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1))
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if stated is None or high >= 2**stated:
        stated = next(bits for bits in _DEPTHS if high < 2**bits)
    return 0, 2**stated - 1


def stated_bits(opened: Image.Image, handle: BinaryIO) -> int | None:
    """Bits of a sample that a file says it has, if fewer than their place; a PNG says it before its pixels."""
    if opened.format == "TIFF":
        bits = opened.tag_v2.get(258, (16,))[0]
        return bits if bits < 16 else None
    if opened.format == "PNG":
        handle.seek(8)
        while len(head := handle.read(8)) == 8 and head[4:] != b"IDAT":
            size = int.from_bytes(head[:4], "big")
            if head[4:] == b"sBIT":
                bits = max(handle.read(min(size, 3)), default=16)
                return bits if 0 < bits < 16 else None
            handle.seek(size + 4, os.SEEK_CUR)
    return None


def _raw(tile: tuple) -> str:
    """How Pillow reads a tile's samples, such as "RGB;16B"."""
    return tile.args if isinstance(tile.args, str) else tile.args[0]


def _read_as(tile: tuple, raw: str) -> tuple:
    return tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))


def _tiles(opened: Image.Image) -> list:
    """How a picture's samples are to be read: as Pillow says, but for two kinds of TIFF that it takes for others.

    Planes of 16 bits that are not compressed it would read byte by byte; compressed signed samples, which libtiff gives
    in this machine's order, in the file's.
    """
    if opened.format != "TIFF" or opened.tag_v2.get(258, (8,))[0] not in (16, 32):
        return list(opened.tile)
    order = "L" if opened.tag_v2.prefix == b"II" else "B"
    found = []
    for tile in opened.tile:
        raw = _raw(tile)
        if tile.codec_name == "libtiff":
            raw = {"I;16BS": "I;16NS", "I;32BS": "I;32NS"}.get(raw, raw)
        elif raw in ("R", "G", "B", "A"):
            raw = f"{raw};16{order}"
        found.append(_read_as(tile, raw))
    return found


def _lower_bytes(handle: BinaryIO, tiles: list) -> Image.Image:
    """A picture of 16-bit colour once more, its samples' lower bytes (of compressed planes the upper ones again)."""
    image = _open(handle)
    grey = _raw(tiles[0]) == "LA;16B"  # its four bytes as four bands
    image.tile = [_read_as(tile, "RGBA" if grey else _raw(tile)[:-1] + _OTHER[_raw(tile)[-1]]) for tile in tiles]
    with _pillow():
        image.load()
    return Image.merge("RGB", (image.getchannel(1),) * 3) if grey else image
