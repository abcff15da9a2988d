"""An index follows its folder: what is edited, renamed, taken away, moved elsewhere or can't be read, and what is told.

The encoder draws a picture's vectors from its pixels, so the same content has the same vectors, and counts what it
encodes. tests/test_folder_ops.py does all of it at random.
"""

import errno
import os
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracle import ask, same_answers
from PIL import Image
from test_index import Drawn, contents
from test_index_identity import hash_of, rewrite

from samer.config import InputError, MergeConfig
from samer.data import stamps
from samer.data.pictures import Found, Skipped, find_pictures
from samer.index import pictures as index_pictures
from samer.index import read as index_read
from samer.index import sync
from samer.index import write as index_write
from samer.index.pictures import compact_images
from samer.index.read import Index
from samer.index.sync import Changes, NothingReadable, update_images, write_skipped
from samer.retrievers.family import RefusedPicture
from samer.runtime import signals

MERGE = MergeConfig(num_regions=6)
NAMES = [*(f"p{k}.png" for k in range(6)), "sub/a.png", "sub/b.png"]


class Counting(Drawn):
    """Notes how many pictures it encodes."""

    def __init__(self):
        super().__init__()
        self.encoded = 0

    def encode_images(self, inputs, needs=()):
        self.encoded += len(inputs["hidden"])
        return super().encode_images(inputs, needs)


