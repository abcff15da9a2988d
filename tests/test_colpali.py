"""The frozen retriever: what it encodes, what it refuses, and the projector on its way to disk and back."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import pickle
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracle import naive_merge
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from toy_family import Toy, save_toy
from transformers import ColPaliForRetrieval, ColPaliProcessor, GemmaTokenizer, SiglipImageProcessorPil
from transformers.models.auto import image_processing_auto
from transformers.models.paligemma.modeling_paligemma import PaliGemmaModelOutputWithPast

from samer.config import InputError, MergeConfig
from samer.data import flickr, pictures
from samer.index.read import Index
from samer.retrievers import FAMILIES
from samer.retrievers.attention import ATTENTION
from samer.retrievers.base import Projector
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector, save_projector

MERGE = MergeConfig(num_regions=16)
TEXTS = ["a dog", "two red circles beside a large striped square under a small yellow star", "", "a"]


@pytest.fixture(scope="module")
def shared(base):
    """One retriever for the tests that leave it as it is."""
    return Retriever.load(str(base))


@pytest.fixture(scope="module")
def colpali(base):
    """The same checkpoint as transformers alone loads and computes it."""
    return ColPaliForRetrieval.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def images(world):
    records = flickr.load_split(world, "val", boxes=False, limit_images=3)
    return [pictures.load_image(record.image_path) for record in records]


@pytest.fixture(scope="module")
def tokenizer():
    from samer.world.retriever import page_texts, train_tokenizer

    return train_tokenizer(page_texts(5, 0), 400)


@pytest.fixture(scope="module")
def build(tokenizer):
    """Builds a small ColPali in memory: another base than the one of the tests."""
    from samer.world.retriever import Geometry, build_colpali

    vision = {"image_size": 32, "patch_size": 8, "vision_layers": 1, "vision_width": 16, "vision_mlp": 16}
    text = {"text_width": 32, "text_layers": 1, "text_mlp": 16, "heads": 2, "embedding_dim": 16}

    def build(name, seed=1, words=tokenizer, **changes):
        geometry = Geometry(**{**vision, **text, **changes})
        return Retriever(*build_colpali(copy.deepcopy(words), geometry, seed), name)  # the processor adds words

    return build


def other_projector(retriever, seed=3):
    generator = torch.Generator().manual_seed(seed)
    shape = retriever.base_projector.weight.shape
    return Projector(torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator))


def same(left, right):
    return torch.equal(left.weight, right.weight) and torch.equal(left.bias, right.bias)


# --- encoding -------------------------------------------------------------------------------------------------------


def test_images_are_encoded_as_colpali_itself_does(shared, colpali, images):
    inputs = shared.image_inputs(images)
    visual = shared.encode_images(inputs)
    with torch.no_grad():
        expected = colpali(**inputs).embeddings
    assert visual.tokens.shape == (3, 8 * 8 + 6, 16)
    assert visual.tokens.dtype == torch.float32
    assert visual.mask is None
    torch.testing.assert_close(visual.tokens, expected, atol=1e-5, rtol=0)
    assert (visual.tokens[0] - visual.tokens[1]).abs().max() > 1e-2  # different images differ


def test_queries_are_encoded_as_colpali_itself_does(shared, colpali):
    inputs = shared.query_inputs(TEXTS)
    queries = shared.encode_queries(inputs)
    with torch.no_grad():
        expected = colpali(**inputs).embeddings
    valid = inputs["attention_mask"].bool()
    assert not valid.all()  # there is padding in this batch
    assert torch.equal(queries.mask, valid)
    torch.testing.assert_close(queries.tokens[valid], expected[valid], atol=1e-5, rtol=0)


def test_a_query_alone_equals_itself_in_a_padded_batch(shared):
    together = shared.encode_queries(shared.query_inputs(TEXTS))
    assert not together.mask[0, 0]  # padding stands on the left
    for row, text in enumerate(TEXTS):
        alone = shared.encode_queries(shared.query_inputs([text]))
        assert alone.mask.all()
        torch.testing.assert_close(together.tokens[row][together.mask[row]], alone.tokens[0], atol=1e-4, rtol=0)
    assert together.mask[2].sum() > 10  # even the empty text: prompt and augmentation tokens count


def test_token_types_are_forwarded_and_matter(shared, images, monkeypatch):
    """Without them the backbone turns causal for padded batches."""
    seen = []
    forward = shared.model.vlm.forward

    def spy(**inputs):
        output = forward(**inputs)
        seen.append((inputs, output))
        return output

    monkeypatch.setattr(shared.model.vlm, "forward", spy)
    shared.encode_images(shared.image_inputs(images))
    inputs = shared.query_inputs(TEXTS)
    full = shared.hidden_states(inputs)
    for given, output in seen:
        assert {"input_ids", "attention_mask", "token_type_ids"} <= set(given)
        assert given["use_cache"] is False
        assert output.past_key_values is None
    assert "pixel_values" in seen[0][0]
    assert "labels" not in seen[0][0]
    assert len(seen) == 2
    causal = shared.hidden_states({name: value for name, value in inputs.items() if name != "token_type_ids"})
    valid = inputs["attention_mask"].bool()
    assert F.cosine_similarity(full, causal, dim=-1)[valid].min() < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_are_the_backbones_own_bit_for_bit(base, images, dtype):
    """What the projection is given is what the backbone returns, in its dtype, whatever the projection is stored in."""
    retriever = Retriever.load(str(base), dtype=dtype)
    for inputs in (retriever.image_inputs(images), retriever.query_inputs(TEXTS)):
        hidden = retriever.hidden_states(inputs)
        given = {name: value for name, value in inputs.items() if name != "offsets"}
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(dtype)
        with torch.no_grad():
            expected = retriever.model.vlm(**given, use_cache=False).last_hidden_state
        valid = inputs["attention_mask"].bool()
        assert hidden.dtype == dtype
        assert torch.equal(hidden[valid], expected[valid])
        assert (hidden[~valid] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_transformers_own(base, images, dtype):
    """The checkpoint loaded in that dtype by transformers alone, whose rotary frequencies stay in float32."""
    retriever = Retriever.load(str(base), dtype=dtype)
    stock = ColPaliForRetrieval.from_pretrained(base, dtype=dtype, attn_implementation="sdpa").eval()
    for inputs in (retriever.image_inputs(images), retriever.query_inputs(TEXTS)):
        given = {name: value for name, value in inputs.items() if name != "offsets"}
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(dtype)
        with torch.no_grad():
            expected = stock.vlm(**given, use_cache=False).last_hidden_state
        valid = inputs["attention_mask"].bool()
        assert torch.equal(retriever.hidden_states(inputs)[valid], expected[valid])


def test_no_layers_states_are_kept(shared, images, monkeypatch):
    """transformers' retrieval classes ask the backbone for the states of all layers, gigabytes for a large batch."""
    outputs = []
    forward = shared.model.vlm.forward
    monkeypatch.setattr(shared.model.vlm, "forward", lambda **given: outputs.append(forward(**given)) or outputs[-1])
    inputs = shared.image_inputs(images)
    shared.hidden_states(inputs)
    assert outputs[0].hidden_states is None
    with torch.no_grad():
        shared.model(**inputs)
    assert outputs[1].hidden_states is not None


