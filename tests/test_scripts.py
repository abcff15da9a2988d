"""The entry points as a user meets them: help, one whole run in processes of its own, and where settings come from."""

import ast
import json
import math
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from samer.config import MergeConfig, load_config
from samer.data import flickr, pictures
from samer.evaluation import both_directions
from samer.index.read import Index
from samer.merging import merge_tokens
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in ROOT.glob("scripts/*.py") if path.name != "__init__.py")
METRICS = ["r@1", "r@5", "r@10", "median_rank", "mrr@10", "ndcg@5", "ndcg@10"]
MERGE = {
    "num_regions": 6,
    "cluster_iters": 2,
    "spatial_weight": 0.2,
    "assignment_temperature": 0.05,
    "object_penalty": 0.5,
    "center_init": "farthest",
    "compressor": "samer",
}


def run_lines(path):
    """The commands that a script's docstring shows."""
    lines = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()
    return [line.strip() for line in lines if re.match(r"\s*(PYTHONPATH=\. )?(python|torchrun|bash) ", line)]


def check_help(path, text):
    assert text.startswith("usage:")
    lines = run_lines(path)
    assert any(path.name in line or f"bash/{path.stem}.sh" in line for line in lines)
    for line in lines:
        assert line in text


# --- help -----------------------------------------------------------------------------------------------------------


HELP = """
import contextlib, io, json, os, runpy, sys
texts, clean = {}, list(sys.path)
for name in sys.argv[1:]:
    for module in [m for m in sys.modules if m.split(".")[0] in ("samer", "scripts")]:
        del sys.modules[module]
    sys.path[:] = [os.path.abspath("scripts"), *clean]  # as `python scripts/NAME.py` starts
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            runpy.run_path(name, run_name="__main__")
        except SystemExit as stop:
            texts[name] = [stop.code, text.getvalue()]
print(json.dumps(texts))
"""


@pytest.mark.parametrize("isolated", [True, False])
def test_help_with_and_without_pythonpath(command, isolated):
    """Every script in one process, as loading torch takes most of the time; `-I` hides PYTHONPATH and the folder."""
    names = [f"scripts/{path.name}" for path in SCRIPTS]
    options = ["-I", "-c"] if isolated else ["-P", "-c"]
    done = command(sys.executable, *options, HELP, *names, env={"PYTHONPATH": "."})
    assert (done.returncode, done.stderr) == (0, "")
    texts = json.loads(done.stdout)
    assert list(texts) == names
    for path, (status, text) in zip(SCRIPTS, texts.values()):
        assert status == 0
        check_help(path, text)


