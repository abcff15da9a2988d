"""Grounding: coverage of boxes on the patch grid, which tokens name a phrase, what its winners stand on, and OSR."""

import functools
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from samer.compare.measure import measure
from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig
from samer.coords import grid_layout, visual_coords
from samer.data import flickr
from samer.data.records import Caption, ImageRecord, Phrase
from samer.evaluation import encode_texts, fitted_compressor
from samer.grounding import HIT_IOU, OwnTokens, PhraseIndex, box_coverage, ground, size_thirds
from samer.merging import merge_tokens
from samer.tokens import MergedTokens, QueryTokens, VisualTokens

FINE = 60  # raster points per side; 1, 2, 3, 4, 5 and 6 divide it
WHOLE = (0.0, 0.0, 1.0, 1.0)
close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0)


# --- boxes on the patch grid ----------------------------------------------------------------------------------------


def boxes_of(number, most=4):
    """Lists of boxes whose corners are drawn from `number`; zero-area ones are among them."""
    sides = st.tuples(number, number).map(sorted)
    return st.lists(st.tuples(sides, sides).map(lambda s: (s[0][0], s[1][0], s[0][1], s[1][1])), max_size=most)


def union_area(boxes):
    """The area of a union by inclusion and exclusion."""
    total = 0.0
    for count in range(1, len(boxes) + 1):
        for some in itertools.combinations(boxes, count):
            width = min(b[2] for b in some) - max(b[0] for b in some)
            height = min(b[3] for b in some) - max(b[1] for b in some)
            total -= (-1) ** count * max(0.0, width) * max(0.0, height)
    return total


