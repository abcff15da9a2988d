"""Flickr30k-Entities reader: golden parses by hand, every refusal by its message, both layouts, real photographs."""

import contextlib
import os
import runpy
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from samer.config import InputError
from samer.data.flickr import find_layout, load_split, parse_annotation, parse_sentence
from samer.data.pictures import load_image
from samer.data.records import Caption, Phrase

FIXTURES = Path(__file__).parent / "fixtures"
PHOTOS = FIXTURES / "photos"
SENTENCE = "[/EN#283585/people/other Two young guys] with shaggy hair look at [/EN#0/notvisual it] ."
BNDBOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"


def voc(*objects: str, width=100, height=50) -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(f'<object>{o}</object>' for o in objects)}</annotation>"


def boxed(chain: str, *box) -> str:
    return f"<name>{chain}</name>" + BNDBOX.format(*box)


@pytest.fixture
def copy(tmp_path):
    """A writable two-image copy: `train` holds 11 and 12, `test` holds 11."""
    annotations, images = tmp_path / "annotations", tmp_path / "images" / "Images"
    for folder in (annotations / "Sentences", annotations / "Annotations", images):
        folder.mkdir(parents=True)
    (annotations / "train.txt").write_text("11\n12\n")
    (annotations / "test.txt").write_text("11\n")
    for image_id in ("11", "12"):
        lines = ["[/EN#1/people A man] .", "[/EN#1/people He] sits on [/EN#2/scene a lawn] .", "A man .", "B .", "C ."]
        (annotations / "Sentences" / f"{image_id}.txt").write_text("\n".join(lines) + "\n")
        text = voc(boxed("1", 1, 1, 50, 50), "<name>2</name><scene>1</scene><nobndbox>0</nobndbox>")
        (annotations / "Annotations" / f"{image_id}.xml").write_text(text)
        Image.new("RGB", (100, 50)).save(images / f"{image_id}.jpg")
    return tmp_path


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- sentences


def test_parse_sentence_golden():
    text, phrases = parse_sentence(SENTENCE)
    assert text == "Two young guys with shaggy hair look at it ."
    assert phrases == (
        Phrase("Two young guys", "283585", ("people", "other"), 0, 14, ()),
        Phrase("it", "0", ("notvisual",), 40, 42, ()),
    )


def test_parse_sentence_joins_by_single_spaces():
    assert parse_sentence("  a \t b  \r\n") == ("a b", ())
    text, (phrase,) = parse_sentence("On  [/EN#7/other  the \u00a0 Stra\u00dfe ]  .")
    assert text == "On the Straße ."
    assert text[phrase.start : phrase.end] == phrase.text == "the Straße"


def test_parse_sentence_gives_boxes_but_never_to_notvisual():
    box = ((0.0, 0.0, 1.0, 1.0),)
    line = "[/EN#1/people A man] and [/EN#0/other that] and [/EN#3/notvisual it] and [/EN#4/other one]"
    _, phrases = parse_sentence(line, {"0": box, "1": box, "3": box})
    assert [phrase.boxes for phrase in phrases] == [box, (), (), ()]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("[/EN#1/people A man", "unbalanced"),
        ("A man] sits", "unbalanced"),
        ("[/EN#1/people A m]an] sits", "unbalanced"),
        ("[/EN#1/people A m[an] sits", "unbalanced"),
        ("a[b c", "unbalanced"),
        ("[/EN#1/people A [/EN#2/other man] ]", "inside another"),
        ("[/EN#/people A man]", "expected"),
        ("[/people A man]", "expected"),
        ("[/EN#x/people A man]", "expected"),
        ("[/EN#1 A man]", "expected"),
        ("[/EN#1/ A man]", "expected"),
        ("[/EN#1/people//other A man]", "expected"),
        ("[/EN#1/people]", "expected"),
        ("[A man]", "expected"),
        ("A [/EN#1/people ] man", "no words"),
        ("", "empty sentence"),
        (" \r\n", "empty sentence"),
    ],
)
def test_parse_sentence_refuses(line, why):
    assert why in refusal(parse_sentence, line)


