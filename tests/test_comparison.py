"""The comparison as a user runs it: every row against an independent path, resuming, tables, plots, bad input."""

import copy
import functools
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from samer.compare import plan as compare_plan
from samer.compare import run as compare_run
from samer.compare.measure import measure
from samer.compare.plan import CENTRES, SECTIONS, SHARES, plan, slug, variants
from samer.compare.run import compare
from samer.compressors import COMPRESSORS, Compressor
from samer.compressors.base import hard_merge
from samer.config import InputError, MergeConfig, load_config
from samer.data import flickr
from samer.evaluation import both_directions
from samer.features.read import FeatureStore
from samer.index.read import Index
from samer.index.write import build_index
from samer.report.results import write_tables
from samer.report.tables import markdown
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector, save_projector

ROOT = Path(__file__).resolve().parents[1]
REGISTRY = dict(COMPRESSORS)
COMPARED = ("none", "samer", "hpool", "hpc", "sap-mean", "toy")  # enough; every one more costs two trainings
FIRST = ("untouched", "adapted", "components", "crossed", "cost")
SEEDS = (0, 1)
TOKENS, K, DIM, IMAGES, CAPTIONS = 70, 8, 16, 8, 40
SPEED = re.compile(r'"queries_per_second": [0-9.]+')


class Toy(Compressor):
    """Every K-th token together."""

    def compress(self, visual, instance_labels):
        place = torch.arange(visual.tokens.shape[1]) % self.settings.num_regions
        return hard_merge(visual, place.expand(len(visual.tokens), -1), self.settings.num_regions)


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """The registry as it is shipped."""
    monkeypatch.setattr(compare_plan, "COMPRESSORS", REGISTRY)
    return REGISTRY


def every_name(registry):
    names = [[name] if name != "samer" else [f"samer, {init}" for init in CENTRES] for name in registry]
    return list(itertools.chain(*names))


def test_variants_hold_every_registered_compressor(registry):
    base = MergeConfig(num_regions=5, spatial_weight=0.3, compressor="hpc", center_init="farthest")
    found = variants(base)
    assert list(found) == every_name(registry)
    for name, merge in found.items():
        compressor, _, centres = name.partition(", ")
        assert merge == replace(base, compressor=compressor, center_init=centres or "farthest")


def test_plan_at_the_papers_size(registry):
    rows = plan(MergeConfig(), 1030)
    assert len({(row.section, row.name) for row in rows}) == len(rows)
    of = lambda section: {row.name: row for row in rows if row.section == section}
    assert [row.section for row in rows] == sorted((row.section for row in rows), key=SECTIONS.index)
    assert list(of("untouched")) == every_name(registry)
    boxless = [f"samer, {init}, without boxes" for init in CENTRES]
    assert [name for name in of("adapted") if name not in boxless] == every_name(registry)
    for init, name in zip(CENTRES, boxless):
        own = MergeConfig(center_init=init, object_penalty=0.0)
        assert (of("adapted")[name].merge, of("adapted")[name].trained) == (own, own)
    for name, merge in variants(MergeConfig()).items():
        assert (of("untouched")[name].merge, of("untouched")[name].trained) == (merge, None)
        assert (of("adapted")[name].merge, of("adapted")[name].trained) == (merge, merge)
    budgets = of("budgets")
    assert list(dict.fromkeys(row.merge.num_regions for row in budgets.values())) == [515, 257, 128, 64, 32]
    names = [name for name in every_name(registry) if name != "none"]
    for budget in (515, 257, 128, 64, 32):
        for name in names:
            row = budgets[f"{name} @ {budget}"]
            assert (row.merge, row.trained) == (replace(variants(MergeConfig())[name], num_regions=budget), None)
        for init in CENTRES:
            row = budgets[f"samer, {init}, trained @ {budget}"]
            assert row.merge == row.trained == MergeConfig(num_regions=budget, center_init=init)
    assert len(budgets) == 5 * (len(names) + 2)
    assert not of("cost")


def test_plan_of_components_and_crossings(registry):
    rows = {(row.section, row.name): row for row in plan(MergeConfig(), 1030)}
    whole = MergeConfig()
    for init in CENTRES:
        own = replace(whole, center_init=init)
        spatial, feature = replace(own, object_penalty=0.0), replace(own, object_penalty=0.0, spatial_weight=0.0)
        hard, everything = replace(own, assignment_temperature=1e-4), replace(whole, compressor="none")
        hpool = replace(whole, compressor="hpool")
        for section, name, merge, trained in (
            ("components", f"{init}: feature", feature, feature),
            ("components", f"{init}: feature + spatial", spatial, spatial),
            ("components", f"{init}: feature + spatial + object", own, own),
            ("crossed", f"untouched, samer, {init}, hard assignment", hard, None),
            ("crossed", f"trained with all tokens, samer, {init}", own, everything),
            ("crossed", f"trained through samer, {init}, all tokens", everything, own),
            ("crossed", f"trained through samer, {init}, hpool", hpool, own),
            ("crossed", f"trained through samer, {init}, hard assignment", hard, own),
            ("crossed", "trained with all tokens, hpool", hpool, everything),
        ):
            row = rows[section, name]
            assert (row.merge, row.trained) == (merge, trained)
    assert sum(section in ("components", "crossed") for section, _ in rows) == 2 * 3 + 2 * 5 + 1


