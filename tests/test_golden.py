"""Frozen numbers: METHOD's formulas written out once more in float64, and what the code gives for fixed tokens.

The formulas below are written from the text of samer/METHOD.md, with plain loops, and share nothing with the code or
with tests/oracle.py. Their results lie in tests/fixtures/golden.json, so that a change of the code and of an oracle at
the same time is noticed too. Every input is a formula of integers. Remake the file with

    PYTHONPATH=. python tests/test_golden.py
"""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from samer.config import MergeConfig
from samer.coords import visual_coords
from samer.data.records import Caption, ImageRecord, Phrase
from samer.grounding import PhraseIndex, ground
from samer.losses import multi_positive_t2i_loss
from samer.merging import merge_tokens
from samer.metrics import retrieval_metrics
from samer.objects import instance_labels
from samer.retrievers.base import Projection, Projector
from samer.scoring import maxsim
from samer.tokens import MergedTokens, QueryTokens, VisualTokens

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "fixtures" / "golden.json"
DIGITS = 13  # decimals in the file
GAMMA, TAU_A, ROUNDS, ETA, EPS, TAU = 0.1, 0.07, 3, 1.0, 1e-6, 0.07
WIDTH, PROMPT = 8, 3
GRIDS = ((5, 7), (4, 6))  # two images of 38 and of 27 tokens, prompt tokens last
BOXES = (((0.1, 0.2, 0.6, 0.9), (0.4, 0.4, 0.7, 0.6)), ((0.0, 0.0, 0.35, 1.0), (0.3, 0.25, 1.0, 0.8)))
CASES = list(itertools.product((0, 1), (4, 7), ("raster", "farthest"), (False, True)))  # image, K, start, with labels


# --- the inputs, formulas of integers -------------------------------------------------------------------------------


def unit_rows(rows):
    return [[value / math.sqrt(sum(x * x for x in row)) for value in row] for row in rows]


def hidden(image):
    """(N, WIDTH), not of unit length: a field over the grid, and per token what has no period in i or j."""
    rows, columns = GRIDS[image]
    return [
        [
            math.sin(0.9 * (i % columns) * (j + 1) / columns + 2.3 * (i // columns) + image)
            + 0.8 * math.cos(1.7 * i * (j + 1) + 0.31 * i * i + j)
            for j in range(WIDTH)
        ]
        for i in range(rows * columns + PROMPT)
    ]


def tokens(image):
    return unit_rows(hidden(image))


def places(image):
    rows, columns = GRIDS[image]
    grid = [(x / (columns - 1), y / (rows - 1)) for y in range(rows) for x in range(columns)]
    return grid + [(0.5, 0.5)] * PROMPT


def words():
    """(2, 5, WIDTH) hidden states of two queries; the second has a padded place."""
    return [
        [[math.cos(0.77 * (q + 1) * (m + 2) * (j + 1) + j * j) for j in range(WIDTH)] for m in range(5)] for q in (0, 1)
    ]


WORD_MASK = ((True,) * 5, (True, True, False, True, True))


def layer():
    """Weight (6, WIDTH) and bias (6,) of a projection."""
    weight = [[math.sin(1.3 * (d + 1) * (j + 1)) + (d == j) for j in range(WIDTH)] for d in range(6)]
    return weight, [0.1 * math.cos(d) for d in range(6)]


# --- METHOD, written out --------------------------------------------------------------------------------------------


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def normalise(a):
    return [x / math.sqrt(dot(a, a)) for x in a]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows)]


def distance(v, p, mu, s):
    """METHOD section 2: features and places."""
    return (1 - dot(v, mu)) + GAMMA * ((p[0] - s[0]) ** 2 + (p[1] - s[1]) ** 2)


def clear(values):
    """The place of the smallest value, which must be so clear that float32 finds the same."""
    order = sorted(range(len(values)), key=lambda k: values[k])
    assert len(order) == 1 or values[order[1]] - values[order[0]] > 1e-5, "too near to a tie for a golden number"
    return order[0]