words = st.text(st.characters(exclude_categories=("Z", "C"), exclude_characters="[]"), min_size=1, max_size=6)
chunks = st.one_of(
    words.map(lambda word: (None, (), [word])),
    st.tuples(
        st.integers(0, 10**6).map(str),
        st.lists(st.sampled_from(["people", "other", "scene", "notvisual"]), min_size=1, max_size=3).map(tuple),
        st.lists(words, min_size=1, max_size=4),
    ),
)


@given(st.lists(chunks, min_size=1, max_size=8))
def test_markup_round_trip(sentence):
    marked, plain, expected = [], "", []
    for chain_id, types, phrase_words in sentence:
        phrase = " ".join(phrase_words)
        start = len(plain) + 1 if plain else 0
        plain = f"{plain} {phrase}" if plain else phrase
        if chain_id is None:
            marked.append(phrase)
        else:
            marked.append(f"[/EN#{chain_id}/{'/'.join(types)} {phrase}]")
            expected.append(Phrase(phrase, chain_id, types, start, start + len(phrase), ()))
    text, phrases = parse_sentence(" ".join(marked))
    assert text == plain
    assert phrases == tuple(expected)
    assert all(text[phrase.start : phrase.end] == phrase.text for phrase in phrases)


@given(st.text("[]/EN#1a ", max_size=30))
def test_any_line_is_parsed_or_refused(line):
    try:
        text, phrases = parse_sentence(line)
    except InputError:
        return
    assert not set("[]") & set(text)
    assert all(text[phrase.start : phrase.end] == phrase.text != "" for phrase in phrases)


# ---- annotations


def write(tmp_path, text: str | bytes) -> Path:
    path = tmp_path / "11.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_parse_annotation_golden(tmp_path):
    text = voc(
        boxed("1", 1, 1, 100, 50),
        boxed("2", 11, 6, 60, 25),
        "<name>2</name><name>3</name>" + BNDBOX.format(100, 50, 100, 50),
        "<name>4</name><scene>1</scene><nobndbox>0</nobndbox>",
        "<name>5</name><scene>0</scene><nobndbox>1</nobndbox>",
    )
    assert parse_annotation(write(tmp_path, text)) == {
        "1": ((0.0, 0.0, 1.0, 1.0),),
        "2": ((0.1, 0.1, 0.6, 0.5), (0.99, 0.98, 1.0, 1.0)),
        "3": ((0.99, 0.98, 1.0, 1.0),),
    }


def test_one_pixel_outside_is_clamped(tmp_path):
    assert parse_annotation(write(tmp_path, voc(boxed("1", 0, 0, 101, 51)))) == {"1": ((0.0, 0.0, 1.0, 1.0),)}


