"""What a comparison asks beside its captions, and what it says of differences: phrases, relevance, tests, claims."""

import itertools
import json
import math
import re
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_family import Toy, save_toy

from samer.compare import measure as compare_measure
from samer.compare import pace as compare_pace
from samer.compare import plan as compare_plan
from samer.compare import run as compare_run
from samer.compare.measure import cost, measure, tokens_of
from samer.compare.pace import Pace, spoken
from samer.compare.plan import plan, slug
from samer.compare.queries import RARE, Asked, caption_positives, phrase_queries, size_bins
from samer.compare.significance import row_key, significance
from samer.compare.summarise import summarise
from samer.compressors import COMPRESSORS, make_compressor
from samer.compressors.grid import GridPooling
from samer.config import InputError, MergeConfig
from samer.data import flickr
from samer.data.records import Caption, ImageRecord, Phrase, phrase_texts
from samer.evaluation import both_directions, fitted_compressor, fitted_compressors
from samer.features.read import FeatureStore
from samer.features.write import write_features
from samer.index.read import Index
from samer.index.write import build_index
from samer.metrics import bootstrap_intervals, bootstrap_tests
from samer.report.tables import markdown
from samer.retrievers import FAMILIES
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector

MAIN = ("none", "random", "grid", "kmeans", "samer")
LEFT, RIGHT, SMALL = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (0.0, 0.0, 0.2, 0.1)


# --- phrases ----------------------------------------------------------------------------------------------------------


def phrase(text, *boxes, chain="7", types=("other",)):
    return Phrase(text, chain, types, 0, len(text), boxes)


def image(name, *phrases, related=True):
    return ImageRecord(name, Path(f"{name}.jpg"), (Caption(f"caption of {name}", phrases, related),))


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("A brown dog", "brown dog"),
        ("the Brown  dog", "brown dog"),
        ("An apple", "apple"),
        ("brown dog", "brown dog"),
        ("Another man", "another man"),
        ("a", "a"),
        ("the a team", "a team"),
        ("theatre", "theatre"),
    ],
)
def test_a_phrase_as_it_is_typed(text, typed):
    assert phrase(text).typed == typed


RECORDS = [
    image("0", phrase("A dog", LEFT), phrase("a ball", SMALL)),
    image("1", phrase("the dog"), phrase("each other", LEFT, chain="0")),  # no box of its own
    image("2", phrase("two dogs", LEFT, RIGHT), phrase("A DOG", SMALL), phrase("dog", LEFT, LEFT)),
    image("3", phrase("a cat", LEFT), related=False),
    image("4", phrase("a view", LEFT, types=("notvisual",)), phrase("the sky")),
]


def test_phrases_of_a_split():
    found = phrase_queries(RECORDS)
    assert list(found.texts) == ["dog", "ball", "two dogs"] == phrase_texts(RECORDS)
    assert found.positives.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 2]]
    assert found.sizes == pytest.approx([0.5, 0.02, 1.0])
    assert found.held_by.tolist() == [3, 1, 1]
    assert found.owners.tolist() == [0, 0, 2]


def test_data_without_a_boxed_phrase_is_refused():
    with pytest.raises(InputError, match="no phrase has a box"):
        phrase_queries(RECORDS[1:2])


def test_bins_of_sizes():
    sizes = np.array([0.0, 0.0099, 0.01, 0.0299, 0.03, 0.0999, 0.1, 1.0, math.nan])
    assert size_bins(sizes).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, -1]


# --- other images that satisfy a caption ------------------------------------------------------------------------------


def test_relevant_images_join_a_captions_own():
    records = [replace(record, captions=record.captions * 2) for record in RECORDS]
    relevant = {"0": [["2", "elsewhere"], []], "2": [[], ["0", "1"]], "elsewhere": [["0"], []]}
    found = caption_positives(records, relevant)
    wanted = np.zeros((10, 5), dtype=bool)
    for query, own in enumerate(itertools.chain(*([k, k] for k in range(5)))):
        wanted[query, own] = True
    wanted[0, 2] = wanted[5, 0] = wanted[5, 1] = True
    assert found.numpy().tolist() == wanted.tolist()
    assert caption_positives(records, {}) is None
    assert caption_positives(records, {"0": [["elsewhere"], []]}) is None
    with pytest.raises(InputError, match=r"relevant\.json: 0 has 1 lists for 2 captions"):
        caption_positives(records, {"0": [["2"]]})


@pytest.mark.parametrize("content", [{"7": "8"}, {"7": ["8"]}, {"7": [[8]]}])
def test_a_damaged_list_of_relevant_images_is_named(world, tmp_path, content):
    data = shutil.copytree(world, tmp_path / "data")
    assert flickr.Flickr().relevant(data) == {}
    path = flickr.find_layout(data).splits / "relevant.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=re.escape(f"{path}: '7' has no list of image ids per caption")):
        flickr.Flickr().relevant(data)


# --- the store --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(world, base, tmp_path_factory):
    """Stores of the test split, without and with phrases."""
    folder = tmp_path_factory.mktemp("stores")
    for name, phrases in (("captions", False), ("phrases", True)):
        retriever = Retriever.load(str(base))
        write_features(folder / name, world, ["train", "test"], retriever, dtype="float32", phrases=phrases)
    return folder


@pytest.fixture(scope="module")
def records(world):
    return flickr.load_split(world, "test", boxes=True)


