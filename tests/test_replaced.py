"""Pictures of a data set that are replaced after an index or a feature store was made of them.

The oracle is what is built anew in an empty folder: the same bytes.
"""

import json
import os
import shutil
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from samer.compare import run as compare_run
from samer.config import InputError, MergeConfig, load_config
from samer.data import flickr
from samer.features import write as features_write
from samer.features.read import FeatureStore
from samer.features.write import write_features
from samer.index import write as index_write
from samer.index.manifest import read_index_manifest, to_json
from samer.index.read import Index
from samer.index.write import build_index
from samer.retrievers import hf as retrievers_hf
from samer.retrievers.hf import Retriever
from samer.runtime.shards import load_shard, write_manifest, write_shard
from samer.training.loop import train

MERGE = MergeConfig(num_regions=8)


@pytest.fixture(scope="module")
def frozen(base):
    return Retriever.load(str(base), dtype=torch.float32)


@pytest.fixture
def data(world, tmp_path):
    """A copy of the world to replace pictures in: 6 val and 8 test images."""
    return shutil.copytree(world, tmp_path / "world")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of 3 images: the 8 of test make 3."""
    monkeypatch.setattr(index_write, "IMAGES_PER_SHARD", 3)
    monkeypatch.setattr(features_write, "IMAGES_PER_SHARD", 3)


@pytest.fixture
def reads(monkeypatch):
    """Files that are hashed, as a list; and files count as settled at once, not after two seconds."""
    from samer.data import stamps

    found, digest = [], stamps.digest_of
    monkeypatch.setattr(stamps, "_RACY", 0)
    monkeypatch.setattr(stamps, "digest_of", lambda handle: found.append(handle.name) or digest(handle))
    return found


def build(folder, data, retriever, splits=("test",), merge=MERGE, dtype="float32", **rest):
    return build_index(folder, data, splits, retriever, merge, batch_size=2, dtype=dtype, **rest)


def features(folder, data, retriever, splits=("test",), **rest):
    write_features(folder, data, splits, retriever, batch_size=2, dtype="float32", **rest)
    return folder


def ids(data, split="test"):
    return (data / "annotations" / f"{split}.txt").read_text().split()


def picture(data, number, split="test"):
    return data / "images" / "Images" / f"{ids(data, split)[number]}.jpg"


def replace(data, *numbers, split="test"):
    """Other pictures under the same names: turned upside down, and with another time."""
    for number in numbers:
        path = picture(data, number, split)
        with Image.open(path) as old:
            turned = old.rotate(180)
        path.unlink()
        turned.save(path, quality=95)


def files(folder):
    """Every file below a folder but what is remembered of times: name -> bytes."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "stamps.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def clock(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def rewritten(before, folder):
    now = clock(folder)
    assert now.keys() == before.keys()
    return sorted(name for name in now if now[name] != before[name])


def held(folder, split="test", kind="images"):
    """What shards say of their pictures' contents."""
    shards = sorted((folder / split).glob("images-?????.safetensors"))
    return [content for path in shards for content in load_shard(path)[1]["stamp"]["contents"]]


def forget(folder):
    """Makes an index or a store what it was before shards kept contents."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    for split, entry in manifest["splits"].items():
        for shard in entry["images"]:
            for part in (shard, shard.get("exact")):
                if part:
                    path = folder / split / part["file"]
                    tensors, header = load_shard(path)
                    for key in ("contents", "corpus_contents"):
                        header["stamp"].pop(key, None)
                    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
                    part["sha256"] = write_shard(path, tensors, header["stamp"], header["entry"])["sha256"]
        for path in (folder / split).glob("stamps.json"):
            path.unlink()
    write_manifest(folder / "manifest.json", manifest)


# --- indexes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "int8", "binary"])
def test_the_shards_of_replaced_pictures_are_made_anew_and_no_others(data, frozen, tmp_path, capsys, dtype):
    build(tmp_path / "c", data, frozen, dtype=dtype)
    before = clock(tmp_path / "c")
    replace(data, 3, 5, 7)
    capsys.readouterr()
    build(tmp_path / "c", data, frozen, dtype=dtype)
    assert "test: 3 pictures changed since they were indexed: 2 shards made anew\n" in capsys.readouterr().out
    parts = ("", ".exact") if dtype == "binary" else ("",)
    anew = [f"test/images-0000{k}{part}.safetensors" for k in (1, 2) for part in parts]
    assert rewritten(before, tmp_path / "c") == sorted(anew)
    build(tmp_path / "clean", data, frozen, dtype=dtype)
    assert files(tmp_path / "c") == files(tmp_path / "clean")
    capsys.readouterr()
    (summary,) = build(tmp_path / "c", data, frozen, dtype=dtype)
    assert summary.reused_shards == 4
    assert "changed" not in capsys.readouterr().out


def test_contents_are_the_hashes_of_the_files(data, frozen, tmp_path):
    import hashlib

    build(tmp_path / "c", data, frozen, splits=("val", "test"))
    for split in ("val", "test"):
        bytes_of = [picture(data, k, split).read_bytes() for k in range(len(ids(data, split)))]
        expected = [hashlib.blake2b(content, digest_size=16).hexdigest() for content in bytes_of]
        assert held(tmp_path / "c", split) == expected
        assert Index(tmp_path / "c").contents(split) == dict(zip(ids(data, split), expected))


def test_a_touched_picture_changes_nothing(data, frozen, tmp_path, monkeypatch):
    build(tmp_path / "c", data, frozen)
    before = clock(tmp_path / "c")
    for number in range(8):
        os.utime(picture(data, number), (10**9, 10**9 + number))
    monkeypatch.setattr(retrievers_hf, "load_image", None)  # no picture is decoded
    build(tmp_path / "c", data, frozen)
    assert rewritten(before, tmp_path / "c") == []


def test_a_moved_data_set_is_the_same(data, frozen, tmp_path, monkeypatch):
    build(tmp_path / "c", data, frozen)
    before = clock(tmp_path / "c")
    moved = shutil.copytree(data, tmp_path / "elsewhere", copy_function=shutil.copy)  # with times of its own
    shutil.rmtree(data)
    monkeypatch.setattr(retrievers_hf, "load_image", None)
    (summary,) = build(tmp_path / "c", moved, frozen)
    assert summary.reused_shards == 4
    assert rewritten(before, tmp_path / "c") == []


def test_a_second_run_hashes_no_file(data, frozen, tmp_path, reads):
    build(tmp_path / "c", data, frozen)
    assert len(reads) == 8
    build(tmp_path / "c", data, frozen)
    assert len(reads) == 8
    os.utime(picture(data, 2))
    build(tmp_path / "c", data, frozen)
    assert reads[8:] == [str(picture(data, 2))]
    build(tmp_path / "c", data, frozen)
    assert len(reads) == 9


def test_a_picture_of_the_same_size_and_time_is_noticed(data, frozen, tmp_path, reads):
    """As rsync or an editor leaves it that keeps times: the time of the inode's change tells."""
    path = picture(data, 4)
    other, old = picture(data, 0).read_bytes(), path.read_bytes()
    size = max(len(other), len(old))
    path.write_bytes(old.ljust(size, b"\0"))
    os.utime(path, (10**9, 10**9))
    build(tmp_path / "c", data, frozen)
    before = clock(tmp_path / "c")
    path.write_bytes(other.ljust(size, b"\0"))
    os.utime(path, (10**9, 10**9))
    build(tmp_path / "c", data, frozen)
    assert rewritten(before, tmp_path / "c") == ["test/images-00001.safetensors"]


def flipped_hash(path):
    text = path.read_text()
    digest = next(row[3] for row in json.loads(text)["files"].values())
    path.write_text(text.replace(digest, digest[:-1] + "0123456789abcdef"[int(digest[-1], 16) ^ 1]))


SPOILT = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "list": lambda path: path.write_text("[[1, 2]]"),
    "files is a list": lambda path: path.write_text('{"files": [1], "checksum": null}'),
    "deep": lambda path: path.write_text("[" * 10**5),
    "a digit of a hash": flipped_hash,
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "its own link": lambda path: (path.unlink(), path.symlink_to(path)),
}


