"""Every compressor: the contract that all of them keep, and each against a naive computation of its own."""

import dataclasses
import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import naive_merge
from PIL import Image
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform

from samer.compressors import COMPRESSORS, Compressor, hpc, make_compressor
from samer.compressors.base import hard_merge, keep_best
from samer.compressors.grid import cells
from samer.compressors.hpool import row_distances, ward_labels
from samer.config import InputError, MergeConfig, load_config
from samer.coords import visual_coords
from samer.data import flickr
from samer.index.read import Index
from samer.index.write import build_index
from samer.merging import merge_tokens
from samer.retrievers.attention import ATTENTION
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector
from samer.tokens import MergedTokens, VisualTokens
from samer.training.loop import train

NAMES = list(COMPRESSORS)
ROOT = Path(__file__).resolve().parents[1]
PATCHES, TOKENS, DIM = 64, 70, 32
close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0)
NEEDS = {"hpc": ("last",), "sap-mean": ("middle_mean",), "sap-max": ("middle_max",)}


def scene(batch=3, seed=0, count=TOKENS):
    """Images with structure: six blobs on the grid and noise; the last `count` tokens of 8 x 8 patches and a prompt."""
    generator = torch.Generator().manual_seed(seed)
    coords = visual_coords(8, 8, prompt_tokens=TOKENS - PATCHES)
    blob = (coords * torch.tensor([3.0, 2.0])).long().clamp(max=torch.tensor([2, 1])) @ torch.tensor([1, 3])
    centres = torch.randn(batch, 6, DIM, generator=generator)
    tokens = centres[:, blob] + 0.8 * torch.randn(batch, TOKENS, DIM, generator=generator)
    patches = (torch.arange(TOKENS) < PATCHES).expand(batch, -1)
    attention = {name: torch.rand(batch, TOKENS, generator=generator) * patches for name in ATTENTION}
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    whole = VisualTokens(F.normalize(tokens, dim=-1), coords.expand(batch, -1, -1), None, patches, seeds, attention)
    return take(whole, lambda value: value[:, TOKENS - count :] if value.dim() > 1 else value)


def take(visual, change):
    """`visual` with every tensor changed."""
    parts = {name: change(value) for name, value in vars(visual).items() if isinstance(value, torch.Tensor)}
    return VisualTokens(**parts, attention={name: change(value) for name, value in visual.attention.items()})


def alone(visual, row):
    return take(visual, lambda value: value[row : row + 1])


def padded(images, left, width=TOKENS + 3):
    """One batch of single images, padded to `width` with what must not matter."""

    def pad(values, filler):
        rests = [value.new_full((1, width - value.shape[1], *value.shape[2:]), filler) for value in values]
        return torch.cat([torch.cat([rest, v] if left else [v, rest], dim=1) for rest, v in zip(rests, values)])

    return VisualTokens(
        pad([image.tokens for image in images], torch.nan),
        pad([image.coords for image in images], torch.inf),
        pad([torch.ones_like(image.patches) for image in images], False),
        pad([image.patches for image in images], True),
        torch.cat([image.seeds for image in images]),
        {name: pad([image.attention[name] for image in images], torch.inf) for name in ATTENTION},
    )


@functools.cache
def codebook():
    compressor = make_compressor(MergeConfig(compressor="hpc"))
    compressor.fit([scene(5, seed=90), scene(3, seed=91)])
    return compressor.codes


def make(name, regions):
    compressor = make_compressor(MergeConfig(num_regions=regions, compressor=name))
    if compressor.needs_corpus:
        compressor.codes = codebook()
    if compressor.needs_queries:  # queries about what the images hold, and others
        words = torch.randn(300, DIM, generator=torch.Generator().manual_seed(80))
        seen = scene(3, seed=81).tokens.flatten(0, 1)
        compressor.fit_queries(F.normalize(torch.cat([words, seen]), dim=-1), torch.arange(510) % 3 + 1.0)
    return compressor


def equal(ours, theirs):
    return all(map(torch.equal, vars(ours).values(), vars(theirs).values()))


