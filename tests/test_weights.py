"""The released weights: all keys found, the stock forward agrees, a released projector loads and changes the tokens.

    pytest -m weights

needs vidore/colpali-v1.3-hf in the hub's cache, and for the last a projector `dmis-lab/samer-*`; nothing is downloaded.
What is checked is also checked on the small random ColPali, so that the checks themselves are known to work.
"""

import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from transformers import ColPaliForRetrieval

from samer.retrievers.hf import Retriever
from samer.retrievers.identity import model_folder
from samer.retrievers.projectors import load_projector

RELEASED = "vidore/colpali-v1.3-hf"
PHOTOS = Path(__file__).parent / "fixtures/photos/images/Images"
QUERIES = ["a dog in the snow", "two people beside a red car", "an old man reads a newspaper in a café"]
ABSENT = "released weights not in the hub cache"


@pytest.fixture(scope="module")
def images():
    return [Image.open(PHOTOS / name).convert("RGB") for name in ("1001.jpg", "1002.jpg")]


@pytest.fixture
def released():
    folder = model_folder(RELEASED)
    if folder is None or not any(folder.glob("*.safetensors")):
        pytest.skip(ABSENT)
    return RELEASED


@pytest.fixture
def released_projectors():
    found = Path(constants.HF_HUB_CACHE).glob("models--dmis-lab--samer-*")
    names = [folder.name.removeprefix("models--").replace("--", "/") for folder in sorted(found)]
    if not names:
        pytest.skip(ABSENT)
    return names


def check_keys(name):
    """The checkpoint holds every weight of the model, and nothing that the model lacks."""
    _, report = ColPaliForRetrieval.from_pretrained(
        name, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert not report["unexpected_keys"]


def check_agreement(name, images, dtype):
    """Two images and three queries come out as the model's own forward pass gives them, to a cosine of 0.999."""
    retriever = Retriever.load(name, dtype=dtype, local_files_only=True)
    pages, queries = retriever.image_inputs(images), retriever.query_inputs(QUERIES)
    ours = retriever.encode_images(pages).tokens, retriever.encode_queries(queries).tokens
    del retriever
    gc.collect()  # two models of 6 GB need not lie side by side
    stock = ColPaliForRetrieval.from_pretrained(name, dtype=dtype, local_files_only=True).eval()
    for inputs, tokens in zip((pages, queries), ours):
        with torch.no_grad():
            expected = stock(**{key: value for key, value in inputs.items() if key != "offsets"}).embeddings
        valid = inputs["attention_mask"].bool()
        assert torch.isfinite(tokens).all()
        assert F.cosine_similarity(tokens[valid], expected[valid].float(), dim=-1).min() > 0.999
    different = F.cosine_similarity(ours[0][0], ours[0][1], dim=-1)
    assert different.min() < 0.999  # two pictures are not one


def check_projector(name, place, images, dtype):
    """A projector loads for the model, and the tokens are other ones, still of unit length."""
    retriever = Retriever.load(name, dtype=dtype, local_files_only=True)
    inputs = retriever.image_inputs(images)
    before = retriever.encode_images(inputs).tokens
    retriever.use_projector(load_projector(place, retriever, local_files_only=True))
    after = retriever.encode_images(inputs).tokens
    torch.testing.assert_close(after.norm(dim=-1), torch.ones(after.shape[:2]), atol=1e-5, rtol=0)
    assert F.cosine_similarity(before, after, dim=-1).min() < 0.999


def test_the_checks_pass_on_a_small_model(base, images, tmp_path):
    check_keys(str(base))
    check_agreement(str(base), images, torch.float32)
    own = Retriever.load(str(base)).base_projector
    noise = torch.randn(own.weight.shape, generator=torch.Generator().manual_seed(0)) * own.weight.std()
    state = {"weight": (own.weight + noise).bfloat16(), "bias": own.bias.bfloat16()}  # as the released ones are
    content = {"format": "samer_projector_v1", "base_model_name_or_path": RELEASED, "projector_state_dict": state}
    torch.save(content, tmp_path / "projector.pt")
    check_projector(str(base), tmp_path, images, torch.float32)


def test_the_checks_fail_where_they_should(base, images, monkeypatch):
    monkeypatch.setattr(Retriever, "project", lambda self, hidden: F.normalize(hidden[..., :16], dim=-1))
    with pytest.raises(AssertionError):
        check_agreement(str(base), images, torch.float32)


@pytest.mark.weights
def test_all_keys_of_the_released_model_are_found(released):
    check_keys(released)


@pytest.mark.weights
def test_the_released_model_agrees_with_its_stock_forward(released, images):
    check_agreement(released, images, torch.bfloat16)


@pytest.mark.weights
def test_released_projectors_load_and_change_the_tokens(released, released_projectors, images):
    for name in released_projectors:
        check_projector(released, name, images, torch.bfloat16)
