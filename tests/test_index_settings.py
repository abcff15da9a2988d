"""What an index is made by: it answers for itself when it is added to, and contradictions are refused by name."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samer.config import InputError, MergeConfig
from samer.features.write import write_features
from samer.index.read import Index
from samer.index.settings import Asked, adapter_config, settings_for
from samer.index.write import build_index
from samer.retrievers.base import Projector
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector, save_projector

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["a.png", "b.png", "in/c.png", "in/d.png"]
TRAINED = MergeConfig(num_regions=6, center_init="raster")


def paint(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def moved_projector(retriever, seed=0):
    layer = retriever.base_projector
    step = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed))
    return Projector(layer.weight + 0.05 * step, layer.bias)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(folder, split="images"):
    """What is stored of every picture."""
    found = {}
    for (ids, *rest), (_, images) in zip(Index(folder).images(split), Index(folder).stored(split)):
        scales = torch.ones(len(ids)) if images.scale is None else images.scale
        for name, *row in zip(ids, *rest, scales):
            found[name] = [part.tolist() for part in row]
    return found


@pytest.fixture
def album(tmp_path):
    for seed, name in enumerate(NAMES):
        paint(tmp_path / "album" / name, seed)
    return tmp_path / "album"


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Two trained projectors of the small ColPali; their settings are `TRAINED`."""
    folder = tmp_path_factory.mktemp("adapters")
    retriever = Retriever.load(str(base))
    for seed, name in enumerate(("one", "two")):
        save_projector(folder / name, moved_projector(retriever, seed), retriever, TRAINED)
    return folder


@pytest.fixture
def index(script):
    """Calls scripts/index.py with words of any kind."""
    return lambda *words: script("index").main([str(word) for word in words])


@pytest.fixture
def made(index, album, adapters, base, tmp_path, capsys):
    """An index of the album with a projector, float16 and K = 5; most of it had to be typed."""
    words = ("--adapter-path", adapters / "one", "--cache-dtype", "float16", "merge.num_regions=5")
    index("--images", album, "--cache-dir", tmp_path / "c", *words)
    capsys.readouterr()
    return tmp_path / "c"


# --- an index answers for itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--adapter-path", "{one}", "--cache-dtype", "float16", "merge.num_regions=5", "merge.cluster_iters=1"],
        ["--adapter-path", "{one}/projector.safetensors", "--cache-dtype", "binary", "--no-assignments"],
        ["model.name={base}", "merge.center_init=raster", "merge.spatial_weight=0.3", "--cache-dtype", "bfloat16"],
        ["model.name={base}", "merge.compressor=hpool", "merge.num_regions=4", "--no-assignments"],
        ["model.name={base}", "merge.compressor=none", "--cache-dtype", "float32"],
    ],
)
def test_pictures_are_added_with_the_settings_of_the_first(index, album, adapters, base, tmp_path, words):
    words = [word.format(one=adapters / "one", base=base) for word in words]
    index("--images", album, "--cache-dir", tmp_path / "c", *words)
    made = Index(tmp_path / "c").manifest
    paint(album / "new.png", 9)
    index("--images", album, "--cache-dir", tmp_path / "c")
    now = Index(tmp_path / "c").manifest
    assert now.difference(made) is None
    assert (now.merge, now.base_model, now.revision) == (made.merge, made.base_model, made.revision)
    index("--images", album, "--cache-dir", tmp_path / "at once", *words)
    assert rows(tmp_path / "c") == rows(tmp_path / "at once")
    assert sorted(rows(tmp_path / "c")) == sorted([*NAMES, "new.png"])


def test_another_split_is_added_with_the_settings_of_the_first(script, world, adapters, tmp_path):
    words = ["--data-root", str(world), "--cache-dir", str(tmp_path / "c"), "--splits"]
    typed = ["--adapter-path", str(adapters / "one"), "--cache-dtype", "int8", "--no-assignments"]
    script("cache").main([*words, "val", *typed, "merge.num_regions=5"])
    script("cache").main([*words, "test"])
    (kept,) = script("cache").main([*words, "val"])
    assert kept.reused_shards == 2
    words[3] = str(tmp_path / "at once")
    script("cache").main([*words, "val", "test", *typed, "merge.num_regions=5"])
    for split in ("val", "test"):
        assert rows(tmp_path / "c", split) == rows(tmp_path / "at once", split)
    assert Index(tmp_path / "c").manifest == Index(tmp_path / "at once").manifest