def test_slugs_tell_settings_apart():
    settings = [
        MergeConfig(compressor=name, num_regions=k, center_init=init, spatial_weight=weight)
        for name in REGISTRY
        for k in (8, 64)
        for init in CENTRES
        for weight in (0.0, 0.1)
    ]
    assert len({slug(merge) for merge in settings}) == len(settings)
    assert slug(None) == "untouched"
    assert slug(settings[0]) == slug(replace(settings[0]))
    assert re.fullmatch(r"samer-farthest-16-[0-9a-f]{8}", slug(MergeConfig(num_regions=16, center_init="farthest")))
    assert re.fullmatch(r"sap-mean-16-[0-9a-f]{8}", slug(MergeConfig(num_regions=16, compressor="sap-mean")))


# --- one run, all sections but the budgets --------------------------------------------------------------------------


class Bench:
    """A finished run in `out`, and everything that made it."""

    def __init__(self, folder, world, base, script):
        self.world, self.base, self.out = world, base, folder / "out"
        self.config = folder / "run.yaml"
        self.config.write_text(
            f"model:\n  name: {base}\nmerge:\n  num_regions: {K}\ntrain:\n  train_batch_size: 8\n"
            "  grad_accum_steps: 1\n  num_train_epochs: 1\n  bf16: false\n  learning_rate: 2e-2\n"
            "  dataloader_num_workers: 0\n  logging_steps: 10\n"
        )
        self.script = script("compare").main
        self.records = flickr.load_split(world, "test", boxes=True)
        self.owner = np.repeat(np.arange(IMAGES), 5)

    def words(self, out, *rest):
        return ["--data-root", str(self.world), "--out", str(out), "--config", str(self.config), *map(str, rest)]

    def store(self):
        return FeatureStore(self.out / "features", str(self.base))

    def settings(self):
        config = load_config(self.config)
        return replace(config, data=replace(config.data, root=str(self.world), features=str(self.out / "features")))

    def compare(self, folder, sections, seeds=SEEDS):
        return compare(self.settings(), folder, self.store(), seeds=seeds, sections=sections, split="test")

    def copy(self, folder):
        """The run's projectors and measurements without the store, which stays where it is."""
        return shutil.copytree(self.out, folder, ignore=shutil.ignore_patterns("features", "checkpoint-*"))


@pytest.fixture(scope="module")
def bench(world, base, script, tmp_path_factory):
    """The first run, with a compressor of our own: one class and one line in the registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMPRESSORS, "toy", Toy)
        for name in REGISTRY:
            if name not in COMPARED:
                patch.delitem(COMPRESSORS, name)
        bench = Bench(tmp_path_factory.mktemp("comparison"), world, base, script)
        bench.results = bench.script(bench.words(bench.out, "--seeds", *SEEDS, "--sections", *FIRST))
        yield bench


@pytest.fixture(scope="module")
def values(bench):
    """What `measure` returns for every projector: (through, seed) -> settings -> values, measured here."""
    merges = {}
    for row in plan(load_config(bench.config).merge, TOKENS):
        if row.section in FIRST:
            merges.setdefault(slug(row.trained), {})[slug(row.merge)] = row.merge
    found, store = {}, bench.store()
    for through, rows in merges.items():
        for seed in SEEDS:
            if through == "untouched":
                store.use_projector(store.base_projector)
            else:
                store.use_projector(load_projector(bench.out / "projectors" / f"{through}-seed{seed}", store))
            found[through, seed] = {
                key: {name: value.numpy().astype(np.float64) for name, value in row.items()}
                for key, row in measure(store, bench.records, rows, 32).items()
            }
    return found


def row_of(results, section, name):
    (row,) = [row for row in results["rows"] if (row["section"], row["name"]) == (section, name)]
    return row


def runs_of(row, values):
    """The row's per-query values, one dict per seed."""
    through = MergeConfig(**row["trained_through"]) if row["trained_through"] else None
    seeds = SEEDS if through else SEEDS[:1]
    return [values[slug(through), seed][slug(MergeConfig(**row["merge"]))] for seed in seeds]


def test_every_planned_row_is_in_the_results(bench):
    written = json.loads((bench.out / "results.json").read_text())
    assert written == json.loads(json.dumps(bench.results))
    planned = [row for row in plan(MergeConfig(num_regions=K), TOKENS) if row.section in FIRST]
    assert len(planned) == 7 + 9 + 6 + 11
    for row, entry in zip(planned, written["rows"], strict=True):
        assert (entry["section"], entry["name"]) == (row.section, row.name)
        assert entry["merge"] == asdict(row.merge)
        assert entry["compressor"] == row.merge.compressor
        assert entry["trained_through"] == (asdict(row.trained) if row.trained else None)
        assert len(entry["seeds"]) == (2 if row.trained else 1)
        assert entry["stored_bytes_per_vector"] == (1 if row.merge.compressor == "hpc" else None)
        assert entry["vectors"] == (TOKENS if row.merge.compressor == "none" else K)
    about = written["about"]
    assert (about["images"], about["captions"], about["split"], about["data"]) == (IMAGES, CAPTIONS, "test", "world")
    assert (about["tokens_per_image"], about["embedding_dim"], about["seeds"]) == (TOKENS, DIM, list(SEEDS))
    assert (about["merge"], about["model"]) == (asdict(MergeConfig(num_regions=K)), str(bench.base))
    assert about["train"]["learning_rate"] == 0.02


