"""How a model is named: a folder is kept by its real path, what looks like a path is never asked of the hub."""

import json
import shutil
from dataclasses import replace

import pytest

from samer.config import InputError, MergeConfig
from samer.features.read import FeatureStore, open_encoder
from samer.features.write import write_features
from samer.index.manifest import write_index_manifest
from samer.index.read import Index
from samer.index.write import build_index
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector, save_projector
from samer.runtime.hub import model_name

MERGE = MergeConfig(num_regions=4)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A working folder, and no way to the hub: asking it fails the test."""

    def asked(*words, **more):
        pytest.fail(f"the hub was asked for {words}")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", asked)
    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", asked)
    return tmp_path / "here"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "./colpali",
            "../colpali",
            ".",
            "..",
            "/no/colpali",
            "~/no/colpali",
            "~nobody-here/colpali",
            "a/b/c",
            "colpali/",
        ),
        *("C:\\models\\colpali", "C:/models", "models\\colpali", "", " ", "my model", "a//b", "file:///models/colpali"),
        *("https://huggingface.co/vidore/colpali", "owner/name/", "-owner/name", "x" * 97, "models/\0"),
    ],
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(nowhere, monkeypatch, name):
    monkeypatch.setenv("HOME", str(nowhere))
    if name in (".", ".."):  # these are there
        assert model_name(name) == str(nowhere.parent if name == ".." else nowhere)
        return
    for local in (False, True):
        with pytest.raises(
            InputError, match=r"can't be loaded \(no such folder\); name a ColPali in transformers form"
        ):
            Retriever.load(name, local_files_only=local)


def test_a_file_is_no_model(nowhere):
    (nowhere / "model.safetensors").write_text("")
    with pytest.raises(InputError, match=r"it is a file\); name the folder that it lies in"):
        Retriever.load("model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors/x' can't be loaded \(no such folder\)"):
        Retriever.load("./model.safetensors/x")


@pytest.mark.parametrize("name", ["assets/retriever", "owner/colpali", "colpali"])
def test_what_can_be_both_is_said_to_be_neither(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert model_name(name) == name
    with pytest.raises(
        InputError, match=rf"{name}' can't be loaded \(no such folder here, and not to be had from the hub"
    ):
        Retriever.load(name)


@pytest.fixture
def placed(base, tmp_path, monkeypatch):
    """The small ColPali at HOME/models/small, seen from HOME."""
    shutil.copytree(base, tmp_path / "home" / "models" / "small")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home" / "models" / "small"


@pytest.mark.parametrize("name", ["models/small", "./models/small/", "models/../models/small", "~/models/small"])
def test_a_folder_is_kept_by_its_real_path_wherever_it_is_written(placed, world, tmp_path, monkeypatch, name):
    retriever = Retriever.load(name)
    assert retriever.name == str(placed)
    build_index(tmp_path / "c", world, ["val"], retriever, MERGE)
    save_projector(tmp_path / "p", retriever.current_projector(), retriever, MERGE)
    write_features(tmp_path / "f", world, ["val"], retriever, dtype="float32")
    kept = [json.loads((tmp_path / file).read_text())["base_model"] for file in ("c/manifest.json", "p/config.json")]
    assert [*kept, json.loads((tmp_path / "f/manifest.json").read_text())["base_model"]] == [str(placed)] * 3
    monkeypatch.chdir(tmp_path)  # where that name leads nowhere
    index = Index(tmp_path / "c")
    index.check_model(open_encoder(*index.model_place()[:1], "cpu"))
    store = open_encoder(str(placed), "cpu", features=tmp_path / "f", adapter_path=tmp_path / "p")
    assert store.name == str(placed)


def test_a_store_is_read_by_any_name_of_its_model(placed, world, tmp_path, capsys):
    write_features(tmp_path / "f", world, ["val"], Retriever.load("models/small"), dtype="float32")
    capsys.readouterr()
    for name in ("models/small", "~/models/small", str(placed)):
        assert FeatureStore(tmp_path / "f", name).name == str(placed)
    assert capsys.readouterr().out == ""
    placed.rename(placed.with_name("elsewhere"))
    assert FeatureStore(tmp_path / "f", str(placed)).name == str(placed)  # the store's own, taken at its word
    assert "is not on this machine" in capsys.readouterr().out
    for name in ("models/small/", "./typo"):
        with pytest.raises(InputError, match="no such folder"):
            FeatureStore(tmp_path / "f", name)


def test_links_are_followed_and_a_folder_goes_before_the_hub(placed, nowhere):
    (nowhere / "vidore").mkdir()
    (nowhere / "vidore" / "colpali-v1.3-hf").symlink_to(placed)
    assert model_name("vidore/colpali-v1.3-hf") == str(placed)


def test_a_path_that_is_not_utf8_is_refused_before_the_work(base, tmp_path):
    odd = tmp_path / b"m\xff".decode("utf-8", "surrogateescape")
    shutil.copytree(base, odd)
    with pytest.raises(InputError, match=r"m\\udcff' can't be kept by name .* rename the folder"):
        Retriever.load(str(odd))


def test_an_old_index_with_a_relative_name_says_what_to_type(base, world, script, tmp_path, monkeypatch):
    build_index(tmp_path / "c", world, ["val"], Retriever.load(str(base)), MERGE)
    manifest = Index(tmp_path / "c").manifest
    write_index_manifest(tmp_path / "c" / "manifest.json", replace(manifest, base_model="models/small"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"'models/small' .*no such folder here.* c was made with it: .* --model FOLDER"
    ):
        script("search").main(["a dog", "--cache-dir", "c"])
    with pytest.raises(InputError, match=r"'models/small' .*no such folder here.* model\.name=FOLDER"):
        script("cache").main(["--data-root", str(world), "--cache-dir", "c", "--splits", "test"])
    words = ["--data-root", str(world), "--output-json", "m.json", "--cache-dir", "c", "--split", "val"]
    with pytest.raises(InputError, match=r"'models/small' .*no such folder here.* --model FOLDER"):
        script("eval").main(words)
    shutil.copytree(base, tmp_path / "small")
    assert script("search").main(["a dog", "--cache-dir", "c", "--model", "small"])
    script("eval").main([*words, "--model", "small"])


def test_a_home_folder_is_known_for_projectors_too(placed, tmp_path):
    retriever = Retriever.load("models/small")
    save_projector(tmp_path / "home" / "run", retriever.current_projector(), retriever, MERGE)
    assert load_projector("~/run", retriever).hash == retriever.base_projector.hash
