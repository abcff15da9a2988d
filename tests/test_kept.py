"""Indexes that keep those of their vectors which a bank of queries would miss most (recode.py --keep)."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from test_index import NAMES, Drawn, add, held, paint
from test_recode import ask
from torch.nn.functional import normalize

from samer.compressors.querybank import keep_best
from samer.config import InputError, MergeConfig
from samer.index.merge import merge_indexes
from samer.index.pictures import delete_images
from samer.index.read import Index
from samer.index.recode import recode
from samer.index.verify import verify
from samer.index.write import build_index
from samer.retrievers.banks import query_states

CROWD = [f"{k:03}.png" for k in range(100)]


def bank_of(texts=("a cat", "two dogs on a beach", "a red ball"), size=12):
    encoder = Drawn()
    return query_states(encoder, list(texts), size, "a test").bank(encoder.current_projector())


def naive_picks(tokens, bank, weights, count):
    """One vector after another, each time the one with which the bank's best products add up to most."""
    picks = []
    while len(picks) < count:
        left = [k for k in range(len(tokens)) if k not in picks]
        best = lambda u, rows: max(float(u @ tokens[j]) for j in rows)
        sums = [sum(float(w) * best(u, [*picks, k]) for u, w in zip(bank, weights)) for k in left]
        picks.append(left[max(range(len(left)), key=sums.__getitem__)])
    return picks


def test_picks_are_those_of_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    tokens = normalize(torch.randn(5, 9, 16, generator=generator), dim=-1)
    bank = normalize(torch.randn(20, 16, generator=generator), dim=-1)
    weights = torch.rand(20, generator=generator) + 0.1
    mask = torch.ones(5, 9, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2, ::2] = False
    found = keep_best(tokens, mask, bank, weights, 4)
    for row, valid in enumerate(mask):
        places = valid.nonzero()[:, 0]
        if len(places) <= 4:
            assert found[row].tolist() == places.tolist() + [-1] * (4 - len(places))
        else:
            assert found[row].tolist() == places[naive_picks(tokens[row][valid], bank, weights, 4)].tolist()
    assert keep_best(tokens, mask, bank, weights, 20).shape == (5, 9)
    assert mask.sum(1).tolist() == [9, 3, 4, 9, 9]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """100 pictures in float32 with assignments, of which one is deleted, and what is kept of them, floats and codes."""
    crowd = tmp_path_factory.mktemp("crowd")
    paint(crowd / "root", CROWD)
    add(crowd / "c", crowd / "root", CROWD, "float32", assignments=True)
    delete_images(crowd / "c", "images", ["031.png"])
    for kind in ("float32", "2bit"):
        recode(crowd / "c", crowd / f"k{kind}", kind, keep=3, bank=bank_of())
    return crowd


def test_it_keeps_what_the_bank_would_miss_most(kept):
    bank, old, new = bank_of(), Index(kept / "c"), Index(kept / "kfloat32")
    assert (new.manifest.kept, new.manifest.bank, new.bank().hash) == (3, bank.hash, bank.hash)
    assert (new.size("images")[2], new.manifest.bank_source) == (3, bank.describe())
    assert old.manifest.merge == new.manifest.merge
    before, after = held(old), held(new)
    assert before.keys() == after.keys()
    numbers = old.numbers("images")
    for name, row in after.items():
        picks = naive_picks(before[name], bank.vectors, bank.weights, 3)
        assert torch.equal(row, before[name][picks])
        theirs, ours = (index.vectors("images", index.numbers("images")[name]).regions for index in (old, new))
        expected = [picks.index(k) if k in picks else -1 for k in theirs.tolist()]
        assert ours.tolist() == expected
        assert {-1, 0, 1, 2} >= set(expected) > {-1}
    assert len(numbers) == 99
    assert verify(kept / "kfloat32").damages == []


def test_codes_of_what_is_kept(kept):
    floats, codes = Index(kept / "kfloat32"), Index(kept / "k2bit")
    dim = Drawn().embedding_dim
    assert codes.size("images")[3] == 3 * dim // 4 + dim + 4
    before, after = held(floats), {}
    for name, number in codes.numbers("images").items():
        after[name] = codes.vectors("images", number).tokens
    error = torch.stack([(after[name] - before[name]).square().sum(-1).mean() for name in before])
    assert float(error.mean()) < 0.2
    assert verify(kept / "k2bit").damages == []
    names = lambda found: [{name for name, _ in row} for row in found]
    few, all_of_it = names(codes.search(ask(), "images", 10)), names(floats.search(ask(), "images", 10))
    assert sum(len(a & b) for a, b in zip(few, all_of_it)) > 7 * 5