@pytest.mark.parametrize("how", SPOILT)
def test_damaged_stamps_only_cost_time(data, frozen, tmp_path, reads, monkeypatch, how):
    build(tmp_path / "c", data, frozen)
    before, made = clock(tmp_path / "c"), files(tmp_path / "c")
    SPOILT[how](tmp_path / "c" / "test" / "stamps.json")
    monkeypatch.setattr(retrievers_hf, "load_image", None)
    build(tmp_path / "c", data, frozen)
    assert len(reads) == 16
    assert rewritten(before, tmp_path / "c") == []
    assert files(tmp_path / "c") == made
    build(tmp_path / "c", data, frozen)
    assert len(reads) == (24 if how in ("folder", "its own link") else 16)  # not written over


def test_a_picture_dated_in_the_future_is_remembered(data, frozen, tmp_path, reads):
    """By a camera whose clock is wrong; who changes it dates it now."""
    os.utime(picture(data, 1), (4 * 10**9, 4 * 10**9))
    build(tmp_path / "c", data, frozen)
    build(tmp_path / "c", data, frozen)
    assert len(reads) == 8


def test_a_picture_replaced_while_it_is_encoded_shows_at_the_next_run(data, frozen, tmp_path, monkeypatch):
    original, done = Retriever.picture, []
    first = flickr.load_split(data, "test", boxes=False)[0].image_id

    def late(self, record):
        if not done and record.image_id == first:  # its file is hashed by now
            replace(data, 0)
            done.append(1)
        return original(self, record)

    monkeypatch.setattr(Retriever, "picture", late)
    build(tmp_path / "c", data, frozen)
    assert done
    before = clock(tmp_path / "c")
    build(tmp_path / "c", data, frozen)
    assert rewritten(before, tmp_path / "c") == ["test/images-00000.safetensors"]
    build(tmp_path / "clean", data, frozen)
    assert files(tmp_path / "c") == files(tmp_path / "clean")