def partition(labels):
    return {frozenset(np.flatnonzero(np.asarray(labels) == label).tolist()) for label in set(np.asarray(labels))}


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regions", [1, 9, 49, 66])
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, regions):
    short = [scene(1, seed=7, count=count) for count in (TOKENS, 40, 12)]
    for visual in (scene(), padded(short, left=True), padded(short, left=False)):
        merged = make(name, regions)(visual)
        batch, count, _ = visual.tokens.shape
        places = count if name == "none" else regions
        valid = torch.ones(batch, count, dtype=torch.bool) if visual.mask is None else visual.mask
        assert merged.tokens.shape == (batch, places, DIM)
        assert merged.mask.shape == merged.coords.shape[:2] == (batch, places)
        assert merged.weights.shape == (*merged.assignments.shape, places) == (batch, count, places)
        filled = merged.mask.sum(1)
        assert (filled >= 1).all()
        assert (filled == valid.sum(1) if name == "none" else filled <= regions).all()
        assert torch.isfinite(merged.tokens).all()
        close(merged.tokens.norm(dim=-1), merged.mask.float())
        assert (merged.tokens[~merged.mask] == 0).all()
        assert ((merged.coords >= 0) & (merged.coords <= 1)).all()
        mass = merged.weights.sum(2)
        assert (mass[~valid] == 0).all()
        if name == "querybank":  # its weights are shares of a vector, not of a token
            mass = merged.weights.sum(1)
        assert ((mass - 1).abs() < 1e-5).logical_or(mass == 0).all()
        assert (merged.assignments[~valid] == -1).all()
        assert ((merged.assignments >= -1) & (merged.assignments < places)).all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_say_which_token_went_where(name):
    short = [scene(1, seed=7, count=count) for count in (TOKENS, 40, 12)]
    for visual in (scene(), padded(short, left=True)):
        merged = make(name, 9)(visual)
        means = F.normalize(merged.weights.transpose(1, 2) @ visual.tokens.nan_to_num(nan=0), dim=-1)
        close(merged.tokens, codebook()[(means @ codebook().T).argmax(-1)] if name == "hpc" else means)
        if name not in ("samer", "querybank"):
            assert merged.weights.unique().tolist() == [0, 1]
            went = torch.where(merged.weights.sum(2) > 0, merged.weights.argmax(2), -1)
            assert torch.equal(merged.assignments, went)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_matter(name, left):
    images = [scene(1, seed=seed, count=count) for seed, count in enumerate((TOKENS, 40, 12, 9, 5))]
    visual = padded(images, left)
    together = make(name, 9)(visual)
    for row, image in enumerate(images):
        single, valid, filled = make(name, 9)(image), visual.mask[row], together.mask[row]
        assert filled.nonzero().tolist() == single.mask[0].nonzero().tolist()
        close(together.tokens[row, filled], single.tokens[0, single.mask[0]])
        close(together.coords[row, filled], single.coords[0, single.mask[0]])
        close(together.weights[row][valid][:, filled], single.weights[0][:, single.mask[0]])
        assert torch.equal(together.assignments[row, valid], single.assignments[0])


@pytest.mark.parametrize("name", NAMES)
def test_batch_and_repetition_do_not_matter(name):
    visual = scene(4)
    together = make(name, 9)(visual)
    assert equal(together, make(name, 9)(visual))
    for row in range(4):
        single = make(name, 9)(alone(visual, row))
        close(single.tokens[0], together.tokens[row])
        assert torch.equal(single.mask[0], together.mask[row])
        assert torch.equal(single.assignments[0], together.assignments[row])


