"""samer.mteb: MTEB runs on our index, its scores are those of a plain full search, and costs stand beside them."""

import json
import math
import sys

import pytest
import torch
from parquet_sets import beir_form, page, stored

from samer import InputError, MergeConfig
from samer.compressors import make_compressor
from samer.data import make_reader
from samer.data.pictures import load_image
from samer.retrievers.banks import query_states
from samer.retrievers.base import Projector
from samer.scoring import maxsim

datasets = pytest.importorskip("datasets", reason="needs mteb")
mteb = pytest.importorskip("mteb", "2.26", reason="needs mteb 2.26")
ours = pytest.importorskip("samer.mteb")
protocols = pytest.importorskip("mteb.models.models_protocols")

MERGE = MergeConfig(num_regions=5, center_init="farthest")


class About:
    """What a search reads of a task's metadata."""

    name = "Some/Task"


PLACE = {"task_metadata": About, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {}, "num_proc": None}


def search_in(folder, retriever, **more):
    return ours.SamerSearch(retriever, MERGE, folder, **{"dtype": "float32", "batch_size": 3, **more})


@torch.no_grad()
def full_scores(retriever, pictures, texts):
    """(Q, I) without an index."""
    queries = retriever.encode_queries(retriever.query_inputs(texts))
    merged = make_compressor(MERGE)(retriever.encode_images(retriever.image_inputs(pictures)))
    return maxsim(queries.tokens, merged.tokens, queries.mask, merged.mask)


def ndcg(ranked, grades, most):
    """By the formula, with linear gains."""
    gains = [grades.get(name, 0) for name in ranked[:most]]
    ideal = sorted(grades.values(), reverse=True)[:most]
    total = lambda row: sum(gain / math.log2(place + 2) for place, gain in enumerate(row))
    return total(gains) / total(ideal)


def corpus_of(pictures, names=None):
    """A corpus as the hub's tasks have it: pictures inside the table."""
    rows = {"id": names or [f"p{k}" for k in range(len(pictures))], "image": pictures}
    features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    return datasets.Dataset.from_dict(rows, features=features)


def queries_of(texts):
    return datasets.Dataset.from_dict({"id": [f"q{k}" for k in range(len(texts))], "text": texts})


def test_a_local_task_scores_as_a_full_search(tmp_path, world, retriever, monkeypatch):
    monkeypatch.setattr("samer.index.write.IMAGES_PER_SHARD", 3)  # several shards
    monkeypatch.setattr(ours, "QUERIES_AT_ONCE", 7)
    search = search_in(tmp_path / "indexes", retriever)
    assert isinstance(search, protocols.SearchProtocol)
    task = ours.LocalTask(world, "test")
    (row,) = ours.evaluate(search, [task], tmp_path / "results")
    records = make_reader("", world).load_split(world, "test", boxes=False)
    texts = [caption.text for record in records for caption in record.captions]
    owner = [record.image_id for record in records for _ in record.captions]
    scores = full_scores(retriever, [load_image(r.image_path, retriever.picture_size) for r in records], texts)
    names = [record.image_id for record in records]
    ranked = [[names[k] for k in each.argsort(descending=True)] for each in scores]
    for most in (5, 10):
        expected = sum(ndcg(each, {own: 1}, most) for each, own in zip(ranked, owner)) / len(owner)
        assert row[f"ndcg_at_{most}"] == pytest.approx(expected, abs=1e-4)
    assert row["recall_at_1"] == pytest.approx(sum(r[0] == own for r, own in zip(ranked, owner)) / len(owner), abs=1e-4)
    assert (row["score"], row["main_score"]) == (row["ndcg_at_10"], "ndcg_at_10")
    assert (row["pages"], row["queries"], row["vectors_per_page"]) == (8, len(texts), 5)
    assert row["bytes_per_page"] == 5 * (16 * 4 + 1)  # float32, and the mask
    assert len(list((tmp_path / "indexes").rglob("images-*.safetensors"))) == 3
    (file,) = [path for path in (tmp_path / "results").rglob("*.json") if path.stem == task.metadata.name]
    held = json.loads(file.read_text())["scores"]["test"][0]
    assert held["bytes_per_page"] == row["bytes_per_page"]
    assert {"index_seconds", "search_seconds", "vectors_per_page"} <= set(held)
    monkeypatch.setattr(retriever, "image_inputs", None)  # results that are there are taken
    assert ours.evaluate(search, [ours.LocalTask(world, "test")], tmp_path / "results")[0]["score"] == row["score"]
    assert json.loads((tmp_path / "results" / "results.json").read_text())["rows"][0]["score"] == row["score"]
    assert ours.told(row).startswith(f"{task.metadata.name}: ndcg_at_10 {row['score']:.4f}; 8 pages x 5.0 vectors")


