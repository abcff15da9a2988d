"""A retriever of two pretrained towers: what any pair of them gives, on disk and off it, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_towers import SIDE, save_text, save_vision
from transformers import AutoModel

from samer.config import InputError
from samer.data.records import ImageRecord
from samer.retrievers.hf import Retriever, identify
from samer.retrievers.pretrained import TowerConfig, load_towers, tower_hash
from samer.retrievers.towers import TowerProcessor, TowerRetriever, without_adapters

SMALL = {"hidden_size": 32, "embedding_dim": 8, "heads": 4, "max_text_tokens": 12}
TEXTS = ["a red dog on the boat", "tree"]


def pictures(count=2, side=50):
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 255, (side, side + 7, 3), dtype=np.uint8)) for _ in range(count)]


def make(folder, vision, text, **settings):
    settings = {"image_size": SIDE, **SMALL, **settings}
    config = TowerConfig(str(vision), str(text), vision_hash=tower_hash(str(vision)), **settings)
    config = replace(config, text_hash=tower_hash(str(text)))
    torch.manual_seed(1)
    TowerRetriever(config, *load_towers(config)).save(folder, TowerProcessor.of_towers(config))
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    place = tmp_path_factory.mktemp("towers")
    return save_vision(place / "vision"), save_text(place / "text")


@pytest.fixture
def folder(towers, tmp_path):
    return make(tmp_path / "retriever", *towers)


@pytest.mark.parametrize(
    ("kind", "size", "side"),
    [
        ("dinov2", 32, 8),
        ("dinov2", 64, 16),
        ("registers", 32, 8),
        ("vit", 48, 12),
        ("deit", 32, 8),
        ("siglip", 64, 16),
        ("swin", 32, 4),
        ("swin", 64, 8),
    ],
)
def test_any_vision_tower_gives_its_patches_row_by_row_at_any_size(kind, size, side, towers, tmp_path):
    vision = save_vision(tmp_path / "vision", kind)
    retriever = Retriever.load(str(make(tmp_path / "retriever", vision, towers[1], image_size=size)))
    inputs = retriever.image_inputs(pictures())
    visual = retriever.encode_images(inputs)
    assert visual.tokens.shape == (2, side * side, 8)
    assert retriever.grid == (side, side)
    assert visual.coords[0, 1].tolist() == pytest.approx([1 / (side - 1), 0])
    # the tower itself, asked as transformers documents it, its special tokens left out by their number
    model = AutoModel.from_pretrained(vision).eval()
    model = model.vision_model if kind == "siglip" else model
    specials = {"dinov2": 1, "registers": 5, "vit": 1, "deit": 2, "siglip": 0, "swin": 0}[kind]
    more = {} if kind in ("dinov2", "registers") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        states = model(pixel_values=inputs["pixel_values"], **more).last_hidden_state[:, specials:]
        expected = retriever.model.projection(retriever.model.vision_adapter(states))
    assert torch.allclose(visual.tokens, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "t5"])
def test_texts_are_encoded_with_offsets_and_padding_changes_nothing(kind, towers, tmp_path):
    text = save_text(tmp_path / "text", kind)
    retriever = Retriever.load(str(make(tmp_path / "retriever", towers[0], text)))
    both = retriever.encode_queries(retriever.query_inputs(TEXTS))
    alone = retriever.encode_queries(retriever.query_inputs(TEXTS[1:]))
    assert both.mask.sum(1).tolist() == [8, 3]
    assert torch.allclose(both.tokens[1, :3], alone.tokens[0], atol=1e-5)
    words = [TEXTS[0][first:last] for first, last in both.offsets[0].tolist() if first >= 0]
    assert words == TEXTS[0].split()
    assert both.offsets[0, 0].tolist() == [-1, -1]
    assert both.offsets[1, 3:].eq(-1).all()


def test_a_tower_with_fewer_positions_than_its_tokenizer_says_cuts_there(towers, tmp_path):
    text = save_text(tmp_path / "text", "roberta")
    told = json.loads((text / "tokenizer_config.json").read_text())
    (text / "tokenizer_config.json").write_text(json.dumps({**told, "model_max_length": 512}))
    config = TowerConfig(str(towers[0]), str(text), image_size=SIDE, hidden_size=24, heads=2, max_text_tokens=64)
    without_adapters(config, tmp_path / "bare")
    retriever = Retriever.load(str(tmp_path / "bare"))
    inputs = retriever.query_inputs(["dog " * 30])
    assert inputs["attention_mask"].sum(1).tolist() == [16]  # 17 positions, of which RoBERTa's padding takes one
    assert retriever.encode_queries(inputs).tokens.isfinite().all()


def test_a_tower_without_a_tokenizer_or_picture_processor_is_named(towers, tmp_path):
    for kind, file, words in (
        ("text", "tokenizer*", "has no tokenizer"),
        ("vision", "preprocessor_config.json", "has no picture processor"),
    ):
        lost = tmp_path / kind
        shutil.copytree(towers[("vision", "text").index(kind)], lost)
        for path in lost.glob(file):
            path.unlink()
        where = {"vision": str(towers[0]), "text": str(towers[1]), kind: str(lost)}
        with pytest.raises(InputError, match=f"{kind} tower .* {words}"):
            TowerProcessor.of_towers(TowerConfig(**where))


def test_a_long_caption_is_cut_and_counted(folder):
    retriever = Retriever.load(str(folder))
    inputs = retriever.query_inputs(["dog " * 30, "a dog"])
    assert inputs["attention_mask"].sum(1).tolist() == [12, 4]
    assert len(retriever.notes) == 1
    assert "1 texts are longer than 12 tokens" in retriever.notes[0]


def test_without_layers_the_hidden_states_are_the_towers_own(towers, tmp_path):
    place = make(tmp_path / "bare", *towers, hidden_size=30, heads=1, vision_layers=0, text_layers=0)
    retriever = Retriever.load(str(place))
    inputs = retriever.image_inputs(pictures())
    hidden = retriever.hidden_states(inputs)
    model = AutoModel.from_pretrained(towers[0]).eval()
    with torch.no_grad():
        expected = model(pixel_values=inputs["pixel_values"]).last_hidden_state[:, 1:]
    assert torch.allclose(hidden[..., :24], expected, atol=1e-5)
    assert not hidden[..., 24:].any()
    with pytest.raises(InputError, match="hidden_size must hold the tower's width 24"):
        make(tmp_path / "narrow", *towers, hidden_size=20, heads=1, vision_layers=0, text_layers=0)


def test_attention_signals_are_the_column_sums_of_the_towers_attention(folder, towers):
    retriever = Retriever.load(str(folder))
    inputs = retriever.image_inputs(pictures())
    _, signals = retriever.image_states(inputs, ["middle_mean", "middle_max", "last"])
    model = AutoModel.from_pretrained(towers[0], attn_implementation="eager").eval()
    with torch.no_grad():
        seen = model(pixel_values=inputs["pixel_values"], output_attentions=True).attentions
    columns = [layer[:, :, 1:, 1:].sum(2) for layer in seen]  # (B, heads, patches), patches' rows alone
    middle = columns[2:4]  # floor(0.4 x 5) .. floor(0.6 x 5)
    assert torch.allclose(signals["last"], columns[-1].mean(1), atol=1e-5)
    assert torch.allclose(signals["middle_mean"], torch.stack([c.mean(1) for c in middle]).mean(0), atol=1e-5)
    assert torch.allclose(signals["middle_max"], torch.stack([c.amax(1) for c in middle]).mean(0), atol=1e-5)


def test_windowed_attention_has_no_signals(towers, tmp_path):
    place = make(tmp_path / "retriever", save_vision(tmp_path / "vision", "swin"), towers[1])
    retriever = Retriever.load(str(place))
    with pytest.raises(InputError, match="no attention over the whole picture"):
        retriever.image_states(retriever.image_inputs(pictures()), ["last"])


def test_a_saved_retriever_comes_back_alike_and_where_its_towers_lie_does_not_matter(folder, towers, tmp_path):
    before = Retriever.load(str(folder))
    moved = tmp_path / "elsewhere"
    shutil.copytree(towers[0], moved)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision": str(moved)}))
    after = Retriever.load(str(folder))
    images = pictures()
    assert torch.equal(
        before.hidden_states(before.image_inputs(images)), after.hidden_states(after.image_inputs(images))
    )
    assert before.identity == after.identity
    assert before.identity.weights
    (folder / "config.json").write_text(json.dumps({**config, "max_text_tokens": 9}))
    assert identify(str(folder)).weights != before.identity.weights


def test_records_are_read_at_the_towers_size(folder, tmp_path):
    retriever = Retriever.load(str(folder))
    assert retriever.picture_size == (SIDE, SIDE)
    path = tmp_path / "wide.png"
    pictures()[0].resize((200, 40)).save(path)
    assert retriever.record_inputs([ImageRecord("wide", path, ())])["pixel_values"].shape == (1, 3, SIDE, SIDE)


def test_towers_that_changed_or_are_gone_are_refused_by_name(folder, towers, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    other = save_vision(tmp_path / "other", seed=5)
    for vision, said in (
        (other, "not those that this retriever was aligned with"),
        (tmp_path / "no", "can't be loaded"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "vision": str(vision)}))
        with pytest.raises(InputError, match=said) as error:
            Retriever.load(str(folder))
        assert str(vision) in str(error.value)


def test_weights_of_other_sizes_are_refused_by_name(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    with pytest.raises(InputError, match="has another size than the towers and config"):
        Retriever.load(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    held = load_file(folder / "model.safetensors")
    del held["projection.weight"]
    save_file(held, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"projection\.weight is missing"):
        Retriever.load(str(folder))


def test_sizes_that_towers_do_not_take_are_refused(towers, tmp_path):
    with pytest.raises(InputError, match="at least 1"):
        TowerConfig(*map(str, towers), image_size=0)
    with pytest.raises(InputError, match=r"no multiple of towers\.heads"):
        TowerConfig(*map(str, towers), hidden_size=33, heads=4)
    with pytest.raises(InputError, match="does not take pictures of 2 pixels"):
        make(tmp_path / "retriever", *towers, image_size=2)


def test_a_picture_smaller_than_a_patch_is_refused(folder):
    retriever = Retriever.load(str(folder))
    with pytest.raises(InputError, match="too small"):
        retriever.image_inputs([Image.new("RGB", (1, 40))])


def test_what_is_no_model_of_patches_is_refused(towers, tmp_path):
    config = TowerConfig(str(towers[1]), str(towers[1]), image_size=SIDE, **SMALL)
    with pytest.raises(InputError, match="does not take pictures of 32 pixels"):
        TowerRetriever(config, *load_towers(config))