@pytest.mark.parametrize("name", NAMES)
def test_at_most_k_tokens_are_kept_as_they_are(name):
    visual = scene()
    for regions in (TOKENS, TOKENS + 30):
        every = torch.arange(TOKENS).expand(3, -1)
        expected = (visual.tokens, visual.coords, every >= 0, torch.eye(TOKENS).expand(3, -1, -1), every)
        assert equal(make(name, regions)(visual), MergedTokens(*expected))
    images = [scene(1, seed=count, count=count) for count in (TOKENS, 12, 5, 1)]
    for left in (False, True):
        merged = make(name, 12)(padded(images, left))
        for row, count in enumerate((12, 5, 1), start=1):
            assert torch.equal(merged.tokens[row, :count], images[row].tokens[0])
            assert torch.equal(merged.coords[row, :count], images[row].coords[0])
            assert merged.mask[row].tolist() == [True] * count + [False] * (merged.mask.shape[1] - count)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_tokens(name):
    visual = padded([scene(1, seed=1), scene(1, seed=2, count=40), scene(1, seed=3, count=5)], left=True)
    visual.tokens.requires_grad_()
    merged = make(name, 9).for_training()(visual)
    probe = torch.randn(merged.tokens.shape, generator=torch.Generator().manual_seed(1))
    (merged.tokens * probe).sum().backward()
    assert torch.isfinite(visual.tokens.grad).all()
    assert (visual.tokens.grad.abs().amax((1, 2)) > 1e-3).all()
    assert (visual.tokens.grad[~visual.mask] == 0).all()
    whole = dataclasses.replace(scene(), tokens=scene().tokens.requires_grad_())
    assert make(name, 9)(whole).tokens.requires_grad == (name != "hpc")  # no gradient passes a code


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regions", [9, TOKENS])
def test_half_precision_comes_out_as_float32(name, regions):
    visual = scene()
    half = dataclasses.replace(visual, tokens=visual.tokens.bfloat16())
    wide = dataclasses.replace(visual, tokens=half.tokens.float())
    with torch.autocast("cpu", torch.bfloat16):
        merged = make(name, regions)(half)
    assert equal(merged, make(name, regions)(wide))
    assert merged.tokens.dtype == merged.weights.dtype == merged.coords.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused(name):
    compressor, visual = make(name, 9), scene()
    holed = visual.tokens.clone()
    holed[1, 3, 5] = float("nan")
    empty = torch.ones(3, TOKENS, dtype=torch.bool)
    empty[2] = False
    for changes, message in (
        ({"tokens": visual.tokens[0]}, "tokens must be"),
        ({"coords": visual.coords[:, :9]}, "coords of shape"),
        ({"mask": empty[:, :9]}, "mask of shape"),
        ({"mask": empty}, "image 2 of the batch has no valid token"),
        ({"tokens": holed}, "image 1 of the batch has NaN"),
    ):
        with pytest.raises(InputError, match=message):
            compressor(dataclasses.replace(visual, **changes))
    for signal in compressor.needs:
        others = {key: value for key, value in visual.attention.items() if key != signal}
        with pytest.raises(InputError, match=f"'{name}' needs the attention signal '{signal}'"):
            compressor(dataclasses.replace(visual, attention=others))


def test_what_is_missing_is_named():
    assert {name: kind.needs for name, kind in COMPRESSORS.items() if kind.needs} == NEEDS
    assert [name for name, kind in COMPRESSORS.items() if kind.needs_corpus] == ["hpc"]
    assert [name for name, kind in COMPRESSORS.items() if kind.needs_queries] == ["querybank"]
    with pytest.raises(InputError, match=r"seeds, one per image"):
        make("random", 9)(dataclasses.replace(scene(), seeds=None))
    with pytest.raises(InputError, match="hpc has no codebook yet; call fit"):
        make_compressor(MergeConfig(num_regions=9, compressor="hpc"))(scene())
    with pytest.raises(InputError, match="querybank has no bank of queries yet; call fit_queries"):
        make_compressor(MergeConfig(num_regions=9, compressor="querybank"))(scene())


# --- each against its own oracle ------------------------------------------------------------------------------------


