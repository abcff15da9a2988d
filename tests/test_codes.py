"""Codes of 1, 2 and 4 bits a component: what is stored, looked up and scored, against numpy written plainly."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from samer import products
from samer.codes import COMPONENTS, ENTRIES, Codes, learn, second_moment
from samer.config import InputError
from samer.products import unpack_signs
from samer.scoring import StoredImages, maxsim, pack_signs, score_stored, search
from samer.tokens import QueryTokens

DIM, WIDTH, IMAGES = 16, 6, 120


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def photographed(count=IMAGES, seed=1):
    """Unit vectors (n, K, D) and mask: each image's around one direction of its own, in a space longer in some axes."""
    stretch = torch.linspace(2, 0.3, DIM)
    tokens = normalize((normal(count, 1, DIM, seed=seed) + normal(count, WIDTH, DIM, seed=seed + 1)) * stretch, dim=-1)
    mask = torch.ones(count, WIDTH, dtype=torch.bool)
    mask[::7, -2:] = False
    return tokens * mask[..., None], mask


@pytest.fixture(scope="module", params=COMPONENTS)
def made(request):
    """A kind, its tables, images, their mask and their codes."""
    tokens, mask = photographed()
    codebook = learn(request.param, tokens, mask)
    return request.param, codebook, tokens, mask, codebook.encode(tokens, mask)


def looked_up(codebook, codes):
    """(n, K, D) int8, entry by entry."""
    tables, codes = codebook.tables.numpy(), codes.numpy()
    rows = [np.concatenate([tables[g, code] for g, code in enumerate(row)]) for row in codes.reshape(-1, len(tables))]
    return np.stack(rows).reshape(*codes.shape[:2], -1)


