"""scripts/index.py and scripts/search.py on a folder of generated scenes and the small ColPali."""

import contextlib
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from samer.config import InputError, MergeConfig
from samer.index.manifest import write_index_manifest
from samer.index.read import Index
from samer.index.write import build_index
from samer.retrievers.base import Projector
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import save_projector

MERGE = MergeConfig(num_regions=6)
QUERY = "a red car on the left"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def held(folder):
    return [name for ids, *_ in Index(folder).images("images") for name in ids]


@pytest.fixture(scope="module")
def album(world, base, script, tmp_path_factory):
    """14 scenes in two folders and a file that is none, indexed with a projector, and what the index script said."""
    folder = tmp_path_factory.mktemp("album")
    for split in ("val", "test"):
        for name in (world / "annotations" / f"{split}.txt").read_text().split():
            (folder / "root" / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(world / "images" / "Images" / f"{name}.jpg", folder / "root" / split)
    (folder / "root" / "broken.JPG").write_text("none")
    (folder / "root" / "notes.txt").write_text("none")
    retriever = Retriever.load(str(base))
    layer = retriever.base_projector
    step = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    retriever.use_projector(Projector(layer.weight + 0.05 * step, layer.bias))
    save_projector(folder / "adapter", retriever.current_projector(), retriever, MERGE)
    words = ["--images", folder / "root", "--cache-dir", folder / "c", "--adapter-path", folder / "adapter"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        summary = script("index").main([*map(str, words), "--batch-size", "4", "--skipped", str(folder / "skipped")])
    return folder, retriever, summary, said.getvalue().splitlines()


def answers(folder, retriever, text=QUERY, split="images", top=10):
    query = retriever.encode_queries(retriever.query_inputs([text]))
    return Index(folder).search(query, split, top)[0]


def test_index_finds_pictures_below_a_folder(album):
    folder, retriever, summary, said = album
    names = sorted(str(path.relative_to(folder / "root")) for path in (folder / "root").rglob("*.jpg"))
    cache = Index(folder / "c")
    assert held(folder / "c") == names
    assert (summary.images, summary.regions, cache.manifest.dtype) == (14, 6, "int8")
    assert cache.manifest.merge.num_regions == 6  # the adapter's
    assert cache.manifest.projector == retriever.current_projector().hash
    assert said[0] == f"15 pictures under {folder / 'root'}; writing the index to {folder / 'c'}"
    assert said[1].startswith("images: 14 images x at most 6 vectors (106 bytes per image), 0 queries -> ")
    assert said[2] == "14 new, 0 changed, 0 gone, 0 unchanged, 0 moved, 1 skipped"
    assert len(said) == 4
    assert said[3].startswith("skipped, not a picture: 1: broken.JPG; ")
    assert f"{folder / 'root' / 'broken.JPG'}: not a readable image" in said[3]
    assert any("skipped" in line for line in said[2:])
    listed = (folder / "skipped").read_text().splitlines()
    assert len(listed) == 1
    assert listed[0].startswith("broken.JPG\t")


def test_search_prints_the_best(album, script, capsys):
    folder, retriever, *_ = album
    (result,) = script("search").main([QUERY, "--cache-dir", str(folder / "c"), "--top", "3", "--threads", "1"])
    expected = answers(folder / "c", retriever, top=3)
    assert [(row["id"], row["score"]) for row in result["results"]] == [(n, round(s, 6)) for n, s in expected]
    said = capsys.readouterr()
    assert said.out.splitlines()[0].startswith(f"{QUERY}   (")
    assert [line.split(maxsplit=2) for line in said.out.splitlines()[1:]] == [
        [str(k), f"{score:.4f}", str(folder / "root" / name)] for k, (name, score) in enumerate(expected, 1)
    ]
    assert said.err == f"14 images x 6 vectors, 0.0 MB, in {folder / 'c'}\n"


def test_search_prints_json_lines(album, script, capsys):
    folder, retriever, *_ = album
    script("search").main([QUERY, "ein grünes Schild", "--cache-dir", str(folder / "c"), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["query"] for line in lines] == [QUERY, "ein grünes Schild"]
    for line in lines:
        assert set(line) == {"query", "results", "encode_ms", "search_ms"}
        expected = answers(folder / "c", retriever, line["query"])
        assert [row["id"] for row in line["results"]] == [name for name, _ in expected]
        assert all(Path(row["path"]).is_file() for row in line["results"])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_search_asks_a_terminal_until_an_empty_line(album, script, capsys, monkeypatch):
    folder, retriever, *_ = album
    monkeypatch.setattr(sys, "stdin", Terminal(f"a dog\nan <image> of it\n{QUERY}\n\nnever read\n"))
    assert script("search").main(["--cache-dir", str(folder / "c"), "--top", "2", "--json"]) == 2
    said = capsys.readouterr()
    results = [json.loads(line) for line in said.out.splitlines()]
    assert [result["query"] for result in results] == ["a dog", QUERY]
    assert [row["id"] for row in results[1]["results"]] == [name for name, _ in answers(folder / "c", retriever, top=2)]
    assert "error: query 'an <image> of it' holds <image>" in said.err
    monkeypatch.setattr(sys, "stdin", Terminal("a dog"))  # its end ends it too
    assert script("search").main(["--cache-dir", str(folder / "c")]) == 1


def test_index_takes_pictures_out_and_back_in(album, base, script, tmp_path, capsys):
    folder = album[0]
    shutil.copytree(folder / "c", tmp_path / "c")
    first, second = held(tmp_path / "c")[:2]
    assert script("index").main(["--cache-dir", str(tmp_path / "c"), "--delete", first, second]) == 12
    assert capsys.readouterr().out == f"taken out of {tmp_path / 'c'}: 2; it holds 12\n"
    assert not {first, second} & set(held(tmp_path / "c"))
    words = ["--images", folder / "root", "--cache-dir", tmp_path / "c", "--adapter-path", folder / "adapter"]
    assert script("index").main([*map(str, words)]).images == 14


@pytest.mark.parametrize(
    ("name", "words", "error"),
    [
        ("index", ["--cache-dir", "{c}"], SystemExit),
        ("index", ["--cache-dir", "{c}", "--images", "{root}", "--delete", "a"], SystemExit),
        ("index", ["--cache-dir", "{c}", "--delete", "nobody.jpg"], "no image 'nobody.jpg'"),
        ("index", ["--cache-dir", "{c}", "--images", "{root}/no"], "no/*: no such folder"),
        ("index", ["--cache-dir", "{c}", "--images", "{c}"], "no pictures in it .looked for .avif, .bmp, "),
        ("index", ["--cache-dir", "{c}", "--images", "{root}", "--adapter-path", "no"], "no: no such projector"),
        ("index", ["--cache-dir", "{c}", "--images", "{root}/val", "--adapter-path", "{a}"], "holds the pictures of"),
        ("search", ["x", "--cache-dir", "{c}", "--top", "0"], SystemExit),
        ("search", ["x", "--cache-dir", "{c}", "--threads", "0"], "--threads is 0; it must be at least 1"),
        ("search", ["x", "--cache-dir", "{root}"], "no manifest.json; this is no finished index"),
        ("search", ["x", "--cache-dir", "{c}", "--split", "val"], "no split 'val' in this index; it holds: images"),
        ("search", ["x", "--cache-dir", "{c}", "--model", "{root}"], "can't be loaded"),
        ("search", ["x", "--cache-dir", "{c}", "--device", "tpu9"], "device 'tpu9' can't be used here"),
        ("search", ["<image>", "--cache-dir", "{c}"], "holds <image>"),
    ],
)
def test_scripts_refuse_what_is_wrong(album, base, script, name, words, error):
    folder = album[0]
    before = contents(folder)
    values = {"c": folder / "c", "root": folder / "root", "a": folder / "adapter", "base": base}
    words = [word.format(**values) for word in words]
    with pytest.raises(error if error is SystemExit else InputError, match="2" if error is SystemExit else error):
        script(name).main(words)
    assert contents(folder) == before


def test_search_needs_a_split_where_there_are_several(world, base, script, tmp_path):
    retriever = Retriever.load(str(base))
    build_index(tmp_path / "c", world, ["val", "test"], retriever, MERGE, dtype="binary")
    with pytest.raises(InputError, match="c holds val, test; name one with --split"):
        script("search").main([QUERY, "--cache-dir", str(tmp_path / "c")])
    (result,) = script("search").main([QUERY, "--cache-dir", str(tmp_path / "c"), "--split", "val"])
    expected = [name for name, _ in answers(tmp_path / "c", retriever, split="val")]
    assert [row["id"] for row in result["results"]] == [row["path"] for row in result["results"]] == expected
    manifest = Index(tmp_path / "c").manifest
    other = replace(manifest, model=replace(manifest.model, base_projector="0" * 64))
    write_index_manifest(tmp_path / "c" / "manifest.json", other)
    with pytest.raises(InputError, match=r"is not the model that .*c was made with"):
        script("search").main([QUERY, "--cache-dir", str(tmp_path / "c"), "--split", "val"])


# --- an index that follows its folder -------------------------------------------------------------------------------


@pytest.fixture
def followed(album, script, tmp_path, capsys):
    """Eight pictures in a folder of their own, indexed; and the words that name the index."""
    for path in sorted((album[0] / "root").rglob("*.jpg"))[:8]:
        (tmp_path / "root" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "root" / path.parent.name)
    words = ["--cache-dir", str(tmp_path / "c")]
    adapter = ["--adapter-path", str(album[0] / "adapter")]
    script("index").main([*words, "--images", str(tmp_path / "root"), *adapter])
    capsys.readouterr()
    return tmp_path / "root", words


def test_every_run_ends_with_counts(followed, script, tmp_path, capsys):
    root, words = followed
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    shutil.copy(root / names[0], root / "copy.jpg")
    shutil.copy(root / names[2], root / names[1])
    (root / names[3]).unlink()
    (root / "no.jpg").write_text("none")
    summary = script("index").main([*words, "--images", str(root), "--skipped", str(tmp_path / "list")])
    said = capsys.readouterr().out.splitlines()
    assert "1 new, 1 changed, 1 gone, 6 unchanged, 0 moved, 1 skipped" in said
    assert any("1 gone; --sync takes them out" in line for line in said)
    assert any(line.startswith("skipped, ") and "no.jpg" in line for line in said)
    (line,) = (tmp_path / "list").read_text().splitlines()
    assert line.startswith("no.jpg\t")
    assert summary.images == 9
    summary = script("index").main([*words, "--sync"])  # of the folder that it knows
    assert "0 new, 0 changed, 1 gone, 8 unchanged, 0 moved, 1 skipped" in capsys.readouterr().out.splitlines()
    assert sorted(held(tmp_path / "c")) == sorted({*names, "copy.jpg"} - {names[3]})
    assert summary.images == 8


def test_a_folder_that_was_moved_is_named_once(followed, script, tmp_path, capsys):
    root, words = followed
    before = sorted(held(tmp_path / "c"))
    new = root.rename(tmp_path / "elsewhere")
    script("index").main([*words, "--images", str(new)])
    assert f"the pictures were under {root} when they were indexed" in capsys.readouterr().out
    assert sorted(held(tmp_path / "c")) == before
    assert Index(tmp_path / "c").manifest.splits["images"].root == str(new)
    script("index").main([*words, "--sync"])
    (result,) = script("search").main([QUERY, *words])
    assert {row["state"] for row in result["results"]} == {None}
    assert all(Path(row["path"]).is_file() for row in result["results"])


def test_a_run_that_can_take_nothing_fails_and_says_why(followed, base, command, tmp_path):
    root, words = followed
    before = contents(tmp_path / "c")
    for path in root.rglob("*.jpg"):
        path.write_text("none")
    fresh = ["--cache-dir", tmp_path / "new", f"model.name={base}"]
    for place in (words, fresh):
        line = [sys.executable, "scripts/index.py", *place, "--images", root, "--skipped", tmp_path / "list"]
        done = command(*line)
        assert (done.returncode, done.stdout.count("\n")) == (2, 2 - (place is words))
        last = done.stderr.splitlines()[-1]
        assert re.search(f"error: {root}: not one readable picture among 8 files; first: .*not a readable image", last)
        assert len((tmp_path / "list").read_text().splitlines()) == 8
        (tmp_path / "list").unlink()
    assert not (tmp_path / "new").exists()
    after = contents(tmp_path / "c")
    after.pop("images/stamps.json", None)  # what is remembered of times
    before.pop("images/stamps.json", None)
    assert after == before


def test_an_empty_folder_empties_no_index(followed, script, tmp_path):
    """A drive that is not mounted leaves an empty folder behind."""
    root, words = followed
    before = contents(tmp_path / "c")
    shutil.rmtree(root)
    root.mkdir()
    (root / "README").write_text("not mounted")
    with pytest.raises(InputError, match="no pictures in it"):
        script("index").main([*words, "--sync"])
    assert contents(tmp_path / "c") == before