def paint(path, seed, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(index_pictures, "PICTURES_PER_SHARD", 3)


@pytest.fixture
def root(tmp_path):
    for seed, name in enumerate(NAMES):
        paint(tmp_path / "root" / name, seed)
    return tmp_path / "root"


def run(folder, root, encoder=None, **more):
    """Follows a folder, or what was found in it; returns what changed, and how many pictures were encoded."""
    found = root if isinstance(root, Found) else find_pictures(root)
    encoder = encoder or Counting()
    _, changes = update_images(folder, found, encoder, more.pop("merge", MERGE), batch_size=2, **more)
    return replace(changes, dead=0.0), encoder.encoded


def rows(folder):
    """Id -> all that an index holds of it and knows of its file; no id comes twice."""
    index, found = Index(folder), {}
    names = [name for ids, *_ in index.images("images") for name in ids]
    assert len(set(names)) == len(names)
    known = index.contents("images")
    for name, number in index.numbers("images").items():
        each = index.vectors("images", number)
        tensors = [tensor.numpy().tobytes() for tensor in (each.tokens, each.mask, each.regions)]
        found[name] = [known[name], each.grid, *tensors]
    return found


def is_anew(folder, root, tmp_path, **more):
    """Whether an index is what one of the folder made anew would be, in whatever order, and answers like it."""
    run(tmp_path / "anew", root, **more)
    same = rows(folder) == rows(tmp_path / "anew")
    ours, theirs = (Index(each).search(ask(3), "images", 20) for each in (folder, tmp_path / "anew"))
    shutil.rmtree(tmp_path / "anew")
    return same and same_answers(ours, theirs)


class Choosy(Counting):
    """Takes no picture of more than 8 pixels a side."""

    def image_inputs(self, images):
        for number, image in enumerate(images):
            if max(image.size) > 8:
                raise RefusedPicture(number, f"is {image.width} pixels wide; cut it in parts")
        return super().image_inputs(images)


def test_pictures_that_the_model_refuses_are_skipped_by_name(root, tmp_path):
    """All but one of a batch, a whole batch, an edited one; what the others have is what they have without."""
    for name in ("p1.png", "p3.png", "p4.png", "sub/a.png"):
        paint(root / name, 1, size=9)
    changes, encoded = run(tmp_path / "c", root, Choosy())
    assert (changes.new, encoded) == (4, 4)
    assert [(each.path, each.reason, each.transient) for each in changes.skipped] == [
        (name, "refused by the model", False) for name in ("p1.png", "p3.png", "p4.png", "sub/a.png")
    ]
    assert changes.skipped[0].detail == f"{root / 'p1.png'}: it is 9 pixels wide; cut it in parts"
    assert "skipped, refused by the model: 4: p1.png, p3.png, p4.png and 1 more" in "\n".join(changes.lines())
    for each in changes.skipped:
        (root / each.path).unlink()
    assert is_anew(tmp_path / "c", root, tmp_path)
    paint(root / "p0.png", 2, size=9)
    assert run(tmp_path / "c", root, Choosy())[0].unreadable == 1
    assert run(tmp_path / "c", root, Choosy(), remove_gone=True)[0].removed
    assert sorted(rows(tmp_path / "c")) == ["p2.png", "p5.png", "sub/b.png"]


def test_a_folder_of_refused_pictures_is_told(tmp_path):
    for k in range(3):
        paint(tmp_path / "root" / f"{k}.png", k, size=9)
    with pytest.raises(NothingReadable, match=r"not one readable picture among 3 files; first: .*0\.png: it is 9 pix"):
        run(tmp_path / "c", tmp_path / "root", Choosy())


# --- what is on disk decides ----------------------------------------------------------------------------------------


def test_an_edited_picture_has_its_new_vectors(root, tmp_path):
    run(tmp_path / "c", root)
    paint(root / "p1.png", 100)
    assert run(tmp_path / "c", root) == (Changes(changed=1, unchanged=7), 1)
    assert is_anew(tmp_path / "c", root, tmp_path)


def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path, monkeypatch):
    """As a tool does that restores a picture's time when it writes its tags."""
    monkeypatch.setattr(stamps, "_RACY", 0)  # remembered times are put to use
    paint(tmp_path / "root" / "a.bmp", 1)
    paint(tmp_path / "root" / "b.bmp", 2)
    run(tmp_path / "c", tmp_path / "root")
    before = os.stat(tmp_path / "root" / "a.bmp")
    paint(tmp_path / "root" / "a.bmp", 3)
    os.utime(tmp_path / "root" / "a.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(tmp_path / "root" / "a.bmp").st_size == before.st_size
    assert run(tmp_path / "c", tmp_path / "root") == (Changes(changed=1, unchanged=1), 1)
    assert is_anew(tmp_path / "c", tmp_path / "root", tmp_path)


def test_what_nobody_touched_is_not_even_read(root, tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "_RACY", 0)
    run(tmp_path / "c", root)
    before = contents(tmp_path / "c")
    os.utime(root / "p0.png", (1, 1))
    read, digest = [], stamps.digest_of
    monkeypatch.setattr(stamps, "digest_of", lambda handle: read.append(Path(handle.name).name) or digest(handle))
    committed = []
    monkeypatch.setattr(index_write, "write_index_manifest", lambda *words: committed.append(words))
    assert run(tmp_path / "c", root) == (Changes(unchanged=8), 0)  # another time, the same content
    assert read == ["p0.png"]
    assert run(tmp_path / "c", root) == (Changes(unchanged=8), 0)
    assert read == ["p0.png"]
    assert (committed, contents(tmp_path / "c")) == ([], before)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text('{"files": {"p1.png": [1, 2, 3, "0"]}}')])