def test_samer_is_the_merge_bit_for_bit():
    labels = torch.randint(0, 4, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    settings = MergeConfig(num_regions=9, spatial_weight=0.5, object_penalty=2.0, center_init="farthest")
    images = [scene(1, seed=k, count=count) for k, count in enumerate((TOKENS, 30, 4))]
    for visual in (scene(), padded(images, left=False, width=TOKENS)):
        for use in (labels, None):
            merged = merge_tokens(visual.tokens, visual.coords, settings, mask=visual.mask, instance_labels=use)
            assert equal(make_compressor(settings)(visual, use), merged)


def naive_ward(points, clusters):
    """Ward's clustering of rows by the Lance-Williams recurrence on Euclidean distances, one pair at a time."""
    members = {k: {k} for k in range(len(points))}
    between = {(a, b): np.linalg.norm(points[a] - points[b]) for a in members for b in members if a < b}
    while len(members) > clusters:
        a, b = min(between, key=between.get)
        joined = between.pop((a, b))
        for k in members.keys() - {a, b}:
            to_a, to_b = (between.pop((min(k, x), max(k, x))) for x in (a, b))
            sizes = [len(members[x]) for x in (k, a, b)]
            square = (sizes[0] + sizes[1]) * to_a**2 + (sizes[0] + sizes[2]) * to_b**2 - sizes[0] * joined**2
            between[min(k, a), max(k, a)] = np.sqrt(square / sum(sizes))
        members[a] |= members.pop(b)
    return {frozenset(rows) for rows in members.values()}


def test_hpool_is_ward_on_the_rows_of_the_distance_matrix():
    different = 0
    for seed in range(6):
        visual = scene(1, seed=seed, count=20)
        rows = visual.tokens[0].double().numpy()
        distances = 1 - rows @ rows.T
        for regions in (2, 5, 9):
            merged = make("hpool", regions)(visual)
            tree = linkage(distances, method="ward", metric="euclidean")
            ours = partition(merged.assignments[0])
            assert ours == partition(fcluster(tree, t=regions, criterion="maxclust"))
            assert ours == naive_ward(distances, regions)
            condensed = linkage(squareform(distances, checks=False), method="ward")
            different += ours != partition(fcluster(condensed, t=regions, criterion="maxclust"))
    assert different  # the quirk of the pooler that people use: not Ward on the distances themselves


def square_ward(tokens, regions):
    """The pooler as people use it: the square matrix given to scipy as observations."""
    rows = tokens.double().numpy()
    tree = linkage(1 - rows @ rows.T, method="ward", metric="euclidean")
    return fcluster(tree, t=regions, criterion="maxclust")


def looked_at(count, directions, noise, common=0.0, seed=0):
    """Unit tokens (count, 128) around a few directions, and a common one, as a retriever's are."""
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator)
    picks = torch.randint(0, directions, (count,), generator=generator)
    return F.normalize(normal(directions, 128)[picks] + noise * normal(count, 128) + common * normal(128), dim=-1)


@pytest.mark.parametrize(
    "tokens",
    [
        F.normalize(torch.randn(300, 128, generator=torch.Generator().manual_seed(3)), dim=-1),
        looked_at(400, 20, 0.5),
        looked_at(400, 20, 0.05, common=5.0),  # all within a narrow cone
        looked_at(90, 12, 0.3).bfloat16().float(),  # as a backbone in bfloat16 gives them; not quite of unit length
        looked_at(257, 40, 0.5)[:, :16] * 1.0,  # fewer dimensions than clusters
    ],
    ids=["random", "blobs", "cone", "bfloat16", "narrow"],
)
def test_hpool_gives_the_partition_of_the_square_matrix(tokens):
    distances = 1 - tokens.double().numpy() @ tokens.double().numpy().T
    np.testing.assert_allclose(row_distances(tokens.double()), pdist(distances), rtol=1e-7)
    for regions in (1, 2, 8, 16, 64, 80):
        assert partition(ward_labels(tokens.double(), regions)) == partition(square_ward(tokens, regions))


def test_hpool_gives_the_partition_of_the_square_matrix_on_features_of_a_retriever():
    retriever = Retriever.load(str(ROOT / "assets" / "retriever"))
    pictures = [Image.fromarray(picture) for picture in painted(4)]
    with torch.no_grad():
        tokens = retriever.project(retriever.hidden_states(retriever.image_inputs(pictures)))
    for image in tokens:
        for regions in (4, 16, 64):
            assert partition(ward_labels(image.double(), regions)) == partition(square_ward(image, regions))


def painted(count):
    """Pictures (count, 224, 224, 3) uint8 of soft shapes and some grain."""
    generator = torch.Generator().manual_seed(5)
    normal = functools.partial(torch.randn, generator=generator)
    shapes = sum(F.interpolate(normal(count, 3, side, side), size=(224, 224), mode="bicubic") for side in (3, 8, 30))
    return (128 + 45 * shapes + 4 * normal(count, 3, 224, 224)).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def test_hpool_keeps_equal_tokens_together():
    few = looked_at(30, 30, 0.4)
    tokens = few.repeat(7, 1)[torch.randperm(210, generator=torch.Generator().manual_seed(2))]
    assert (np.sort(row_distances(tokens.double()))[: 30 * 21] == 0).all()
    for regions in (5, 20, 30):
        assert partition(ward_labels(tokens.double(), regions)) == partition(square_ward(tokens, regions))
    assert len(partition(ward_labels(tokens.double(), 64))) == 30  # the square matrix's rounding would part equal ones