def test_a_byte_names_an_entry_of_its_groups_table(made):
    kind, codebook, _, _, images = made
    assert images.codes.dtype == torch.uint8
    assert images.codes.shape == (IMAGES, WIDTH, DIM // COMPONENTS[kind])
    assert codebook.tables.shape == (DIM // COMPONENTS[kind], ENTRIES, COMPONENTS[kind])
    assert (codebook.decode(images.codes).numpy() == looked_up(codebook, images.codes)).all()


def test_vectors_are_base_and_entries_turned_back(made):
    _, codebook, _, mask, images = made
    base = images.bases.double() * images.scales.double()[:, None]
    rest = torch.from_numpy(looked_up(codebook, images.codes)).double() * codebook.scale
    expected = (base[:, None] + rest @ torch.linalg.inv(codebook.images.double())) * mask[..., None]
    torch.testing.assert_close(codebook.vectors(images, mask).double(), expected, atol=1e-4, rtol=0)


def test_each_code_is_the_nearest_entry_and_missing_vectors_have_none(made):
    _, codebook, tokens, mask, images = made
    base = images.bases.double() * images.scales.double()[:, None]
    rest = ((tokens.double() - base[:, None]) @ codebook.images.double() * codebook.costs)[mask]
    groups = rest.view(len(rest), len(codebook.tables), -1)
    entries = codebook.tables.double() * codebook.scale * codebook.costs.view(len(codebook.tables), 1, -1)
    distances = (groups[:, :, None] - entries[None]).square().sum(-1)  # (vectors, G, 256)
    own = distances.gather(2, images.codes[mask].long()[..., None])[..., 0]
    assert (own <= distances.amin(2) + 1e-6).all()
    assert (images.codes[~mask] == 0).all()


def test_bases_are_means_over_the_vectors_that_are_there(made):
    _, _, tokens, mask, images = made
    means = torch.stack([own[here].mean(0) for own, here in zip(tokens, mask)])
    error = (images.bases * images.scales[:, None] - means).abs()
    assert (error <= images.scales[:, None] / 2 + 1e-6).all()


def test_an_images_code_depends_on_that_image_alone(made):
    _, codebook, tokens, mask, images = made
    for row in (0, 5, 63):
        alone = codebook.encode(tokens[row : row + 1], mask[row : row + 1])
        assert torch.equal(alone.codes[0], images.codes[row])
        assert torch.equal(alone.bases[0], images.bases[row])


def asked(count=9, seed=5):
    lengths = torch.arange(count) % 4 + 1
    return QueryTokens(normalize(normal(count, 4, DIM, seed=seed), dim=-1), torch.arange(4) < lengths[:, None])


def stored(made, masked=True):
    _, codebook, _, mask, images = made
    return StoredImages(images.codes, images.scales, mask if masked else None, None, images.bases, codebook)


def whole_numbers(words):
    """Query tokens (m, D) rounded to 127 steps each, float64."""
    step = words.abs().amax(1, keepdim=True).double() / 127
    return (words.double() / step).round() * step


def naive(queries, images, mask):
    """Scores of what is stored with query tokens in int8, but for those that meet bases, in float64."""
    codebook, rows = images.codebook, []
    entries = torch.from_numpy(looked_up(codebook, images.tokens)).double() * codebook.scale
    bases = images.bases.double() * images.scale.double()[:, None]
    for tokens, here in zip(queries.tokens, queries.mask):
        turned = whole_numbers(tokens[here] @ codebook.queries)
        similar = torch.einsum("md,nkd->nmk", turned, entries) + (bases @ tokens[here].double().t())[..., None]
        similar = similar.masked_fill(~mask[:, None], float("-inf"))
        rows.append(similar.amax(2).mean(1))
    return torch.stack(rows)


@pytest.mark.parametrize("block", [None, 1, 100])
@pytest.mark.parametrize("masked", [True, False])
def test_scores_are_those_of_what_is_stored(made, masked, block):
    images, queries = stored(made, masked), asked()
    mask = made[3] if masked else torch.ones_like(made[3])
    found = score_stored(queries, images, block_elements=block).double()
    torch.testing.assert_close(found, naive(queries, images, mask), atol=2e-6, rtol=1e-5)


def test_scores_do_not_depend_on_the_kernel(made, monkeypatch):
    images, queries = stored(made), asked()
    expected = score_stored(queries, images)
    monkeypatch.setattr(products, "int8_product_works", lambda device: False)
    assert torch.equal(score_stored(queries, images), expected)
    assert products.int8_product_works(torch.device("cpu")) in (True, False)


def test_a_search_finds_the_best_scores(made):
    images, queries = stored(made), asked()
    scores, ids = score_stored(queries, images), [f"{k:03}" for k in range(IMAGES)]
    for row, found in zip(scores, search(queries, [(ids, images)], 5)):
        assert [name for name, _ in found] == [ids[k] for k in row.argsort(descending=True)[:5].tolist()]


def test_more_bits_are_nearer_and_one_learned_bit_is_nearer_than_a_sign():
    tokens, mask = photographed(400)
    errors = {}
    for kind in COMPONENTS:
        codebook = learn(kind, tokens, mask)
        errors[kind] = float((codebook.vectors(codebook.encode(tokens, mask), mask) - tokens)[mask].square().mean())
    assert errors["4bit"] < errors["2bit"] < errors["1bit"]
    signs = normalize(unpack_signs(pack_signs(tokens)).float(), dim=-1)
    assert errors["1bit"] < 0.3 * float((signs - tokens)[mask].square().mean())


def test_errors_are_least_where_queries_look():
    tokens, mask = photographed(400)
    words = normalize(normal(300, DIM, seed=8) * torch.linspace(0.1, 3, DIM), dim=-1)  # where images differ little
    costs = []
    for moment in (None, second_moment(words)):
        codebook = learn("1bit", tokens, mask, moment)
        error = (codebook.vectors(codebook.encode(tokens, mask), mask) - tokens)[mask]
        costs.append(float((error @ words.t()).square().mean()))
    assert costs[1] < 0.8 * costs[0]


def test_products_with_turned_queries_are_the_products(made):
    _, codebook, tokens, _, _ = made
    words = asked().tokens.flatten(0, 1)
    turned = (tokens.flatten(0, 1) @ codebook.images) @ (words @ codebook.queries).t()
    torch.testing.assert_close(turned, tokens.flatten(0, 1) @ words.t(), atol=1e-4, rtol=0)


def test_learning_is_the_same_every_time(made):
    kind, codebook, tokens, mask, _ = made
    again = learn(kind, tokens, mask)
    assert torch.equal(again.tables, codebook.tables)
    assert again.scale == codebook.scale


def test_4_bits_score_nearly_as_floats():
    tokens, mask = photographed(400)
    codebook = learn("4bit", tokens, mask)
    images = codebook.encode(tokens, mask)
    queries = asked(20)
    found = score_stored(queries, StoredImages(images.codes, images.scales, mask, None, images.bases, codebook))
    exact = maxsim(queries.tokens, tokens, queries.mask, mask)
    assert (found - exact).abs().max() < 0.1
    assert torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1] > 0.995


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.ones(300, 1, 12), "width divisible by 8; it is 12"),
        (torch.ones(300, 1, 4), "width divisible by 8; it is 4"),
        (torch.ones(20, 12, DIM), "256 entries, and there are only 240 vectors"),
    ],
)
def test_what_can_not_be_learned_from_is_refused(tokens, message):
    with pytest.raises(InputError, match=message):
        learn("1bit", tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))


def test_equal_vectors_make_tables_all_the_same():
    tokens = torch.zeros(300, 1, DIM)
    tokens[..., 0] = 1
    mask = torch.ones(300, 1, dtype=torch.bool)
    codebook = learn("2bit", tokens, mask)
    torch.testing.assert_close(codebook.vectors(codebook.encode(tokens, mask), mask), tokens, atol=0.01, rtol=0)


@pytest.mark.parametrize("spoil", ["bases", "scale", "codebook", "tokens"])
def test_codes_without_what_they_need_are_refused(made, spoil):
    images = stored(made)
    values = {"bases": None, "scale": 0.1, "codebook": None, "tokens": images.tokens[:, :, :-1]}
    with pytest.raises(InputError):
        score_stored(asked(), StoredImages(**{**vars(images), spoil: values[spoil]}))


def test_codes_are_a_part_of_what_numbers_take(made):
    kind, codebook, _, mask, images = made
    assert isinstance(images, Codes)
    per_vector = images.codes.nbytes / mask.numel()
    assert per_vector == DIM / COMPONENTS[kind] == codebook.code_bytes
