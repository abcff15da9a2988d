"""Readers of data sets: the registry, what a new one gets for nothing, one picture found by its id, and the settings
that lead the scripts to a reader and to a model's revision."""

import json
from pathlib import Path

import pytest

from samer.config import InputError
from samer.data import READERS, make_reader
from samer.data.flickr import load_split
from samer.data.reader import Reader
from samer.data.records import Caption, ImageRecord, Phrase
from samer.features import read as features_read
from samer.features.manifest import read_store_manifest
from samer.index import settings as index_settings
from samer.index.read import Index
from samer.training import loop as training_loop

KINDS = "captions, catalogue, coco, flickr, imagecode, jsonl, vidore"


class Catalogue(Reader):
    """A data set of another kind: one JSON file per split, [name, picture, caption, box or null] each."""

    def __init__(self):
        self.calls = []

    def load_split(self, root, split, *, boxes, limit_images=None, strict=False):
        self.calls.append((split, boxes, limit_images))
        path = Path(root) / f"{split}.json"
        if not path.is_file():
            raise InputError(f"{path}: no such split")
        records = []
        for name, picture, text, box in json.loads(path.read_text())[:limit_images]:
            phrase = Phrase(text, "1", ("other",), 0, len(text), (tuple(box),) if boxes and box else ())
            records.append(ImageRecord(name, Path(root) / picture, (Caption(text, (phrase,), True),)))
        return records


class Unboxed(Catalogue):
    def check(self, root):
        return False


@pytest.fixture
def catalogue(monkeypatch, tmp_path, world):
    """The reader, registered for one test, and a data set that it reads, of pictures of the world."""
    reader, root = Catalogue(), tmp_path / "catalogue"
    monkeypatch.setitem(READERS, "catalogue", reader)
    root.mkdir()
    for split in ("train", "val"):
        records = load_split(world, split, boxes=False, limit_images=4)
        rows = [[f"{split}-{k}", str(r.image_path), r.captions[0].text, [0, 0, 0.5, 1]] for k, r in enumerate(records)]
        (root / f"{split}.json").write_text(json.dumps(rows))
    return reader, root


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "Flickr", "flickr ", "samer.data.flickr", "../flickr"])
def test_an_unknown_reader_is_refused_and_the_known_are_named(name, catalogue):
    with pytest.raises(InputError) as caught:
        make_reader(name)
    assert str(caught.value) == f"data.name {name!r} is unknown; use one of {KINDS}"


def test_a_reader_needs_load_split_and_nothing_else(catalogue):
    reader, root = catalogue
    assert make_reader("catalogue") is reader
    assert reader.check(root) is True
    with pytest.raises(NotImplementedError):
        Reader().load_split(root, "val", boxes=False)


def test_find_of_a_reader_without_its_own_reads_the_split_once(catalogue):
    reader, root = catalogue
    found = [reader.find(root, "val", name) for name in ("val-2", "val-0", "train-1", "../val-2", "")]
    assert [record and record.image_id for record in found] == ["val-2", "val-0", None, None, None]
    assert found[0] == reader.load_split(root, "val", boxes=True)[2]
    assert found[0].captions[0].phrases[0].boxes == ((0, 0, 0.5, 1),)
    assert reader.find(str(root), "train", "train-1").image_id == "train-1"
    assert reader.calls == [("val", True, None)] * 2 + [("train", True, None)]  # once, and once by this test
    for _ in range(2):  # what failed is tried again
        with pytest.raises(InputError, match=r"none\.json"):
            reader.find(root, "none", "val-2")


def test_find_asks_for_boxes_only_where_there_are_some(catalogue):
    reader = Unboxed()
    assert reader.find(catalogue[1], "val", "val-1").captions[0].phrases[0].boxes == ()
    assert reader.calls == [("val", False, None)]


# --- Flickr30k-Entities: one picture from its own files ---------------------------------------------------------------


@pytest.fixture
def flickr(tmp_path, world):
    """A copy of one picture's files, and that picture's record as the whole split gives it."""
    record = load_split(world, "test", boxes=True, limit_images=1)[0]
    name, root = record.image_id, tmp_path / "flickr"
    for place in ("images/Images/{}.jpg", "annotations/Sentences/{}.txt", "annotations/Annotations/{}.xml"):
        (root / place).parent.mkdir(parents=True)
        (root / place.format(name)).write_bytes((world / place.format(name)).read_bytes())
    (root / "annotations/test.txt").write_text(name + "\n")
    return root, record


def test_find_gives_the_record_of_the_split(flickr):
    root, record = flickr
    found = make_reader("flickr").find(root, "test", record.image_id)
    assert found.image_path == root / "images/Images" / record.image_path.name
    assert (found.image_id, found.captions) == (record.image_id, record.captions)
    assert any(phrase.boxes for caption in found.captions for phrase in caption.phrases)
    assert make_reader("flickr").find(root, "test", "none") is None