def test_the_files_of_a_run(bench):
    names = {path.name for path in bench.out.iterdir()}
    plots = {"grounding.png", "grounding.svg"}  # no budgets, no lines
    report = {"report.html", "report_figures"}
    assert names == {"features", "projectors", "measured", "results.json", "results.md", *plots, *report}
    assert {path.name for path in (bench.out / "features").iterdir() if path.is_dir()} == {"train", "test"}
    projectors = {path.name for path in (bench.out / "projectors").iterdir()}
    assert len(projectors) == 2 * (7 + 4)
    measured = {path.stem for path in (bench.out / "measured").iterdir()}
    assert measured == {*projectors, "untouched-seed0"}
    for folder in (bench.out / "projectors").iterdir():
        settings = json.loads((folder / "config.json").read_text())
        assert folder.name == f"{slug(MergeConfig(**settings['merge']))}-seed{folder.name[-1]}"
        assert load_config(folder / "config.yaml").train.seed == int(folder.name[-1])


def recall(bench, folder, merge, projector=None):
    """R@1 and the rest by another path: the retriever itself, an index on disk, its scores."""
    retriever = Retriever.load(str(bench.base))
    if projector is not None:
        retriever.use_projector(load_projector(projector, retriever))
    build_index(folder, bench.world, ["test"], retriever, merge, dtype="float32")
    return both_directions(*Index(folder).scores("test"))


def check_recall(row, found):
    for name in ("r@1", "r@5", "r@10", "ndcg@10"):
        assert row[name] == pytest.approx(found["text_to_image"][name]["value"], abs=2e-4)
    assert row["back:r@1"] == pytest.approx(found["image_to_text"]["r@1"]["value"], abs=2e-4)
    assert row["interval"] == pytest.approx(found["text_to_image"]["r@1"]["interval"], abs=2e-4)


def test_untouched_rows_equal_an_index(bench, tmp_path, monkeypatch):
    """Every compressor that is shipped; nothing is trained for it."""
    for name, kind in REGISTRY.items():
        monkeypatch.setitem(COMPRESSORS, name, kind)
    results = bench.compare(tmp_path / "out", ["untouched"])
    assert len(results["rows"]) == len(REGISTRY) + 2
    for number, row in enumerate(results["rows"]):
        check_recall(row, recall(bench, tmp_path / f"{number}", MergeConfig(**row["merge"])))
    for row in results["rows"]:
        if row["compressor"] in COMPARED:
            assert row == row_of(bench.results, "untouched", row["name"])
    assert len({tuple(row["seeds"]) for row in results["rows"]}) > 2  # the rows do differ


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("adapted", "samer, farthest"),
        ("adapted", "hpc"),
        ("components", "raster: feature"),
        ("crossed", "trained through samer, raster, hpool"),
        ("crossed", "trained with all tokens, samer, raster"),
    ],
)
def test_trained_rows_equal_an_index_made_with_the_projector(bench, values, tmp_path, section, name):
    row = row_of(bench.results, section, name)
    through = MergeConfig(**row["trained_through"])
    for seed, r1, run in zip(SEEDS, row["seeds"], runs_of(row, values), strict=True):
        projector = bench.out / "projectors" / f"{slug(through)}-seed{seed}"
        assert MergeConfig(**json.loads((projector / "config.json").read_text())["merge"]) == through
        found = recall(bench, tmp_path / f"{seed}", MergeConfig(**row["merge"]), projector)
        assert r1 == pytest.approx(found["text_to_image"]["r@1"]["value"], abs=2e-4)
        assert run["ndcg@10"].mean() == pytest.approx(found["text_to_image"]["ndcg@10"]["value"], abs=2e-4)


def test_training_changes_what_is_measured(bench):
    """Else every comparison of trained rows would pass on untouched ones."""
    for name in ("none", "samer, raster"):
        before, after = (row_of(bench.results, section, name) for section in ("untouched", "adapted"))
        assert before["ndcg@10"] != after["ndcg@10"]
    assert any(row["spread"] for row in bench.results["rows"] if row["section"] == "adapted")


# --- means, spreads, intervals, differences -------------------------------------------------------------------------


def naive_interval(chosen, owner, resamples=1000):
    """95 % of means over images drawn with replacement, captions of an image together."""
    images = np.unique(owner)
    draws = np.random.default_rng(0).integers(len(images), size=(resamples, len(images)))
    of = [chosen[owner == image] for image in images]
    return np.quantile([np.concatenate([of[k] for k in draw]).mean() for draw in draws], [0.025, 0.975])


def named(bench):
    """Smallest named box and number of boxed phrases per caption."""
    captions = [caption for record in bench.records for caption in record.captions]
    areas = [[(x2 - x1) * (y2 - y1) for p in c.phrases for x1, y1, x2, y2 in p.boxes] for c in captions]
    counts = [len([p for p in caption.phrases if p.boxes]) for caption in captions]
    return np.array([min(own) if own else math.nan for own in areas]), np.array(counts)


def thirds(bench):
    smallest, _ = named(bench)
    low, high = np.quantile(smallest[~np.isnan(smallest)], [1 / 3, 2 / 3])
    return [smallest <= low, (low < smallest) & (smallest <= high), smallest > high]


