"""Data sets as people have them: what a reader leaves out and tells, what it refuses, and what it can simply read."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from samer.config import InputError, MergeConfig
from samer.data import make_reader
from samer.data.flickr import load_split, parse_annotation, parse_sentence
from samer.data.pictures import displayed_size, load_image
from samer.data.records import LONGEST_CAPTION, Caption, Phrase
from samer.data.sizes import same_shape, shape_of
from samer.features.read import FeatureStore
from samer.features.write import write_features
from samer.index.read import Index
from samer.index.write import build_index
from samer.search.words import LONGEST_QUERY

ROOT = Path(__file__).resolve().parents[1]
BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
LEFT = ((0.0, 0.0, 0.5, 1.0),)  # (1, 1, 50, 50) of 100 x 50


def xml(*boxes, size=(100, 50), filename=None):
    """An annotation whose boxes are all of chain 1."""
    name = f"<filename>{filename}</filename>" if filename else ""
    objects = "".join(f"<object><name>1</name>{BOX.format(*box)}</object>" for box in boxes)
    return f"<annotation>{name}<size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}</annotation>"


class Copy:
    """A writable data set of five images of 100 x 50, each with a man in its left half."""

    ids = ("11", "12", "13", "14", "15")

    def __init__(self, root):
        self.root, self.notes, self.images = root, root / "annotations", root / "images" / "Images"
        for folder in (self.notes / "Sentences", self.notes / "Annotations", self.images):
            folder.mkdir(parents=True)
        self.split("\n".join(self.ids) + "\n")
        for name in self.ids:
            self.sentences(name).write_text("[/EN#1/people A man] .\nA .\nB .\nC .\nD .\n")
            self.annotation(name).write_text(xml((1, 1, 50, 50)))
            self.picture(name)

    def split(self, content):
        (self.notes / "test.txt").write_bytes(content if isinstance(content, bytes) else content.encode())

    def sentences(self, name):
        return self.notes / "Sentences" / f"{name}.txt"

    def annotation(self, name):
        return self.notes / "Annotations" / f"{name}.xml"

    def picture(self, name, size=(100, 50), **more):
        Image.new("RGB", size).save(self.images / f"{name}.jpg", **more)

    def load(self, **more):
        return load_split(self.root, "test", **{"boxes": True, **more})

    def boxes(self):
        """The man's boxes in every image."""
        return [record.captions[0].phrases[0].boxes for record in self.load()]


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path / "data")


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def notes_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


# --- boxes ------------------------------------------------------------------------------------------------------------

BAD = [(-1, 1, 50, 50), (1, 1, 102, 50), (1, 1, 50, 52), (9, 1, 8, 50), (1, 9, 50, 8), (0, 0, 0, 0), (50, 50, 1, 1)]


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_box_is_left_out_and_the_others_stay(copy, capsys, bad):
    copy.annotation("12").write_text(xml(bad, (1, 1, 50, 50), bad))
    assert copy.boxes() == [LEFT] * 5
    (line,) = notes_of(capsys)
    assert line == (
        f"note: test of {copy.root}: 2 boxes of 1 images are empty, inverted or outside the picture, and left out "
        "(12.xml); data.strict=true refuses that"
    )


def test_bad_boxes_are_counted_over_the_whole_split_and_the_first_three_files_are_named(copy, capsys):
    for name in copy.ids[:4]:
        copy.annotation(name).write_text(xml(*BAD))
    assert copy.boxes() == [(), (), (), (), LEFT]
    (line,) = notes_of(capsys)
    assert "28 boxes of 4 images are empty" in line
    assert "(11.xml, 12.xml, 13.xml, ...)" in line
    copy.load()
    assert notes_of(capsys) == []  # told once


@pytest.mark.parametrize("bad", BAD)
def test_strict_refuses_the_first_bad_box(copy, capsys, bad):
    copy.annotation("12").write_text(xml((1, 1, 50, 50), bad))
    message = refusal(copy.load, strict=True)
    assert message == refusal(parse_annotation, copy.annotation("12"))
    for part in (str(copy.annotation("12")), "object 2 (chain 1)", "({}, {}, {}, {})".format(*bad), "100 x 50"):
        assert part in message
    assert notes_of(capsys) == []
    assert len(copy.load(boxes=False, strict=True)) == 5


