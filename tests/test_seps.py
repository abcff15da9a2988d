"""SEPS head: selection, merging, similarity and losses against loops over pairs; which parts learn."""

import math

import pytest
import torch

from samer.config import InputError
from samer.seps import head as module
from samer.seps import selection, similarity
from samer.seps.head import Head, Images, Texts
from samer.seps.settings import HeadSettings, SepsTraining

T, P, N, D, M = 5, 4, 9, 16, 7
MODES = [(variant, dense) for variant in ("code", "paper") for dense in ("none", "image", "query")]


def ragged(count, longest, seed):
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, longest, D, generator=random)
    lengths = [1 + (3 * k + 1) % longest for k in range(count)]  # one word in some, all of the room in others
    mask = torch.tensor([[m < length for m in range(longest)] for length in lengths])
    return tokens.masked_fill(~mask[..., None], 7e3), mask  # what padding holds must not matter


def pairs(dense, cls=True, noise=False, seed=0):
    random = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=random)
    images = Images(make(P, N, D), make(P, D) if cls else None, make(P, D) if dense == "image" else None)
    more = {}
    if dense == "query":
        more = {"dense": Texts(*ragged(3, M + 4, 8)), "dense_of": torch.tensor([2, 0, 0, 1, 2])}
    lots = torch.rand(2, T, P, N, generator=random).clamp(1e-6, 1 - 1e-6)
    return images, Texts(*ragged(T, M, 9), **more, noise=(lots / (1 - lots)).log() if noise else None)


def made(**settings):
    torch.manual_seed(3)
    head = Head(HeadSettings(**settings), N, D)
    with torch.no_grad():
        for network in head.aggregators:
            network.scale.fill_(1.7)
    return head


# --- the oracle: one pair at a time, from the specification ---------------------------------------------------------


def unit(vector):
    return vector / vector.norm()


def mean_of(rows):
    return sum(rows) / len(rows)


def network(aggregator, token):
    norm, first, _, second = aggregator.layers
    centred = token - token.mean()
    normed = centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias
    hidden = first.weight @ normed + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return (second.weight @ hidden + second.bias) * aggregator.scale


def merged(aggregator, tokens, kept):
    logits = [network(aggregator, tokens[i]) for i in kept]
    vectors = []
    for k in range(len(logits[0])):
        weights = [math.exp(float(each[k])) for each in logits]
        vectors.append(sum(w * tokens[i] for w, i in zip(weights, kept)) / sum(weights))
    return vectors


def highest(scores, count):
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def code_pair(head, tokens, cls, guide, words):
    keep = math.ceil(head.settings.sparse_ratio * len(tokens))
    centre, wanted = unit(mean_of(list(tokens))), unit(guide)
    scores = [float(unit(v) @ centre + unit(v) @ wanted) for v in tokens]
    kept = highest(scores, keep)
    vectors = merged(head.aggregators[0], tokens, kept)
    if cls is not None:
        vectors = [cls, *vectors]
    if dropped := [i for i in range(len(tokens)) if i not in kept]:
        weights = [math.exp(scores[i]) for i in dropped]
        vectors.append(sum(w * tokens[i] for w, i in zip(weights, dropped)) / sum(weights))
    table = [[float(unit(word) @ unit(vector)) for vector in vectors] for word in words]
    table = [[value if value > 0 else 0.1 * value for value in row] for row in table]
    by_word, by_vector = [max(row) for row in table], [max(column) for column in zip(*table)]
    return mean_of(by_word) + mean_of(by_vector)


def min_max(values):
    low, high = min(values), max(values)
    return [(value - low) / (high - low) for value in values]


def two_layers(layers, values):
    first, _, second = layers
    hidden = first.weight @ values + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return float(second.weight @ hidden + second.bias)