def test_without_what_is_remembered_nothing_else_changes(root, tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(stamps, "_RACY", 0)
    run(tmp_path / "c", root)
    paint(root / "p1.png", 100)
    spoil(tmp_path / "c" / "images" / "stamps.json")
    assert run(tmp_path / "c", root) == (Changes(changed=1, unchanged=7), 1)
    assert is_anew(tmp_path / "c", root, tmp_path)


def test_headers_are_read_once_and_the_manifest_is_written_once_a_shard(root, tmp_path, monkeypatch):
    """The work of a run goes with what changed; what is looked at besides goes with the number of pictures."""
    run(tmp_path / "c", root)
    opened, written = [], []
    load, write = index_read.load_shard, index_write.write_index_manifest
    monkeypatch.setattr(index_read, "load_shard", lambda path: opened.append(path) or load(path))
    monkeypatch.setattr(index_write, "write_index_manifest", lambda *words: written.append(words) or write(*words))
    for seed, name in enumerate(NAMES[:4], 100):
        paint(root / name, seed)
    assert run(tmp_path / "c", root)[0] == Changes(changed=4, unchanged=4)
    assert len(opened) == len(set(opened)) == 3  # shards that were there
    assert len(written) == 2  # four pictures in shards of three


# --- renamed and copied ---------------------------------------------------------------------------------------------


def renamed(old, new):
    def do(root):
        (root / new).parent.mkdir(exist_ok=True)
        (root / old).rename(root / new)

    return do


def swapped(root):
    (root / "p0.png").rename(root / "spare")
    (root / "p1.png").rename(root / "p0.png")
    (root / "spare").rename(root / "p1.png")


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "sub/\u00e4.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("do", "changes"),
    [
        (renamed("p0.png", "other.png"), Changes(unchanged=7, moved=1)),
        (renamed("p0.png", "new/p0.png"), Changes(unchanged=7, moved=1)),
        (renamed("sub", "below"), Changes(unchanged=6, moved=2)),
        (renamed("p0.png", "P0.PNG"), Changes(unchanged=7, moved=1)),
        (renamed("p0.png", DECOMPOSED), Changes(unchanged=7, moved=1)),
        (lambda root: shutil.copy(root / "p0.png", root / "q.png"), Changes(new=1, unchanged=8)),
        (lambda root: (root / "q.png").symlink_to("p0.png"), Changes(new=1, unchanged=8)),
        (swapped, Changes(changed=2, unchanged=6)),
        (renamed("p0.png", "p1.png"), Changes(changed=1, gone=1, unchanged=6)),
    ],
)
def test_a_renamed_or_copied_picture_keeps_its_vectors(root, tmp_path, do, changes):
    run(tmp_path / "c", root)
    do(root)
    assert run(tmp_path / "c", root, remove_gone=True) == (replace(changes, removed=True), 0)
    assert is_anew(tmp_path / "c", root, tmp_path)


def test_a_name_in_its_other_spelling_is_a_rename(root, tmp_path):
    """macOS writes an umlaut as two characters where others write one."""
    assert COMPOSED != DECOMPOSED
    paint(root / COMPOSED, 50)
    run(tmp_path / "c", root)
    (root / COMPOSED).rename(root / DECOMPOSED)
    assert run(tmp_path / "c", root) == (Changes(unchanged=8, moved=1), 0)
    assert {COMPOSED, DECOMPOSED} & set(rows(tmp_path / "c")) == {DECOMPOSED}
    assert is_anew(tmp_path / "c", root, tmp_path)


def test_a_renamed_picture_goes_in_the_step_that_brings_its_new_name(root, tmp_path, monkeypatch):
    """Also without --sync: it is not gone. A reader sees one of both, whenever it looks."""
    run(tmp_path / "c", root)
    (root / "p0.png").rename(root / "z.png")
    paint(root / "p1.png", 100)
    seen = [rows(tmp_path / "c").keys()]
    write = index_write.write_index_manifest

    def writing(path, manifest):
        write(path, manifest)
        seen.append(rows(tmp_path / "c").keys())

    monkeypatch.setattr(index_write, "write_index_manifest", writing)
    monkeypatch.setattr(index_pictures, "PICTURES_PER_SHARD", 1)
    assert run(tmp_path / "c", root) == (Changes(changed=1, unchanged=6, moved=1), 1)
    assert len(seen) == 3
    assert all(len(names) == 8 and "p1.png" in names and len(names & {"p0.png", "z.png"}) == 1 for names in seen)


def test_of_two_that_were_alike_one_stays(root, tmp_path):
    shutil.copy(root / "p0.png", root / "q.png")
    run(tmp_path / "c", root)
    (root / "p0.png").rename(root / "z.png")
    (root / "q.png").unlink()
    assert run(tmp_path / "c", root)[0] == Changes(gone=1, unchanged=7, moved=1)
    run(tmp_path / "c", root, remove_gone=True)
    assert is_anew(tmp_path / "c", root, tmp_path)


