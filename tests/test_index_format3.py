"""Indexes of format 3, made by the code before format 4 (tests/fixtures/make_format3_index.py): they open for ever."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from samer.config import InputError, MergeConfig
from samer.data.pictures import Found
from samer.index.manifest import write_index_manifest
from samer.index.pictures import compact_images, delete_images
from samer.index.read import Index
from samer.index.sync import Changes, update_images
from samer.index.verify import verify
from samer.index.write import build_index
from samer.retrievers.hf import Retriever
from samer.retrievers.identity import ModelIdentity
from samer.runtime.shards import load_header
from samer.world.write import write_world

ROOT = Path(__file__).resolve().parents[1]
OLD = ROOT / "tests" / "fixtures" / "format3"
ALBUM = "tests/fixtures/format3/album"  # as the indexes name it, from the root of the repo
EXPECTED = json.loads((OLD / "expected.json").read_text())
MERGE = MergeConfig(num_regions=8)
GRID, TOKENS = (16, 16), 262  # of the built-in retriever: patches, then 6 prompt tokens


@pytest.fixture(scope="module")
def built_in():
    return Retriever.load(str(ROOT / "assets" / "retriever"))


@pytest.fixture(scope="module")
def asked(built_in):
    return built_in.encode_queries(built_in.query_inputs(EXPECTED["queries"]))


@pytest.fixture
def copy(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return lambda name: shutil.copytree(OLD / name, tmp_path / name)


def album(*names):
    return Found(Path(ALBUM).resolve(), list(names), [])


def same_answers(found, expected):
    assert [[name for name, _ in row] for row in found] == [[name for name, _ in row] for row in expected]
    for row, other in zip(found, expected):
        assert [score for _, score in row] == pytest.approx([score for _, score in other], abs=2e-5)


@pytest.mark.parametrize(("name", "split"), [("pictures", "images"), ("none", "images"), ("binary", "test")])
def test_it_opens_verifies_and_answers_as_it_did(built_in, asked, name, split):
    index = Index(OLD / name)
    index.check_model(built_in)
    same_answers(index.search(asked, split, 10), EXPECTED[name])
    assert verify(OLD / name).damages == []
    assert index.manifest.model == ModelIdentity("", "", "", built_in.base_projector.hash)
    assert index.contents(split) == dict.fromkeys(index.numbers(split))
    for number in index.numbers(split).values():
        assert index.vectors(split, number).grid is None


def test_an_evaluation_gives_the_scores_it_gave():
    scores, image = Index(OLD / "binary").scores("test")
    np.testing.assert_allclose(scores, EXPECTED["scores"], atol=2e-5)
    assert image.tolist() == EXPECTED["image"]


def test_its_vectors_and_regions_are_what_its_file_holds():
    index = Index(OLD / "pictures")
    raw = load_file(OLD / "pictures/images/images-00000.safetensors")
    manifest = json.loads((OLD / "pictures/manifest.json").read_text())
    assert index.numbers("images") == {"a.jpg": 0, "b.jpg": 1, "d.jpg": 3, "e.jpg": 4}
    for number in index.numbers("images").values():
        stored = index.vectors("images", number)
        assert torch.equal(stored.tokens, raw["tokens"][number] * torch.tensor(manifest["scale"]))
        assert stored.regions.tolist() == raw["assignments"][number].tolist()  # of all tokens, none is without
        assert len(stored.regions) == TOKENS
    ((ids, regions, grids),) = index.assignments("images")
    assert ids == ["a.jpg", "b.jpg", "d.jpg", "e.jpg"]
    assert torch.equal(regions, raw["assignments"][[0, 1, 3, 4]])
    assert grids.tolist() == [[0, 0]] * 4
    assert Index(OLD / "none").vectors("images", 0).regions.tolist() == list(range(TOKENS))
    assert index.size("images")[3] == 8 * 64 + 8  # no scales


def test_it_grows_shrinks_and_is_compacted(built_in, asked, copy):
    folder = copy("pictures")
    before = Index(folder).search(asked, "images", 10)
    summary, changes = update_images(folder, album("a.jpg", "c.jpg", "f.jpg"), built_in, MERGE)
    assert summary.images == 6
    assert changes == Changes(new=2, gone=3, unchanged=1, unknown=1, dead=1 / 7)  # who knows what a.jpg held
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format_version"] == 4
    shards = manifest["splits"]["images"]["images"]
    assert [(shard["version"], "scale" in shard) for shard in shards] == [(3, True), (4, False)]
    index = Index(folder)
    old = {"a.jpg", "b.jpg", "d.jpg", "e.jpg"}
    for row, was in zip(index.search(asked, "images", 10), before):  # beside new ones the old are what they were
        same_answers([[pair for pair in row if pair[0] in old]], [was])
    assert index.vectors("images", index.numbers("images")["f.jpg"]).grid == GRID
    assert delete_images(folder, "images", ["b.jpg"]) == 5
    found = Index(folder).search(asked, "images", 10)
    rows = stored(folder)
    compact_images(folder, "images")
    assert Index(folder).search(asked, "images", 10) == found
    assert stored(folder) == rows
    assert verify(folder).damages == []
    ((shard,),) = [split.images for split in Index(folder).manifest.splits.values()]
    assert (shard.version, shard.scale) == (4, None)
    assert load_file(folder / "images" / shard.file)["scales"].shape == (5,)
    known = Index(folder).contents("images")
    assert {name for name, content in known.items() if content} == {"c.jpg", "f.jpg"}
    update_images(folder, album("b.jpg"), built_in, MERGE)
    assert set(Index(folder).numbers("images")) == old | {"c.jpg", "f.jpg"}


def stored(folder):
    """Id -> what an index holds of it."""
    index, rows = Index(folder), {}
    for name, number in index.numbers("images").items():
        each = index.vectors("images", number)
        rows[name] = each.tokens.tolist(), each.mask.tolist(), each.regions.tolist(), each.grid
    return rows


def test_one_that_keeps_all_tokens_is_compacted_with_their_numbers(built_in, copy):
    folder = copy("none")
    kept = MergeConfig(num_regions=8, compressor="none")
    update_images(folder, album("b.jpg"), built_in, kept, dtype="bfloat16", assignments=False)
    rows = stored(folder)
    compact_images(folder, "images")
    assert stored(folder) == rows
    assert [(len(regions), grid) for *_, regions, grid in rows.values()] == [(TOKENS, None), (256, GRID)]


def test_other_weights_are_refused_once_they_are_known(built_in, copy):
    """Format 3 knows only the untouched projection; what is added afterwards tells the rest."""
    folder = copy("pictures")
    named = type("Named", (type(built_in),), {"identity": property(lambda self: self.told)})
    encoder = object.__new__(named)
    encoder.__dict__ |= vars(built_in)
    encoder.told = replace(built_in.identity, weights="a" * 64)
    update_images(folder, album("f.jpg"), encoder, MERGE)
    encoder.told = replace(encoder.told, weights="b" * 64)
    with pytest.raises(InputError, match=r"model\.weights='aaa.*, now 'bbb"):
        update_images(folder, album("c.jpg"), encoder, MERGE)


def test_a_data_set_that_is_built_again_keeps_its_shards(built_in, copy, tmp_path):
    """Its shards are as good as new ones, so nothing is encoded; the manifest becomes one of today's."""
    folder = copy("binary")
    data = tmp_path / "data"
    write_world(data, {"test": 4}, seed=7, workers=1)
    for path in (data / "annotations/Sentences").iterdir():
        path.write_text("red\na dog\nsnow\ntwo cars\nblue\n")
    before = {path.name: path.read_bytes() for path in (folder / "test").iterdir()}
    (summary,) = build_index(folder, data, ["test"], built_in, MERGE, dtype="binary")
    assert summary.reused_shards == 2
    assert {path.name: path.read_bytes() for path in (folder / "test").iterdir()} == before
    assert json.loads((folder / "manifest.json").read_text())["format_version"] == 4
    np.testing.assert_allclose(Index(folder).scores("test")[0], EXPECTED["scores"], atol=2e-5)
    with pytest.raises(InputError, match=r"merge=.*'num_regions': 8.*'num_regions': 4"):
        build_index(folder, data, ["test"], built_in, MergeConfig(num_regions=4), dtype="binary")


@pytest.mark.parametrize("scale", ["0.01", None, -1.0, 0, 0.0, float("nan"), float("inf"), [1], 0.5])
def test_a_scale_that_can_not_be_is_refused(copy, asked, scale):
    folder = copy("pictures")
    index = Index(folder)
    assert load_header(folder / "images/images-00000.safetensors")["stamp"]["scale"] != scale
    (shard,) = index.manifest.splits["images"].images
    split = replace(index.manifest.splits["images"], images=(replace(shard, scale=scale),))
    write_index_manifest(folder / "manifest.json", replace(index.manifest, splits={"images": split}))
    with pytest.raises(InputError, match=r"manifest\.json|another scale"):
        Index(folder).search(asked, "images", 3)
