"""--delete takes what a search prints, what a shell completes, and ids."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from samer.config import InputError, MergeConfig
from samer.data.pictures import find_pictures
from samer.index.names import picture_ids
from samer.index.read import Index
from samer.index.sync import update_images
from samer.index.write import build_index
from samer.retrievers.hf import Retriever

COMPOSED, APART = "caf\u00e9.png", "cafe\u0301.png"
NAMES = ["a.png", "b.png", "in/a.png", "in/c.png", "in/deep/d.png", APART, "with space.png"]


@pytest.fixture(scope="module")
def album(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("album")
    generator = np.random.default_rng(0)
    for name in NAMES:
        (folder / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / "root" / name)
    (folder / "link").symlink_to(folder / "root")
    merge = MergeConfig(num_regions=4)
    update_images(folder / "c", find_pictures(folder / "root"), Retriever.load(str(base)), merge)
    return SimpleNamespace(root=folder / "root", index=folder / "c", folder=folder)


@pytest.mark.parametrize(
    ("where", "word", "expected"),
    [
        (".", "in/c.png", "in/c.png"),  # an id, from anywhere
        (".", "./in/c.png", "in/c.png"),
        (".", "in//deep/../c.png", "in/c.png"),
        (".", "{root}/in/c.png", "in/c.png"),  # as a search prints it
        (".", "{root}/../root/b.png", "b.png"),
        (".", "{folder}/link/in/c.png", "in/c.png"),
        (".", "root/in/c.png", "in/c.png"),  # as a shell completes it
        ("root/in", "c.png", "in/c.png"),
        ("root/in", "../b.png", "b.png"),
        ("root/in/deep", "../../b.png", "b.png"),
        ("link/in", "deep/d.png", "in/deep/d.png"),
        (".", COMPOSED, APART),  # a Mac's file system takes accents apart, a keyboard does not
        (".", "{root}/" + COMPOSED, APART),
        (".", "with space.png", "with space.png"),
    ],
)
def test_a_picture_is_known_by_its_names(album, monkeypatch, where, word, expected):
    monkeypatch.chdir(album.folder / where)
    word = word.format(root=album.root, folder=album.folder)
    assert picture_ids(album.index, "images", [word, "a.png"] if where == "." else [word]) == (
        [expected, "a.png"] if where == "." else [expected]
    )


def test_a_home_folder_is_known(album, monkeypatch):
    monkeypatch.setenv("HOME", str(album.root))
    assert picture_ids(album.index, "images", ["~/in/c.png"]) == ["in/c.png"]


@pytest.mark.parametrize(
    "word", ["nobody.png", "{folder}/b.png", "/b.png", "in", "in/", "{root}", "", "..", "deep/d.png"]
)
def test_what_names_nothing_is_refused(album, monkeypatch, word):
    monkeypatch.chdir(album.folder)
    word = word.format(root=album.root, folder=album.folder)
    with pytest.raises(InputError) as refused:
        picture_ids(album.index, "images", ["b.png", word])
    assert f"no image {word!r} in images (1 such); give paths as a search prints them" in str(refused.value)
    assert str(album.root) in str(refused.value)


def test_what_names_two_pictures_is_refused(album, monkeypatch):
    monkeypatch.chdir(album.root / "in")
    with pytest.raises(
        InputError, match=f"'a.png' can be {album.root}/a.png and {album.root}/in/a.png: give the whole"
    ):
        picture_ids(album.index, "images", ["a.png"])
    assert picture_ids(album.index, "images", ["./../a.png", f"{album.root}/in/a.png"]) == ["a.png", "in/a.png"]


def test_an_index_of_a_data_set_has_ids_only(base, world, tmp_path, monkeypatch):
    build_index(tmp_path / "c", world, ["val"], Retriever.load(str(base)), MergeConfig(num_regions=4))
    monkeypatch.chdir(tmp_path)
    name = next(iter(Index(tmp_path / "c").numbers("val")))
    assert picture_ids("c", "val", [name]) == [name]
    with pytest.raises(InputError, match=f"no image '{world}/images/Images/{name}.jpg' in val"):
        picture_ids("c", "val", [f"{world}/images/Images/{name}.jpg"])


def copied(album, base, tmp_path):
    merge = MergeConfig(num_regions=4)
    update_images(tmp_path / "c", find_pictures(album.root), Retriever.load(str(base)), merge)
    return ["--cache-dir", str(tmp_path / "c")]


def test_delete_takes_what_search_prints(album, base, script, tmp_path, capsys):
    words = copied(album, base, tmp_path)
    capsys.readouterr()
    script("search").main(["a dog", *words, "--top", "2"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert script("index").main([*words, "--delete", *(line.split(maxsplit=2)[2] for line in lines)]) == len(NAMES) - 2
    assert f"taken out of {tmp_path / 'c'}: 2; it holds {len(NAMES) - 2}\n" in capsys.readouterr().out
    script("search").main(["a dog", *words, "--json"])
    found = [row["path"] for row in json.loads(capsys.readouterr().out)["results"]]
    assert script("index").main([*words, "--delete", found[0], found[0]]) == len(NAMES) - 3


def test_delete_reads_paths_from_standard_input(album, base, script, tmp_path, monkeypatch):
    words = copied(album, base, tmp_path)
    lines = f"{album.root}/in/c.png\r\n\nwith space.png\n{album.root}/{APART}"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert script("index").main([*words, "--delete", "-", "b.png"]) == len(NAMES) - 4
    assert set(Index(tmp_path / "c").numbers("images")) == {"a.png", "in/a.png", "in/deep/d.png"}
    before = (tmp_path / "c" / "manifest.json").read_bytes()
    for content in (b"a.png\nnobody.png\n", b"a.png\n\xff.png\n", b"\n\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        with pytest.raises(InputError, match="nothing was deleted"):
            script("index").main([*words, "--delete", "-"])
        assert (tmp_path / "c" / "manifest.json").read_bytes() == before