def test_help_as_typed(command):
    done = command(sys.executable, "scripts/train.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    check_help(ROOT / "scripts" / "train.py", done.stdout)


def test_help_of_train_lists_every_setting(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script("train").main(["--help"])
    assert stopped.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out.partition("with its default:")[2])
    assert list(shown) == ["model", "data", "merge", "objects", "train", "reduce"]
    assert shown["merge"]["num_regions"] == 64
    assert float(shown["train"]["learning_rate"]) == 2e-4


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_importing_a_script_runs_nothing(script, monkeypatch, path):
    monkeypatch.setattr(sys, "argv", ["pytest", "--no-such-option"])
    assert callable(script(path.stem).main)


# --- train, cache, eval: each in a process of its own ---------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(command, world, base, tmp_path_factory):
    """train -> cache -> eval (with and without PYTHONPATH=.), and what each process said."""
    folder = tmp_path_factory.mktemp("pipeline")
    config = folder / "run.yaml"
    merge = "\n".join(f"  {key}: {value}" for key, value in MERGE.items())
    config.write_text(
        f"model:\n  name: {base}\nmerge:\n{merge}\ntrain:\n  output_dir: {folder / 'out'}\n  run_name: small\n"
        "  train_batch_size: 4\n  grad_accum_steps: 1\n  num_train_epochs: 1\n  bf16: false\n  learning_rate: 5e-5\n"
        "  logging_steps: 5\n  dataloader_num_workers: 0\n"
    )
    overrides = [f"data.root={world}", "train.learning_rate=1e-2", "data.limit_train_images=6"]
    evaluate = ("scripts/eval.py", "--cache-dir", folder / "cache", "--split", "test", "--output-json")
    words = {
        "train": ("scripts/train.py", "--config", config, *overrides),
        "cache": (
            *("scripts/cache.py", "--data-root", world, "--cache-dir", folder / "cache"),
            *("--adapter-path", folder / "out", "--splits", "val", "test", "--cache-dtype", "float32"),
        ),
        "eval": (*evaluate, folder / "metrics.json"),
        "eval_with_path": (*evaluate, folder / "more" / "metrics.json"),
    }
    done = {}
    for name, line in words.items():
        done[name] = command(sys.executable, *line, env={"PYTHONPATH": "."} if name == "eval_with_path" else None)
        assert done[name].returncode == 0, done[name].stderr
    return {"folder": folder, "config": config, "overrides": overrides, **done}


def test_train_writes_the_projector_and_the_settings(pipeline, base, world):
    out = pipeline["folder"] / "out"
    note, *lines = pipeline["train"].stdout.splitlines()
    assert note == f"note: {world} is read as flickr (data.name=flickr)"
    assert lines[0].startswith(f"training {33 * 16} parameters of {base} on 30 captions of 6 images (")
    assert lines[-1].startswith("done: 8 steps in ")
    assert lines[-1].endswith(str(out / "projector.safetensors"))
    assert "Traceback" not in pipeline["train"].stderr
    resolved = load_config(out / "config.yaml")
    assert resolved == load_config(pipeline["config"], pipeline["overrides"])
    assert (resolved.train.learning_rate, resolved.data.root) == (1e-2, str(world))
    settings = json.loads((out / "config.json").read_text())
    assert (settings["merge"], settings["base_model"]) == (MERGE, str(base))
    retriever = Retriever.load(str(base))
    trained = load_projector(out, retriever)
    assert trained.hash == settings["projector"]
    assert not torch.equal(trained.weight, retriever.base_projector.weight)
    losses = [entry["loss"] for entry in json.loads((out / "history.json").read_text()) if "loss" in entry]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


def test_cache_takes_the_settings_of_the_adapter(pipeline, base):
    manifest = Index(pipeline["folder"] / "cache").manifest
    settings = json.loads((pipeline["folder"] / "out" / "config.json").read_text())
    assert settings["merge"] == MERGE
    assert manifest.merge == MergeConfig(**MERGE)
    assert manifest.base_model == str(base)
    untouched = manifest.model.base_projector
    assert manifest.projector == settings["projector"] != untouched == settings["base_projector"]
    assert sorted(manifest.splits) == ["test", "val"]
    lines = [line for line in pipeline["cache"].stdout.splitlines() if not line.startswith("note: ")]
    assert lines[0] == f"writing the index to {pipeline['folder'] / 'cache'} ({pipeline['folder'] / 'out'})"
    assert lines[1].startswith("val: 6 images x at most 6 vectors (390 bytes per image), 30 queries -> ")
    assert lines[2].startswith("test: 8 images x at most 6 vectors (390 bytes per image), 40 queries -> ")


def test_eval_writes_the_metrics_of_the_cache(pipeline, base):
    folder = pipeline["folder"]
    result = json.loads((folder / "metrics.json").read_text())
    cache = Index(folder / "cache")
    about = {key: result.pop(key) for key in ("split", "images", "queries", "vectors_per_image", "bytes_per_image")}
    assert about == {"split": "test", "images": 8, "queries": 40, "vectors_per_image": 6, "bytes_per_image": 390.0}
    source = result.pop("cache")
    projector = cache.manifest.projector
    assert source == {"base_model": str(base), "projector": projector, "merge": MERGE, "dtype": "float32"}
    assert list(result) == ["text_to_image", "image_to_text", "rsum"]
    recalls = [result[way][f"r@{k}"]["value"] for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    assert result.pop("rsum") == pytest.approx(sum(recalls), abs=1e-5)
    for direction in result.values():
        assert sorted(direction) == sorted(METRICS)
        assert all(list(metric) == ["value", "interval"] for metric in direction.values())
    assert result == both_directions(*cache.scores("test"))


def test_eval_prints_what_it_writes(pipeline):
    result = json.loads((pipeline["folder"] / "metrics.json").read_text())
    lines = pipeline["eval"].stdout.splitlines()
    assert lines[0] == f"{pipeline['folder'] / 'cache'}, test: 8 images x 6 vectors, 40 queries"
    for line, name in zip(lines[1:3], ("text_to_image", "image_to_text")):
        metric = result[name]["r@1"]
        low, high = metric["interval"]
        assert line.strip().startswith(f"{name.replace('_', ' ')}: r@1 {metric['value']:.1f} [{low:.1f}, {high:.1f}]")
    assert lines[3] == f"  rSum {result['rsum']:.1f}"
    assert lines[4] == f"-> {pipeline['folder'] / 'metrics.json'}, {pipeline['folder'] / 'metrics.html'}"


def test_eval_gives_the_same_with_and_without_pythonpath(pipeline):
    with_path = pipeline["folder"] / "more" / "metrics.json"  # in a folder that it made
    assert with_path.read_bytes() == (pipeline["folder"] / "metrics.json").read_bytes()
    assert sorted(path.name for path in with_path.parent.iterdir()) == ["metrics.html", "metrics.json"]


def test_the_trained_projector_is_what_the_index_holds(pipeline, world, base):
    retriever = Retriever.load(str(base))
    retriever.use_projector(load_projector(pipeline["folder"] / "out", retriever))
    records = flickr.load_split(world, "test", boxes=False)
    images = [pictures.load_image(record.image_path, retriever.picture_size) for record in records]
    visual = retriever.encode_images(retriever.image_inputs(images))
    ((_, tokens, _),) = Index(pipeline["folder"] / "cache").images("test")
    assert torch.equal(tokens, merge_tokens(visual.tokens, visual.coords, MergeConfig(**MERGE)).tokens)


# --- where the settings of an index come from -----------------------------------------------------------------------


def cache_words(pipeline, world, folder, *rest):
    return ["--data-root", str(world), "--cache-dir", str(folder), "--splits", "val", *map(str, rest)]


def merge_of(folder):
    return asdict(Index(folder).manifest.merge)


def test_overrides_win_over_the_adapter(script, pipeline, world, tmp_path):
    rest = ("--adapter-path", pipeline["folder"] / "out", "merge.num_regions=4", "merge.center_init=raster")
    script("cache").main(cache_words(pipeline, world, tmp_path / "c", *rest))
    assert merge_of(tmp_path / "c") == {
        **MERGE,
        "num_regions": 4,
        "center_init": "raster",
        "bank_size": 2048,
        "sap_layers": "",
        "global_view": "joined",
    }


def test_a_config_file_wins_over_the_adapter(script, pipeline, world, base, tmp_path):
    config = tmp_path / "other.yaml"
    config.write_text(f"model:\n  name: {base}\nmerge:\n  num_regions: 5\n")
    rest = ("--adapter-path", pipeline["folder"] / "out", "--config", config, "merge.cluster_iters=1")
    script("cache").main(cache_words(pipeline, world, tmp_path / "c", *rest))
    defaults = {"spatial_weight": 0.1, "assignment_temperature": 0.07, "object_penalty": 1.0, "center_init": "raster"}
    defaults |= {"compressor": "samer", "bank_size": 2048, "sap_layers": "", "global_view": "joined"}
    assert merge_of(tmp_path / "c") == {"num_regions": 5, "cluster_iters": 1, **defaults}
    manifest = Index(tmp_path / "c").manifest
    assert manifest.projector != manifest.model.base_projector


def test_without_an_adapter_the_projection_is_untouched(script, pipeline, world, base, tmp_path, capsys):
    rest = ("--limit-images", 2, "--batch-size", 1, f"model.name={base}", "merge.num_regions=7")
    (summary,) = script("cache").main(cache_words(pipeline, world, tmp_path / "c", *rest))
    manifest = Index(tmp_path / "c").manifest
    assert manifest.projector == manifest.model.base_projector
    assert manifest.dtype == "bfloat16"
    assert (summary.images, summary.queries, summary.regions) == (2, 10, 7)
    assert "(projection untouched)" in capsys.readouterr().out


def test_a_base_folder_may_bear_any_name(script, pipeline, world, base, tmp_path):
    """The name in the adapter's config.json passes through an override, which must not read it as YAML."""
    odd = shutil.copytree(base, tmp_path / "base: [v1] # é")
    adapter = shutil.copytree(pipeline["folder"] / "out", tmp_path / "adapter")
    settings = json.loads((adapter / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps({**settings, "base_model": str(odd)}))
    script("cache").main(cache_words(pipeline, world, tmp_path / "c", "--adapter-path", adapter))
    assert Index(tmp_path / "c").manifest.base_model == str(odd)


def test_overrides_may_follow_the_splits(script, pipeline, world, base, tmp_path, capsys):
    words = cache_words(pipeline, world, tmp_path / "c", f"model.name={base}", "merge.num_regions=3")
    assert words[4:6] == ["--splits", "val"]
    (summary,) = script("cache").main(words)
    assert (summary.split, summary.regions) == ("val", 3)
    with pytest.raises(SystemExit) as stopped:
        script("cache").main([*words[:5], *words[6:]])
    assert stopped.value.code == 2
    assert "--splits: expected at least one split" in capsys.readouterr().err


def test_a_second_run_goes_on(script, pipeline, capsys, world):
    words = cache_words(pipeline, world, pipeline["folder"] / "cache", "--adapter-path", pipeline["folder"] / "out")
    script("cache").main([*words, "--cache-dtype", "float32"])
    assert "2 shards kept from an earlier try" in capsys.readouterr().out


def test_scenes_writes_a_world_once(script, tmp_path, capsys):
    words = ["--out", str(tmp_path / "w"), "--train", "1", "--val", "1", "--test", "2", "--seed", "3"]
    script("scenes").main(words)
    assert capsys.readouterr().out == f"4 scenes with 20 captions written to {tmp_path / 'w'}\n"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*")}
    script("scenes").main(words)
    assert capsys.readouterr().out == f"4 scenes with 20 captions already in {tmp_path / 'w'}\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*")} == before
    ids = [(tmp_path / "w" / "annotations" / f"{split}.txt").read_text().split() for split in ("train", "val", "test")]
    assert [len(part) for part in ids] == [1, 1, 2]
    images = {path.stem for path in (tmp_path / "w" / "images" / "Images").iterdir()}
    assert {image_id for part in ids for image_id in part} <= images