def starts(v, p, count, rule):
    if rule == "raster":
        return sorted({int(np.round(x)) for x in np.linspace(0, len(v) - 1, count)})
    centre = normalise(mean(v))
    chosen = [clear([-dot(row, centre) for row in v])]
    while len(chosen) < count:
        nearest = [min(distance(v[i], p[i], v[k], p[k]) for k in chosen) for i in range(len(v))]
        chosen.append(clear([-value for value in nearest]))
    return chosen


def cluster(v, p, count, rule):
    """Final centres and places, and the hard clusters of the last round, METHOD section 2 steps 1 and 2."""
    first = starts(v, p, count, rule)
    mu, s = [v[k] for k in first], [p[k] for k in first]
    for _ in range(ROUNDS):
        hard = [clear([distance(v[i], p[i], m, c) for m, c in zip(mu, s)]) for i in range(len(v))]
        for k in range(count):
            own = [i for i in range(len(v)) if hard[i] == k]
            if own:
                mu[k], s[k] = normalise(mean([v[i] for i in own])), mean([p[i] for i in own])
    return mu, s, hard


def merge(v, p, mu, s, hard, labels=None):
    """Vectors, places and weights, METHOD section 2 step 3; with labels section 3."""
    weights = []
    for i in range(len(v)):
        costs = [distance(v[i], p[i], m, c) for m, c in zip(mu, s)]
        if labels is not None:
            for k in range(len(mu)):
                size = sum(c == k for c in hard)
                alike = sum(c == k and b == labels[i] for c, b in zip(hard, labels))
                costs[k] += ETA * (1 - alike / (size + EPS))
        powers = [math.exp(-cost / TAU_A) for cost in costs]
        weights.append([power / sum(powers) for power in powers])
    vectors, where = [], []
    for k in range(len(mu)):
        mass = sum(row[k] for row in weights)
        vectors.append(normalise([sum(w[k] * row[j] for w, row in zip(weights, v)) / mass for j in range(len(v[0]))]))
        where.append([sum(w[k] * row[axis] for w, row in zip(weights, p)) / mass for axis in (0, 1)])
    return vectors, where, weights


def labelled(image):
    """METHOD section 3: the smallest box that holds a token; all boxes are large enough and of their own phrases."""
    area = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in BOXES[image]]
    found = []
    for x, y in places(image):
        inside = [n for n, (x1, y1, x2, y2) in enumerate(BOXES[image]) if x1 <= x <= x2 and y1 <= y <= y2]
        found.append(1 + min(inside, key=lambda n: area[n]) if inside else 0)
    return found


def project(rows, weight, bias):
    return [normalise([dot(w, row) + b for w, b in zip(weight, bias)]) for row in rows]


def objective(weight, bias, centres):
    """METHOD sections 1 to 4 for two images merged with labels into 4 vectors each, and a query of each."""
    merged = []
    for image, (mu, s, hard) in enumerate(centres):
        v = project(hidden(image), weight, bias)
        merged.append(merge(v, places(image), mu, s, hard, labelled(image))[0])
    scores = []
    for query, valid in zip(words(), WORD_MASK):
        u = [row for row, counts in zip(project(query, weight, bias), valid) if counts]
        scores.append([sum(max(dot(row, m) for m in image) for row in u) / len(u) for image in merged])
    losses = [-math.log(math.exp(row[q] / TAU) / sum(math.exp(x / TAU) for x in row)) for q, row in enumerate(scores)]
    return sum(losses) / len(losses), scores


def trained():
    """Loss, scores, and the loss's gradient by central differences: the centres are constants, the clusters too."""
    weight, bias = layer()
    centres = [cluster(project(hidden(image), weight, bias), places(image), 4, "raster") for image in (0, 1)]
    loss, scores = objective(weight, bias, centres)
    slopes = []
    step = 1e-5
    for row in [*weight, bias]:
        for j, kept in enumerate(row):
            row[j] = kept + step
            above = objective(weight, bias, centres)[0]
            row[j] = kept - step
            below = objective(weight, bias, centres)[0]
            row[j] = kept
            slopes.append((above - below) / (2 * step))
    return {"loss": loss, "scores": scores, "gradient": slopes}