def test_a_bare_string_is_refused(shared):
    with pytest.raises(InputError, match="list of texts"):
        shared.query_inputs("a dog")


def test_non_finite_features_are_refused_at_valid_positions_only(retriever, monkeypatch):
    inputs = retriever.query_inputs(TEXTS)
    valid = inputs["attention_mask"].bool()
    clean = retriever.hidden_states(inputs)
    spoil = ~valid

    def forward(**given):
        return PaliGemmaModelOutputWithPast(last_hidden_state=torch.where(spoil[..., None], float("nan"), clean))

    monkeypatch.setattr(retriever.model.vlm, "forward", forward)
    hidden = retriever.hidden_states(inputs)
    assert torch.equal(hidden[valid], clean[valid])
    assert torch.isfinite(retriever.encode_queries(inputs).tokens).all()
    spoil[3, -1] = True
    with pytest.raises(InputError, match="NaN or infinite features for item 3"):
        retriever.hidden_states(inputs)


def test_half_precision_sums_that_overflow_are_no_defect(base, monkeypatch):
    retriever = Retriever.load(str(base), dtype=torch.float16)
    inputs = retriever.query_inputs(["a dog"])
    large = torch.full((1, inputs["input_ids"].shape[1], 32), 6e4, dtype=torch.float16)
    output = PaliGemmaModelOutputWithPast(last_hidden_state=large)
    monkeypatch.setattr(retriever.model.vlm, "forward", lambda **given: output)
    assert not torch.isfinite(large.sum())
    assert torch.equal(retriever.hidden_states(inputs), large)