def test_hard_merge_equals_a_loop():
    visual = scene(3)
    mask = torch.arange(TOKENS) < torch.tensor([TOKENS, 30, 11])[:, None]
    labels = torch.randint(-1, 6, (3, TOKENS), generator=torch.Generator().manual_seed(4))
    labels[labels == 4] = 2  # nothing goes to 4
    for valid in (None, mask):
        merged = hard_merge(dataclasses.replace(visual, mask=valid), labels, 7)
        for row, k in itertools.product(range(3), range(7)):
            own = [i for i in range(TOKENS) if labels[row, i] == k and (valid is None or valid[row, i])]
            assert bool(merged.mask[row, k]) == bool(own)
            assert merged.weights[row, :, k].nonzero().flatten().tolist() == own
            assert (merged.assignments[row] == k).nonzero().flatten().tolist() == own
            if own:
                mean = sum(visual.tokens[row, i] for i in own) / len(own)
                close(merged.tokens[row, k], mean / mean.norm())
                close(merged.coords[row, k], sum(visual.coords[row, i] for i in own) / len(own))
        assert not merged.mask[:, [4, 6]].any()


def sorted_best(salience, patches, valid, regions):
    """Positions kept of one image: by falling salience, first among equals, patches first; in order."""
    worth = [float("-inf") if value != value else value for value in salience.tolist()]
    keys = [(not patches[i], -worth[i] if patches[i] else 0, i) for i in range(len(worth)) if valid[i]]
    return sorted(i for *_, i in sorted(keys)[:regions])


@pytest.mark.parametrize("regions", [1, 9, 62, 66])
@pytest.mark.parametrize("turned", [False, True])
def test_keep_best_equals_a_sort(regions, turned):
    visual = scene(4)
    salience = torch.randint(-3, 4, (4, TOKENS), generator=torch.Generator().manual_seed(regions)).float()
    salience[0, 5], salience[1, 6], salience[2, 7] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    if turned:  # prompt tokens in front
        salience = salience.nan_to_num(nan=0).flip(1)
        visual = dataclasses.replace(visual, patches=visual.patches.flip(1))
    mask = torch.arange(TOKENS) >= torch.tensor([0, 1, 30, 62])[:, None]
    for valid in (None, mask):
        there = torch.ones_like(mask) if valid is None else valid
        merged = keep_best(dataclasses.replace(visual, mask=valid), salience, regions)
        for row in range(4):
            expected = sorted_best(salience[row], visual.patches[row], there[row], regions)
            assert torch.equal(merged.tokens[row][merged.mask[row]], visual.tokens[row, expected])
            assert torch.equal(merged.coords[row][merged.mask[row]], visual.coords[row, expected])
            assert (merged.assignments[row] >= 0).nonzero().flatten().tolist() == expected
            assert merged.assignments[row, expected].tolist() == merged.mask[row].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", [*NEEDS, "random"])
def test_pruning_keeps_the_best_patches_and_hpc_their_codes(name):
    visual = scene(6)
    merged, kept = make(name, 20)(visual), make(name, 20).for_training()(visual)
    for row in range(6):
        own = (merged.assignments[row] >= 0).nonzero().flatten().tolist()
        assert len(own) == 20
        assert max(own) < PATCHES
        assert torch.equal(kept.tokens[row], visual.tokens[row, own])
        for signal in NEEDS.get(name, ()):
            assert own == sorted(visual.attention[signal][row].topk(20).indices.tolist())
        for place, i in enumerate(own if name == "hpc" else ()):
            distances = [float((visual.tokens[row, i] - code).norm()) for code in codebook()]
            assert torch.equal(merged.tokens[row, place], codebook()[distances.index(min(distances))])
    most = make(name, 66)(visual).assignments >= 0
    assert (most == (torch.arange(TOKENS) < 66)).all()  # all patches, then the first two prompt tokens


def test_random_is_nested_and_depends_on_the_image_alone():
    visual = scene(5)
    kept = {k: make("random", k)(visual).assignments >= 0 for k in (1, 5, 6, 32, 63)}
    for small, large in zip([1, 5, 6, 32], [5, 6, 32, 63]):
        assert (kept[large] | ~kept[small]).all()
        assert (kept[small].sum(1) == small).all()
    assert len({tuple(row.tolist()) for row in kept[32]}) == 5
    same = dataclasses.replace(visual, tokens=visual.tokens.flip(0), seeds=visual.seeds[:1].expand(5))
    assert torch.equal(make("random", 32)(same).assignments >= 0, kept[32][:1].expand(5, -1))