def name_of(image, count, rule, with_labels):
    return f"image {image}, K {count}, {rule}, {'labels' if with_labels else 'no labels'}"


def written_out():
    """Everything that the file holds."""
    merges = {}
    for image, count, rule, with_labels in CASES:
        v, p = tokens(image), places(image)
        mu, s, hard = cluster(v, p, count, rule)
        vectors, where, weights = merge(v, p, mu, s, hard, labelled(image) if with_labels else None)
        mass = [sum(row[k] for row in weights) for k in range(count)]
        first = {"vectors": vectors, "places": where, "mass": mass, "first_weights": weights[0], "clusters": hard}
        merges[name_of(image, count, rule, with_labels)] = first
    return {"labels": [labelled(0), labelled(1)], "merges": merges, "training": trained()}


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return value if isinstance(value, int) else round(value, DIGITS)


# --- the file, the formulas and the code say the same ---------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def leaves(value):
    if isinstance(value, dict):
        return [leaf for name in sorted(value) for leaf in leaves(value[name])]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list) else [value]


def test_the_file_holds_what_the_formulas_say(golden):
    again = rounded(written_out())
    assert again.keys() == golden.keys()
    assert again["merges"].keys() == golden["merges"].keys()
    for part, tolerance in (("labels", 0), ("merges", 1e-12), ("training", 1e-9)):  # differences divide by the step
        np.testing.assert_allclose(leaves(again[part]), leaves(golden[part]), rtol=0, atol=tolerance)


def test_the_cases_are_worth_freezing(golden):
    """The prior moves the vectors, the starts differ, and a start falls between two tokens."""
    found = golden["merges"]
    for image, count in itertools.product((0, 1), (4, 7)):
        free, biased, far = (
            np.array(found[name_of(image, count, *rest)]["vectors"])
            for rest in (("raster", False), ("raster", True), ("farthest", False))
        )
        assert np.abs(free - biased).max() > 0.02
        assert np.abs(free - far).max() > 0.1
    assert np.linspace(0, 37, 7)[3] == 18.5  # half to even
    assert all(set(labels) == {0, 1, 2} for labels in golden["labels"])


def batch(dtype):
    """Both images as one padded batch; the padding holds NaN."""
    longest = max(len(tokens(image)) for image in (0, 1))
    v = torch.full((2, longest, WIDTH), float("nan"), dtype=torch.float64)
    p = torch.full((2, longest, 2), float("nan"), dtype=torch.float64)
    mask = torch.zeros(2, longest, dtype=torch.bool)
    for image in (0, 1):
        count = len(tokens(image))
        v[image, :count] = torch.tensor(tokens(image), dtype=torch.float64)
        p[image, :count] = torch.tensor(places(image), dtype=torch.float64)
        mask[image, :count] = True
    return v.to(dtype), p.to(dtype), mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("count", "rule", "with_labels"), list(itertools.product((4, 7), ("raster", "farthest"), (0, 1)))
)
def test_the_merge_gives_the_golden_numbers(golden, dtype, tolerance, padded, count, rule, with_labels):
    config = MergeConfig(num_regions=count, center_init=rule)
    v, p, mask = batch(dtype)
    labels = torch.zeros(mask.shape, dtype=torch.long)
    for image in (0, 1):
        labels[image, mask[image]] = torch.tensor(golden["labels"][image])
    if padded:
        rows = [(image, mask[image]) for image in (0, 1)]
        merged = merge_tokens(v, p, config, mask=mask, instance_labels=labels if with_labels else None)
        results = [(merged, row, valid) for row, valid in rows]
    else:
        results = []
        for image in (0, 1):
            own = mask[image]
            alone = labels[image, own][None] if with_labels else None
            merged = merge_tokens(v[image, own][None], p[image, own], config, instance_labels=alone)
            results.append((merged, 0, own[own]))
    for image, (merged, row, valid) in enumerate(results):
        expected = golden["merges"][name_of(image, count, rule, bool(with_labels))]
        weights = merged.weights[row][valid]
        for ours, name in (
            (merged.tokens[row], "vectors"),
            (merged.coords[row], "places"),
            (weights.sum(0), "mass"),
            (weights[0], "first_weights"),
        ):
            assert ours.dtype == dtype
            scale = 10 if name == "mass" else 1  # a sum over all tokens
            np.testing.assert_allclose(ours.numpy(), expected[name], rtol=0, atol=scale * tolerance, err_msg=name)
        assert merged.assignments[row][valid].tolist() == expected["clusters"]
        assert merged.mask[row].all()


