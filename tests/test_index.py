"""The index that grows: int8 and 1-bit storage, append, delete, interruptions, the lock, the projector.

It runs on an encoder whose hidden states are drawn from a picture's bytes. Run as a script, this file is a writer that
dies by SIGKILL.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ask, best_of, same_answers, unit
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig
from samer.coords import grid_layout
from samer.data.pictures import Found, load_image
from samer.data.records import ImageRecord
from samer.index import manifest as index_manifest
from samer.index import pictures as index_pictures
from samer.index import stages as index_stages
from samer.index import sync as index_sync
from samer.index import write as index_write
from samer.index.pictures import delete_images
from samer.index.read import Index
from samer.index.sync import Changes, update_images
from samer.index.write import build_index
from samer.retrievers.base import Encoder, Projector, image_seeds
from samer.runtime import files as runtime_files
from samer.runtime.shards import load_header
from samer.scoring import maxsim, pack_signs, score_stored, search
from samer.tokens import QueryTokens

MERGE = MergeConfig(num_regions=6)
DIM, GRID = 16, 4
NAMES = [*(f"p{k}.png" for k in range(10)), "sub/a.png", "sub/b.png"]
DTYPES = ["float32", "bfloat16", "float16", "int8", "binary"]


class Drawn(Encoder):
    """Hidden states drawn from a picture's or a text's bytes: the same content, the same tokens."""

    def __init__(self, shift=0.0):
        super().__init__(
            "drawn", Projector(torch.eye(DIM) + shift, torch.zeros(DIM)), grid=(GRID, GRID), image_token_id=1
        )

    def draw(self, contents, count):
        seeds = [torch.Generator().manual_seed(zlib.crc32(content)) for content in contents]
        hidden = torch.stack([torch.randn(count, DIM, generator=seed) for seed in seeds])
        ids = torch.ones(hidden.shape[:2], dtype=torch.long)
        return {"hidden": hidden, "input_ids": ids, "attention_mask": ids}

    def image_inputs(self, images):
        return self.draw([image.tobytes() for image in images], GRID * GRID)

    def record_inputs(self, records):
        return self.image_inputs([load_image(record.image_path) for record in records])

    def query_inputs(self, texts):
        inputs = self.draw([text.encode() for text in texts], 5)
        lengths = torch.tensor([1 + len(text) % 5 for text in texts])
        return {**inputs, "attention_mask": (torch.arange(5) < lengths[:, None]).long()}

    def hidden_states(self, inputs):
        return inputs["hidden"]


def paint(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return paint(tmp_path_factory.mktemp("pictures"), NAMES)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(index_write, "IMAGES_PER_SHARD", 4)
    monkeypatch.setattr(index_pictures, "PICTURES_PER_SHARD", 4)
    monkeypatch.setattr(index_write, "QUERIES_PER_SHARD", 15)


def add(folder, root, names=NAMES, dtype="int8", encoder=None, merge=MERGE, assignments=False, **rest):
    how = {"batch_size": 3, "dtype": dtype, "assignments": assignments, **rest}
    return update_images(folder, Found(Path(root), list(names), []), encoder or Drawn(), merge, **how)


def compressed(root, names):
    """What the encoder and the compressor make of pictures, (I, K, D) float32."""
    records = [ImageRecord(name, Path(root) / name, ()) for name in names]
    return make_compressor(MERGE)(Drawn().encode_images(Drawn().record_inputs(records))).tokens


def contents(folder):
    """Every file's bytes, but for what is remembered of times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "stamps.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def held(cache, split="images"):
    """Id -> tokens as the index stores them."""
    return {name: row for ids, tokens, _ in cache.images(split) for name, row in zip(ids, tokens)}


# --- what an index stores -------------------------------------------------------------------------------------------


def build(folder, world, dtype, splits=("test",), **rest):
    return build_index(folder, world, splits, Drawn(), MERGE, batch_size=3, dtype=dtype, **rest)


def test_int8_is_within_half_a_step_of_each_images_own_scale(world, tmp_path):
    build(tmp_path / "f", world, "float32")
    (summary,) = build(tmp_path / "c", world, "int8")
    index = Index(tmp_path / "c")
    exact, ours = held(Index(tmp_path / "f"), "test"), held(index, "test")
    assert list(ours) == list(exact)
    ours, exact = torch.stack(list(ours.values())), torch.stack(list(exact.values()))
    ((_, stored),) = index.stored("test")
    scales = exact.abs().amax((1, 2)) / 127
    torch.testing.assert_close(stored.scale, scales, rtol=1e-6, atol=0)
    assert ours.dtype == torch.int8
    assert ours.abs().amax((1, 2)).tolist() == [127] * 8  # nothing is clipped, and all of int8 is used
    assert ((ours * scales[:, None, None] - exact).abs() <= scales[:, None, None] / 2 + 1e-7).all()
    assert summary.bytes_per_image == index.size("test")[3] == 6 * DIM + 6 + 4
    assert next(iter(index.queries("test")))[0].tokens.dtype == torch.bfloat16