@pytest.mark.parametrize("kind", ["2bit", "float32"])
def test_pictures_that_are_added_keep_as_many(kept, tmp_path, kind):
    shutil.copytree(kept / f"k{kind}", tmp_path / "c")
    shutil.copytree(kept / "root", tmp_path / "root")
    names = [name for name in CROWD if name != "031.png"]
    paint(tmp_path / "root", NAMES)
    add(tmp_path / "c", tmp_path / "root", [*names, *NAMES], kind, assignments=True)
    grown, bank = Index(tmp_path / "c"), bank_of()
    assert (grown.manifest.kept, grown.manifest.bank) == (3, bank.hash)
    before, after = held(Index(kept / f"k{kind}")), held(grown)
    assert set(after) == {*names, *NAMES}
    assert all(torch.equal(after[name], row) for name, row in before.items())
    add(tmp_path / "f", tmp_path / "root", NAMES, "float32")
    for name, whole in held(Index(tmp_path / "f")).items():
        expected = whole[naive_picks(whole, bank.vectors, bank.weights, 3)]
        found = grown.vectors("images", grown.numbers("images")[name]).tokens
        assert float((found - expected).square().sum(-1).mean()) < (0.4 if kind == "2bit" else 1e-9)
    assert verify(tmp_path / "c").damages == []


def test_what_is_kept_is_kept_again(kept, tmp_path):
    recode(kept / "kfloat32", tmp_path / "int8", "int8")
    again = Index(tmp_path / "int8")
    assert (again.manifest.kept, again.bank().hash, again.size("images")[2]) == (3, bank_of().hash, 3)
    recode(kept / "kfloat32", tmp_path / "two", keep=2)  # by its own bank
    recode(kept / "c", tmp_path / "direct", keep=2, bank=bank_of())
    ours, theirs = held(Index(tmp_path / "two")), held(Index(tmp_path / "direct"))
    assert all(torch.equal(row, theirs[name]) for name, row in ours.items())
    recode(kept / "c", tmp_path / "levels", "1bit", [2], keep=4, bank=bank_of())
    levels = Index(tmp_path / "levels")
    assert [images.tokens.shape[1] for _, images in itertools.islice(levels.stored("images", budget=2), 1)] == [2]
    merge_indexes(tmp_path / "joined", [kept / "kfloat32"])
    joined = Index(tmp_path / "joined")
    assert (joined.manifest.kept, joined.bank().hash) == (3, bank_of().hash)
    assert joined.search(ask(), "images", 5) == Index(kept / "kfloat32").search(ask(), "images", 5)


def test_all_tokens_are_pruned_to_what_the_bank_misses_most(world, tmp_path):
    build_index(tmp_path / "c", world, ["val"], Drawn(), MergeConfig(compressor="none"), dtype="float16")
    recode(tmp_path / "c", tmp_path / "few", keep=5, bank=bank_of())
    few, bank = Index(tmp_path / "few"), bank_of()
    assert few.size("val")[2] == 5
    for name, whole in held(Index(tmp_path / "c"), "val").items():
        picks = naive_picks(whole.float(), bank.vectors, bank.weights, 5)
        found = few.vectors("val", few.numbers("val")[name])
        assert torch.equal(found.tokens, whole[picks].float())
        assert [int((found.regions == k).nonzero()) for k in range(5)] == picks
        assert int((found.regions >= 0).sum()) == 5
    assert few.scores("val")[0].isfinite().all()


def test_what_can_not_be_kept_is_refused(kept, world, tmp_path):
    bank = bank_of()
    for words, message in (
        ({"keep": 3}, "a query bank says which vectors; give one as --bank"),
        ({"keep": 6, "bank": bank}, "--keep 6: fewer vectors are from 1 to 5, as images have 6"),
        ({"keep": -1, "bank": bank}, "--keep -1"),
        ({"keep": 3, "bank": replace(bank, projector="0" * 64)}, "the query bank is of projector"),
        ({"keep": 3, "budgets": [3], "bank": bank}, "--budgets 3: smaller budgets lie between 1 and 2"),
    ):
        with pytest.raises(InputError, match=message):
            recode(kept / "c", tmp_path / "x", **words)
    with pytest.raises(InputError, match="it was made with bank"):
        recode(kept / "kfloat32", tmp_path / "x", keep=2, bank=bank_of(["other words"]))
    assert not (tmp_path / "x").exists()
    shutil.copytree(kept / "kfloat32", tmp_path / "other")
    with pytest.raises(InputError, match="holds an index with bank="):
        add(tmp_path / "other", kept / "root", CROWD, "float32", assignments=True, bank=bank_of(["other words"]))
    shutil.copytree(kept / "kfloat32", tmp_path / "lost")
    (tmp_path / "lost" / "bank.safetensors").unlink()
    shutil.copytree(kept / "root", tmp_path / "root")
    with pytest.raises(InputError, match=r"bank\.safetensors"):
        add(tmp_path / "lost", tmp_path / "root", CROWD, "float32", assignments=True)
    assert any("bank.safetensors" in line for line in verify(tmp_path / "lost").damages)
    assert not {"kept", "bank"} & json.loads((kept / "c" / "manifest.json").read_text()).keys()
