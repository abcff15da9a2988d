"""Merging in the space of queries (METHOD section 2b): naive loops beside it, and the banks that it compresses by."""

import dataclasses
import functools
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from samer.compressors import make_compressor
from samer.compressors.querybank import TIE, QueryBank, draw, pick_batch, pick_one, sample_queries, vote
from samer.config import InputError, MergeConfig, load_config
from samer.data import flickr
from samer.evaluation import evaluate_records, fitted_compressor
from samer.features.write import write_features
from samer.index.read import Index
from samer.index.verify import verify
from samer.index.write import build_index
from samer.report.gallery import Shown, make_gallery
from samer.retrievers.banks import (
    FILE,
    captions_of,
    load_bank,
    query_states,
    read_bank,
    read_texts,
    save_bank,
)
from samer.retrievers.base import Projector
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector, save_projector
from samer.tokens import VisualTokens
from samer.training.batches import CaptionDataset, Collator
from samer.training.loop import train
from samer.training.model import ProjectorModel

DIM = 16
close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or hidden without -m gpu")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])


def unit(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def compressor(regions, vectors, weights=None, size=10_000):
    made = make_compressor(MergeConfig(num_regions=regions, compressor="querybank", bank_size=size))
    made.fit_queries(vectors, weights)
    return made


def images(batch=1, count=40, seed=0, **more):
    tokens = unit(batch, count, DIM, seed=seed)
    coords = torch.rand(batch, count, 2, generator=torch.Generator().manual_seed(seed))
    return VisualTokens(tokens, coords, **more)


# --- the oracle: METHOD 2b, one number at a time in float64 -----------------------------------------------------------


def first_best(values):
    """The first of the values that are within `TIE` of the largest."""
    top = max(values)
    return next(k for k, value in enumerate(values) if value >= top - TIE)


def covered(similar, weights, chosen):
    """sum_r a_r max over the chosen of u_r . v; of none -1, the least that there is."""
    return sum(a * max([row[i] for i in chosen], default=-1.0) for a, row in zip(weights, similar))


def naive_picks(similar, weights, regions):
    picks = []
    for _ in range(regions):
        rest = [i for i in range(len(similar[0])) if i not in picks]
        picks.append(rest[first_best([covered(similar, weights, [*picks, i]) for i in rest])])
    return picks


def naive_merge(tokens, bank, weights, regions):
    """Vectors (K, D), votes (K, N) and picks of one image."""
    tokens, bank = (np.asarray(each, dtype=np.float64) for each in (tokens, bank))
    weights = [float(a) / sum(map(float, weights)) for a in weights]
    similar = [[float(u @ v) for v in tokens] for u in bank]
    wanted = [row.index(max(row)) for row in similar]
    picks = naive_picks(similar, weights, regions)
    merged, votes = [tokens[i] for i in picks], [[0.0] * len(tokens) for _ in picks]
    for _ in range(3):
        cast = [[0.0] * len(tokens) for _ in picks]
        for r, u in enumerate(bank):
            near = [float(u @ m) for m in merged]
            cast[near.index(max(near))][wanted[r]] += weights[r]
        for k, own in enumerate(cast):
            if sum(own) > 0:
                votes[k] = own
                mean = sum(vote * token for vote, token in zip(own, tokens))
                merged[k] = mean / np.linalg.norm(mean)
    return np.array(merged), np.array(votes), picks


def check_against_oracle(merged, row, tokens, bank, weights, regions, valid=None):
    """Vectors, weights and regions of one image of a result, by the oracle."""
    valid = list(range(len(tokens))) if valid is None else valid
    vectors, votes, picks = naive_merge(tokens[valid], bank, weights, regions)
    close(merged.tokens[row], torch.from_numpy(vectors).to(merged.tokens))
    for k, own in enumerate(votes):
        share = own / own.sum() if own.sum() else np.eye(len(valid))[picks[k]]
        close(merged.weights[row][valid, k], torch.from_numpy(share).to(merged.weights))
    for i, place in enumerate(valid):
        own = votes[:, i].tolist()
        near = [float(np.asarray(tokens[place], dtype=np.float64) @ vector) for vector in vectors]
        expected = own.index(max(own)) if max(own) > 0 else near.index(max(near))
        assert int(merged.assignments[row, place]) == expected
    return picks


@pytest.mark.parametrize("regions", [1, 2, 7, 20, 39])
@pytest.mark.parametrize("queries", [3, 25, 60])
def test_it_is_the_method_read_aloud(regions, queries):
    visual, bank = images(3, seed=regions), unit(queries, DIM, seed=100)
    weights = torch.rand(queries, generator=torch.Generator().manual_seed(1)) + 0.1
    merged = compressor(regions, bank, weights)(visual)
    for row in range(3):
        check_against_oracle(merged, row, visual.tokens[row], bank, weights, regions)
    assert merged.mask.all()
    close(merged.coords, merged.weights.transpose(1, 2) @ visual.coords)


def test_votes_move_vectors_and_a_vector_may_lose_its_voters():
    """The cases that the oracle is about do occur: votes that move a vector, picks never voted for, voters lost."""
    tokens, bank = unit(20, DIM), unit(30, DIM, seed=50)
    merged, _, picks = naive_merge(tokens, bank, torch.ones(30), 8)
    assert sum(np.abs(merged[k] - tokens[picks[k]].numpy()).max() > 1e-3 for k in range(8)) >= 5
    assert (naive_merge(tokens, unit(2, DIM, seed=9), torch.ones(2), 6)[1].sum(1) == 0).sum() == 4
    lost = 0
    for seed in range(60):
        tokens, bank = unit(12, 3, seed=seed), unit(14, 3, seed=seed + 50)
        if naive_merge(tokens, bank, torch.ones(14), 6)[1].sum() > 1 + 1e-9:  # some votes are of an earlier round
            lost += 1
            merged = compressor(6, bank)(VisualTokens(tokens[None], torch.zeros(1, 12, 2)))
            check_against_oracle(merged, 0, tokens, bank, torch.ones(14), 6)
    assert lost


@pytest.mark.parametrize("left", [False, True])
def test_padding_and_short_images_are_as_alone(left):
    counts, regions = (40, 23, 9, 8, 3, 1), 8
    bank, weights = unit(30, DIM, seed=5), torch.arange(30) % 4 + 1.0
    tokens = torch.full((len(counts), 43, DIM), torch.nan)
    mask = torch.zeros(len(counts), 43, dtype=torch.bool)
    for row, count in enumerate(counts):
        place = slice(43 - count, None) if left else slice(count)
        tokens[row, place], mask[row, place] = unit(count, DIM, seed=row), True
    visual = VisualTokens(tokens, torch.rand(len(counts), 43, 2), mask)
    merged = compressor(regions, bank, weights)(visual)
    for row, count in enumerate(counts):
        valid = mask[row].nonzero()[:, 0].tolist()
        if count > regions:
            check_against_oracle(merged, row, tokens[row], bank, weights, regions, valid)
        else:
            assert torch.equal(merged.tokens[row, :count], tokens[row, valid])
            assert merged.mask[row].tolist() == [True] * count + [False] * (regions - count)
        assert (merged.assignments[row][~mask[row]] == -1).all()
        assert (merged.weights[row][~mask[row]] == 0).all()


def test_of_equal_tokens_the_first_is_picked_and_the_rest_by_number():
    three = unit(3, DIM, seed=2)
    tokens = three[[0, 1, 0, 2, 1, 2, 0]][None]
    bank = three[[2, 2, 2, 1, 1, 0]]
    room = torch.empty(2, 6, 7)
    picks, wanted = pick_one(tokens[0], bank, torch.full((6,), 1 / 6), 7, room)
    similar = (bank.double() @ tokens[0].double().T).tolist()
    assert picks.tolist() == naive_picks(similar, [1 / 6] * 6, 7)
    assert picks[:3].sort().values.tolist() == [0, 1, 3]  # the first of each kind
    assert picks[3:].tolist() == [2, 4, 5, 6]  # no gain is left: by number
    assert wanted.tolist() == [3, 3, 3, 1, 1, 0]
    merged = compressor(5, bank)(VisualTokens(tokens, torch.rand(1, 7, 2)))
    close(merged.tokens[0], tokens[0, picks[:5]])


def test_gains_that_differ_by_less_than_a_rounding_are_equal():
    """Two tokens mirrored about what is asked gain the same but for rounding, in either order."""
    first = unit(4, DIM, seed=3)
    for flipped in (False, True):
        tokens = torch.stack([first[0], first[1], 2 * (first[0] @ first[1]) * first[0] - first[1]])
        tokens = F.normalize(tokens.flip(0) if flipped else tokens, dim=-1)
        bank = torch.cat([first[:1], tokens[[0, 2] if flipped else [1, 2]]])
        bank = torch.cat([bank, bank.flip(0)])
        picks, _ = pick_one(tokens, bank, torch.full((6,), 1 / 6), 3, torch.empty(2, 6, 3))
        middle = 2 if flipped else 0
        assert picks.tolist()[:2] == [middle, min({0, 1, 2} - {middle})]


@pytest.mark.parametrize("regions", [1, 2, 3, 4])
def test_greedy_is_within_one_minus_one_over_e_of_the_best_choice(regions):
    worst = 1.0
    for seed in range(15):
        tokens, bank = unit(9, 3, seed=seed), unit(12, 3, seed=seed + 1000)
        weights = (torch.rand(12, generator=torch.Generator().manual_seed(seed)) + 0.05).tolist()
        similar = (bank.double() @ tokens.double().T).tolist()
        share = torch.tensor(weights) / sum(weights)
        picks, _ = pick_one(tokens, bank, share, regions, torch.empty(2, 12, 9))
        nothing = covered(similar, weights, [])
        best = max(covered(similar, weights, some) for some in itertools.combinations(range(9), regions)) - nothing
        worst = min(worst, (covered(similar, weights, picks.tolist()) - nothing) / best)
    assert 1 - 1 / np.e <= worst <= 1 + 1e-9
    assert (worst > 1 - 1e-6) == (regions == 1)  # a choice of one is the best one; of more not always


def test_picks_of_a_smaller_budget_are_the_first_of_a_larger_ones():
    tokens, bank, share = unit(60, DIM), unit(90, DIM, seed=1), torch.full((90,), 1 / 90)
    room = torch.empty(2, 90, 60)
    every, wanted = pick_one(tokens, bank, share, 59, room)
    assert sorted(every.tolist()) == sorted(set(every.tolist()))
    whole = compressor(59, bank)(VisualTokens(tokens[None], torch.zeros(1, 60, 2)))
    for regions in (1, 2, 16, 40):
        picks, same = pick_one(tokens, bank, share, regions, room)
        assert torch.equal(picks, every[:regions])
        assert torch.equal(same, wanted)
        merged = compressor(regions, bank)(VisualTokens(tokens[None], torch.zeros(1, 60, 2)))
        votes = vote(tokens[None], bank, share, picks[None], wanted[None])[0].float()
        voted = votes.sum(1) > 0
        close(merged.tokens[0][voted], F.normalize(votes @ tokens, dim=-1)[voted])
        assert not torch.allclose(merged.tokens[0], whole.tokens[0, :regions], atol=1e-3)  # the votes are held anew


@pytest.mark.parametrize("masked", [False, True])
def test_the_way_of_a_gpu_picks_what_the_cpu_picks(masked):
    tokens, bank = unit(4, 50, DIM, seed=7), unit(70, DIM, seed=8)
    share = torch.rand(70, generator=torch.Generator().manual_seed(2))
    share = share / share.sum()
    mask = None
    if masked:
        mask = torch.arange(50) < torch.tensor([50, 31, 17, 26])[:, None]
        tokens = tokens * mask[..., None]
    picks, wanted = pick_batch(tokens, bank, share, 16, mask)
    for row in range(4):
        count = 50 if mask is None else int(mask[row].sum())
        one, own = pick_one(tokens[row, :count], bank, share, 16, torch.empty(2, 70, 50))
        assert torch.equal(picks[row], one)
        assert torch.equal(wanted[row], own)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_device_gives_what_the_loop_gives(device):
    visual, bank = images(3, seed=4), unit(50, DIM, seed=6)
    mask = torch.arange(40) < torch.tensor([40, 25, 5])[:, None]
    there = VisualTokens(visual.tokens.to(device), visual.coords.to(device), mask.to(device))
    merged = compressor(9, bank)(there)
    again = compressor(9, bank)(there)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(vars(merged).values(), vars(again).values()))
    merged = type(merged)(**{name: value.cpu() for name, value in vars(merged).items()})
    for row, count in enumerate((40, 25)):
        check_against_oracle(merged, row, visual.tokens[row], bank, torch.ones(50), 9, list(range(count)))
    assert torch.equal(merged.tokens[2, :5], visual.tokens[2, :5])