@pytest.mark.parametrize(
    "box",
    [(-1, 1, 50, 50), (1, -1, 50, 50), (1, 1, 102, 50), (1, 1, 50, 52), (9, 1, 8, 50), (1, 9, 50, 8), (0, 0, 0, 0)],
)
def test_bad_boxes_are_refused(tmp_path, box):
    message = refusal(parse_annotation, write(tmp_path, voc(boxed("7", 1, 1, 2, 2), boxed("8", *box))))
    for part in ("11.xml", "object 2", "chain 8", "({}, {}, {}, {})".format(*box), "100 x 50"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<annotation>", "malformed XML"),
        ("", "malformed XML"),
        (b"\xff\xfe\x00", "malformed XML"),
        (b'<?xml version="1.0" encoding="nonsense"?><annotation/>', "malformed XML"),
        ("<annotation></annotation>", "no size"),
        (voc(width=0), "image size"),
        (voc(width="wide"), "'wide', not a number"),
        (voc(height="nan"), "'nan', not a number"),
        (voc(boxed("1", "a", 1, 2, 2)), "xmin is 'a'"),
        (voc("<name>1</name><bndbox><xmin>1</xmin></bndbox>"), "ymin is ''"),
        (voc(BNDBOX.format(1, 1, 2, 2)), "no name"),
        (voc("<name> </name>" + BNDBOX.format(1, 1, 2, 2)), "no name"),
        (voc("<name>1</name>"), "neither bndbox"),
    ],
)
def test_malformed_annotations_are_refused(tmp_path, text, why):
    message = refusal(parse_annotation, write(tmp_path, text))
    assert "11.xml" in message
    assert why in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    "doctype",
    [
        '<!DOCTYPE a [<!ENTITY b "1">]>',
        '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE a SYSTEM "http://localhost/a.dtd">',
        '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;&x;"><!ENTITY b "&y;&y;&y;&y;">]>',
        "<!DOCTYPE a>",
    ],
)
def test_doctype_is_refused(tmp_path, doctype, encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?>{doctype}' + voc("<name>&b;</name><scene>1</scene>")
    message = refusal(parse_annotation, write(tmp_path, text.encode(encoding)))
    assert "11.xml" in message
    assert "DOCTYPE" in message


def test_missing_annotation_file_is_refused(copy):
    (copy / "annotations/Annotations/12.xml").unlink()
    assert "12.xml" in refusal(load_split, copy, "train", boxes=True)
    assert len(load_split(copy, "train", boxes=True, limit_images=1)) == 1


# ---- layout and splits


def test_load_split_golden(copy):
    first, second = load_split(copy, "train", boxes=True)
    assert (first.image_id, second.image_id) == ("11", "12")
    assert first.image_path == copy / "images/Images/11.jpg"
    left = ((0.0, 0.0, 0.5, 1.0),)
    assert first.captions == (
        Caption("A man .", (Phrase("A man", "1", ("people",), 0, 5, left),), True),
        Caption(
            "He sits on a lawn .",
            (Phrase("He", "1", ("people",), 0, 2, left), Phrase("a lawn", "2", ("scene",), 11, 17, ())),
            True,
        ),
        Caption("A man .", (), True),
        Caption("B .", (), True),
        Caption("C .", (), True),
    )


@pytest.mark.parametrize("images", ["images", "Images", "flickr30k-images", "flickr30k_images"])
def test_root_layout_gives_the_same_records(copy, images):
    expected = load_split(copy, "train", boxes=True)
    for path in (copy / "annotations").iterdir():
        path.rename(copy / path.name)
    (copy / "images/Images").rename(copy / "moved")
    (copy / "images").rmdir()
    (copy / "moved").rename(copy / images)
    found = load_split(copy, "train", boxes=True)
    assert [replace(record, image_path=None) for record in found] == [replace(r, image_path=None) for r in expected]
    assert found[0].image_path == copy / images / "11.jpg"


def test_split_files_may_lie_apart_from_the_sentences(copy):
    expected = load_split(copy, "train", boxes=True)
    for path in (copy / "annotations").glob("*.txt"):
        path.rename(copy / path.name)
    assert load_split(copy, "train", boxes=True) == expected


def test_an_image_folder_without_images_is_passed_over(copy):
    (copy / "images/Images").rename(copy / "flickr30k-images")
    (copy / "images/Images").mkdir()
    (copy / "images/notes.txt").write_text("none here")
    assert find_layout(copy).images == copy / "flickr30k-images"


def test_missing_folders_are_refused_by_name(copy, tmp_path):
    message = refusal(find_layout, copy / "nowhere")
    assert str(copy / "nowhere") in message
    assert "not a folder" in message
    assert "not a folder" in refusal(find_layout, copy / "annotations/train.txt")
    (tmp_path / "empty").mkdir()
    message = refusal(load_split, tmp_path / "empty", "train", boxes=False)
    assert str(tmp_path / "empty") in message
    assert "annotations/train.txt, annotations/val.txt, annotations/test.txt, train.txt" in message
    shutil.move(copy / "images", copy / "pictures")
    message = refusal(find_layout, copy)
    assert "images/Images, images, Images, flickr30k-images, flickr30k_images" in message
    shutil.rmtree(copy / "annotations/Sentences")
    assert "annotations/Sentences, Sentences" in refusal(find_layout, copy)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_without_boxes_annotations_are_not_needed(tmp_path, split):
    root = tmp_path / "photos"
    shutil.copytree(PHOTOS, root)
    boxed_records = load_split(root, split, boxes=True)
    shutil.rmtree(root / "annotations/Annotations")
    bare_records = load_split(root, split, boxes=False)

    def without_boxes(record):
        captions = (replace(c, phrases=tuple(replace(p, boxes=()) for p in c.phrases)) for c in record.captions)
        return replace(record, captions=tuple(captions))

    assert bare_records != boxed_records
    assert bare_records == [without_boxes(record) for record in boxed_records]
    message = refusal(load_split, root, split, boxes=True)
    assert "no Annotations folder" in message
    assert str(root) in message


def test_without_boxes_annotations_are_not_opened(copy):
    (copy / "annotations/Annotations/11.xml").write_text("not XML")
    assert load_split(copy, "test", boxes=False)[0].captions[0].phrases[0].boxes == ()
    assert "11.xml" in refusal(load_split, copy, "test", boxes=True)


def test_unknown_split_lists_those_that_exist(copy):
    for split in ("dev", "", "../annotations/train"):
        message = refusal(load_split, copy, split, boxes=False)
        assert repr(split) in message
        assert "test, train" in message


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ("", "zero images"),
        ("\n \r\n", "zero images"),
        ("11\n\n11\n", "line 3: '11' is also on line 1"),
        ("../11\n", "line 1: '../11'"),
        ("a..b\n", "'a..b'"),
        ("11\nsub/12\n", "line 2: 'sub/12'"),
        ("sub\\12\n", "not an image id"),
        (".hidden\n", "'.hidden'"),
        (b"11\n\xff\n", "UTF-8"),
    ],
)
def test_bad_split_files_are_refused(copy, ids, why):
    (copy / "annotations/train.txt").write_bytes(ids if isinstance(ids, bytes) else ids.encode())
    message = refusal(load_split, copy, "train", boxes=False)
    assert "train.txt" in message
    assert why in message