def test_coordinates_follow_the_image_token_wherever_it_stands(shared):
    grid = [(x / 7, y / 7) for y in range(8) for x in range(8)]  # row-major, (x, y)
    ids = torch.full((2, 70), 7)
    ids[0, :64] = shared.image_token_id
    later = torch.arange(64) + torch.tensor([0] * 10 + [3] * 20 + [6] * 34)  # prompt tokens before and in between
    ids[1, later] = shared.image_token_id
    layout = shared.image_layout({"input_ids": ids})
    coords, patches = layout.coords, layout.patches
    assert layout.grid.tolist() == [[8, 8], [8, 8]]
    assert torch.equal(layout.source, torch.stack([torch.arange(64), later]))
    assert patches.sum(1).tolist() == [64, 64]
    torch.testing.assert_close(coords[0, :64], torch.tensor(grid))
    torch.testing.assert_close(coords[1, later], torch.tensor(grid))
    assert (coords[~patches] == 0.5).all()
    ids[1, later[0]] = 7
    with pytest.raises(InputError, match=r"image 1 .* has 63 image tokens, expected 64 \(8 x 8\); processor and model"):
        shared.image_layout({"input_ids": ids})


def test_the_base_stays_frozen_and_the_projector_is_replaced(retriever, images):
    inputs = retriever.image_inputs(images[:1])
    assert not any(p.requires_grad for p in [*retriever.model.parameters(), *retriever.projection.parameters()])
    assert not retriever.model.training
    projector = other_projector(retriever)
    hidden = retriever.hidden_states(inputs)
    before = retriever.encode_images(inputs).tokens
    retriever.use_projector(projector)
    after = retriever.encode_images(inputs).tokens
    expected = F.normalize(hidden @ projector.weight.T + projector.bias, dim=-1)
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 0.1
    assert same(retriever.current_projector(), projector)
    retriever.use_projector(retriever.base_projector)
    assert torch.equal(retriever.encode_images(inputs).tokens, before)


def test_half_precision_is_close_and_projects_in_float32(base, shared, images):
    half = Retriever.load(str(base), dtype=torch.bfloat16)
    inputs = shared.image_inputs(images)
    assert half.hidden_states(inputs).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        tokens = half.encode_images(inputs).tokens
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(tokens.shape[:2]), atol=1e-5, rtol=0)
    assert F.cosine_similarity(tokens, shared.encode_images(inputs).tokens, dim=-1).min() > 0.99


# --- loading the base -----------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_the_file_whatever_the_dtype(base):
    stored = load_file(base / "model.safetensors")
    digest = hashlib.sha256()
    for name, shape in (("weight", "(16, 32)"), ("bias", "(16,)")):
        digest.update(shape.encode() + stored[f"embedding_proj_layer.{name}"].float().numpy().tobytes())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loaded = Retriever.load(str(base), dtype=dtype)
        assert loaded.model.dtype == dtype
        assert loaded.base_projector.hash == loaded.current_projector().hash == digest.hexdigest()


@pytest.mark.parametrize(
    "lost",
    [
        "embedding_proj_layer.weight",
        "embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight",
        "vision_tower.encoder.layers.0.mlp.fc1.bias",
        "multi_modal_projector.linear.weight",
    ],
)
def test_a_checkpoint_without_one_weight_is_refused(base, tmp_path, lost):
    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(lost)}
    assert len(kept) == len(tensors) - 1
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 weights .*, first .*" + lost.split("model.")[-1].replace(".", r"\.")):
        Retriever.load(str(folder))