def test_what_is_chosen_by_name_is_encoded_under_the_new_name(root, tmp_path):
    merge = MergeConfig(num_regions=6, compressor="random")
    run(tmp_path / "c", root, merge=merge)
    before = rows(tmp_path / "c")["p0.png"]
    (root / "p0.png").rename(root / "z.png")
    assert run(tmp_path / "c", root, merge=merge, remove_gone=True)[1] == 1
    assert rows(tmp_path / "c")["z.png"] != before
    assert is_anew(tmp_path / "c", root, tmp_path, merge=merge)


@pytest.mark.parametrize("dtype", ["float32", "binary"])
def test_vectors_are_copied_in_every_form(root, tmp_path, dtype):
    run(tmp_path / "c", root, dtype=dtype)
    (root / "sub").rename(root / "below")
    assert run(tmp_path / "c", root, dtype=dtype, remove_gone=True)[1] == 0
    assert is_anew(tmp_path / "c", root, tmp_path, dtype=dtype)


# --- gone, unreadable, away -----------------------------------------------------------------------------------------


def test_what_is_gone_stays_until_it_is_to_be_taken_out(root, tmp_path):
    run(tmp_path / "c", root)
    (root / "p2.png").unlink()
    shutil.rmtree(root / "sub")
    changes, _ = run(tmp_path / "c", root)
    assert changes == Changes(gone=3, unchanged=5)
    assert "still in the index, as they were: 3 gone; --sync takes them out" in changes.lines()
    assert set(rows(tmp_path / "c")) == set(NAMES)
    changes, _ = run(tmp_path / "c", root, remove_gone=True)
    assert changes == Changes(gone=3, unchanged=5, removed=True)
    assert "taken out of the index: 3 gone" in changes.lines()
    assert is_anew(tmp_path / "c", root, tmp_path)
    assert run(tmp_path / "c", root, remove_gone=True)[0] == Changes(unchanged=5, removed=True)


def test_a_drive_that_comes_back_costs_nothing(root, tmp_path):
    """Taken out while it was away, its pictures have their vectors again without being encoded."""
    run(tmp_path / "c", root)
    (root / "sub").rename(tmp_path / "away")
    run(tmp_path / "c", root, remove_gone=True)
    assert not {"sub/a.png", "sub/b.png"} & set(rows(tmp_path / "c"))
    (tmp_path / "away").rename(root / "sub")
    assert run(tmp_path / "c", root) == (Changes(new=2, unchanged=6), 0)
    assert is_anew(tmp_path / "c", root, tmp_path)


@pytest.mark.parametrize("found", ["empty", "damaged"])
def test_a_folder_without_a_readable_picture_changes_nothing(root, tmp_path, found):
    """Such as the place where a drive is mounted, without the drive."""
    run(tmp_path / "c", root)
    before = contents(tmp_path / "c")
    for path in root.rglob("*.png"):
        path.unlink() if found == "empty" else path.write_text("none")
    what = {"empty": "no pictures in it", "damaged": r"not one readable picture among 8 files; first: .*p0\.png"}[found]
    with pytest.raises(NothingReadable, match=f"root: {what}.*; .*c keeps the 8 that it has") as refused:
        run(tmp_path / "c", root, remove_gone=True)
    assert len(refused.value.skipped) == (8 if found == "damaged" else 0)
    assert contents(tmp_path / "c") == before


def test_a_picture_that_is_damaged_by_now_is_told_and_taken_out_if_asked(root, tmp_path):
    run(tmp_path / "c", root)
    before = rows(tmp_path / "c")
    (root / "p3.png").write_bytes((root / "p3.png").read_bytes()[:40])
    changes, _ = run(tmp_path / "c", root)
    assert replace(changes, skipped=()) == Changes(unchanged=7, unreadable=1)
    assert [each.path for each in changes.skipped] == ["p3.png"]
    assert "still in the index, as they were: 1 that can't be read any more; --sync takes them out" in changes.lines()
    assert rows(tmp_path / "c") == before
    changes, _ = run(tmp_path / "c", root, remove_gone=True)
    assert "taken out of the index: 1 that can't be read any more" in changes.lines()
    assert is_anew(tmp_path / "c", root, tmp_path)