@pytest.mark.parametrize(
    "where", ["../{}", "../../{}", "../Other/{}", "/{root}/{}", "./{}", "a/../{}", "..\\{}", "{}/"]
)
def test_find_refuses_ids_that_lead_out_of_the_folder(flickr, where):
    """There is a picture with captions at each of these places, so what keeps it back is the id."""
    root, record = flickr
    name = record.image_id
    for folder in (root, root / "images", root / "images/Other", root / "images/Images/a", root / "annotations"):
        folder.mkdir(exist_ok=True)
        for suffix in (".jpg", ".txt", ".xml"):
            (folder / f"{name}{suffix}").write_bytes(b"secret")
    assert make_reader("flickr").find(root, "test", where.format(name, root=root)) is None


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a\0", "a" * 300, "a\ud800", "*", "~"])
def test_find_of_what_names_no_file_is_none(flickr, name):
    (flickr[0] / "images/Images/.hidden.jpg").write_bytes(b"secret")
    assert make_reader("flickr").find(flickr[0], "test", name) is None


def test_find_leaves_out_what_missing_files_would_say(flickr):
    root, record = flickr
    find = lambda: make_reader("flickr").find(root, "test", record.image_id)
    (root / "annotations/Annotations" / f"{record.image_id}.xml").unlink()
    assert [caption.text for caption in find().captions] == [caption.text for caption in record.captions]
    assert not any(phrase.boxes for caption in find().captions for phrase in caption.phrases)
    sentences = root / "annotations/Sentences" / f"{record.image_id}.txt"
    sentences.write_text("")
    assert find().captions == ()
    sentences.unlink()
    assert find() == ImageRecord(record.image_id, find().image_path, ())
    find().image_path.unlink()
    (root / "images/Images/other.jpg").write_bytes(b"")  # else there is no folder of pictures any more
    assert find() is None


@pytest.mark.parametrize(
    ("content", "line"), [("\nA dog .\n", 1), ("A dog .\n\nA cat .\n", 2), ("A dog .\n   \n.\n", 2)]
)
def test_find_names_a_blank_caption(flickr, content, line):
    root, record = flickr
    path = root / "annotations/Sentences" / f"{record.image_id}.txt"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        make_reader("flickr").find(root, "test", record.image_id)
    assert str(caught.value) == f"{path}: line {line}: empty sentence; write a caption"


@pytest.mark.parametrize("folder", ["annotations/Annotations", "annotations/Sentences"])
def test_find_names_a_damaged_file(flickr, folder):
    root, record = flickr
    (path,) = (root / folder).iterdir()
    path.write_bytes(b"\xff\xfe[")
    with pytest.raises(InputError) as caught:
        make_reader("flickr").find(root, "test", record.image_id)
    assert str(caught.value).startswith(f"{path}: ")


# --- data.reader and model.revision reach where they should -----------------------------------------------------------


def words_of(name, root, out, base):
    """What a user types to let a script read the catalogue."""
    if name == "train":
        (out.parent / "run.yaml").write_text("train: {bf16: false, num_train_epochs: 1, dataloader_num_workers: 0}\n")
        words = ["--config", out.parent / "run.yaml", f"data.root={root}", f"train.output_dir={out}"]
        words += ["train.train_batch_size=2", "train.grad_accum_steps=1", "merge.num_regions=6"]
    else:
        place = "--out" if name == "features" else "--cache-dir"
        words = ["--data-root", root, place, out, "--splits", "val"]
    return [str(word) for word in (*words, f"model.name={base}", "data.reader=catalogue")]


SCRIPTS = ("features", "cache", "train")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_reads_with_the_reader_that_is_set(script, catalogue, base, tmp_path, name):
    reader, root = catalogue
    out = tmp_path / "out"
    script(name).main(words_of(name, root, out, base))
    if name == "train":
        assert reader.calls[:2] == [("train", True, None), ("val", False, None)]
        assert (out / "projector.safetensors").is_file()
        return
    assert reader.calls == [("val", False, None)]
    if name == "cache":
        assert [id_ for ids, _, _ in Index(out).images("val") for id_ in ids] == [f"val-{k}" for k in range(4)]
    else:
        assert sum(shard.count for shard in read_store_manifest(out / "manifest.json").splits["val"].images) == 4


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_refuses_an_unknown_reader(script, catalogue, base, tmp_path, name):
    words = [*words_of(name, catalogue[1], tmp_path / "out", base), "data.reader=other"]
    with pytest.raises(InputError, match=rf"data\.name 'other' is unknown; use one of {KINDS}"):
        script(name).main(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_opens_the_revision_that_is_set(script, catalogue, base, tmp_path, monkeypatch, name):
    asked = []

    def remember(name, *words, revision="main", **more):
        asked.append((name, revision))
        raise InputError("seen")

    monkeypatch.setattr(features_read, "open_encoder", remember)
    monkeypatch.setattr(index_settings, "open_encoder", remember)
    monkeypatch.setattr(training_loop, "open_encoder", remember)
    words = words_of(name, catalogue[1], tmp_path / "out", base)
    for more in ([], ["model.revision=v1.2", "model.name=owner/model"]):
        with pytest.raises(InputError, match="seen"):
            script(name).main([*words, *more])
    assert asked == [(str(base), "main"), ("owner/model", "v1.2")]