def test_binary_is_the_signs_and_bfloat16_beside_them(world, tmp_path, small_shards):
    build(tmp_path / "f", world, "float32")
    (summary,) = build(tmp_path / "c", world, "binary")
    exact, ours = held(Index(tmp_path / "f"), "test"), held(Index(tmp_path / "c"), "test")
    assert torch.equal(torch.stack(list(ours.values())), pack_signs(torch.stack(list(exact.values()))))
    side = [load_file(tmp_path / "c" / "test" / f"images-0000{k}.exact.safetensors")["tokens"] for k in range(2)]
    assert torch.equal(torch.cat(side), torch.stack(list(exact.values())).bfloat16())
    assert summary.bytes_per_image == 6 * DIM / 8 + 6


def test_what_is_stored_depends_neither_on_shards_nor_on_tries(world, tmp_path, monkeypatch):
    build(tmp_path / "one", world, "int8", splits=("val", "test"))
    monkeypatch.setattr(index_write, "IMAGES_PER_SHARD", 3)
    build(tmp_path / "many", world, "int8", splits=("val",))
    build(tmp_path / "many", world, "int8", splits=("test",))
    one, many = Index(tmp_path / "one"), Index(tmp_path / "many")
    assert [shard.count for shard in many.manifest.splits["test"].images] == [3, 3, 2]
    whole, parts = held(one, "test"), held(many, "test")
    assert list(whole) == list(parts)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    scales = [torch.cat([images.scale for _, images in index.stored("test")]) for index in (one, many)]
    assert torch.equal(*scales)


def stop_at(monkeypatch, owner, name, call):
    """KeyboardInterrupt at the given call of a function."""
    original, calls = getattr(owner, name), []

    def stopping(*words, **named):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*words, **named)

    monkeypatch.setattr(owner, name, stopping)


def stop_at_picture(monkeypatch, name):
    """KeyboardInterrupt where a picture is read; several threads read, so their calls have no numbers."""
    original = index_sync.read_picture

    def stopping(path, *words):
        if str(path).endswith(f"/{name}"):
            raise KeyboardInterrupt
        return original(path, *words)

    monkeypatch.setattr(index_sync, "read_picture", stopping)


@pytest.mark.parametrize(("dtype", "files"), [("int8", 2 + 3 + 2), ("binary", 4 + 3 + 2)])
def test_a_build_interrupted_at_any_file_gives_the_same_bytes(world, tmp_path, small_shards, dtype, files):
    build(tmp_path / "whole", world, dtype, assignments=True)
    whole = contents(tmp_path / "whole")
    assert len(whole) == files
    for call in range(1, files + 1):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, os, "replace", call)
            with pytest.raises(KeyboardInterrupt):
                build(tmp_path / str(call), world, dtype, assignments=True)
        left = contents(tmp_path / str(call))
        assert call - 1 <= len(left) <= call + 1  # the next shard, of one file or two, may follow the one that failed
        assert "manifest.json" not in left
        assert left.items() <= whole.items()
        build(tmp_path / str(call), world, dtype, assignments=True)
        assert contents(tmp_path / str(call)) == whole


def test_a_1_bit_shard_without_its_exact_file_is_made_anew(world, tmp_path, small_shards):
    build(tmp_path / "c", world, "binary")
    whole = contents(tmp_path / "c")
    shards = [tmp_path / "c" / "test" / f"images-0000{k}.exact.safetensors" for k in range(2)]
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1] + b"?")
    (summary,) = build(tmp_path / "c", world, "binary")
    assert summary.reused_shards == 3  # the queries
    assert contents(tmp_path / "c") == whole