@pytest.mark.parametrize("place", ["sub", "sub/a.png", "p0.png"])
def test_what_a_drive_does_not_give_just_now_stays(root, tmp_path, monkeypatch, place):
    """Whether a folder can't be listed, a name not be looked up or a file not be read, with --sync, too."""
    run(tmp_path / "c", root)
    found, before = find_pictures(root), rows(tmp_path / "c")
    away = [name for name in NAMES if name == place or name.startswith(f"{place}/")]
    if place == "p0.png":
        monkeypatch.setattr("builtins.open", failing_at(place))
    else:
        there = [name for name in found.paths if name not in away]
        found = Found(found.root, there, [Skipped(place, "drive does not answer", f"{place}: I/O error", True)])
    changes, _ = run(tmp_path / "c", found, remove_gone=True)
    monkeypatch.undo()
    assert (changes.unchanged, changes.waiting, changes.gone) == (8 - len(away), len(away), 0)
    assert f"still in the index, as they were: {len(away)} that can't be reached just now" in changes.lines()
    assert rows(tmp_path / "c") == before


def failing_at(name):
    """`open`, but for files of a name, which their drive does not give."""
    original = open

    def opening(path, *words, **named):
        if isinstance(path, (str, os.PathLike)) and Path(path).name == name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path, *words, **named)

    return opening


def test_a_picture_that_goes_while_the_folder_is_read_is_skipped(root, tmp_path):
    found = find_pictures(root)
    (root / "p0.png").unlink()
    changes, _ = run(tmp_path / "c", found)
    assert (changes.new, [each.path for each in changes.skipped]) == (7, ["p0.png"])
    assert is_anew(tmp_path / "c", root, tmp_path)


def test_a_picture_that_became_a_folder_of_that_name(root, tmp_path):
    run(tmp_path / "c", root)
    (root / "p0.png").unlink()
    paint(root / "p0.png" / "p0.png", 0)
    assert run(tmp_path / "c", root) == (Changes(unchanged=7, moved=1), 0)
    assert is_anew(tmp_path / "c", root, tmp_path)


# --- a folder that is elsewhere -------------------------------------------------------------------------------------


def test_a_folder_that_was_moved_takes_its_index_along(root, tmp_path):
    run(tmp_path / "c", root)
    before = rows(tmp_path / "c")
    root.rename(tmp_path / "moved")
    changes, encoded = run(tmp_path / "c", tmp_path / "moved")
    assert (changes, encoded) == (Changes(unchanged=8, left=str(root)), 0)
    assert any(str(root) in line for line in changes.lines())
    assert Index(tmp_path / "c").manifest.splits["images"].root == str(tmp_path / "moved")
    assert rows(tmp_path / "c") == before
    assert run(tmp_path / "c", tmp_path / "moved") == (Changes(unchanged=8), 0)


def test_a_moved_folder_may_have_changed_on_the_way(root, tmp_path):
    run(tmp_path / "c", root)
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)  # with times of today
    (tmp_path / "copy" / "p0.png").unlink()
    paint(tmp_path / "copy" / "p1.png", 100)
    paint(tmp_path / "copy" / "more.png", 101)
    changes, encoded = run(tmp_path / "c", tmp_path / "copy")
    assert (changes, encoded) == (Changes(new=1, changed=1, gone=1, unchanged=6, left=str(root)), 2)
    run(tmp_path / "c", tmp_path / "copy", remove_gone=True)
    assert is_anew(tmp_path / "c", tmp_path / "copy", tmp_path)


def test_another_folder_is_refused_and_both_are_named(root, tmp_path):
    run(tmp_path / "c", root)
    for seed, name in enumerate(NAMES, 100):  # other pictures under the same names
        paint(tmp_path / "other" / name, seed)
    before = contents(tmp_path / "c")
    for place in (tmp_path / "other", root / "sub"):
        with pytest.raises(InputError, match=f"holds the pictures of {root}; name another index for {place}, in which"):
            run(tmp_path / "c", place, remove_gone=True)
        assert contents(tmp_path / "c") == before