def test_the_gradient_is_that_of_the_weighted_means():
    bank = unit(25, DIM, seed=3)
    made = compressor(4, bank)
    tokens = unit(2, 12, DIM, dtype=torch.float64).requires_grad_()
    coords = torch.zeros(12, 2, dtype=torch.float64)
    weights = made(VisualTokens(tokens, coords)).weights.detach()

    def means(values):
        return F.normalize(weights.transpose(1, 2) @ values, dim=-1)

    assert torch.autograd.gradcheck(lambda values: made(VisualTokens(values, coords)).tokens, (tokens,), atol=1e-6)
    probe = torch.randn(2, 4, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        torch.autograd.grad((function(tokens) * probe).sum(), tokens)[0]
        for function in (lambda values: made(VisualTokens(values, coords)).tokens, means)
    )
    close(ours, theirs, atol=1e-12)
    assert (ours.abs().sum(2) > 0).sum() > 8  # several tokens of a vector
    assert ((weights > 0).any(2) == (ours.abs().sum(2) > 0)).all()  # and none that nobody voted for


@pytest.mark.parametrize(
    ("vectors", "weights", "message"),
    [
        (unit(3, DIM)[0], torch.ones(3), r"vectors \(R, D\) and weights \(R,\), not \(16,\) and \(3,\)"),
        (unit(3, DIM), torch.ones(4), r"not \(3, 16\) and \(4,\)"),
        (2 * unit(3, DIM), torch.ones(3), "not of unit length"),
        (unit(3, DIM) * torch.nan, torch.ones(3), "not of unit length"),
        (unit(3, DIM), torch.tensor([1.0, 0.0, 1.0]), "weights that are not above 0"),
        (unit(3, DIM), torch.tensor([1.0, torch.nan, 1.0]), "weights that are not above 0"),
    ],
)
def test_what_is_no_bank_is_refused(vectors, weights, message):
    made = make_compressor(MergeConfig(compressor="querybank"))
    for take in (made.fit_queries, lambda *parts: made.load_state(dict(zip(("vectors", "weights"), parts)))):
        with pytest.raises(InputError, match=message):
            take(vectors, weights)


