"""What an index is made by: the typed manifest, settings that matter and that don't, the model, grids of its images.

The encoder draws hidden states from a picture's pixels; its images have grids of their own and prompt tokens in front.
"""

import hashlib
import json
import zlib
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from samer.compressors import COMPRESSORS, make_compressor, settings_used
from samer.config import InputError, MergeConfig
from samer.coords import grid_layout
from samer.data.pictures import Found
from samer.index import pictures as index_pictures
from samer.index.manifest import manifest_from_json, read_index_manifest, to_json, write_index_manifest
from samer.index.pictures import compact_images, delete_images
from samer.index.read import Index
from samer.index.sync import update_images
from samer.retrievers.base import Encoder, Projector
from samer.retrievers.identity import ModelIdentity
from samer.runtime.shards import load_shard, write_manifest, write_shard
from samer.tokens import QueryTokens, VisualTokens

DIM, PROMPT = 16, 3
MERGE = MergeConfig(num_regions=5)
GRIDS = {"a.png": (3, 5), "b.png": (4, 2), "c.png": (1, 7), "d.png": (6, 6), "e.png": (2, 2)}
NAMES = list(GRIDS)


class Tall(Encoder):
    """Every picture's grid is its size in points; 3 prompt tokens stand before the patches, padding before those."""

    def __init__(self, identity=None):
        super().__init__("tall", Projector(torch.eye(DIM), torch.zeros(DIM)))
        self.told = identity

    @property
    def identity(self):
        return self.told or super().identity

    def image_inputs(self, images):
        grid = torch.tensor([[image.height, image.width] for image in images])
        counts = grid.prod(1) + PROMPT
        longest = int(counts.max())
        hidden = torch.full((len(images), longest, DIM), float("nan"))
        for row, image in enumerate(images):
            generator = torch.Generator().manual_seed(zlib.crc32(image.tobytes()))
            hidden[row, longest - counts[row] :] = torch.randn(int(counts[row]), DIM, generator=generator)
        mask = torch.arange(longest) >= longest - counts[:, None]
        return {"hidden": hidden.nan_to_num(), "attention_mask": mask.long(), "grid": grid}

    def hidden_states(self, inputs):
        return inputs["hidden"]

    def image_layout(self, inputs):
        first = inputs["attention_mask"].cumsum(1) <= PROMPT
        return grid_layout(inputs["attention_mask"].bool() & ~first, inputs["grid"])


def paint(folder, name, size, seed=0):
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng([seed, *size]).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)


@pytest.fixture
def root(tmp_path):
    for name, size in GRIDS.items():
        paint(tmp_path / "root", name, size)
    return tmp_path / "root"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(index_pictures, "PICTURES_PER_SHARD", 2)


def add(folder, root, names=NAMES, encoder=None, merge=MERGE, assignments=False, **rest):
    found = Found(root, list(names), [])
    return update_images(folder, found, encoder or Tall(), merge, batch_size=2, assignments=assignments, **rest)


def ask(count=4):
    generator = torch.Generator().manual_seed(0)
    return QueryTokens(
        normalize(torch.randn(count, 3, DIM, generator=generator), dim=-1), torch.ones(count, 3, dtype=torch.bool)
    )


def alone(root, name, merge):
    """What the encoder and the compressor make of one picture by itself: tokens, and the region of each patch."""
    visual = Tall().encode_images(Tall().image_inputs([Image.open(root / name)]))
    merged = make_compressor(merge)(replace(visual, seeds=torch.zeros(1, dtype=torch.long)))
    return merged.tokens[0][merged.mask[0]], merged.assignments[0, PROMPT:].tolist()