def test_blank_lines_crlf_and_byte_order_mark_are_read(copy):
    expected = load_split(copy, "train", boxes=True)
    (copy / "annotations/train.txt").write_bytes(b"\xef\xbb\xbf11\r\n\r\n 12 \r\n")
    sentences = copy / "annotations/Sentences/11.txt"
    sentences.write_bytes(sentences.read_bytes().replace(b"\n", b"\r\n"))
    assert load_split(copy, "train", boxes=True) == expected
    sentences.write_bytes(sentences.read_bytes().removesuffix(b"\r\n"))
    assert load_split(copy, "train", boxes=True) == expected


def test_absent_images_are_counted_and_the_first_named(copy):
    (copy / "annotations/train.txt").write_text("11\n13\n12\n14\n")
    message = refusal(load_split, copy, "train", boxes=False)
    assert "2 of 4" in message
    assert "13.jpg" in message
    assert str(copy / "images/Images") in message


@pytest.mark.parametrize("suffix", [".jpeg", ".png"])
def test_other_image_suffixes(copy, suffix):
    path = copy / "images/Images/12.jpg"
    path.rename(path.with_suffix(suffix))
    assert load_split(copy, "train", boxes=False)[1].image_path == path.with_suffix(suffix)


def test_limit_images(copy):
    both = load_split(copy, "train", boxes=True)
    assert load_split(copy, "train", boxes=True, limit_images=1) == both[:1]
    assert load_split(copy, "train", boxes=True, limit_images=9) == both
    for limit in (0, -1):
        assert f"limit_images is {limit}" in refusal(load_split, copy, "train", boxes=True, limit_images=limit)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"a\nb\nc\nd\n", "4 captions, expected exactly 5"),
        (b"a\nb\nc\nd\ne\nf\n", "6 captions"),
        (b"", "0 captions"),
        (b"a\nb\n\nd\ne\n", "line 3: empty sentence"),
        (b"a\nb [/EN#1/people c\nd\ne\nf\n", "line 2: malformed markup"),
        (b"a\nb\nc\nd\n[/EN#/people e]\n", "line 5: malformed markup"),
        (b"a\nb\nc\nd\n\xe9\n", "UTF-8"),
        (None, "can't be read (No such file or directory); restore it"),
    ],
)
def test_bad_sentence_files_are_refused(copy, content, why):
    path = copy / "annotations/Sentences/12.txt"
    path.unlink() if content is None else path.write_bytes(content)
    message = refusal(load_split, copy, "train", boxes=False)
    assert str(path) in message
    assert why in message