def test_a_checkpoint_with_a_weight_of_another_size_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["embedding_proj_layer.weight"] = torch.zeros(8, 32, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights .*, first embedding_proj_layer\.weight"):
        Retriever.load(str(folder))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"not safetensors"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "processor_config.json").unlink(),
    ],
    ids=["no weights", "damaged weights", "no config", "damaged config", "a bert", "no tokenizer", "no processor"],
)
def test_a_folder_that_is_no_whole_colpali_is_refused(base, tmp_path, spoil):
    folder = shutil.copytree(base, tmp_path / "base")
    spoil(folder)
    with pytest.raises(InputError, match=str(folder)):
        Retriever.load(str(folder))


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "./no/such/folder", "not a model id"])
def test_a_name_that_does_not_exist_is_refused_without_network(monkeypatch, name):
    tried = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: tried.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **more: tried.append(words) or [])
    with pytest.raises(InputError, match=name):
        Retriever.load(name)
    assert tried == []


def test_a_processor_of_another_checkpoint_is_refused(base, build):
    other = build("other")
    with pytest.raises(InputError, match="different checkpoints"):
        Retriever(ColPaliForRetrieval.from_pretrained(base), other.processor, "mixed")


class OtherPixels(SiglipImageProcessorPil):
    """Stands for torchvision's pipeline: other pixels of the same picture."""

    def __call__(self, images, **more):
        found = super().__call__(images, **more)
        return type(found)({**found, "pixel_values": -found["pixel_values"]})


def test_pixels_do_not_depend_on_torchvision(base, images, monkeypatch):
    before = Retriever.load(str(base)).image_inputs(images)["pixel_values"]
    OtherPixels.__name__ = "SiglipImageProcessor"  # as processor_config.json names it, and transformers looks it up
    pipelines = {"torchvision": OtherPixels, "pil": SiglipImageProcessorPil}
    monkeypatch.setitem(image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES, "siglip", pipelines)
    monkeypatch.setattr(image_processing_auto, "is_torchvision_available", lambda: True)
    stock = ColPaliProcessor.from_pretrained(base)
    assert type(stock.image_processor) is OtherPixels  # transformers itself would take it
    assert torch.equal(stock(images=images)["pixel_values"], -before)
    retriever = Retriever.load(str(base))
    assert retriever.processor.image_processor.backend == "pil"
    assert torch.equal(retriever.image_inputs(images)["pixel_values"], before)


# --- another family -------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A retriever of a family that one file and one line add: two grids, no bias, padding on the left."""
    monkeypatch.setitem(FAMILIES, Toy.architecture, Toy)
    return Retriever.load(str(save_toy(tmp_path / "toy")))


def test_another_family_is_one_file_and_one_line(toy):
    pictures = [Image.new("RGB", size, colour) for size, colour in (((90, 60), "red"), ((60, 90), "blue"))]
    inputs = toy.image_inputs(pictures)
    visual = toy.encode_images(inputs, ATTENTION)
    with torch.no_grad():
        expected = toy.model(**{k: v for k, v in inputs.items() if k != "image_grids"}).embeddings
    wide, tall = inputs["attention_mask"].bool()
    assert (int(wide.sum()), int(tall.sum())) == (5 + 15 + 1, 5 + 12 + 1)
    assert torch.equal(visual.mask, torch.stack([wide, tall]))
    torch.testing.assert_close(visual.tokens[visual.mask], expected[visual.mask], atol=1e-6, rtol=0)
    assert visual.grid.tolist() == [[3, 5], [4, 3]]
    assert visual.source[0].tolist() == list(range(5, 20))
    assert visual.source[1].tolist() == [*range(8, 20), -1, -1, -1]
    assert visual.coords[1, 8 + 4].tolist() == [0.5, pytest.approx(1 / 3)]  # row 1 of 4, column 1 of 3
    assert (visual.attention["last"] > 0).equal(visual.patches)
    queries = toy.query_inputs(["a dog", "sun"])
    assert queries["offsets"][1].tolist()[-5:] == [[0, 1], [1, 2], [2, 3], [-1, -1], [-1, -1]]
    assert toy.encode_queries(queries).tokens.shape == (2, 6 + 5 + 2, 16)
    assert toy.identity.architecture == "ToyForRetrieval"
    assert toy.base_projector.bias is None