def test_a_corpus_with_its_pictures_inside(tmp_path, retriever):
    pictures = [page(k) for k in range(7)]
    texts = ["two dogs", "a long query about nothing", "red", "green"]
    search = search_in(tmp_path, retriever)
    search.index(corpus_of(pictures), **PLACE)
    found = search.search(queries_of(texts), top_k=4, **PLACE)
    expected = full_scores(retriever, pictures, texts)
    assert list(found) == [f"q{k}" for k in range(4)]
    for row, hits in zip(expected, found.values()):
        assert list(hits) == [f"p{k}" for k in row.argsort(descending=True)[:4]]
        assert all(abs(score - row[int(name[1:])]) < 1e-4 for name, score in hits.items())
    some = search.search(queries_of(texts), top_k=2, top_ranked={"q1": ["p0", "p3", "p6"], "q2": ["p5"]}, **PLACE)
    assert [list(hits) for hits in some.values()][0::3] == [[], []]
    assert set(some["q1"]) < {"p0", "p3", "p6"}
    assert len(some["q1"]) == 2
    assert list(some["q2"]) == ["p5"]


def test_an_index_goes_on_and_sees_a_page_that_changed(tmp_path, retriever, monkeypatch):
    seen = []
    prepared = retriever.image_inputs
    monkeypatch.setattr(retriever, "image_inputs", lambda images: seen.append(len(images)) or prepared(images))
    search = search_in(tmp_path, retriever)
    pictures = [page(k) for k in range(5)]
    search.index(corpus_of(pictures), **PLACE)
    assert sum(seen) == 5
    search_in(tmp_path, retriever).index(corpus_of(pictures), **PLACE)
    assert sum(seen) == 5
    pictures[3] = page(11)
    search.index(corpus_of(pictures), **PLACE)
    assert sum(seen) == 10
    found = search.search(queries_of(["two dogs"]), top_k=5, **PLACE)["q0"]
    expected = full_scores(retriever, pictures, ["two dogs"])[0]
    assert found["p3"] == pytest.approx(float(expected[3]), abs=1e-4)
    with pytest.raises(InputError, match="num_regions"):
        ours.SamerSearch(retriever, MergeConfig(num_regions=4), tmp_path, dtype="float32").index(
            corpus_of(pictures), **PLACE
        )


def test_a_task_of_mteb_in_two_languages_encodes_its_pages_once(tmp_path, retriever, monkeypatch):
    seen = []
    prepared = retriever.image_inputs
    monkeypatch.setattr(retriever, "image_inputs", lambda images: seen.append(len(images)) or prepared(images))
    task = mteb.get_task("Vidore3HrRetrieval", hf_subsets=["english", "french"])
    pictures, texts = [page(k) for k in range(6)], {"english": ["two dogs", "red"], "french": ["deux chiens", "rouge"]}
    grades = {"q0": {"p1": 2, "p4": 1}, "q1": {"p0": 1}}
    task.dataset = {
        language: {
            "test": {
                "corpus": corpus_of(pictures),
                "queries": queries_of(own),
                "relevant_docs": {query: dict(row) for query, row in grades.items()},
                "top_ranked": None,
            }
        }
        for language, own in texts.items()
    }
    task.data_loaded = True
    rows = ours.evaluate(search_in(tmp_path / "i", retriever), [task], tmp_path / "r")
    assert sum(seen) == 6
    assert {row["subset"] for row in rows} == {"english", "french"}
    for row in rows:
        scores = full_scores(retriever, pictures, texts[row["subset"]])
        ranked = [[f"p{k}" for k in each.argsort(descending=True)] for each in scores]
        expected = sum(ndcg(each, grades[f"q{k}"], 10) for k, each in enumerate(ranked)) / 2
        assert row["score"] == pytest.approx(expected, abs=1e-4)
        assert row["vectors_per_page"] == 5


