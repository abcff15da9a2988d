"""Attention that a patch receives, against transformers' own eager attention; the characters a token stands for."""

import collections
import hashlib
import weakref

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from toy_family import Toy, ToyForRetrieval, save_toy
from transformers import ColPaliForRetrieval

from samer.config import InputError
from samer.data import flickr
from samer.features.read import FeatureStore
from samer.features.write import write_features
from samer.retrievers import FAMILIES
from samer.retrievers.attention import ATTENTION, signal_layers
from samer.retrievers.base import NO_OFFSET, image_seeds
from samer.retrievers.hf import Retriever

PATCHES, TOKENS = 64, 70
TEXTS = [
    "two red circles, a dog.",
    "a  b   c, ,d",
    "",
    " lead",
    "trail ",
    "é ü 漢字, 👩‍🚀 astronaut",
    "e\u0301 \ufb01 x\u00a0y a\nb",
    "I'm: well",
    "   ",
]
SIZES = {
    "vision_width": 32,
    "vision_layers": 1,
    "vision_mlp": 32,
    "text_width": 32,
    "text_mlp": 32,
    "embedding_dim": 16,
}


def sharpen(model):
    """Makes attention far from uniform, so that heads, layers and patches differ."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name and ("q_proj" in name or "k_proj" in name):
                weight.mul_(12)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory, base):
    """(retriever, the same in eager attention) by layers: the shared one (2 heads, 1 of keys) and one with 4 and 2."""
    from samer.world.retriever import Geometry, build_colpali, page_texts, train_tokenizer

    geometry = Geometry(image_size=64, patch_size=8, text_layers=5, heads=4, **SIZES)
    model, processor = build_colpali(train_tokenizer(page_texts(5, 0), 400), geometry, seed=2)
    model.config.vlm_config.text_config.num_key_value_heads = 2
    torch.manual_seed(2)
    model = ColPaliForRetrieval(model.config)
    deep = tmp_path_factory.mktemp("deep")
    sharpen(model).save_pretrained(deep)
    processor.save_pretrained(deep)
    eager = lambda folder: ColPaliForRetrieval.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return {layers: (Retriever.load(str(path)), eager(path)) for layers, path in ((2, base), (5, deep))}


@pytest.fixture(scope="module")
def records(world):
    return flickr.load_split(world, "val", boxes=False)


def eager_signals(model, inputs, patches, middle, last):
    """METHOD section 7, a layer, an image and a head at a time."""
    kept = {name: value for name, value in inputs.items() if name != "seeds"}
    with torch.no_grad():
        attentions = model.vlm(**kept, output_attentions=True, use_cache=False).attentions
    heads = attentions[0].shape[1]
    columns = torch.zeros(len(attentions), *patches.shape, heads)
    for layer, attention in enumerate(attentions):
        for image in range(len(patches)):
            visual = patches[image].nonzero().flatten()
            for head in range(heads):
                columns[layer, image, visual, head] = attention[image, head][visual][:, visual].sum(0)
    return {
        "middle_mean": torch.stack([columns[layer].mean(-1) for layer in middle]).mean(0),
        "middle_max": torch.stack([columns[layer].max(-1).values for layer in middle]).mean(0),
        "last": columns[last].mean(-1),
    }


def pad_inputs(inputs, lengths, left):
    """Rows with so many padding tokens on one side; every row is then cut out of the longest."""
    width = TOKENS + max(lengths)
    padded = {"pixel_values": inputs["pixel_values"]}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        padded[name] = torch.zeros(len(lengths), width, dtype=torch.long)
        for row, extra in enumerate(lengths):
            start = width - TOKENS - extra if left else 0
            padded[name][row, start : start + TOKENS] = inputs[name][row]
    return padded


@pytest.mark.parametrize(("layers", "middle", "last"), [(2, [0, 1], 1), (5, [2, 3], 4)])
def test_signals_are_those_of_eager_attention(models, records, layers, middle, last):
    retriever, eager = models[layers]
    inputs = retriever.record_inputs(records[:3])
    patches = inputs["input_ids"] == retriever.image_token_id
    _, signals = retriever.image_states(inputs, ATTENTION)
    expected = eager_signals(eager, inputs, patches, middle, last)
    assert list(signals) == list(ATTENTION)
    for name in ATTENTION:
        assert signals[name].shape == (3, TOKENS)
        assert signals[name].dtype == torch.float32
        torch.testing.assert_close(signals[name], expected[name], atol=1e-4, rtol=1e-4)
        assert (signals[name][~patches] == 0).all()
        assert (signals[name][patches] > 0).all()
    assert (signals["middle_max"] >= signals["middle_mean"] - 1e-5).all()
    if layers == 5:  # the three can be told apart
        for one, other in (("middle_max", "middle_mean"), ("middle_mean", "last")):
            assert (signals[one] - signals[other]).abs().max() > 0.1
    one, every = retriever.image_states(inputs, ["last"])[1], retriever.encode_images(inputs, ["last", "middle_max"])
    assert list(one) == ["last"]
    assert list(every.attention) == ["last", "middle_max"]
    assert torch.equal(every.attention["last"], signals["last"])
    assert retriever.image_states(inputs)[1] == {}
    with pytest.raises(InputError, match="'first' is unknown; there are middle_mean, middle_max, last"):
        retriever.image_states(inputs, ["first"])


def test_a_causal_model_is_read_as_such_with_and_without_padding(monkeypatch, tmp_path):
    """sdpa is given no mask where a batch has no padding: causal by its own switch."""
    monkeypatch.setitem(FAMILIES, Toy.architecture, Toy)
    toy = Retriever.load(str(save_toy(tmp_path)))
    eager = ToyForRetrieval.from_pretrained(tmp_path).eval()
    eager.model.config._attn_implementation = "eager"
    seen = []
    for layer in eager.model.layers:
        layer.self_attn.register_forward_hook(lambda *words: seen.append(words[-1][1]))
    wide, tall = (Image.radial_gradient("L").resize(size).convert("RGB") for size in ((90, 60), (60, 90)))
    for images in ([wide, wide], [wide, tall]):
        inputs = toy.image_inputs(images)
        signals = toy.image_states(inputs, ATTENTION)[1]
        seen.clear()
        with torch.no_grad():
            eager(**{name: value for name, value in inputs.items() if name != "image_grids"})
        patches = inputs["input_ids"] == toy.image_token_id
        sums = torch.stack([(seen[-1][row].mean(0) * patches[row][:, None]).sum(0) for row in (0, 1)])
        torch.testing.assert_close(signals["last"], sums * patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_no_signal(models, records, left):
    retriever, eager = models[5]
    inputs = retriever.record_inputs(records[:3])
    whole = pad_inputs(inputs, [0, 2, 5], left)
    patches = whole["input_ids"] == retriever.image_token_id
    hidden, signals = retriever.image_states(whole, ATTENTION)
    assert torch.equal(hidden, retriever.hidden_states(whole))
    expected = eager_signals(eager, whole, patches, [2, 3], 4)
    valid = whole["attention_mask"].bool()
    for name, alone in retriever.image_states(inputs, ATTENTION)[1].items():
        torch.testing.assert_close(signals[name], expected[name], atol=1e-4, rtol=1e-4)
        assert (signals[name][~valid] == 0).all()
        assert torch.isfinite(signals[name]).all()
        torch.testing.assert_close(signals[name][valid].view(3, TOKENS), alone, atol=1e-3, rtol=1e-3)


def test_an_image_is_read_the_same_alone_and_in_a_batch(models, records):
    retriever, _ = models[5]
    together = retriever.encode_images(retriever.record_inputs(records), ATTENTION)
    for row, record in enumerate(records):
        single = retriever.encode_images(retriever.record_inputs([record]), ATTENTION)
        for name in ATTENTION:
            torch.testing.assert_close(single.attention[name][0], together.attention[name][row], atol=1e-4, rtol=1e-4)
        assert torch.equal(single.seeds, together.seeds[row : row + 1])
    digest = hashlib.sha256(records[0].image_id.encode()).digest()
    assert int(together.seeds[0]) == int.from_bytes(digest[:8], "little", signed=True)
    assert len(set(image_seeds(records).tolist())) == len(records)


def state_of(model):
    """Everything that reading may leave behind: attributes and hooks of every module, the configs' attention."""
    language = model.vlm.language_model
    marks = [(name, tuple(sorted(vars(module)))) for name, module in model.named_modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    configs = [c._attn_implementation for c in (model.config, model.vlm.config, language.config)]
    return marks, hooks, configs


def test_reading_leaves_the_model_as_it_was(models, records):
    retriever = Retriever.load(models[5][0].name)
    inputs = retriever.record_inputs(records[:3])
    before, plain = state_of(retriever.model), retriever.hidden_states(inputs)
    hidden, signals = retriever.image_states(inputs, ATTENTION)
    assert torch.equal(hidden, plain)
    assert state_of(retriever.model) == before

    def fail(*_):
        raise KeyboardInterrupt

    handle = retriever.model.vlm.language_model.layers[3].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        retriever.image_states(inputs, ATTENTION)
    handle.remove()
    assert state_of(retriever.model) == before
    again, signals_again = retriever.image_states(inputs, ATTENTION)
    assert torch.equal(again, plain)
    assert all(torch.equal(signals[name], signals_again[name]) for name in ATTENTION)
    assert torch.equal(retriever.hidden_states(inputs), plain)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(18, [7, 8, 9, 10, 17]), (1, [0, 0]), (2, [0, 1, 1]), (3, [1, 2]), (5, [2, 3, 4]), (28, [*range(11, 17), 27])],
)
def test_signal_layers(count, expected):
    assert signal_layers(count) == expected