def test_an_index_made_in_bfloat16_goes_on_so_on_a_cpu(index, script, world, base, album, tmp_path):
    """As on a GPU, where that is the default; float32 would be another origin of the hidden states."""
    retriever = Retriever.load(str(base), dtype=torch.bfloat16)
    build_index(tmp_path / "c", world, ["val"], retriever, MergeConfig(num_regions=5), assignments=True)
    words = ["--data-root", str(world), "--cache-dir", str(tmp_path / "c"), "--splits", "test", "--device", "cpu"]
    script("cache").main(words)
    build_index(tmp_path / "at once", world, ["test"], retriever, MergeConfig(num_regions=5), assignments=True)
    assert rows(tmp_path / "c", "test") == rows(tmp_path / "at once", "test")
    index("--images", album, "--cache-dir", tmp_path / "c", "--device", "cpu")
    assert Index(tmp_path / "c").manifest.hidden_states["computed_in"] == "bfloat16"


def test_an_index_of_format_3_answers_for_itself(index, tmp_path, monkeypatch):
    old = ROOT / "tests" / "fixtures" / "format3"
    monkeypatch.chdir(ROOT)  # its model is named from there
    shutil.copytree(old / "pictures", tmp_path / "c")
    before = Index(tmp_path / "c").manifest
    assert before.base_model == "assets/retriever"
    index("--images", "tests/fixtures/format3/album", "--cache-dir", tmp_path / "c")
    now = Index(tmp_path / "c").manifest
    assert (now.merge, now.dtype, now.assignments) == (before.merge, before.dtype, before.assignments)
    assert sorted(Index(tmp_path / "c").numbers("images")) == [f"{letter}.jpg" for letter in "abcdef"]
    assert now.base_model == str(ROOT / "assets" / "retriever")  # it can be searched from anywhere now
    with pytest.raises(InputError, match=r"merge\.num_regions=8, now 16"):
        index("--images", "tests/fixtures/format3/album", "--cache-dir", tmp_path / "c", "merge.num_regions=16")


# --- what is typed, and the index --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["merge.num_regions=9"], r"merge\.num_regions=5, now 9: .* leave merge\.num_regions=9 out"),
        (["merge.compressor=grid"], r"merge\.compressor=samer, now grid"),
        (["merge.center_init=farthest"], r"merge\.center_init=raster, now farthest"),
        (["--cache-dtype", "int8"], r"dtype=float16, now int8: .* leave --cache-dtype int8 out"),
        (["--no-assignments"], r"assignments=True, now False: .* leave --no-assignments out"),
        (["--adapter-path", "{two}"], r"projector={one_hash}, now {two_hash}: .* leave --adapter-path .*two out"),
        (
            ["model.name={other}"],
            r"model={base} \(weights \w{{12}}\), now {other} \(weights \w{{12}}\): .* leave model",
        ),
        (["--config", "{yaml}"], r"merge\.num_regions=5, now 7: .* leave merge\.num_regions=7 in .*other\.yaml out"),
    ],
)
def test_a_contradiction_is_refused_with_both_values(index, album, adapters, base, made, tmp_path, words, error):
    (tmp_path / "other.yaml").write_text(f"model: {{name: {base}}}\nmerge: {{num_regions: 7}}\n")
    other = shutil.copytree(base, tmp_path / "other")
    retriever = Retriever.load(str(base))
    with torch.no_grad():
        retriever.model.vlm.language_model.layers[0].self_attn.q_proj.weight.add_(0.5)
    retriever.model.save_pretrained(other)
    hashes = [Index(made).manifest.projector, load_projector(adapters / "two", retriever).hash]
    values = {"two": adapters / "two", "other": other, "yaml": tmp_path / "other.yaml", "base": base}
    values |= {"one_hash": hashes[0][:12], "two_hash": hashes[1][:12]}
    before = contents(made)
    with pytest.raises(InputError, match=error.format(**values)):
        index("--images", album, "--cache-dir", made, *(word.format(**values) for word in words))
    assert contents(made) == before