def test_evaluation_of_1_bit_ranks_candidates_exactly_and_above_the_others(world, tmp_path, monkeypatch):
    for dtype in ("binary", "bfloat16"):
        build(tmp_path / dtype, world, dtype, splits=("train",))
    exact = Index(tmp_path / "bfloat16").scores("train")[0]
    queries = [queries for queries, *_ in Index(tmp_path / "binary").queries("train")]
    ((_, images),) = Index(tmp_path / "binary").stored("train")
    rough = torch.cat([score_stored(query, images) for query in queries])
    monkeypatch.setattr(index_stages, "CANDIDATES", 1)  # so 10 of 12
    scores, _ = Index(tmp_path / "binary").scores("train")
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, rough.topk(10, dim=1).indices, True)
    torch.testing.assert_close(scores[chosen], exact[chosen], atol=1e-6, rtol=0)
    assert (scores[~chosen] < -2).all()
    torch.testing.assert_close(scores[~chosen] + 4, rough[~chosen], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluation_and_search_agree(world, tmp_path, small_shards, dtype):
    build(tmp_path / "c", world, dtype)
    cache = Index(tmp_path / "c")
    scores, image = cache.scores("test")
    assert image.tolist() == [k for k in range(8) for _ in range(5)]
    queries = next(iter(cache.queries("test")))[0]
    found = cache.search(queries, "test", 8)
    for row, expected in zip(found, best_of(scores[:15], list(held(cache, "test")), 8)):
        assert [name for name, _ in row] == [name for name, _ in expected]
        assert [score for _, score in row] == pytest.approx([score for _, score in expected], abs=1e-5)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """150 pictures as float32, bfloat16, int8 and binary, in shards of 40, and three noisy tokens of each as query."""
    folder, names = tmp_path_factory.mktemp("crowd"), [f"{k:03}.png" for k in range(150)]
    paint(folder / "root", names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_pictures, "PICTURES_PER_SHARD", 40)
        for dtype in ("float32", "bfloat16", "int8", "binary"):
            add(folder / dtype, folder / "root", names, dtype)
    tokens = compressed(folder / "root", names)[:, :3]
    queries = QueryTokens(normalize(tokens + 1.3 * unit(*tokens.shape), dim=-1), torch.ones(150, 3, dtype=torch.bool))
    return folder, names, queries


def test_int8_finds_what_float32_finds(crowd):
    folder, names, queries = crowd
    first = lambda dtype: [row[0][0] for row in Index(folder / dtype).search(queries, "images", 1)]
    recall, expected = (np.mean([a == b for a, b in zip(first(dtype), names)]) for dtype in ("int8", "float32"))
    assert 0.5 < expected < 1  # neither hopeless nor too easy to tell
    assert abs(recall - expected) <= 0.02


def test_binary_with_all_candidates_is_the_exact_search(crowd):
    folder, _, queries = crowd
    found = Index(folder / "binary").search(queries, "images", 15)  # 10 times 15 candidates: all of them
    for row, expected in zip(found, Index(folder / "bfloat16").search(queries, "images", 15)):
        assert [score for _, score in row] == pytest.approx([score for _, score in expected], abs=1e-6)
        assert [name for name, _ in row] == [name for name, _ in expected]


def test_binary_reads_and_ranks_only_the_candidates(crowd, monkeypatch):
    folder, _, queries = crowd
    queries = QueryTokens(queries.tokens[:20], queries.mask[:20])
    monkeypatch.setattr(index_stages, "CANDIDATES", 1)  # so 100 of 150
    seen, original = [], index_stages.score_stored
    monkeypatch.setattr(
        index_stages, "score_stored", lambda *words: seen.append(words[1].tokens.shape) or original(*words)
    )
    found = Index(folder / "binary").search(queries, "images", 5)
    assert [shape for shape in seen if shape[-1] == DIM] == [(100, 6, DIM)] * 20
    assert all(shape[-1] == DIM // 8 for shape in seen[:-20])  # before, signs
    exact = Index(folder / "bfloat16").search(queries, "images", 150)
    for row, chosen, scores in zip(found, search(queries, Index(folder / "binary").stored("images"), 100), exact):
        candidates = {name for name, _ in chosen}
        expected = [(name, score) for name, score in scores if name in candidates][:5]
        assert [name for name, _ in row] == [name for name, _ in expected]
        assert [score for _, score in row] == pytest.approx([score for _, score in expected], abs=1e-6)


@pytest.mark.parametrize("compressor", ["samer", "random"])
def test_assignments_are_those_of_the_merge(pictures, tmp_path, small_shards, compressor):
    merge = MergeConfig(num_regions=6, compressor=compressor)
    add(tmp_path / "c", pictures, merge=merge, assignments=True)
    records = [ImageRecord(name, pictures / name, ()) for name in NAMES]
    seeds = {"seeds": image_seeds(records)}
    expected = make_compressor(merge)(Drawn().encode_images({**Drawn().record_inputs(records), **seeds})).assignments
    parts = list(Index(tmp_path / "c").assignments("images"))
    assert [name for ids, *_ in parts for name in ids] == NAMES
    found = torch.cat([rows for _, rows, _ in parts])
    assert found.dtype == torch.uint8
    assert torch.cat([grids for *_, grids in parts]).tolist() == [[GRID, GRID]] * len(NAMES)
    assert torch.equal(found.long(), torch.where(expected < 0, 255, expected))
    assert (found == 255).any() == (compressor == "random")  # pruning drops tokens
    delete_images(tmp_path / "c", "images", NAMES[:5])
    assert [name for ids, *_ in Index(tmp_path / "c").assignments("images") for name in ids] == NAMES[5:]
    add(tmp_path / "without", pictures)
    with pytest.raises(InputError, match="built without assignments"):
        list(Index(tmp_path / "without").assignments("images"))
    with pytest.raises(InputError, match="at most 255 regions, not 256"):
        add(tmp_path / "many", pictures, merge=MergeConfig(num_regions=256), assignments=True)


# --- growing and shrinking ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_growing_in_several_calls_gives_the_same_bytes(pictures, tmp_path, small_shards, dtype):
    summary, changes = add(tmp_path / "one", pictures, dtype=dtype)
    assert (summary.split, summary.images, summary.queries, summary.regions) == ("images", 12, 0, 6)
    assert changes == Changes(new=12)
    for end in (4, 4, 8, 12, 12):  # what is held is left out
        add(tmp_path / "many", pictures, NAMES[:end], dtype=dtype)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    ours, exact = held(Index(tmp_path / "one")), compressed(pictures, NAMES)
    assert list(ours) == NAMES
    if dtype in index_manifest.FLOATS:
        tolerance = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[dtype]
        torch.testing.assert_close(torch.stack(list(ours.values())).float(), exact, atol=tolerance, rtol=0)


def test_pictures_held_are_not_read_again(pictures, tmp_path, monkeypatch):
    add(tmp_path / "c", pictures, NAMES[:5])
    before, read, original = contents(tmp_path / "c"), [], index_sync.read_picture
    note = lambda path, needs=None: read.append(path.name) or original(path, needs)
    monkeypatch.setattr(index_sync, "read_picture", note)
    add(tmp_path / "c", pictures, [*NAMES[:7], NAMES[6]])  # named twice, taken once
    assert sorted(read) == NAMES[5:7]  # several threads read: in any order
    assert list(held(Index(tmp_path / "c"))) == NAMES[:7]
    after = contents(tmp_path / "c")
    assert {name: after[name] for name in before if name != "manifest.json"}.items() <= before.items()


@pytest.fixture
def bad_files(tmp_path):
    root = paint(tmp_path / "root", NAMES[:3])
    (root / "text.png").write_text("no picture")
    (root / "empty.jpg").write_bytes(b"")
    Image.new("RGB", (64, 64), "red").save(root / "whole.jpg")
    (root / "half.jpg").write_bytes((root / "whole.jpg").read_bytes()[:300])
    return root


BAD = ["text.png", "empty.jpg", "half.jpg", "missing.png"]


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_unreadable_pictures_are_listed_and_skipped(bad_files, tmp_path, small_shards, dtype):
    names = [*BAD, NAMES[0], *NAMES[1:3]]  # the first shard has no good picture
    summary, changes = add(tmp_path / "c", bad_files, names, dtype)
    assert summary.images == 3
    assert list(held(Index(tmp_path / "c"))) == NAMES[:3]
    assert [each.path for each in changes.skipped] == sorted(BAD)
    assert [str(bad_files / name) in each.detail for name, each in zip(sorted(BAD), changes.skipped)] == [True] * 4
    before = contents(tmp_path / "c")
    assert add(tmp_path / "c", bad_files, names, dtype)[1] == Changes(unchanged=3, skipped=changes.skipped)
    assert contents(tmp_path / "c") == before  # an index that has pictures stays as it is
    with pytest.raises(InputError, match=r"not one readable picture among 4 files; .*keeps the 3 that it has"):
        add(tmp_path / "c", bad_files, BAD, dtype)
    assert contents(tmp_path / "c") == before


def test_an_index_of_bad_files_only_is_refused_and_leaves_nothing(bad_files, tmp_path):
    with pytest.raises(InputError, match=r"not one readable picture among 4 files; .*text\.png"):
        add(tmp_path / "c", bad_files, BAD)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "binary"}, "dtype='int8', now 'binary'"),
        ({"merge": MergeConfig(num_regions=4)}, "'num_regions': 6"),
        ({"encoder": Drawn(0.1)}, "base_projector="),
        ({"assignments": True}, "assignments=False, now True"),
        ({"merge": MergeConfig(num_regions=6, compressor="hpc")}, "hpc learns from a whole corpus"),
        ({"merge": MergeConfig(compressor="nothing")}, "'nothing' is unknown"),
        ({"dtype": "int4"}, "'int4' is unknown; use one of float32, bfloat16, float16, int8, binary"),
    ],
)
def test_other_settings_are_refused(pictures, tmp_path, change, words):
    add(tmp_path / "c", pictures, NAMES[:3])
    before = contents(tmp_path / "c")
    with pytest.raises(InputError, match=words):
        add(tmp_path / "c", pictures, **change)
    assert contents(tmp_path / "c") == before


