"""What is found out when a model is loaded: files of the right names and sizes that hold no trained retriever."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_modernvbert import save_modernvbert
from toy_family import Toy, ToyProcessor, save_toy

from samer.config import InputError
from samer.retrievers import FAMILIES
from samer.retrievers.checks import NOISE, noise
from samer.retrievers.hf import Retriever


def changed(folder, change):
    """Writes the weights anew, each as `change(name, tensor)` has it."""
    file = folder / "model.safetensors"
    held = load_file(file)
    save_file({name: change(name, tensor).contiguous() for name, tensor in held.items()}, file, {"format": "pt"})
    return str(folder)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, Toy.architecture, Toy)
    return save_toy(tmp_path / "toy")


@pytest.mark.parametrize("family", ["toy", "modernvbert"])
def test_a_projection_of_equal_rows_is_refused(toy, tmp_path, family):
    folder = toy if family == "toy" else save_modernvbert(tmp_path / "model")
    name = str(folder)
    Retriever.load(name)
    equal = lambda key, tensor: tensor[:1].expand_as(tensor) if "proj.weight" in key or "proj_layer" in key else tensor
    changed(folder, equal)
    with pytest.raises(InputError, match=r"model '.*': all rows of its projection are equal; use a checkpoint"):
        Retriever.load(name)


@pytest.mark.parametrize("family", ["toy", "modernvbert"])
def test_a_model_that_is_blind_is_refused(toy, tmp_path, family):
    """All weights of the vision tower 0: pictures differ, tokens do not."""
    folder = toy if family == "toy" else save_modernvbert(tmp_path / "model")
    changed(folder, lambda key, tensor: tensor * 0 if "vision" in key or "connector" in key else tensor)
    with pytest.raises(InputError, match="gives the same tokens for two different pictures"):
        Retriever.load(str(folder))


def test_weights_that_are_no_numbers_are_refused(toy):
    changed(toy, lambda key, tensor: tensor * float("nan") if "vision" in key else tensor)
    with pytest.raises(InputError, match="NaN or infinite"):
        Retriever.load(str(toy))


def test_a_processor_that_writes_another_number_of_tokens_is_refused(toy, monkeypatch):
    call = ToyProcessor.__call__

    def more(self, images=None, **words):
        found = call(self, images=images, **words)
        return found if images is None else {**found, "image_grids": found["image_grids"] + 1}

    monkeypatch.setattr(ToyProcessor, "__call__", more)
    with pytest.raises(InputError, match=r"15 image tokens, expected 24 \(4 x 6\); processor and model do not belong"):
        Retriever.load(str(toy))


def test_a_processor_whose_pictures_do_not_fit_is_refused(toy, monkeypatch):
    patches = ToyProcessor.patches
    monkeypatch.setattr(ToyProcessor, "patches", lambda self, *words: patches(self, *words)[:, :-1])
    with pytest.raises(InputError, match="does not take its processor's pictures"):
        Retriever.load(str(toy))


def test_a_search_tries_no_pictures(toy, world, script, tmp_path, monkeypatch, capsys):
    """The model that reads its query was tried when the index was made."""
    tried = []
    monkeypatch.setattr("samer.retrievers.checks.noise", lambda size: tried.append(size) or noise(size))
    words = ["--data-root", world, "--cache-dir", tmp_path / "c", "--splits", "val", f"model.name={toy}"]
    script("cache").main([str(word) for word in (*words, "merge.num_regions=4")])
    assert len(tried) == 1
    capsys.readouterr()
    script("search").main(["--cache-dir", str(tmp_path / "c"), "--split", "val", "a red circle"])
    assert len(tried) == 1
    assert capsys.readouterr().out
    changed(toy, lambda key, tensor: tensor[:1].expand_as(tensor) if "proj.weight" in key else tensor)
    with pytest.raises(InputError, match="all rows of its projection are equal"):
        Retriever.load(str(toy), pictures=False)


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "CUDA error: an illegal memory access was encountered",
        "cuBLAS error; CUDA out of memory",
    ],
)
def test_trouble_of_the_machine_is_not_blamed_on_the_model(toy, monkeypatch, words):
    def fail(self, *_):
        raise RuntimeError(words)

    monkeypatch.setattr(Retriever, "hidden_states", fail)
    with pytest.raises(RuntimeError, match=re.escape(words)) as told:
        Retriever.load(str(toy))
    assert not isinstance(told.value, InputError)


def test_a_missing_weight_is_refused_by_name(toy):
    file = toy / "model.safetensors"
    held = load_file(file)
    del held["multi_vector_head.proj.weight"]
    save_file(held, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights .*first multi_vector_head\.proj\.weight"):
        Retriever.load(str(toy))


def test_noise_is_the_same_always_and_differs_from_itself():
    one, other = noise(NOISE)
    assert one.size == other.size == NOISE
    assert one.tobytes() != other.tobytes()
    assert one.tobytes() == noise(NOISE)[0].tobytes()
    assert torch.tensor(list(one.tobytes())).float().std() > 60