@pytest.mark.parametrize(
    "config", [{"architectures": ["ColPaliForRetrieval"], "model_type": "bert"}, {"model_type": "toy"}, {}]
)
def test_a_model_of_no_family_is_refused_by_name(base, tmp_path, config):
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"is of model type {config.get('model_type')!r}.*there are 'colpali'"):
        Retriever.load(str(folder))


def test_a_projector_without_bias_goes_every_way(toy, tmp_path):
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
    projector = Projector(weight, None)
    save_projector(tmp_path / "saved", projector, toy, MERGE)
    assert set(load_file(tmp_path / "saved/projector.safetensors")) == {"weight"}
    torch.save({"projector_state_dict": {"weight": weight}}, tmp_path / "projector.pt")
    for path in (tmp_path / "saved", tmp_path / "projector.pt"):
        loaded = load_projector(path, toy)
        assert loaded.bias is None
        assert torch.equal(loaded.weight, weight)
        toy.use_projector(loaded)
        assert toy.current_projector().hash == projector.hash
    torch.save({"projector_state_dict": {"weight": weight, "bias": torch.zeros(16)}}, tmp_path / "projector.pt")
    with pytest.raises(InputError, match=r"\(16, 24\) with bias, but .*needs \(16, 24\) without bias"):
        load_projector(tmp_path / "projector.pt", toy)


def test_an_adapter_is_named_by_its_familys_layer(toy, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["multi_vector_head.proj"], init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(toy.model), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    a, b = (t for _, t in sorted(load_file(tmp_path / "adapter/adapter_model.safetensors").items()))
    loaded = load_projector(tmp_path / "adapter", toy)
    torch.testing.assert_close(loaded.weight, toy.base_projector.weight + b @ a * 3, atol=1e-6, rtol=0)
    assert loaded.bias is None


# --- the projector on disk ------------------------------------------------------------------------------------------


def test_a_projector_comes_back_bit_for_bit(retriever, tmp_path):
    projector = other_projector(retriever)
    projector.weight[0, 0] = -0.0
    projector.bias[0] = 1e-42  # not a normal number
    for folder in (tmp_path / "one", tmp_path / "two"):
        save_projector(folder, projector, retriever, MERGE)
    assert (tmp_path / "one/projector.safetensors").read_bytes() == (
        tmp_path / "two/projector.safetensors"
    ).read_bytes()
    for path in (tmp_path / "one", str(tmp_path / "one"), tmp_path / "one/projector.safetensors"):
        loaded = load_projector(path, retriever)
        assert loaded.weight.numpy().tobytes() == projector.weight.numpy().tobytes()
        assert loaded.bias.numpy().tobytes() == projector.bias.numpy().tobytes()
    about = json.loads((tmp_path / "one/config.json").read_text())
    assert about["base_model"] == retriever.name
    later = {"bank_size": 2048, "sap_layers": "", "global_view": "joined"}  # left out where they change nothing
    assert {**about["merge"], **later} == dataclasses.asdict(MERGE)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "projector.safetensors"]


@pytest.fixture
def saved(shared, tmp_path):
    """A projector folder, and how to change its config.json."""
    save_projector(tmp_path / "saved", other_projector(shared), shared, MERGE)

    def change(**values):
        path = tmp_path / "saved/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return SimpleNamespace(folder=tmp_path / "saved", file=tmp_path / "saved/projector.safetensors", change=change)