@pytest.mark.parametrize(
    "content", ["", "  \n", "<annotation>", xml(("", 1, 2, 2)), xml(("nan", 1, 2, 2)), xml(size=("", 50)), "no XML"]
)
def test_what_cant_be_understood_is_refused_however_lenient(copy, content):
    copy.annotation("12").write_text(content)
    assert refusal(copy.load).startswith(f"{copy.annotation('12')}: ")


def test_an_empty_annotation_says_so(copy):
    copy.annotation("12").write_bytes(b"")
    assert "the file is empty" in refusal(copy.load)


# --- shapes -----------------------------------------------------------------------------------------------------------


def scales_exist(one, two):
    """Whether some scale of one size is within two pixels of the other, by trying many."""
    for small, large in ((one, two), (two, one)):
        middle = small[0] / large[0]
        for step in range(-4000, 4001):
            scale = middle + step * (2.5 / large[0]) / 4000
            if all(abs(a - scale * b) <= 2 for a, b in zip(small, large)):
                return True
    return False


@given(st.tuples(*[st.integers(3, 900)] * 2), st.tuples(*[st.integers(3, 900)] * 2))
def test_shapes_are_the_same_where_a_scale_of_two_pixels_exists(one, two):
    slack = 2 * max(*one, *two)  # where the trials are too coarse
    margin = abs(one[0] * two[1] - one[1] * two[0]) - 2 * max(sum(one), sum(two))
    if abs(margin) > slack:
        assert same_shape(one, two) == scales_exist(one, two)
    assert same_shape(one, two) == same_shape(two, one)


@pytest.mark.parametrize(
    ("picture", "annotated", "shape"),
    [
        ((100, 50), (100, 50), "same"),
        ((448, 299), (500, 333), "same"),  # rounded
        ((500, 333), (5000, 3333), "same"),
        ((500, 331), (500, 333), "same"),
        ((333, 500), (500, 333), "other"),  # turned
        ((480, 333), (500, 333), "other"),  # cut
        ((224, 224), (500, 333), "square"),  # stretched to a model's input
        ((500, 333), (224, 224), "square"),
        ((224, 224), (224, 224), "same"),
    ],
)
def test_shapes(picture, annotated, shape):
    assert shape_of(picture, annotated) == shape


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_pictures_size_is_that_of_display(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (64, 32)).save(path, exif=exif)
    assert displayed_size(path) == load_image(path).size == ((64, 32) if orientation < 5 else (32, 64))


def test_the_size_of_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"<html>404</html>")
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").mkdir()
    for name in "abcd":
        assert str(tmp_path / f"{name}.jpg") in refusal(displayed_size, tmp_path / f"{name}.jpg")


def test_boxes_of_a_picture_of_another_shape_are_left_out_and_told(copy, capsys):
    copy.picture("12", (50, 100))  # saved turned
    copy.picture("14", (70, 50))  # cut
    copy.picture("15", (201, 100))  # scaled, rounded
    assert copy.boxes() == [LEFT, (), LEFT, (), LEFT]
    (line,) = notes_of(capsys)
    assert "2 pictures have another shape than what was annotated, and their boxes are left out" in line
    assert "(12.xml, 14.xml)" in line
    message = refusal(copy.load, strict=True)
    assert (
        f"{copy.annotation('12')}: a picture of 100 x 50 was annotated, and 12.jpg is displayed as 50 x 100" in message
    )


def test_a_picture_that_exif_turns_is_held_against_its_displayed_size(copy, capsys):
    """The loader shows it upright: an annotation of the stored pixels would mark other places."""
    turned = Image.Exif()
    turned[0x0112] = 6
    copy.picture("12", (100, 50), exif=turned)  # displayed as 50 x 100, annotated as stored
    copy.picture("13", (50, 100), exif=turned)  # displayed as annotated
    assert copy.boxes() == [LEFT, (), LEFT, LEFT, LEFT]
    assert "1 pictures have another shape" in notes_of(capsys)[0]


def test_boxes_of_pictures_stretched_to_a_square_stay_and_are_told(copy, capsys):
    for name in copy.ids:
        copy.picture(name, (64, 64))
    assert copy.boxes() == [LEFT] * 5
    (line,) = notes_of(capsys)
    assert "5 pictures, or what was annotated, were stretched to a square" in line
    assert "was annotated" in refusal(copy.load, strict=True)


def test_an_unreadable_picture_is_left_to_whoever_decodes_it(copy):
    (copy.images / "12.jpg").write_bytes(b"<html>404</html>")
    (copy.images / "13.jpg").unlink()
    os.mkfifo(copy.images / "13.jpg")
    assert copy.boxes() == [LEFT] * 5