def test_rows_recomputed_from_the_per_query_values(bench, values):
    near = functools.partial(pytest.approx, abs=2e-4)
    for row in bench.results["rows"]:
        runs = runs_of(row, values)
        assert all(len(run["r@1"]) == CAPTIONS and len(run["back:r@1"]) == IMAGES for run in runs)
        means = [run["r@1"].mean() for run in runs]
        assert row["seeds"] == near(means)
        assert row["r@1"] == near(sum(means) / len(means))
        assert row["spread"] == (near(statistics.stdev(means)) if row["trained_through"] else None)
        for name in ("r@5", "r@10", "ndcg@10", "back:r@1", "vectors"):
            assert row[name] == near(np.mean([run[name].mean() for run in runs]))
        for name in ("box_mass", "iou", "osr", "mixed_clusters", "purity"):
            assert row[name] == near(np.mean([100 * np.nanmean(run[name]) for run in runs]))
        assert row["region_hit"] == near(np.mean([100 * np.mean([iou >= 0.1 for iou in r["iou"]]) for r in runs]))
        mean = sum(run["r@1"] for run in runs) / len(runs)
        assert row["interval"] == near(list(naive_interval(mean, bench.owner)))
        assert row["r@1_by_size"] == [near(mean[part].mean()) for part in thirds(bench)]
    assert bench.results["sizes"]["captions"] == [int(part.sum()) for part in thirds(bench)]


def test_a_rows_values_do_not_depend_on_the_other_rows(bench, values):
    store = bench.store()
    for name in ("samer, raster", "hpc", "toy"):
        merge = MergeConfig(**row_of(bench.results, "untouched", name)["merge"])
        (found,) = measure(store, bench.records, {"alone": merge}, 32).values()
        for key, value in found.items():
            assert np.array_equal(value.numpy(), values["untouched", 0][slug(merge)][key], equal_nan=True)


def test_differences_recomputed_from_the_per_query_values(bench, values):
    near = functools.partial(pytest.approx, abs=2e-4)
    stacks = {
        (row["section"], row["name"]): np.stack([run["r@1"] for run in runs_of(row, values)])
        for row in bench.results["rows"]
    }
    _, count = named(bench)
    subsets = [*thirds(bench), count == 1, count == 2, count >= 3]
    for entry in bench.results["differences"]:
        of, minus = stacks[tuple(entry["of"])], stacks[tuple(entry["minus"])]
        runs = [of[k % len(of)] - minus[k % len(minus)] for k in range(max(len(of), len(minus)))]
        assert entry["seeds"] == near([run.mean() for run in runs])
        paired = sum(runs) / len(runs)
        assert entry["r@1"] == near(paired.mean())
        parts = [*entry["by_size"], *(entry["by_objects"][name] for name in ("1", "2", "3+"))]
        for subset, found in zip(subsets, parts, strict=True):
            assert (found is None) == (not subset.any())
            if found:
                assert found["r@1"] == near(paired[subset].mean())
        assert entry["interval"] == near(list(naive_interval(paired, bench.owner, 10_000)))
    entry = next(entry for entry in bench.results["differences"] if entry["r@1"] and len(entry["seeds"]) == 2)
    paired = stacks[tuple(entry["of"])].mean(0) - stacks[tuple(entry["minus"])].mean(0)
    for subset, found in zip(thirds(bench), entry["by_size"]):
        assert found["interval"] == near(list(naive_interval(paired[subset], bench.owner[subset], 10_000)))


def test_which_differences_are_asked_for(bench):
    asked = {(tuple(entry["of"]), tuple(entry["minus"])) for entry in bench.results["differences"]}
    assert len(asked) == len(bench.results["differences"])
    rows = {(row["section"], row["name"]) for row in bench.results["rows"]}
    assert all(of in rows and minus in rows and of != minus for of, minus in asked)
    assert (("adapted", "none"), ("untouched", "none")) in asked
    for init in CENTRES:
        own = ("adapted", f"samer, {init}")
        for minus in (
            ("untouched", f"samer, {init}"),
            ("adapted", "none"),
            ("adapted", "hpool"),
            ("adapted", "toy"),
            ("crossed", f"trained with all tokens, samer, {init}"),
            ("crossed", f"trained through samer, {init}, all tokens"),
            ("crossed", f"trained through samer, {init}, hpool"),
            ("crossed", f"trained through samer, {init}, hard assignment"),
        ):
            assert (own, minus) in asked
        parts = [("components", f"{init}: {name}") for name in ("feature", "feature + spatial")]
        assert (parts[1], parts[0]) in asked
        assert (("components", f"{init}: feature + spatial + object"), parts[1]) in asked


def test_cost_by_its_formulas(bench):
    found = bench.results["cost"]
    retriever = Retriever.load(str(bench.base))
    texts = [caption.text for record in bench.records for caption in record.captions]
    words = sum(int(retriever.query_inputs([text])["attention_mask"].sum()) for text in texts)
    assert (found["images"], found["queries"]) == (IMAGES, CAPTIONS)
    assert [row["budget"] for row in found["rows"]] == [70, 35, 17, 8, 4, 2]
    for row in found["rows"]:
        assert row["operations"] == 2 * DIM * words * IMAGES * row["budget"]
        assert row["gb_per_million_images"] == pytest.approx(row["budget"] * DIM * 2 * 1e6 / 1e9)
        assert row["queries_per_second"] > 0


# --- run again, resume, damage --------------------------------------------------------------------------------------