def test_a_projector_of_another_base_is_refused(shared, saved, build):
    with pytest.raises(InputError, match=r"trained on .*retriever.*not on 'another'"):
        load_projector(saved.folder, build("another", seed=2))  # same sizes, other weights
    with pytest.raises(InputError, match="trained on"):
        load_projector(saved.folder, build("smaller", embedding_dim=8))
    with pytest.raises(InputError, match=r"the projector is \(8, 32\).*, but .* needs \(16, 32\)"):
        shared.use_projector(build("smaller", embedding_dim=8).base_projector)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"format_version": 2}, "version 2 is not 'samer_projector' version 1"),
        ({"format": "something"}, "format 'something'"),
        ({"projector": "0" * 64}, "damaged"),
        ({"base_projector": None}, "no identity"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(shared, saved, values, words):
    saved.change(**values)
    with pytest.raises(InputError, match=words):
        load_projector(saved.folder, shared)


def test_a_flipped_byte_never_passes(shared, saved):
    whole = saved.file.read_bytes()
    truth = load_projector(saved.folder, shared)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(header), *range(header, len(whole), 97), len(whole) - 1]:
        saved.file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x0F]) + whole[place + 1 :])
        if place >= header:
            with pytest.raises(InputError, match=r"projector\.safetensors: .* damaged"):
                load_projector(saved.folder, shared)
        else:
            with contextlib.suppress(InputError):  # some of the header's words change no value
                assert same(load_projector(saved.folder, shared), truth)
    for length in (0, 7, 100, len(whole) - 1):
        saved.file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="damaged"):
            load_projector(saved.folder, shared)


def test_a_folder_without_its_parts_is_refused(shared, saved, tmp_path):
    (saved.folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_projector(saved.folder, shared)
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "nothing.pt", tmp_path / "nothing.safetensors"):
        with pytest.raises(InputError, match=str(path)):
            load_projector(path, shared)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_projector_that_is_not_finite_is_refused(retriever, value):
    before = retriever.current_projector()
    for name in ("weight", "bias"):
        broken = other_projector(retriever)
        getattr(broken, name)[-1] = value
        with pytest.raises(InputError, match="NaN or infinite"):
            retriever.use_projector(broken)
    assert same(retriever.current_projector(), before)


# --- projectors of other makings ------------------------------------------------------------------------------------


def test_legacy_files_load(shared, tmp_path):
    projector = other_projector(shared)
    state = {"weight": projector.weight, "bias": projector.bias}
    torch.save({"format": "samer_projector_v1", "projector_state_dict": state}, tmp_path / "projector.pt")
    torch.save({"projector_state_dict": {k: t.bfloat16() for k, t in state.items()}}, tmp_path / "half.pt")
    assert same(load_projector(tmp_path, shared), projector)
    assert same(load_projector(tmp_path / "projector.pt", shared), projector)
    half = load_projector(tmp_path / "half.pt", shared)
    assert half.weight.dtype == half.bias.dtype == torch.float32
    assert torch.equal(half.weight, projector.weight.bfloat16().float())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": "samer_projector_v2", "projector_state_dict": {}}, "not of format samer_projector_v1"),
        ({"weight": torch.zeros(16, 32)}, "not of format samer_projector_v1"),
        ([1, 2], "not of format samer_projector_v1"),
        ({"projector_state_dict": {"weight": torch.zeros(16, 32)}}, r"is \(16, 32\) without bias, but .* with bias"),
        ({"projector_state_dict": {"bias": torch.zeros(16)}}, "expected a weight"),
        ({"projector_state_dict": {"weight": torch.zeros(16, 32), "bias": torch.zeros(8)}}, "expected a weight"),
        ({"projector_state_dict": {"weight": torch.zeros(512), "bias": torch.zeros(16)}}, "expected a weight"),
        ({"projector_state_dict": {"weight": torch.zeros(8, 32), "bias": torch.zeros(8)}}, r"is \(8, 32\)"),
    ],
)
def test_other_legacy_contents_are_refused(shared, tmp_path, content, words):
    torch.save(content, tmp_path / "projector.pt")
    with pytest.raises(InputError, match=words):
        load_projector(tmp_path, shared)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_a_hostile_legacy_file_runs_nothing(shared, tmp_path, plain_pickle):
    canary, file = tmp_path / "canary", tmp_path / "projector.pt"
    state = {"weight": torch.zeros(16, 32), "bias": torch.zeros(16)}
    content = {"format": "samer_projector_v1", "projector_state_dict": state, "more": Canary(canary)}
    if plain_pickle:
        file.write_bytes(pickle.dumps({**content, "projector_state_dict": {}}, protocol=2))
        pickle.loads(file.read_bytes())["more"].close()
    else:
        torch.save(content, file)
        torch.load(file, weights_only=False)["more"].close()
    assert canary.exists()  # the file does bite whoever trusts it
    canary.unlink()
    for path in (tmp_path, file):
        with pytest.raises(InputError, match="without running code"):
            load_projector(path, shared)
    assert not canary.exists()