# --- grids and regions per image ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", ["samer", "none", "kmeans"])
def test_every_image_has_its_grid_and_the_vector_of_each_patch(root, tmp_path, small_shards, compressor):
    merge = MergeConfig(num_regions=5, compressor=compressor)
    add(tmp_path / "c", root, merge=merge, dtype="float32", assignments=compressor != "none")

    def check(names):
        index = Index(tmp_path / "c")
        assert list(index.numbers("images")) == names
        for name, number in index.numbers("images").items():
            stored, (tokens, regions) = index.vectors("images", number), alone(root, name, merge)
            assert stored.grid == GRIDS[name]
            assert stored.regions.tolist() == regions
            torch.testing.assert_close(stored.tokens[stored.mask], tokens, atol=1e-5, rtol=0)
        told = {}
        for ids, rows, grids in index.assignments("images"):
            none = -1 if compressor == "none" else 255
            assert rows.dtype == (torch.int32 if compressor == "none" else torch.uint8)
            for name, row, grid in zip(ids, rows.tolist(), grids.tolist()):
                cells = grid[0] * grid[1]
                assert set(row[cells:]) <= {none}
                told[name] = row[:cells]
        assert told == {name: alone(root, name, merge)[1] for name in names}

    check(NAMES)
    if compressor == "none":  # the patches' vectors are not the first ones: prompt tokens are, or padding
        assert min(Index(tmp_path / "c").vectors("images", 0).regions) == PROMPT
    delete_images(tmp_path / "c", "images", ["d.png"])
    compact_images(tmp_path / "c", "images")
    check([name for name in NAMES if name != "d.png"])


def test_an_index_without_assignments_has_grids_and_no_regions(root, tmp_path):
    add(tmp_path / "c", root)
    index = Index(tmp_path / "c")
    assert not index.manifest.has_regions
    for name, number in index.numbers("images").items():
        stored = index.vectors("images", number)
        assert (stored.grid, stored.regions) == (GRIDS[name], None)


# --- a scale per image ----------------------------------------------------------------------------------------------


def crowd(tmp_path, count=60):
    names = [f"{k:03}.png" for k in range(count)]
    for k, name in enumerate(names):
        paint(tmp_path / "crowd", name, (4, 4), seed=k)
    return names


class Blank(Tall):
    """A picture of one colour has vectors all alike, whose components are as small as unit vectors' can be."""

    def image_inputs(self, images):
        inputs = super().image_inputs(images)
        for row, image in enumerate(images):
            if len(set(image.tobytes())) == 1:
                inputs["hidden"][row] = 1.0
        return inputs


def overlap(left, right):
    return np.mean([len({n for n, _ in a} & {n for n, _ in b}) / len(a) for a, b in zip(left, right)])


def test_what_comes_first_does_not_decide_how_the_others_are_stored(tmp_path, small_shards):
    names = crowd(tmp_path)
    Image.new("RGB", (4, 4), "black").save(tmp_path / "crowd" / "blank.png")
    for folder, first in (("with", ["blank.png"]), ("without", [])):
        for some in (first, names):
            if some:
                add(tmp_path / folder, tmp_path / "crowd", some, Blank(), dtype="int8")
    add(tmp_path / "exact", tmp_path / "crowd", names, Blank(), dtype="float32")
    found = {}
    for folder in ("with", "without", "exact"):
        rows = Index(tmp_path / folder).search(ask(40), "images", 11)
        found[folder] = [[pair for pair in row if pair[0] != "blank.png"][:10] for row in rows]
    assert found["with"] == found["without"]
    assert overlap(found["with"], found["exact"]) == overlap(found["without"], found["exact"]) > 0.97
    index = Index(tmp_path / "with")
    for name, number in index.numbers("images").items():
        if name != "blank.png":
            exact = alone(tmp_path / "crowd", name, MERGE)[0]
            step = exact.abs().max() / 127
            assert (index.vectors("images", number).tokens - exact).abs().max() <= step / 2 + 1e-6


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(root, tmp_path, value):
    add(tmp_path / "c", root)
    rewrite(tmp_path / "c", lambda tensors, stamp: tensors["scales"].__setitem__(2, value))
    with pytest.raises(InputError, match=r"images-00000\.safetensors: not readable .its grids or scales can't be"):
        Index(tmp_path / "c").search(ask(), "images", 3)