@pytest.mark.parametrize("image", [0, 1])
def test_coordinates_and_labels_are_the_golden_ones(golden, image):
    coords = visual_coords(*GRIDS[image], prompt_tokens=PROMPT)
    np.testing.assert_allclose(coords.numpy(), places(image), rtol=0, atol=1e-7)
    assert instance_labels(coords, torch.tensor(BOXES[image])).tolist() == golden["labels"][image]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_loss_and_gradient_are_the_golden_ones(golden, dtype, tolerance):
    """From hidden states to the loss; float32 through the projection that trains, float64 through the bare layer."""
    weight, bias = (torch.tensor(part, dtype=dtype, requires_grad=True) for part in layer())
    projection = Projection(Projector(weight.detach(), bias.detach()))

    def unit(rows):
        states = torch.tensor(rows, dtype=dtype)
        return projection(states) if dtype == torch.float32 else F.normalize(F.linear(states, weight, bias), dim=-1)

    merged = []
    for image in (0, 1):
        coords = torch.tensor(places(image), dtype=dtype)
        labels = torch.tensor(golden["labels"][image])[None]
        merged.append(
            merge_tokens(unit(hidden(image))[None], coords, MergeConfig(num_regions=4), instance_labels=labels)
        )
    scores = maxsim(unit(words()), torch.cat([each.tokens for each in merged]), torch.tensor(WORD_MASK))
    loss = multi_positive_t2i_loss(scores, torch.eye(2, dtype=torch.bool), TAU)
    loss.backward()
    trains = (projection.weight, projection.bias) if dtype == torch.float32 else (weight, bias)
    expected = golden["training"]
    np.testing.assert_allclose(scores.detach().numpy(), expected["scores"], rtol=0, atol=tolerance)
    assert loss.item() == pytest.approx(expected["loss"], abs=tolerance)
    found = torch.cat([part.grad.flatten() for part in trains]).numpy()
    assert np.abs(found).max() > 0.1
    np.testing.assert_allclose(found, expected["gradient"], rtol=0, atol=max(tolerance, 1e-8))


# --- numbers by hand ------------------------------------------------------------------------------------------------


def test_maxsim_by_hand():
    """Queries of 2 and of 1 valid tokens against images of 2 and of 1 valid vectors, in the plane."""
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [9.0, 9.0]]])
    images = torch.tensor([[[0.8, 0.6], [0.0, -1.0]], [[-0.6, -0.8], [9.0, 9.0]]])
    masks = torch.tensor([[True, True], [True, False]]), torch.tensor([[True, True], [True, False]])
    expected = [[(0.8 + 0.6) / 2, (-0.6 - 0.8) / 2], [0.6 * 0.8 + 0.8 * 0.6, -1.0]]
    np.testing.assert_allclose(maxsim(queries, images, *masks).numpy(), expected, rtol=0, atol=1e-6)


