"""ColModernVBert on a small random model of transformers' own classes: tiles, the view of the whole, and every step.

Shape letters: B images, N tokens per image."""

import copy

import pytest
import torch
from every_step import (
    SHAPES,
    alone_equals_batch,
    every_step,
    expected_signals,
    pictures,
    queries_alone_equal_batch,
    saved,
    text_of,
    tokens_equal_transformers,
)
from oracle import naive_merge
from PIL import Image
from small_modernvbert import SIDE, TILE, save_modernvbert
from transformers import ColModernVBertForRetrieval

from samer.compressors import make_compressor, settings_written
from samer.config import InputError, MergeConfig
from samer.merging import merge_tokens
from samer.retrievers.attention import ATTENTION
from samer.retrievers.hf import Retriever

TEXTS = ["two red circles left of a dog", "a car", "", " lead, é 漢字"]


@pytest.fixture(scope="module", params=["right", "left"])
def shared(request, tmp_path_factory):
    """One that pads on the right, and one that pads on the left; tests leave it as it was."""
    folder = tmp_path_factory.mktemp("modernvbert") / request.param
    return Retriever.load(str(save_modernvbert(folder, padding_side=request.param)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_modernvbert(tmp_path_factory.mktemp("modernvbert") / "model", longest=2 * TILE)


@pytest.fixture(scope="module")
def model(base):
    return Retriever.load(str(base))


@pytest.fixture
def uncut(model):
    """A retriever whose processor does not cut pages into tiles."""
    processor = copy.deepcopy(model.processor)
    processor.image_processor.do_image_splitting = False
    return Retriever(model.model, processor, "uncut")


def tiles_of(retriever, images):
    """Rows and columns of tiles, as the picture pipeline counts them."""
    found = retriever.processor.image_processor(
        [[image] for image in images], return_row_col_info=True, return_tensors="pt"
    )
    return [(rows[0], columns[0]) for rows, columns in zip(found["rows"], found["cols"])]


def test_tokens_are_those_of_transformers_itself(shared):
    stock = ColModernVBertForRetrieval.from_pretrained(shared.name).eval()
    inputs = shared.image_inputs(pictures())
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 1
    queries = shared.query_inputs(TEXTS)
    tokens_equal_transformers(shared, stock, inputs, queries)
    text = shared.processor.tokenizer.decode(queries["input_ids"][1][queries["attention_mask"][1].bool()])
    assert text == "a car" + "<end_of_utterance>" * 10
    assert shared.processing == {
        "backend": "pil",
        "picture_size": "longest_edge 96",
        "tiles": "cut",
        "tile_size": "32",
        "padding_side": shared.processor.tokenizer.padding_side,
        "visual_prompt_prefix": shared.processor.visual_prompt_prefix,
        "query_suffix": "<end_of_utterance>" * 10,
    }


def test_an_image_and_a_query_are_the_same_alone_and_in_a_ragged_batch(shared):
    alone_equals_batch(shared, pictures())
    queries_alone_equal_batch(shared, TEXTS)


def test_offsets_are_those_of_the_text(shared):
    inputs = shared.query_inputs(TEXTS)
    for row, text in enumerate(TEXTS[:2]):
        assert "".join(text_of(inputs["offsets"][row], text)) == text
    assert (inputs["offsets"][2] == -1).all()
    with pytest.raises(InputError, match="<image>"):
        shared.query_inputs(["an <image> of a dog"])


def test_coordinates_cover_the_whole_page_tile_by_tile(shared):
    """Against loops over the picture pipeline's own rows and columns, in the order in which the processor writes."""
    images = pictures()
    inputs = shared.image_inputs(images)
    layout = shared.image_layout(inputs)
    cut = tiles_of(shared, images)
    assert len(set(cut)) >= 3
    for row, (rows, columns) in enumerate(cut):
        places, owner = [], {}
        for tile_row in range(rows):
            for tile_column in range(columns):
                for y in range(SIDE):
                    for x in range(SIDE):
                        owner[tile_row * SIDE + y, tile_column * SIDE + x] = len(places)
                        places.append(
                            ((tile_column + (x + 0.5) / SIDE) / columns, (tile_row + (y + 0.5) / SIDE) / rows)
                        )
        places += [((x + 0.5) / SIDE, (y + 0.5) / SIDE) for y in range(SIDE) for x in range(SIDE)]
        at = (inputs["input_ids"][row] == shared.image_token_id).nonzero().flatten()
        assert len(at) == len(places) == SIDE * SIDE * (rows * columns + 1)
        torch.testing.assert_close(layout.coords[row][at], torch.tensor(places))
        assert layout.grid[row].tolist() == [rows * SIDE, columns * SIDE]
        order = [int(at[owner[y, x]]) for y in range(rows * SIDE) for x in range(columns * SIDE)]
        assert layout.source[row][: len(order)].tolist() == order
        assert (layout.source[row][len(order) :] == -1).all()
        assert layout.views[row].nonzero().flatten().tolist() == at[-SIDE * SIDE :].tolist()
        others = ~layout.patches[row]
        assert (layout.coords[row][others] == 0.5).all()
        assert layout.patches[row].nonzero().flatten().tolist() == at.tolist()


def test_a_token_stands_where_its_pixels_are(model):
    """What the language model is given of a picture that changes in one tile changes at that tile's tokens alone."""
    plain = Image.effect_noise((2 * TILE, 2 * TILE), 60).convert("RGB")
    changed = plain.copy()
    changed.paste((250, 10, 10), (TILE, 0, 2 * TILE, TILE))  # the tile on the right of the first row
    given = []
    hook = model.model.vlm.text_model.register_forward_pre_hook(
        lambda _, __, words: given.append(words["inputs_embeds"]), with_kwargs=True
    )
    try:
        for image in (plain, changed):
            inputs = model.image_inputs([image])
            model.hidden_states(inputs)
    finally:
        hook.remove()
    layout = model.image_layout(inputs)
    assert layout.grid.tolist() == [[2 * SIDE, 2 * SIDE]]
    moved = (given[0] - given[1]).abs().amax(-1)[0] > 1e-6
    x, y = layout.coords[0].unbind(-1)
    right = layout.patches[0] & ~layout.views[0] & (x > 0.5) & (y < 0.5)
    assert int(right.sum()) == SIDE * SIDE
    assert torch.equal(moved & ~layout.views[0], right)
    assert (moved & layout.views[0]).any()


def test_a_page_that_is_not_cut_is_its_own_grid(uncut):
    inputs = uncut.image_inputs(pictures())
    layout = uncut.image_layout(inputs)
    assert layout.grid.tolist() == [[SIDE, SIDE]] * len(SHAPES)
    assert not layout.views.any()
    cells = [((x + 0.5) / SIDE, (y + 0.5) / SIDE) for y in range(SIDE) for x in range(SIDE)]
    torch.testing.assert_close(layout.coords[layout.patches].view(-1, SIDE * SIDE, 2)[0], torch.tensor(cells))
    assert uncut.encode_images(inputs).tokens.isfinite().all()


@pytest.mark.parametrize("damage", ["a tag less", "two tags alike", "a token less", "a token more", "no view"])
def test_tiles_that_are_no_grid_are_refused(model, damage):
    inputs = model.image_inputs(pictures(SHAPES[:1]))
    ids = inputs["input_ids"]
    tags = [model.processor.row_col_ids[number] for number in (0, 1)]  # row 1, columns 1 and 2
    first, second = (int((ids[0] == tag).nonzero()) for tag in tags)
    if damage == "a tag less":
        ids[0, second] = model.processor.fake_image_token_id
    elif damage == "two tags alike":
        ids[0, second] = tags[0]
    elif damage == "a token less":
        ids[0, first + 1] = model.processor.fake_image_token_id
    elif damage == "a token more":
        ids[0, first - 1] = model.image_token_id
    else:
        view = int((ids[0] == model.processor.global_image_token_id).nonzero())
        ids[0, view + 1 : view + 1 + SIDE * SIDE] = model.processor.fake_image_token_id
    with pytest.raises(InputError, match=r"image 0 of the batch has .* image tokens, expected 64 of each of"):
        model.image_layout(inputs)


def test_a_black_tile_is_refused_by_name_where_black_is_zero(model, tmp_path):
    """Without normalisation black is 0, which the model takes for padding; with it, black is -1 and nothing is lost."""
    half = pictures([(2 * TILE, 2 * TILE)])[0]
    half.paste((0, 0, 0), (0, TILE, 2 * TILE, 2 * TILE))
    good, bad = saved(tmp_path / "pictures", [pictures(SHAPES[:1])[0], half])
    model.record_inputs([good, bad])
    processor = copy.deepcopy(model.processor)
    processor.image_processor.do_normalize = False
    plain = Retriever(model.model, processor, "plain")
    plain.encode_images(plain.record_inputs([good]))
    with pytest.raises(InputError, match=r"1\.png: it has 2 of 5 tiles all black, the first is number 3; .*[Cc]rop"):
        plain.record_inputs([good, bad])
    with pytest.raises(InputError, match="picture 1 of the batch has 2 of 5 tiles all black"):
        plain.image_inputs([pictures(SHAPES[:1])[0], half])
    given = processor.process_images(images=[half])  # what would come of it
    with pytest.raises(ValueError, match="do not match"):
        model.model(**given)


def test_signals_are_those_of_eager_attention_in_layers_that_see_everything(shared):
    inputs = shared.image_inputs(pictures())
    eager = ColModernVBertForRetrieval.from_pretrained(shared.name, attn_implementation="eager").eval()
    with torch.no_grad():
        attentions = eager.vlm(**inputs, output_attentions=True).attentions
    assert len(attentions) == 7
    patches = inputs["input_ids"] == shared.image_token_id
    hidden, signals = shared.image_states(inputs, ATTENTION)
    assert torch.equal(hidden, shared.hidden_states(inputs))
    # layers 0, 3 and 6 see the whole page; of those three, floor(0.4 * 3)..floor(0.6 * 3) is the second
    expected = expected_signals(attentions, patches, [3], 6)
    for name in ATTENTION:
        torch.testing.assert_close(signals[name], expected[name], atol=1e-4, rtol=1e-4)
        assert (signals[name] > 0).equal(patches)
    assert (signals["last"] - signals["middle_mean"]).abs().max() > 0.05
    with pytest.raises(InputError, match="has 3 layers of full attention, which alone are counted, from 0"):
        shared.image_states(inputs, ["mean:2-3"])


# --- the view of the whole ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["raster", "farthest"])
@pytest.mark.parametrize("global_view", ["joined", "apart"])
@pytest.mark.parametrize("regions", [1, 5, 14])
def test_merges_are_those_of_plain_loops(model, regions, global_view, start):
    merge = MergeConfig(num_regions=regions, center_init=start, global_view=global_view)
    images = pictures([(30, 60), (50, 50)])
    visual = model.encode_images(model.image_inputs(images))
    assert visual.views.any(1).all()
    merged = make_compressor(merge)(visual)
    for row in range(len(images)):
        own = visual.mask[row]
        tokens, places, weights, _ = naive_merge(
            visual.tokens[row][own], visual.coords[row][own], merge, views=visual.views[row][own]
        )
        full = merged.mask[row]
        assert int(full.sum()) == len(tokens)
        torch.testing.assert_close(merged.tokens[row][full], tokens, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged.coords[row][full], places, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged.weights[row][own][:, full], weights, atol=1e-5, rtol=0)


def both_in_one(merged, visual, row):
    """Regions that have weight of the view and of tiles."""
    tiles = visual.patches[row] & ~visual.views[row]
    ofs = [(merged.weights[row][some] > 0).any(0) for some in (visual.views[row], tiles)]
    return int((ofs[0] & ofs[1]).sum())


def test_apart_puts_no_token_of_the_view_into_a_region_of_tiles(model):
    visual = model.encode_images(model.image_inputs(pictures()))
    results = {}
    for where in ("joined", "apart"):
        merge = MergeConfig(num_regions=12, global_view=where)
        results[where] = merge_tokens(visual.tokens, visual.coords, merge, mask=visual.mask, views=visual.views)
    for row in range(len(SHAPES)):
        assert both_in_one(results["apart"], visual, row) == 0
        assert both_in_one(results["joined"], visual, row) > 0
    assert results["apart"].tokens.isfinite().all()
    without = merge_tokens(visual.tokens, visual.coords, MergeConfig(num_regions=12), mask=visual.mask)
    assert torch.equal(results["joined"].tokens, without.tokens)


def test_apart_is_a_setting_that_files_name_only_where_it_matters():
    assert "global_view" not in settings_written(MergeConfig())
    assert settings_written(MergeConfig(global_view="apart"))["global_view"] == "apart"
    with pytest.raises(InputError, match=r"merge.global_view must be 'joined' or 'apart'; it is 'both'"):
        MergeConfig(global_view="both")
    tokens, coords = torch.eye(4)[None], torch.zeros(1, 4, 2)
    with pytest.raises(InputError, match="views"):
        merge_tokens(tokens, coords, MergeConfig(num_regions=2), views=torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="views"):
        merge_tokens(tokens, coords, MergeConfig(num_regions=2), views=torch.zeros(1, 4))


# --- every step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("global_view", "regions"), [("joined", 6), ("apart", "1/16")])
def test_it_trains_is_indexed_and_is_searched(base, world, script, tmp_path, capsys, global_view, regions):
    settings = f"merge.num_regions={regions}", f"merge.global_view={global_view}"
    index = every_step(base, world, script, tmp_path, capsys, *settings)
    assert (index.manifest.merge.global_view, index.manifest.merge.num_regions) == (global_view, regions)