def test_another_root_and_an_old_format_are_refused(pictures, tmp_path):
    add(tmp_path / "c", pictures, NAMES[:3])
    with pytest.raises(InputError, match=f"holds the pictures of {pictures}; name another index for {pictures}/sub"):
        add(tmp_path / "c", pictures / "sub", ["a.png"])
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    (tmp_path / "c" / "manifest.json").write_text(json.dumps({**manifest, "format_version": 1}))
    before = contents(tmp_path / "c")
    with pytest.raises(InputError, match="version 1; this SaMer reads samer_cache 3 and 4: make it anew"):
        add(tmp_path / "c", pictures)
    with pytest.raises(InputError, match="version 1; this SaMer reads samer_cache 3 and 4"):
        delete_images(tmp_path / "c", "images", NAMES[:1])
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_an_interrupted_run_keeps_its_shards_and_goes_on(pictures, tmp_path, small_shards, dtype):
    add(tmp_path / "whole", pictures, dtype=dtype)
    for call in range(1, 13):
        folder = tmp_path / str(call)
        with pytest.MonkeyPatch.context() as patch:
            stop_at_picture(patch, NAMES[call - 1])
            with pytest.raises(KeyboardInterrupt):
                add(folder, pictures, dtype=dtype)
        kept = (call - 1) // 4 * 4
        assert (list(held(Index(folder))) == NAMES[:kept]) if kept else not folder.exists()
        add(folder, pictures, dtype=dtype)
        assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("dtype", DTYPES)