def test_only_line_feeds_end_a_line(copy):
    path = copy / "annotations/Sentences/11.txt"
    path.write_text("a\u2028a\nb\x85b\nc\nd\ne\n", encoding="utf-8")
    assert [caption.text for caption in load_split(copy, "test", boxes=False)[0].captions][:2] == ["a a", "b b"]


@pytest.mark.parametrize("folder", ["annotations", "."])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", []),
        ("11 2\n99 5\n", [1]),
        ("11 2\n12 0\n", [2]),
        ("id sentence\n\n11\t1\n11 3\n", [0, 2]),
    ],
)
def test_unrelated_captions(copy, folder, content, expected):
    (copy / folder / "UNRELATED_CAPTIONS").write_text(content)
    captions = load_split(copy, "test", boxes=False)[0].captions
    assert [index for index, caption in enumerate(captions) if not caption.related] == expected


@pytest.mark.parametrize("content", ["11 1\n11\n", "11 1\n11 6\n", "11 1\n11 x\n", "11 1 2\n", "11 0\n11 5\n"])
def test_bad_unrelated_captions_are_refused(copy, content):
    (copy / "UNRELATED_CAPTIONS").write_text(content)
    assert "UNRELATED_CAPTIONS" in refusal(load_split, copy, "test", boxes=False)


# ---- images


def gradient(mode: str) -> Image.Image:
    x, y = np.meshgrid(np.arange(64), np.arange(40))
    return Image.fromarray(np.stack([x * 4, y * 6, 255 - x * 2], -1).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", ".jpg"), ("L", ".jpg"), ("CMYK", ".jpg"), ("1", ".png"), ("L", ".png"), ("P", ".png"), ("RGB", ".png")],
)
def test_load_image_of_every_mode(tmp_path, mode, suffix):
    image = gradient(mode)
    image.save(tmp_path / f"a{suffix}")
    loaded = load_image(tmp_path / f"a{suffix}")
    assert (loaded.mode, loaded.size) == ("RGB", (64, 40))
    difference = np.abs(np.asarray(loaded, float) - np.asarray(image.convert("RGB"), float))
    assert difference.mean() < (4 if suffix == ".jpg" else 1e-9)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (4, 2), (200, 0, 0, 255) if mode == "RGBA" else (90, 255))
        image.putpixel((0, 0), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
        image.save(tmp_path / "a.png")
    else:
        image = Image.new(mode, (4, 2), {"P": 1, "RGB": (200, 0, 0), "L": 90}[mode])
        if mode == "P":
            image.putpalette([0, 0, 0, 200, 0, 0])
        image.putpixel((0, 0), (0, 0, 0) if mode == "RGB" else 0)
        image.save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.mode == "RGB"
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 0)) == ((90, 90, 90) if mode in ("LA", "L") else (200, 0, 0))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 257 * 128, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(load_image(tmp_path / "a.png"))[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    # Where the stored top-left corner is displayed, by the EXIF standard.
    corners = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}
    image = Image.new("RGB", (64, 32))
    image.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    loaded = load_image(tmp_path / "a.jpg")
    width, height = loaded.size
    assert (width, height) == ((64, 32) if orientation < 5 else (32, 64))
    down, right = corners[orientation]
    corner = (width - 4 if right == "r" else 4, height - 4 if down == "b" else 4)
    assert loaded.getpixel(corner)[0] > 240


@pytest.mark.parametrize("name", ["1001.jpg", "1002.jpg", "1003.png", "1005.jpg", "1007.jpg"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.6])
def test_truncated_images_are_refused(tmp_path, name, share):
    content = (PHOTOS / "images/Images" / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(len(content) * share)])
    assert str(path) in refusal(load_image, path)


