"""The index on disk: what a shard holds, that its bytes depend on the input only, and what is refused."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict

import pytest
import torch
import transformers
from oracle import naive_merge
from torch.nn.functional import pad

from samer.config import InputError, MergeConfig
from samer.data import flickr, pictures
from samer.index import write as index_write
from samer.index.manifest import describe
from samer.index.read import Index
from samer.index.write import build_index
from samer.merging import merge_tokens
from samer.retrievers import hf as retrievers_hf
from samer.retrievers.base import Projector
from samer.retrievers.hf import Retriever

MERGE = MergeConfig(num_regions=8)
TOKENS = 64 + 6  # patches and prompt of the `base` fixture
DIM = 16
READERS = {
    "images": lambda cache, split: list(cache.images(split)),
    "queries": lambda cache, split: list(cache.queries(split)),
    "scores": lambda cache, split: cache.scores(split),
}


@pytest.fixture(scope="module")
def frozen(base):
    """The small ColPali with its own projection; no test of this file changes it."""
    return Retriever.load(str(base), dtype=torch.float32)


@pytest.fixture(scope="module")
def made(world, frozen, tmp_path_factory):
    """A finished float32 cache of val and test; read only."""
    folder = tmp_path_factory.mktemp("made") / "cache"
    build_index(folder, world, ["val", "test"], frozen, MERGE, batch_size=3, dtype="float32")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of `made` to damage."""
    return shutil.copytree(made, tmp_path / "copy")


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 3 images and 15 queries: the 8 test images make 3 + 3 shards."""
    monkeypatch.setattr(index_write, "IMAGES_PER_SHARD", 3)
    monkeypatch.setattr(index_write, "QUERIES_PER_SHARD", 15)


def build(folder, world, retriever, splits=("test",), merge=MERGE, batch_size=3, dtype="float32", **rest):
    return build_index(folder, world, splits, retriever, merge, batch_size=batch_size, dtype=dtype, **rest)


def contents(folder):
    """Every file below a folder, hidden ones too: relative name -> bytes; all but what is remembered of times."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "stamps.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def times(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "stamps.json")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def image_ids(world, split):
    return (world / "annotations" / f"{split}.txt").read_text().split()


def captions(world, split):
    """Captions without their markup, read from the files by a regular expression."""
    lines = [
        line
        for image_id in image_ids(world, split)
        for line in (world / "annotations" / "Sentences" / f"{image_id}.txt").read_text().splitlines()
    ]
    return [" ".join(re.sub(r"\[/EN#\S+ ([^\]]*)\]", r"\1", line).split()) for line in lines]


def pixels(world, image_id):
    return pictures.load_image(world / "images" / "Images" / f"{image_id}.jpg", (64, 64))  # what the model needs


def stored_images(folder, split="test"):
    parts = list(Index(folder).images(split))
    return (
        [i for ids, _, _ in parts for i in ids],
        torch.cat([t for _, t, _ in parts]),
        torch.cat([m for *_, m in parts]),
    )


# --- what it holds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "center_init"),
    [("float32", "raster"), ("bfloat16", "raster"), ("float16", "raster"), ("float32", "farthest")],
)
def test_images_hold_the_merged_tokens(world, frozen, tmp_path, dtype, center_init):
    merge = MergeConfig(num_regions=8, center_init=center_init)
    (summary,) = build(tmp_path / "c", world, frozen, merge=merge, dtype=dtype)
    ids, tokens, mask = stored_images(tmp_path / "c")
    assert ids == image_ids(world, "test")
    assert (tokens.shape, tokens.dtype) == ((8, 8, DIM), getattr(torch, dtype))
    assert mask.dtype == torch.bool
    assert mask.all()
    for start in range(0, 8, 3):
        visual = frozen.encode_images(frozen.image_inputs([pixels(world, i) for i in ids[start : start + 3]]))
        expected = merge_tokens(visual.tokens, visual.coords, merge).tokens
        assert expected.dtype == torch.float32
        assert torch.equal(tokens[start : start + 3], expected.to(tokens.dtype))
        for row, single in enumerate(visual.tokens):
            theirs = naive_merge(single, visual.coords[row], merge)[0]
            tolerance = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}[dtype]
            torch.testing.assert_close(tokens[start + row].float(), theirs, atol=tolerance, rtol=0)
    size = 8 * DIM * tokens.element_size() + 8
    assert (summary.images, summary.queries, summary.regions, summary.bytes_per_image) == (8, 40, 8, size)
    assert Index(tmp_path / "c").size("test") == (8, 40, 8, size)
    assert describe(summary, "X") == (
        f"test: 8 images x at most 8 vectors ({size} bytes per image), 40 queries -> {os.path.join('X', 'test')}"
    )