def test_deleted_pictures_are_gone_and_shards_keep_their_bytes(pictures, tmp_path, small_shards, dtype):
    add(tmp_path / "c", pictures, dtype=dtype)
    before, whole = contents(tmp_path / "c"), Index(tmp_path / "c")
    gone = [NAMES[1], *NAMES[4:8]]  # one of a shard, and all of a shard
    assert delete_images(tmp_path / "c", "images", gone[:2]) == 10
    assert delete_images(tmp_path / "c", "images", [*gone[2:], gone[2]]) == 7
    after, cache = contents(tmp_path / "c"), Index(tmp_path / "c")
    assert {name for name in after if after[name] != before.get(name)} == {"manifest.json"}
    left = [name for name in NAMES if name not in gone]
    assert list(held(cache)) == left
    assert all(ids for ids, *_ in cache.images("images"))
    assert all(torch.equal(row, held(whole)[name]) for name, row in held(cache).items())
    assert cache.size("images") == (7, 0, 6, whole.size("images")[3])
    for row, all_of_them in zip(cache.search(ask(), "images", 12), whole.search(ask(), "images", 12)):
        assert row == [pair for pair in all_of_them if pair[0] in left]
    for ids in ([gone[0]], [NAMES[0], "nobody.png"]):
        with pytest.raises(InputError, match=rf"no image '{ids[-1]}' in images \(1 such\); nothing was deleted"):
            delete_images(tmp_path / "c", "images", ids)
    with pytest.raises(InputError, match="no split 'test' in this index; it holds: images"):
        delete_images(tmp_path / "c", "test", ids)
    assert contents(tmp_path / "c") == after
    add(tmp_path / "c", pictures, dtype=dtype)
    assert list(held(Index(tmp_path / "c"))) == [*left, *gone]
    again = Index(tmp_path / "c").search(ask(), "images", 12)
    assert [[name for name, _ in row] for row in again] == [
        [name for name, _ in row] for row in whole.search(ask(), "images", 12)
    ]


def test_a_split_with_captions_cannot_be_evaluated_after_a_deletion(world, tmp_path):
    build(tmp_path / "c", world, "int8")
    delete_images(tmp_path / "c", "test", list(held(Index(tmp_path / "c"), "test"))[:1])
    with pytest.raises(InputError, match="images of test were deleted; its captions can't be evaluated"):
        Index(tmp_path / "c").scores("test")


@pytest.mark.parametrize("dtype", ["int8", "binary"])
@pytest.mark.parametrize("looked", [True, False])
def test_a_reader_sees_the_index_as_it_was_opened(pictures, tmp_path, small_shards, dtype, looked):
    add(tmp_path / "c", pictures, NAMES[:6], dtype)
    expected = Index(tmp_path / "c").search(ask(), "images", 12)
    reader = Index(tmp_path / "c")
    if looked:
        reader.search(ask(), "images", 12)
    delete_images(tmp_path / "c", "images", NAMES[:2])
    add(tmp_path / "c", pictures, NAMES[6:], dtype)
    assert reader.search(ask(), "images", 12) == expected
    assert list(held(reader)) == NAMES[:6]
    assert list(held(Index(tmp_path / "c"))) == NAMES[2:]
    assert Index(tmp_path / "c").search(ask(), "images", 12) != expected


STEPS = st.lists(st.tuples(st.sampled_from("+-"), st.sets(st.integers(0, 11), min_size=1, max_size=6)), max_size=6)


@given(steps=STEPS, dtype=st.sampled_from(["float32", "int8"]), shard=st.integers(1, 5))
@settings(max_examples=25)
def test_any_history_of_additions_and_deletions(pictures, steps, dtype, shard):
    model, exact = [], dict(zip(NAMES, compressed(pictures, NAMES)))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_pictures, "PICTURES_PER_SHARD", shard)
        folder = Path(folder) / "c"
        for what, numbers in steps:
            names = [NAMES[k] for k in sorted(numbers)]
            if what == "+":
                assert add(folder, pictures, names, dtype)[0].images == len({*model, *names})
                model += [name for name in names if name not in model]
            elif set(names) <= set(model):
                assert delete_images(folder, "images", names) == len(model) - len(names)
                model = [name for name in model if name not in names]
            else:
                with contextlib.suppress(InputError):
                    delete_images(folder, "images", names)
                    pytest.fail("an image that the index does not hold was deleted")
        if folder.exists():
            cache = Index(folder)
            ours = {name: cache.vectors("images", k).tokens for name, k in cache.numbers("images").items()}
            assert list(ours) == model
            assert cache.size("images")[0] == len(model)
            for name in model:  # in int8 within half a step
                step = float(exact[name].abs().max()) / 127 if dtype == "int8" else 0
                torch.testing.assert_close(ours[name], exact[name], atol=step / 2 + 1e-6, rtol=0)
            if model:
                images = torch.stack([ours[name] for name in model])
                scores = maxsim(ask().tokens, images, ask().mask)
                for query, row in enumerate(cache.search(ask(), "images", 12)):
                    assert sorted(name for name, _ in row) == sorted(model)
                    assert all(a >= b for (_, a), (_, b) in itertools.pairwise(row))
                    for name, score in row:
                        assert score == pytest.approx(scores[query, model.index(name)].item(), abs=0.02)