def test_a_bank_of_another_width_is_refused():
    with pytest.raises(InputError, match="the query bank has 8 components, tokens have 16; make a bank"):
        compressor(3, unit(5, 8))(images())


# --- which tokens stand for all ---------------------------------------------------------------------------------------


def test_equal_tokens_are_one_with_their_weights_together():
    three = unit(3, DIM)
    tokens = torch.cat([three[[0, 1, 0, 2, 1, 0]] + 1e-6, three[:1]])
    rows, weights = sample_queries(tokens, torch.tensor([1.0, 2, 3, 4, 5, 6, 7]), 100)
    assert (rows.tolist(), weights.tolist()) == ([0, 1, 3], [17, 7, 4])
    assert sample_queries(tokens, None, 3)[1].tolist() == [4, 2, 1]


def test_priority_sampling_is_unbiased_and_keeps_the_heavy():
    weights = torch.tensor([100.0, *[1.0] * 40], dtype=torch.float64)
    values = torch.rand(41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    random, sums, heavy = np.random.default_rng(5), [], 0
    for _ in range(4000):
        rows, shares = draw(weights, torch.from_numpy(random.random(41)), 10)
        assert len(rows) == 10
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert (shares >= weights[rows]).all()
        heavy += 0 in rows.tolist()
        sums.append(float((shares * values[rows]).sum()))
    exact = float((weights * values).sum())
    assert abs(np.mean(sums) - exact) < 4 * np.std(sums) / np.sqrt(len(sums))
    assert np.std(sums) < 0.2 * exact
    assert heavy == 4000
    rows, shares = draw(torch.ones(50, dtype=torch.float64), torch.from_numpy(random.random(50)), 20)
    assert len(set(shares.tolist())) == 1  # who weighs the same counts the same


def test_the_sample_is_the_same_each_time_and_of_tokens_that_were_asked():
    tokens = unit(500, DIM)
    made, again = compressor(4, tokens, size=64), compressor(4, tokens, size=64)
    assert made.vectors.shape == (64, DIM)
    assert torch.equal(made.vectors, again.vectors)
    assert ((made.vectors @ tokens.T).amax(1) > 1 - 1e-6).all()
    assert isinstance(made, QueryBank)
    other = make_compressor(made.settings)
    other.load_state(made.state())
    assert torch.equal(other(images()).tokens, made(images()).tokens)
    assert make_compressor(made.settings).state() == {}


# --- banks of texts -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen(base):
    """The small ColPali; tests that take another projector put its own back."""
    return Retriever.load(str(base), dtype=torch.float32)


@pytest.fixture
def own(frozen):
    yield frozen
    frozen.use_projector(frozen.base_projector)


@pytest.fixture(scope="module")
def captions(world):
    return captions_of(flickr.load_split(world, "train", boxes=False))


def made_bank(encoder, texts, size=40, source="a test", batch_size=7):
    return query_states(encoder, texts, size, source, batch_size).bank(encoder.current_projector())


def other_projector(encoder, seed=0):
    base = encoder.base_projector
    noise = torch.randn(base.weight.shape, generator=torch.Generator().manual_seed(seed))
    return Projector(base.weight + 0.1 * noise, base.bias)


def test_a_bank_holds_the_texts_own_tokens_and_no_others(own, captions):
    bank = made_bank(own, captions[:5], size=1000)
    expected, every = [], 0
    for text in captions[:5]:
        inputs = own.query_inputs([text])
        query = own.encode_queries(inputs)
        for token, valid, (start, end) in zip(query.tokens[0], query.mask[0], inputs["offsets"][0].tolist()):
            every += bool(valid)
            if valid and start >= 0:
                assert text[start:end]
                expected.append(token)
    assert len(expected) < every - 5 * 5  # prompt and augmentation were left out
    expected = torch.stack(expected)
    assert float(bank.weights.sum()) == len(expected)
    close((bank.vectors @ expected.T).amax(1), torch.ones(len(bank.vectors)))
    close((expected @ bank.vectors.T).amax(1), torch.ones(len(expected)))


def test_a_bank_depends_on_the_texts_not_on_their_order_or_batches(own, captions):
    bank = made_bank(own, captions)
    assert len(bank.vectors) == 40
    turned = made_bank(own, captions[::-1], batch_size=3)
    close(turned.vectors, bank.vectors)
    assert turned.origin == bank.origin
    assert bank.origin.count == len(captions)
    assert made_bank(own, captions[1:]).origin.texts != bank.origin.texts
    twice = made_bank(own, [*captions[:4], captions[0]], size=1000)
    once = made_bank(own, captions[:4], size=1000)
    assert torch.equal(twice.vectors, once.vectors)
    more = twice.weights - once.weights
    assert sorted(set(more.tolist())) == [0, 1]
    length = made_bank(own, captions[:1], size=1000).weights.sum()
    assert more.sum() == length
    assert twice.origin.count == 5


def test_a_bank_follows_another_projector(own, captions):
    states = query_states(own, captions, 30, "a test", 8)
    projector = other_projector(own)
    moved = states.bank(projector)
    assert moved.projector == projector.hash != states.bank(own.base_projector).projector
    own.use_projector(projector)
    close(moved.vectors, own.project(states.hidden))
    assert (moved.vectors - states.bank(own.base_projector).vectors).abs().max() > 0.05


def test_texts_without_tokens_are_refused(own):
    with pytest.raises(InputError, match=r"a query bank needs texts, and there is none \(nothing\)"):
        made_bank(own, ["", "  "], source="nothing")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lines_of_a_file(tmp_path, encoding):
    file = tmp_path / "queries.txt"
    file.write_bytes("a red dog\n\n  zwei Bären \r\na red dog\n".encode(encoding) + "word ".encode(encoding)[-5:] * 0)
    assert read_texts(file) == ["a red dog", "zwei Bären", "a red dog"]
    file.write_bytes(("word " * 400).encode(encoding))
    assert len(read_texts(file)[0]) == 999


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; name one with a caption"),
        (b"", "holds no text"),
        (b"\n \n", "holds no text"),
        (b"caf\xe9\n", r"not utf-8 \(byte 3\); save it as UTF-8"),
        (b"a\0b\n", "holds NUL"),
    ],
)
def test_a_file_that_holds_no_texts_is_refused(tmp_path, content, message):
    file = tmp_path / "queries.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_texts(file)
    assert str(file) in str(caught.value)


