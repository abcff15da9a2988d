"""K as a share of an image's tokens: the setting, and every compressor on ragged batches against one image each."""

import dataclasses
import json
import math
from fractions import Fraction

import pytest
import torch
from oracle import naive_merge
from test_compressors import NAMES, TOKENS, close, make, padded, partition, scene

from samer.compressors import make_compressor
from samer.config import Config, InputError, MergeConfig, TrainConfig, dump_config, load_config
from samer.merging import merge_tokens
from samer.settings import vectors_of

COUNTS = (TOKENS, 12, 65, 40, 12, 1)  # tokens of the images of a ragged batch


# --- the setting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["1/16", "2/32", " 1/16 ", "1 / 16", "0001/0016"])
def test_a_share_is_one_however_it_is_written(tmp_path, written):
    path = tmp_path / "run.yaml"
    path.write_text(f"merge:\n  num_regions: {written}\n")
    config = load_config(path)
    assert config.merge == MergeConfig(num_regions="1/16") == load_config(None, [f"merge.num_regions={written}"]).merge
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert MergeConfig(**json.loads(json.dumps(dataclasses.asdict(config.merge)))) == config.merge
    assert load_config(path, ["merge.num_regions=8"]).merge.num_regions == 8


@pytest.mark.parametrize("written", ["0/16", "16/16", "17/16", "1/0", "-1/16", "1/16/2", "a/b", "1/", "/", "1/1e3"])
def test_what_is_no_share_is_refused_by_name(written):
    with pytest.raises(InputError, match=r"^merge\.num_regions must be .*1/16"):
        MergeConfig(num_regions=written)
    with pytest.raises(InputError, match=r"merge\.num_regions must be .*1/16"):
        load_config(None, [f"merge.num_regions={written}"])


def test_a_number_between_0_and_1_is_told_how_shares_are_written():
    with pytest.raises(InputError, match=r"a whole number; it is 0\.0625; a share .* is written as 1/16$"):
        MergeConfig(num_regions=0.0625)


@pytest.mark.parametrize("share", ["1/16", "1/2", "3/7", "9999999/10000000"])
def test_k_is_the_least_whole_number_that_the_share_fits_in(share):
    part, whole = map(int, MergeConfig(num_regions=share).num_regions.split("/"))
    for tokens in (*range(1, 70), 1030, 16384):
        found = vectors_of(share, tokens)
        assert (found - 1) * whole < part * tokens <= found * whole
    assert [vectors_of("1/16", n) for n in (1, 16, 17, 1030)] == [1, 1, 2, 65]
    assert vectors_of(64, 3) == 64


def test_a_list_of_shares_trains_them_together(tmp_path):
    config = load_config(None, ["merge.num_regions=[1/16, 1/4, 2/16]"])
    assert (config.merge.num_regions, config.train.budgets) == ("1/4", ("1/16", "1/4", "1/8"))
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert load_config(path, ["merge.num_regions=1/16"]).train.budgets == ()
    with pytest.raises(InputError, match=r"the largest of train\.budgets"):
        Config(merge=MergeConfig(num_regions="1/16"), train=TrainConfig(budgets=("1/16", "1/4")))


def test_a_list_holds_whole_numbers_or_shares():
    with pytest.raises(InputError, match=r"merge\.num_regions must be a list of whole numbers or one of shares"):
        load_config(None, ["merge.num_regions=[16, 1/16]"])


# --- the compressors ------------------------------------------------------------------------------------------------


def ragged(left):
    """Images of several sizes, some alike, one by one and as a batch."""
    images = [scene(1, seed=20 + k, count=count) for k, count in enumerate(COUNTS)]
    return images, padded(images, left)


