"""Each reducer's pure functions against an image-by-image oracle, and what they refuse."""

import naive_reducers as naive
import pytest
import torch

from samer.config import InputError
from samer.reducers import adamerge, cubist, tome


def tokens(images, count, width=8, seed=0):
    """Different images: noise of different spread."""
    torch.manual_seed(seed)
    return torch.randn(images, count, width) * torch.linspace(0.3, 1.0, images)[:, None, None]


def same(found, mask, source, image, y, places):
    assert torch.allclose(found[image][mask[image]], y, atol=1e-5)
    assert not found[image][~mask[image]].any()
    assert mask[image].tolist() == [n < len(y) for n in range(found.shape[1])]
    assert source[image].tolist() == places


@pytest.mark.parametrize(("count", "r"), [(2, [1, 0]), (7, [3, 2, 0]), (16, [8, 1, 5]), (33, [16, 9])])
def test_tome_equals_the_oracle(count, r):
    x, r = tokens(len(r), count), torch.tensor(r)
    sizes = torch.randint(1, 9, x.shape[:2]).float()
    metric = torch.randn(*x.shape[:2], 5)
    y, mask, source, after = tome.merge_step(x, r, sizes, metric=metric)
    for image in range(len(x)):
        wanted, places, sums = naive.tome(x[image], int(r[image]), sizes[image], metric[image])
        same(y, mask, source, image, wanted, places)
        assert torch.allclose(after[image][mask[image]], torch.tensor(sums))
    plain = tome.merge_step(x, r)
    wanted, places, _ = naive.tome(x[0], int(r[0]), torch.ones(count), x[0])
    same(*plain[:3], 0, wanted, places)


@pytest.mark.parametrize("order", adamerge.ORDERS)
@pytest.mark.parametrize(("count", "r"), [(2, [1, 0]), (7, [3, 2, 0]), (16, [8, 1, 5]), (33, [16, 9])])
def test_adamerge_equals_the_oracle(count, r, order):
    x, r = tokens(len(r), count), torch.tensor(r)
    y, mask, source = adamerge.merge_step(x, r, order=order)
    for image in range(len(x)):
        same(y, mask, source, image, *naive.adamerge(x[image], int(r[image]), order))
    found = adamerge.salience(x)
    assert torch.allclose(found, torch.tensor([naive.salience(each) for each in x]), atol=1e-5)
    assert found.amin(1).tolist() == [0.0] * len(x)
    assert found.amax(1).tolist() == [1.0] * len(x)


def test_salience_is_right_where_nearly_all_attention_is_a_tokens_own():
    """As on real features: column sums are 1 + 1e-6 and less, which float32 rounds away if it adds them up."""
    x = tokens(2, 20, width=64) + 1
    wanted = torch.tensor([naive.salience(each) for each in x.double()])
    assert torch.allclose(adamerge.salience(x), wanted, atol=1e-4)
    column = (x @ x.transpose(1, 2)).softmax(-1).sum(1)
    assert bool((column.sub(1).abs() < 1e-3).any())


def test_adamerge_ragged_images_are_merged_as_each_is_alone():
    x = tokens(3, 16)
    counts = [16, 9, 4]
    mask = torch.arange(16) < torch.tensor(counts)[:, None]
    x = torch.where(mask[..., None], x, 7.0)  # what padding holds must not matter
    r = torch.tensor([5, 4, 2])
    y, after, source = adamerge.merge_step(x, r, mask=mask)
    layer = adamerge.Layer(x, mask)
    for image, count in enumerate(counts):
        own = x[image, :count]
        wanted, places = naive.adamerge(own, int(r[image]))
        assert torch.allclose(y[image, : len(wanted)], wanted, atol=1e-5)
        assert after[image].sum() == len(wanted)
        assert source[image].tolist() == places + [-1] * (16 - count)
        assert float(layer.similarity[image]) == pytest.approx(naive.adamerge_similarity(own), abs=1e-5)
    assert layer.most.tolist() == [8, 4, 2]


def test_adamerge_tokens_without_salience():
    x = torch.ones(1, 6, 4)  # all alike: salience is 0 everywhere, and a mean by it would be 0 / 0
    y, mask, source = adamerge.merge_step(x, torch.tensor([3]))
    assert y[0, :3].tolist() == [[1.0] * 4] * 3
    assert mask[0].tolist() == [True] * 3 + [False] * 3
    assert source[0].tolist() == [0, 0, 0, 0, 1, 2]  # equal cosines: the first of the second half
    assert adamerge.salience(x).tolist() == [[0.0] * 6]


def test_the_rate_is_the_published_formula():
    found = adamerge.rate(torch.tensor([0.5, 0.7, 0.1]), 0.5, 0.2, 20, 0.5, 1.0)
    assert found.tolist() == [10, 17, 0]  # 20 sigmoid(0), 20 sigmoid(2) = 17.6, 20 sigmoid(-4) = 0.36


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(1, 2, 0, 1), (4, 6, 2, 3), (5, 7, 2, 3), (7, 4, 1, 0), (8, 8, 0, 0), (6, 5, 3, 1)],
)
def test_cubist_equals_the_oracle(height, width, rows, columns):
    x = tokens(3, height * width).unflatten(1, (height, width))
    before = x.clone()
    y, source = cubist.reduce_grid(x, rows=rows, columns=columns)
    assert torch.equal(x, before)  # nothing is written into the input
    assert y.shape == (3, height - rows, width - columns, 8)
    for image in range(3):
        wanted, places = naive.cubist(x[image], rows, columns)
        assert torch.equal(y[image], wanted)
        assert source[image].tolist() == places