def test_what_agrees_or_plays_no_part_is_fine(index, album, adapters, base, made, tmp_path):
    (tmp_path / "same.yaml").write_text(f"model: {{name: {base}}}\nmerge: {{num_regions: 5}}\ntrain: {{seed: 3}}\n")
    typed = ["--adapter-path", adapters / "one", "--cache-dtype", "float16", "--assignments", "merge.num_regions=5"]
    for words in (typed, ["--config", tmp_path / "same.yaml"], ["merge.object_penalty=7"], [f"model.name={base}"]):
        before = Index(made).manifest
        index("--images", album, "--cache-dir", made, *words)
        assert Index(made).manifest == before
    index("--images", album, "--cache-dir", tmp_path / "h", f"model.name={base}", "merge.compressor=hpool")
    index("--images", album, "--cache-dir", tmp_path / "h", "merge.center_init=farthest", "merge.cluster_iters=9")
    with pytest.raises(InputError, match=r"merge\.num_regions=64, now 8"):
        index("--images", album, "--cache-dir", tmp_path / "h", "merge.num_regions=8")


def test_an_adapter_alone_brings_no_settings_to_an_index(index, album, adapters, made):
    """The projector is the index's, its K was typed when it was made; both agree with what there is."""
    paint(album / "new.png", 9)
    summary = index("--images", album, "--cache-dir", made, "--adapter-path", adapters / "one")
    assert (summary.images, Index(made).manifest.merge.num_regions) == (5, 5)


def test_a_model_that_was_moved_is_the_same_by_its_files(index, script, album, base, tmp_path, capsys):
    first = shutil.copytree(base, tmp_path / "first")
    index("--images", album, "--cache-dir", tmp_path / "c", f"model.name={first}", "merge.num_regions=5")
    second = first.rename(tmp_path / "second")
    capsys.readouterr()
    with pytest.raises(
        InputError, match=f"{first}.*no such folder.*{tmp_path / 'c'} was made with it: .* model.name=F"
    ):
        index("--images", album, "--cache-dir", tmp_path / "c")
    with pytest.raises(InputError, match=f"{first}.*no such folder.*{tmp_path / 'c'} was made with it: .* --model FOL"):
        script("search").main(["a dog", "--cache-dir", str(tmp_path / "c")])
    before = rows(tmp_path / "c")
    index("--images", album, "--cache-dir", tmp_path / "c", f"model.name={second}")
    assert f"note: the model is read from {second}; the index named {first}\n" in capsys.readouterr().out
    assert rows(tmp_path / "c") == before
    assert Index(tmp_path / "c").manifest.base_model == str(second)
    assert script("search").main(["a dog", "--cache-dir", str(tmp_path / "c")])


def test_a_lost_projector_is_told_and_can_be_given_again(index, album, adapters, made):
    whole = (made / "projector.safetensors").read_bytes()
    for damage in (b"none", None):
        (made / "projector.safetensors").unlink(missing_ok=True)
        if damage:
            (made / "projector.safetensors").write_bytes(damage)
        with pytest.raises(InputError, match=r"projector\.safetensors: .*; or give the projector .* as --adapter-path"):
            index("--images", album, "--cache-dir", made)
        paint(album / f"{len(damage or b'')}.png", 9)
        index("--images", album, "--cache-dir", made, "--adapter-path", adapters / "one")
        assert (made / "projector.safetensors").read_bytes() == whole


