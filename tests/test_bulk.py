"""Indexes of fixed sets: equal to those of a folder that is followed, from wherever pictures come; resumed; refused."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from test_sources import write_parquet, write_tar

from samer.config import InputError
from samer.index import bulk
from samer.index import pictures as index_pictures
from samer.index.read import Index
from samer.index.verify import verify

pytest.importorskip("pyarrow", reason="parquet needs pyarrow")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(index_pictures, "PICTURES_PER_SHARD", 4)
    monkeypatch.setattr(bulk, "PICTURES_PER_SHARD", 4)
    monkeypatch.setattr(bulk, "IMAGES_PER_SHARD", 4)


@pytest.fixture(scope="module")
def album(world, tmp_path_factory):
    """26 pictures in two folders, and one that can't be read."""
    folder = tmp_path_factory.mktemp("album")
    for number, path in enumerate(sorted((world / "images/Images").glob("*.jpg"))):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        shutil.copy(path, folder / "ab"[number % 2] / f"{number:02d}.jpg")
    (folder / "b/broken.jpg").write_text("none")
    return folder


@pytest.fixture
def indexed(script, base):
    def make(images, folder, *words):
        settings = [word for word in words if word.startswith("merge.")]  # all together, as argparse wants them
        options = [word for word in words if word not in settings] + ["--batch-size", "3", "--threads", "1"]
        common = [*options, f"model.name={base}", "merge.num_regions=6", *settings]
        return script("index").main(["--images", str(images), "--cache-dir", str(folder), *common])

    return make


def files(folder):
    kept = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "stamps.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept if "jobs" not in path.parts}


def vectors(folder):
    """Of every image, in order, by id."""
    index = Index(folder)
    return {name: index.vectors("images", number).tokens for name, number in index.numbers("images").items()}


def test_of_a_folder_it_is_the_one_that_is_followed(album, indexed, tmp_path, capsys):
    indexed(album, tmp_path / "followed", "--skipped", str(tmp_path / "skipped-1"))
    indexed(album, tmp_path / "fixed", "--engine", "process", "--skipped", str(tmp_path / "skipped-2"))
    assert files(tmp_path / "fixed") == files(tmp_path / "followed")
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("skipped, not a picture: 1: b/broken.jpg; ")
    listed = [(tmp_path / f"skipped-{k}").read_text().split("\t")[:2] for k in (1, 2)]
    assert listed[0] == listed[1] == ["b/broken.jpg", "not a picture"]
    assert verify(tmp_path / "fixed").damages == []
    (album_index,) = [Index(tmp_path / "fixed").manifest.splits["images"]]
    assert album_index.root == str(album)
    indexed(album, tmp_path / "fixed", "--sync")  # it can be followed from then on
    assert files(tmp_path / "fixed") == files(tmp_path / "followed")


def test_the_same_pictures_from_anywhere_have_the_same_vectors(album, indexed, tmp_path):
    paths = sorted(album.rglob("*.jpg"))
    rows = [(path.stem, path.read_bytes()) for path in paths]
    for folder in ("tables", "tars"):
        (tmp_path / folder).mkdir()
    for number, part in enumerate((rows[:15], rows[15:])):
        write_parquet(
            tmp_path / f"tables/t-{number}.parquet", {"id": [n for n, _ in part], "image": [c for _, c in part]}
        )
        write_tar(tmp_path / f"tars/s-{number}.tar", [(f"{name}.jpg", content) for name, content in part])
    places = {"tables": tmp_path / "tables", "tars": tmp_path / "tars", "address": f"file://{album}"}
    for name, place in places.items():
        indexed(place, tmp_path / f"of-{name}", "--cache-dtype", "float32")
    indexed(album, tmp_path / "own", "--cache-dtype", "float32")
    own = {name.rpartition("/")[2].partition(".")[0]: tokens for name, tokens in vectors(tmp_path / "own").items()}
    for name in places:
        found = {
            key.rpartition("/")[2].partition(".")[0]: tokens for key, tokens in vectors(tmp_path / f"of-{name}").items()
        }
        assert sorted(found) == sorted(own)
        for key, tokens in found.items():
            torch.testing.assert_close(tokens, own[key], atol=1e-5, rtol=0)  # other batches
    assert next(iter(vectors(tmp_path / "of-tables"))) == "00"
    assert next(iter(vectors(tmp_path / "of-tars"))) == "s-0/00"
    assert next(iter(vectors(tmp_path / "of-address"))) == "a/00.jpg"