@pytest.mark.parametrize("regions", [TOKENS, TOKENS + 1, 4096])
def test_a_budget_of_all_tokens_keeps_them(world, frozen, tmp_path, regions):
    (summary,) = build(tmp_path / "c", world, frozen, merge=MergeConfig(num_regions=regions), limit_images=2)
    ids, tokens, mask = stored_images(tmp_path / "c")
    visual = frozen.encode_images(frozen.image_inputs([pixels(world, i) for i in ids]))
    assert visual.tokens.shape == (2, TOKENS, DIM)
    assert torch.equal(tokens, visual.tokens)
    assert mask.all()
    assert (summary.regions, summary.bytes_per_image) == (TOKENS, TOKENS * DIM * 4 + TOKENS)


def test_limit_keeps_the_first_images_and_their_captions(world, frozen, tmp_path):
    build(tmp_path / "c", world, frozen, limit_images=2)
    assert stored_images(tmp_path / "c")[0] == image_ids(world, "test")[:2]
    ((_, image, texts),) = Index(tmp_path / "c").queries("test")
    assert image.tolist() == [0] * 5 + [1] * 5
    assert texts == captions(world, "test")[:10]


def test_queries_hold_valid_tokens_only(world, frozen, made):
    ((queries, image, texts),) = Index(made).queries("test")
    assert texts == captions(world, "test")
    assert image.tolist() == [number for number in range(8) for _ in range(5)]
    assert len(set(queries.mask.sum(1).tolist())) > 1  # captions differ in length, so there was padding to leave out
    for row, text in enumerate(texts):
        alone = frozen.query_inputs([text])
        assert alone["attention_mask"].all()  # one text has no padding
        expected = frozen.encode_queries(alone).tokens[0]
        count = len(expected)
        assert queries.mask[row].tolist() == [True] * count + [False] * (queries.mask.shape[1] - count)
        torch.testing.assert_close(queries.tokens[row, :count], expected, atol=1e-5, rtol=0)
        assert (queries.tokens[row, count:] == 0).all()


@pytest.mark.parametrize("block", [1, 7, 40])
def test_query_blocks_are_padded_to_their_longest(made, block):
    ((whole, image, texts),) = Index(made).queries("test")
    start = 0
    for part, part_image, part_texts in Index(made).queries("test", block=block):
        rows = slice(start, start + block)
        assert part.mask.shape == part.tokens.shape[:2]
        assert part.mask.shape[1] == int(whole.mask[rows].sum(1).max())
        wider = (0, whole.mask.shape[1] - part.mask.shape[1])
        assert torch.equal(pad(part.mask, wider), whole.mask[rows])
        assert torch.equal(pad(part.tokens, (0, 0, *wider)), whole.tokens[rows])
        assert part_image.tolist() == image[rows].tolist()
        assert part_texts == texts[rows]
        start += len(part_texts)
    assert start == 40


def test_shards_join_to_the_whole(world, frozen, tmp_path, small_shards, made):
    build(tmp_path / "c", world, frozen)
    assert sorted(contents(tmp_path / "c" / "test")) == [
        *(f"images-0000{k}.safetensors" for k in range(3)),
        *(f"queries-0000{k}.safetensors" for k in range(3)),
    ]
    ids, tokens, mask = stored_images(tmp_path / "c")
    whole_ids, whole_tokens, whole_mask = stored_images(made)
    assert ids == whole_ids
    assert torch.equal(tokens, whole_tokens)
    assert torch.equal(mask, whole_mask)
    scores, image = Index(tmp_path / "c").scores("test")
    whole_scores, whole_image = Index(made).scores("test")
    torch.testing.assert_close(scores, whole_scores, atol=1e-6, rtol=0)
    assert torch.equal(image, whole_image)