def paper_pair(head, tokens, words, dense, noise):
    beta = head.settings.beta
    predicted = [1 / (1 + math.exp(-two_layers(head.predictor, v))) for v in tokens]
    own = min_max([float(v @ mean_of(list(tokens)) / D) for v in tokens])
    sparse = min_max([float(v @ mean_of(words) / D) for v in tokens])
    told = min_max([float(v @ dense / D) for v in tokens]) if dense is not None else [0.0] * len(tokens)
    scores = [(1 - 2 * beta) * p + beta * (s + d + 2 * o) for p, s, d, o in zip(predicted, sparse, told, own)]
    vectors = [torch.zeros(D)] * head.count
    for aggregator, lots in zip(head.aggregators, noise):
        kept = highest(scores, math.ceil(head.settings.sparse_ratio * len(tokens)))
        if lots is not None:
            shares = [s / (1 + (2 if dense is not None else 1) * beta) for s in scores]
            kept = [i for i, (p, lot) in enumerate(zip(shares, lots)) if math.log(p / (1 - p)) + float(lot) > 0]
            kept = sorted({*kept, *highest(scores, 1)})
        vectors = [a + b for a, b in zip(vectors, merged(aggregator, tokens, kept))]
    table = [[float(unit(word) @ unit(vector)) for vector in vectors] for word in words]
    total = 0.0
    for best, layers in (
        ([max(row) for row in table], head.by_word),
        ([max(column) for column in zip(*table)], head.by_vector),
    ):
        top = (sorted(best, reverse=True) + [0.0] * 5)[:5]
        total += mean_of(best) + two_layers(layers, torch.tensor(top))
    return total


@torch.no_grad()
def oracle(head, images, texts):
    settings, scores = head.settings, torch.zeros(T, P)
    for i in range(T):
        words = list(texts.tokens[i][texts.mask[i]])
        told = None
        if settings.dense == "query":
            row = texts.dense_of[i]
            told = list(texts.dense.tokens[row][texts.dense.mask[row]])
        for j in range(P):
            cls, tokens = None if images.cls is None else images.cls[j], images.tokens[j]
            if settings.variant == "code":
                scores[i, j] = code_pair(head, tokens, cls, mean_of(words), words)
                if settings.dense == "query":
                    scores[i, j] += code_pair(head, tokens, cls, mean_of(told), told)
                elif settings.dense == "image":
                    scores[i, j] += code_pair(head, tokens, cls, images.guide[j], words)
            else:
                dense = {"none": None, "image": None if images.guide is None else images.guide[j]}
                dense = mean_of(told) if told is not None else dense[settings.dense]
                noise = [None, None] if texts.noise is None else [lots[i, j] for lots in texts.noise]
                scores[i, j] = paper_pair(head, tokens, words, dense, noise)
    return scores


