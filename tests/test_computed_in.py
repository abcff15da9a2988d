"""What the backbone computes in: --dtype of every command, and indexes that hold images of two dtypes."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig
from samer.features.read import FeatureStore
from samer.index.manifest import IndexManifest, Making, to_json, write_index_manifest
from samer.index.merge import merge_indexes
from samer.index.pictures import compact_images
from samer.index.read import Index
from samer.index.verify import verify
from samer.index.write import build_index
from samer.retrievers.hf import Retriever
from samer.retrievers.identity import ModelIdentity
from samer.runtime.shards import load_header

MERGE = MergeConfig(num_regions=5, center_init="farthest")


def paint(path, seed):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def album(tmp_path):
    for seed in range(4):
        paint(tmp_path / "album" / f"{seed}.png", seed)
    return tmp_path / "album"


@pytest.fixture
def index(script):
    return lambda *words: script("index").main([str(word) for word in words])


@pytest.fixture
def made(index, album, base, tmp_path):
    """An index of pictures whose model computed in bfloat16, as on a GPU; stored in float32."""
    words = ("--cache-dtype", "float32", "--dtype", "bfloat16", f"model.name={base}", "merge.num_regions=5")
    index("--images", album, "--cache-dir", tmp_path / "c", *words)
    return tmp_path / "c"


def vectors(folder, split="images"):
    found = Index(folder)
    return {name: found.vectors(split, number).tokens for name, number in found.numbers(split).items()}


def origins(folder, split="images"):
    """What each shard's header says that its images were computed in."""
    shards = Index(folder).manifest.splits[split].images
    stamps = [load_header(folder / split / shard.file)["stamp"] for shard in shards]
    return [stamp["hidden_states"]["computed_in"] for stamp in stamps]


