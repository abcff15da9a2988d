"""A search shows what became of the pictures it finds: their files are gone, or changed since they were indexed."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samer.data import stamps
from samer.index.read import Index
from samer.search.marks import Marks
from samer.search.models import Models
from samer.search.open_index import SearchIndex

NAMES = ["a.png", "b.png", "in/c.png", "in/d.png", "in/e.png"]
LONG_AGO = time.time_ns() - 10**12


def paint(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)  # all of one size
    os.utime(path, ns=(LONG_AGO, LONG_AGO))


@pytest.fixture
def indexed(script, base, tmp_path, monkeypatch):
    """An index of five pictures in `tmp_path`/root; times of files are remembered although they are new."""
    monkeypatch.setattr(stamps, "_RACY", 0)
    for seed, name in enumerate(NAMES):
        paint(tmp_path / "root" / name, seed)
    words = ["--images", str(tmp_path / "root"), "--cache-dir", str(tmp_path / "c"), f"model.name={base}"]
    script("index").main([*words, "merge.num_regions=4"])
    return tmp_path


def states(folder):
    found = SearchIndex(folder / "c", Models("cpu")).search("a dog", 10)
    return {name: state for (name, _), state in zip(found.hits, found.states)}


def test_pictures_as_they_were_bear_no_mark(indexed):
    assert states(indexed) == dict.fromkeys(NAMES)


def test_what_is_gone_or_changed_is_marked(indexed, script, capsys):
    root = indexed / "root"
    (root / "a.png").unlink()
    paint(root / "b.png", 9)
    os.utime(root / "b.png")  # as large as before, written later
    (root / "in" / "c.png").write_bytes(b"shorter")
    os.utime(root / "in" / "c.png", ns=(LONG_AGO, LONG_AGO))  # by a tool that keeps the time
    os.chmod(root / "in" / "d.png", 0o640)  # another inode's time, the same picture
    expected = {"a.png": "gone", "b.png": "changed", "in/c.png": "changed", "in/d.png": None, "in/e.png": None}
    assert states(indexed) == expected
    capsys.readouterr()
    words = ["a dog", "--cache-dir", str(indexed / "c")]
    script("search").main([*words, "--json"])
    rows = json.loads(capsys.readouterr().out)["results"]
    assert {row["id"]: row["state"] for row in rows} == expected
    script("search").main(words)
    lines = [line.split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines()[1:]]
    ends = {"gone": " (gone)", "changed": " (changed since it was indexed)", None: ""}
    assert sorted(lines) == sorted(f"{root / name}{ends[state]}" for name, state in expected.items())


def test_an_update_takes_the_marks_away(indexed, script):
    (indexed / "root" / "a.png").unlink()
    paint(indexed / "root" / "b.png", 9)
    os.utime(indexed / "root" / "b.png")
    shutil.copy(indexed / "root" / "in" / "d.png", indexed / "root" / "new.png")
    script("index").main(["--cache-dir", str(indexed / "c"), "--sync"])
    assert states(indexed) == dict.fromkeys([*NAMES[1:], "new.png"])


def test_an_open_index_sees_what_becomes_of_its_pictures(indexed, script):
    index = SearchIndex(indexed / "c", Models("cpu"))
    look = lambda: dict(zip((name for name, _ in index.search("a dog", 10).hits), index.search("a dog", 10).states))
    assert look() == dict.fromkeys(NAMES)
    os.utime(indexed / "root" / "a.png")  # touched: only reading it would tell that it is the same
    assert look()["a.png"] == "changed"
    script("index").main(["--images", str(indexed / "root"), "--cache-dir", str(indexed / "c")])
    index = index.now()
    assert look() == dict.fromkeys(NAMES)


def test_nothing_is_said_where_nothing_is_known(indexed, monkeypatch):
    """Without remembered times a change is not seen; what can't be looked at is neither gone nor changed."""
    paint(indexed / "root" / "b.png", 9)
    os.utime(indexed / "root" / "b.png")
    (indexed / "c" / "images" / stamps.FILE).unlink()
    assert states(indexed) == dict.fromkeys(NAMES)
    (indexed / "c" / "images" / stamps.FILE).write_text("[" * 10**5)
    assert states(indexed) == dict.fromkeys(NAMES)
    real = os.stat

    def stalled(path, *words, **more):
        if str(path).endswith("a.png"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path, *words, **more)

    marks = Marks(Index(indexed / "c"), "images")
    monkeypatch.setattr(os, "stat", stalled)
    assert marks.state("a.png", indexed / "root" / "a.png") is None


def test_remembered_times_of_a_million_pictures_hold_no_search_up(indexed, monkeypatch):
    paint(indexed / "root" / "b.png", 9)
    os.utime(indexed / "root" / "b.png")
    assert states(indexed)["b.png"] == "changed"
    monkeypatch.setattr("samer.search.marks.MOST_BYTES", 10)
    assert states(indexed)["b.png"] is None


def test_a_folder_in_a_pictures_place_is_no_picture(indexed):
    (indexed / "root" / "a.png").unlink()
    (indexed / "root" / "a.png").mkdir()
    (indexed / "root" / "in" / "c.png").unlink()
    (indexed / "root" / "in" / "c.png").symlink_to(indexed / "nothing")
    found = states(indexed)
    assert (found["a.png"], found["in/c.png"]) == ("gone", "gone")


def test_pictures_of_a_data_set_are_marked_where_they_are_known(script, base, world, tmp_path):
    copy = shutil.copytree(world, tmp_path / "w")
    words = ["--data-root", str(copy), "--cache-dir", str(tmp_path / "c"), "--splits", "val", f"model.name={base}"]
    script("cache").main([*words, "merge.num_regions=4"])
    index = SearchIndex(tmp_path / "c", Models("cpu"), data_root=copy)
    hits = index.search("a dog", 10)
    assert hits.states == [None] * 6
    name = hits.hits[0][0]
    (copy / "images" / "Images" / f"{name}.jpg").unlink()
    found = index.search("a dog", 10)
    assert dict(zip((each for each, _ in found.hits), found.states))[name] in ("gone", None)
    assert SearchIndex(tmp_path / "c", Models("cpu")).search("a dog", 10).states == [None] * 6  # nobody knows where


def test_a_picture_that_the_index_names_out_of_its_folder_is_not_looked_at(indexed, monkeypatch):
    index = SearchIndex(indexed / "c", Models("cpu"))
    looked = []
    monkeypatch.setattr(index, "_marks", type("Marks", (), {"state": lambda _, name, path: looked.append(path)})())
    for name in ("../a.png", str(Path("/etc/passwd"))):
        assert index._state(name) is None
    assert looked == []
