"""Pictures of every kind: what they look like, how far they are reduced, what is refused and why, how much memory."""

import hashlib
import io
import os
import subprocess
import sys
import textwrap
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, features

from samer.config import DataConfig, InputError, load_config
from samer.data import decoding, pictures
from samer.data.pictures import PictureError, limit_pixels, load_image, read_picture
from samer.data.records import ImageRecord
from samer.retrievers.hf import Retriever

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(7)


def noise(height, width, bands=3, top=255):
    """A coarse random picture, so that neighbours differ."""
    return RNG.integers(0, top + 1, (height, width, bands)).astype(np.uint8)


def boxes(values, wide, high):
    """Means of boxes of wide x high pixels, the last ones of what is there, by loops."""
    height, width = values.shape[:2]
    rows = [
        [values[y : y + high, x : x + wide].reshape(-1, values.shape[2]).mean(0) for x in range(0, width, wide)]
        for y in range(0, height, high)
    ]
    return np.array(rows)


def png(values, bits=16, kind=2, extra=b""):
    """A PNG of big-endian samples (H, W, bands), by hand; `extra`: chunks before the pixels."""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    height, width = values.shape[:2]
    rows = values.astype(">u2" if bits == 16 else "u1").reshape(height, -1)
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, kind, 0, 0, 0])
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    extra = b"".join(chunk(name, words) for name, words in extra) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def refusal(path, *words):
    with pytest.raises(PictureError) as caught:
        load_image(path, *words)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


# ---- reduction


def over_white(values):
    colour, alpha = values[..., :3].astype(float), values[..., 3:].astype(float) / 255
    return colour * alpha + 255 * (1 - alpha)


MODES = {
    "RGB": (3, lambda values: values.astype(float)),
    "L": (1, lambda values: values.repeat(3, 2).astype(float)),
    "RGBA": (4, over_white),
    "LA": (2, lambda values: over_white(values[..., [0, 0, 0, 1]])),
}


@pytest.mark.parametrize("strip", [10**6, 700])
@pytest.mark.parametrize("mode", MODES)
def test_a_reduced_picture_is_the_mean_of_whole_boxes(tmp_path, monkeypatch, mode, strip):
    monkeypatch.setattr(decoding, "_STRIP", strip)
    bands, seen = MODES[mode]
    values = noise(70, 101, bands)
    Image.fromarray(values.squeeze()).save(tmp_path / "a.png")
    found = np.asarray(load_image(tmp_path / "a.png", (10, 9)))
    assert found.shape == (24, 21, 3)  # boxes of 5 x 3: 101 // 20, 70 // 18
    assert np.abs(found - boxes(seen(values), 5, 3)).max() <= 1.5