def test_other_bad_images_are_refused(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("<html>404</html>")
    assert str(path) in refusal(load_image, path)
    assert "no such image" in refusal(load_image, tmp_path / "b.jpg")
    assert str(tmp_path) in refusal(load_image, tmp_path)
    Image.new("F", (4, 4)).save(path, format="TIFF")
    assert "floating-point" in refusal(load_image, path)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["1003.png", "1007.jpg"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_damaged_images_are_loaded_or_refused(tmp_path_factory, name, changes):
    content = bytearray((PHOTOS / "images/Images" / name).read_bytes())
    for place, value in changes:
        content[int(place**4 * len(content))] = value  # mostly in the headers
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    path.write_bytes(content)
    with contextlib.suppress(InputError):  # any other exception fails the test
        assert load_image(path).mode == "RGB"


# ---- the photographs


def photo_records() -> list:
    return [record for split in ("train", "val", "test") for record in load_split(PHOTOS, split, boxes=True)]


def test_photos_load():
    records = photo_records()
    assert sorted(record.image_id for record in records) == [str(1001 + i) for i in range(29)]
    phrases = [phrase for record in records for caption in record.captions for phrase in caption.phrases]
    assert all(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 for phrase in phrases for x1, y1, x2, y2 in phrase.boxes)
    assert any(len(phrase.boxes) > 1 for phrase in phrases)
    assert any(len(phrase.types) > 1 for phrase in phrases)
    assert all(not phrase.boxes for phrase in phrases if phrase.chain_id == "0")
    for record in records:
        assert len(record.captions) == 5
        for caption in record.captions:
            assert caption.related
            assert any(phrase.boxes for phrase in caption.phrases)
            assert all(caption.text[p.start : p.end] == p.text for p in caption.phrases)
            assert "[" not in caption.text


def test_photos_have_the_size_their_annotation_says():
    stored = {}
    for record in photo_records():
        size = ET.parse(PHOTOS / f"annotations/Annotations/{record.image_id}.xml").find("size")
        image = load_image(record.image_path)
        assert image.size == (int(size.findtext("width")), int(size.findtext("height")))
        with Image.open(record.image_path) as opened:
            stored[record.image_id] = (opened.mode, opened.size == image.size)
    assert stored["1001"] == ("RGB", True)
    assert stored["1002"] == ("CMYK", True)
    assert stored["1003"] == ("P", True)
    assert stored["1005"] == ("L", True)
    assert stored["1007"] == ("RGB", False)  # EXIF: stored on its side


def test_the_rocket_stands_upright_in_its_box():
    (record,) = [record for record in photo_records() if record.image_id == "1007"]
    image = load_image(record.image_path).convert("L")
    (box,) = next(p.boxes for p in record.captions[0].phrases if p.text == "A white rocket")
    pixels = [round(value * side) for value, side in zip(box, image.size * 2)]
    inside = np.asarray(image.crop(pixels), float)
    beside = np.asarray(ImageChops.offset(image, 40, 0).crop(pixels), float)
    assert inside.mean() > beside.mean() + 40


def test_photos_are_remade_byte_for_byte(tmp_path):
    """Those that scikit-image ships; with SAMER_PHOTO_PACKAGES, the unpacked packages of Debian, all of them."""
    pytest.importorskip("skimage", reason="scikit-image ships some of the source photographs")
    maker = runpy.run_path(str(FIXTURES / "make_photos.py"), run_name="make_photos")
    packages = os.environ.get("SAMER_PHOTO_PACKAGES", "")
    some = [photo for photo in maker["photos"]() if packages or photo.package == "scikit-image"]
    assert len(some) in (8, 29)
    for photo in some:
        maker["store"](photo, maker["displayed"](photo, Path(packages)), tmp_path)
        (remade,) = (path for path in tmp_path.rglob(photo.file_name) if path.is_file())
        if PIL.__version__ == "13.0.0":  # the one that made the committed files
            assert remade.read_bytes() == (PHOTOS / "images/Images" / photo.file_name).read_bytes(), photo.id
    assert sum(path.stat().st_size for path in PHOTOS.rglob("*") if path.is_file()) < 1_000_000