def test_cubist_two_tokens_into_one_take_the_largest_of_three():
    x = torch.tensor([[[1.0, 0.0, 0.2], [1.0, 3.0, 0.1], [1.1, 2.9, -0.5], [1.2, 2.8, 4.0]]])
    x = torch.cat([x, x[:, :1] * -1], 1)  # 5 tokens: 1 goes right to 2, 3 goes left to 2
    y, source = cubist.reduce_rows(x, 2)
    assert source.tolist() == [[0, 1, 1, 1, 2]]
    assert y[0, 1].tolist() == pytest.approx([1.2, 3.0, 4.0])


@pytest.mark.parametrize(
    ("height", "width", "window", "r"), [(6, 6, 3, 1), (8, 10, 4, 1), (9, 7, 5, 1), (4, 4, 6, 2), (8, 8, 4, 2)]
)
def test_windows_are_merged_one_by_one(height, width, window, r):
    x = tokens(2, height * width).unflatten(1, (height, width))
    y, source = cubist.reduce_windows(x, window, r)
    left = window - r
    for image in range(2):
        places = torch.full((height, width), -1)
        for top in range(0, height, window):
            for first in range(0, width, window):
                part = x[image, top : top + window, first : first + window]
                wanted, own = naive.cubist(part, r, r)
                up, beside = top // window * left, first // window * left
                assert torch.equal(y[image, up : up + wanted.shape[0], beside : beside + wanted.shape[1]], wanted)
                own = torch.tensor(own).view(part.shape[:2])
                moved = (up + own // wanted.shape[1]) * y.shape[2] + beside + own % wanted.shape[1]
                places[top : top + window, first : first + window] = moved
        assert source[image].tolist() == places.flatten().tolist()


def test_survivors_are_bit_equal_and_unmerge_puts_them_back():
    x = tokens(2, 30).double() / 3
    r = torch.tensor([4, 9])
    for y, mask, source in (tome.merge_step(x, r)[:3], adamerge.merge_step(x, r)):
        back = cubist.unmerge(y, source)
        for image in range(2):
            alone = source[image].bincount(minlength=30)[source[image]] == 1
            assert int(alone.sum()) >= 30 - 2 * int(r[image])
            assert torch.equal(back[image][alone], x[image][alone])
            assert int(mask[image].sum()) == 30 - int(r[image])
    y, source = cubist.reduce_grid(x.unflatten(1, (5, 6)), 1, 2)
    back = cubist.unmerge(y.flatten(1, 2), source)
    alone = torch.stack([each.bincount(minlength=30)[each] == 1 for each in source])
    assert bool(alone.any())
    assert torch.equal(back[alone], x[alone])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tokens_stay_in_their_dtype(dtype):
    x, r = tokens(2, 12).to(dtype), torch.tensor([3, 4])
    assert tome.merge_step(x, r)[0].dtype == dtype
    assert adamerge.merge_step(x, r)[0].dtype == dtype
    assert cubist.reduce_grid(x.unflatten(1, (3, 4)), 1, 1)[0].dtype == dtype


def test_gradients_flow_to_every_token():
    x = tokens(1, 12).requires_grad_()
    for y in (tome.merge_step(x, torch.tensor([4]))[0], adamerge.merge_step(x, torch.tensor([4]))[0]):
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert int((gradient.abs().sum(-1) > 0).sum()) >= 11  # the one without salience may have no weight
    (gradient,) = torch.autograd.grad(cubist.reduce_grid(x.unflatten(1, (3, 4)), 1, 1)[0].sum(), x)
    assert gradient.sum() == pytest.approx(2 * 3 * 8)


def test_what_can_not_be_merged_is_refused():
    x = tokens(2, 9)
    for function in (tome.merge_step, adamerge.merge_step):
        with pytest.raises(InputError, match=r"r is 5 for image 1 .* 0 to 4"):
            function(x, torch.tensor([4, 5]))
        with pytest.raises(InputError, match="r is -1 for image 0"):
            function(x, torch.tensor([-1, 0]))
        with pytest.raises(InputError, match=r"r must be \(2,\) long"):
            function(x, torch.tensor([1.0, 2.0]))
    with pytest.raises(InputError, match="order 'random' is unknown"):
        adamerge.merge_step(x, torch.tensor([1, 1]), order="random")
    with pytest.raises(InputError, match="a row of 3 tokens can lose 0 to 1 of them, not 2"):
        cubist.reduce_grid(x.unflatten(1, (3, 3)), 0, 2)
    with pytest.raises(InputError, match="has one of 1, which can lose 0"):
        cubist.reduce_windows(tokens(1, 20).unflatten(1, (4, 5)), 4, 1)
