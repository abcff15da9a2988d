"""NeoMME on a small random model of transformers' own classes: the native grid, prompts by template, and every step.

Its picture pipeline needs torchvision. Shape letters: B images, N tokens per image."""

import json
import sys

import pytest
import torch
from every_step import (
    alone_equals_batch,
    every_step,
    expected_signals,
    pictures,
    queries_alone_equal_batch,
    text_of,
    tokens_equal_transformers,
)
from oracle import naive_merge

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig
from samer.index.settings import MANY_TOKENS
from samer.retrievers.attention import ATTENTION
from samer.retrievers.hf import Retriever, identify
from samer.retrievers.neomme import NeoMME

pytest.importorskip("torchvision", reason="transformers prepares NeoMME's pictures with torchvision")

from small_neomme import MASKS, PATCH, save_neomme
from transformers import NeoMMEForRetrieval
from transformers.image_utils import SizeDict
from transformers.models.neomme.image_processing_neomme import get_resize_output_size

TEXTS = ["two red circles left of a dog", "a car", "", "  lead, é 漢字 "]
SIZES = [(60, 30), (40, 64), (50, 50), (64, 9), (33, 17)]  # (width, height), none above 64
GRIDS = [(4, 8), (8, 5), (7, 7), (2, 8), (3, 5)]  # rows and columns of patches of 8 pixels, the last ones filled up