# --- one writer at a time -------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(pictures, world, tmp_path):
    add(tmp_path / "c", pictures, NAMES[:3])
    before = contents(tmp_path / "c")
    writers = [
        lambda: add(tmp_path / "c", pictures),
        lambda: delete_images(tmp_path / "c", "images", NAMES[:1]),
        lambda: build(tmp_path / "c", world, "int8"),
    ]
    for writer in writers:
        with runtime_files.only_writer(tmp_path / "c"):
            with pytest.raises(InputError, match="c: another process is writing to it; wait until it ends"):
                writer()
            assert Index(tmp_path / "c").search(ask(), "images", 3)  # readers need no lock
        assert contents(tmp_path / "c") == before  # the lock's file is gone
    for writer in writers:
        writer()
    assert not (tmp_path / "c" / ".lock").exists()


FORKED = """
import os, signal, sys, time
from samer.runtime.files import only_writer

with only_writer(sys.argv[1]):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(0.5)  # the child closes what it took along
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_does_not_keep_its_killed_parents_lock(tmp_path):
    """A data loader's worker outlives its trainer for some seconds."""
    words = [sys.executable, "-c", FORKED, str(tmp_path / "c")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}) as parent:
        child = int(parent.stdout.readline())
        parent.wait(30)
    try:
        os.kill(child, 0)  # it lives
        assert (tmp_path / "c" / ".lock").exists()
        with runtime_files.only_writer(tmp_path / "c"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_killed_writer_leaves_an_index_that_goes_on(pictures, tmp_path, small_shards, command):
    done = command(sys.executable, __file__, tmp_path / "c", pictures, env={"PYTHONPATH": "."})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {"manifest.json", ".lock"} < set(os.listdir(tmp_path / "c"))
    assert list(held(Index(tmp_path / "c"))) == NAMES[:4]
    files = sorted(contents(tmp_path / "c" / "images"))
    assert files[0].startswith(".images-00001.safetensors.")  # the half-written one
    assert files[1:] == [f"images-0000{k}.safetensors" for k in ("0.exact", "0", "1.exact")]
    add(tmp_path / "c", pictures, dtype="binary")
    add(tmp_path / "whole", pictures, dtype="binary")
    assert contents(tmp_path / "whole") == contents(tmp_path / "c")  # nothing beside it either


# --- compacting -----------------------------------------------------------------------------------------------------


def rows_of(folder):
    """Id -> everything that an index stores of a picture, as bytes."""
    cache = Index(folder)
    rows = {}
    for name, number in cache.numbers("images").items():
        each = cache.vectors("images", number)
        rows[name] = [t.numpy().tobytes() for t in (each.tokens, each.mask, each.regions)] + [each.grid]
    return {name: [*rows[name], row.numpy().tobytes()] for name, row in held(cache).items()}


def shapes_of(folder):
    """Counts and sizes of the shards in the manifest's order, and what their headers say."""
    cache = Index(folder)
    shards = cache.manifest.splits["images"].images
    facts = [(shard.count, shard.regions, shard.bytes) for shard in shards]
    return facts, [load_header(folder / "images" / shard.file)["stamp"] for shard in shards]


@pytest.mark.parametrize("dtype", ["float32", "int8", "binary"])
def test_a_compacted_index_is_the_one_built_at_once(pictures, tmp_path, small_shards, dtype):
    left = [*NAMES[:4], *NAMES[6:8], *NAMES[10:], NAMES[5], NAMES[9]]
    for first, second in ((0, 4), (4, 5), (5, 7), (7, 12)):
        add(tmp_path / "c", pictures, NAMES[first:second], dtype=dtype, assignments=True)
    delete_images(tmp_path / "c", "images", [*NAMES[4:6], *NAMES[8:10]])
    add(tmp_path / "c", pictures, [NAMES[5], NAMES[9]], dtype=dtype, assignments=True)
    before = Index(tmp_path / "c")
    found, rows = before.search(ask(3), "images", 12), rows_of(tmp_path / "c")
    open_before = Index(tmp_path / "c")
    size = sum(map(len, contents(tmp_path / "c" / "images").values()))
    saved = index_pictures.compact_images(tmp_path / "c", "images")
    files = contents(tmp_path / "c" / "images")
    assert size - saved == sum(map(len, files.values())) < size
    assert len(files) == 3 * (1 + (dtype == "binary"))
    after = Index(tmp_path / "c")
    assert list(held(after)) == left
    assert found == before.search(ask(3), "images", 12)  # still mapped
    assert same_answers(after.search(ask(3), "images", 12), found)
    with pytest.raises(InputError, match="c: rewritten since it was opened; open it again"):
        open_before.search(ask(3), "images", 12)
    add(tmp_path / "new", pictures, left, dtype=dtype, assignments=True)
    assert rows_of(tmp_path / "c") == rows
    assert shapes_of(tmp_path / "c") == shapes_of(tmp_path / "new")
    add(tmp_path / "c", pictures, NAMES, dtype=dtype, assignments=True)  # those deleted come back
    assert sorted(held(Index(tmp_path / "c"))) == sorted(NAMES)


@pytest.mark.parametrize("call", range(1, 8))
def test_compacting_that_fails_changes_nothing(pictures, tmp_path, small_shards, monkeypatch, call):
    add(tmp_path / "c", pictures, dtype="binary")
    delete_images(tmp_path / "c", "images", NAMES[2:5])
    before, replace, calls = contents(tmp_path / "c"), os.replace, itertools.count(1)

    def full(source, target):
        if next(calls) == call:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(InputError, match="No space left") if call < 8 else contextlib.nullcontext():
            index_pictures.compact_images(tmp_path / "c", "images")
    assert contents(tmp_path / "c") == before


def test_compacting_that_is_interrupted_at_its_end_keeps_what_the_manifest_names(
    pictures, tmp_path, small_shards, monkeypatch
):
    add(tmp_path / "c", pictures)
    delete_images(tmp_path / "c", "images", NAMES[2:5])
    write = index_pictures.write_index_manifest

    def interrupted(path, manifest):
        write(path, manifest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_pictures, "write_index_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index_pictures.compact_images(tmp_path / "c", "images")
    assert list(held(Index(tmp_path / "c"))) == [*NAMES[:2], *NAMES[5:]]
    assert len(contents(tmp_path / "c" / "images")) == 3


def test_a_killed_compaction_is_made_up_for(pictures, tmp_path, small_shards):
    add(tmp_path / "c", pictures, dtype="int8")
    delete_images(tmp_path / "c", "images", NAMES[2:5])
    orphan = tmp_path / "c" / "images" / "images-00003.safetensors"
    orphan.write_bytes((tmp_path / "c" / "images" / "images-00000.safetensors").read_bytes())
    assert list(held(Index(tmp_path / "c"))) == [*NAMES[:2], *NAMES[5:]]
    index_pictures.compact_images(tmp_path / "c", "images")
    assert list(held(Index(tmp_path / "c"))) == [*NAMES[:2], *NAMES[5:]]
    assert len(contents(tmp_path / "c" / "images")) == 3


def test_what_can_not_be_compacted_is_refused(pictures, world, tmp_path, small_shards):
    with pytest.raises(InputError, match=r"no manifest\.json"):
        index_pictures.compact_images(tmp_path / "none", "images")
    assert not (tmp_path / "none").exists()
    build(tmp_path / "b", world, "int8")
    with pytest.raises(InputError, match="test has captions, so it can't be compacted"):
        index_pictures.compact_images(tmp_path / "b", "test")
    add(tmp_path / "c", pictures, NAMES[:5])
    damaged = tmp_path / "c" / "images" / "images-00000.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    before = contents(tmp_path / "c")
    with pytest.raises(InputError, match=r"images-00000\.safetensors: contents differ"):  # it stays as it is
        index_pictures.compact_images(tmp_path / "c", "images")
    assert contents(tmp_path / "c") == before
    data[-1] ^= 1
    damaged.write_bytes(data)
    delete_images(tmp_path / "c", "images", NAMES[:5])
    with pytest.raises(InputError, match="every image of images was deleted"):
        index_pictures.compact_images(tmp_path / "c", "images")


# --- the projector --------------------------------------------------------------------------------------------------


def test_the_projector_in_use_comes_with_the_index(pictures, tmp_path):
    encoder = Drawn()
    encoder.use_projector(Projector(torch.eye(DIM) * 2, torch.full((DIM,), 0.25)))
    add(tmp_path / "c", pictures, encoder=encoder)
    found, expected = Index(tmp_path / "c").projector(), encoder.current_projector()
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.bias, expected.bias)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "not a readable safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "not a readable safetensors file"),
        (lambda path: save_file({"weight": torch.eye(DIM)}, path), "not the projector"),  # without its bias
        (lambda path: save_file({"bias": torch.zeros(DIM)}, path), "expected a weight .* and a bias"),
        (lambda path: save_file({"weight": torch.eye(DIM) * 2, "bias": torch.zeros(DIM)}, path), "not the projector"),
    ],
)
def test_a_damaged_or_foreign_projector_is_refused(pictures, tmp_path, spoil, words):
    add(tmp_path / "c", pictures, NAMES[:1])
    spoil(tmp_path / "c" / "projector.safetensors")
    with pytest.raises(InputError, match=rf"projector\.safetensors: {words}"):
        Index(tmp_path / "c").projector()