@contextmanager
def interrupted(monkeypatch, call):
    """Within the block, Ctrl-C comes while the picture of that number is read; it must come through."""
    original, calls = retrievers_hf.load_image, []

    def stopping(*words):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*words)

    with monkeypatch.context() as patch:
        patch.setattr(retrievers_hf, "load_image", stopping)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("call", [1, 3, 4])
def test_an_interrupted_run_after_a_replacement_goes_on(data, frozen, tmp_path, monkeypatch, call):
    build(tmp_path / "c", data, frozen, dtype="binary")
    replace(data, 0, 4)
    with interrupted(monkeypatch, call):
        build(tmp_path / "c", data, frozen, dtype="binary")
    replace(data, 7)
    build(tmp_path / "c", data, frozen, dtype="binary")
    build(tmp_path / "clean", data, frozen, dtype="binary")
    assert files(tmp_path / "c") == files(tmp_path / "clean")


def test_a_limited_run_and_a_replacement(data, frozen, tmp_path):
    build(tmp_path / "c", data, frozen, limit_images=4)
    before = clock(tmp_path / "c")["test/images-00000.safetensors"]
    replace(data, 6)  # never seen so far
    build(tmp_path / "c", data, frozen)
    assert clock(tmp_path / "c")["test/images-00000.safetensors"] == before
    replace(data, 0)
    build(tmp_path / "c", data, frozen)
    build(tmp_path / "clean", data, frozen)
    assert files(tmp_path / "c") == files(tmp_path / "clean")


def test_a_picture_of_two_splits_is_noticed_in_both(data, frozen, tmp_path, capsys):
    shared = ids(data, "test")[0]
    path = data / "annotations" / "val.txt"
    path.write_text(path.read_text() + f"{shared}\n")
    build(tmp_path / "c", data, frozen, splits=("val", "test"))
    before = clock(tmp_path / "c")
    replace(data, 0)
    capsys.readouterr()
    build(tmp_path / "c", data, frozen, splits=("val", "test"))
    assert rewritten(before, tmp_path / "c") == ["test/images-00000.safetensors", "val/images-00002.safetensors"]
    said = capsys.readouterr().out
    for split in ("val", "test"):
        assert f"{split}: 1 picture changed since they were indexed: 1 shard made anew\n" in said