def test_a_folder_of_vidore_keeps_its_grades(tmp_path):
    queries = [(0, "two dogs", "english"), (1, "a red bar", "english")]
    qrels = [(0, 2, 2, []), (0, 3, 1, []), (1, 0, 1, [])]
    root = beir_form(tmp_path / "vidore", "v3", range(5), queries, qrels)
    task = ours.LocalTask(root, "test", main_score="ndcg_at_5")
    held = task.dataset["default"]["test"]
    assert held["relevant_docs"] == make_reader("", root).grades(root, "test")
    assert held["relevant_docs"]["0"] == {"2": 2, "3": 1}
    assert dict(zip(held["queries"]["id"], held["queries"]["text"])) == {"0": "two dogs", "1": "a red bar"}
    assert held["corpus"]["id"] == [str(k) for k in range(5)]
    assert held["corpus"][3]["image"].size == page(3).size
    assert task.metadata.main_score == "ndcg_at_5"
    other = beir_form(tmp_path / "other", "v3", range(5), queries, [*qrels[:-1], (1, 4, 1, [])])
    assert ours.LocalTask(other, "test").metadata.revision != task.metadata.revision
    assert ours.LocalTask(root, "test", main_score="ndcg_at_5").metadata.revision == task.metadata.revision


def test_results_of_other_data_are_not_taken_for_those_of_this(tmp_path, retriever):
    queries, grades = [(0, "two dogs", "english"), (1, "red", "english")], [(0, 1, 1, []), (1, 2, 1, [])]
    root = beir_form(tmp_path / "one/docs", "v2", range(6), queries, grades)
    other = beir_form(tmp_path / "two/docs", "v2", range(9), queries, [(0, 7, 1, []), (1, 5, 1, [])])
    rows = {}
    for name, place, most in (("whole", root, None), ("some", root, 4), ("other", other, None), ("again", root, None)):
        task = ours.LocalTask(place, "test", limit_images=most)
        assert task.metadata.name == "docs-test"
        (rows[name],) = ours.evaluate(search_in(tmp_path / "i", retriever), [task], tmp_path / "r")
    assert [row["pages"] for row in rows.values()] == [6, 4, 9, 6]
    assert rows["again"]["score"] == rows["whole"]["score"]
    picture = sorted((root / "pages").rglob("*.jpg"))[0]
    page(200).save(picture)  # of another size
    before = task.metadata.revision
    assert ours.LocalTask(root, "test").metadata.revision != before


def test_one_task_at_several_budgets_and_the_rows_of_all_runs(tmp_path, world, retriever):
    task = ours.LocalTask(world, "val")
    for k in (3, 5, 3):  # the last finds its results, and has measured nothing
        search = ours.SamerSearch(retriever, MergeConfig(num_regions=k), tmp_path / str(k), dtype="float32")
        (row,) = ours.evaluate(search, [task], tmp_path / "r")
        assert row["vectors_per_page"] == k
    (row,) = ours.evaluate(ours.SamerSearch(retriever, MERGE, tmp_path / "b", dtype="int8"), [task], tmp_path / "r")
    held = json.loads((tmp_path / "r/results.json").read_text())["rows"]
    assert [each["model"].partition("samer-")[2] for each in held] == ["k5-float32", "k3-float32", "k5-int8"]
    assert held[-1] == row