@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_an_index_without_a_live_picture_finds_nothing(pictures, tmp_path, dtype):
    add(tmp_path / "c", pictures, NAMES[:3], dtype=dtype)
    assert delete_images(tmp_path / "c", "images", NAMES[:3]) == 0
    assert Index(tmp_path / "c").search(ask(2), "images", 5) == [[], []]


@pytest.mark.parametrize(
    ("merge", "words"),
    [
        (MergeConfig(num_regions=2, compressor="none"), "each is its own region: leave --assignments out"),
    ],
)
def test_regions_that_no_byte_holds_are_refused(pictures, tmp_path, merge, words):
    with pytest.raises(InputError, match=words):
        add(tmp_path / "c", pictures, NAMES[:2], merge=merge, assignments=True)
    assert not (tmp_path / "c").exists()


def test_deleting_where_there_is_no_index_touches_nothing(tmp_path):
    (tmp_path / "photos" / "empty").mkdir(parents=True)
    for folder in (tmp_path / "photos", tmp_path / "photos" / "empty", tmp_path / "nowhere" / "deep"):
        with pytest.raises(InputError, match=r"no manifest\.json"):
            delete_images(folder, "images", ["a"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "photos"]


def test_a_failed_run_removes_only_its_own_empty_folders(tmp_path):
    (tmp_path / "kept" / "empty").mkdir(parents=True)
    (tmp_path / "bad.png").write_text("no picture")
    for folder in (tmp_path / "new" / "index", tmp_path / "kept"):
        with pytest.raises(InputError, match="not one readable picture"):
            add(folder, tmp_path, ["bad.png"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.png", "empty", "kept"]


def test_an_evaluation_checks_the_exact_file_too(world, tmp_path):
    build(tmp_path / "c", world, "binary")
    file = tmp_path / "c" / "test" / "images-00000.exact.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"exact\.safetensors: contents differ"):
        Index(tmp_path / "c").scores("test")


def test_a_name_that_is_not_utf8_is_skipped(pictures, tmp_path):
    odd = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "p").mkdir()
    for name in ("good.png", odd):
        (tmp_path / "p" / name).write_bytes((pictures / NAMES[0]).read_bytes())
    summary, changes = add(tmp_path / "c", tmp_path / "p", ["good.png", odd])
    assert summary.images == 1
    assert [each.path for each in changes.skipped] == [odd]
    assert "not UTF-8" in changes.skipped[0].reason


def test_a_split_with_deletions_is_not_built_over(world, tmp_path):
    build(tmp_path / "c", world, "int8")
    delete_images(tmp_path / "c", "test", [next(iter(held(Index(tmp_path / "c"), "test")))])
    before = contents(tmp_path / "c")
    with pytest.raises(InputError, match="were deleted"):
        build(tmp_path / "c", world, "int8")
    assert contents(tmp_path / "c") == before


def killed(folder, root):
    """A writer that dies when its second shard is written and not yet named in the manifest."""
    index_pictures.PICTURES_PER_SHARD = 4
    original = os.replace

    def replace(source, target):
        if Path(target).name == "images-00001.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)

    os.replace = replace
    add(folder, root, dtype="binary")


if __name__ == "__main__":
    killed(sys.argv[1], sys.argv[2])


class Ragged(Drawn):
    """Images of 12 or 16 tokens, by their ids; one row of patches."""

    def record_inputs(self, records):
        (record,) = records
        return self.draw([record.image_id.encode()], 12 + 4 * (int(record.image_id) % 2))

    def image_layout(self, inputs):
        count = inputs["input_ids"].shape[1]
        return grid_layout(torch.ones(1, count, dtype=torch.bool), torch.tensor([[1, count]]))


def test_shards_of_unequal_width_are_evaluated_in_every_dtype(world, tmp_path, monkeypatch):
    monkeypatch.setattr(index_write, "IMAGES_PER_SHARD", 1)
    merge = MergeConfig(compressor="none")
    scores = {}
    for dtype in ("bfloat16", "binary", "int8"):
        build_index(tmp_path / dtype, world, ["test"], Ragged(), merge, batch_size=1, dtype=dtype)
        index = Index(tmp_path / dtype)
        assert {shard.regions for shard in index.manifest.splits["test"].images} == {12, 16}
        scores[dtype], _ = index.scores("test")
    torch.testing.assert_close(scores["binary"], scores["bfloat16"], atol=1e-6, rtol=0)  # all are re-ranked
    torch.testing.assert_close(scores["int8"], scores["bfloat16"], atol=2e-2, rtol=0)