def test_the_manifest_says_what_it_is_made_of_and_nothing_else(made, frozen, base, world):
    manifest = json.loads((made / "manifest.json").read_text())
    checksum = manifest.pop("checksum")
    assert checksum == hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    splits = manifest.pop("splits")
    assert manifest == {
        "format": "samer_cache",
        "format_version": 4,
        "model": asdict(frozen.identity),
        "hidden_states": {"computed_in": "float32", "stored_in": "nothing"},
        "projector": frozen.base_projector.hash,
        "merge": {
            "num_regions": 8,
            "cluster_iters": 3,
            "spatial_weight": 0.1,
            "assignment_temperature": 0.07,
            "object_penalty": 1.0,
            "center_init": "raster",
            "compressor": "samer",
        },
        "dtype": "float32",
        "embedding_dim": DIM,
        "assignments": False,
        "base_model": str(base),  # as the user named it: a hub id, or here a folder
        "revision": "main",
        "transformers": transformers.__version__,
        "processing": {
            "backend": "pil",
            "picture_size": "height 64, width 64",
            "padding_side": "left",
            "visual_prompt_prefix": "Describe the image.",
            "query_prefix": "Question: ",
        },
    }
    assert list(splits) == ["val", "test"]
    for split, count in (("val", 6), ("test", 8)):
        names = [f"{kind}-00000.safetensors" for kind in ("images", "queries")]
        hashes = [hashlib.sha256((made / split / name).read_bytes()).hexdigest() for name in names]
        size = count * (8 * DIM * 4 + 8)
        assert splits[split] == {
            "images": [
                {"file": names[0], "count": count, "regions": 8, "bytes": size, "sha256": hashes[0], "version": 4}
            ],
            "queries": [{"file": names[1], "count": 5 * count, "sha256": hashes[1]}],
        }
    for name, data in contents(made).items():
        for path in (world, made, base) if name != "manifest.json" else (world, made):
            assert os.fsencode(path) not in data, f"{name} names {path}"


def test_a_shard_header_holds_one_key(made):
    """safetensors writes several metadata keys in an order that differs from run to run."""
    for name, data in contents(made).items():
        if name.endswith(".safetensors"):
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            expected = [] if name == "projector.safetensors" else ["samer"]
            assert list(header.get("__metadata__", {})) == expected, name


# --- the same bytes every time --------------------------------------------------------------------------------------


def test_bytes_depend_neither_on_boxes_nor_on_place(world, frozen, made, tmp_path):
    bare = shutil.copytree(world, tmp_path / "elsewhere" / "world")
    assert any((bare / "annotations" / "Annotations").iterdir())
    shutil.rmtree(bare / "annotations" / "Annotations")
    build(tmp_path / "deep" / "down" / "c", bare, frozen, splits=("val", "test"))
    assert contents(tmp_path / "deep" / "down" / "c") == contents(made)


def test_a_fresh_model_gives_the_same_bytes(world, retriever, made, tmp_path):
    for name in ("a", "b"):  # both bytes of a coin toss, if there were one
        build(tmp_path / name, world, retriever, splits=("val", "test"))
        assert contents(tmp_path / name) == contents(made)


def test_building_again_keeps_every_shard(world, frozen, copy, monkeypatch):
    before, clock = contents(copy), times(copy / "test")
    monkeypatch.setattr(retrievers_hf, "load_image", None)  # no image is opened
    summaries = build(copy, world, frozen, splits=("val", "test"))
    assert [summary.reused_shards for summary in summaries] == [2, 2]
    assert contents(copy) == before
    assert times(copy / "test") == clock
    assert describe(summaries[1], copy).endswith(", 2 shards kept from an earlier try")


def test_adding_a_split_keeps_the_first(world, frozen, made, tmp_path):
    build(tmp_path / "c", world, frozen, splits=("val",))
    before, clock = contents(tmp_path / "c" / "val"), times(tmp_path / "c" / "val")
    build(tmp_path / "c", world, frozen, splits=("test",))
    assert contents(tmp_path / "c" / "val") == before
    assert times(tmp_path / "c" / "val") == clock
    assert contents(tmp_path / "c") == contents(made)  # which was built at once
    assert stored_images(tmp_path / "c", "val")[0] == image_ids(world, "val")


def stop_at(monkeypatch, owner, name, call, error=KeyboardInterrupt):
    """Raises at the given call of a function, once."""
    original, calls = getattr(owner, name), []

    def stopping(*words, **named):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*words, **named)

    monkeypatch.setattr(owner, name, stopping)


def stop_at_picture(monkeypatch, path):
    """Raises where a picture is read."""
    original = retrievers_hf.load_image

    def stopping(picture, *words, **named):
        if picture == path:
            raise KeyboardInterrupt
        return original(picture, *words, **named)

    monkeypatch.setattr(retrievers_hf, "load_image", stopping)


