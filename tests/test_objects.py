"""Boxes -> labels -> penalty against naive loops, and the diagnostics by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from samer.config import InputError
from samer.coords import visual_coords
from samer.objects import EPS, instance_inconsistency, instance_labels, object_diagnostics
from samer.tokens import MergedTokens

GRID = visual_coords(9, 9, prompt_tokens=1)  # multiples of 1/8, so that borders are met exactly


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def naive_labels(coords, boxes, phrases, min_area, max_area, max_phrases):
    """METHOD section 3, one box and one token at a time."""
    sized = [k for k in range(len(boxes)) if min_area <= area(boxes[k]) <= max_area]
    largest = {}  # phrase -> (its largest area, the first box that has it)
    for k in sized:
        if phrases[k] not in largest or area(boxes[k]) > largest[phrases[k]][0]:
            largest[phrases[k]] = (area(boxes[k]), k)
    ranked = sorted(largest, key=lambda phrase: (-largest[phrase][0], largest[phrase][1]))
    instances = [k for k in sized if phrases[k] in ranked[:max_phrases]]
    labels = []
    for x, y in coords.tolist():
        label, smallest = 0, math.inf
        for number, k in enumerate(instances, start=1):
            x1, y1, x2, y2 = boxes[k]
            if x1 <= x <= x2 and y1 <= y <= y2 and area(boxes[k]) < smallest:
                label, smallest = number, area(boxes[k])
        labels.append(label)
    return torch.tensor(labels)


sides = st.lists(st.integers(0, 32), min_size=2, max_size=2).map(sorted)
box = st.tuples(sides, sides).map(lambda s: [s[0][0] / 32, s[1][0] / 32, s[0][1] / 32, s[1][1] / 32])
caption = st.lists(st.tuples(box, st.integers(0, 5)), max_size=9)  # boxes and the phrases they belong to


@given(
    captions=st.lists(caption, min_size=1, max_size=4),
    min_area=st.sampled_from([0.0, 0.005, 1 / 64, 0.25]),
    max_area=st.sampled_from([1.0, 0.5, 0.25]),
    max_phrases=st.integers(1, 5),
)
def test_labels_equal_the_naive_loop(captions, min_area, max_area, max_phrases):
    limits = {"min_area": min_area, "max_area": max_area, "max_phrases": max_phrases}
    boxes = [[each for each, _ in one] for one in captions]
    phrases = [[owner for _, owner in one] for one in captions]
    expected = [naive_labels(GRID, b, p, **limits) for b, p in zip(boxes, phrases)]
    for one, owners, labels in zip(boxes, phrases, expected):
        ours = instance_labels(GRID, torch.tensor(one).reshape(-1, 4), phrases=owners, **limits)
        assert ours.dtype == torch.long
        assert torch.equal(ours, labels)
        assert torch.equal(instance_labels(GRID, one, phrases=torch.tensor(owners).long(), **limits), labels)
    batch = instance_labels(GRID, boxes, phrases=phrases, **limits)
    assert torch.equal(batch, torch.stack(expected))
    tensors = [torch.tensor(one).reshape(-1, 4) for one in boxes]
    own_coords = GRID.expand(len(boxes), -1, -1)
    assert torch.equal(instance_labels(own_coords, tensors, phrases=phrases, **limits), batch)


@given(boxes=st.lists(box, max_size=6))
def test_without_phrases_each_box_is_its_own(boxes):
    expected = naive_labels(GRID, boxes, list(range(len(boxes))), 0.005, 1.0, 4)
    assert torch.equal(instance_labels(GRID, boxes), expected)


POINTS = torch.tensor([[0.1, 0.1], [0.3, 0.3], [0.5, 0.5], [0.7, 0.7], [0.9, 0.9]])


def test_overlapping_boxes_by_hand():
    boxes = [[0.0, 0.0, 1.0, 1.0], [0.25, 0.25, 0.75, 0.75], [0.5, 0.5, 0.75, 0.75]]
    assert instance_labels(POINTS, boxes).tolist() == [1, 2, 3, 3, 1]  # the smallest wins
    assert instance_labels(POINTS, boxes[::-1]).tolist() == [3, 2, 1, 1, 3]  # numbered in the given order
    assert instance_labels(POINTS, boxes[1:]).tolist() == [0, 1, 2, 2, 0]
    assert instance_labels(POINTS, [boxes[1], boxes[1]]).tolist() == [0, 1, 1, 1, 0]  # the first among equals


def test_borders_count_as_inside():
    assert instance_labels(POINTS, [[0.5, 0.5, 0.5 + 0.25, 1.0]]).tolist() == [0, 0, 1, 1, 0]
    assert instance_labels(GRID, [[0.25, 0.5, 0.5, 0.625]]).nonzero().flatten().tolist() == [38, 39, 40, 47, 48, 49, 81]


def test_area_bounds_are_inclusive():
    boxes = [[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]
    assert instance_labels(POINTS, boxes, min_area=0.25, max_area=0.25).tolist() == [1, 1, 1, 2, 2]
    assert instance_labels(POINTS, boxes, min_area=0.2501).tolist() == [0] * 5
    assert instance_labels(POINTS, boxes, max_area=0.2499).tolist() == [0] * 5
    assert instance_labels(POINTS, [[0.0, 0.0, 1.0, 1.0]]).tolist() == [1] * 5  # the whole image is not too large
    assert instance_labels(POINTS, [[0.0, 0.0, 1.0000005, 1.0]]).tolist() == [1] * 5  # nor is it after rounding
    assert instance_labels(POINTS, [[0.07, 0.07, 0.14, 0.14]]).tolist() == [0] * 5  # 0.0049 of the image
    assert instance_labels(POINTS, [[0.06, 0.06, 0.14, 0.14]]).tolist() == [1, 0, 0, 0, 0]  # 0.0064


def test_dropped_boxes_take_no_number():
    boxes = [[0.0, 0.0, 0.01, 0.01], [0.6, 0.6, 0.8, 0.8], [0.0, 0.0, 0.01, 0.01], [0.8, 0.8, 1.0, 1.0]]
    assert instance_labels(POINTS, boxes).tolist() == [0, 0, 0, 1, 2]


def test_the_four_phrases_with_the_largest_boxes_stay():
    columns = [[k / 8, 0.0, (k + 1) / 8, height / 8] for k, height in enumerate((3, 8, 5, 4, 6, 7))]
    points = torch.tensor([[(k + 0.5) / 8, 0.01] for k in range(6)])
    assert instance_labels(points, columns).tolist() == [0, 1, 2, 0, 3, 4]
    # a small box stays with the large one of its phrase, which then counts once
    phrases = [7, 7, 2, 3, 4, 5]
    assert instance_labels(points, columns, phrases=phrases).tolist() == [1, 2, 3, 0, 4, 5]
    assert instance_labels(points, columns, phrases=phrases, max_phrases=1).tolist() == [1, 2, 0, 0, 0, 0]
    # a phrase is as large as its largest box that the area filter keeps
    assert instance_labels(points, columns, phrases=phrases, max_area=7 / 64, max_phrases=2).tolist() == [
        0, 0, 0, 0, 1, 2,
    ]  # fmt: skip


def test_phrases_of_equal_size_stay_in_the_given_order():
    columns = [[k / 8, 0.0, (k + 1) / 8, 0.5] for k in range(6)]
    points = torch.tensor([[(k + 0.5) / 8, 0.01] for k in range(6)])
    assert instance_labels(points, columns).tolist() == [1, 2, 3, 4, 0, 0]
    assert instance_labels(points, columns, phrases=[1, 2, 3, 4, 5, 1]).tolist() == [1, 2, 3, 4, 0, 5]


def test_captions_without_boxes_are_background():
    nothing = torch.zeros(5, dtype=torch.long)
    one = [[0.6, 0.6, 0.8, 0.8]]
    labels = torch.tensor([0, 0, 0, 1, 0])
    for empty in ([], torch.zeros(0, 4), torch.tensor([])):
        assert torch.equal(instance_labels(POINTS, empty), nothing)
        assert torch.equal(instance_labels(POINTS, empty, phrases=[]), nothing)
        assert torch.equal(instance_labels(POINTS, [empty]), nothing[None])
        assert torch.equal(instance_labels(POINTS, [empty, empty]), torch.stack([nothing] * 2))
        assert torch.equal(instance_labels(POINTS, [empty, one]), torch.stack([nothing, labels]))
        assert torch.equal(instance_labels(POINTS, [one, empty]), torch.stack([labels, nothing]))
    assert torch.equal(
        instance_labels(POINTS, [(), [tuple(one[0])]]), torch.stack([nothing, labels])
    )  # as read from disk
    assert torch.equal(instance_labels(POINTS, tuple(map(tuple, one))), labels)
    assert torch.equal(instance_labels(POINTS, torch.zeros(3, 0, 4)), torch.stack([nothing] * 3))


def test_each_image_may_have_its_own_coordinates():
    boxes = [[[0.6, 0.6, 0.8, 0.8]]] * 2
    coords = torch.stack([POINTS, POINTS.flip(0)])
    assert instance_labels(coords, boxes).tolist() == [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0]]
    assert instance_labels(coords[:1], torch.tensor(boxes[0])).tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("boxes", "phrases", "words"),
    [
        ([[0.1, 0.1, 0.5]], None, r"boxes of caption 0 have shape \(1, 3\); expected \(n, 4\)"),
        (torch.zeros(2, 5), None, r"boxes of caption 0 have shape \(2, 5\)"),
        (torch.zeros(4), None, "boxes of caption 0 have shape"),
        ([[10.0, 20.0, 200.0, 300.0]], None, "give boxes as shares of the image"),
        ([[0.5, 0.1, 0.4, 0.9]], None, "of caption 0 is not x1 <= x2"),
        ([[0.1, 0.9, 0.4, 0.8]], None, "of caption 0 is not x1 <= x2"),
        ([[-0.1, 0.1, 0.4, 0.8]], None, "of caption 0 is not x1 <= x2"),
        ([[0.1, 0.1, float("nan"), 0.8]], None, "of caption 0 is not x1 <= x2"),
        ([[], [[0.1, 0.1, 0.2, 2.0]]], None, "of caption 1 is not x1 <= x2"),
        ([[0.1, 0.1, 0.4, 0.8]], [1, 2], "caption 0 has 1 boxes but 2 phrase numbers"),
        ([[[0.1, 0.1, 0.4, 0.8]], []], [[1], [2]], "caption 1 has 0 boxes but 1 phrase numbers"),
        ([[[0.1, 0.1, 0.4, 0.8]], []], [[1]], "2 box lists but 1 phrase lists"),
    ],
)
def test_bad_boxes_are_refused(boxes, phrases, words):
    with pytest.raises(InputError, match=words):
        instance_labels(POINTS, boxes, phrases=phrases)


@pytest.mark.parametrize("boxes", [[[]] * 2, [[[0.1, 0.1, 0.4, 0.8]]] * 4, [[0.1, 0.1, 0.4, 0.8]], []])
def test_boxes_for_another_number_of_images_are_refused(boxes):
    with pytest.raises(InputError, match=r"boxes for \d captions, but coords of shape \(3, 5, 2\)"):
        instance_labels(POINTS.expand(3, -1, -1), boxes)


def hard_clusters(assignments, regions):
    """(B, N, K) float; -1 is padding."""
    return F.one_hot(assignments.clamp(min=0), regions).float() * (assignments >= 0)[..., None]


@given(
    data=st.data(), batch=st.integers(1, 3), n=st.integers(1, 12), regions=st.integers(1, 5), count=st.integers(1, 4)
)
def test_inconsistency_equals_the_naive_loop(data, batch, n, regions, count):
    rows = lambda low, high: torch.tensor(
        data.draw(st.lists(st.lists(st.integers(low, high), min_size=n, max_size=n), min_size=batch, max_size=batch))
    )
    assignments, labels = rows(-1, regions - 1), rows(0, count - 1)
    penalty = instance_inconsistency(hard_clusters(assignments, regions), labels, count)
    assert penalty.shape == (batch, n, regions)
    assert penalty.min() >= 0
    assert penalty.max() <= 1
    for b in range(batch):
        for k in range(regions):
            members = [i for i in range(n) if assignments[b, i] == k]
            for i in range(n):
                alike = sum(int(labels[b, j] == labels[b, i]) for j in members)
                assert penalty[b, i, k].item() == pytest.approx(1 - alike / (len(members) + EPS), abs=1e-6)
                if not members:
                    assert penalty[b, i, k] == 1


def test_inconsistency_by_hand():
    assignments = torch.tensor([[0, 0, 0, 1]])  # cluster 2 is empty
    labels = torch.tensor([[1, 1, 2, 0]])
    third = 1 / 3
    expected = torch.tensor([[[third, 1, 1], [third, 1, 1], [2 * third, 1, 1], [1, 0, 1]]])
    penalty = instance_inconsistency(hard_clusters(assignments, 3), labels, 3)
    torch.testing.assert_close(penalty, expected, atol=1e-5, rtol=0)


def merged(weights, assignments, mask=None):
    """A `MergedTokens` of which only the assignment matters."""
    weights = torch.tensor(weights, dtype=torch.float32)
    batch, _, regions = weights.shape
    mask = torch.ones(batch, regions, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return MergedTokens(torch.zeros(batch, regions, 2), torch.zeros(batch, regions, 2), mask, weights, assignments)


WEIGHTS = [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]
ASSIGNMENTS = [0, 0, 0, 1]
LABELS = [1, 1, 2, 0]
ENTROPY = -sum(w * math.log(w) for row in WEIGHTS for w in row) / 4
GOLDEN = {
    "entropy": ENTROPY,
    "kl_to_box_free": math.log(2) - ENTROPY,  # against the uniform assignment
    "object_mass_on_own": (0.9 + 0.6 + 0) / 3,  # cluster 0 is of instance 1, cluster 1 of the background
    "purity": (2 + 1) / 4,
    "mixed_clusters": 1 / 2,  # cluster 0 holds instances 1 and 2
    "argmax_agreement": 2 / 4,
    "empty_clusters": 0.0,
}


def test_diagnostics_by_hand():
    ours = merged([WEIGHTS], torch.tensor([ASSIGNMENTS]))
    uniform = merged([[[0.5, 0.5]] * 4], torch.tensor([ASSIGNMENTS]))
    result = object_diagnostics(ours, torch.tensor([LABELS]), box_free=uniform)
    assert result.keys() == GOLDEN.keys()
    for key, value in GOLDEN.items():
        assert result[key].shape == (1,)
        assert result[key].item() == pytest.approx(value, abs=1e-6), key
    assert object_diagnostics(ours, torch.tensor([LABELS])).keys() == GOLDEN.keys() - {"kl_to_box_free"}


@pytest.mark.parametrize("with_mask", [True, False])
def test_diagnostics_do_not_see_padding(with_mask):
    """Two padded images of a batch: the golden one, and one whose two tokens are their own regions."""
    other = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    pad = [[0.0, 0.0]] * 2
    assignments = torch.tensor([[*ASSIGNMENTS, -1, -1], [0, 1, -1, -1, -1, -1]])
    batch = merged([WEIGHTS + pad, other + pad], assignments)
    uniform = merged([[[0.5, 0.5]] * 4 + pad, other + pad], assignments)
    labels = torch.tensor([[*LABELS, 3, 9], [2, 0, 1, 1, 1, 1]])
    mask = assignments >= 0 if with_mask else None
    result = object_diagnostics(batch, labels, mask=mask, box_free=uniform)
    for key, value in GOLDEN.items():
        assert result[key][0].item() == pytest.approx(value, abs=1e-6), key
    second = {key: value[1].item() for key, value in result.items()}
    expected = {"entropy": 0, "kl_to_box_free": 0, "object_mass_on_own": 1, "purity": 1}
    assert second == {**expected, "mixed_clusters": 0, "argmax_agreement": 1, "empty_clusters": 0}


def test_regions_that_an_image_does_not_have_are_not_empty_clusters():
    weights = [[[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]] * 2
    two = merged(weights, torch.tensor([[0, 1]] * 2), mask=[[True, True, False, False], [True] * 4])
    result = object_diagnostics(two, torch.zeros(2, 2, dtype=torch.long))
    assert result["empty_clusters"].tolist() == [0, 0.5]
    assert result["mixed_clusters"].tolist() == [0, 0]
    assert result["object_mass_on_own"].isnan().all()  # there is no object


@pytest.mark.parametrize("regions", [1, 2, 7])
def test_uniform_weights_have_entropy_ln_k(regions):
    uniform = merged(np.full((1, 5, regions), 1 / regions), torch.zeros(1, 5, dtype=torch.long))
    entropy = object_diagnostics(uniform, torch.zeros(1, 5, dtype=torch.long))["entropy"].item()
    assert entropy == pytest.approx(math.log(regions), abs=1e-6)


def test_divergence_is_zero_against_itself_and_positive_otherwise():
    generator = torch.Generator().manual_seed(0)
    assignments, labels = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    one, two = (
        merged(torch.rand(3, 20, 6, generator=generator).mul(9).softmax(-1).tolist(), assignments) for _ in "ab"
    )
    assert (object_diagnostics(one, labels, box_free=one)["kl_to_box_free"] == 0).all()
    assert (object_diagnostics(one, labels, box_free=two)["kl_to_box_free"] > 0.1).all()