def test_an_index_of_a_feature_store_needs_it(script, world, base, tmp_path):
    write_features(tmp_path / "store", world, ["val", "test"], Retriever.load(str(base)), dtype="float32")
    words = ["--data-root", str(world), "--cache-dir", str(tmp_path / "c")]
    script("cache").main([*words, "--splits", "val", "--features", str(tmp_path / "store"), f"model.name={base}"])
    with pytest.raises(InputError, match=r"stored_in': 'float32'.*give the feature store .* as --features"):
        script("cache").main([*words, "--splits", "test"])
    with pytest.raises(InputError, match="stored_in': 'float32'"):
        script("index").main(["--images", str(world), "--cache-dir", str(tmp_path / "c")])
    script("cache").main([*words, "--splits", "test", "--features", str(tmp_path / "store")])
    script("cache").main([*words[:3], str(tmp_path / "p"), "--splits", "val", f"model.name={base}"])
    with pytest.raises(InputError, match=r"hidden_states=.*leave --features out"):
        script("cache").main([*words[:3], str(tmp_path / "p"), "--features", str(tmp_path / "store")])


# --- a new index ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "centres", "told"),
    [
        (["model.name={base}"], "farthest", True),
        (["model.name={base}", "merge.center_init=raster"], "raster", False),
        (["model.name={base}", "merge.center_init=farthest"], "farthest", False),
        (["--config", "{yaml}"], "raster", False),
        (["--adapter-path", "{one}"], "raster", False),
        (["model.name={base}", "merge.compressor=hpool"], "raster", False),
    ],
)
def test_untouched_projectors_start_from_the_farthest_centres(adapters, base, tmp_path, words, centres, told):
    (tmp_path / "own.yaml").write_text(f"model: {{name: {base}}}\nmerge: {{num_regions: 7}}\n")
    words = [word.format(base=base, one=adapters / "one", yaml=tmp_path / "own.yaml") for word in words]
    asked = {"--config": "config", "--adapter-path": "adapter_path"}
    asked = {asked[words[0]]: words[1]} if words[0] in asked else {"overrides": words}
    settings = settings_for(tmp_path / "c", Asked(**asked), "int8")
    assert settings.config.merge.center_init == centres
    assert bool(settings.notes) == told
    assert all("merge.center_init=raster starts as published" in note for note in settings.notes)
    assert settings.index is None


def test_the_librarys_defaults_are_the_published_ones():
    assert MergeConfig().center_init == "raster"
    assert adapter_config("", None, []).merge == MergeConfig()


@pytest.mark.parametrize(
    ("override", "typed", "kept", "told"),
    [
        ("merge.num_regions=255", None, True, False),
        ("merge.num_regions=256", None, False, True),
        ("merge.num_regions=300", False, False, False),
        ("merge.num_regions=5", False, False, False),
        ("merge.compressor=none", None, False, False),  # each token is a region of its own, and is kept as such
        ("merge.compressor=kmeans", None, True, False),
    ],
)
def test_regions_are_kept_where_that_can_be(tmp_path, override, typed, kept, told):
    settings = settings_for(
        tmp_path, Asked(overrides=[override, "merge.center_init=raster"], assignments=typed), "int8"
    )
    assert settings.assignments == kept
    assert [note for note in settings.notes if "at most 255 regions" in note] == list(settings.notes)
    assert bool(settings.notes) == told


@pytest.mark.parametrize(
    ("override", "error"),
    [("merge.num_regions=256", "at most 255 regions, not 256"), ("merge.compressor=none", "leave --assignments out")],
)
def test_regions_that_cannot_be_kept_are_refused_where_they_were_asked_for(
    index, album, base, tmp_path, override, error
):
    with pytest.raises(InputError, match=error):
        index("--images", album, "--cache-dir", tmp_path / "c", "--assignments", f"model.name={base}", override)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["index", "cache"])
def test_where_a_word_of_the_query_looks_is_kept_without_asking(script, album, base, world, tmp_path, name):
    words = {"index": ["--images", str(album)], "cache": ["--data-root", str(world), "--splits", "val"]}[name]
    script(name).main([*words, "--cache-dir", str(tmp_path / "c"), f"model.name={base}", "merge.num_regions=5"])
    held = Index(tmp_path / "c")
    (split,) = held.manifest.splits
    number = next(iter(held.numbers(split).values()))
    stored = held.vectors(split, number)
    assert stored.grid == (8, 8)
    assert len(stored.regions) == 64
    assert 1 < len(stored.regions.unique()) <= 5