@pytest.mark.parametrize(
    ("owner", "name", "call", "finished"),
    [
        (retrievers_hf, "load_image", 1, 0),
        (retrievers_hf, "load_image", 5, 1),  # inside the second shard of images
        (retrievers_hf, "load_image", 7, 2),
        (Retriever, "encode_queries", 7, 4),  # inside the second shard of captions
        (os, "replace", 2, 1),  # written, not yet named
        (os, "replace", 7, 6),  # all shards there, neither the projector nor the manifest
        (os, "replace", 8, 7),  # all but the manifest
    ],
)
def test_an_interrupted_build_goes_on(world, frozen, tmp_path, small_shards, monkeypatch, owner, name, call, finished):
    build(tmp_path / "whole", world, frozen)
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        if name == "load_image":  # by several threads: not the call of that number, but the picture
            stop_at_picture(patch, flickr.load_split(world, "test", boxes=False)[call - 1].image_path)
        else:
            stop_at(patch, owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            build(broken, world, frozen)
    whole = contents(tmp_path / "whole")
    shards = [name for name in sorted(whole) if name.startswith("test/")]
    files = [*shards, "projector.safetensors", "manifest.json"]  # in the order of writing
    assert sorted(whole) == sorted(files)
    left = contents(broken)
    # neither a manifest nor a half-written file; a shard that was encoded meanwhile may follow one that failed
    assert set(files[:finished]) <= set(left) < set(files)
    assert len(left) <= finished + 1
    assert "manifest.json" not in left
    assert left.items() <= whole.items()
    shards = [name for name in shards if name in left]
    with pytest.raises(InputError, match=r"broken: no manifest.json; .*run it again if it was interrupted"):
        Index(broken)
    clock = {shard: (broken / shard).stat().st_mtime_ns for shard in shards}
    (summary,) = build(broken, world, frozen)
    assert summary.reused_shards == len(shards)
    assert {shard: (broken / shard).stat().st_mtime_ns for shard in shards} == clock
    assert contents(broken) == whole


def test_what_a_killed_process_leaves_is_no_obstacle(world, frozen, tmp_path, made):
    """SIGKILL leaves temporary files: they are neither read nor taken for a foreign folder's, and go."""
    build(tmp_path / "c", world, frozen, splits=("val", "test"))
    (tmp_path / "c" / "manifest.json").rename(tmp_path / "c" / ".manifest.json.abc.samer-tmp")
    (tmp_path / "c" / "test" / ".images-00000.safetensors.abc.samer-tmp").write_bytes(b"half")
    build(tmp_path / "c", world, frozen, splits=("val", "test"))
    assert contents(made) == contents(tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    [{"merge": MergeConfig(num_regions=4)}, {"dtype": "bfloat16"}, {"limit_images": 4}, {"splits": ["val"]}],
)
def test_shards_of_other_settings_are_not_reused(world, frozen, tmp_path, change):
    build(tmp_path / "other", world, frozen, **change)
    shutil.copytree(tmp_path / "other" / change.get("splits", ["test"])[0], tmp_path / "c" / "test")
    (summary,) = build(tmp_path / "c", world, frozen)
    build(tmp_path / "clean", world, frozen)
    assert summary.reused_shards == 0
    assert contents(tmp_path / "c") == contents(tmp_path / "clean")


def test_changed_captions_and_images_are_noticed(world, frozen, tmp_path):
    """A shard's stamp holds ids and texts, so an edited caption is encoded anew and its images are kept."""
    edited = shutil.copytree(world, tmp_path / "world")
    build(tmp_path / "c", edited, frozen)
    sentence = edited / "annotations" / "Sentences" / f"{image_ids(world, 'test')[0]}.txt"
    sentence.write_text("A brand new caption .\n" + sentence.read_text().split("\n", 1)[1])
    (summary,) = build(tmp_path / "c", edited, frozen)
    assert summary.reused_shards == 1
    assert next(iter(Index(tmp_path / "c").queries("test")))[2][0] == "A brand new caption ."


# --- what it refuses ------------------------------------------------------------------------------------------------


def other_projector(retriever):
    layer = retriever.base_projector
    return Projector(layer.weight + 0.01, layer.bias)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("projector", ["projector="]),
        ({"merge": MergeConfig(num_regions=4)}, ["merge=", "'num_regions': 8", "'num_regions': 4"]),
        ({"merge": MergeConfig(num_regions=8, center_init="farthest")}, ["merge=", "'raster'", "'farthest'"]),
        ({"dtype": "bfloat16"}, ["dtype='float32'", "'bfloat16'"]),
    ],
)
def test_a_cache_of_another_making_is_refused_and_left_alone(world, retriever, copy, change, words):
    before, clock = contents(copy), times(copy)
    if change == "projector":
        old, new = retriever.current_projector(), other_projector(retriever)
        retriever.use_projector(new)
        change, words = {}, [*words, old.hash, new.hash]
    with pytest.raises(InputError) as caught:
        build(copy, world, retriever, splits=("val", "train"), **change)
    message = str(caught.value)
    assert all(word in message for word in [*words, str(copy), "name another index folder"]), message
    assert "\n" not in message
    assert contents(copy) == before
    assert times(copy) == clock


