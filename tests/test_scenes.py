"""The built-in world: what is on disk is Flickr30k-Entities as the reader knows it, and a seed fixes every byte."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from samer.config import InputError
from samer.data.flickr import load_split, parse_sentence
from samer.world import scenes as world_scenes
from samer.world import write as world_write
from samer.world.captions import caption_text
from samer.world.kinds import COLOURS, KINDS, STYLES
from samer.world.scenes import make_group
from samer.world.write import write_world

COUNTS = {"train": 6, "val": 3, "test": 4}
BLUR = 2  # pixels: how far the blur that ends a picture may carry a change out of its box


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module", params=list(STYLES))
def world(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("worlds") / request.param
    assert write_world(root, COUNTS, style=request.param, seed=3, workers=1) is True
    return root


def test_the_reader_reads_every_split(world):
    seen = set()
    for split, count in COUNTS.items():
        records = load_split(world, split, boxes=True)
        assert len(records) == count
        for record in records:
            assert len(record.captions) == 5
            assert all(caption.related and caption.phrases for caption in record.captions)
            with Image.open(record.image_path) as image:
                assert image.mode == "RGB"
                assert image.size in STYLES[world.name].sizes
            for phrase in (phrase for caption in record.captions for phrase in caption.phrases):
                for x1, y1, x2, y2 in phrase.boxes:
                    assert 0 <= x1 < x2 <= 1
                    assert 0 <= y1 < y2 <= 1
            assert record.image_id not in seen
            seen.add(record.image_id)
        assert len(load_split(world, split, boxes=False)) == count


def test_every_phrase_has_a_box_or_says_why_not(world):
    for path in sorted((world / "annotations" / "Annotations").glob("*.xml")):
        tree = ElementTree.parse(path)
        size = int(tree.findtext("size/width")), int(tree.findtext("size/height"))
        with Image.open(world / "images" / "Images" / f"{path.stem}.jpg") as image:
            assert image.size == size
        boxed, flagged = set(), {}
        for node in tree.iterfind("object"):
            chain, bounds = node.findtext("name"), node.find("bndbox")
            assert chain not in boxed | flagged.keys()
            if bounds is None:
                flagged[chain] = {flag.tag for flag in node if flag.text == "1"}
            else:
                boxed.add(chain)
                xmin, ymin, xmax, ymax = (int(bounds.findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax"))
                assert 1 <= xmin <= xmax <= size[0]
                assert 1 <= ymin <= ymax <= size[1]
        named = set()
        for line in (world / "annotations" / "Sentences" / f"{path.stem}.txt").read_text().splitlines():
            for phrase in parse_sentence(line)[1]:
                assert (phrase.chain_id == "0") == (phrase.types == ("notvisual",))
                if phrase.chain_id == "0":
                    continue
                named.add(phrase.chain_id)
                if phrase.types == ("scene",):
                    assert "scene" in flagged[phrase.chain_id]
                elif phrase.text == "the sky":
                    assert flagged[phrase.chain_id] == {"nobndbox"}
                else:
                    assert phrase.chain_id in boxed
        assert named == boxed | flagged.keys()  # nothing is annotated that no caption names


def test_a_chain_is_one_thing_in_all_captions_of_an_image():
    nouns = set(KINDS) | {kind.clothing for kind in KINDS.values() if kind.clothing}
    shared = 0
    for group in range(12):
        for scene in make_group("outdoor", 5, group):
            meanings: dict[int, list] = {}
            for caption in scene.captions:
                for text, chain, types in caption:
                    if chain == 0:
                        assert (text, types) == ("it", "notvisual")
                    elif chain is not None:
                        noun = text.split()[-1]
                        meanings.setdefault(chain, []).append((noun if noun in nouns else text, types))
            assert all(len(set(meaning)) == 1 for meaning in meanings.values())
            shared += sum(len(meaning) > 1 for meaning in meanings.values())
    assert shared > 30


def test_spans_point_at_the_words_that_the_reader_finds():
    for group in range(6):
        for scene in make_group("outdoor", 2, group):
            for caption in scene.captions:
                text, spans = caption_text(caption)
                plain, phrases = parse_sentence(world_write.markup(caption))
                assert text == plain
                assert spans == [(int(phrase.chain_id), phrase.start, phrase.end) for phrase in phrases]
                assert [text[start:end] for _, start, end in spans] == [phrase.text for phrase in phrases]


def colours_of(scene, chain):
    """The colours that the first three captions give an object or its clothing, and how many captions name it."""
    naming = [
        {word for text, owner, _ in caption if owner in (chain, chain + 1) for word in text.split() if word in COLOURS}
        for caption in scene.captions[:3]
        if any(owner == chain for _, owner, _ in caption)
    ]
    return set().union(*naming), len(naming)


def test_twins_differ_by_one_named_object():
    pairs = [pair for pair in (make_group("outdoor", 0, group) for group in range(30)) if len(pair) == 2]
    assert 4 <= len(pairs) <= 20  # 35 % are asked for
    for one, two in pairs:
        assert one.image.size == two.image.size
        rows, columns = np.nonzero((np.asarray(one.image) != np.asarray(two.image)).any(-1))
        assert len(rows)
        boxes = {entity.chain: entity.boxes[0] for entity in one.entities if entity.boxes}
        changed = [
            chain
            for chain, (x0, y0, x1, y1) in boxes.items()
            if columns.min() >= x0 - BLUR and columns.max() < x1 + BLUR
            if rows.min() >= y0 - BLUR and rows.max() < y1 + BLUR
            if colours_of(one, chain)[1] == colours_of(two, chain)[1] == 3
            and not colours_of(one, chain)[0] & colours_of(two, chain)[0]
        ]
        assert changed, "no object that the first captions of both twins name, in other colours, holds the difference"
        theirs = {entity.chain: entity.boxes for entity in two.entities}
        assert all(theirs[chain] == (boxes[chain],) for chain in theirs.keys() & boxes.keys())


def test_pages_have_no_twins_and_terse_captions():
    groups = [make_group("page", 0, group) for group in range(12)]
    assert all(len(group) == 1 for group in groups)
    terse = sum(caption[-1][0] != "." for group in groups for caption in group[0].captions)
    assert 15 <= terse <= 45  # half of the 60 captions are asked for


def test_pictures_come_in_several_shapes():
    sizes = {make_group("outdoor", 1, group)[0].image.size for group in range(16)}
    assert len(sizes) >= 4
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)


def test_a_group_depends_on_style_seed_and_number_only():
    one, again = make_group("outdoor", 4, 9)[0], make_group("outdoor", 4, 9)[0]
    assert one.captions == again.captions
    assert one.image.tobytes() == again.image.tobytes()
    for other in (("outdoor", 5, 9), ("outdoor", 4, 10), ("page", 4, 9)):
        assert make_group(*other)[0].image.tobytes() != one.image.tobytes()


@pytest.mark.parametrize("style", list(STYLES))
def test_a_seed_fixes_every_byte_whatever_the_number_of_workers(tmp_path, style):
    counts = {"train": 4, "val": 2}
    for name, seed, workers in (("one", 1, 1), ("two", 1, 2), ("other", 2, 2)):
        assert write_world(tmp_path / name, counts, style=style, seed=seed, workers=workers)
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    pictures = {name: data for name, data in one.items() if name.endswith(".jpg")}
    assert len(set(pictures.values())) == len(pictures) >= 6
    assert not set(pictures.values()) & set(other.values())


def test_the_same_world_is_kept_and_another_folder_refused(tmp_path):
    root = tmp_path / "world"
    counts = {"train": 2, "val": 1}
    assert write_world(root, counts, workers=1)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*")}
    assert write_world(root, counts, workers=1) is False
    for other in (
        {"counts": {"train": 2}},
        {"counts": {"train": 3, "val": 1}},
        {"counts": {"val": 1, "train": 2}},  # splits are drawn in order, so this is another world
        {"counts": counts, "seed": 1},
        {"counts": counts, "style": "page"},
    ):
        with pytest.raises(InputError, match="exists and holds something else; name another folder or remove it"):
            write_world(root, **other)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*")} == before


def test_what_is_no_world_is_refused_and_left_alone(tmp_path):
    for name, content in (("note.txt", "mine"), ("world.json", "{broken"), ("world.json", json.dumps({"seed": 0}))):
        folder = tmp_path / f"{name}{len(content)}"
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(InputError, match="exists and holds something else"):
            write_world(folder, {"train": 1})
        assert files(folder) == {name: content.encode()}
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError, match="exists and holds something else"):
        write_world(file, {"train": 1})
    assert file.read_text() == "mine"


def test_an_empty_folder_and_absent_parents_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    for root in (tmp_path / "empty", tmp_path / "absent" / "deeper"):
        assert write_world(root, {"test": 1}, workers=1)
        assert len(load_split(root, "test", boxes=True)) == 1
        assert [path.name for path in root.parent.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"style": "indoor", "counts": {"train": 1}}, "scenes style 'indoor' is unknown; use one of page, outdoor"),
        ({"counts": {"train": 1, "val": 0}}, "val asks for 0 images; ask for at least 1"),
        ({"counts": {"train": -3}}, "train asks for -3 images"),
    ],
)
def test_bad_requests_are_refused(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        write_world(tmp_path / "world", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, failure):
    original = world_scenes.make_group

    def failing(style, seed, group):
        if group == 2:
            raise failure
        return original(style, seed, group)

    with monkeypatch.context() as patch:
        patch.setattr(world_write, "ProcessPoolExecutor", ThreadPoolExecutor)  # so that the patch reaches the workers
        patch.setattr(world_write, "make_group", failing)
        with pytest.raises(InputError if isinstance(failure, OSError) else KeyboardInterrupt):
            write_world(tmp_path / "world", {"train": 5}, workers=1)
    assert list(tmp_path.iterdir()) == []
    assert write_world(tmp_path / "world", {"train": 2}, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_folder_that_fills_up_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    root = tmp_path / "world"
    root.mkdir()
    original = world_write._write_files

    def slow(*arguments):
        original(*arguments)
        (root / "mine.txt").write_text("mine")

    monkeypatch.setattr(world_write, "_write_files", slow)
    with pytest.raises(InputError, match=r"not empty.*name another"):
        write_world(root, {"train": 1}, workers=1)
    assert files(tmp_path) == {str(Path("world") / "mine.txt"): b"mine"}