def test_a_bank_comes_back_and_is_refused_elsewhere(own, captions, tmp_path):
    bank = made_bank(own, captions)
    save_bank(tmp_path / FILE, bank)
    for found in (read_bank(tmp_path / FILE), load_bank(tmp_path, own), load_bank(tmp_path / FILE, own)):
        assert (found.hash, found.origin, found.projector) == (bank.hash, bank.origin, bank.projector)
        assert torch.equal(found.vectors, bank.vectors)
    assert verify(tmp_path).damages == []
    assert bank.describe() == f"40 vectors of {len(captions)} texts, a test"
    projector = other_projector(own)
    own.use_projector(projector)
    with pytest.raises(InputError, match=f"is of projector {bank.projector[:12]}, not of {projector.hash[:12]}"):
        load_bank(tmp_path, own)
    own.use_projector(own.base_projector)
    other = dataclasses.replace(bank.origin, model=dataclasses.replace(bank.origin.model, weights="f" * 64))
    save_bank(tmp_path / FILE, dataclasses.replace(bank, origin=other))
    with pytest.raises(InputError, match=r"made with '.*', not with '.*' \(weights differs\)"):
        load_bank(tmp_path, own)


def test_a_damaged_bank_is_refused(own, captions, tmp_path):
    file = tmp_path / FILE
    save_bank(file, made_bank(own, captions))
    whole = file.read_bytes()
    for spoilt in (whole[:-1], whole[:100], b"", whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:]):
        file.write_bytes(spoilt)
        with pytest.raises(InputError, match="make one with"):
            read_bank(file)
        assert verify(tmp_path).damages
    own_file = save_projector(tmp_path, own.base_projector, own, MergeConfig()) or tmp_path / "projector.safetensors"
    with pytest.raises(InputError, match="it is no bank of format"):
        read_bank(own_file)
    file.unlink()
    with pytest.raises(InputError, match="there is no such file"):
        read_bank(file)