def test_a_palette_with_transparency_is_reduced_as_it_is_seen(tmp_path):
    image = Image.fromarray(RNG.integers(0, 3, (40, 60)).astype(np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 200, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=bytes([0, 128, 255]))
    table = over_white(np.array([[255, 0, 0, 0], [0, 0, 200, 128], [10, 20, 30, 255]]))
    found = np.asarray(load_image(tmp_path / "a.png", (10, 10)))
    assert np.abs(found - boxes(table[np.asarray(image)], 3, 2)).max() <= 1.5


@pytest.mark.parametrize("form", ["png", "tif", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("size", [(64, 48), (100, 50), (79, 59), (39, 400), (12, 9)])
def test_pictures_of_less_than_four_times_what_is_needed_are_untouched(tmp_path, form, size):
    """A side is halved from four times the need on: what is left is twice the need, never less."""
    Image.fromarray(noise(*size[::-1])).save(tmp_path / f"a.{form}")
    whole = np.asarray(load_image(tmp_path / f"a.{form}"))
    assert np.array_equal(whole, np.asarray(Image.open(tmp_path / f"a.{form}").convert("RGB")))
    needs = (size[0] // 4 + 1, size[1] // 4 + 1)
    assert np.array_equal(np.asarray(load_image(tmp_path / f"a.{form}", needs)), whole)


@settings(deadline=None, max_examples=80)
@given(
    size=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    needs=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    form=st.sampled_from(["JPEG", "PNG", "GIF"]),
    turned=st.booleans(),
    inside=st.booleans(),
)
def test_a_picture_never_comes_below_twice_what_is_needed(size, needs, form, turned, inside):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6 if turned and form != "GIF" else 1
    Image.new("RGB", size, (10, 200, 30)).save(file, form, **({} if form == "GIF" else {"exif": exif}))
    shown = size[::-1] if exif[0x0112] == 6 else size
    found = decoding.decode(file, needs, inside=inside)
    if inside:  # in its own shape, scaled by one share
        share = min(1, needs[0] / shown[0], needs[1] / shown[1])
        needs = shown[0] * share, shown[1] * share
        width, height = (-(-side // box) for side, box in zip(shown, [round(shown[0] / found.width)] * 2))
        assert abs(width - found.width) <= 8
        assert abs(height - found.height) <= 8
    for side, need, got in zip(shown, needs, found.size):
        assert min(side, 2 * need) <= got <= side
        if not inside:
            assert got < 4 * need + 4 or got == side


def test_a_large_jpeg_is_what_its_boxes_show(tmp_path):
    """The decoder's own reduction, against the whole picture's means."""
    small = Image.fromarray(noise(30, 40))
    small.resize((800, 600), Image.BICUBIC).save(tmp_path / "a.jpg", quality=92)
    whole = np.asarray(load_image(tmp_path / "a.jpg")).astype(float)
    for needs, (wide, high) in {(48, 36): (8, 8), (20, 36): (16, 8), (90, 60): (4, 4), (90, 20): (4, 12)}.items():
        found = np.asarray(load_image(tmp_path / "a.jpg", needs))
        expected = boxes(whole, wide, high)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 3, needs


@pytest.mark.parametrize("form", ["jpg", "png", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_goes_before_what_is_needed(tmp_path, form, orientation):
    turn = {2: [np.fliplr], 3: [np.rot90] * 2, 4: [np.flipud], 6: [np.rot90] * 3, 8: [np.rot90]}
    turn |= {5: [np.rot90, np.flipud], 7: [np.rot90, np.fliplr]}
    values = np.asarray(Image.fromarray(noise(4, 6)).resize((240, 160), Image.NEAREST))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(values).save(tmp_path / f"a.{form}", exif=exif, quality=95)
    shown = values
    for step in turn.get(orientation, []):
        shown = step(shown)
    found = np.asarray(load_image(tmp_path / f"a.{form}", (10, 20)))
    wide, high = shown.shape[1] // 20, shown.shape[0] // 40
    if form == "jpg":  # its decoder halves only
        wide, high = (-(-shown.shape[k] // found.shape[k]) for k in (1, 0))
        assert min(wide / 2, high) >= 2
    expected = boxes(shown.astype(float), wide, high)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < (12 if form in ("jpg", "webp", "avif") else 1)


def test_heic_is_read_turned_as_it_is_stored(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    values = np.asarray(Image.fromarray(noise(3, 4)).resize((400, 300), Image.NEAREST))
    file = heif.from_pillow(Image.fromarray(values))
    file.save(tmp_path / "a.heic", quality=95)
    found = np.asarray(load_image(tmp_path / "a.heic"))
    assert np.abs(found.astype(int) - values).mean() < 8
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.heic").read_bytes())  # as messengers name them
    assert np.array_equal(np.asarray(load_image(tmp_path / "b.jpg")), found)
    reduced = np.asarray(load_image(tmp_path / "a.heic", (10, 10)))
    assert np.abs(reduced - boxes(found.astype(float), 20, 15)).max() <= 1


def test_heic_is_turned_once(tmp_path):
    """Telephones write a quarter turn twice, as HEIF does and as EXIF does; the first counts."""
    heif, exif = pytest.importorskip("pillow_heif"), Image.Exif()
    values = np.zeros((32, 64, 3), np.uint8)
    values[:16, :16] = 255
    exif[0x0112] = 6
    heif.from_pillow(Image.fromarray(values)).save(tmp_path / "a.heic", exif=exif.tobytes(), quality=95)
    assert b"irot" in (tmp_path / "a.heic").read_bytes()
    found = np.asarray(load_image(tmp_path / "a.heic")).astype(int)
    assert found.shape == (64, 32, 3)
    assert np.abs(found - np.rot90(values, 3)).mean() < 4
    assert pictures.displayed_size(tmp_path / "a.heic") == (32, 64)


def test_the_first_picture_of_several_is_read(tmp_path):
    first, second = Image.new("RGB", (60, 40), (200, 30, 30)), Image.new("RGB", (60, 40), (30, 30, 200))
    for name, form in (("a.gif", "GIF"), ("a.png", "PNG"), ("a.webp", "WEBP"), ("a.tif", "TIFF"), ("a.jpg", "MPO")):
        first.save(tmp_path / name, form, save_all=True, append_images=[second])
        for needs in (None, (10, 10)):
            found = np.asarray(load_image(tmp_path / name, needs)).astype(int)
            assert np.abs(found - [200, 30, 30]).max() < 12, name
            assert found.shape[:2] == ((20, 20) if needs and name != "a.jpg" else (20, 30) if needs else (40, 60))


def test_a_wrong_suffix_is_read_by_content(tmp_path):
    for form in ("PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"):
        Image.new("RGB", (8, 6), (200, 30, 30)).save(tmp_path / f"{form}.jpg", form)
        assert np.abs(np.asarray(load_image(tmp_path / f"{form}.jpg")).astype(int) - [200, 30, 30]).max() < 8


def test_colours_of_other_spaces_are_reduced_right(tmp_path):
    """CMYK in Adobe's inverted way, and Lab, against the whole picture."""
    image = Image.fromarray(noise(9, 12)).resize((240, 180), Image.BICUBIC)
    image.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    lab = np.zeros((180, 240, 3), np.uint8)
    lab[:, :120] = 255, 0, 0  # white, as Pillow's unsigned L and signed a, b
    Image.fromarray(lab, "LAB").save(tmp_path / "b.tif")
    wholes = {"a.jpg": (np.asarray(image).astype(float), 2), "b.tif": (lab[..., :1].repeat(3, 2).astype(float), 3)}
    for name, (whole, high) in wholes.items():  # the JPEG's decoder halves, the boxes do the rest
        found = np.asarray(load_image(tmp_path / name, (30, 30)))
        assert np.abs(found - boxes(whole, 4, high)).mean() < 4, name


# ---- more than 8 bits


def scaled(values, bits):
    return np.floor(values.astype(float) * 255 / (2**bits - 1) + 0.5)


@pytest.mark.parametrize(
    ("top", "bits"), [(200, 8), (255, 8), (256, 10), (1023, 10), (3000, 12), (9000, 14), (16384, 16)]
)
def test_grey_is_scaled_by_what_it_holds(tmp_path, top, bits):
    values = RNG.integers(0, top + 1, (20, 30, 1))
    values[0, 0] = top
    (tmp_path / "a.png").write_bytes(png(values, kind=0))
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), scaled(values, bits).repeat(3, 2))
    alpha = np.concatenate([values, np.full_like(values, 65535)], 2)
    (tmp_path / "b.png").write_bytes(png(alpha, kind=4))
    assert np.abs(np.asarray(load_image(tmp_path / "b.png")) - scaled(values, bits)).max() <= 1


@pytest.mark.parametrize(("stated", "top", "bits"), [(12, 700, 12), (12, 4095, 12), (10, 700, 10), (12, 60000, 16)])
def test_what_a_png_states_of_its_bits_is_heeded(tmp_path, stated, top, bits):
    values = RNG.integers(0, top + 1, (20, 30, 1))
    values[0, 0] = top
    extra = [(b"gAMA", bytes([0, 0, 177, 143])), (b"sBIT", bytes([stated]))]
    (tmp_path / "a.png").write_bytes(png(values, kind=0, extra=extra))
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), scaled(values, bits).repeat(3, 2))


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.int32, np.uint32])
def test_grey_tiffs_of_every_kind_are_scaled(tmp_path, kind, order, compression):
    tifffile = pytest.importorskip("tifffile")
    if kind is np.uint32 and order == ">":
        pytest.skip("Pillow does not read it")
    values = RNG.integers(0, 4000, (40, 50)).astype(kind)
    values[0, 0] = 4000
    tifffile.imwrite(tmp_path / "a.tif", values, byteorder=order, compression=compression)
    found = np.asarray(load_image(tmp_path / "a.tif"))
    assert np.array_equal(found, scaled(values, 12)[..., None].repeat(3, 2))
    reduced = np.asarray(load_image(tmp_path / "a.tif", (6, 6)))
    assert np.abs(reduced - boxes(scaled(values, 12)[..., None], 4, 3)).max() <= 1


def test_grey_of_32_bits_signed_values_and_white_as_zero(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    wide = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    tifffile.imwrite(tmp_path / "a.tif", wide)
    assert np.asarray(load_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 128, 255]
    tifffile.imwrite(tmp_path / "b.tif", np.array([[0, 100_000]], np.uint32))
    assert np.asarray(load_image(tmp_path / "b.tif"))[0, :, 0].tolist() == [0, 195]  # of 2 ** 17 - 1
    tifffile.imwrite(tmp_path / "c.tif", np.array([[-2048, -1024, 0, 2047]], np.int16))
    assert np.asarray(load_image(tmp_path / "c.tif"))[0, :, 0].tolist() == [0, 64, 128, 255]
    values = np.array([[0, 1000, 4095]], np.uint16)
    tifffile.imwrite(tmp_path / "d.tif", values, photometric="miniswhite")
    assert np.asarray(load_image(tmp_path / "d.tif"))[0, :, 0].tolist() == [255, 193, 0]


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_colour_tiffs_of_16_bits(tmp_path, compression, order, planes):
    """Small values are scaled by what they are; large ones give their upper bytes, as Pillow reads them."""
    tifffile = pytest.importorskip("tifffile")
    for top in (4095, 60000):
        values = RNG.integers(0, top + 1, (40, 50, 3)).astype(np.uint16)
        values[0, 0] = top
        stored = values if planes == "contig" else values.transpose(2, 0, 1)
        how = {"byteorder": order, "compression": compression, "planarconfig": planes}
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", **how)
        found = np.asarray(load_image(tmp_path / "a.tif"))
        expected = scaled(values, 12) if top == 4095 else values >> 8
        # of compressed planes Pillow gives no lower bytes: 16 steps of grey
        assert np.abs(found - expected).max() <= (16 if (compression, planes, top) == ("zlib", "separate", 4095) else 0)


@pytest.mark.parametrize(("kind", "bands"), [(2, 3), (6, 4)])
def test_colour_pngs_of_16_bits(tmp_path, kind, bands):
    for top, bits in ((4095, 12), (1000, 10), (60000, None)):
        values = RNG.integers(0, top + 1, (30, 40, bands))
        values[0, 0] = top
        if bands == 4:
            values[..., 3] = RNG.integers(0, 2, (30, 40)) * 65535
        (tmp_path / "a.png").write_bytes(png(values, kind=kind))
        colour = scaled(values[..., :3], bits) if bits else values[..., :3] >> 8
        expected = np.where(values[..., 3:] == 0, 255, colour) if bands == 4 else colour
        assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), expected)


# ---- what is refused, and why


def test_reasons(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(noise(80, 80)).save(picture, "JPEG")
    whole = picture.getvalue()
    tests = {
        "empty file": b"",
        "cut short": whole[: len(whole) // 2],
        "not a picture": b"<html>404</html>",
    }
    for reason, content in tests.items():
        path = tmp_path / f"{reason}.jpg"
        path.write_bytes(content)
        error = refusal(path)
        assert error.reason == reason
        assert error.skipped("a/b.jpg") == pictures.Skipped("a/b.jpg", reason, str(error))
    (tmp_path / "zeros.jpg").write_bytes(bytes(4096))  # what a full disk leaves
    assert refusal(tmp_path / "zeros.jpg").reason == "empty file"
    Image.new("F", (4, 4)).save(tmp_path / "f.tif")
    assert refusal(tmp_path / "f.tif").reason == "floating-point pixels"
    assert refusal(tmp_path / "none.jpg").reason == "gone"
    assert refusal(tmp_path).reason == "not a regular file"
    os.symlink("circle.jpg", tmp_path / "circle.jpg")
    assert refusal(tmp_path / "circle.jpg").reason == "links lead in a circle"
    long = tmp_path / ("x" * 300 + ".jpg")
    assert refusal(long).reason == "name too long"
    with pytest.raises(PictureError, match="no name of a file"):
        load_image(f"{tmp_path}/a\0b.jpg")


def test_what_a_drive_refuses_is_not_the_picture_s_fault(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")

    def stale(path, *words):
        raise OSError(116, "Stale file handle", str(path))

    monkeypatch.setattr(pictures, "regular_file", stale)
    error = refusal(tmp_path / "a.jpg")
    assert error.transient
    assert "mount it again" in str(error)
    assert error.skipped("a").transient


def test_heic_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    pytest.importorskip("pillow_heif").from_pillow(Image.new("RGB", (16, 16))).save(tmp_path / "a.jpg")
    monkeypatch.setattr(decoding, "heic_is_read", lambda: False)
    error = refusal(tmp_path / "a.jpg")
    assert error.reason == "HEIC without pillow-heif"
    assert "pip install pillow-heif" in str(error)
    assert "samer[heic]" in str(error)


@pytest.fixture
def limit():
    yield limit_pixels
    limit_pixels(DataConfig.max_megapixels)


def test_the_limit_of_pixels_is_a_setting(tmp_path, limit):
    assert DataConfig.max_megapixels > 200
    for value in ("0", "-1", "nan", ".inf"):
        with pytest.raises(InputError, match="max_megapixels"):
            load_config(None, [f"data.max_megapixels={value}"])
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="megapixels"):
            limit(value)
    limit(load_config(None, ["data.max_megapixels=0.01"]).data.max_megapixels)
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    Image.new("L", (100, 101)).save(tmp_path / "b.png")
    assert load_image(tmp_path / "a.png").size == (100, 100)
    error = refusal(tmp_path / "b.png")
    assert error.reason == "too many pixels"
    assert "data.max_megapixels allows 0.01 million" in str(error)


def test_large_pictures_are_read_and_bombs_refused_without_pillow_s_word(tmp_path, limit):
    """Pillow warns from 89 million pixels on and refuses from 179 million on; the setting alone counts."""
    before = Image.MAX_IMAGE_PIXELS
    Image.new("1", (15000, 14000)).save(tmp_path / "210.png")
    Image.new("1", (20000, 15000)).save(tmp_path / "300.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "210.png", (64, 64)).size == (129, 129)
        assert refusal(tmp_path / "300.png", (64, 64)).reason == "too many pixels"
        limit(300)
        assert load_image(tmp_path / "300.png", (64, 64)).size == (129, 129)
    assert before == Image.MAX_IMAGE_PIXELS


def test_long_texts_in_a_png_do_not_matter(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("history", "x" * 3_000_000, zip=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", pnginfo=info)
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from samer.data.pictures import load_image
{body}
"""


def child(body, *words):
    """What a process of its own printed on its two streams."""
    code = CHILD.format(body=textwrap.dedent(body))
    words = [sys.executable, "-c", code, str(ROOT), *map(str, words)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_odd_files_are_read_or_refused_quietly(tmp_path):
    """Neither Pillow nor libtiff, which writes to the terminal by itself, says a word without a file's name."""
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", noise(64, 64), compression="zlib", extratags=[(50000, "H", 1, 5, True)])
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[content.find(b"\x78", 8) + 20] ^= 0xFF
    (tmp_path / "b.tif").write_bytes(content)
    image = Image.new("P", (8, 8))
    image.putpalette([1, 2, 3] * 256)
    image.save(tmp_path / "c.png", transparency=bytes([5, 6]))
    Image.new("RGB", (8, 8)).save(
        tmp_path / "d.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06"
    )
    body = """
    for name in sys.argv[2:]:
        try:
            print(load_image(name).size)
        except Exception as error:
            print(type(error).__name__, error)
    """
    out, err = child(body, *(tmp_path / name for name in ("a.tif", "b.tif", "c.png", "d.jpg")))
    assert err == ""
    lines = out.splitlines()
    assert [lines[0], *lines[2:]] == ["(64, 64)", "(8, 8)", "(8, 8)"]
    assert lines[1].startswith(f"PictureError {tmp_path / 'b.tif'}: not a readable image")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space hold on Linux")
def test_too_little_memory_is_an_error_that_names_the_file(tmp_path):
    Image.new("L", (15000, 15000)).save(tmp_path / "a.png", compress_level=1)
    body = """
    import resource
    from samer.data.pictures import PictureError
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
    try:
        load_image(sys.argv[2], (64, 64))
    except PictureError as error:
        print(error.reason, str(error).startswith(sys.argv[2]))
    """
    assert child(body, tmp_path / "a.png")[0].split("\n")[0] == "out of memory True"


# ---- memory


def test_threads_hold_so_many_pixels_at_once_in_the_order_of_their_coming():
    gate, held, seen, order = decoding.Gate(10), [0], [], []
    lock, first, go = threading.Lock(), threading.Event(), threading.Event()

    def take(number, pixels):
        with gate.room(pixels):
            with lock:
                held[0] += pixels
                seen.append(held[0])
                order.append(number)
            if number == 0:
                first.set()
                assert go.wait(60)
            with lock:
                held[0] -= pixels

    threads = [threading.Thread(target=take, args=(0, 6))]
    threads[0].start()
    assert first.wait(60)
    for number, pixels in enumerate([25, 3, 4, 3, 10, 1], 1):  # 3 would fit beside the first, but 25 came before
        threads.append(threading.Thread(target=take, args=(number, pixels)))
        threads[-1].start()
        while len(gate._queue) < number:
            threads[-1].join(0.001)
    go.set()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert order[:2] == [0, 1]
    assert sorted(order) == list(range(7))
    assert max(total for total in seen if total != 25) <= 10
    assert 25 in seen  # alone
    assert gate.held == 0


def test_a_failed_picture_gives_its_room_back(tmp_path):
    Image.fromarray(noise(300, 300)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:9000])
    for _ in range(3):
        refusal(tmp_path / "a.jpg")
    assert decoding._gate.held == 0
    assert not decoding._gate._queue


PEAK = """
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1e3
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_threads_that_decode_at_once_stay_within_bounds(tmp_path):
    """Ten pictures of 48 megapixels in ten threads: 480 MB without the gate, one at a time with it."""
    Image.new("L", (8000, 6000), 99).save(tmp_path / "a.png", compress_level=1)
    Image.new("RGB", (40, 30)).save(tmp_path / "small.png")
    body = (
        PEAK
        + """
from concurrent.futures import ThreadPoolExecutor
load_image(sys.argv[3], (64, 64))
before = peak()
with ThreadPoolExecutor(10) as pool:
    list(pool.map(lambda _: load_image(sys.argv[2], (64, 64)), range(10)))
print(peak() - before)
"""
    )
    assert float(child(body, tmp_path / "a.png", tmp_path / "small.png")[0]) < 220


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_a_batch_of_photographs_is_held_reduced(tmp_path):
    """32 photographs of 12 megapixels: 1,150 MB as they are, of which the batch keeps 16 times less."""
    Image.fromarray(noise(75, 100)).resize((4000, 3000), Image.BICUBIC).save(tmp_path / "a.jpg")
    Image.fromarray(noise(8, 10)).resize((400, 300)).save(tmp_path / "small.jpg")
    body = (
        PEAK
        + """
from samer.data.records import ImageRecord
from samer.retrievers.hf import Retriever
retriever = Retriever.load(sys.argv[1] + "/assets/retriever")
retriever.record_inputs([ImageRecord("a", sys.argv[3], ())])
before = peak()
print(retriever.record_inputs([ImageRecord(str(k), sys.argv[2], ()) for k in range(32)])["pixel_values"].shape)
print(peak() - before)
"""
    )
    shape, grown = child(body, tmp_path / "a.jpg", tmp_path / "small.jpg")[0].splitlines()
    assert shape == "torch.Size([32, 3, 128, 128])"
    assert float(grown) < 250


def test_retrievers_say_what_size_they_need(base, tmp_path):
    retriever = Retriever.load(str(base))
    assert retriever.picture_size == (64, 64)
    smooth = Image.fromarray(noise(6, 8)).resize((1600, 1200), Image.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95)
    reduced = retriever.record_inputs([ImageRecord("a", tmp_path / "a.jpg", ())])["pixel_values"]
    whole = retriever.image_inputs([Image.open(tmp_path / "a.jpg").convert("RGB")])["pixel_values"]
    assert 0 < (reduced - whole).abs().max() < 0.06  # of a range of 2
    sizes = {"do_resize": True, "size": {"longest_edge": 64}}, {"do_resize": False, "size": {"width": 4, "height": 4}}
    for values in sizes:
        retriever.processor.image_processor = type("Pictures", (), values)()
        assert retriever.picture_size is None
    retriever.processor.image_processor = None
    assert retriever.picture_size is None


# ---- with its hash


def test_a_picture_comes_with_the_hash_of_its_bytes(tmp_path):
    Image.fromarray(noise(90, 90)).save(tmp_path / "a.jpg")
    picture = read_picture(tmp_path / "a.jpg", (10, 10))
    assert picture.content == hashlib.blake2b((tmp_path / "a.jpg").read_bytes(), digest_size=16).hexdigest()
    assert picture.about.st_size == (tmp_path / "a.jpg").stat().st_size
    assert picture.about.st_ino == (tmp_path / "a.jpg").stat().st_ino
    assert np.array_equal(np.asarray(picture.image), np.asarray(load_image(tmp_path / "a.jpg", (10, 10))))


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("broken", [False, True])
def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch, times, broken):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "b.png")
    final, left, decode = (tmp_path / "b.png").read_bytes(), [times], decoding.decode
    if broken:
        (tmp_path / "a.png").write_bytes(final[:40])

    def changing(handle, *words, **more):
        if left[0]:
            left[0] -= 1
            (tmp_path / "a.png").write_bytes(final + bytes(left[0]))  # in place, as editors and copies write
            if broken:
                raise decoding.RefusedError("cut short", "half")
        return decode(handle, *words, **more)

    monkeypatch.setattr(pictures, "decode", changing)
    if times == 2:
        with pytest.raises(PictureError, match="being written") as caught:
            read_picture(tmp_path / "a.png")
        assert (caught.value.reason, caught.value.transient) == ("being written", True)
    else:
        picture = read_picture(tmp_path / "a.png")
        assert picture.image.getpixel((0, 0)) == (0, 0, 255)
        assert picture.content == hashlib.blake2b(final, digest_size=16).hexdigest()


def test_avif_is_there():
    assert features.check("avif"), "this Pillow reads no AVIF; install one of its wheels"