@pytest.mark.parametrize("regions", [1, 8])
def test_random_is_uniform(regions):
    count = 4000
    coords, patches = visual_coords(8, 8, prompt_tokens=6), torch.arange(TOKENS) < PATCHES
    for seeds in (torch.arange(count), torch.arange(count) << 40):  # neighbours, low and high bits
        many = VisualTokens(torch.ones(count, TOKENS, 1), coords, None, patches.expand(count, -1), seeds)
        kept = (make("random", regions)(many).assignments >= 0)[:, :PATCHES].double()
        share = regions / PATCHES
        spread = (kept.sum(0) - count * share).square().sum() / (count * share * (1 - share))
        assert 20 < spread < 130  # chi-square with 63 degrees of freedom: 63 +- 11
        if regions > 1:  # two patches are kept together as often as chance has it
            pairs = (kept.T @ kept)[~torch.eye(PATCHES, dtype=torch.bool)]
            expected = count * share * (regions - 1) / (PATCHES - 1)
            assert 0.8 < ((pairs - expected).square() / expected).mean() < 1.25


def test_grid_cells_are_exact_blocks():
    tokens = F.normalize(torch.randn(2, 1030, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    coords = visual_coords(32, 32, prompt_tokens=6)
    patches = (torch.arange(1030) < 1024).expand(2, -1)
    merged = make("grid", 64)(VisualTokens(tokens, coords, None, patches))
    blocks = tokens[:, :1024].reshape(2, 8, 4, 8, 4, 8).mean((2, 4)).reshape(2, 64, 8)
    close(merged.tokens, F.normalize(blocks, dim=-1))
    places = coords[:1024].reshape(8, 4, 8, 4, 2).mean((1, 3)).reshape(64, 2)
    close(merged.coords, places.expand(2, -1, -1))
    assert merged.mask.all()
    assert (merged.assignments[:, 1024:] == -1).all()


def test_cells_use_the_budget_best():
    for regions in [*range(1, 130), 256, 1000]:
        rows, columns = cells(regions)
        pairs = [(r, c) for r in range(1, regions + 1) for c in range(r, 2 * r + 1) if r * c <= regions]
        assert 1 <= rows <= columns <= 2 * rows
        assert (rows * columns, rows - columns) == max((r * c, r - c) for r, c in pairs)
    assert [cells(k) for k in (1, 3, 7, 25, 32, 64)] == [(1, 1), (1, 2), (2, 3), (5, 5), (4, 8), (8, 8)]


def test_hpc_fits_the_same_codes_however_the_corpus_is_batched(monkeypatch):
    corpus = scene(8, seed=90)
    images = [alone(corpus, row) for row in range(8)]

    def fit(batches):
        compressor = make_compressor(MergeConfig(num_regions=9, compressor="hpc"))
        compressor.fit(batches)
        return compressor

    codes = fit([corpus]).codes
    assert codes.shape == (256, DIM)
    close(codes.norm(dim=-1), torch.ones(256))
    assert torch.equal(fit(images).codes, codes)
    assert torch.equal(fit(iter([padded(images[:3], True), padded(images[3:], False)])).codes, codes)
    few = fit(images[:1])  # fewer tokens than codes: every token is its own
    assert few.codes.shape == (TOKENS, DIM)
    close(few(images[0]).tokens, few.for_training()(images[0]).tokens)
    monkeypatch.setattr(hpc, "FIT_TOKENS", 8)
    spaced = corpus.tokens.flatten(0, 1)[[0, 80, 160, 240, 319, 399, 479, 559]]
    close((fit([corpus]).codes @ spaced.T).sort().values[:, -1], torch.ones(8))


@pytest.mark.parametrize("regions", [1, 4, 16])
def test_kmeans_is_lloyd_to_the_end(regions):
    visual = scene(4)
    merged = make("kmeans", regions)(visual)
    oracle = MergeConfig(num_regions=regions, cluster_iters=20, spatial_weight=0.0, center_init="farthest")
    for row in range(4):
        own = merged.assignments[row]
        assert torch.equal(own, naive_merge(visual.tokens[row], visual.coords[row], oracle)[2].argmax(1))
        for k in range(regions):
            mean = visual.tokens[row][own == k].sum(0)
            close(merged.tokens[row, k], mean / mean.norm())
        assert torch.equal((visual.tokens[row] @ merged.tokens[row].T).argmax(1), own)  # Lloyd's has settled


# --- end to end -----------------------------------------------------------------------------------------------------


class EveryOther(Compressor):
    """Tokens 0, 2, 4, ... up to the budget."""

    def compress(self, visual, instance_labels):
        place = torch.arange(visual.tokens.shape[1])
        slot = torch.where((place % 2 == 0) & (place < 2 * self.settings.num_regions), place // 2, -1)
        return hard_merge(visual, slot.expand(len(visual.tokens), -1), self.settings.num_regions)


@pytest.fixture(scope="module")
def frozen(base):
    return Retriever.load(str(base))


def run(base, world, output, name, regions=12):
    """One step of training and a validation."""
    words = (
        f"model.name={base} data.root={world} data.limit_train_images=2 data.limit_eval_images=2 "
        f"merge.num_regions={regions} merge.compressor={name} train.output_dir={output} train.bf16=false "
        "train.train_batch_size=10 train.grad_accum_steps=1 train.num_train_epochs=1 train.learning_rate=5e-3 "
        "train.dataloader_num_workers=0 train.warmup_ratio=0"
    )
    return train(load_config(None, words.split()))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize("name", [*NAMES, "toy"])
def test_every_name_trains_a_step_and_builds_a_cache(name, frozen, base, world, tmp_path, monkeypatch):
    monkeypatch.setitem(COMPRESSORS, "toy", EveryOther)
    result = run(base, world, tmp_path / "run", name)
    assert result.steps == 1
    assert 0 <= result.validation["r@1"] <= 100
    trained = load_projector(tmp_path / "run", frozen)
    assert (trained.weight - frozen.base_projector.weight).abs().max() > 1e-4
    settings = MergeConfig(num_regions=12, compressor=name)
    build_index(tmp_path / "c", world, ["test"], frozen, settings, batch_size=3, dtype="float32", limit_images=4)
    scores, image_of = Index(tmp_path / "c").scores("test")
    assert scores.shape == (20, 4)
    assert torch.isfinite(scores).all()
    assert image_of.tolist() == [k for k in range(4) for _ in range(5)]
    assert Index(tmp_path / "c").size("test")[2] == (TOKENS if name == "none" else 12)


def test_a_compressor_of_ones_own_reaches_the_scores(frozen, world, tmp_path, monkeypatch):
    monkeypatch.setitem(COMPRESSORS, "toy", EveryOther)
    settings = MergeConfig(num_regions=20, compressor="toy")
    build_index(tmp_path / "c", world, ["test"], frozen, settings, batch_size=3, dtype="float32", limit_images=4)
    scores, _ = Index(tmp_path / "c").scores("test")
    records = flickr.load_split(world, "test", boxes=False, limit_images=4)
    images = frozen.encode_images(frozen.record_inputs(records)).tokens
    queries = [frozen.encode_queries(frozen.query_inputs([c.text])).tokens[0] for r in records for c in r.captions]
    expected = [[(query @ image[:40:2].T).amax(1).mean() for image in images] for query in queries]
    close(scores, torch.tensor(expected))


def test_an_unknown_name_is_refused_before_any_work(frozen, base, tmp_path):
    listed = "'hpol' is unknown; use one of grid, hpc, hpool, kmeans, none, querybank, random, samer, sap-max, sap-mean"
    with pytest.raises(InputError, match=listed):
        make_compressor(MergeConfig(compressor="hpol"))
    with pytest.raises(InputError, match=listed):
        build_index(tmp_path / "c", tmp_path / "nowhere", ["test"], frozen, MergeConfig(compressor="hpol"))
    with pytest.raises(InputError, match=listed):
        run(tmp_path / "no-model", tmp_path / "nowhere", tmp_path / "run", "hpol")
    assert not any(tmp_path.iterdir())


def test_grid_cells_are_exact_at_their_borders():
    assert make("grid", 49)(scene()).mask.all()


@pytest.mark.parametrize("side", ["patches", "seeds", "attention"])
def test_sides_of_another_shape_are_refused(side):
    visual = scene()
    wrong = {
        "patches": dataclasses.replace(visual, patches=visual.patches[:, 1:]),
        "seeds": dataclasses.replace(visual, seeds=visual.seeds[:1]),
        "attention": dataclasses.replace(visual, attention={"last": visual.attention["last"][:1]}),
    }
    with pytest.raises(InputError, match=f"{side}.*of shape"):
        make("random", 9)(wrong[side])


def test_temperature_changes_samer_only():
    hot = MergeConfig(num_regions=9, compressor="kmeans", assignment_temperature=1e6)
    assert equal(make("kmeans", 9)(scene()), make_compressor(hot)(scene()))