@pytest.mark.parametrize("folder", ["full", "full/notes.txt"])
def test_a_folder_of_something_else_is_refused_and_left_alone(world, frozen, tmp_path, folder):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no SaMer index; name another folder"):
        build(tmp_path / folder, world, frozen)
    assert contents(tmp_path) == {"full/notes.txt": b"mine"}


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES = {
    "last byte": lambda data: flip(data, len(data) - 1),
    "middle byte": lambda data: flip(data, len(data) // 2),
    "header byte": lambda data: flip(data, 20),
    "cut in half": lambda data: data[: len(data) // 2],
    "cut to 5 bytes": lambda data: data[:5],
    "empty": lambda data: b"",
    "gone": None,
}


def damage(path, how):
    if DAMAGES[how] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGES[how](path.read_bytes()))


@pytest.mark.parametrize("kind", ["images", "queries"])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_shard_is_named_and_can_be_made_anew(world, frozen, made, copy, kind, how):
    shard = copy / "test" / f"{kind}-00000.safetensors"
    damage(shard, how)
    for reader in (kind, "scores"):
        with pytest.raises(InputError) as caught:
            READERS[reader](Index(copy), "test")
        assert str(shard) in str(caught.value)
        assert re.search("(remove it and|restore it, or) (build the index|run what made it) again", str(caught.value))
        assert "\n" not in str(caught.value)
    for split, other in (("val", kind), ("test", {"images": "queries", "queries": "images"}[kind])):
        READERS[other](Index(copy), split)  # the rest can still be read
    _, summary = build(copy, world, frozen, splits=("val", "test"))
    assert summary.reused_shards == 1  # the damaged one is not taken for finished, whether or not it was removed first
    assert contents(copy) == contents(made)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_shard_of_an_unfinished_cache_is_made_anew(world, frozen, made, copy, how):
    (copy / "manifest.json").unlink()
    damage(copy / "test" / "images-00000.safetensors", how)
    build(copy, world, frozen, splits=("val", "test"))
    assert contents(copy) == contents(made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 1}, "format 'samer_cache' version 1; this SaMer reads samer_cache 3 and 4"),
        ({"format_version": 5}, "format 'samer_cache' version 5; this SaMer reads samer_cache 3 and 4"),
        ({"format_version": True}, "format 'samer_cache' version True; this SaMer reads samer_cache 3 and 4"),
        ({"format": "other"}, "format 'other' version 4"),
    ],
)
def test_another_format_is_refused(world, frozen, copy, change, words):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, **change}))
    before = contents(copy)
    with pytest.raises(InputError, match=words):
        Index(copy)
    with pytest.raises(InputError, match="format"):
        build(copy, world, frozen)
    assert contents(copy) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "samer_cache"'])
def test_a_damaged_manifest_is_named(world, frozen, copy, text):
    (copy / "manifest.json").write_text(text)
    for attempt in (lambda: Index(copy), lambda: build(copy, world, frozen)):
        with pytest.raises(InputError, match=r"manifest\.json: .*damaged"):
            attempt()


@pytest.mark.parametrize("folder", ["absent", "val"])
def test_a_folder_without_a_manifest_is_no_cache(copy, folder):
    with pytest.raises(InputError, match=rf"{folder}: no manifest.json; this is no finished index. Build it with"):
        Index(copy / folder)


@pytest.mark.parametrize("read", [*READERS.values(), lambda cache, split: cache.size(split)])
def test_an_unknown_split_lists_what_is_held(made, read):
    with pytest.raises(InputError, match="no split 'train' in this index; it holds: test, val"):
        read(Index(made), "train")