@pytest.mark.parametrize("grid", [[-3, -5], [0, 5], [2**31 - 1, 2**31 - 1], [40, 40]])
def test_a_grid_that_can_not_be_is_refused(root, tmp_path, grid):
    add(tmp_path / "c", root, assignments=True)
    rewrite(tmp_path / "c", lambda tensors, stamp: tensors["grids"].__setitem__(1, torch.tensor(grid).int()))
    with pytest.raises(InputError, match=r"images-00000\.safetensors: not readable .its grids or scales can't be"):
        Index(tmp_path / "c").vectors("images", 0)


def rewrite(folder, change):
    """Changes what every shard of images holds or says of itself, with checksums that hold."""
    index = Index(folder)
    split = index.manifest.splits["images"]
    shards = []
    for shard in split.images:
        tensors, header = load_shard(folder / "images" / shard.file)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors, header["stamp"])
        entry = write_shard(folder / "images" / shard.file, tensors, header["stamp"], header["entry"])
        shards.append(replace(shard, sha256=entry["sha256"]))
    splits = {"images": replace(split, images=tuple(shards))}
    write_index_manifest(folder / "manifest.json", replace(index.manifest, splits=splits))


# --- stamps of files ------------------------------------------------------------------------------------------------


def hash_of(file):
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def test_the_contents_of_files_are_kept(root, tmp_path, small_shards):
    add(tmp_path / "c", root, NAMES[:3])
    before = {name: hash_of(root / name) for name in NAMES}
    assert Index(tmp_path / "c").contents("images") == {name: before[name] for name in NAMES[:3]}
    paint(root, NAMES[0], (2, 2))
    changes = add(tmp_path / "c", root)[1]
    assert (changes.changed, changes.new, changes.unchanged) == (1, 2, 2)
    delete_images(tmp_path / "c", "images", [NAMES[1]])
    expected = {name: hash_of(root / name) for name in NAMES if name != NAMES[1]}
    assert expected[NAMES[0]] != before[NAMES[0]]
    assert Index(tmp_path / "c").contents("images") == expected
    compact_images(tmp_path / "c", "images")
    assert Index(tmp_path / "c").contents("images") == expected


BAD_STAMPS = [[[1, 2]], "many", [[1]] * 5, [["1", 2]] * 5, [[1, True]] * 5, [{}] * 5]
BAD_CONTENTS = [["0" * 32], "0" * 32, ["0" * 31] * 5, ["0" * 33] * 5, ["F" * 32] * 5, [[0]] * 5, [0] * 5, {}, None]


@pytest.mark.parametrize(
    "told", [*({"files": value} for value in BAD_STAMPS), *({"contents": value} for value in BAD_CONTENTS)]
)
def test_stamps_that_can_not_be_are_refused(root, tmp_path, told):
    add(tmp_path / "c", root)
    rewrite(tmp_path / "c", lambda tensors, stamp: stamp.update(told))
    with pytest.raises(InputError, match=r"images-00000\.safetensors: not readable"):
        Index(tmp_path / "c").contents("images")


# --- the model ------------------------------------------------------------------------------------------------------

KNOWN = ModelIdentity("ColPaliForRetrieval", "w" * 64, "p" * 64, Tall().base_projector.hash)


@pytest.mark.parametrize("part", [each.name for each in fields(ModelIdentity)])
def test_another_model_under_the_same_projection_is_refused(root, tmp_path, part):
    """A language model replaced by noise has other weights; what is not known of one of them is not held against it."""
    add(tmp_path / "c", root, NAMES[:3], Tall(KNOWN))
    index, other = Index(tmp_path / "c"), Tall(replace(KNOWN, **{part: "0" * 64}))
    assert index.manifest.model == KNOWN
    with pytest.raises(InputError, match=f"tall is not the model that .*c was made with: its {part} differs"):
        index.check_model(other)
    with pytest.raises(InputError, match=rf"model\.{part}='.*', now '000.*name another index folder"):
        add(tmp_path / "c", root, encoder=other)
    assert list(Index(tmp_path / "c").numbers("images")) == NAMES[:3]
    unknown = Tall(replace(KNOWN, **{part: ""}))
    index.check_model(unknown)
    add(tmp_path / "c", root, encoder=unknown)
    assert Index(tmp_path / "c").manifest.model == KNOWN