class Host(nn.Module):
    """What an adapter is trained on: the base's projection, and another layer beside it."""

    def __init__(self, projector):
        super().__init__()
        self.embedding_proj_layer = nn.Linear(*reversed(projector.weight.shape))
        self.embedding_proj_layer.load_state_dict({"weight": projector.weight, "bias": projector.bias})
        self.other = nn.Linear(16, 16)


@pytest.fixture
def adapter(shared, tmp_path):
    """Saves a PEFT adapter with random matrices; gives its folder and its tensors."""
    from peft import LoraConfig, get_peft_model

    def make(**settings):
        torch.manual_seed(5)
        folder = tmp_path / "adapter"
        settings = {"target_modules": ["embedding_proj_layer"], "init_lora_weights": False, "r": 4, **settings}
        get_peft_model(Host(shared.base_projector), LoraConfig(**settings)).save_pretrained(folder)
        return folder, load_file(folder / "adapter_model.safetensors")

    return make


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_adapter_is_added_to_the_base(shared, adapter, rslora):
    folder, tensors = adapter(lora_alpha=12, use_rslora=rslora)
    a, b = (tensors[f"base_model.model.embedding_proj_layer.lora_{which}.weight"].double() for which in "AB")
    loaded = load_projector(folder, shared)
    expected = shared.base_projector.weight.double() + b @ a * 12 / (4**0.5 if rslora else 4)
    torch.testing.assert_close(loaded.weight.double(), expected, atol=1e-6, rtol=0)
    assert (loaded.weight - shared.base_projector.weight).abs().max() > 0.1
    assert torch.equal(loaded.bias, shared.base_projector.bias)
    assert not loaded.weight.requires_grad
    shared.use_projector(loaded)
    shared.use_projector(shared.base_projector)


def test_an_adapter_that_saved_the_layer_itself_loads(shared, adapter):
    folder, tensors = adapter(target_modules=["other"], modules_to_save=["embedding_proj_layer"])
    with pytest.raises(InputError, match=r"also changes .*other\.lora_A"):
        load_projector(folder, shared)
    projector = other_projector(shared)
    own = {name: getattr(projector, name.rpartition(".")[2]) for name in tensors if "embedding_proj_layer" in name}
    assert len(own) == 2
    save_file(own, folder / "adapter_model.safetensors")
    assert same(load_projector(folder, shared), projector)


def test_an_adapter_of_other_modules_is_refused(shared, adapter):
    folder, _ = adapter(target_modules=["embedding_proj_layer", "other"])
    with pytest.raises(InputError, match=r"also changes base_model\.model\.other\.lora_A\.weight"):
        load_projector(folder, shared)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {},
        lambda tensors: {name: t for name, t in tensors.items() if "lora_A" in name},
        lambda tensors: {name.replace("model.emb", "wrong.emb"): t for name, t in tensors.items()},
        lambda tensors: {name: t[:, :1].contiguous() for name, t in tensors.items()},
        lambda tensors: {**tensors, "embedding_proj_layer.more": torch.zeros(1)},
    ],
    ids=["nothing", "half", "other names", "other sizes", "one too many"],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_whose_tensors_do_not_fit_is_refused(shared, adapter, change):
    """PEFT itself only warns, and leaves random matrices in the place of those that it misses."""
    folder, tensors = adapter()
    save_file(change(tensors), folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="not an adapter of"):
        load_projector(folder, shared)


def test_an_adapter_without_safetensors_or_of_another_size_is_refused(shared, adapter, build):
    folder, tensors = adapter()
    with pytest.raises(InputError, match="not an adapter of wide"):
        load_projector(folder, build("wide", text_width=64))
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        load_projector(folder, shared)