class Sizes(TorchDispatchMode):
    """Counts the shapes of all tensors that are made, and the most attention-like bytes alive at once."""

    def __init__(self):
        super().__init__()
        self.made, self.alive, self.most = collections.Counter(), [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.made[tuple(tensor.shape)] += 1
                if tensor.dim() >= 2 and tensor.is_floating_point() and set(tensor.shape[-2:]) <= {PATCHES, TOKENS}:
                    self.alive.append(weakref.ref(tensor))
        held = [ref() for ref in self.alive]
        self.alive = [ref for ref, tensor in zip(self.alive, held) if tensor is not None]
        storages = {t.untyped_storage().data_ptr(): t.numel() for t in held if t is not None}
        self.most = max(self.most, sum(storages.values()))
        return result


def test_attention_is_held_for_one_image_and_layer(models, records):
    retriever, _ = models[5]
    inputs = retriever.record_inputs(records)
    assert len(records) == 6
    with Sizes() as plain:
        retriever.image_states(inputs)
    with Sizes() as reading:
        retriever.image_states(inputs, ATTENTION)
    extra = reading.made - plain.made
    one = 4 * TOKENS * TOKENS
    assert extra[(4, PATCHES, TOKENS)] >= 6 * 3  # images and layers, one at a time
    largest = max(extra, key=lambda shape: torch.Size(shape).numel())
    assert torch.Size(largest).numel() <= one, largest
    assert reading.most <= plain.most + 3 * one  # logits, masked logits, probabilities


def token_text(tokenizer, number):
    return tokenizer.convert_ids_to_tokens(int(number)).replace("\u2581", " ")


def test_offsets_cover_every_character_once(models):
    retriever, _ = models[2]
    tokenizer = retriever.processor.tokenizer
    inputs = retriever.query_inputs(TEXTS)
    offsets, valid = inputs["offsets"], inputs["attention_mask"].bool()
    assert offsets.shape == (*valid.shape, 2)
    assert offsets.dtype == torch.long
    assert not valid.all()
    assert (offsets[~valid] == NO_OFFSET).all()
    empty = (offsets == NO_OFFSET).all(-1)
    assert ((offsets[..., 0] >= 0) & (offsets[..., 0] < offsets[..., 1]) | empty).all()
    for row, text in enumerate(TEXTS):
        owners = collections.defaultdict(list)
        for token, (start, end) in zip(inputs["input_ids"][row], offsets[row].tolist()):
            if start == NO_OFFSET:
                continue
            assert end <= len(text)
            word = token_text(tokenizer, token)
            if not word.startswith("<0x"):  # a word that begins the text took the space before it from the prompt
                assert text[start:end] in ({word, word.removeprefix(" ")} if start == 0 else {word})
            for character in range(start, end):
                owners[character].append(word)
        for character, letter in enumerate(text):
            words = owners[character]
            if len(words) > 1 or words[0].startswith("<0x"):  # a letter that the vocabulary lacks, byte by byte
                assert bytes(int(word[3:5], 16) for word in words).decode() == letter
            assert words or letter == " "
        alone = retriever.query_inputs([text])["offsets"][0]
        assert torch.equal(offsets[row][valid[row]], alone)
    assert empty[TEXTS.index("")].all()


def test_a_store_gives_the_same_signals_seeds_and_offsets(models, world, records, tmp_path):
    retriever, _ = models[5]
    folder = tmp_path / "store"
    write_features(folder, world, ["val"], retriever, batch_size=6, dtype="float32")
    stored = FeatureStore(folder, retriever.name)
    theirs, ours = (e.encode_images(e.record_inputs(records), ATTENTION) for e in (retriever, stored))
    assert list(ours.attention) == list(ATTENTION)
    for name in ATTENTION:
        assert torch.equal(ours.attention[name], theirs.attention[name])
    assert torch.equal(ours.seeds, theirs.seeds)
    assert torch.equal(ours.patches, theirs.patches)
    turned = stored.encode_images(stored.record_inputs([records[2], records[1]]), ["last"])
    assert torch.equal(turned.seeds, theirs.seeds[[2, 1]])
    assert torch.equal(turned.attention["last"], theirs.attention["last"][[2, 1]])
    with pytest.raises(InputError, match="'first' is unknown"):
        stored.image_states(stored.record_inputs(records), ["first"])
    texts = [caption.text for record in records for caption in record.captions]
    theirs, ours = (e.query_inputs(texts) for e in (retriever, stored))
    assert ours["offsets"].dtype == torch.long
    assert (ours["offsets"][~ours["attention_mask"].bool()] == NO_OFFSET).all()
    assert not ours["attention_mask"].all()
    for row in range(len(texts)):
        mine, other = (i["offsets"][row][i["attention_mask"][row].bool()] for i in (ours, theirs))
        assert torch.equal(mine, other)
        assert (mine >= 0).any()


def test_signals_need_the_token_types(retriever, records):
    inputs = retriever.record_inputs(records)
    del inputs["token_type_ids"]
    with pytest.raises(InputError, match="token_type_ids"):
        retriever.image_states(inputs, ["last"])


def test_a_query_that_holds_the_image_token_is_refused(retriever):
    with pytest.raises(InputError, match="<image>"):
        retriever.query_inputs(["a dog", "an <image> of a dog"])