@given(boxes_of(st.integers(0, FINE)), st.integers(1, 6), st.integers(1, 6))
@example([(0, 0, FINE, FINE)], 3, 5)
@example([(10, 20, 30, 40), (30, 20, 50, 40), (10, 20, 30, 40)], 6, 6)  # on cell edges, side by side, twice the same
@example([(7, 3, 7, 50), (3, 9, 50, 9), (5, 5, 5, 5)], 4, 2)  # lines and a point
@example([], 2, 3)
def test_coverage_equals_a_fine_raster(corners, rows, columns):
    raster = np.zeros((FINE, FINE))
    for x1, y1, x2, y2 in corners:
        raster[y1:y2, x1:x2] = 1
    expected = raster.reshape(rows, FINE // rows, columns, FINE // columns).mean((1, 3))
    found = box_coverage([[value / FINE for value in box] for box in corners], rows, columns)
    assert (found.shape, found.dtype) == ((rows * columns,), np.float32)
    np.testing.assert_allclose(found.reshape(rows, columns), expected, atol=1e-6)


@example([(0.0, 0.0, 0.5, 0.9999999999999999)], 32, 32)  # a piece's middle that rounds to 1
@given(boxes_of(st.integers(0, 2**20).map(lambda k: k / 2**20)), st.integers(1, 7), st.integers(1, 7))
def test_coverage_adds_up_to_the_union(boxes, rows, columns):
    found = box_coverage(boxes, rows, columns)
    assert found.min() >= 0
    assert found.max() <= 1
    assert math.isclose(found.astype(float).sum() / (rows * columns), union_area(boxes), abs_tol=1e-6)
    for cell, value in enumerate(found):
        x, y = cell % columns / columns, cell // columns / rows
        clipped = [(max(a, x), max(b, y), min(c, x + 1 / columns), min(d, y + 1 / rows)) for a, b, c, d in boxes]
        clipped = [box for box in clipped if box[0] < box[2] and box[1] < box[3]]
        assert math.isclose(value, union_area(clipped) * rows * columns, abs_tol=1e-5)


@pytest.mark.parametrize(
    ("boxes", "rows", "columns", "expected"),
    [
        ([(0, 0, 0.5, 0.5)], 1, 1, [0.25]),
        ([(0, 0, 0.5, 0.5)], 2, 2, [1, 0, 0, 0]),
        ([(0.25, 0.25, 0.75, 0.75)], 2, 2, [0.25] * 4),
        ([WHOLE], 2, 3, [1] * 6),
        ([WHOLE, (0.1, 0.1, 0.2, 0.2)], 2, 3, [1] * 6),
        ([(0, 0, 0.5, 0.25)], 2, 4, [0.5, 0.5, 0, 0, 0, 0, 0, 0]),  # row-major: x runs first
        ([(0, 0, 0.5, 0.5), (0.25, 0.25, 1, 0.5)], 2, 2, [1, 0.5, 0, 0]),  # the overlap counts once
        ([(0, 0, 0.25, 1), (0.125, 0, 0.375, 1)], 1, 4, [1, 0.5, 0, 0]),
        ([(0.5, 0.5, 0.5, 1), (0.3, 0.3, 0.3, 0.3)], 2, 2, [0] * 4),
        ([], 1, 3, [0] * 3),
        ([(-0.001, 0, 0.5, 1.001)], 1, 2, [1, 0]),  # what rounding puts outside the image is cut off
    ],
)
def test_coverage_by_hand(boxes, rows, columns, expected):
    np.testing.assert_allclose(box_coverage(boxes, rows, columns), expected, atol=1e-7)


# --- a small written world: images of several grids, prompt tokens among the patches, captions with phrases ----------

SQUARE, RAGGED = ((4, 4),) * 4, ((3, 5), (4, 2), (1, 6), (5, 3))  # rows and columns of each image
PROMPTS, DIM = 3, 8


class Written:
    """Random records, queries, and visual tokens; `phrases` and `holders` say independently what is what.

    Attributes:
        phrases: (image, boxes, caption, token numbers) of each phrase with boxes.
        holders: per image, the token that each of its patches went to, in row-major order.
    """

    def __init__(self, seed, grids=SQUARE, reduced=False):
        """`reduced`: some tokens hold two patches each, as behind a tower that merges them."""
        rng = np.random.default_rng(seed)
        unit = lambda *shape: F.normalize(torch.from_numpy(rng.normal(size=shape)).float(), dim=-1)
        self.grids = grids
        self.records, offsets, self.phrases = [], [], []
        for image in range(len(grids)):
            captions = []
            for _ in range(int(rng.integers(1, 4))):
                captions.append(self._caption(rng, image, len(offsets), offsets))
            self.records.append(ImageRecord(f"{image}", Path("none"), tuple(captions)))
        self.flat = [unit(len(rows), DIM) for rows in offsets]
        self.queries = []
        for start in range(0, len(offsets), 3):  # batches of three, padded with what must not matter
            part = slice(start, start + 3)
            pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
            mask = pad([torch.ones(len(rows), dtype=torch.bool) for rows in offsets[part]])
            tokens = pad(self.flat[part], padding_value=9.0)
            self.queries.append(QueryTokens(tokens, mask, pad([torch.tensor(rows) for rows in offsets[part]])))
        self._see(rng, unit, reduced)
        self.index = PhraseIndex(self.records, self.queries)

    def _see(self, rng, unit, reduced):
        """Visual tokens: prompts before, between and after the patches, then padding of which nothing may be used."""
        self.holders = []
        lengths = []
        for image, (rows, columns) in enumerate(self.grids):
            patches = rows * columns
            held = patches - patches // 3 if reduced else patches  # a third of the patches has gone to another's token
            lengths.append(held + PROMPTS + image % 2)
            places = np.sort(rng.permutation(lengths[-1])[:held]).tolist()
            token_of = [*range(held), *rng.permutation(held)[: patches - held].tolist()]
            token_of = rng.permutation(token_of).tolist() if reduced else token_of
            self.holders.append([places[token] for token in token_of])
        images, longest, most = len(self.grids), max(lengths) + 1, max(map(len, self.holders))
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        patches = torch.zeros(images, longest, dtype=torch.bool)
        coords = torch.full((images, longest, 2), 0.5)
        source = torch.full((images, most), -1)
        for image, (holders, grid) in enumerate(zip(self.holders, self.grids)):
            patches[image, holders] = True
            coords[image, holders] = visual_coords(*grid)
            source[image, : len(holders)] = torch.tensor(holders)
        seeds = torch.from_numpy(rng.integers(-(2**62), 2**62, images))
        tokens = unit(images, longest, DIM).masked_fill(~mask[..., None], float("nan"))
        grid = torch.tensor(self.grids)
        if not reduced:
            layout = grid_layout(patches, grid)
            assert torch.equal(layout.source, source)
            assert torch.equal(layout.coords, coords)
        self.visual = VisualTokens(tokens, coords, mask, patches, seeds, grid=grid, source=source)

    def _caption(self, rng, image, number, offsets):
        words = ["".join(rng.choice(list("abcdef"), int(rng.integers(1, 5)))) for _ in range(int(rng.integers(3, 9)))]
        words.append(".")
        starts = np.concatenate([[0], np.cumsum([len(word) + 1 for word in words])])
        rows, tokens_of = [[-1, -1]], []  # a prefix token; then a word in one or two pieces, the first with its space
        for word, start in zip(words, starts.tolist()):
            begin, end = max(0, start - 1), start + len(word)
            cut = int(rng.integers(start + 1, end + 1))
            pieces = [[begin, cut], [cut, end]] if cut < end else [[begin, end]]
            tokens_of.append(list(range(len(rows), len(rows) + len(pieces))))
            rows += pieces
        rows += [[-1, -1]] * 2
        phrases, word = [], int(rng.integers(0, 2))
        while word < len(words) - 1:
            last = min(len(words) - 2, word + int(rng.integers(0, 3)))
            corners = np.sort(rng.random((int(rng.integers(0, 3)), 2, 2)), axis=1).reshape(-1, 4).tolist()
            start, end = int(starts[word]), int(starts[last]) + len(words[last])
            text = " ".join(words)[start:end]
            phrases.append(Phrase(text, f"{len(self.phrases)}", ("other",), start, end, tuple(corners)))
            if corners:
                self.phrases.append((image, corners, number, list(itertools.chain(*tokens_of[word : last + 1]))))
            word = last + 1 + int(rng.integers(0, 2))
        offsets.append(rows)
        return Caption(" ".join(words), tuple(phrases), True)


def naive_phrase(merged, row, tokens, boxes, grid, holders):
    """Evidence, BoxMass and IoU of one phrase, by METHOD section 6's words, one number at a time.

    A token of several patches shares its weight evenly among them.
    """
    covered = box_coverage(boxes, *grid).tolist()
    evidence, masses, region = [0.0] * len(holders), [], set()
    for token in tokens:
        similarity = [
            float(token @ vector) if real else -math.inf for vector, real in zip(merged.tokens[row], merged.mask[row])
        ]
        winner = similarity.index(max(similarity))
        weight = [float(merged.weights[row, place, winner]) / holders.count(place) for place in holders]
        shares = [w / sum(weight) if sum(weight) > 0 else 0.0 for w in weight]
        evidence = [e + share / len(tokens) for e, share in zip(evidence, shares)]
        masses.append(sum(share * c for share, c in zip(shares, covered)))
        region |= {cell for cell, place in enumerate(holders) if merged.assignments[row, place] == winner}
    overlap = sum(covered[cell] for cell in region)
    return evidence, sum(masses) / len(masses), overlap / (len(region) + sum(covered) - overlap)


def merged_by(name, visual, regions=5):
    if name == "merge_tokens":
        return merge_tokens(visual.tokens, visual.coords, MergeConfig(num_regions=regions), mask=visual.mask)
    return make_compressor(MergeConfig(num_regions=regions, compressor=name))(visual)


def rows_of(visual, images):
    names = ("tokens", "coords", "mask", "patches", "seeds", "grid", "source")
    return VisualTokens(**{name: getattr(visual, name)[torch.tensor(images)] for name in names})


# --- ground ---------------------------------------------------------------------------------------------------------


WORLDS = {"square": (SQUARE, False), "ragged": (RAGGED, False), "reduced": (RAGGED, True)}


@pytest.mark.parametrize("name", ["merge_tokens", "hpool", "random", "none"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", WORLDS)
def test_ground_equals_a_loop_over_phrases(kind, name, seed):
    written = Written(seed, *WORLDS[kind])
    for images in ([0, 1, 2, 3], [2], [1, 2], [3, 0]):
        visual = rows_of(written.visual, images)
        merged = merged_by(name, visual)
        found = ground(merged, written.index.own_tokens(images, written.flat), written.index, visual)
        expected, numbers = [], []
        for number, (image, boxes, caption, tokens) in enumerate(written.phrases):
            if image in images:
                numbers.append(number)
                named = written.flat[caption][tokens]
                grid, holders = written.grids[image], written.holders[image]
                expected.append(naive_phrase(merged, images.index(image), named, boxes, grid, holders))
        assert found["phrases"].tolist() == numbers
        assert found["evidence"].shape == (len(numbers), visual.source.shape[1])
        for evidence, (naive, _, _) in zip(found["evidence"], expected):
            close(evidence, F.pad(torch.tensor(naive), (0, len(evidence) - len(naive))))
        close(found["box_mass"], torch.tensor([mass for _, mass, _ in expected]))
        close(found["iou"], torch.tensor([iou for *_, iou in expected]))
        captions = [k for k, record in enumerate(written.records) for _ in record.captions]
        numbers = [number for number, image in enumerate(captions) if image in images]
        assert found["captions"].tolist() == numbers
        match = [
            sum(float((merged.tokens[row][merged.mask[row]] @ token).max()) for token in written.flat[number])
            for number in numbers
            for row in [images.index(captions[number])]
        ]
        close(found["match"], torch.tensor(match))


def test_the_written_world_has_what_the_loop_is_for():
    """Prompt tokens win somewhere, phrases have several boxes and tokens, some captions name nothing boxed."""
    worlds = [Written(seed, *WORLDS[kind]) for seed in range(4) for kind in WORLDS]
    assert {len(boxes) for world in worlds for _, boxes, _, _ in world.phrases} == {1, 2}
    assert {len(tokens) for world in worlds for *_, tokens in world.phrases} >= {1, 2, 3}
    for world in worlds:
        merged = merged_by("none", world.visual)
        found = ground(merged, world.index.own_tokens(range(4), world.flat), world.index, world.visual)
        assert (found["box_mass"] == 0).any()
        assert (found["iou"] > HIT_IOU).any()
    shared = [max(map(holders.count, holders)) for world in worlds for holders in world.holders]
    assert set(shared) >= {1, 2}
    assert any(not world.visual.patches[:, 0].all() for world in worlds)  # a prompt token stands first


def test_a_batch_of_several_grids_is_its_images_alone():
    """What pads the smaller grids reaches nobody."""
    written = Written(0, *WORLDS["reduced"])
    whole = ground(
        merged_by("hpool", written.visual),
        written.index.own_tokens(range(4), written.flat),
        written.index,
        written.visual,
    )
    start = 0
    for image, (rows, columns) in enumerate(written.grids):
        visual = rows_of(written.visual, [image])
        visual = replace(visual, source=visual.source[:, : rows * columns])
        own = written.index.own_tokens([image], written.flat)
        alone = ground(merged_by("hpool", visual), own, written.index, visual)
        end = start + len(alone["phrases"])
        assert end > start
        for name in ("phrases", "box_mass", "iou"):
            close(whole[name][start:end], alone[name])
        close(whole["evidence"][start:end, : rows * columns], alone["evidence"])
        assert (whole["evidence"][start:end, rows * columns :] == 0).all()
        start = end
    assert start == len(whole["phrases"])


class Given(PhraseIndex):
    """A phrase index whose coverage is given, (phrases, P)."""

    def __init__(self, coverage):
        super().__init__([], [])
        self.given = torch.tensor(coverage)

    def coverage(self, phrases, grid, width):
        assert grid.tolist() == [[1, width]] * len(phrases)
        return self.given[phrases]


def hand(tokens, weights, assignments, own, phrases, coverage, source, mask=None):
    """`ground` for one image of one row of patches; everything is given."""
    tokens, weights = torch.tensor(tokens, dtype=torch.float32)[None], torch.tensor(weights)[None]
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else torch.tensor([mask])
    merged = MergedTokens(tokens, torch.zeros(*tokens.shape[:2], 2), mask, weights, torch.tensor([assignments]))
    own = OwnTokens(
        torch.tensor(own, dtype=torch.float32)[None], torch.zeros(1, len(own)).long(), torch.tensor(phrases)
    )
    grid, source = torch.tensor([[1, len(source)]]), torch.tensor([source])
    visual = VisualTokens(weights, torch.zeros(*weights.shape[:2], 2), grid=grid, source=source)
    return ground(merged, own, Given(coverage), visual)


def test_ground_by_hand():
    """Four patches and a prompt token, two vectors; the phrase's two tokens take one vector each."""
    found = hand(
        tokens=[[1, 0], [0, 1]],
        weights=[[0.9, 0.1], [0.3, 0.7], [0.2, 0.8], [0.1, 0.9], [0.5, 0.5]],  # the last is the prompt token
        assignments=[0, 1, 1, 1, 0],
        own=[[1, 0.5], [0.2, 0.4], [0.6, 0.8]],
        phrases=[[0, 0, -1]],
        coverage=[[1.0, 0.5, 0.0, 0.0]],
        source=[0, 1, 2, 3],
    )
    first = (0.9 + 0.3 * 0.5) / 1.5
    second = (0.1 + 0.7 * 0.5) / 2.5
    close(found["box_mass"], torch.tensor([(first + second) / 2]))
    close(found["iou"], torch.tensor([1.5 / 4]))  # both regions together are all four patches
    close(found["match"], torch.tensor([1 + 0.4 + 0.8]))
    assert (found["phrases"].tolist(), found["captions"].tolist()) == ([0], [0])


def test_a_token_of_two_patches_by_hand():
    """Three patches, the outer two in one token; the other token is the middle patch's."""
    given = {
        "tokens": [[1, 0], [0, 1]],
        "weights": [[0.2, 0.8], [0.6, 0.4]],
        "assignments": [1, 0],
        "phrases": [[0]],
        "coverage": [[1.0, 0.0, 0.5]],
        "source": [1, 0, 1],
    }
    first = hand(own=[[1, 0]], **given)
    close(first["evidence"], torch.tensor([[0.3, 0.2, 0.3]]) / 0.8)
    close(first["box_mass"], torch.tensor([(0.3 + 0.3 * 0.5) / 0.8]))
    close(first["iou"], torch.tensor([1.5 / 2]))  # the region is both outer patches
    second = hand(own=[[0, 1]], **given)
    close(second["evidence"], torch.tensor([[0.2, 0.8, 0.2]]) / 1.2)
    close(second["iou"], torch.tensor([0 / 2.5]))


def test_a_winning_prompt_token_has_no_evidence_and_no_region():
    given = {
        "tokens": [[1, 0], [0, 1]],
        "weights": [[1.0, 0.0], [0.0, 1.0]],
        "assignments": [0, 1],
        "coverage": [[1.0]],
        "source": [0],
    }
    on_prompt = hand(own=[[0, 1]], phrases=[[0]], **given)
    assert (on_prompt["box_mass"].tolist(), on_prompt["iou"].tolist()) == ([0.0], [0.0])
    half = hand(own=[[0, 1], [1, 0]], phrases=[[0, 0]], **given)  # one token each: the mean, and the region of one
    assert (half["box_mass"].tolist(), half["iou"].tolist()) == ([0.5], [1.0])


def test_vectors_masked_out_never_win():
    given = {
        "weights": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
        "assignments": [0, 1],
        "own": [[1, 0]],
        "phrases": [[0]],
        "coverage": [[1.0, 0.0]],
        "source": [0, 1],
        "mask": [True, True, False],
    }
    for vector in ([0, 0], [5, 0]):  # a zero beats negative similarities, a large one everything
        found = hand(tokens=[[-0.5, 0.1], [-0.9, 0.1], vector], **given)
        assert (found["box_mass"].tolist(), found["iou"].tolist(), found["match"].tolist()) == ([1.0], [1.0], [-0.5])


def test_more_vectors_masked_out_change_nothing():
    written = Written(0)
    own = written.index.own_tokens(range(4), written.flat)
    merged = merged_by("merge_tokens", written.visual)
    extra = own.tokens[:, :2] * 3
    wider = MergedTokens(
        torch.cat([merged.tokens, extra], 1),
        F.pad(merged.coords, (0, 0, 0, 2)),
        F.pad(merged.mask, (0, 2)),
        F.pad(merged.weights, (0, 2)),
        merged.assignments,
    )
    alike, found = (ground(each, own, written.index, written.visual) for each in (merged, wider))
    for name, value in alike.items():
        assert torch.equal(found[name], value)


def test_an_image_that_names_nothing_boxed_has_only_matches():
    record = ImageRecord("0", Path("none"), (Caption("a b", (), True), Caption("c", (), True)))
    tokens = F.normalize(torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    query = QueryTokens(tokens, mask, torch.tensor([[[-1, -1], [0, 1], [1, 3]], [[-1, -1], [0, 1], [0, 0]]]))
    index = PhraseIndex([record], [query])
    visual = rows_of(Written(0).visual, [0])
    found = ground(merged_by("none", visual), index.own_tokens([0], [tokens[0], tokens[1, :2]]), index, visual)
    assert [len(found[name]) for name in ("phrases", "box_mass", "iou", "captions", "match")] == [0, 0, 0, 2, 2]
    assert found["evidence"].shape == (0, 16)


# --- which tokens name a phrase -------------------------------------------------------------------------------------


@pytest.fixture
def test_split(world):
    return flickr.load_split(world, "test", boxes=True)


def texts_of(records):
    return [caption.text for record in records for caption in record.captions]


def test_phrase_tokens_of_a_real_tokenizer(retriever, test_split):
    """Every token carries its caption's and its own number as its vector, so it is seen where each of them went."""
    queries = list(encode_texts(retriever, texts_of(test_split), 7))
    index = PhraseIndex(test_split, queries)
    offsets = [rows[mask].tolist() for query in queries for rows, mask in zip(query.offsets, query.mask)]
    marks = [
        torch.tensor([[caption, token] for token in range(len(rows))]).float() for caption, rows in enumerate(offsets)
    ]
    captions = [caption for record in test_split for caption in record.captions]
    named = [(number, p) for number, caption in enumerate(captions) for p in caption.phrases if p.boxes]
    assert len(named) > 50
    grids = torch.tensor([[8, 8], [3, 5]])[torch.arange(len(named)) % 2]  # of one split, several
    for row, (rows, columns), (_, phrase) in zip(
        index.coverage(torch.arange(len(named)), grids, 70), grids.tolist(), named, strict=True
    ):
        assert np.array_equal(row[: rows * columns].numpy(), box_coverage(phrase.boxes, rows, columns))
        assert not row[rows * columns :].any()
    for images in ([0], [3, 4, 5], [7, 2]):
        own = index.own_tokens(images, marks)
        assert own.tokens.shape[:2] == own.captions.shape == own.phrases.shape
        for row, image in enumerate(images):
            real = own.captions[row] >= 0
            assert (own.phrases[row][~real] == -1).all()
            seen = own.tokens[row][real].long().tolist()
            numbers = range(5 * image, 5 * image + 5)
            assert seen == [[number, token] for number in numbers for token in range(len(offsets[number]))]
            assert own.captions[row][real].tolist() == [number for number, _ in seen]
            letters = {}
            for (number, token), phrase in zip(seen, own.phrases[row][real].tolist()):
                first, last = offsets[number][token]
                inside = set(range(first, last)) if first >= 0 else set()
                boxed = [p for p in captions[number].phrases if p.boxes]
                touched = [p for p in boxed if inside & set(range(p.start, p.end))]
                if phrase < 0:
                    assert not touched
                else:
                    assert (named[phrase][0], named[phrase][1]) == (number, touched[0])
                    assert captions[number].text[first:last].strip(" .,")
                    letters.setdefault(phrase, set()).update(inside)
            for phrase, found in letters.items():
                start, end = named[phrase][1].start, named[phrase][1].end
                assert set(range(start, end)) <= found <= set(range(start - 1, end))  # a token may hold its space
            assert sorted(letters) == [k for k, (number, _) in enumerate(named) if number in numbers]


def test_neither_prefix_nor_punctuation_belongs_to_a_phrase(retriever, test_split):
    queries = list(encode_texts(retriever, texts_of(test_split)[:5], 5))
    index = PhraseIndex(test_split[:1], queries)
    flat = [tokens[mask] for query in queries for tokens, mask in zip(query.tokens, query.mask)]
    own = index.own_tokens([0], flat)
    outside = 0
    phrases = own.phrases[0].tolist()
    for caption, offsets, mask in zip(test_split[0].captions, queries[0].offsets, queries[0].mask):
        for first, last in offsets[mask].tolist():
            phrase = phrases.pop(0)
            if first < 0 or not any(letter.isalnum() for letter in caption.text[first:last]):
                assert phrase == -1
                outside += 1
    assert phrases == []
    assert outside >= 5 * (3 + 1 + 10)  # <bos> and prefix, the full stop, the augmentation tokens


def test_queries_without_offsets_are_refused(retriever, test_split):
    (query,) = encode_texts(retriever, texts_of(test_split)[:5], 5)
    bare = QueryTokens(query.tokens, query.mask)
    with pytest.raises(InputError, match="character offsets; encode the captions anew"):
        PhraseIndex(test_split[:1], [bare])


@pytest.mark.parametrize("count", [4, 6])
def test_another_number_of_queries_is_refused(retriever, test_split, count):
    queries = list(encode_texts(retriever, texts_of(test_split)[:count], 4))
    with pytest.raises(InputError, match=f"{count} encoded queries for 5 captions"):
        PhraseIndex(test_split[:1], queries)


# --- OSR ------------------------------------------------------------------------------------------------------------

PRUNERS = ("sap-mean", "sap-max", "random")


def test_osr_is_the_ratio_of_best_similarities(retriever, test_split):
    records = test_split[:4]
    names = ("none", "samer", "hpool", "hpc", *PRUNERS)
    merges = {name: MergeConfig(num_regions=8, compressor=name) for name in names}
    values = measure(retriever, records, merges, 3)
    for name, merge in merges.items():
        compressor = fitted_compressor(retriever, records, merge, 3)
        ratios = []
        for record in records:
            visual = retriever.encode_images(retriever.record_inputs([record]), compressor.needs)
            merged = compressor(visual)
            for caption in record.captions:
                (query,) = encode_texts(retriever, [caption.text], 1)
                kept = every = 0.0
                for token in query.tokens[0][query.mask[0]]:
                    kept += float((merged.tokens[0][merged.mask[0]] @ token).max())
                    every += float((visual.tokens[0] @ token).max())
                ratios.append(kept / every)
        close(values[name]["osr"], torch.tensor(ratios), atol=1e-4)
    assert torch.equal(values["none"]["osr"], torch.ones(20))
    for name in PRUNERS:
        assert values[name]["osr"].max() <= 1
        assert values[name]["osr"].mean() < 0.99


# --- captions by the smallest object they name ----------------------------------------------------------------------


def test_thirds_of_the_named_captions():
    areas = np.array([0.9, np.nan, 0.1, 0.5, 0.2, 0.4, np.nan, 0.3])
    (low, high), part = size_thirds(areas)
    assert part.tolist() == [2, -1, 0, 2, 0, 1, -1, 1]
    assert (low, high) == pytest.approx((0.2 + 0.1 * 2 / 3, 0.4 + 0.1 / 3))


def test_equal_areas_share_a_part():
    (low, high), part = size_thirds(np.array([0.2, 0.2, 0.2, 0.2, 0.7, np.nan]))
    assert ((low, high), part.tolist()) == ((0.2, 0.2), [0, 0, 0, 0, 2, -1])
    edges, part = size_thirds(np.array([0.3, np.nan, 0.3]))
    assert (edges, part.tolist()) == ((0.3, 0.3), [0, -1, 0])


@given(st.lists(st.one_of(st.just(math.nan), st.integers(1, 12).map(lambda k: k / 12)), min_size=1, max_size=40))
def test_thirds_are_in_order_and_balanced(areas):
    values = np.array(areas)
    named = values[~np.isnan(values)]
    if not len(named):
        with pytest.raises(InputError, match="no caption names an object"):
            size_thirds(values)
        return
    edges, part = size_thirds(values)
    assert edges[0] <= edges[1]
    assert ((part == -1) == np.isnan(values)).all()
    for a, b in itertools.pairwise(sorted(zip(values[part >= 0], part[part >= 0]))):
        assert a[1] <= b[1]
        assert a[1] == b[1] or a[0] < b[0]
    if len(set(named)) == len(named):
        assert max(np.bincount(part[part >= 0], minlength=3)) <= math.ceil(len(named) / 3)


def test_no_named_object_is_refused():
    with pytest.raises(InputError, match="no caption names an object with a box"):
        size_thirds(np.array([np.nan, np.nan]))