def test_metrics_by_hand():
    """Ranks 1; 3 (a tie counts against it); 6; and two positives at ranks 2 and 5 of six candidates."""
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3, 0.4, 0.5],
            [0.7, 0.5, 0.5, 0.1, 0.0, 0.2],
            [0.5, 0.4, 0.3, 0.2, 0.1, 0.0],
            [0.1, 0.9, 0.5, 0.8, 0.3, 0.4],
        ]
    )
    positives = torch.zeros(4, 6, dtype=torch.bool)
    for query, image in ((0, 0), (1, 1), (2, 5), (3, 3), (3, 4)):
        positives[query, image] = True
    gain = [1 / math.log2(rank + 1) for rank in range(1, 7)]
    ideal = gain[0] + gain[1]
    expected = {
        "r@1": 25.0,
        "r@5": 75.0,
        "r@10": 100.0,
        "median_rank": 2.5,
        "mrr@10": 100 * (1 + 1 / 3 + 1 / 6 + 1 / 2) / 4,
        "ndcg@5": 100 * (1 + gain[2] + 0 + (gain[1] + gain[4]) / ideal) / 4,
        "ndcg@10": 100 * (1 + gain[2] + gain[5] + (gain[1] + gain[4]) / ideal) / 4,
    }
    assert retrieval_metrics(scores, positives) == pytest.approx(expected)
    assert expected["ndcg@10"] == pytest.approx(62.0064, abs=1e-3)


def test_box_mass_and_iou_by_hand():
    """2 rows of 3 patches and a prompt token; the box covers the left column and half of the middle one.

    The phrase's first token selects vector 0: evidence (.5, .25, 0 / .25, 0, 0), of it .5 + .125 + .25 in the box; the
    second selects vector 1: (0, 0, .25 / 0, .25, .5), of it .125. Their regions are patches 0, 1, 3 and 2, 4; the box
    covers 1 + .5 + 0 + 1 + .5 of these, and 3 in all.
    """
    caption = Caption("red ball", (Phrase("red ball", "1", ("other",), 0, 8, ((0.0, 0.0, 0.5, 1.0),)),), True)
    record = ImageRecord("0", Path("0.png"), (caption,))
    offsets = torch.tensor([[[0, 3], [4, 8], [-1, -1]]])
    query = QueryTokens(torch.eye(3)[None], torch.ones(1, 3, dtype=torch.bool), offsets)
    weights = torch.tensor(
        [
            [0.2, 0.0, 0.8],
            [0.1, 0.0, 0.9],
            [0.0, 0.2, 0.8],
            [0.1, 0.0, 0.9],
            [0.0, 0.2, 0.8],
            [0.0, 0.4, 0.6],
            [0.7, 0.1, 0.2],
        ]
    )
    vectors = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.0, 0.0, 1.0]])
    clusters = torch.tensor([[0, 0, 1, 0, 1, 2, 0]])
    coords = visual_coords(2, 3, prompt_tokens=1)
    merged = MergedTokens(
        vectors[None], torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool), weights[None], clusters
    )
    visual = VisualTokens(
        torch.zeros(1, 7, 3), coords, grid=torch.tensor([[2, 3]]), source=torch.arange(6)[None], patches=None
    )
    index = PhraseIndex([record], [query])
    found = ground(merged, index.own_tokens([0], [query.tokens[0]]), index, visual)
    assert found["box_mass"].tolist() == pytest.approx([(0.875 + 0.125) / 2])
    assert found["iou"].tolist() == pytest.approx([3 / (5 + 3 - 3)])
    assert found["match"].tolist() == pytest.approx([0.9 + 0.9 + 1.0])
    np.testing.assert_allclose(found["evidence"].numpy(), [[0.25, 0.125, 0.125, 0.125, 0.125, 0.25]], rtol=0, atol=1e-6)


# --- METHOD is there ------------------------------------------------------------------------------------------------


def test_every_section_that_is_cited_exists():
    text = (ROOT / "samer" / "METHOD.md").read_text(encoding="utf-8")
    sections = {int(number) for number in re.findall(r"^## (\d+)\. ", text, re.M)}
    cited = {}
    for folder in ("samer", "scripts", "tests", "configs"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml") and path != Path(__file__):
                for numbers in re.findall(r"METHOD sections? (\d(?:(?:-| and )\d)*)", path.read_text(encoding="utf-8")):
                    for first, last in re.findall(r"(\d)(?:-(\d))?", numbers):
                        cited.setdefault(path.name, set()).update(range(int(first), int(last or first) + 1))
    assert len(cited) > 20
    assert {name: found - sections for name, found in cited.items() if found - sections} == {}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(rounded(written_out()), indent=None, sort_keys=True).replace("}, ", "},\n") + "\n")