# --- the published geometry -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tokenizer, build, tmp_path_factory):
    """A narrow ColPali of the published geometry: 448 pixels, 14-pixel patches, a vocabulary of the released size."""
    vocab = tokenizer.get_vocab()
    words = {**vocab, **{f"<unused{k}>": k for k in range(len(vocab), 256_000)}}
    merges = [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    large = GemmaTokenizer(vocab=dict(sorted(words.items(), key=lambda item: item[1])), merges=merges)
    sizes = {"image_size": 448, "patch_size": 14, "text_width": 16, "heads": 1, "embedding_dim": 128}
    retriever = build("published", words=large, **sizes)
    folder = tmp_path_factory.mktemp("published") / "retriever"
    retriever.model.half().save_pretrained(folder)
    retriever.processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_published_geometry_gives_1030_tokens(published, images):
    retriever = Retriever.load(str(published))
    names = ["<pad>", "<eos>", "<bos>", "<image>", "<loc0000>", "<loc1023>", "<seg000>", "<seg127>"]
    ids = retriever.processor.tokenizer.convert_tokens_to_ids(names)
    assert ids[:3] == [0, 1, 2]
    assert len(set(ids)) == len(names)
    assert retriever.processor.tokenizer.unk_token_id not in ids
    assert len(retriever.processor.tokenizer) == 256_000 + 1 + 1024 + 128
    assert (retriever.image_token_id, retriever.grid) == (ids[3], (32, 32))
    assert sum(file.stat().st_size for file in published.iterdir()) < 100e6
    inputs = retriever.image_inputs(images[:2])
    visual = retriever.encode_images(inputs)
    assert visual.tokens.shape == (2, 1030, 128)
    assert visual.mask is None
    patches = inputs["input_ids"] == ids[3]
    assert patches[:, :1024].all()
    assert not patches[:, 1024:].any()
    grid = [(x / 31, y / 31) for y in range(32) for x in range(32)] + [(0.5, 0.5)] * 6
    torch.testing.assert_close(visual.coords, torch.tensor([grid, grid]))


@pytest.mark.slow
def test_the_published_geometry_trains_caches_and_evaluates(published, world, script, tmp_path, images):
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{name: {published}, local_files_only: true}}\n")
    words = ["train.train_batch_size=5", "train.grad_accum_steps=1", "train.num_train_epochs=1", "train.bf16=false"]
    words += ["train.dataloader_num_workers=0", f"data.root={world}", f"train.output_dir={tmp_path / 'run'}"]
    words += ["data.limit_train_images=2", "data.limit_eval_images=2"]
    result = script("train").main(["--config", str(config), *words])
    assert result.steps == 2
    assert result.validation["r@5"] == 100.0  # two images

    words = ["--data-root", world, "--cache-dir", tmp_path / "cache", "--adapter-path", tmp_path / "run"]
    words += ["--splits", "val", "--limit-images", "3", "--cache-dtype", "float32", "--batch-size", "3"]
    script("cache").main([str(word) for word in words])
    output = tmp_path / "metrics.json"
    result = script("eval").main(
        ["--cache-dir", str(tmp_path / "cache"), "--split", "val", "--output-json", str(output)]
    )
    assert (result["images"], result["queries"], result["vectors_per_image"]) == (3, 15, 64)
    assert result["bytes_per_image"] == 64 * 128 * 4 + 64
    assert json.loads(output.read_text()) == result

    (_, tokens, mask), *more = Index(tmp_path / "cache").images("val")
    assert not more
    assert mask.all()
    retriever = Retriever.load(str(published))
    trained = load_projector(tmp_path / "run", retriever)
    assert not same(trained, retriever.base_projector)
    model = ColPaliForRetrieval.from_pretrained(published, dtype=torch.float32).eval()
    model.embedding_proj_layer.load_state_dict({"weight": trained.weight, "bias": trained.bias})
    with torch.no_grad():  # ColPali's own forward pass, then the merge as plain loops
        embeddings = model(**retriever.image_inputs(images)).embeddings[0]
    grid = [(x / 31, y / 31) for y in range(32) for x in range(32)] + [(0.5, 0.5)] * 6
    merged, _, _, _ = naive_merge(embeddings, torch.tensor(grid), MergeConfig())
    torch.testing.assert_close(tokens[0], merged, atol=1e-4, rtol=0)