def test_a_folder_behind_a_link_is_where_it_was(root, tmp_path):
    """Moved to another drive and a link left in its place: that is the same folder, whatever has changed in it."""
    run(tmp_path / "c", root)
    root.rename(tmp_path / "drive")
    root.symlink_to("drive")
    for seed, name in enumerate(NAMES, 100):
        paint(root / name, seed)
    assert run(tmp_path / "c", root) == (Changes(changed=8), 8)
    assert is_anew(tmp_path / "c", root, tmp_path)


# --- indexes of earlier versions ------------------------------------------------------------------------------------


def as_before(folder, root):
    """Makes an index what it was before content hashes: [bytes, time of change] of each file."""

    def older(tensors, stamp):
        del stamp["contents"]
        found = [os.stat(root / name) for name in stamp["ids"]]
        stamp["files"] = [[about.st_size, about.st_mtime_ns] for about in found]

    rewrite(folder, older)
    (folder / "images" / "stamps.json").unlink(missing_ok=True)


def test_stamps_of_an_earlier_version_are_honoured(root, tmp_path):
    run(tmp_path / "c", root)
    as_before(tmp_path / "c", root)
    assert run(tmp_path / "c", root) == (Changes(unchanged=8), 0)
    paint(root / "p1.png", 100)
    os.utime(root / "p2.png", (1, 1))
    assert run(tmp_path / "c", root) == (Changes(changed=2, unchanged=6), 2)
    known = Index(tmp_path / "c").contents("images")
    assert {name for name, content in known.items() if isinstance(content, str)} == {"p1.png", "p2.png"}
    compact_images(tmp_path / "c", "images")
    assert Index(tmp_path / "c").contents("images") == known
    root.rename(tmp_path / "moved")
    assert run(tmp_path / "c", tmp_path / "moved") == (Changes(unchanged=8, left=str(root)), 0)


def test_what_nobody_noted_stays_and_is_told(root, tmp_path):
    run(tmp_path / "c", root)
    rewrite(tmp_path / "c", lambda tensors, stamp: stamp.pop("contents"))
    paint(root / "p1.png", 100)
    changes, encoded = run(tmp_path / "c", root)
    assert (changes, encoded) == (Changes(unchanged=8, unknown=8), 0)
    assert any(
        line.startswith("8 of the unchanged were indexed by a SaMer that did not note") for line in changes.lines()
    )
    with pytest.raises(InputError, match="holds the pictures of"):  # nothing says that it is the same folder
        run(tmp_path / "c", shutil.copytree(root, tmp_path / "copy"))


def test_a_split_of_a_data_set_is_no_folder(root, tmp_path):
    run(tmp_path / "c", root)
    index = Index(tmp_path / "c")
    splits = {"images": replace(index.manifest.splits["images"], root=None)}
    index_write.write_index_manifest(tmp_path / "c" / "manifest.json", replace(index.manifest, splits=splits))
    with pytest.raises(InputError, match="c holds a data set's split 'images'; name another index"):
        run(tmp_path / "c", root)


# --- interrupted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [KeyboardInterrupt, signals.Stopped, InputError])
def test_a_run_that_ends_early_goes_on_where_it_was(root, tmp_path, monkeypatch, how):
    """What is finished is kept, and remembered so that it is not read again."""
    monkeypatch.setattr(stamps, "_RACY", 0)
    run(tmp_path / "c", root)
    for seed, name in enumerate(NAMES, 100):
        paint(root / name, seed)
    encoder, encode, asked = Counting(), Counting.encode_images, []

    def ending(self, inputs, needs=()):
        if self.encoded > 2:  # a shard of three is written
            asked.append(True)
            if how is not signals.Stopped:
                raise how
        return encode(self, inputs, needs)

    def stop_here():
        if asked:
            raise signals.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Counting, "encode_images", ending)
        patch.setattr(sync, "stop_here", stop_here)
        with pytest.raises(how):
            run(tmp_path / "c", root, encoder)
    known = Index(tmp_path / "c").contents("images")
    done = {name for name, content in known.items() if content == hash_of(root / name)}
    assert len(done) == (6 if how is signals.Stopped else 3)
    assert set(rows(tmp_path / "c")) == set(NAMES)
    read, digest = [], stamps.digest_of
    name_of = lambda handle: Path(handle.name).relative_to(root).as_posix()
    monkeypatch.setattr(stamps, "digest_of", lambda handle: read.append(name_of(handle)) or digest(handle))
    assert run(tmp_path / "c", root) == (Changes(changed=8 - len(done), unchanged=len(done)), 8 - len(done))
    assert not done & set(read)
    assert is_anew(tmp_path / "c", root, tmp_path)