def test_what_is_finished_is_kept_and_what_changed_is_made_anew(album, indexed, tmp_path, monkeypatch):
    source = tmp_path / "album"
    shutil.copytree(album, source)
    indexed(source, tmp_path / "whole", "--engine", "process")
    encoded = []
    encode = bulk.Worker._write

    def counted(worker, number, *rest):
        encoded.append(number)
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return encode(worker, number, *rest)

    monkeypatch.setattr(bulk.Worker, "_write", counted)
    with pytest.raises(KeyboardInterrupt):
        indexed(source, tmp_path / "c", "--engine", "process")
    assert not (tmp_path / "c/manifest.json").exists()
    torn = tmp_path / "c/images/images-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    (tmp_path / "c/images/jobs/00002.json").write_text("{")
    encoded[:] = [None] * 4
    indexed(source, tmp_path / "c", "--engine", "process")
    assert encoded[4:] == [1, 2, 3, 4, 5, 6]
    assert files(tmp_path / "c") == files(tmp_path / "whole")
    encoded[:] = [None] * 4
    indexed(source, tmp_path / "c", "--engine", "process")
    assert encoded[4:] == []
    shutil.copy(source / "a/00.jpg", source / "b/25.jpg")
    indexed(source, tmp_path / "c", "--engine", "process")
    assert encoded[4:] == [6]
    indexed(source, tmp_path / "new", "--engine", "process")
    assert files(tmp_path / "c") == files(tmp_path / "new")


def test_parts_are_the_whole(album, indexed, script, tmp_path):
    indexed(album, tmp_path / "whole", "--engine", "process")
    for k in (1, 2, 3):
        indexed(album, tmp_path / f"part-{k}", "--part", f"{k}/3")
    parts = [str(tmp_path / f"part-{k}") for k in (1, 2, 3)]
    script("index").main(["--cache-dir", str(tmp_path / "all"), "--merge-indexes", *parts])
    assert files(tmp_path / "all") == files(tmp_path / "whole")


def test_what_is_refused(album, indexed, tmp_path, capsys):
    indexed(album, tmp_path / "followed")
    with pytest.raises(InputError, match="its pictures were indexed, or changed, without --engine"):
        indexed(album, tmp_path / "followed", "--engine", "process")
    with pytest.raises(InputError, match=r"part 8/8 is empty|part 1/8 is empty"):
        indexed(album, tmp_path / "new", "--part", "1/8")
    with pytest.raises(InputError, match="hpc learns from a whole corpus"):
        indexed(album, tmp_path / "new", "--engine", "process", "merge.compressor=hpc")
    table = write_parquet(tmp_path / "t.parquet", {"id": ["a", "a"], "image": [b"x", b"y"]})
    with pytest.raises(InputError, match=r"image 'a' is in .*t\.parquet as well"):
        indexed(table, tmp_path / "new")
    table = write_parquet(tmp_path / "t.parquet", {"id": ["a", "b"], "image": [b"x", b"y"]})
    with pytest.raises(InputError, match="not one readable picture; first: a: not a readable image"):
        indexed(table, tmp_path / "new")
    for words in (["--sync", "--engine", "ray"], ["--workers", "2"]):
        with pytest.raises(SystemExit):
            indexed(album, tmp_path / "new", *words)
    assert not list(tmp_path.glob("new/**/*.safetensors"))


# --- Ray ------------------------------------------------------------------------------------------------------------


def workers_of_ray():
    """Processes below this one that encode for Ray."""
    found, parents = [], {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if (line.startswith("ray::") and "_Encoder" in line) or line.startswith("ray::MapWorker"):
                found.append(int(place.name))

    def is_ours(pid):
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid in found if is_ours(pid)]


def kill_one(folder, killed):
    """Kills a worker of Ray as soon as a shard is finished."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not killed:
        time.sleep(0.05)
        if any(folder.glob("images/jobs/*.json")):
            for pid in workers_of_ray()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)


@pytest.mark.slow
def test_ray_makes_the_same_index_and_loses_a_worker(album, indexed, tmp_path, monkeypatch):
    pytest.importorskip("ray.data", reason="needs pip install 'samer[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    indexed(album, tmp_path / "one")
    killed = []
    killer = threading.Thread(target=kill_one, args=(tmp_path / "two", killed), daemon=True)
    killer.start()
    indexed(album, tmp_path / "two", "--engine", "ray", "--workers", "2")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert killed
    notes = [json.loads(path.read_text()) for path in sorted((tmp_path / "two/images/jobs").glob("0*.json"))]
    assert [note["number"] for note in notes] == list(range(7))


def test_too_few_workers(album, indexed, tmp_path):
    with pytest.raises(InputError, match="--workers is -1; it must be at least 1"):
        indexed(album, tmp_path / "new", "--engine", "ray", "--workers", "-1")