@pytest.mark.parametrize("call", [None, 10])
def test_a_codebook_is_learned_anew_from_replaced_pictures(data, frozen, tmp_path, monkeypatch, call):
    """All shards hold codes of one codebook, whichever of its pictures was replaced, and after an interruption, too."""
    merge = MergeConfig(num_regions=8, compressor="hpc")
    build(tmp_path / "c", data, frozen, merge=merge)
    replace(data, 4)
    if call:
        with interrupted(monkeypatch, call):
            build(tmp_path / "c", data, frozen, merge=merge)
    build(tmp_path / "c", data, frozen, merge=merge)
    build(tmp_path / "clean", data, frozen, merge=merge)
    assert files(tmp_path / "c") == files(tmp_path / "clean")
    (summary,) = build(tmp_path / "c", data, frozen, merge=merge)
    assert summary.reused_shards == 4


@pytest.mark.parametrize("merge", [MERGE, MergeConfig(num_regions=8, compressor="hpc")], ids=["samer", "hpc"])
def test_an_index_that_knows_no_contents_is_taken_at_its_word_and_says_so(data, frozen, tmp_path, capsys, merge):
    build(tmp_path / "c", data, frozen, merge=merge)
    forget(tmp_path / "c")
    assert Index(tmp_path / "c").contents("test") == dict.fromkeys(ids(data))
    before = clock(tmp_path / "c")
    replace(data, 1)
    capsys.readouterr()
    (summary,) = build(tmp_path / "c", data, frozen, merge=merge)
    said = [line for line in capsys.readouterr().out.splitlines() if "8 pictures can't be compared" in line]
    assert len(said) == 1
    assert "name another folder" in said[0]
    assert summary.reused_shards == 4
    assert rewritten(before, tmp_path / "c") == []


@pytest.mark.parametrize("there", [True, False])
def test_a_picture_that_can_not_be_read_is_kept_as_it_was_and_said(data, frozen, tmp_path, capsys, there):
    """A folder in its place, or a link to nothing: a drive that is away, say."""
    build(tmp_path / "c", data, frozen)
    before = clock(tmp_path / "c")
    path = picture(data, 2)
    path.unlink()
    if there:
        path.mkdir()
    else:
        path.symlink_to(data / "away.jpg")
    capsys.readouterr()
    build(tmp_path / "c", data, frozen)
    assert rewritten(before, tmp_path / "c") == []
    assert "test: 1 picture can't be read now and kept as before" in capsys.readouterr().out
    with pytest.raises(InputError, match=str(path)):
        build(tmp_path / "anew", data, frozen)