def test_an_index_without_regions_goes_on_without(index, album, base, tmp_path):
    words = ("--images", album, "--cache-dir", tmp_path / "c")
    index(*words, f"model.name={base}", "merge.num_regions=5", "--no-assignments")
    paint(album / "new.png", 9)
    assert index(*words).images == 5
    assert not Index(tmp_path / "c").manifest.assignments


def test_a_projectors_file_is_the_one_that_is_named(index, album, adapters, base, tmp_path):
    """A copy of another name beside it used to be passed over for the file of the usual name."""
    shutil.copytree(adapters / "one", tmp_path / "a")
    shutil.copy(adapters / "two" / "projector.safetensors", tmp_path / "a" / "second.safetensors")
    retriever = Retriever.load(str(base))
    with pytest.raises(InputError, match=r"second\.safetensors: no projector\.safetensors"):
        load_projector(tmp_path / "a" / "second.safetensors", retriever)
    own = load_projector(tmp_path / "a" / "projector.safetensors", retriever)
    assert own.hash == json.loads((tmp_path / "a" / "config.json").read_text())["projector"]
    words = (
        "--images",
        album,
        "--cache-dir",
        tmp_path / "c",
        "--adapter-path",
        tmp_path / "a" / "projector.safetensors",
    )
    index(*words)
    manifest = Index(tmp_path / "c").manifest
    assert (manifest.projector, asdict(manifest.merge)) == (own.hash, asdict(TRAINED))


def test_what_an_old_adapter_says_is_taken_with_the_model_typed(index, album, base, adapters, tmp_path):
    """One that was trained elsewhere names a model that is not here."""
    folder = shutil.copytree(adapters / "one", tmp_path / "a")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "base_model": "../elsewhere/colpali"}))
    words = ("--images", album, "--cache-dir", tmp_path / "c", "--adapter-path", folder)
    with pytest.raises(
        InputError, match=r"'../elsewhere/colpali'.*no such folder.*a was made with it: .* model\.name=F"
    ):
        index(*words)
    index(*words, f"model.name={base}")
    assert Index(tmp_path / "c").manifest.base_model == str(base)


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--images", "{album}/a.png", "{album}/b.png"], "--images takes one folder"),  # a shell's * spread it
        (["--images", "{album}", "--cache-dir", ""], "give --cache-dir INDEX"),
        (["--sync", "--compact"], "give --cache-dir INDEX and either"),
        (["--images", "{album}", "--delete", "a.png"], "give --cache-dir INDEX and either"),
        (["--images", "{album}", "--assignments", "--no-assignment=1"], "ignored explicit argument"),
    ],
)
def test_usage_errors_are_usage_errors(index, album, tmp_path, monkeypatch, capsys, words, error):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SystemExit) as stopped:
        index("--cache-dir", "c", *(word.format(album=album) for word in words))
    assert stopped.value.code == 2
    assert error in capsys.readouterr().err
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("words", [["--sync"], ["--delete", "a.png"], ["--compact"]])
def test_a_missing_index_is_made_with_index_py(index, script, tmp_path, words):
    with pytest.raises(InputError, match=r"nix: .*scripts/index\.py --images FOLDER"):
        index("--cache-dir", tmp_path / "nix", *words)
    with pytest.raises(InputError, match=r"nix: .*scripts/index\.py --images FOLDER .* bash/cache\.sh"):
        script("search").main(["a dog", "--cache-dir", str(tmp_path / "nix")])
    assert not (tmp_path / "nix").exists()


def test_sync_needs_the_folder_of_pictures(index, script, world, base, made, album, tmp_path):
    album.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=f"{album}: not there, but .* holds its pictures; mount it, or .* --images"):
        index("--cache-dir", made, "--sync")
    script("cache").main(
        ["--data-root", str(world), "--cache-dir", str(tmp_path / "d"), "--splits", "val", f"model.name={base}"]
    )
    with pytest.raises(InputError, match="d: holds no folder of pictures; make it with"):
        index("--cache-dir", tmp_path / "d", "--sync")


def test_a_list_that_cannot_be_written_is_told_before_the_work(index, album, base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        index("--images", album, "--cache-dir", tmp_path / "c", "--skipped", tmp_path / "file" / "list")
    assert not (tmp_path / "c").exists()