def test_metadata_tells_budgets_apart(tmp_path, retriever):
    one, other = (ours.SamerSearch(retriever, MergeConfig(num_regions=k), tmp_path).mteb_model_meta for k in (5, "1/8"))
    assert one.name == "samer/retriever-samer-k5-bfloat16"
    assert other.name == "samer/retriever-samer-k1_of_8-bfloat16"
    assert one.experiment_name != other.experiment_name
    assert (one.embed_dim, one.similarity_fn_name.value, one.modalities) == (16, "MaxSim", ["image", "text"])
    whole = ours.SamerSearch(retriever, MergeConfig(compressor="none"), tmp_path).mteb_model_meta
    assert whole.name == "samer/retriever-none-bfloat16"
    bank = MergeConfig(compressor="querybank", num_regions=5)
    projector = retriever.current_projector()
    own = [query_states(retriever, [text], 40, "a test").bank(projector) for text in ("two dogs", "a red car")]
    names = [ours.SamerSearch(retriever, bank, tmp_path, bank=each).mteb_model_meta.experiment_name for each in own]
    assert names[0] != names[1]
    revision = one.revision
    retriever.use_projector(Projector(-projector.weight, projector.bias))
    assert ours.SamerSearch(retriever, MERGE, tmp_path).mteb_model_meta.revision != revision


def test_bad_corpora_are_refused_by_name(tmp_path, retriever):
    search = search_in(tmp_path, retriever)
    with pytest.raises(InputError, match="index the corpus before"):
        search.search(queries_of(["red"]), top_k=3, **PLACE)
    with pytest.raises(InputError, match=r"2 rows of id, text"):
        search.index(queries_of(["a", "b"]), **PLACE)
    with pytest.raises(InputError, match="the id 'b' twice"):
        search.index(corpus_of([page(0), page(1), page(2)], ["a", "b", "b"]), **PLACE)
    with pytest.raises(InputError, match="page 'p1' of the corpus has no picture"):
        search.index(corpus_of([page(0), None]), **PLACE)
    broken = stored(page(1))
    broken["bytes"] = broken["bytes"][:60]
    with pytest.raises(InputError, match="page 'p1' of the corpus: not a readable image"):
        search.index(corpus_of([stored(page(0)), broken]), **PLACE)
    assert not list(tmp_path.rglob("manifest.json"))
    search.index(corpus_of([page(0), page(1)]), **PLACE)
    with pytest.raises(InputError, match="SaMer searches pictures by texts"):
        search.search(corpus_of([page(0)]), top_k=3, **PLACE)
    with pytest.raises(InputError, match="needs a query bank"):
        ours.SamerSearch(retriever, MergeConfig(compressor="querybank"), tmp_path)


def test_bad_tasks_are_refused_by_name(tmp_path, world, retriever):
    with pytest.raises(InputError, match="MTEB has no task 'Vidore9'"):
        ours.named_tasks(["Vidore9"])
    assert ours.named_tasks(["VidoreDocVQARetrieval"])[0].metadata.name == "VidoreDocVQARetrieval"
    other = mteb.get_task("STS12")
    with pytest.raises(InputError, match="STS12 is no retrieval task"):
        ours.evaluate(search_in(tmp_path, retriever), [other], tmp_path / "r")
    root = beir_form(tmp_path / "vidore", "v2", range(3), [(0, "two", "english")], [(0, 1, 1, [])])
    for score in ("ndcg5", "ndcg_at_7", "recall", "_at_5"):
        with pytest.raises(InputError, match=f"main score '{score}': give ndcg, .* as ndcg_at_10"):
            ours.LocalTask(root, "test", main_score=score)
    with pytest.raises(InputError, match="nothing can be asked"):
        ours.LocalTask(root, "test", limit_images=1)


def test_the_script_runs_splits_and_says_what_is_missing(tmp_path, world, base, script, capsys, monkeypatch):
    words = ["--data-root", str(world), "--cache-dir", str(tmp_path), "--device", "cpu"]
    rows = script("tasks").main([*words, "--splits", "test", "val", f"model.name={base}", "merge.num_regions=5"])
    assert [(row["task"], row["pages"], row["vectors_per_page"]) for row in rows] == [
        (f"{world.name}-test", 8, 5),
        (f"{world.name}-val", 6, 5),
    ]
    said = capsys.readouterr().out
    assert f"{world.name}-val: ndcg_at_10 {rows[1]['score']:.4f}" in said
    with pytest.raises(SystemExit):
        script("tasks").main(["--cache-dir", str(tmp_path)])
    for name in ("samer.mteb", "mteb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="mteb"):
        script("tasks").main([*words, f"model.name={base}"])