@pytest.mark.parametrize("share", ["1/16", "1/7", "9/10"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_batch_equals_each_image_alone_at_its_own_k(name, left, share):
    images, batch = ragged(left)
    merged = make(name, share)(batch)
    width = batch.tokens.shape[1]
    assert merged.tokens.shape[1] == merged.mask.shape[1] == make(name, share).places(width)
    for row, (image, count) in enumerate(zip(images, COUNTS)):
        own = math.ceil(count * Fraction(share))  # the oracle: one image, its own K
        alone = make(name, own)(image)
        here = batch.mask[row]
        filled = alone.mask[0].nonzero()[:, 0]
        assert merged.mask[row].nonzero()[:, 0].tolist() == filled.tolist()
        close(merged.tokens[row, filled], alone.tokens[0, filled])
        close(merged.coords[row, filled], alone.coords[0, filled])
        close(merged.weights[row][here][:, filled], alone.weights[0][:, filled])
        assert merged.assignments[row][here].tolist() == alone.assignments[0].tolist()
        assert (merged.assignments[row][~here] == -1).all()
        for value in (merged.tokens[row][~merged.mask[row]], merged.weights[row][~here]):
            assert not value.any()
        if name not in ("none", "grid", "hpool"):  # these may leave a place empty, or keep all
            assert int(merged.mask[row].sum()) == own


@pytest.mark.parametrize("init", ["raster", "farthest"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("global_view", ["joined", "apart"])
def test_the_merge_equals_loops_over_one_image_at_a_time(init, labelled, global_view):
    images, batch = ragged(left=True)
    config = MergeConfig(num_regions="1/6", center_init=init, global_view=global_view)
    labels = torch.randint(0, 4, batch.mask.shape, generator=torch.Generator().manual_seed(3)) if labelled else None
    views = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(4)) < 0.3
    merged = make_compressor(config)(dataclasses.replace(batch, views=views), labels)
    sides = {"mask": batch.mask, "instance_labels": labels, "views": views}
    again = merge_tokens(batch.tokens, batch.coords, config, **sides)
    assert all(map(torch.equal, vars(again).values(), vars(merged).values()))
    for row, (image, count) in enumerate(zip(images, COUNTS)):
        fixed = dataclasses.replace(config, num_regions=math.ceil(count / 6))
        own = labels[row][batch.mask[row]] if labelled else None
        seen = views[row][batch.mask[row]]
        tokens, coords, weights, assignments = naive_merge(image.tokens[0], image.coords[0], fixed, own, seen)
        close(merged.tokens[row][merged.mask[row]], tokens)
        close(merged.coords[row][merged.mask[row]], coords)
        close(merged.weights[row][batch.mask[row]][:, : len(tokens)], weights)
        assert partition(merged.assignments[row][batch.mask[row]]) == partition(assignments)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_each_image_alone(name):
    images, batch = ragged(left=False)
    tokens = torch.where(batch.mask[..., None], batch.tokens, 0).requires_grad_()
    compressor = make(name, "1/5").for_training()
    probe = torch.randn(tokens.shape[2], generator=torch.Generator().manual_seed(5))
    (compressor(dataclasses.replace(batch, tokens=tokens)).tokens @ probe).square().sum().backward()
    for row, (image, count) in enumerate(zip(images, COUNTS)):
        own = image.tokens.clone().requires_grad_()
        fixed = make(name, math.ceil(count / 5)).for_training()
        (fixed(dataclasses.replace(image, tokens=own)).tokens @ probe).square().sum().backward()
        close(tokens.grad[row][batch.mask[row]], own.grad[0], atol=1e-4)
    assert tokens.grad.abs().sum() > 0


def test_images_of_one_size_need_no_mask():
    whole = scene(3, seed=9)
    for name in NAMES:
        ours, fixed = make(name, "1/16")(whole), make(name, vectors_of("1/16", TOKENS))(whole)
        assert all(map(torch.equal, vars(ours).values(), vars(fixed).values()))


def test_settings_stay_a_share():
    compressor = make_compressor(MergeConfig(num_regions="1/16"))
    compressor(ragged(left=True)[1])
    assert compressor.settings == MergeConfig(num_regions="1/16")