def state(folder):
    """What must stay as it is: bytes and times of projectors and measurements."""
    files = [path for part in ("projectors", "measured") for path in (folder / part).rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def still(results):
    """results.json without what is a matter of the clock."""
    return SPEED.sub("", results if isinstance(results, str) else json.dumps(results))


def refuse(*words, **named):
    raise AssertionError("nothing was left to do")


def test_a_second_run_trains_and_measures_nothing(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.Tensor, "backward", refuse)  # no step of any training
    monkeypatch.setattr(compare_run, "measure", refuse)
    before = state(bench.out)
    assert len(before) > 100
    written = (bench.out / "results.json").read_text()
    bench.script(bench.words(bench.out, "--seeds", *SEEDS, "--sections", *FIRST))
    assert state(bench.out) == before
    assert still((bench.out / "results.json").read_text()) == still(written)
    out = capsys.readouterr().out
    assert "33 rows: 22 projectors to train (2 seeds), " in out
    assert f"8 images of test, {TOKENS} tokens each, K = {K}; writing to {bench.out}" in out


def count_measured(monkeypatch):
    """Settings of every call of `measure` from now on."""
    calls = []

    def spy(encoder, records, merges, batch_size, asked):
        calls.append(list(merges))
        return measure(encoder, records, merges, batch_size, asked)

    monkeypatch.setattr(compare_run, "measure", spy)
    return calls


def without_cost(bench):
    return still({key: value for key, value in bench.results.items() if key != "cost"})


def test_a_cut_off_run_goes_on_to_the_same_bytes(bench, tmp_path, monkeypatch):
    out = bench.copy(tmp_path / "out")
    through = [slug(merge) for merge in map(variants(MergeConfig(num_regions=K)).get, ("samer, raster", "none", "toy"))]
    shutil.rmtree(out / "projectors" / f"{through[0]}-seed1")
    (out / "measured" / f"{through[1]}-seed0.safetensors").unlink()
    shutil.rmtree(out / "projectors" / f"{through[2]}-seed0")
    (out / "measured" / f"{through[2]}-seed0.safetensors").unlink()
    (out / "results.json").unlink()
    calls = count_measured(monkeypatch)
    assert still(bench.compare(out, FIRST[:-1])) == without_cost(bench)
    assert len(calls) == 2  # a projector trained again is the same, so what was measured with it stands
    for part, names in (("projectors", ("projector.safetensors", "config.json")), ("measured", ("",))):
        for path in (bench.out / part).iterdir():
            for name in names:
                assert (out / part / path.name / name).read_bytes() == (path / name).read_bytes()


def test_a_damaged_measurement_is_made_anew(bench, tmp_path, monkeypatch):
    out = bench.copy(tmp_path / "out")
    files = sorted((out / "measured").iterdir())
    good = {path: path.read_bytes() for path in files}
    flipped = bytearray(good[files[0]])
    flipped[-5] ^= 1
    header = bytearray(good[files[4]])
    header[20] ^= 1
    damaged = [bytes(flipped), good[files[1]][:-40], b"", good[files[5]], bytes(header)]  # the fourth is another's
    for path, content in zip(files, damaged):
        path.write_bytes(content)
    calls = count_measured(monkeypatch)
    assert still(bench.compare(out, FIRST[:-1])) == without_cost(bench)
    assert len(calls) == 5
    assert {path: path.read_bytes() for path in files} == good


def test_measurements_of_another_projector_are_made_anew(bench, tmp_path, monkeypatch):
    out, store, merge = bench.copy(tmp_path / "out"), bench.store(), variants(MergeConfig(num_regions=K))["toy"]
    save_projector(out / "projectors" / f"{slug(merge)}-seed0", store.base_projector, store, merge)
    calls = count_measured(monkeypatch)
    row = row_of(bench.compare(out, FIRST[:-1]), "adapted", "toy")
    assert calls == [[slug(merge)]]
    assert row["seeds"][0] == row_of(bench.results, "untouched", "toy")["r@1"]
    assert row["seeds"][1] == row_of(bench.results, "adapted", "toy")["seeds"][1]


def test_a_damaged_projector_is_refused(bench, tmp_path):
    out = bench.copy(tmp_path / "out")
    file = out / "projectors" / f"{slug(MergeConfig(num_regions=K))}-seed0" / "projector.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(InputError, match=re.escape(f"{file}: contents differ from config.json's hash; it is damaged")):
        bench.compare(out, ["adapted"])


def test_another_recipe_in_the_same_folder_is_refused(bench, tmp_path):
    out = bench.copy(tmp_path / "out")
    rest = ("--features", bench.out / "features", "--sections", "adapted", "train.learning_rate=1e-3")
    with pytest.raises(InputError, match=r"holds a run with train\.learning_rate=0\.02, now 0\.001"):
        bench.script(bench.words(out, *rest))


def test_an_image_is_encoded_once_per_projector(bench, tmp_path, monkeypatch):
    """Whatever the number of rows; hpc, which reads the corpus for its codebook too, is left out."""
    out = bench.copy(tmp_path / "out")
    shutil.rmtree(out / "measured")
    monkeypatch.delitem(COMPRESSORS, "hpc")
    encoded = []
    encode = FeatureStore.encode_images

    def spy(self, inputs, needs=()):
        encoded.append((self.current_projector().hash, inputs["seeds"].tolist()))
        return encode(self, inputs, needs)

    monkeypatch.setattr(FeatureStore, "encode_images", spy)
    results = bench.compare(out, ["untouched", "crossed"], seeds=[0])
    assert len(results["rows"]) == 6 + 11
    assert len(encoded) == len({projector for projector, _ in encoded}) == 4
    assert all(len(set(seeds)) == len(seeds) == IMAGES for _, seeds in encoded)


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def budgets(bench, tmp_path_factory):
    """Budgets and untouched rows, one seed, in a copy of the first run: K = 8 is N // 8, so two are trained already."""
    out = bench.copy(tmp_path_factory.mktemp("budgets") / "out")
    rest = ("--features", bench.out / "features", "--seeds", 0, "--sections", "untouched", "adapted", "budgets")
    return out, bench.script(bench.words(out, *rest))


def test_budget_rows(bench, budgets, tmp_path):
    out, results = budgets
    rows = [row for row in results["rows"] if row["section"] == "budgets"]
    assert len(rows) == 5 * (6 + 2)
    shared = ["hpool", "hpc", "toy"]
    for name in shared:
        assert row_of(results, "budgets", f"{name} @ 8")["r@1"] == row_of(results, "untouched", name)["r@1"]
    for init in CENTRES:
        trained = row_of(results, "budgets", f"samer, {init}, trained @ 8")
        assert trained["seeds"] == row_of(results, "adapted", f"samer, {init}")["seeds"]
        assert trained["seeds"] == row_of(bench.results, "adapted", f"samer, {init}")["seeds"][:1]
        assert trained["spread"] is None
    assert {row["vectors"] for row in rows} == {TOKENS // share for share in SHARES}
    merge = MergeConfig(num_regions=17, center_init="farthest")
    projector = out / "projectors" / f"{slug(merge)}-seed0"
    check_recall(row_of(results, "budgets", "samer, farthest, trained @ 17"), recall(bench, tmp_path, merge, projector))


# --- tables ---------------------------------------------------------------------------------------------------------

# METHOD section 5
PUBLISHED = {
    "Untouched projection": {
        "none": "77.0 / 92.9 / 86.9",
        "hpc": "54.0 / 77.8 / 69.0",
        "hpool": "73.7 / 91.4 / 84.7",
        "sap-mean": "68.3 / 88.6 / 80.8",
        "samer, raster": "73.5 / 91.1 / 84.5",
    },
    "The same projection-only training": {
        "hpool": "79.2",
        "hpc": "67.7",
        "sap-mean": "80.2",
        "samer, raster": "82.4",
    },
    "Components of SaMer": {
        "raster: feature": "80.7 / 47.6 / 13.0",
        "raster: feature + spatial": "80.4 / 47.8 / 13.1",
        "raster: feature + spatial + object": "82.4 / 54.2 / 16.4",
    },
    "Grounding": {
        "none": "51.8 / 10.5 / 2.1",
        "hpc": "30.3 / 2.7 / 0.7",
        "sap-mean": "39.9 / 7.4 / 1.5",
        "hpool": "41.4 / 62.5 / 11.7",
        "samer, raster": "41.3 / 62.8 / 11.7",
        "samer, raster, trained": "54.2 / 68.3 / 16.4",
    },
}
BY_BUDGET = ["83.7", "83.5", "83.1", "82.4", "81.3"]


def tables(text):
    """Heading -> its tables, each a list of rows of cells, the header first; every row as wide as its header."""
    found, heading, inside = {}, "", False
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        if line.startswith("|"):
            assert line.endswith("|")
            cells = [cell.strip() for cell in line[1:-1].split("|")]
            if not inside:
                found.setdefault(heading, []).append([])
            elif set(line) <= set("|-"):
                assert len(cells) == len(found[heading][-1][0])
                cells = []
            if cells:
                found[heading][-1].append(cells)
        inside = line.startswith("|")
    for parts in found.values():
        for table in parts:
            assert len(table) > 1
            assert {len(row) for row in table} == {len(table[0])}
    return found


def test_the_tables_are_those_of_the_results(bench):
    text = (bench.out / "results.md").read_text()
    assert text == markdown(json.loads((bench.out / "results.json").read_text()))
    found = tables(text)
    assert list(found) == [
        "Claims",
        "Untouched projection",
        "The same projection-only training",
        "Components of SaMer",
        "Taking the gain apart",
        "Grounding",
        "By the smallest object named",
        "By size",
        "Against the controls, captions",
        "Paired differences",
        "Cost",
    ]
    sections = {"Untouched projection": "untouched", "The same projection-only training": "adapted"}
    for heading, section in {**sections, "Taking the gain apart": "crossed"}.items():
        ((head, *rows),) = found[heading]
        wanted = [row for row in bench.results["rows"] if row["section"] == section]
        for cells, row in zip(rows, wanted, strict=True):
            at = dict(zip(head, cells))
            spread = f" ± {row['spread']:.1f}" if row["trained_through"] else ""
            assert cells[0] == row["name"]
            assert at["R@1"] == "{:.1f}{} [{:.1f}, {:.1f}]".format(row["r@1"], spread, *row["interval"])
            assert at["R@5"] == f"{row['r@5']:.1f}"
            assert at["nDCG@10"] == f"{row['ndcg@10']:.1f}"
            assert at["R@1 image to text"] == f"{row['back:r@1']:.1f}"
            assert float(at["vectors"]) == row["vectors"]
            size = row["vectors"] * (1 if row["compressor"] == "hpc" else 2 * DIM)
            assert int(at["bytes per image"].replace(",", "")) == size
    ((head, *rows),) = found["Grounding"]
    wanted = [row for row in bench.results["rows"] if row["section"] in ("untouched", "adapted")]
    for cells, row in zip(rows, wanted, strict=True):
        assert cells[0] == row["name"] + ", trained" * (row["section"] == "adapted")
        names = ("box_mass", "region_hit", "iou", "osr", "mixed_clusters")
        assert cells[2:] == [f"{row[name]:.1f}" for name in names]
    assert len(found["Paired differences"][0]) == 1 + len(bench.results["differences"])
    assert [row[0] for row in found["Cost"][0][1:]] == ["70", "35", "17", "8", "4", "2"]


def zeroed(value):
    """Every measured figure replaced by 0; names, settings and counts stay."""
    if isinstance(value, dict):
        return {k: v if k in ("about", "merge", "trained_through") else zeroed(v) for k, v in value.items()}
    if isinstance(value, list):
        return [zeroed(each) for each in value]
    return 0.0 if isinstance(value, float) else value


@pytest.mark.parametrize("which", ["first run", "budgets"])
def test_published_and_measured_figures_never_share_a_column(bench, budgets, which):
    results = bench.results if which == "first run" else budgets[1]
    blank = zeroed({key: value for key, value in copy.deepcopy(results).items() if key != "cost"})
    found, nothing = tables(markdown(results)), tables(markdown(blank))
    for heading, parts in found.items():
        for number, (head, *rows) in enumerate(parts):
            columns = [k for k, name in enumerate(head) if "published" in name]
            assert len(columns) == (heading in PUBLISHED)
            for k in columns:
                wanted = PUBLISHED[heading]
                assert {row[0]: row[k] for row in rows} == {row[0]: wanted.get(row[0], "") for row in rows}
            if any("published" in row[0] for row in rows):
                assert (heading, number, len(rows)) == ("Budgets", 0, 1)  # a table of its own
                assert rows[0][1:] == BY_BUDGET
                continue
            for row in nothing[heading][number][1:] if heading in nothing else []:
                rest = " ".join(cell for k, cell in enumerate(row[1:], 1) if k not in columns)
                assert not re.search(r"[1-9][0-9]*\.|\.[1-9]", rest), (heading, row)  # only what was measured, now 0
    budget_tables = found.get("Budgets", [])
    if which == "budgets":
        assert budget_tables[0][0] == budget_tables[1][0] == ["", *(f"K = {k}" for k in (35, 17, 8, 4, 2))]
        for name, *cells in budget_tables[1][1:]:
            for cell, k in zip(cells, (35, 17, 8, 4, 2)):
                row = row_of(results, "budgets", f"{name} @ {k}")
                assert cell == "{:.1f} [{:.1f}, {:.1f}]".format(row["r@1"], *row["interval"])


def test_one_registry_line_adds_rows_tables_and_plots(bench, budgets):
    _, results = budgets
    for section in ("untouched", "adapted"):
        assert row_of(bench.results, section, "toy")["compressor"] == "toy"
    found = tables(markdown(results))
    for heading in ("Untouched projection", "The same projection-only training", "Grounding", "Paired differences"):
        assert any("toy" in cell for row in found[heading][0] for cell in row)
    assert "toy" in [row[0] for row in found["Budgets"][1]]
    out = budgets[0]
    assert "<!-- toy -->" in (out / "recall_budget.svg").read_text()
    assert "<!-- toy -->" in (out / "recall_bytes.svg").read_text()
    assert "<!-- toy, trained -->" in (out / "grounding.svg").read_text()


def test_plots_open_show_something_and_are_the_same_bytes_again(budgets, tmp_path):
    out, results = budgets
    stems = ["recall_budget", "recall_bytes", "grounding"]
    files = write_tables(json.loads((out / "results.json").read_text()), tmp_path)
    plots = [f"{stem}{suffix}" for stem in stems for suffix in (".png", ".svg")]
    assert [path.name for path in files] == ["results.md", *plots]
    for path in files:
        assert path.read_bytes() == (out / path.name).read_bytes()
    for stem in stems:
        with Image.open(out / f"{stem}.png") as picture:
            picture.load()
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 10
        assert 0.5 < (pixels == 255).all(1).mean() < 0.99
        tree = ElementTree.parse(out / f"{stem}.svg")
        assert tree.getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(tree.iter("{http://www.w3.org/2000/svg}path"))) > 20
    assert results["about"]["seeds"] == [0]


def test_a_few_sections_make_a_few_tables(bench, tmp_path):
    """Cost alone needs no row; crossings alone give neither grounding nor lines."""
    out = tmp_path / "out"
    rest = ("--features", bench.out / "features", "--seeds", 0, "--sections")
    results = bench.script(bench.words(out, *rest, "cost"))
    assert (results["rows"], results["differences"]) == ([], [])
    assert list(tables((out / "results.md").read_text())) == ["Cost"]
    report = ["report.html", "report_figures"]
    assert sorted(path.name for path in out.iterdir()) == [*report, "results.json", "results.md"]
    assert "<table" not in (out / "report.html").read_text()
    crossed = {**bench.results, "rows": [row for row in bench.results["rows"] if row["section"] == "crossed"]}
    compared = ("cost", "claims", "against", "discriminates")
    crossed = {key: value for key, value in crossed.items() if key not in compared} | {"differences": []}
    assert [path.name for path in write_tables(crossed, tmp_path / "tables")] == ["results.md"]
    assert list(tables(markdown(crossed))) == ["Taking the gain apart"]


# --- bad input, and overrides ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (
            ["--sections", "untouched", "graphs"],
            "sections graphs: use some of untouched, adapted, budgets, components,",
        ),
        (["--sections", "merge.num_regions=8"], r"sections \(none given\): use some of untouched"),
        (["--sections", "cost", "--seeds", "0", "1", "0"], r"seeds \[0, 1, 0\]: give at least one, each once"),
        (["--sections", "cost", "merge.regions=8"], "merge.regions"),
        (["--sections", "cost", "--split", "nowhere"], "nowhere"),
        (["--sections", "cost", "--data-root", "/no/such/place"], "/no/such/place"),
        (["--sections", "cost", "--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["--sections", "cost", "--features", "/no/such/store"], "/no/such/store: no manifest.json"),
    ],
)
def test_bad_input_is_named(bench, tmp_path, rest, message):
    words = bench.words(tmp_path / "out", "--features", bench.out / "features", *rest)
    with pytest.raises(InputError, match=message):
        bench.script(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rest", [["--sections", "graphs"], ["--seeds", "0", "0"], ["--seeds", "-1"]])
def test_sections_and_seeds_are_checked_before_features_are_made(bench, tmp_path, rest):
    with pytest.raises(InputError, match=r"sections|seeds"):
        bench.script(bench.words(tmp_path / "out", *rest))
    assert not (tmp_path / "out").exists()


def test_a_tiny_image_has_each_budget_once(registry):
    names = [row.name for row in plan(MergeConfig(num_regions=2), 16) if row.section == "budgets"]
    assert len(set(names)) == len(names)


def test_a_missing_data_root_is_named_before_features_are_made(bench, tmp_path):
    with pytest.raises(InputError, match="/no/such/place"):
        bench.script([*bench.words(tmp_path / "out"), "--data-root", "/no/such/place"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rest", [["--seeds", "zero"], ["--seeds"], ["--sections"]])
def test_usage_errors(bench, tmp_path, capsys, rest):
    with pytest.raises(SystemExit) as stopped:
        bench.script(bench.words(tmp_path / "out", *rest))
    assert stopped.value.code == 2
    assert f"argument {rest[0]}:" in capsys.readouterr().err


def test_overrides_may_follow_the_sections(bench, tmp_path):
    rest = ("--features", bench.out / "features", "--sections", "untouched", "merge.num_regions=5")
    results = bench.script(bench.words(tmp_path / "out", *rest, "data.limit_eval_images=4"))
    assert (results["about"]["merge"]["num_regions"], results["about"]["images"]) == (5, 4)
    assert {row["vectors"] for row in results["rows"]} == {5, TOKENS}
    before = bench.words(tmp_path / "again", "merge.num_regions=5", "data.limit_eval_images=4", *rest[:-1])
    assert bench.script(before) == results


def test_features_are_limited_as_the_settings_say(bench, tmp_path):
    words = bench.words(tmp_path / "out", "--seeds", 0, "--sections", "cost")
    results = bench.script([*words, "data.limit_train_images=3", "data.limit_eval_images=2"])
    assert results["about"]["images"] == 2
    splits = json.loads((tmp_path / "out" / "features" / "manifest.json").read_text())["splits"]
    assert {name: sum(shard["count"] for shard in split["images"]) for name, split in splits.items()} == {
        "train": 3,
        "test": 2,
    }


# --- the launcher ---------------------------------------------------------------------------------------------------

STUB = """#!/usr/bin/env bash
if [ "$1" = - ]; then exec "$REAL_PYTHON" "$@"; fi
printf '%s\\n' "$*"
"""


@pytest.mark.parametrize("given", [True, False])
def test_the_launcher_passes_its_variables_on(command, tmp_path, given):
    """With an interpreter that only says what it was asked to run."""
    launcher = str(ROOT / "bash" / "compare.sh")
    assert subprocess.run(["bash", "-n", launcher], check=False).returncode == 0
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    empty = dict.fromkeys(("SEEDS", "DATA_ROOT", "OUTPUT_DIR", "CONFIG", "FEATURES_DIR"), "")
    own = {"SEEDS": "3 4", "DATA_ROOT": "/d", "OUTPUT_DIR": "/o", "CONFIG": "/c.yaml", "FEATURES_DIR": "/f"}
    path = {"PATH": f"{stub.parent}:/usr/bin:/bin", "REAL_PYTHON": sys.executable}
    rest = ("--sections", "cost", "merge.num_regions=4")
    done = command("bash", launcher, *rest, env={**empty, **(own if given else {}), **path})
    assert (done.returncode, done.stderr) == (0, "")
    ran = "scripts/compare.py --seeds {4} --data-root={0} --out={1}{3} --config={2} --sections cost merge.num_regions=4"
    if given:
        assert done.stdout.splitlines() == [ran.format("/d", "/o", "/c.yaml", " --features=/f", "3 4")]
    else:
        world, line = done.stdout.splitlines()
        assert world.startswith("scripts/scenes.py --out=outputs/compare/world ")
        assert line == ran.format("outputs/compare/world", "outputs/compare", "configs/demo.yaml", "", "0 1 2")