def test_a_store_with_phrases_holds_them_beside_the_captions(stored, base, records):
    texts = phrase_texts(records)
    assert len(texts) > 10
    without, store = (FeatureStore(stored / name, str(base)) for name in ("captions", "phrases"))
    assert without.lacking(texts) == texts
    assert store.lacking([*texts, "never annotated"]) == ["never annotated"]
    frozen = Retriever.load(str(base))
    for mine, other in zip(
        *(e.encode_queries(e.query_inputs([text])).tokens for e in (store, frozen) for text in [texts[3]])
    ):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    for shard in (stored / "captions" / "test").glob("*.safetensors"):
        assert shard.read_bytes() == (stored / "phrases" / "test" / shard.name).read_bytes()
    names = [sorted(p.name for p in (stored / name / "test").glob("texts*")) for name in ("captions", "phrases")]
    assert names == [["texts-00000.safetensors"], ["texts-00000.safetensors", "texts-00001.safetensors"]]


def test_phrases_are_added_to_a_store_that_is_there(stored, base, world, records, tmp_path):
    folder = shutil.copytree(stored / "captions", tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.safetensors")}
    write_features(folder, world, ["test"], Retriever.load(str(base)), dtype="float32", phrases=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert FeatureStore(folder, str(base)).lacking(phrase_texts(records)) == []
    assert (folder / "manifest.json").read_bytes() != (stored / "captions" / "manifest.json").read_bytes()


# --- what is measured -------------------------------------------------------------------------------------------------


def naive_scores(encoder, records, merge, texts):
    """MaxSim of every text against every image, a query token at a time."""
    compressor = make_compressor(merge)
    scores = np.zeros((len(texts), len(records)))
    for column, record in enumerate(records):
        merged = compressor(encoder.encode_images(encoder.record_inputs([record]), compressor.needs))
        kept = [vector.double() for vector, there in zip(merged.tokens[0], merged.mask[0]) if there]
        for row, text in enumerate(texts):
            query = encoder.encode_queries(encoder.query_inputs([text]))
            tokens = [token.double() for token, there in zip(query.tokens[0], query.mask[0]) if there]
            scores[row, column] = np.mean([max(float(token @ vector) for vector in kept) for token in tokens])
    return scores


def naive_metrics(scores, positives):
    """Success at 1, 5, 10, nDCG@10 and reciprocal rank, query by query, in percent; no two scores are equal."""
    found = {name: [] for name in ("r@1", "r@5", "r@10", "ndcg@10", "mrr")}
    for row, right in zip(scores, positives):
        ranked = [bool(right[k]) for k in np.argsort(-row)]
        for k in (1, 5, 10):
            found[f"r@{k}"].append(100.0 * any(ranked[:k]))
        gain = sum(1 / math.log2(place + 2) for place, hit in enumerate(ranked[:10]) if hit)
        best = sum(1 / math.log2(place + 2) for place in range(min(10, sum(ranked))))
        found["ndcg@10"].append(100 * gain / best)
        found["mrr"].append(100 / (ranked.index(True) + 1))
    return found


@pytest.mark.parametrize("compressor", ["none", "kmeans"])
def test_phrases_against_a_naive_search(stored, base, records, compressor):
    store, queries = FeatureStore(stored / "phrases", str(base)), phrase_queries(records)
    assert queries.held_by.max() > 1
    merge = MergeConfig(num_regions=8, compressor=compressor)
    found = measure(store, records, {"it": merge}, 3, Asked(phrases=queries))["it"]
    scores = naive_scores(store, records, merge, queries.texts)
    assert len(np.unique(scores.round(7))) > 0.99 * scores.size
    for name, values in naive_metrics(scores, queries.positives.tolist()).items():
        assert found[f"phrase:{name}"].tolist() == pytest.approx(values, abs=1e-3)
    plain = measure(store, records, {"it": merge}, 3)["it"]
    assert not [name for name in plain if name.startswith("phrase")]
    assert all(torch.equal(plain[name].nan_to_num(), found[name].nan_to_num()) for name in plain)


def test_relevant_images_count_as_found(stored, base, records):
    store, merge = FeatureStore(stored / "phrases", str(base)), MergeConfig(num_regions=8, compressor="kmeans")
    texts = [caption.text for record in records for caption in record.captions]
    others = {records[k].image_id: [[records[(k + 3) % 8].image_id], [], [], [], []] for k in range(8)}
    positives = caption_positives(records, others)
    found = measure(store, records, {"it": merge}, 3, Asked(positives=positives))["it"]
    scores = naive_scores(store, records, merge, texts)
    naive = naive_metrics(scores, positives.tolist())
    for name in ("r@1", "r@5", "r@10", "ndcg@10"):
        assert found[name].tolist() == pytest.approx(naive[name], abs=1e-3)
    backward = naive_metrics(scores.T, positives.T.tolist())
    assert found["back:r@1"].tolist() == pytest.approx(backward["r@1"])
    own = measure(store, records, {"it": merge}, 3)["it"]
    assert (found["r@1"] >= own["r@1"]).all()
    assert found["ndcg@10"].tolist() != own["ndcg@10"].tolist()


def test_images_of_several_grids_are_measured_as_one_by_one(world, records, tmp_path, monkeypatch):
    """Two grids in a batch: tokens are counted image by image, and what is padded changes nothing."""
    monkeypatch.setitem(FAMILIES, Toy.architecture, Toy)
    retriever, some = Retriever.load(str(save_toy(tmp_path / "toy"))), []
    for number, record in enumerate(records):
        path = tmp_path / f"{number}.png"
        from PIL import Image

        with Image.open(record.image_path) as picture:
            (picture.resize((90, 150)) if number % 3 else picture.resize((150, 90))).save(path)
        some.append(replace(record, image_path=path))
    assert retriever.grid is None
    counts = [int(retriever.record_inputs([record])["attention_mask"].sum()) for record in some]
    assert len(set(counts)) == 2
    assert tokens_of(retriever, some, 3) == (min(counts), round(sum(counts) / len(counts)), max(counts))
    merges = {name: MergeConfig(num_regions=4, compressor=name) for name in ("none", "samer")}
    together, alone = (measure(retriever, some, merges, size) for size in (8, 1))
    for name, row in together.items():
        for key, value in row.items():
            torch.testing.assert_close(value, alone[name][key], atol=1e-4, rtol=0, equal_nan=True)
    found = cost(retriever, some, merges["samer"], [max(counts), 4], 3)
    assert [row["budget"] for row in found["rows"]] == [max(counts), 4]
    words = sum(int(retriever.query_inputs([c.text])["attention_mask"].sum()) for r in some for c in r.captions)
    assert [row["operations"] for row in found["rows"]] == [2 * 16 * words * total for total in (sum(counts), 4 * 8)]


# --- tests of differences ---------------------------------------------------------------------------------------------


def naive_test(values, groups, resamples, seed):
    """Interval and p of a mean: resample by resample."""
    members = [values[groups == name] for name in np.unique(groups)]
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = [members[k] for k in generator.integers(len(members), size=len(members))]
        means.append(np.concatenate(drawn).mean())
    below, above = sum(m <= 1e-9 for m in means), sum(m >= -1e-9 for m in means)
    return np.quantile(means, [0.025, 0.975]), min(1.0, 2 * (1 + min(below, above)) / (resamples + 1))


def test_bootstrap_tests_match_a_naive_loop():
    generator = np.random.default_rng(3)
    groups = generator.choice([4, -2, 9, 100, 7, 31], size=40)
    values = np.stack([generator.normal(size=40) + shift for shift in (0.0, 0.2, 1.5)] + [np.zeros(40)], axis=1)
    intervals, p = bootstrap_tests(values, groups, resamples=300, seed=5)
    for column in range(4):
        edges, share = naive_test(values[:, column], groups, 300, 5)
        np.testing.assert_allclose(intervals[column], edges, atol=1e-9)
        assert p[column] == pytest.approx(share)
    assert p[3] == 1.0
    known = bootstrap_intervals({"a": values[:, 1]}, resamples=300, seed=5, groups=groups)["a"]
    np.testing.assert_allclose(intervals[1], known, atol=1e-9)


def test_a_planted_difference_is_found_and_a_null_is_not():
    """300 images of five captions that share what is easy about their image; a tenth of the captions change sides."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(300), 5)
    first = 100.0 * (generator.random(1500) < np.repeat(generator.random(300), 5))
    changed = generator.random(1500) < 0.1
    null = np.where(changed, 100.0 * (generator.random(1500) < 0.5), first)
    worse = np.where(changed, 0.0, first)
    intervals, p = bootstrap_tests(np.stack([first - null, first - worse], axis=1), groups)
    assert intervals[0][0] < 0 < intervals[0][1]
    assert p[0] > 0.05
    assert intervals[1][0] > 0
    assert p[1] < 0.001


def test_nulls_are_rejected_about_as_often_as_said():
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(120), 3)
    nulls = np.repeat(generator.normal(size=(120, 400)), 3, axis=0) + generator.normal(size=(360, 400))
    _, p = bootstrap_tests(nulls, groups, resamples=2000)
    assert 0.03 < (p < 0.05).mean() < 0.085
    _, alone = bootstrap_tests(nulls, np.arange(360), resamples=2000)
    assert (alone < 0.05).mean() > 0.12  # what captions of one image share is taken for evidence


def test_bootstrap_tests_refuse_shapes_that_differ():
    with pytest.raises(InputError, match=r"expected \(Q, C\) and \(Q,\)"):
        bootstrap_tests(np.zeros((4, 2)), np.zeros(3, dtype=int))


# --- findings from planted measurements -------------------------------------------------------------------------------

IMAGES, K, SEEDS = 200, 8, (0, 1)
THINGS = [f"toy {k % 10}" if k < 80 else f"rarity {k}" for k in range(IMAGES)]  # 10 phrases of 8 images, 120 of one
SPLIT = [replace(one, captions=one.captions * 3) for one in (image(name, phrase(name, SMALL)) for name in THINGS)]
ASKED = phrase_queries(SPLIT)
EASIER = {"r@1": 0.0, "mrr": 0.02, "ndcg@10": 0.05, "r@5": 0.08, "r@10": 0.12}  # so that none passes for another
LOSSES = {"random": 0.3, "grid": 0.2, "hpool": 0.0, "sap-mean": 0.1, "kmeans": 0.0, "none": 0.0, "samer": 0.05}


def planted(rows, losses=LOSSES, seed=0):
    """Values of rows: a query succeeds where its luck is above what the compressor loses; trained rows gain 0.2."""
    generator = np.random.default_rng(seed)
    lucks = {"": generator.random(3 * IMAGES), "phrase:": generator.random(len(ASKED.texts))}
    noise = {name: {row.merge.compressor: generator.random(len(luck)) for row in rows} for name, luck in lucks.items()}
    found = {}
    for row in rows:
        for run in SEEDS if row.trained else [0]:
            shift = losses[row.merge.compressor] - 0.2 * bool(row.trained)
            values = {}
            for prefix, luck in lucks.items():
                jitter = 0.05 * noise[prefix][row.merge.compressor] * (row.merge.compressor != "none")
                least = 0.4 + shift + jitter - 0.025 * (jitter > 0) + 0.001 * run
                values |= {f"{prefix}{name}": 100.0 * (luck > least - easier) for name, easier in EASIER.items()}
            ones = np.ones(IMAGES)
            sides = ("back:r@1", "vectors", "box_mass", "iou", "osr", "mixed_clusters", "purity")
            values |= dict.fromkeys(sides, ones)
            found.setdefault((row.measured_with, run), {})[slug(row.merge)] = values
    return found


def planned(*sections, methods=tuple(LOSSES)):
    rows = plan(MergeConfig(num_regions=K), 64, (16, K), methods)
    return [row for row in rows if row.section in sections]


def results_of(rows, measured):
    about = {
        "data": "w", "split": "test", "images": IMAGES, "captions": 3 * IMAGES, "model": "m", "tokens_per_image": 64,
        "embedding_dim": 16, "merge": {"num_regions": K}, "train": {}, "seeds": list(SEEDS),
        "phrases": {"count": len(ASKED.texts), "of_one_image": 120, "rare": 120, "rare_images": RARE, "most_images": 8},
    }  # fmt: skip
    found = summarise(rows, measured, SPLIT, SEEDS, ASKED)
    return {"about": about, **found, **significance(rows, measured, SPLIT, SEEDS, ASKED)}


@pytest.fixture(scope="module")
def found():
    rows = planned("untouched", "adapted", "budgets")
    measured = planted(rows)
    return rows, measured, results_of(rows, measured)


def values_of(rows, measured, key, metric):
    (row,) = [row for row in rows if (row.section, row.name) == tuple(key)]
    runs = [measured[row.measured_with, seed][slug(row.merge)][metric] for seed in (SEEDS if row.trained else [0])]
    return sum(runs) / len(runs)


def test_every_difference_against_a_naive_loop(found):
    rows, measured, results = found
    owners = {"captions": np.repeat(np.arange(IMAGES), 3), "phrases": ASKED.owners}
    entries = [*results["against"][::17], *results["claims"][::9], *results["discriminates"][:1]]
    assert len(entries) > 8
    for entry in entries:
        for (name, prefix), metric in itertools.product((("captions", ""), ("phrases", "phrase:")), ("r@1", "ndcg@10")):
            of, minus = (values_of(rows, measured, entry[side], f"{prefix}{metric}") for side in ("of", "minus"))
            edges, p = naive_test(of - minus, owners[name], 10_000, 0)
            test = entry[name][metric]
            assert test["difference"] == pytest.approx(np.mean(of - minus), abs=2e-4)
            assert test["interval"] == pytest.approx(list(edges), abs=2e-4)
            assert test["p"] == pytest.approx(p, abs=2e-5)


def test_every_row_is_held_against_its_controls(found):
    rows, _, results = found
    of = {}
    for entry in results["against"]:
        of.setdefault(tuple(entry["of"]), []).append(tuple(entry["minus"]))
    four = [("untouched", name) for name in ("none", "kmeans", "hpool", "sap-mean")]
    assert of["untouched", "samer, raster"] == four
    assert of["untouched", "kmeans"] == [four[0], *four[2:]]
    trained = [("adapted", name) for _, name in four]
    assert of["adapted", "samer, farthest"] == of["adapted", "samer, farthest, without boxes"] == trained
    wider = [("untouched", "none"), *(("budgets", f"{name} @ 16") for name in ("kmeans", "hpool", "sap-mean"))]
    assert of["budgets", "samer, raster @ 16"] == of["budgets", "random @ 16"] == wider
    assert of["budgets", "samer, raster, trained @ 16"] == [("adapted", "none")]  # no other is trained at 16
    assert of["budgets", "kmeans @ 8"] == [four[0], *four[2:]]  # nothing is held against itself
    assert {row_key(row) for row in rows} - of.keys() == {("untouched", "none"), ("adapted", "none")}  # all vectors


def test_what_is_planted_is_claimed_and_what_is_not_is_not(found):
    rows, _, results = found
    claims = {claim["claim"]: claim["verdicts"] for claim in results["claims"]}
    assert claims["samer, farthest, trained: level with all tokens"]["captions"] == "no"
    assert claims["samer, raster, untouched: merging ahead of pruning (random)"] == dict.fromkeys(
        ("captions", "phrases", "rare_phrases"), "yes"
    )
    assert claims["samer, farthest, trained: ahead of K-means"]["captions"] == "no"
    assert claims["samer, raster: boxes help"]["captions"] == "undecided"  # the same values
    assert claims["hpool: training helps"]["phrases"] == "yes"
    assert "querybank, trained: ahead of K-means" not in claims
    better = {**LOSSES, "samer": -0.1, "kmeans": 0.0}
    claims = {claim["claim"]: claim["verdicts"] for claim in results_of(rows, planted(rows, better))["claims"]}
    assert claims["samer, farthest, trained: level with all tokens"]["captions"] == "yes"
    assert claims["samer, farthest, trained: ahead of K-means"]["captions"] == "yes"


def test_level_is_within_half_a_point():
    from samer.compare.significance import _verdict

    level = {
        (-0.4, -0.1): "yes",
        (-0.6, 0.3): "undecided",
        (-0.6, -0.2): "undecided",
        (0.1, 2.0): "yes",
        (-3.0, -1.0): "no",
    }
    ahead = {(-0.4, -0.1): "no", (-0.6, 0.3): "undecided", (0.1, 2.0): "yes", (0.0, 1.0): "undecided"}
    for kind, cases in (("level", level), ("ahead", ahead)):
        assert {edges: _verdict(kind, {"interval": edges}) for edges in cases} == cases


def test_a_verdict_on_trained_rows_asks_that_seeds_agree():
    from samer.compare.significance import _verdict

    cases = {  # interval, by seed: of "ahead", of "level"
        ((0.2, 2.0), (1.0, 0.4)): ("yes", "yes"),
        ((0.2, 2.0), (2.3, -0.1)): ("undecided", "yes"),
        ((0.2, 2.0), (2.3, -0.6)): ("undecided", "undecided"),
        ((0.2, 2.0), (1.0,)): ("undecided", "undecided"),
        ((-3.0, -1.0), (-2.0, -1.0)): ("no", "no"),
        ((-3.0, -1.0), (-4.0, -0.1)): ("no", "undecided"),
        ((-1.0, 1.0), (0.5, 0.5)): ("undecided", "undecided"),
    }
    for (interval, seeds), wanted in cases.items():
        test = {"interval": interval, "seeds": list(seeds)}
        assert tuple(_verdict(kind, test) for kind in ("ahead", "level")) == wanted, (interval, seeds)


def test_queries_seen_by_ndcg_alone_are_told_as_such():
    from samer.report.findings import discriminates

    def row(name, recall, ndcg):
        tests = {"r@1": {"interval": recall}, "ndcg@10": {"interval": ndcg}}
        return {"of": ("untouched", "none"), "minus": ("untouched", name), "captions": tests}

    rows = [row("random", (0.1, 2), (0.1, 2)), row("grid", (-0.1, 2), (0.1, 2))]
    said = discriminates(rows, "untouched", "captions", 4)
    assert said == (
        "Captions can tell compressors apart at K = 4, with the projection untouched (grid by nDCG@10 alone)."
    )


def test_phrases_that_end_alike_answer_and_nameless_ones_are_not_asked():
    records = [
        image("0", phrase("a dog", LEFT), phrase("one", SMALL), phrase("the others", RIGHT), phrase("s", LEFT)),
        image("1", phrase("a big brown dog", SMALL), phrase("a dog house", RIGHT)),
        image("2", phrase("brown dog")),
        image("3", phrase("a hotdog", LEFT)),
    ]
    found = phrase_queries(records)
    assert list(found.texts) == ["dog", "big brown dog", "dog house", "hotdog"]
    assert found.positives.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 1], [2, 1], [3, 3]]
    assert found.sizes == pytest.approx([0.5, 0.02, 0.5, 0.5])


def test_queries_that_discriminate_are_told_from_those_that_do_not(found):
    rows, _, results = found
    text = markdown(results)
    assert re.findall("^## .*", text, re.M)[:2] == ["## Can these queries tell compressors apart?", "## Claims"]
    for name, how in itertools.product(
        ("Captions", "Phrases", "Rare phrases"), ("with the projection untouched", "after the same training")
    ):
        assert f"{name} can tell compressors apart at K = 8, {how}." in text
    flat = results_of(rows, planted(rows, dict.fromkeys(LOSSES, 0.0)))
    assert "Captions can't tell compressors apart at K = 8, after the same training." in markdown(flat)
    assert all(abs(row["captions"]["r@1"]["difference"]) < 4 for row in flat["discriminates"])
    one = results_of(rows, planted(rows, {**LOSSES, "grid": 0.0}))
    assert "Captions can tell only random from all tokens at K = 8, with the projection untouched." in markdown(one)


def test_contrary_findings_stand_before_the_others(found):
    text = markdown(found[2])
    contrary, undecided, holds = (text.index(f"{word}, captions: ") for word in ("Contrary", "Undecided", "Holds"))
    assert contrary < undecided < holds < text.index("## Untouched projection")
    assert "samer, farthest, trained: level with all tokens" in text[contrary : text.index("Contrary, phrases")]


def test_tables_hold_what_the_results_do(found):
    """Cells of phrases, sizes and controls, recomputed from the results."""
    rows, measured, results = found
    table = markdown(results).split("## Short phrases\n")[1].split("\n## ")[0]
    assert table.startswith("\n130 phrases that have boxes, as typed")
    lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    row = next(r for r in results["rows"] if (r["section"], r["name"]) == ("adapted", "hpool"))
    own, few = row["phrases"], row["rare_phrases"]
    hits = values_of(rows, measured, ("adapted", "hpool"), "phrase:r@1")
    assert own["r@1"] == pytest.approx(hits.mean(), abs=2e-4)
    assert own["interval"] == pytest.approx(list(naive_test(hits, ASKED.owners, 1000, 0)[0]), abs=2e-4)
    assert own["spread"] is not None
    assert few["r@1"] != own["r@1"]
    assert few["r@1"] == pytest.approx(hits[ASKED.held_by <= RARE].mean(), abs=2e-4)
    cell = "{:.1f} ± {:.1f} [{:.1f}, {:.1f}]".format(own["r@1"], own["spread"], *own["interval"])
    assert f"| hpool, trained | {cell} | {own['r@5']:.1f} |" in lines["hpool, trained"]
    assert results["sizes"]["phrases_by_bin"] == [0, 130, 0, 0]
    assert results["sizes"]["captions_by_bin"] == [0, 600, 0, 0]
    assert own["r@1_by_bin"] == [None, own["r@1"], None, None]
    assert row["r@1_by_bin"] == [None, row["r@1"], None, None]
    entry = next(e for e in results["against"] if e["of"] == ("adapted", "hpool"))
    test = entry["captions"]["r@1"]
    said = "p < 0.001" if test["p"] < 0.001 else f"p {test['p']:.3f}"
    cell = "{:+.1f} [{:+.1f}, {:+.1f}] ".format(test["difference"], *test["interval"]) + said
    assert f"| hpool, trained | {cell} |" in markdown(results)


def test_results_of_before_still_make_tables(found):
    """Without any key that came with phrases and tests."""
    results = json.loads(json.dumps(found[2]))
    before = {key: value for key, value in results.items() if key not in ("discriminates", "claims", "against")}
    del before["about"]["phrases"]
    before["sizes"] = {key: before["sizes"][key] for key in ("edges", "captions")}
    for row in before["rows"]:
        for key in ("phrases", "rare_phrases", "r@1_by_bin"):
            del row[key]
    for entry in before["differences"]:
        for part in (entry, *filter(None, [*entry["by_size"], *entry["by_objects"].values()])):
            del part["p"]
    text = markdown(before)
    assert "## Untouched projection" in text
    assert not [word for word in ("Short phrases", "By size", "Against the controls", "Claims") if f"## {word}" in text]


# --- names and plans --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LaterConfig(MergeConfig):
    later: int = 5


def test_a_setting_that_came_later_leaves_names_as_they_were():
    """Or projectors of earlier runs would be trained again."""
    assert slug(MergeConfig(num_regions=16, center_init="farthest")) == "samer-farthest-16-8a424116"
    for settings in ({}, {"compressor": "kmeans"}, {"num_regions": 8, "spatial_weight": 0.0}):
        assert slug(LaterConfig(**settings)) == slug(MergeConfig(**settings))
    assert slug(LaterConfig(later=4)) != slug(LaterConfig())


def test_methods_select_rows_by_what_compresses_and_what_trains():
    rows = plan(MergeConfig(), 1030, (), ("none", "samer"))
    every = plan(MergeConfig(), 1030)
    wanted = lambda row: {m.compressor for m in (row.merge, row.trained) if m} <= {"none", "samer"}
    assert rows == [row for row in every if wanted(row)]
    names = {(row.section, row.name) for row in rows}
    assert ("crossed", "trained through samer, raster, all tokens") in names
    assert ("crossed", "trained through samer, raster, hpool") not in names
    assert ("crossed", "trained with all tokens, hpool") not in names
    assert plan(MergeConfig(), 1030, (), tuple(COMPRESSORS)) == every


def test_given_budgets_replace_the_shares():
    rows = [row for row in plan(MergeConfig(), 256, (48, 8), ("kmeans",)) if row.section == "budgets"]
    assert [(row.name, row.merge.num_regions) for row in rows] == [("kmeans @ 48", 48), ("kmeans @ 8", 8)]


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "run.yaml"
    path.write_text(f"model:\n  name: {base}\nmerge:\n  num_regions: 8\ntrain:\n  bf16: false\n")
    return path


@pytest.fixture(scope="module")
def run(script, world, settings, stored):
    def call(out, *rest, data=world, features=stored / "phrases"):
        words = ["--data-root", data, "--out", out, "--config", settings, "--seeds", 0]
        given = ["--features", features] if features else []
        return script("compare").main([str(word) for word in (*words, *given, *rest)])

    return call


UNTOUCHED = ("--sections", "untouched", "budgets", "phrases", "--methods", *MAIN[:4])


def test_a_run_asks_phrases_of_every_row(run, base, stored, records, tmp_path, monkeypatch, capsys):
    results = run(tmp_path / "out", *UNTOUCHED, "--budgets", 20, 5)
    names = [(row["section"], row["name"]) for row in results["rows"]]
    wanted = [f"{name} @ {k}" for k in (20, 5) for name in ("random", "grid", "kmeans")]
    assert names == [
        *(("untouched", name) for name in MAIN[:4]),
        *(
            ("budgets", name)
            for name in sorted(wanted, key=lambda n: (-int(n.split()[-1]), list(COMPRESSORS).index(n.split()[0])))
        ),
    ]
    queries = phrase_queries(records)
    about = results["about"]["phrases"]
    assert (about["count"], about["most_images"]) == (len(queries.texts), int(queries.held_by.max()))
    assert about["of_one_image"] == sum(int(held) == 1 for held in queries.held_by)
    store = FeatureStore(stored / "phrases", str(base))
    for row in results["rows"]:
        merge = MergeConfig(**row["merge"])
        values = measure(store, records, {"it": merge}, 32, Asked(phrases=queries))["it"]
        for name in ("r@1", "r@5", "ndcg@10", "mrr"):
            assert row["phrases"][name] == pytest.approx(float(values[f"phrase:{name}"].double().mean()), abs=2e-4)
    text = (tmp_path / "out" / "results.md").read_text()
    assert re.search("^## .*", text, re.M)[0] == "## Can these queries tell compressors apart?"
    assert "## Short phrases by budget" in text
    assert {path.stem for path in (tmp_path / "out").glob("*.svg")} >= {"phrases_budget", "recall_budget"}
    out = capsys.readouterr().out
    assert "10 rows: 0 projectors to train (1 seeds), 10 measurements" in out
    assert f"asked beside the captions: {len(queries.texts)} phrases" in out
    assert "[1/1] untouched, seed 0: 10 rows, 10 measurements to go" in out

    def refuse(*_):
        raise AssertionError("nothing was left to do")

    monkeypatch.setattr(compare_run, "measure", refuse)
    assert run(tmp_path / "out", *UNTOUCHED, "--budgets", 20, 5) == results
    assert "nothing left to train or measure" in capsys.readouterr().out


def test_measurements_without_phrases_stay_usable_and_are_made_anew_with_them(run, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(compare_run, "measure", lambda *words: calls.append(words[4].phrases) or measure(*words))
    words = ("--sections", "untouched", "--methods", "none", "kmeans")
    first = run(tmp_path / "out", *words)
    capsys.readouterr()
    assert run(tmp_path / "out", *words) == first
    assert "nothing left to train or measure" in capsys.readouterr().out
    second = run(tmp_path / "out", "--sections", "untouched", "phrases", *words[2:])
    assert "2 measurements to go" in capsys.readouterr().out
    assert [phrases is None for phrases in calls] == [True, False]
    assert [row["r@1"] for row in second["rows"]] == [row["r@1"] for row in first["rows"]]


def test_a_store_without_phrases_is_refused_where_they_are_named(run, stored, tmp_path, capsys):
    with pytest.raises(InputError, match=r"no features of \d+ of \d+ phrases of test; run features with --phrases"):
        run(tmp_path / "out", *UNTOUCHED, features=stored / "captions")
    assert not (tmp_path / "out" / "measured").exists()


def test_all_sections_of_a_store_without_phrases_are_run_without(stored, base, world, tmp_path, monkeypatch, capsys):
    from samer.compare import write
    from samer.config import load_config

    seen = []

    def stop(*_, **asked):
        seen.append(asked["sections"])
        raise InputError("enough")

    monkeypatch.setattr(write, "compare", stop)
    for name in ("captions", "phrases"):
        config = load_config(None, [f"model.name={base}", f"data.root={world}", f"data.features={stored / name}"])
        with pytest.raises(InputError, match="enough"):
            write.write_comparison(config, tmp_path, seeds=[0], sections=None, split="test", device=torch.device("cpu"))
    assert ["phrases" in sections for sections in seen] == [False, True]
    assert capsys.readouterr().out.count("holds no phrases of test, so none are asked") == 1


def test_features_of_a_run_hold_the_phrases_of_the_split_measured(run, base, records, world, tmp_path):
    rest = ("--sections", "untouched", "phrases", "--methods", "none")
    results = run(tmp_path / "out", *rest, "data.limit_eval_images=4", features=None)
    assert results["about"]["phrases"]["count"] == len(phrase_texts(records[:4]))
    store = FeatureStore(tmp_path / "out" / "features", str(base))
    train = phrase_texts(flickr.load_split(world, "train", boxes=True))
    assert set(store.lacking(train)) == set(train) - set(phrase_texts(records[:4]))


def test_scenes_that_satisfy_a_caption_are_stated(run, world, records, tmp_path):
    data = shutil.copytree(world, tmp_path / "data")
    ids = [record.image_id for record in records]
    content = {ids[0]: [[ids[1], ids[2]], [], [], [], []], ids[4]: [[], [ids[0]], [], [], ["not here"]]}
    (flickr.find_layout(data).splits / "relevant.json").write_text(json.dumps(content))
    words = ("--sections", "untouched", "--methods", "none", "kmeans")
    alone, more = run(tmp_path / "out", *words), run(tmp_path / "out", *words, data=data)
    assert more["about"]["relevant"] == {"captions": 2, "others": 3}
    assert "relevant" not in alone["about"]
    assert [row["ndcg@10"] for row in more["rows"]] != [row["ndcg@10"] for row in alone["rows"]]  # measured anew
    text = (tmp_path / "out" / "results.md").read_text()
    assert "Relevant is every scene that satisfies a caption, by `relevant.json`: 2 of 40 captions" in text


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (["--sections", "phrases", "cost"], "sections phrases: they are asked of the rows of other sections"),
        (["--methods", "none", "magic"], "methods magic: use some of none, samer"),
        (["--sections", "banks"], "sections banks: there is none; give them as --banks NAME=FILE"),
        (["--banks", "a/b=bank.safetensors"], "--banks 'a/b': a name is up to 40 letters"),
        (["--sections", "banks", "--banks", "lost=/nowhere/bank.safetensors"], "there is no such file"),
        (["--budgets", "8", "8"], r"budgets \[8, 8\]: give each once"),
        (["--budgets", "0"], r"budgets \[0\]: give each once, none below 1"),
        (["--sections", "budgets", "--budgets", "8", "70"], r"budgets \[8, 70\]: an image has 70 tokens at most"),
    ],
)
def test_requests_that_can_not_be_run_are_named(run, tmp_path, rest, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", *rest)
    assert not (tmp_path / "out").exists()


def test_a_bank_of_queries_is_of_the_captions_trained_on(run, world, tmp_path, monkeypatch):
    class Banked(GridPooling):
        needs_queries = True

    for registry in (COMPRESSORS, compare_plan.COMPRESSORS):
        monkeypatch.setitem(registry, "banked", Banked)
    banks, fitted = [], compare_measure.fitted_compressors

    def spy(encoder, records, merges, batch_size, bank_texts, given):
        banks.append(bank_texts)
        return fitted(encoder, records, merges, batch_size, bank_texts, given)

    monkeypatch.setattr(compare_measure, "fitted_compressors", spy)
    words = ("--sections", "untouched", "--methods", "banked")
    run(tmp_path / "out", *words)
    train = [c.text for r in flickr.load_split(world, "train", boxes=False) for c in r.captions]
    assert banks == [tuple(dict.fromkeys(train))]
    run(tmp_path / "out", *words, "data.limit_train_images=3")
    assert banks[1:] == [tuple(dict.fromkeys(train[:15]))]  # another bank, measured anew
    with pytest.raises(InputError, match="splits train and train share images"):
        run(tmp_path / "out", *words, "--split", "train")
    with pytest.raises(InputError, match="captions of val, of which the bank of queries is made"):
        run(tmp_path / "out", *words, "data.train_split=val")


def test_banks_of_other_texts_are_measured_beside_the_own_one(run, world, base, stored, tmp_path, script):
    """A given bank of the training captions gives what the own one gives, and that of one text something else."""
    (tmp_path / "one.txt").write_text("a red circle .\n")
    for name, source in (
        ("same", ("--data-root", world, "--split", "train", "--features", stored / "phrases")),
        ("one", ("--texts", tmp_path / "one.txt")),
    ):
        words = (*source, "--out", tmp_path / f"{name}.safetensors", f"model.name={base}")
        script("bank").main([str(word) for word in words])
    banks = [f"{name}={tmp_path / name}.safetensors" for name in ("same", "one")]
    results = run(tmp_path / "out", "--sections", "banks", "phrases", "--banks", *banks, "merge.num_regions=3")
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["none", "kmeans", "querybank", "querybank, same", "querybank, one"]
    assert rows["querybank, same"]["ndcg@10"] == rows["querybank"]["ndcg@10"]
    assert rows["querybank, one"]["osr"] < rows["querybank"]["osr"]
    assert results["about"]["banks"]["querybank, one"].startswith("9 vectors of 1 texts")
    controls = {tuple(entry["of"]): [] for entry in results["against"]}
    for entry in results["against"]:
        controls[tuple(entry["of"])].append(entry["minus"][1])
    assert controls["banks", "querybank, one"] == ["none", "kmeans", "querybank"]
    assert "## Banks of other texts" in (tmp_path / "out" / "results.md").read_text()
    (tmp_path / "one.txt").write_text("a blue square .\n")
    words = ("--texts", tmp_path / "one.txt", "--out", tmp_path / "one.safetensors", f"model.name={base}")
    script("bank").main([str(word) for word in words])
    again = run(tmp_path / "out", "--sections", "banks", "phrases", "--banks", *banks, "merge.num_regions=3")
    assert again["rows"][4]["osr"] != results["rows"][4]["osr"]  # measured anew


def test_a_trained_query_bank_is_measured_as_an_index_with_its_projector(run, world, base, tmp_path):
    rest = ("--sections", "untouched", "adapted", "--methods", "none", "querybank", "train.dataloader_num_workers=0")
    results = run(tmp_path / "out", *rest, "train.num_train_epochs=1", "train.learning_rate=2e-2")
    claims = {claim["claim"] for claim in results["claims"]}
    assert {"querybank, trained: level with all tokens", "querybank: training helps"} <= claims
    (row,) = [row for row in results["rows"] if (row["section"], row["name"]) == ("adapted", "querybank")]
    merge, retriever = MergeConfig(**row["merge"]), Retriever.load(str(base))
    retriever.use_projector(load_projector(tmp_path / "out" / "projectors" / f"{slug(merge)}-seed0", retriever))
    build_index(tmp_path / "index", world, ["test"], retriever, merge, dtype="float32")
    found = both_directions(*Index(tmp_path / "index").scores("test"))
    for name in ("r@1", "r@5", "ndcg@10"):
        assert row[name] == pytest.approx(found["text_to_image"][name]["value"], abs=2e-4)


# --- how long it takes ------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""

    class Clock:
        now = 0.0

        @classmethod
        def monotonic(cls):
            return cls.now

    monkeypatch.setattr(compare_pace, "time", Clock)
    return Clock


def test_what_is_left_and_how_long_it_takes(clock, capsys):
    pace = Pace({("a", 0): 1, ("a", 1): 1, ("b", 0): 1}, {("none", 0): 4, ("a", 0): 2, ("a", 1): 2, ("b", 0): 2})
    assert str(pace) == "3 trainings and 10 measurements to go"

    def took(kind, job, seconds):
        with pace.timed(kind, job):
            clock.now += seconds
        return capsys.readouterr().out

    assert took("measurements", ("none", 0), 40.0) == "measurements: 10 s each, so 6 more take about 60 s\n"
    assert str(pace) == "3 trainings and 6 measurements to go"
    assert took("trainings", ("a", 0), 300.0) == "trainings: 5 min each, so 2 more take about 10 min\n"
    assert str(pace) == "2 trainings and 6 measurements to go, about 11 min"
    assert took("measurements", ("a", 0), 60.0) == ""  # (40 + 60) / 6 each from now on
    assert str(pace) == "2 trainings and 4 measurements to go, about 11 min"
    assert took("trainings", ("c", 5), 999.0) == ""  # there already, so no measure of anything
    assert str(pace) == "2 trainings and 4 measurements to go, about 11 min"
    for job in (("a", 1), ("b", 0)):
        took("trainings", job, 10.0)
        took("measurements", job, 10.0)
    assert str(pace) == "nothing left to train or measure"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (8.24, "8.2 s"),
        (40.4, "40 s"),
        (99, "99 s"),
        (125, "2 min"),
        (5400, "90 min"),
        (12240, "3 h 24 min"),
    ],
)
def test_times_in_words(seconds, words):
    assert spoken(seconds) == words


def test_processes_share_the_compressions_and_get_all_values(stored, world, base, monkeypatch):
    """Each measures its own; together they are what one process measures, in the order asked for."""
    store, records = FeatureStore(stored / "phrases", str(base)), flickr.load_split(world, "test", boxes=True)
    merges = {name: MergeConfig(num_regions=3, compressor=name) for name in ("samer", "none", "kmeans")}
    whole, parts = measure(store, records, merges, 8), []
    monkeypatch.setattr(compare_measure, "world_size", lambda: 2)
    for number in range(2):
        monkeypatch.setattr(compare_measure, "rank", partial(int, number))
        monkeypatch.setattr(compare_measure, "gather_objects", lambda part: [parts.append(part), part][1:])
        measure(store, records, merges, 8)
    assert [list(part) for part in parts] == [["samer", "kmeans"], ["none"]]
    monkeypatch.setattr(compare_measure, "gather_objects", lambda _: parts)
    together = measure(store, records, merges, 8)
    assert list(together) == list(whole)
    for key, values in whole.items():
        assert all(torch.equal(together[key][name], value) or value.isnan().any() for name, value in values.items())


def test_what_several_compressors_learn_from_is_encoded_once(stored, world, base, monkeypatch):
    store, records = FeatureStore(stored / "phrases", str(base)), flickr.load_split(world, "test", boxes=False)
    seen, encode = [], store.encode_images
    monkeypatch.setattr(store, "encode_images", lambda inputs, needs=(): seen.append(1) or encode(inputs, needs))
    merges = {str(k): MergeConfig(num_regions=k, compressor="hpc") for k in (2, 3, 4)}
    together = fitted_compressors(store, records, merges, 2)
    once = len(seen)
    alone = {key: fitted_compressor(store, records, merge, 2) for key, merge in merges.items()}
    assert len(seen) == 4 * once
    for key, compressor in together.items():
        ours, theirs = compressor.state(), alone[key].state()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