def test_a_reader_goes_on_while_the_folder_is_followed_and_compacted(root, tmp_path):
    run(tmp_path / "c", root)
    reader = Index(tmp_path / "c")
    before = reader.search(ask(), "images", 20)
    (root / "sub").rename(root / "below")
    paint(root / "p0.png", 100)
    run(tmp_path / "c", root, remove_gone=True)
    compact_images(tmp_path / "c", "images")
    assert reader.search(ask(), "images", 20) == before
    assert Index(tmp_path / "c").search(ask(), "images", 20) != before


# --- what is told ---------------------------------------------------------------------------------------------------


def test_the_lines_count_and_name_a_few(tmp_path):
    skipped = [Skipped(f"{k}.jpg", "no permission", f"/x/{k}.jpg: no", False) for k in range(5)]
    skipped += [Skipped("a\nb\udce9.png", "name is not UTF-8", "a\nb: rename it")]
    lines = Changes(new=12, changed=1, gone=3, unchanged=1024, moved=2, skipped=skipped).lines()
    assert lines == [
        "12 new, 1 changed, 3 gone, 1,024 unchanged, 2 moved, 6 skipped",
        "still in the index, as they were: 3 gone; --sync takes them out",
        "skipped, no permission: 5: 0.jpg, 1.jpg, 2.jpg and 2 more (--skipped FILE lists them); /x/0.jpg: no",
        r"skipped, name is not UTF-8: 1: a\nb\udce9.png; a\nb: rename it",
    ]
    for line in lines:
        line.encode()
        assert line.isprintable()


def test_an_index_that_is_mostly_dead_says_so(root, tmp_path):
    run(tmp_path / "c", root)
    said = []
    for turn in range(2):
        for seed, name in enumerate(NAMES[:7]):
            paint(root / name, [7, turn, seed])
        found = find_pictures(root)
        _, changes = update_images(tmp_path / "c", found, Counting(), MERGE, batch_size=2)
        said.append([line for line in changes.lines() if "--compact" in line])
    assert said[0] == []  # 7 rows of 15
    assert len(said[1]) == 1
    assert said[1][0].startswith("64% of the index's rows")  # 14 of 22
    compact_images(tmp_path / "c", "images")
    assert not any("--compact" in line for line in update_images(tmp_path / "c", found, Counting(), MERGE)[1].lines())


def test_the_list_of_skipped_files_has_a_line_each(tmp_path):
    odd = [
        "a\nb.jpg",
        "c\td.jpg",
        os.fsdecode(b"caf\xe9.png"),
        "back\\slash.png",
        "\x1b[31mred.png",
        "ä 日.png",
        "\u2028",
    ]
    write_skipped(tmp_path / "s.txt", [Skipped(name, "a reason", f"{name}: why") for name in odd])
    text = (tmp_path / "s.txt").read_bytes().decode("utf-8")
    lines = [line.split("\t") for line in text.splitlines()]
    assert [len(line) for line in lines] == [3] * len(odd)
    unescaped = [line[0].encode("latin-1", "backslashreplace").decode("unicode_escape") for line in lines]
    assert unescaped == odd
    assert "\x1b" not in text
    assert lines[5][0] == "ä 日.png"
    write_skipped(tmp_path / "s.txt", [])
    assert (tmp_path / "s.txt").read_bytes() == b""
    with pytest.raises(InputError, match="can't be written"):
        write_skipped(tmp_path / "s.txt" / "below", [])