@pytest.fixture(scope="module", params=["right", "left"])
def shared(request, tmp_path_factory):
    """One that pads on the right, and one that pads on the left; tests leave it as it was."""
    folder = tmp_path_factory.mktemp("neomme") / request.param
    return Retriever.load(str(save_neomme(folder, padding_side=request.param)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_neomme(tmp_path_factory.mktemp("neomme") / "model", most_side=48)


def test_tokens_are_those_of_transformers_itself(shared):
    stock = NeoMMEForRetrieval.from_pretrained(shared.name).eval()
    inputs = shared.image_inputs(pictures(SIZES))
    straight = shared.processor(images=pictures(SIZES), padding=True, return_tensors="pt")
    assert {name: value.tolist() for name, value in straight.items() if name in inputs} == {
        name: value.tolist() for name, value in inputs.items()
    }
    tokens_equal_transformers(shared, stock, inputs, shared.query_inputs(TEXTS))
    assert shared.base_projector.bias is None
    assert torch.equal(shared.base_projector.weight, stock.multi_vector_head.proj.weight)


def test_queries_follow_the_template(shared):
    inputs = shared.query_inputs(TEXTS)
    said = [
        shared.processor.tokenizer.decode(ids[own.bool()])
        for ids, own in zip(inputs["input_ids"], inputs["attention_mask"])
    ]
    assert said == ["<query>find: " + text + "<mask>" * MASKS for text in TEXTS]
    assert shared.processing == {
        "backend": "torchvision",
        "most_patches": "1780",
        "longest_side_patches": "96",
        "picture_size": f"min_pixels 1, max_pixels {1780 * 8 * 8}",
        "patch_size": "8",
        "longest_side": "64",
        "padding_side": shared.processor.tokenizer.padding_side,
        "document_prompt": "<doc><img>",
        "query_prompt": "<query>find: {query}" + "<mask>" * MASKS,
    }


@pytest.mark.parametrize("trim", [False, True])
def test_offsets_are_those_of_the_text(tmp_path, trim):
    """Whether or not the template cuts off the space around a text."""
    retriever = Retriever.load(str(save_neomme(tmp_path / "model", trim=trim)))
    texts = ["  dog on red", "a car ", "  ", ""]
    inputs = retriever.query_inputs(texts)
    for row, text in enumerate(texts):
        pieces = text_of(inputs["offsets"][row], text)
        assert "".join(pieces).strip() == text.strip()
        if not trim:
            assert "".join(pieces) == text
        ids = inputs["input_ids"][row]
        tokenizer = retriever.processor.tokenizer
        for token, (first, last) in zip(ids.tolist(), inputs["offsets"][row].tolist()):
            if first >= 0:
                assert tokenizer.decode([token]).strip() == text[first:last].strip()
    with pytest.raises(InputError, match="<img>"):
        retriever.query_inputs(["an <img> of a dog"])


def test_an_image_and_a_query_are_the_same_alone_and_in_a_ragged_batch(shared):
    alone_equals_batch(shared, pictures(SIZES))
    queries_alone_equal_batch(shared, TEXTS)


def test_the_grid_is_the_pictures_own(shared):
    """<doc> <img>, then each row of patches and a <row>: the first <img> is no patch."""
    inputs = shared.image_inputs(pictures(SIZES))
    layout = shared.image_layout(inputs)
    assert layout.grid.tolist() == [list(grid) for grid in GRIDS]
    assert not layout.views.any()
    for row, (rows, columns) in enumerate(GRIDS):
        start = int(inputs["attention_mask"][row].nonzero()[0])
        at = [start + 2 + y * (columns + 1) + x for y in range(rows) for x in range(columns)]
        assert layout.patches[row].nonzero().flatten().tolist() == at
        assert layout.source[row][: len(at)].tolist() == at
        places = [(x / (columns - 1), y / (rows - 1)) for y in range(rows) for x in range(columns)]
        torch.testing.assert_close(layout.coords[row][at], torch.tensor(places))
    total = sum(rows * columns for rows, columns in GRIDS)
    assert inputs["pixel_values"].shape == (total, 3 * PATCH * PATCH)


def released(folder):
    """With a processor's file that sets no limit."""
    folder = save_neomme(folder, most_side=None)
    held = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    assert (held.get("max_side"), held.get("size")) == (None, None)
    return folder


def test_no_picture_has_more_tokens_than_an_index_counts_on(tmp_path):
    """Every shape, as transformers scales it, by loops; then some pictures themselves."""
    retriever = Retriever.load(str(released(tmp_path / "model")))
    pictures_of = retriever.processor.image_processor
    most, limits = pictures_of.max_side, SizeDict(**dict(pictures_of.size))
    counts = {}
    for width in [*range(1, 900, 7), 1000, 3000, 20_000]:
        for height in (1, 5, 50, 300, 757, 768, 769, 2000, 20_000):
            rows, columns = (-(-x // PATCH) for x in get_resize_output_size(height, width, most, limits))
            counts[width, height] = rows * (columns + 1) + 2  # a <row> each, <doc> and <img>
    assert 1900 < max(counts.values()) <= MANY_TOKENS
    for size in [max(counts, key=counts.get), (1000, 1414), (2000, 9)]:
        inputs = retriever.image_inputs(pictures([size]))
        rows, columns = retriever.image_layout(inputs).grid[0].tolist()
        assert int(inputs["attention_mask"].sum()) == rows * (columns + 1) + 2 <= MANY_TOKENS
    assert inputs["attention_mask"].sum() == 96 + 1 + 2  # the longest is scaled to 768 pixels


def test_a_limit_of_its_files_stands_where_it_is_lower(tmp_path):
    folder = released(tmp_path / "model")
    file = folder / "processor_config.json"
    found = json.loads(file.read_text())
    found["image_processor"] |= {"size": {"min_pixels": 300, "max_pixels": 40 * PATCH**2}, "max_side": 900}
    file.write_text(json.dumps(found))
    pictures_of = Retriever.load(str(folder)).processor.image_processor
    assert dict(pictures_of.size) == {"min_pixels": 300, "max_pixels": 40 * PATCH**2}
    assert pictures_of.max_side == 96 * PATCH


def test_the_limit_is_part_of_the_identity(base, monkeypatch):
    before = identify(str(base))
    monkeypatch.setattr(NeoMME, "settings", {**NeoMME.settings, "most_patches": 1000})
    assert identify(str(base)).difference(before) == "processor"


def test_a_patch_stands_where_its_pixels_are(shared):
    """What the first layer is given changes at the one patch that was painted."""
    plain = pictures([(48, 32)])[0]
    changed = plain.copy()
    changed.paste((250, 10, 10), (3 * PATCH, 2 * PATCH, 4 * PATCH, 3 * PATCH))  # row 2 of 4, column 3 of 6
    given = []
    hook = shared.model.model.embedding_norm.register_forward_pre_hook(lambda _, words: given.append(words[0]))
    try:
        for image in (plain, changed):
            inputs = shared.image_inputs([image])
            shared.hidden_states(inputs)
    finally:
        hook.remove()
    (moved,) = ((given[0] - given[1]).abs().amax(-1)[0] > 1e-6).nonzero().flatten().tolist()
    layout = shared.image_layout(inputs)
    assert layout.source[0].tolist().index(moved) == 2 * 6 + 3
    torch.testing.assert_close(layout.coords[0, moved], torch.tensor([3 / 5, 2 / 3]))


def test_a_grid_that_does_not_fit_is_refused(shared):
    inputs = shared.image_inputs(pictures(SIZES[:1]))
    inputs["position_ids"] = inputs["position_ids"].clone()
    inputs["position_ids"][0] += 1
    with pytest.raises(InputError, match=r"32 image tokens, expected 40 \(5 x 8\)"):
        shared.image_layout(inputs)
    del inputs["position_ids"]
    with pytest.raises(InputError, match="position_ids"):
        shared.image_states(inputs, ["last"])


def test_signals_are_those_of_eager_attention_in_layers_that_see_everything(shared):
    inputs = shared.image_inputs(pictures(SIZES))
    eager = NeoMMEForRetrieval.from_pretrained(shared.name, attn_implementation="eager").eval()
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    assert len(attentions) == 5
    patches = shared.image_layout(inputs).patches
    hidden, signals = shared.image_states(inputs, ATTENTION)
    assert torch.equal(hidden, shared.hidden_states(inputs))
    # layers 0, 2 and 4 see the whole page; of those three, floor(0.4 * 3)..floor(0.6 * 3) is the second
    expected = expected_signals(attentions, patches, [2], 4)
    for name in ATTENTION:
        torch.testing.assert_close(signals[name], expected[name], atol=1e-4, rtol=1e-4)
        assert (signals[name] > 0).equal(patches)
    assert (signals["last"] - signals["middle_mean"]).abs().max() > 0.05


@pytest.mark.parametrize("regions", [5, 40])
def test_merges_are_those_of_plain_loops(shared, regions):
    merge = MergeConfig(num_regions=regions)
    visual = shared.encode_images(shared.image_inputs(pictures(SIZES)))
    merged = make_compressor(merge)(visual)
    for row in range(len(SIZES)):
        own, full = visual.mask[row], merged.mask[row]
        tokens, places, _, _ = naive_merge(visual.tokens[row][own], visual.coords[row][own], merge)
        torch.testing.assert_close(merged.tokens[row][full], tokens, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged.coords[row][full], places, atol=1e-5, rtol=0)


def test_a_machine_without_torchvision_is_told(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr("samer.retrievers.neomme.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install torchvision"):
        Retriever.load(str(base))


def test_it_trains_is_indexed_and_is_searched(base, world, script, tmp_path, capsys):
    every_step(base, world, script, tmp_path, capsys, "merge.num_regions=6")