def test_an_index_is_made_in_the_dtype_that_is_asked_for(made, album, base):
    assert Index(made).manifest.hidden_states == {"computed_in": "bfloat16", "stored_in": "nothing"}
    exact, half = (Retriever.load(str(base), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    pictures = [Image.open(album / f"{k}.png").convert("RGB") for k in range(4)]  # one batch, as there
    expected = [
        make_compressor(MERGE)(each.encode_images(each.image_inputs(pictures))).tokens for each in (half, exact)
    ]
    assert torch.equal(torch.stack(list(vectors(made).values())), expected[0])
    assert not torch.equal(*expected)


def test_a_manifest_of_one_dtype_is_as_it_was(made):
    assert "also_computed_in" not in json.loads((made / "manifest.json").read_text())
    shard = Index(made).manifest.splits["images"].images[0]
    assert "also_computed_in" not in load_header(made / "images" / shard.file)["stamp"]


def test_another_dtype_is_refused_until_the_owner_says_so(index, album, made, base):
    paint(album / "new.png", 9)
    before = (made / "manifest.json").read_bytes()
    with pytest.raises(
        InputError, match=r"'bfloat16'.*'float32'.*leave --dtype out, or say --also-computed-in float32"
    ):
        index("--images", album, "--cache-dir", made, "--dtype", "float32")
    assert (made / "manifest.json").read_bytes() == before
    old = vectors(made)
    index("--images", album, "--cache-dir", made, "--also-computed-in", "float32")
    assert Index(made).manifest.also_computed_in == ("float32",)
    assert Index(made).manifest.hidden_states["computed_in"] == "bfloat16"
    assert origins(made) == ["bfloat16", "float32"]
    now = vectors(made)
    assert all(torch.equal(now[name], row) for name, row in old.items())
    exact = Retriever.load(str(base))
    picture = [Image.open(album / "new.png").convert("RGB")]
    assert torch.equal(
        now["new.png"], make_compressor(MERGE)(exact.encode_images(exact.image_inputs(picture))).tokens[0]
    )
    assert not verify(made).damages


def test_an_index_of_two_dtypes_goes_on_in_either(index, album, made):
    paint(album / "new.png", 9)
    index("--images", album, "--cache-dir", made, "--also-computed-in", "float32")
    for seed, words in enumerate([("--dtype", "float32"), (), ("--also-computed-in", "float32")], 10):
        paint(album / f"{seed}.png", seed)
        index("--images", album, "--cache-dir", made, *words)
    assert origins(made) == ["bfloat16", "float32", "float32", "bfloat16", "float32"]
    assert Index(made).manifest.also_computed_in == ("float32",)
    with pytest.raises(InputError, match="or say --also-computed-in float16"):
        index("--images", album, "--cache-dir", made, "--dtype", "float16")
    before = vectors(made)
    compact_images(made, "images")
    assert origins(made) == ["bfloat16"]  # of both
    assert all(torch.equal(row, before[name]) for name, row in vectors(made).items())
    assert Index(made).search(queries(made), "images", 3)


def test_what_is_copied_keeps_its_dtype(index, album, made):
    """A picture that comes back under another name gets the vectors that it had."""
    paint(album / "new.png", 9)
    index("--images", album, "--cache-dir", made, "--also-computed-in", "float32")
    (album / "new.png").rename(album / "moved.png")
    index("--images", album, "--cache-dir", made, "--sync", "--dtype", "bfloat16")
    assert origins(made) == ["bfloat16", "float32", "float32"]


def queries(folder):
    encoder = Retriever.load(Index(folder).manifest.base_model)
    return encoder.encode_queries(encoder.query_inputs(["a small red car"]))


def test_a_split_that_is_there_is_kept_when_another_comes_in_another_dtype(script, world, base, tmp_path):
    half = Retriever.load(str(base), dtype=torch.bfloat16)
    build_index(tmp_path / "c", world, ["val"], half, MERGE)
    before = {path: path.read_bytes() for path in (tmp_path / "c" / "val").iterdir()}
    words = ["--data-root", str(world), "--cache-dir", str(tmp_path / "c"), "--splits", "val", "test"]
    kept, new = script("cache").main([*words, "--also-computed-in", "float32"])
    assert kept.reused_shards == 2
    assert {path: path.read_bytes() for path in before} == before
    assert new.reused_shards == 0
    assert origins(tmp_path / "c", "test") == ["float32"]
    build_index(tmp_path / "at once", world, ["test"], Retriever.load(str(base)), MERGE)
    ours, theirs = (vectors(tmp_path / name, "test") for name in ("c", "at once"))
    assert all(torch.equal(row, theirs[name]) for name, row in ours.items())


def test_indexes_of_two_dtypes_are_joined_if_the_first_says_so(world, base, tmp_path):
    half, exact = (Retriever.load(str(base), dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    build_index(tmp_path / "half", world, ["val"], half, MERGE)
    build_index(tmp_path / "exact", world, ["test"], exact, MERGE)
    both = [tmp_path / "half", tmp_path / "exact"]
    with pytest.raises(InputError, match="made with hidden_states="):
        merge_indexes(tmp_path / "joined", both)
    manifest = Index(both[0]).manifest
    write_index_manifest(both[0] / "manifest.json", replace(manifest, also_computed_in=("float32",)))
    merge_indexes(tmp_path / "joined", both)
    assert Index(tmp_path / "joined").manifest.also_computed_in == ("float32",)
    for place, split in zip(both, ("val", "test")):
        whole = vectors(place, split)
        assert all(torch.equal(row, whole[name]) for name, row in vectors(tmp_path / "joined", split).items())


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--also-computed-in", "float32", "--dtype", "bfloat16"), "what is added now has one dtype"),
        (("--also-computed-in", "float32", "--cache-dir", "{new}"), "no index yet.*say --dtype float32"),
    ],
)
def test_what_makes_no_sense_is_refused(index, album, made, tmp_path, words, error):
    words = [word.format(new=tmp_path / "new") for word in words]
    with pytest.raises(InputError, match=error):
        index("--images", album, "--cache-dir", made, *words)


def test_a_fixed_set_has_one_dtype(index, album, made, capsys):
    with pytest.raises(SystemExit):
        index("--images", album, "--cache-dir", made, "--part", "1/1", "--also-computed-in", "float32")
    assert "a fixed set is computed in one dtype" in capsys.readouterr().err


def making(computed_in, **more):
    return {
        "model": ModelIdentity("a", "b", "c", "d"),
        "projector": "p",
        "merge": MERGE,
        "dtype": "int8",
        "embedding_dim": 16,
        "hidden_states": {"computed_in": computed_in, "stored_in": "nothing"},
        **more,
    }


def test_only_what_the_manifest_names_does_not_differ(tmp_path):
    both = IndexManifest(**making("bfloat16"), also_computed_in=("float32",))
    assert both.difference(Making(**making("float32"))) is None
    assert both.difference(Making(**making("bfloat16"))) is None
    assert both.difference(Making(**making("float16")))[0] == "hidden_states"
    assert both.difference(Making(**making("float32", projector="q")))[0] == "projector"
    stored = Making(**making("float32", hidden_states={"computed_in": "float32", "stored_in": "int8"}))
    assert both.difference(stored)[0] == "hidden_states"
    assert replace(both, also_computed_in=()).difference(Making(**making("float32")))[0] == "hidden_states"
    assert to_json(both)["also_computed_in"] == ("float32",)


# --- the commands ---------------------------------------------------------------------------------------------------


def test_a_store_says_what_computed_it(script, world, base, tmp_path):
    words = ["--data-root", str(world), "--splits", "val", f"model.name={base}"]
    script("features").main([*words, "--out", str(tmp_path / "store"), "--compute-dtype", "bfloat16"])
    store = FeatureStore(tmp_path / "store", str(base), "cpu")
    assert store.origin == {"computed_in": "bfloat16", "stored_in": "bfloat16"}


def test_a_search_computes_as_asked(script, made, base, capsys):
    def first(*words):
        script("search").main(["a small red car", "--cache-dir", str(made), "--top", "1", *words])
        return json.loads(capsys.readouterr().out.splitlines()[0])["results"][0]["score"]

    exact, half = first("--json"), first("--json", "--dtype", "bfloat16")
    for score, dtype in ((exact, torch.float32), (half, torch.bfloat16)):
        encoder = Retriever.load(str(base), dtype=dtype)
        query = encoder.encode_queries(encoder.query_inputs(["a small red car"]))
        assert score == pytest.approx(Index(made).search(query, "images", 1)[0][0][1], abs=1e-6)
    assert exact != half


MODELS = ("index", "cache", "tasks", "bank", "layers", "calibrate", "search", "serve", "eval", "report", "reduce")
MODELS += ("align", "compare", "choices", "select_captions")


@pytest.mark.parametrize("name", MODELS)
def test_every_command_that_opens_a_model_takes_a_dtype(script, name, capsys):
    with pytest.raises(SystemExit):
        script(name).main(["--help"])
    text = capsys.readouterr().out
    assert re.search(r"--dtype DTYPE\s+that\s+the\s+model\s+computes\s+in", text)
    with pytest.raises(SystemExit):
        script(name).main(["--dtype", "int8"])
    assert "choose from" in capsys.readouterr().err