@pytest.mark.parametrize("contents", ["text", [], ["a" * 32], [1] * 3, [["a" * 32]] * 3, {"0": None}, ["short"] * 3])
def test_contents_that_can_not_be_are_refused_and_made_anew(data, frozen, tmp_path, contents):
    build(tmp_path / "c", data, frozen)
    made = files(tmp_path / "c")
    path = tmp_path / "c" / "test" / "images-00000.safetensors"
    tensors, header = load_shard(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    entry = write_shard(path, tensors, {**header["stamp"], "contents": contents}, header["entry"])
    manifest = to_json(read_index_manifest(tmp_path / "c" / "manifest.json"))
    manifest["splits"]["test"]["images"][0]["sha256"] = entry["sha256"]
    write_manifest(tmp_path / "c" / "manifest.json", manifest)
    with pytest.raises(InputError, match=f"{path}: not readable"):
        list(Index(tmp_path / "c").images("test"))
    build(tmp_path / "c", data, frozen)
    assert files(tmp_path / "c") == made


# --- feature stores -------------------------------------------------------------------------------------------------


def test_features_of_replaced_pictures_are_computed_anew_and_no_others(data, frozen, tmp_path, capsys):
    features(tmp_path / "s", data, frozen, ["val", "test"])
    before = clock(tmp_path / "s")
    replace(data, 0, 1)
    capsys.readouterr()
    features(tmp_path / "s", data, frozen, ["val", "test"])
    said = capsys.readouterr().out
    assert "test: 2 pictures changed since their features were computed: 1 shard made anew\n" in said
    assert "val:" not in said
    assert rewritten(before, tmp_path / "s") == ["base.safetensors", "test/images-00000.safetensors"]
    features(tmp_path / "clean", data, frozen, ["val", "test"])
    assert files(tmp_path / "s") == files(tmp_path / "clean")


def test_a_store_of_replaced_pictures_is_refused_by_name(data, base, frozen, tmp_path):
    folder = features(tmp_path / "s", data, frozen, ["val", "test"])
    records = flickr.load_split(data, "val", boxes=False) + flickr.load_split(data, "test", boxes=False)
    FeatureStore(folder, str(base)).check_records(records)
    replace(data, 1, 4)
    first, second = ids(data)[1], ids(data)[4]
    wanted = (
        rf"{folder}: 2 of 14 pictures were replaced since their features were computed \({first}, {second}\); "
        r"run bash/features\.sh again for test: it computes those shards anew"
    )
    with pytest.raises(InputError, match=wanted):
        FeatureStore(folder, str(base)).check_records(records)
    FeatureStore(folder, str(base)).check_records(records[:6])  # those of val are as they were
    replace(data, 0, 2, 3, 5)
    with pytest.raises(InputError, match=r"6 of 14 pictures were replaced.* and 1 more\)"):
        FeatureStore(folder, str(base)).check_records(records)
    features(folder, data, frozen)
    FeatureStore(folder, str(base)).check_records(records)


def test_a_store_asks_for_sizes_and_times_where_they_are_remembered(data, base, frozen, tmp_path, reads):
    folder = features(tmp_path / "s", data, frozen)
    records = flickr.load_split(data, "test", boxes=False)
    assert len(reads) == 8
    FeatureStore(folder, str(base)).check_records(records)
    assert len(reads) == 8
    (folder / "test" / "stamps.json").unlink()
    FeatureStore(folder, str(base)).check_records(records)
    assert len(reads) == 16
    FeatureStore(folder, str(base)).check_records(records)  # which were noted by then
    assert len(reads) == 16


@pytest.mark.parametrize("left", ["nothing", "a dangling link", "an empty file", "a folder"])
def test_pictures_that_were_deleted_are_no_matter_where_none_is_read(data, base, frozen, tmp_path, left):
    folder = features(tmp_path / "s", data, frozen)
    records = flickr.load_split(data, "test", boxes=False)
    for number in range(8):
        path = picture(data, number)
        path.unlink()
        if left == "a dangling link":
            path.symlink_to("nowhere.jpg")
        elif left == "an empty file":
            path.touch()
        elif left == "a folder":
            path.mkdir()
    stored = FeatureStore(folder, str(base))
    stored.check_records(records)
    if left != "nothing":  # a reader asks for the names
        build(tmp_path / "c", data, stored)
        assert stored_ids(tmp_path / "c") == ids(data)


def stored_ids(folder):
    return [name for names, *_ in Index(folder).images("test") for name in names]


def test_a_store_that_knows_no_contents_is_taken_at_its_word_and_says_so(data, base, frozen, tmp_path, capsys):
    folder = features(tmp_path / "s", data, frozen)
    forget(folder)
    replace(data, 3)
    capsys.readouterr()
    stored = FeatureStore(folder, str(base))
    stored.check_records(flickr.load_split(data, "test", boxes=False))
    assert capsys.readouterr().out.count(f"note: {folder} is taken at its word for 8 pictures") == 1
    build(tmp_path / "c", data, stored)
    assert held(tmp_path / "c") == [None] * 8
    before = clock(folder)
    capsys.readouterr()
    features(folder, data, frozen)
    assert capsys.readouterr().out.count("test: 8 pictures can't be compared with what their features") == 1
    assert rewritten(before, folder) == ["base.safetensors"]


def test_an_index_of_a_store_carries_what_the_store_knows(data, base, frozen, tmp_path, capsys):
    folder = features(tmp_path / "s", data, frozen)
    build(tmp_path / "pixels", data, frozen)
    for number in range(8):  # whatever is on disk now
        picture(data, number).write_bytes(b"")
    build(tmp_path / "stored", data, FeatureStore(folder, str(base)))
    assert held(tmp_path / "stored") == held(tmp_path / "pixels")


def test_an_index_of_a_store_follows_it(data, base, frozen, tmp_path, capsys):
    folder = features(tmp_path / "s", data, frozen)
    build(tmp_path / "c", data, FeatureStore(folder, str(base)))
    before = clock(tmp_path / "c")
    replace(data, 4)
    with pytest.raises(InputError, match=r"1 of 8 pictures were replaced since their features were computed"):
        build(tmp_path / "c", data, FeatureStore(folder, str(base)))
    assert rewritten(before, tmp_path / "c") == []
    features(folder, data, frozen)
    capsys.readouterr()
    build(tmp_path / "c", data, FeatureStore(folder, str(base)))
    assert "test: 1 picture changed since they were indexed: 1 shard made anew\n" in capsys.readouterr().out
    assert rewritten(before, tmp_path / "c") == ["test/images-00001.safetensors"]
    build(tmp_path / "clean", data, FeatureStore(folder, str(base)))
    assert files(tmp_path / "c") == files(tmp_path / "clean")


def test_training_refuses_features_of_replaced_pictures(data, base, frozen, tmp_path):
    folder = features(tmp_path / "s", data, frozen, ["train", "val"])
    replace(data, 2, split="train")
    words = {
        "data.root": data,
        "model.name": base,
        "data.features": folder,
        "merge.num_regions": 8,
        "train.output_dir": tmp_path / "run",
        "train.train_batch_size": 10,
        "train.num_train_epochs": 1,
        "train.bf16": "false",
        "train.dataloader_num_workers": 0,
    }
    config = load_config(None, [f"{key}={value}" for key, value in words.items()])
    with pytest.raises(InputError, match=rf"1 of 18 pictures were replaced .*\({ids(data, 'train')[2]}\).*for train"):
        train(config)
    features(folder, data, frozen, ["train", "val"])
    assert train(config).steps >= 1


# --- what is made of them -------------------------------------------------------------------------------------------


def test_measurements_know_the_pictures_that_they_are_of(data, base, frozen, tmp_path, monkeypatch):
    folder = features(tmp_path / "s", data, frozen)
    records, calls = flickr.load_split(data, "test", boxes=True), []
    monkeypatch.setattr(compare_run, "measure", lambda *_: calls.append(1) or {"m": {"r": torch.tensor([len(calls)])}})

    def measured():
        found = compare_run._measured(
            tmp_path / "m.safetensors", FeatureStore(folder, str(base)), records, {"m": MERGE}, 2
        )
        return int(found["m"]["r"][0])

    assert [measured(), measured()] == [1, 1]
    replace(data, 0)
    features(folder, data, frozen)
    assert [measured(), measured()] == [2, 2]
    tensors, header = load_shard(tmp_path / "m.safetensors")  # as before measurements knew it
    del header["stamp"]["contents"]
    write_shard(
        tmp_path / "m.safetensors", {k: t.clone() for k, t in tensors.items()}, header["stamp"], header["entry"]
    )
    assert measured() == 2


@pytest.mark.parametrize("name", ["eval", "report"])
def test_a_report_says_which_pictures_are_not_those_indexed(data, frozen, tmp_path, capsys, script, name):
    build(tmp_path / "c", data, frozen)
    words = {
        "eval": ["--cache-dir", tmp_path / "c", "--output-json", tmp_path / "page.json"],
        "report": ["--method", f"m={tmp_path / 'c'}", "--out", tmp_path / "page.html"],
    }[name]
    words = [str(word) for word in [*words, "--data-root", data, "--split", "test"]]
    script(name).main(words)
    assert "replaced" not in capsys.readouterr().out
    assert "replaced" not in (tmp_path / "page.html").read_text()
    replace(data, *range(8))
    os.utime(picture(data, 0), (10**9, 10**9))
    script(name).main(words)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "were replaced" in line]
    assert "of the 8 pictures shown were replaced since they were indexed" in line
    assert "build the index again" in line
    assert line.split(" (")[0] in (tmp_path / "page.html").read_text()
    forget(tmp_path / "c")
    script(name).main(words)
    assert "replaced" not in capsys.readouterr().out