def test_the_compressor_of_an_evaluation(own, captions, world):
    merge = MergeConfig(num_regions=6, compressor="querybank", bank_size=40)
    records = flickr.load_split(world, "val", boxes=False)
    bank = made_bank(own, captions)
    made, given = (
        fitted_compressor(own, records, merge, 7, **how) for how in ({"bank_texts": captions}, {"bank": bank})
    )
    assert torch.equal(made.vectors, given.vectors)
    with pytest.raises(InputError, match="a query bank needs texts"):
        fitted_compressor(own, records, merge, 7)
    metrics = evaluate_records(own, records, merge, batch_size=4, bank=bank)
    assert 0 <= metrics["r@1"] <= 100


# --- in an index ----------------------------------------------------------------------------------------------------

MERGE = MergeConfig(num_regions=6, compressor="querybank", bank_size=50)


@pytest.fixture(scope="module")
def built(frozen, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "index"
    build_index(folder, world, ["val"], frozen, MERGE, batch_size=3, dtype="float32", assignments=True)
    return folder


def test_an_index_holds_the_bank_of_the_training_captions(built, own, captions, world):
    index = Index(built)
    bank = index.bank()
    expected = made_bank(own, captions, size=50, batch_size=3)
    assert torch.equal(bank.vectors, expected.vectors)
    assert index.manifest.bank == bank.hash == expected.hash
    assert index.manifest.bank_source == f"50 vectors of {len(captions)} texts, captions of train in {world}"
    records = flickr.load_split(world, "val", boxes=False)
    made = fitted_compressor(own, records, MERGE, 3, captions)
    visual = own.encode_images(own.record_inputs(records))
    (_, tokens, mask) = next(index.images("val"))
    close(tokens, made(visual).tokens)
    assert mask.all()
    assert json.loads((built / "manifest.json").read_text())["merge"]["bank_size"] == 50
    assert verify(built).damages == []


def test_an_index_is_added_to_with_its_own_bank(built, own, world, tmp_path):
    folder = shutil.copytree(built, tmp_path / "index")
    shutil.copytree(world, tmp_path / "world", ignore=shutil.ignore_patterns("train.txt"))  # nothing to make one of
    before = (folder / FILE).read_bytes()
    how = {"batch_size": 3, "dtype": "float32", "assignments": True}
    build_index(folder, tmp_path / "world", ["val", "test"], own, MERGE, **how)
    assert (folder / FILE).read_bytes() == before
    assert set(Index(folder).manifest.splits) == {"val", "test"}
    assert verify(folder).damages == []
    with pytest.raises(InputError, match=r"no query bank can be made of train \(.*give one as --bank FILE"):
        build_index(tmp_path / "new", tmp_path / "world", ["val"], own, MERGE)
    assert not (tmp_path / "new").exists()


def test_an_index_refuses_another_bank_and_a_damaged_one(built, own, world, captions, tmp_path):
    folder = shutil.copytree(built, tmp_path / "index")
    how = {"batch_size": 3, "dtype": "float32", "assignments": True}
    other = made_bank(own, captions[:9], size=50)
    with pytest.raises(
        InputError, match=f"holds an index with bank='{Index(folder).manifest.bank}', now '{other.hash}'"
    ):
        build_index(folder, world, ["val"], own, MERGE, bank=other, **how)
    bank = Index(folder).bank()
    save_bank(folder / FILE, other)
    assert any(FILE in line for line in verify(folder).damages)
    with pytest.raises(InputError, match="not the query bank that this index was made with"):
        Index(folder).bank()
    with pytest.raises(InputError, match="not the query bank that this index was made with"):
        build_index(folder, world, ["val"], own, MERGE, **how)
    (folder / FILE).unlink()
    assert any(FILE in line for line in verify(folder).damages)
    build_index(folder, world, ["val"], own, MERGE, bank=bank, **how)  # who has it restores it
    assert verify(folder).damages == []


def test_other_indexes_know_of_no_bank(own, world, tmp_path):
    build_index(tmp_path / "c", world, ["val"], own, MergeConfig(num_regions=6), limit_images=2)
    assert not (tmp_path / "c" / FILE).exists()
    assert Index(tmp_path / "c").bank() is None
    assert "bank" not in (tmp_path / "c" / "manifest.json").read_text()


def test_a_gallery_compresses_with_the_indexs_bank(built, own, world):
    records = flickr.load_split(world, "val", boxes=True)
    index = Index(built)
    scores, _ = index.scores("val")
    shown = [Shown("querybank", index.manifest.merge, index.projector(), scores, index.bank())]
    gallery = make_gallery(own, records, shown, shown, batch_size=4)
    assert gallery.cases
    (name, regions) = gallery.regions[0].assignments[0]
    assert name == "querybank"
    _, assignments, _ = next(index.assignments("val"))
    assert torch.equal(regions.flatten().long(), assignments[gallery.regions[0].image].long())


# --- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(world, tmp_path):
    """A folder of three pictures, and a fourth beside it."""
    found = sorted((world / "images" / "Images").iterdir())[:4]
    (tmp_path / "pictures").mkdir()
    for file in found[:3]:
        shutil.copy(file, tmp_path / "pictures")
    return tmp_path / "pictures", found[3]


def test_commands_make_a_bank_and_index_pictures_with_it(script, base, pictures, tmp_path, capsys):
    folder, more = pictures
    queries = tmp_path / "queries.txt"
    queries.write_text("a red circle\na blue square on the left\na red circle\n")
    model, bank = f"model.name={base}", tmp_path / "queries.safetensors"
    made = script("bank").main(["--texts", str(queries), "--out", str(bank), "--size", "9", model])
    assert f"{bank}: 9 vectors of 3 texts, lines of {queries}" in capsys.readouterr().out
    assert (made.origin.count, made.origin.size, len(made.vectors)) == (3, 9, 9)
    words = ["--images", str(folder), "--cache-dir", str(tmp_path / "index")]
    fresh = [model, "merge.compressor=querybank", "merge.num_regions=5"]
    with pytest.raises(InputError, match="querybank needs a query bank, and there is none beside the projector; give"):
        script("index").main([*words, *fresh])
    with pytest.raises(InputError, match=r"--bank .*: samer has no query bank"):
        script("index").main([*words, "--bank", str(bank), model])
    with pytest.raises(InputError, match=r"merge\.bank_size=8, but the query bank at hand was made with 9"):
        script("index").main([*words, "--bank", str(bank), *fresh, "merge.bank_size=8"])
    assert script("index").main([*words, "--bank", str(bank), *fresh]).images == 3
    assert Index(tmp_path / "index").manifest.merge.bank_size == 9
    bank.unlink()
    shutil.copy(more, folder)
    assert script("index").main(words).images == 4  # by its own bank
    assert Index(tmp_path / "index").bank().hash == made.hash
    other = tmp_path / "other.safetensors"
    script("bank").main(["--texts", str(queries), "--out", str(other), "--size", "8", model])
    with pytest.raises(InputError, match=rf"holds an index with bank={made.hash[:12]}, now [0-9a-f]{{12}}: it says"):
        script("index").main([*words, "--bank", str(other)])


def test_a_bank_of_a_data_set_from_stored_features(script, base, frozen, world, captions, tmp_path):
    write_features(tmp_path / "store", world, ["train"], frozen, dtype="float32")
    words = ["--data-root", str(world), "--out", str(tmp_path / FILE), f"model.name={base}", "merge.bank_size=30"]
    bank = script("bank").main([*words, "--features", str(tmp_path / "store")])
    expected = made_bank(frozen, captions, size=30)
    close(bank.vectors, expected.vectors)
    assert bank.origin.texts == expected.origin.texts
    assert bank.origin.source == f"captions of train in {world}"


# --- training through it --------------------------------------------------------------------------------------------


def test_the_bank_follows_the_projector_while_it_trains(own, world, captions):
    records = flickr.load_split(world, "train", boxes=True)
    states = query_states(own, captions, 40, "a test", 8)
    merge = MergeConfig(num_regions=6, compressor="querybank", bank_size=40)
    model = ProjectorModel(own, merge, 0.07, False, queries=states)
    rows = CaptionDataset(records).rows[:8]
    batch = Collator(own, load_config(None).objects)(rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        loss = model(**batch)["loss"]
        bank = states.bank(model.projection.projector())
        assert not model.compressors[0].vectors.requires_grad
        close(model.compressors[0].vectors, bank.vectors)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert (bank.vectors - states.bank(own.base_projector).vectors).abs().max() > 1e-3


def test_training_leaves_the_bank_of_the_final_projector(script, own, base, world, captions, tmp_path):
    output = tmp_path / "run"
    words = (
        f"model.name={base} data.root={world} merge.num_regions=[4,6] merge.compressor=querybank merge.bank_size=40 "
        f"train.output_dir={output} train.bf16=false train.train_batch_size=20 train.grad_accum_steps=1 "
        "train.num_train_epochs=1 train.learning_rate=5e-3 train.dataloader_num_workers=0 train.warmup_ratio=0"
    )
    result = train(load_config(None, words.split()))
    assert 0 <= result.validation["r@1"] <= 100
    projector = load_projector(output, own)
    assert (projector.weight - own.base_projector.weight).abs().max() > 1e-4
    tokens = query_states(own, captions, 40, "a test", 32)
    own.use_projector(projector)
    bank = load_bank(output, own)
    close(bank.vectors, own.project(tokens.hidden))
    assert torch.equal(bank.weights, tokens.weights)
    assert bank.origin.source == f"captions of train in {world}"
    words = ["--data-root", str(world), "--cache-dir", str(tmp_path / "index"), "--adapter-path", str(output)]
    script("cache").main([*words, "--splits", "val"])
    index = Index(tmp_path / "index")
    assert (index.manifest.bank, index.manifest.merge.bank_size) == (bank.hash, 40)
    assert index.size("val")[2] == 6