def test_sizes_are_looked_at_only_where_boxes_are_asked_for(copy, capsys):
    copy.picture("12", (50, 100))
    assert len(copy.load(boxes=False, strict=True)) == 5
    assert notes_of(capsys) == []


def test_one_record_is_found_as_the_split_has_it_and_nothing_is_told(copy, capsys):
    copy.picture("12", (50, 100))
    copy.annotation("13").write_text(xml((9, 1, 8, 50), (1, 1, 50, 50)))
    copy.sentences("14").write_text("word " * 3000 + "\nA\nB\nC\nD\n\n")
    records = {record.image_id: record for record in copy.load()}
    notes_of(capsys)
    for name in copy.ids:
        assert make_reader("flickr").find(copy.root, "test", name) == records[name]
    assert notes_of(capsys) == []


def test_an_annotation_that_names_another_picture_is_told(copy, capsys):
    copy.annotation("11").write_text(xml((1, 1, 50, 50), filename="C:\\data\\11.JPG"))
    copy.annotation("12").write_text(xml((1, 1, 50, 50), filename="99.jpg"))
    assert copy.boxes() == [LEFT] * 5
    (line,) = notes_of(capsys)
    assert "1 annotations name another picture (12.xml)" in line
    assert "names the picture 99.jpg, not 12.jpg" in refusal(copy.load, strict=True)


# --- captions ---------------------------------------------------------------------------------------------------------


def test_captions_and_queries_have_one_bound():
    assert LONGEST_CAPTION == LONGEST_QUERY


@given(st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=30), st.integers(1, 60))
def test_a_cut_caption_ends_with_a_whole_word_and_holds_its_whole_phrases(words, most):
    text, phrases, start = " ".join(words), [], 0
    for number, word in enumerate(words):
        phrases.append(Phrase(word, str(number), ("other",), start, start + len(word), ()))
        start += len(word) + 1
    found = Caption(text, tuple(phrases), True).within(most)
    kept = [count for count in range(1, len(words) + 1) if len(" ".join(words[:count])) <= most]
    if kept:  # else the first word is too long
        assert found.text == " ".join(words[: kept[-1]])
        assert found.phrases == tuple(phrases[: kept[-1]])
    else:
        assert (found.text, found.phrases) == (words[0][:most], ())


def test_long_captions_are_cut_and_told_once(copy, capsys):
    long = "[/EN#1/people A man] " + "walks " * 5000 + "[/EN#1/people he] ."
    copy.sentences("12").write_text(f"{long}\n{long}\nB .\nC .\nD .\n")
    copy.sentences("13").write_text("x" * 100_000 + "\nA .\nB .\nC .\nD .\n")
    records = copy.load()
    cut = records[1].captions[0]
    assert 990 < len(cut.text) <= 1000
    assert cut.text == ("A man " + "walks " * 5000)[: len(cut.text)]
    assert cut.text.endswith(" walks")
    assert [(phrase.text, phrase.boxes) for phrase in cut.phrases] == [("A man", LEFT)]
    assert [caption.text for caption in records[1].captions[2:]] == ["B .", "C .", "D ."]
    assert records[2].captions[0].text == "x" * 1000
    (line,) = notes_of(capsys)
    assert "3 captions of 2 images are cut to 1,000 characters (12.txt, 13.txt)" in line
    message = refusal(copy.load, strict=True, boxes=False)
    assert f"{copy.sentences('12')}: line 1: a caption of 30,010 characters; 1,000 are the most" in message


@pytest.mark.parametrize("length", [999, 1000])
def test_a_caption_at_the_bound_is_whole(copy, capsys, length):
    text = ("word " * 200)[: length - 1] + "."
    copy.sentences("12").write_text(f"{text}\nA\nB\nC\nD\n")
    assert copy.load(strict=True)[1].captions[0].text == text
    assert notes_of(capsys) == []


@pytest.mark.parametrize("end", ["\n\n\n", "\n \t\n", "\r\n\r\n", "\n\u00a0\n", ""])
def test_blank_last_lines_are_no_captions(copy, end):
    expected = copy.load()
    for name in copy.ids:
        path = copy.sentences(name)
        path.write_bytes(path.read_bytes().rstrip(b"\n") + end.encode())
    assert copy.load() == expected


def test_a_blank_line_between_captions_is_refused_by_number(copy):
    copy.sentences("12").write_text("A\nB\n\nC\nD\nE\n")
    assert refusal(copy.load) == f"{copy.sentences('12')}: line 3: empty sentence; write a caption"