def test_a_shard_of_another_model_is_refused(root, tmp_path):
    add(tmp_path / "c", root, encoder=Tall(KNOWN))
    rewrite(tmp_path / "c", lambda tensors, stamp: stamp["model"].update(weights="0" * 64))
    with pytest.raises(InputError, match=r"images-00000\.safetensors: not readable .made with another model\.weights"):
        Index(tmp_path / "c").search(ask(), "images", 3)


# --- settings -------------------------------------------------------------------------------------------------------


def visual_tokens():
    generator = torch.Generator().manual_seed(5)
    tokens = normalize(torch.randn(3, 64, DIM, generator=generator), dim=-1)
    coords = torch.stack(torch.meshgrid(torch.linspace(0, 1, 8), torch.linspace(0, 1, 8), indexing="ij"), -1)
    names = ("middle_mean", "middle_max", "last", "mean:1-2", "max:1-2")
    signals = {name: torch.rand(3, 64, generator=generator) for name in names}
    views = (torch.arange(64) > 50).expand(3, -1)
    places = coords.view(1, 64, 2).expand(3, -1, -1)
    return VisualTokens(tokens, places, seeds=torch.arange(3), attention=signals, views=views)


OTHER = {
    "num_regions": 4,
    "cluster_iters": 1,
    "spatial_weight": 7.0,
    "assignment_temperature": 1.0,
    "object_penalty": 3.0,
    "center_init": "farthest",
    "bank_size": 16,
    "sap_layers": "1-2",
    "global_view": "apart",
}
LATER = {"bank_size": 2048, "sap_layers": "", "global_view": "joined"}  # settings that earlier files lack


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_setting_matters_if_the_compressor_says_so(name):
    """Changed one at a time, a setting changes the vectors exactly where `settings_used` names it."""
    assert set(OTHER) == {each.name for each in fields(MergeConfig)} - {"compressor"}
    visual = visual_tokens()

    def made(settings):
        compressor = make_compressor(settings)
        compressor.fit([visual])
        compressor.fit_queries(visual.tokens.flatten(0, 1))
        return compressor(visual).tokens

    base = MergeConfig(num_regions=6, compressor=name)
    changes = {key: not torch.equal(made(base), made(replace(base, **{key: value}))) for key, value in OTHER.items()}
    assert {key for key, changed in changes.items() if changed} == set(COMPRESSORS[name].settings_used)
    assert settings_used(base) == {"compressor": name, **{key: getattr(base, key) for key in settings_used(base)}}


@pytest.mark.parametrize(
    ("compressor", "change", "matters"),
    [
        ("hpool", {"cluster_iters": 5, "center_init": "farthest"}, False),
        ("hpool", {"num_regions": 4}, True),
        ("none", {"num_regions": 4}, False),
        ("samer", {"object_penalty": 0.0}, False),
        ("samer", {"cluster_iters": 5}, True),
    ],
)
def test_settings_that_are_not_used_are_not_compared(root, tmp_path, compressor, change, matters):
    merge = MergeConfig(num_regions=5, compressor=compressor)
    add(tmp_path / "c", root, NAMES[:2], merge=merge)
    if matters:
        with pytest.raises(InputError, match="merge="):
            add(tmp_path / "c", root, merge=replace(merge, **change))
    else:
        assert add(tmp_path / "c", root, merge=replace(merge, **change))[0].images == len(NAMES)
        assert Index(tmp_path / "c").manifest.merge == merge  # as it was made first
        assert len(Index(tmp_path / "c").search(ask(), "images", 9)[0]) == len(NAMES)