@pytest.mark.parametrize(("variant", "dense"), MODES)
@pytest.mark.parametrize(
    ("rho", "aggr", "cls"), [(0.5, 0.4, True), (0.8, 0.6, False), (1.0, 0.5, True), (0.1, 0.1, False)]
)
def test_scores_are_those_of_loops_over_pairs(variant, dense, rho, aggr, cls):
    head = made(variant=variant, dense=dense, sparse_ratio=rho, aggr_ratio=aggr)
    images, texts = pairs(dense, cls)
    scores, _ = head(images, texts)
    assert torch.allclose(scores, oracle(head, images, texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dense", ["none", "image", "query"])
def test_drawn_decisions_are_those_of_loops(dense):
    head = made(variant="paper", dense=dense, sparse_ratio=0.4, aggr_ratio=0.9)
    images, texts = pairs(dense, noise=True)
    scores, shares = head(images, texts)
    assert torch.allclose(scores, oracle(head, images, texts), atol=1e-5, rtol=0)
    assert len(set(shares.tolist())) > 1
    ranked = head(images, Texts(texts.tokens, texts.mask, texts.dense, texts.dense_of))[0]
    assert not torch.allclose(scores, ranked, atol=1e-3)


@pytest.mark.parametrize(("variant", "dense"), MODES)
def test_slices_change_neither_scores_nor_gradients(monkeypatch, variant, dense):
    found = []
    usual = module.SLICE_ELEMENTS, module.HELD_ELEMENTS
    for slice_elements, held_elements in (usual, (1, usual[1]), (1, 1)):  # whole; in slices; computed again
        monkeypatch.setattr(module, "SLICE_ELEMENTS", slice_elements)
        monkeypatch.setattr(module, "HELD_ELEMENTS", held_elements)
        head = made(variant=variant, dense=dense)
        images, texts = pairs(dense, noise=variant == "paper")
        images.tokens.requires_grad_(True), texts.tokens.requires_grad_(True)
        scores, shares = head(images, texts)
        (scores.square().sum() + shares.sum()).backward()
        grown = [images.tokens.grad, texts.tokens.grad, *(p.grad for p in head.parameters())]
        found.append([scores, shares, *(torch.zeros(()) if g is None else g for g in grown)])
    for one, *others in zip(*found):
        assert all(torch.allclose(one, other, atol=1e-5) for other in others)


def test_decisions_with_and_without_a_gradient_merge_alike():
    """Logits far apart, too: what is kept is as a softmax over it says, whatever is dropped beside it."""
    tokens, logits = torch.randn(P, 12, D), torch.randn(P, 12, 3) * torch.tensor([1.0, 10.0, 20.0])
    decisions = (torch.rand(T, P, 12) < 0.4).float()
    decisions[..., 0] = 1
    found = [selection.aggregate(tokens, logits, decisions.clone().requires_grad_(grad)) for grad in (True, False)]
    weights = logits.transpose(1, 2).expand(T, -1, -1, -1).masked_fill(decisions[:, :, None] == 0, -math.inf)
    wanted = weights.double().softmax(-1) @ tokens.double()
    assert all(torch.allclose(each.double(), wanted, atol=1e-5) for each in found)


@pytest.mark.parametrize(
    ("size", "rho", "aggr", "keep", "count"),
    [(196, 0.5, 0.4, 98, 39), (576, 0.5, 0.4, 288, 115), (49, 0.8, 0.6, 40, 23), (144, 0.8, 0.6, 116, 69)],
)
def test_counts_are_the_published_ones(size, rho, aggr, keep, count):
    head = Head(HeadSettings(sparse_ratio=rho, aggr_ratio=aggr), size, 8)
    assert (head.keep, head.count) == (keep, count)


# --- what learns ----------------------------------------------------------------------------------------------------


def gradients(**settings):
    """Of a loss on the scores: whether tokens of pictures, [CLS], words and the head's parts get any."""
    head = made(**settings)
    dense = settings.get("dense", "none")
    images, texts = pairs(dense, noise=settings["variant"] == "paper")
    parts = {"tokens": images.tokens, "cls": images.cls, "words": texts.tokens}
    parts |= {"guide": images.guide} if dense == "image" else {}
    parts |= {"dense": texts.dense.tokens} if dense == "query" else {}
    for part in parts.values():
        part.requires_grad_(True)
    scores, shares = head(images, texts)
    scores.square().sum().backward(retain_graph=True)
    learns = {name for name, part in parts.items() if part.grad is not None and part.grad.abs().sum() > 0}
    for name, part in head.named_children():
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters()):
            learns.add(name)
    return learns, shares.requires_grad


def test_the_released_code_cuts_the_gradient_at_the_chosen_tokens():
    """The vision side learns through [CLS] alone; the aggregation network and the texts learn."""
    learns, ratio = gradients(variant="code", dense="query", select_gradient=False)
    assert learns == {"cls", "words", "dense", "aggregators"}
    assert not ratio  # a constant


def test_by_default_the_chosen_tokens_learn_and_scores_of_tokens_do_not():
    assert gradients(variant="code", dense="query") == ({"tokens", "cls", "words", "dense", "aggregators"}, False)
    learns, _ = gradients(variant="code", dense="image")
    assert learns == {"tokens", "cls", "words", "aggregators"}  # a guide only chooses


def test_the_paper_learns_through_its_decisions():
    learns, ratio = gradients(variant="paper", dense="query")
    assert learns == {"tokens", "words", "dense", "aggregators", "predictor", "by_word", "by_vector"}
    assert ratio
    learns, _ = gradients(variant="paper", dense="image")
    assert "guide" in learns
    learns, _ = gradients(variant="paper", dense="query", select_gradient=False)
    assert learns == {"words", "aggregators", "by_word", "by_vector"}


def test_the_ratio_loss_moves_decisions_towards_its_share():
    torch.manual_seed(0)
    head = made(variant="paper", dense="query", sparse_ratio=0.3)
    images, texts = pairs("query", noise=True)
    optimizer, seen = torch.optim.SGD(head.parameters(), lr=2.0), []
    for _ in range(60):
        loss = similarity.ratio_loss(head(images, texts)[1], 0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert sum(seen[-5:]) < 0.5 * sum(seen[:5])


def test_the_published_sum_is_twice_the_mean():
    one, other = (made(variant="paper", dense="query", ratio_sum=each) for each in (False, True))
    images, texts = pairs("query", noise=True)
    assert torch.allclose(2 * one(images, texts)[1], other(images, texts)[1])
    assert HeadSettings(variant="paper").weight_of_ratio == 1
    assert HeadSettings().weight_of_ratio == 0


def test_a_draw_keeps_the_best_token_and_passes_a_soft_gradient():
    shares = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([-50.0, -50.0, -50.0], dtype=torch.float64)
    assert selection.drawn(shares, noise, 1.0).tolist() == [0, 1, 0]
    lots = torch.tensor([0.3, -1.0, 0.4], dtype=torch.float64)
    decisions = selection.drawn(shares, lots, 2.0)
    assert decisions.tolist() == [0, 1, 1]
    decisions.sum().backward()
    for p, lot, slope in zip(shares.tolist(), lots.tolist(), shares.grad.tolist()):
        soft = lambda x, lot=lot: 1 / (1 + math.exp(-(math.log(x / (1 - x)) + lot) / 2))
        assert slope == pytest.approx((soft(p + 1e-6) - soft(p - 1e-6)) / 2e-6, rel=1e-5)


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardest", [False, True])
def test_the_alignment_loss_is_that_of_loops(hardest):
    torch.manual_seed(1)
    scores, images = torch.randn(6, 6), torch.tensor([3, 1, 3, 0, 5, 1])
    rows, columns = {}, {}
    for i in range(6):
        for j in range(6):
            if images[i] != images[j]:
                rows.setdefault(i, []).append(max(0.0, 0.2 + float(scores[i, j] - scores[i, i])))
                columns.setdefault(j, []).append(max(0.0, 0.2 + float(scores[i, j] - scores[j, j])))
    reduce = max if hardest else sum
    wanted = sum(reduce(each) for each in (*rows.values(), *columns.values()))
    found = similarity.alignment_loss(scores, images, 0.2, hardest=hardest)
    assert float(found) == pytest.approx(wanted, abs=1e-5)


def test_one_image_has_no_negatives():
    scores = torch.randn(3, 3, requires_grad=True)
    for hardest in (False, True):
        loss = similarity.alignment_loss(scores, torch.tensor([4, 4, 4]), 0.2, hardest=hardest)
        assert float(loss.detach()) == 0


def test_the_best_of_equal_tokens_is_the_first():
    assert selection.best(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), 2).tolist() == [[0, 1, 1, 0]]


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: HeadSettings(variant="laps"), "seps.variant must be one of code, paper"),
        (lambda: HeadSettings(dense="both"), "seps.dense must be one of none, image, query"),
        (lambda: HeadSettings(sparse_ratio=0.0), r"seps.sparse_ratio must be in \(0, 1\]"),
        (lambda: HeadSettings(beta=0.6), r"seps.beta must be in \[0, 0.5\]"),
        (lambda: HeadSettings(temperature=0.0), "seps.temperature must be above 0"),
        (lambda: HeadSettings(ratio_weight=-1.0), "seps.ratio_weight must be at least 0"),
        (lambda: SepsTraining(mixup="cut"), "train.mixup must be one of none, midpoint"),
        (lambda: SepsTraining(augment=1.5), "train.augment must be at most 1"),
        (lambda: Head(HeadSettings(), 1, 8), "1 patch tokens; there is nothing to select from"),
        (lambda: made(dense="query")(*pairs("none")), "needs the dense text that each text brings"),
        (lambda: made(dense="image")(*pairs("none")), "needs the dense text of each picture"),
    ],
)
def test_bad_settings_are_refused(build, words):
    with pytest.raises(InputError, match=words):
        build()