@pytest.mark.parametrize("content", [b"\n\n", b"A\nB\nC\nD\n\n", b"A\nB\nC\nD\nE\nF\n"])
def test_another_number_of_captions_is_refused(copy, content):
    """The data set has five of each: fewer are a file cut short, and nothing tells which of six is none."""
    copy.sentences("12").write_bytes(content)
    count = sum(bool(line.strip()) for line in content.split(b"\n"))
    assert f"{copy.sentences('12')}: {count} captions, expected exactly 5" in refusal(copy.load)


def test_files_that_end_lines_with_a_carriage_return_alone_are_read(copy):
    expected = copy.load()
    for path in (copy.notes / "test.txt", *map(copy.sentences, copy.ids)):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
    assert copy.load() == expected


def test_spaces_that_nobody_sees_are_none(copy):
    """Tabs and no-break spaces between words, spaces of no width within, and a byte order mark of a joined file."""
    expected = copy.load()
    path = copy.sentences("12")
    path.write_text(
        "\ufeff\ufeff[/EN#1/people\tA\u00a0m\u200ban]\u3000.\nA\u2060 .\n\ufeffB .\nC .\u00a0\n \tD .\n",
        encoding="utf-8",
    )
    assert copy.load() == expected
    assert parse_sentence("\ufeff[/EN#1/people A\u200b man]") == parse_sentence("[/EN#1/people A man]")
    family = "\U0001f468\u200d\U0001f469"  # joiners mean something
    assert parse_sentence(family) == (family, ())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(copy, encoding):
    for path in (copy.notes / "test.txt", copy.sentences("12")):
        good = path.read_bytes()
        path.write_bytes(good.decode().encode(encoding))
        message = refusal(copy.load)
        assert message == f"{path}: UTF-16, or no text, but not UTF-8; save it as UTF-8"
        path.write_bytes(good)


def test_one_file_that_may_not_be_read_is_named_with_the_right_advice():
    """As nobody: root may read everything."""
    root = Path(tempfile.mkdtemp())
    copy = Copy(root / "data")
    try:
        os.chmod(root, 0o777)
        for each in root.rglob("*"):
            os.chmod(each, 0o777)
        code = (
            "import os, sys; sys.path.insert(0, sys.argv[1])\n"
            "from samer.config import InputError\n"
            "from samer.data.flickr import load_split\n"
            "if os.getuid() == 0:\n"
            "    load_split(sys.argv[2], 'test', boxes=True)  # all is imported that nobody may not read\n"
            "    os.setuid(65534)\n"
            "try: load_split(sys.argv[2], 'test', boxes=True)\n"
            "except InputError as error: print(error)\n"
        )
        for path in (copy.sentences("13"), copy.annotation("13"), copy.notes / "test.txt", copy.images):
            os.chmod(path, 0)
            words = [sys.executable, "-c", code, str(ROOT), str(copy.root)]
            said = subprocess.run(words, capture_output=True, text=True, cwd="/", timeout=600)
            os.chmod(path, 0o777)
            assert said.stdout.startswith(f"{path}: can't be read (Permission denied); allow"), said
    finally:
        subprocess.run(["rm", "-r", str(root)], check=True)


# --- ids and pictures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "11.jpg\n12.jpg\n13.jpg\n14.jpg\n15.jpg\n",
        "11\n12.JPG\n13.png\n14\n15.jpeg\n",
        "\n11  \r\n12\t\r\n\r\n13\r\n14\r\n15\r\n\r\n\r\n",
        "\ufeff11\n\ufeff12\n13\u200b\n14\n15",  # joined from files with byte order marks
    ],
)
def test_ids_are_read_however_they_were_typed(copy, content):
    expected = copy.load()
    copy.split(content)
    assert copy.load() == expected


def test_an_id_that_ends_like_a_picture_is_itself_where_there_is_such_a_picture(copy):
    copy.split("11.jpg\n12\n")
    for path in (copy.sentences("11"), copy.annotation("11"), copy.images / "11.jpg"):
        path.rename(path.with_name(f"11.jpg{path.suffix}"))
    assert [record.image_id for record in copy.load()] == ["11.jpg", "12"]


def test_the_same_id_with_and_without_suffix_is_one_too_many(copy):
    copy.split("11\n12\n11.jpg\n")
    assert refusal(copy.load) == f"{copy.notes / 'test.txt'}: line 3: '11' is also on line 1; remove one"