@pytest.mark.parametrize("key", ["center_init", "object_penalty", "assignment_temperature"])
def test_an_index_from_before_a_setting_opens_and_grows(root, tmp_path, key):
    """As if the setting was added since: neither manifest nor shards know of it, and it did what its default does."""
    add(tmp_path / "c", root, NAMES[:2])
    before = Index(tmp_path / "c").search(ask(), "images", 9)
    rewrite(tmp_path / "c", lambda tensors, stamp: stamp["merge"].pop(key))
    older = to_json(Index(tmp_path / "c").manifest)
    del older["merge"][key]
    write_manifest(tmp_path / "c" / "manifest.json", older)
    assert Index(tmp_path / "c").search(ask(), "images", 9) == before
    assert add(tmp_path / "c", root)[0].images == len(NAMES)
    assert len(Index(tmp_path / "c").search(ask(), "images", 9)[0]) == len(NAMES)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ((), "unknown key shine"),
        (("merge",), r"unknown key merge\.shine"),
        (("model",), r"unknown key model\.shine"),
        (("splits", "images"), "unknown key splits 'images'.shine"),
        (("splits", "images", "images", 0), r"unknown key splits 'images'\.images 0\.shine"),
    ],
)
def test_a_key_of_a_newer_samer_is_refused_by_name(root, tmp_path, place, words):
    add(tmp_path / "c", root, NAMES[:2])
    newer = to_json(Index(tmp_path / "c").manifest)
    inner = newer
    for step in place:
        inner = inner[step]
    inner["shine"] = 1
    write_manifest(tmp_path / "c" / "manifest.json", newer)
    for attempt in (lambda: Index(tmp_path / "c"), lambda: add(tmp_path / "c", root)):
        with pytest.raises(InputError, match=words):
            attempt()


def test_a_manifest_comes_back_as_it_was_written(root, tmp_path):
    add(tmp_path / "c", root, dtype="binary", assignments=True)
    delete_images(tmp_path / "c", "images", NAMES[1:3])
    path = tmp_path / "c" / "manifest.json"
    manifest = read_index_manifest(path)
    assert manifest_from_json(json.loads(json.dumps(to_json(manifest))), path) == manifest
    assert manifest.splits["images"].deleted == {"images-00000.safetensors": (1, 2)}
    held = json.loads(path.read_text())
    assert {**held["merge"], **LATER} == asdict(MERGE)
    assert not held.keys() & {"bank", "bank_source"}  # files without a bank are as before there were banks
    assert not LATER.keys() & held["merge"].keys()
    rest = {
        key: value
        for key, value in json.loads(json.dumps(to_json(manifest))).items()
        if key not in ("revision", "transformers")
    }
    assert manifest_from_json(rest, path) == replace(manifest, transformers="")


@pytest.mark.parametrize("key", ["model", "projector", "merge", "dtype", "embedding_dim", "splits"])
@pytest.mark.parametrize("value", [None, 5, [], "x", True])
def test_a_manifest_that_is_no_manifest_is_refused(root, tmp_path, key, value):
    add(tmp_path / "c", root, NAMES[:1])
    spoilt = {**to_json(Index(tmp_path / "c").manifest), key: value}
    if value is None:
        del spoilt[key]
    write_manifest(tmp_path / "c" / "manifest.json", spoilt)
    if (key, value) == ("projector", "x"):  # it can be read; the projector beside it is not that one
        with pytest.raises(InputError, match="not the projector"):
            Index(tmp_path / "c").projector()
        return
    with pytest.raises(InputError, match=rf"manifest\.json: .*({key}|entry of images)"):
        Index(tmp_path / "c")


# --- mapped ---------------------------------------------------------------------------------------------------------


def test_a_shard_is_mapped_and_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    write_shard(path, {"big": torch.zeros(12_000_000), "odd": torch.ones(3, dtype=torch.bool)}, {}, {})
    tensors, _ = load_shard(path)
    lines = Path("/proc/self/smaps").read_text().splitlines()
    (start,) = [k for k, line in enumerate(lines) if str(path) in line]
    rows = dict(line.split(":", 1) for line in lines[start + 1 : start + 20] if ":" in line)
    assert int(rows["Size"].split()[0]) >= 46_000  # kB
    assert int(rows["Rss"].split()[0]) < 10_000
    assert tensors["odd"].tolist() == [True] * 3