@pytest.mark.parametrize("suffix", [".JPG", ".JPEG", ".PNG"])
def test_suffixes_in_capitals_are_read(copy, suffix):
    for name in copy.ids:
        (copy.images / f"{name}.jpg").rename(copy.images / f"{name}{suffix}")
    assert [record.image_path.name for record in copy.load()] == [f"{name}{suffix}" for name in copy.ids]
    assert make_reader("flickr").find(copy.root, "test", "12").image_path == copy.images / f"12{suffix}"


def test_two_pictures_of_one_id_are_told(copy, capsys):
    Image.new("RGB", (100, 50)).save(copy.images / "12.png")
    assert copy.load()[1].image_path.name == "12.jpg"
    assert "1 images are there with several suffixes, and the first of them is taken (12.jpg)" in notes_of(capsys)[0]
    assert refusal(copy.load, strict=True) == f"{copy.images / '12.jpg'}: 12.png is there, too; remove one"


def test_ids_that_differ_in_case_are_two_and_a_wrong_case_is_shown(copy):
    for name in ("a b", "A b"):  # a space is as good as another letter
        copy.sentences(name).write_text("A\nB\nC\nD\nE\n")
        copy.annotation(name).write_text(xml())
        copy.picture(name)
    copy.split("a b\nA b\n")
    assert [(record.image_id, record.image_path.name) for record in copy.load()] == [
        ("a b", "a b.jpg"),
        ("A b", "A b.jpg"),
    ]
    copy.split("11\nA B\n")
    assert "1 of 2 images are absent, the first is A B.jpg (there is A b.jpg)" in refusal(copy.load)


def test_the_home_folder_may_be_written_as_people_do(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.root.parent))
    expected = copy.load()
    assert load_split("~/data", "test", boxes=True) == expected
    assert "nowhere: not a folder" in refusal(load_split, "~/nowhere", "test", boxes=True)


def test_blank_lines_among_unrelated_captions(copy):
    (copy.notes / "UNRELATED_CAPTIONS").write_bytes(b"\xef\xbb\xbf\r\n11 2\r\n\r\n \r\n12 5 \r\n\r\n")
    unrelated = [(r.image_id, n) for r in copy.load() for n, c in enumerate(r.captions, 1) if not c.related]
    assert unrelated == [("11", 2), ("12", 5)]


# --- data.strict reaches where data is read ---------------------------------------------------------------------------


@pytest.fixture
def long_world(world, tmp_path):
    """Two images of the world, one of whose captions is too long."""
    root = tmp_path / "long"
    subprocess.run(["cp", "-r", str(world), str(root)], check=True)
    for split in ("train", "val"):
        path = root / "annotations" / f"{split}.txt"
        path.write_text("\n".join(path.read_text().split()[:2]) + "\n")
    first = (root / "annotations/val.txt").read_text().split()[0]
    path = root / "annotations/Sentences" / f"{first}.txt"
    path.write_text("red " * 2000 + "\n" + path.read_text().split("\n", 1)[1])
    return root, path


@pytest.mark.parametrize("name", ["cache", "features", "train", "compare"])
def test_strict_is_a_setting_of_every_script_that_reads_data(script, long_world, base, tmp_path, name):
    root, path = long_world
    out = tmp_path / "out"
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{name: {base}}}\ntrain: {{bf16: false, dataloader_num_workers: 0}}\n")
    words = {
        "cache": ["--data-root", root, "--cache-dir", out, "--splits", "val"],
        "features": ["--data-root", root, "--out", out, "--splits", "val"],
        "train": [f"data.root={root}", f"train.output_dir={out}"],
        "compare": ["--data-root", root, "--out", out, "--split", "val"],
    }[name]
    words = ["--config", config, *words, "merge.num_regions=4", "data.strict=true"]
    message = refusal(script(name).main, [str(word) for word in words])
    assert f"{path}: line 1: a caption of 7,999 characters" in message


def test_an_index_and_a_store_hold_the_caption_that_was_cut(long_world, base, retriever, tmp_path):
    root, _ = long_world
    records = load_split(root, "val", boxes=False)
    text = records[0].captions[0].text
    assert text == " ".join(["red"] * 250)  # 999 characters
    build_index(tmp_path / "index", root, ["val"], retriever, MergeConfig(num_regions=4))
    (_, _, texts), *_ = Index(tmp_path / "index").queries("val")
    assert texts[0] == text
    write_features(tmp_path / "store", root, ["val"], retriever)
    FeatureStore(tmp_path / "store", str(base)).check_records(records)
