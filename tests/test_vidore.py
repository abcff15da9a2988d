"""ViDoRe in each documented form, written and read; its grades in an index, in metrics, in training, in the report."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
import pyarrow.parquet as pq
from parquet_sets import beir_form, box, page, question_form, stored, table

from samer.compare.measure import measure
from samer.compare.queries import Asked, caption_positives
from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig, ObjectsConfig
from samer.data import guess_name, make_reader, parquet
from samer.data.records import LONGEST_CAPTION
from samer.data.survey import Survey, survey
from samer.evaluation import caption_grades, evaluate_records, grade_matrix, score_records
from samer.index.manifest import QueryShard, read_index_manifest, write_index_manifest
from samer.index.read import Index
from samer.runtime.shards import load_shard, write_shard
from samer.training.batches import CaptionDataset, Collator
from samer.training.model import ProjectorModel

READER = make_reader("vidore")
QUERIES = [(0, "Where is the sum?", "english"), (1, "Où est la somme ?", "french"), (2, "Who signed it?", "english")]
# query 0: page 12 answers best, in two judgements; query 1: of two equals the first of the corpus; query 2: page 10
QRELS = [
    (0, 11, 1, [box(0, 0, 10, 60)]),
    (0, 12, 1, []),
    (0, 12, 2, [box(13, 6, 26, 30), box(26, 30, 52, 60, annotator=2)]),
    (1, 14, 1, []),
    (1, 13, 1, [box(0, 30, 53, 60)]),
    (2, 10, 2, []),
]
PAGES = (10, 11, 12, 13, 14)


@pytest.fixture
def v3(tmp_path):
    return beir_form(tmp_path / "v3", "v3", PAGES, QUERIES, QRELS)


def load(root, split="test", **more):
    return READER.load_split(root, split, **{"boxes": False, **more})


def told(records):
    """Image id -> (text, grades) of its captions."""
    return {r.image_id: [(c.text, dict(c.grades)) for c in r.captions] for r in records if r.captions}


# --- each form is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_the_question_form(tmp_path, shards):
    """Pages are distinct names; a null question adds a page; one question of two pages is answered by both."""
    rows = [("How many?", 3), (None, 5), ("Who?", 3), ("How many?", 4), ("  Why\nso? ", 6), ("Who?", 3), ("", 7)]
    records = load(question_form(tmp_path, rows, shards=shards))
    name = "images/doc_{}.png".format
    assert [r.image_id for r in records] == [name(k) for k in (3, 5, 4, 6, 7)]
    assert told(records) == {
        name(3): [("How many?", {name(3): 1, name(4): 1}), ("Who?", {name(3): 1})],
        name(6): [("Why so?", {name(6): 1})],
    }
    for record, number in zip(records, (3, 5, 4, 6, 7)):
        with Image.open(record.image_path) as picture:
            assert ImageChops.difference(picture.convert("RGB"), page(number)).getbbox() is None
    assert not READER.check(tmp_path)


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
@pytest.mark.parametrize("inside", ["", "data"])
def test_the_beir_form(tmp_path, version, inside):
    beir_form(tmp_path / inside, version, PAGES, QUERIES, QRELS)
    records = load(tmp_path)
    assert [r.image_id for r in records] == ["10", "11", "12", "13", "14"]
    assert told(records) == {
        "10": [("Who signed it?", {"10": 2})],
        "12": [("Where is the sum?", {"11": 1, "12": 2})],
        "13": [("Où est la somme ?", {"13": 1, "14": 1})],
    }
    assert READER.grades(tmp_path, "test") == {"0": {"11": 1, "12": 2}, "1": {"13": 1, "14": 1}, "2": {"10": 2}}
    assert READER.check(tmp_path) is (version == "v3")
    for record, number in zip(records, PAGES):
        with Image.open(record.image_path) as picture:
            assert picture.size == page(number).size


@pytest.mark.parametrize("ids", [("_id", "_id"), ("id", "id")])
def test_names_of_columns_that_other_copies_have(tmp_path, ids):
    name = "test.parquet"
    table(tmp_path / "corpus" / name, [ids[0], "image"], [{ids[0]: "a", "image": stored(page(1))}])
    table(tmp_path / "queries" / name, [ids[1], "text"], [{ids[1]: "q", "text": "What?"}])
    rows = [{"query-id": "q", "corpus-id": "a", "score": 1.0}]
    table(tmp_path / "qrels" / name, ["query-id", "corpus-id", "score"], rows)
    assert told(load(tmp_path)) == {"a": [("What?", {"a": 1})]}


def test_one_language_of_several(v3, tmp_path):
    assert told(load(v3, "test@french")) == {"13": [("Où est la somme ?", {"13": 1, "14": 1})]}
    assert set(told(load(v3, "test@english"))) == {"10", "12"}
    assert [r.image_id for r in load(v3, "test@english")] == [r.image_id for r in load(v3)]
    with pytest.raises(InputError, match=r"no query in 'klingon'; there are english, french"):
        load(v3, "test@klingon")
    beir_form(tmp_path / "v1", "v1", PAGES, QUERIES, QRELS)
    with pytest.raises(InputError, match=r"no column language \(it has query-id, query\)"):
        load(tmp_path / "v1", "test@english")


def test_boxes_are_shares_of_the_page(v3):
    """Both annotators' boxes of the judgement of the page that has the query; page 12 is 52 x 60 pixels."""
    captions = {r.image_id: r.captions for r in load(v3, boxes=True)}
    (phrase,) = captions["12"][0].phrases
    assert phrase.visible
    assert captions["12"][0].text[phrase.start : phrase.end] == phrase.text == "Where is the sum?"
    assert phrase.boxes == ((0.25, 0.1, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0))
    assert captions["13"][0].phrases[0].boxes == ((0.0, 0.5, 1.0, 1.0),)
    assert captions["10"][0].phrases == ()
    assert not any(c.phrases for r in load(v3) for c in r.captions)


def test_parts_and_limits_keep_what_their_pages_have(v3):
    assert [r.image_id for r in load(v3, limit_images=2)] == ["10", "11"]
    assert told(load(v3, "test[:2]")) == {"10": [("Who signed it?", {"10": 2})]}
    part = load(v3, "test[2:4]")
    assert told(part)["13"] == [("Où est la somme ?", {"13": 1, "14": 1})]
    assert caption_grades(part) == [[[0, 2]], [[1, 1]]]  # pages 11 and 14 are not among them
    with pytest.raises(InputError, match="limit_images is 0"):
        load(v3, limit_images=0)


def test_pages_are_unpacked_once_and_anew_when_the_table_changes(v3):
    first = load(v3, limit_images=2)
    assert len(list((v3 / "pages").rglob("*.jpg"))) == 2
    stamps = {r.image_path: r.image_path.stat().st_mtime_ns for r in first}
    whole = load(v3)
    assert len(list((v3 / "pages").rglob("*.jpg"))) == 5
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    (corpus,) = (v3 / "corpus").iterdir()
    rows = pq.read_table(corpus).to_pylist()
    rows[0]["image"] = stored(page(20), "JPEG")
    table(corpus, list(rows[0]), rows)
    again = load(v3)
    with Image.open(again[0].image_path) as picture:
        assert picture.size == page(20).size
    assert not whole[0].image_path.exists()
    assert len(list((v3 / "pages").rglob("*.jpg"))) == 5


def test_pages_stay_when_the_table_is_only_touched_and_emptied_ones_are_unpacked_again(v3):
    first = load(v3)
    stamps = [r.image_path.stat().st_mtime_ns for r in first]
    (corpus,) = (v3 / "corpus").iterdir()
    os.utime(corpus, ns=(1, 1))
    assert [r.image_path for r in load(v3)] == [r.image_path for r in first]
    assert [r.image_path.stat().st_mtime_ns for r in first] == stamps
    content = first[1].image_path.read_bytes()
    first[1].image_path.write_bytes(b"")
    load(v3)
    assert first[1].image_path.read_bytes() == content


def test_several_processes_unpack_at_once(v3):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load(v3), range(4)))
    assert all(records == found[0] for records in found)
    for record, number in zip(found[0], PAGES):
        with Image.open(record.image_path) as picture:
            assert picture.size == page(number).size
    assert not [p for p in (v3 / "pages").rglob("*") if p.name.endswith("samer-tmp")]


def test_what_another_process_has_begun_is_not_removed(v3, monkeypatch):
    first = load(v3)  # by the other process, just after this one has asked whether the folder is there
    place = first[0].image_path.parent
    begun, is_dir = iter([False]), parquet.is_dir
    monkeypatch.setattr(parquet, "is_dir", lambda path: next(begun, True) if path == place else is_dir(path))
    writes, atomic_path = [], parquet.atomic_path

    def seen(path):
        writes.append(place.is_dir())
        return atomic_path(path)

    monkeypatch.setattr(parquet, "atomic_path", seen)
    assert load(v3) == first
    assert writes
    assert all(writes)


def test_a_long_query_is_cut_and_told(tmp_path, capsys):
    text = "word " * 300
    root = beir_form(tmp_path, "v3", [1], [(5, text, "english")], [(5, 1, 1, [box(0, 0, 20, 20)])])
    ((caption,),) = [r.captions for r in load(root, boxes=True)]
    assert len(caption.text) <= LONGEST_CAPTION
    assert (caption.query_id, dict(caption.grades)) == ("5", {"1": 1})
    assert caption.phrases[0].text == caption.text
    assert "1 queries of 1 files are cut to 1,000 characters (test-00000-of-00001.parquet)" in capsys.readouterr().out


# --- what is wrong is named -------------------------------------------------------------------------------------------


def refusal(root, split="test", **more):
    with pytest.raises(InputError) as caught:
        load(root, split, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_places_without_tables(tmp_path, v3):
    assert "not a folder" in refusal(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no parquet tables" in refusal(tmp_path / "empty")
    (v3 / "qrels").rename(v3 / "judgements")
    assert refusal(v3) == f"{v3}: corpus is there, but no folder qrels; restore it"
    (v3 / "qrels").mkdir()
    assert refusal(v3).startswith(f"{v3 / 'qrels'}: no parquet file")


def test_a_split_that_is_not_there(v3, tmp_path):
    assert refusal(v3, "train") == f"{v3}: queries has no split 'train'; use one of test"
    question_form(tmp_path, [("Who?", 1)])
    assert refusal(tmp_path, "val") == f"{tmp_path}: data has no split 'val'; use one of test"


def test_a_part_of_a_split_that_is_missing(tmp_path):
    question_form(tmp_path, [("Who?", 1), ("Why?", 2), ("How?", 3)], shards=3)
    (tmp_path / "data/test-00001-of-00003.parquet").unlink()
    assert "test-00001-of-00003.parquet: missing" in refusal(tmp_path)
    question_form(tmp_path, [("Who?", 1)], split="val")
    assert len(load(tmp_path, "val")) == 1  # another split's parts don't matter


@pytest.mark.parametrize("damage", [b"", b"PAR1 and no more", None])
def test_a_damaged_file(v3, damage):
    (path,) = (v3 / "qrels").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert refusal(v3).startswith(f"{path}: no whole parquet file (")


CASES = [
    ("corpus", lambda rows: [{k: v for k, v in row.items() if k != "image"} for row in rows], "no column image"),
    ("corpus", lambda rows: [*rows, rows[1]], "row 5: corpus_id '11' is there twice"),
    ("corpus", lambda rows: [{**rows[0], "corpus_id": None}, *rows[1:]], "row 0: corpus_id is empty"),
    ("corpus", lambda rows: [{**r, "image": {"bytes": None, "path": "a.png"}} for r in rows], "row 0: image holds no"),
    ("queries", lambda rows: [{"query_id": row["query_id"]} for row in rows], "no column query or text"),
    ("queries", lambda rows: [*rows, rows[2]], "row 3: query_id '2' is there twice"),
    ("queries", lambda rows: [rows[0], {**rows[1], "query": None}], "row 1: query is empty"),
    ("queries", lambda rows: [{**row, "query": 1.5} for row in rows], "row 0: query is 1.5, no text"),
    ("qrels", lambda rows: [{**row, "score": -1} for row in rows], "row 0: score is -1; a grade is a whole number"),
    ("qrels", lambda rows: [{**row, "score": 0.5} for row in rows], "row 0: score is 0.5; a grade"),
    ("qrels", lambda rows: [{**row, "score": None} for row in rows], "row 0: score is None; a grade"),
    ("qrels", lambda rows: [{**row, "bounding_boxes": [{"x1": 1}]} for row in rows], "not x1, y1, x2, y2"),
]


@pytest.mark.parametrize(("folder", "change", "words"), CASES)
def test_a_wrong_field_is_named_with_its_row(v3, folder, change, words):
    (path,) = (v3 / folder).iterdir()
    rows = change(pq.read_table(path).to_pylist())
    table(path, list(rows[0]), rows)
    message = refusal(v3, boxes=True)
    assert message.startswith(f"{path}: ")
    assert words in message


NO_ANSWER = "1 queries of 1 files have no relevant page", "row 2: query '2' has no relevant page"
BAD_BOX = "1 boxes of 1 files are empty, inverted or outside the page"
DOUBTS = [
    ([*QRELS, (2, 99, 1, [])], "1 judgements of 1 files name a page that is not in", "row 6: there is no page '99'"),
    ([*QRELS, (9, 10, 1, [])], "1 judgements of 1 files name a query that is not", "row 6: there is no query '9'"),
    (QRELS[:5], *NO_ANSWER),
    ([*QRELS[:5], (2, 10, 0, [])], *NO_ANSWER),
    ([*QRELS, (2, 10, 1, [box(0, 0, 90, 9)])], BAD_BOX, "row 6: box (0, 0, 90, 9) is outside the page of 50 x 60"),
    ([*QRELS, (2, 10, 1, [box(9, 5, 4, 9)])], BAD_BOX, "row 6: box (9, 5, 4, 9) is empty or inverted in the page"),
]


@pytest.mark.parametrize(("qrels", "told_as", "refused_as"), DOUBTS)
def test_what_can_be_left_out_is_told_or_refused(tmp_path, capsys, qrels, told_as, refused_as):
    root = beir_form(tmp_path, "v3", PAGES, QUERIES, qrels)
    kept = {text for captions in told(load(root, boxes=True)).values() for text, _ in captions}
    assert kept >= {"Where is the sum?", "Où est la somme ?"}
    assert told_as in capsys.readouterr().out
    assert refused_as in refusal(root, boxes=True, strict=True)


def test_the_kind_is_guessed_and_all_defects_are_in_one_report(v3, tmp_path):
    """A sound set has none; of a spoiled one every row is named, and none hides another."""
    question_form(tmp_path / "questions", [("Who?", 1), (None, 2)], split="train")
    assert guess_name(v3) == guess_name(tmp_path / "questions") == "vidore"
    assert survey(v3) == Survey("vidore", {"test": (5, 3, 3)}, [], [])
    assert survey(tmp_path / "questions").splits == {"train": (2, 1, 0)}
    spoil = {
        "corpus": {0: {"corpus_id": None}, 1: {"image": {"bytes": b"no picture", "path": "a.png"}}},
        "queries": {1: {"query": None}},
        "qrels": {1: {"score": None}, 2: {"bounding_boxes": [box(5, 5, 1, 9)]}, 4: {"score": 3000}},
    }
    for folder, changes in spoil.items():
        (path,) = (v3 / folder).iterdir()
        rows = [{**row, **changes.get(number, {})} for number, row in enumerate(pq.read_table(path).to_pylist())]
        table(path, list(rows[0]), rows)
    found = survey(v3).defects
    wanted = ["row 0: corpus_id is empty", "row 1: query is empty", "row 1: score is None", "row 4: score is 3000"]
    wanted += ["row 2: box (5, 5, 1, 9) is empty", "row 3: there is no query '1'", "row 5: there is no page '10'"]
    wanted += ["row 2: query '2' has no relevant page", "0000001.img: not a readable image"]
    assert [sum(each in line for line in found) for each in wanted] == [1] * len(wanted)
    assert len(found) == len(wanted)
    (path,) = (v3 / "corpus").iterdir()
    rows = [{**row, "image": {"bytes": None, "path": "a.png"}} for row in pq.read_table(path).to_pylist()]
    table(path, list(rows[0]), rows)
    assert sum("image holds no picture" in line for line in survey(v3).defects) == 4


# --- grades reach what is reported ------------------------------------------------------------------------------------


def pytrec(root, scores, split="test"):
    """Mean nDCG@5 and @10 by pytrec_eval, in percent, of scores (Q, I) against the qrels as the files have them."""
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec_eval is not installed")
    qrels = {}
    for path in (root / "qrels").glob(f"{split}*.parquet"):
        for row in pq.read_table(path).to_pylist():
            rows = qrels.setdefault(str(row["query_id"]), {})
            rows[str(row["corpus_id"])] = max(row["score"], rows.get(str(row["corpus_id"]), 0))
    records = load(root, split)
    ids = [c.query_id for r in records for c in r.captions]
    runs = {q: {r.image_id: float(s) for r, s in zip(records, row)} for q, row in zip(ids, scores)}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.5,10"}).evaluate(runs)
    assert sorted(found) == sorted(qrels)
    return {f"ndcg@{k}": 100 * np.mean([each[f"ndcg_cut_{k}"] for each in found.values()]) for k in (5, 10)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """14 pages and 9 queries with one to six answers of grades 1 and 2, boxes on the best; v3."""
    generator = np.random.default_rng(4)
    queries = [(k, f"question number {k} about a red box", "english") for k in range(9)]
    qrels = []
    for k, *_ in queries:
        found = generator.permutation(14)[: generator.integers(1, 7)]
        qrels += [(k, int(c), 2 if place < 2 else 1, [box(2, 2, 30, 40)]) for place, c in enumerate(found)]
    return beir_form(tmp_path_factory.mktemp("vidore") / "pages", "v3", range(14), queries, qrels)


@pytest.fixture(scope="module")
def evaluated(pages, base, script, tmp_path_factory):
    """What scripts/eval.py writes of an index of these pages, by the index alone, and the index."""
    folder = tmp_path_factory.mktemp("index")
    words = ["--data-root", pages, "--cache-dir", folder / "index", "--splits", "test", f"model.name={base}"]
    words += ["data.reader=vidore", "merge.num_regions=6"]
    script("cache").main([str(word) for word in words])
    out = folder / "metrics.json"
    script("eval").main(["--cache-dir", str(folder / "index"), "--output-json", str(out)])
    return json.loads(out.read_text()), Index(folder / "index")


def test_an_evaluation_of_an_index_agrees_with_pytrec_eval(evaluated, pages):
    result, index = evaluated
    scores, _ = index.scores("test")
    expected = pytrec(pages, scores)
    for name, value in expected.items():
        assert result["text_to_image"][name]["value"] == pytest.approx(value, abs=1e-6)  # as rounded for the file
    assert 0 < expected["ndcg@5"] < 100
    assert expected["ndcg@5"] != pytest.approx(expected["ndcg@10"])
    assert "rsum" not in result


def test_recall_and_the_other_direction_count_every_answer(evaluated, pages):
    result, index = evaluated
    scores = index.scores("test")[0].double().numpy()
    records = load(pages)
    place = {r.image_id: k for k, r in enumerate(records)}
    answers = [{place[name] for name, _ in c.grades} for r in records for c in r.captions]
    hits = [100.0 * (int(row.argmax()) in right) for row, right in zip(scores, answers)]
    assert result["text_to_image"]["r@1"]["value"] == pytest.approx(np.mean(hits), abs=1e-6)
    asking = sorted(set().union(*answers))
    assert 0 < len(asking) < len(records)  # a page that answers nothing asks nothing
    back = [100.0 * (image in answers[int(scores[:, image].argmax())]) for image in asking]
    assert result["image_to_text"]["r@1"]["value"] == pytest.approx(np.mean(back), abs=1e-6)


def test_an_index_holds_the_grades(evaluated, pages):
    _, index = evaluated
    expected = grade_matrix(caption_grades(load(pages)), 14)
    assert torch.equal(index.grades("test"), expected)
    assert set(expected.unique().tolist()) == {0, 1, 2}


def test_folds_and_sets_are_refused_where_relevance_is_graded(evaluated, script, tmp_path):
    words = ["--cache-dir", str(evaluated[1].folder), "--output-json", str(tmp_path / "m.json")]
    for more in (["--folds", "2"], ["--sets"]):
        with pytest.raises(InputError, match="relevance of test is graded; folds and sets are of data whose queries"):
            script("eval").main([*words, *more])


def test_an_index_without_grades_has_none(world, frozen_index):
    assert frozen_index.grades("test") is None


@pytest.fixture(scope="module")
def frozen_index(world, base, script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "index"
    words = ["--data-root", world, "--cache-dir", folder, "--splits", "test", f"model.name={base}"]
    script("cache").main([str(word) for word in [*words, "merge.num_regions=6"]])
    return Index(folder)


def test_changed_grades_are_written_again(tmp_path, base, script):
    """The same texts with other judgements: finished query shards are not kept."""
    words = ["--data-root", tmp_path / "set", "--cache-dir", tmp_path / "index", "--splits", "test"]
    words = [str(word) for word in [*words, f"model.name={base}", "data.reader=vidore", "merge.num_regions=6"]]
    for score in (1, 2):
        qrels = [(0, 10, 2, []), (0, 11, score, [])]
        beir_form(tmp_path / "set", "v2", (10, 11), QUERIES[:1], qrels)
        script("cache").main(words)
        assert Index(tmp_path / "index").grades("test").tolist() == [[2, score]]


def test_evaluation_while_training_and_the_comparison_see_the_grades(pages, retriever):
    """The metrics that training selects by, and those of a comparison, from one merge."""
    records, merge = load(pages, boxes=True), MergeConfig(num_regions=6)
    found = evaluate_records(retriever, records, merge, batch_size=4)
    scores = score_records(retriever, records, make_compressor(merge), batch_size=4)
    expected = pytrec(pages, scores)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    asked = Asked(caption_positives(records, {}))
    values = measure(retriever, records, {"a": merge}, 4, asked)["a"]
    assert float(values["ndcg@10"].mean()) == pytest.approx(expected["ndcg@10"], rel=1e-5)
    assert len(values["back:r@1"]) == int((asked.positives > 0).any(0).sum()) < len(records)
    other = Asked(asked.positives.clamp(max=1))  # the same pages, graded otherwise: measured anew
    assert other.stamp({}) != asked.stamp({}) == Asked(asked.positives.clone()).stamp({})
    boxed = sum(bool(c.phrases) for r in records for c in r.captions)
    assert boxed == 9
    assert len(values["box_mass"]) == 9  # a phrase each: the grounding test of v3
    assert 0 < float(values["box_mass"].mean()) < 1


def test_training_takes_boxes_as_labels(pages, base, script, tmp_path):
    (tmp_path / "run.yaml").write_text("train: {bf16: false, num_train_epochs: 1, dataloader_num_workers: 0}\n")
    words = ["--config", tmp_path / "run.yaml", f"data.root={pages}", "data.reader=vidore", "data.train_split=test"]
    words += ["data.eval_split=test", f"train.output_dir={tmp_path / 'out'}", "train.train_batch_size=3"]
    words += ["train.grad_accum_steps=1", "merge.num_regions=6", f"model.name={base}"]
    script("train").main([str(word) for word in words])
    assert (tmp_path / "out/projector.safetensors").is_file()


def test_pages_that_answer_are_no_negatives(pages, retriever):
    """The loss of a batch by a loop over scores that evaluation made; another page that answers is right as well."""
    records, merge = load(pages), MergeConfig(compressor="none")
    rows = CaptionDataset(records).rows
    batch = Collator(retriever, ObjectsConfig())(rows)
    loss = ProjectorModel(retriever, merge, 0.07, True)(**batch)["loss"]
    scores = score_records(retriever, records, make_compressor(merge), batch_size=4).double()
    losses, single = [], []
    for query, row in enumerate(rows):
        right = {name for name, _ in row.caption.grades}
        shares = [float(torch.exp(scores[query, each.image] / 0.07)) for each in rows]
        own = [share for share, each in zip(shares, rows) if each.record.image_id in right]
        losses.append(-np.log(sum(own) / sum(shares)))
        own = [share for share, each in zip(shares, rows) if each.image == row.image]
        single.append(-np.log(sum(own) / sum(shares)))
    assert loss.item() == pytest.approx(np.mean(losses), abs=1e-5)
    assert abs(np.mean(losses) - np.mean(single)) > 0.1


def test_damaged_grades_of_an_index_are_refused(evaluated, tmp_path):
    """Each kind of damage, in a shard whose checksum holds."""
    whole = Index(evaluated[1].folder).grades("test")
    for number, damage in enumerate(
        [
            lambda grades: grades[1:],
            lambda grades: [[[0, 0]], *grades[1:]],
            lambda grades: [[[0, 101]], *grades[1:]],
            lambda grades: [[[-1, 1]], *grades[1:]],
            lambda grades: [[[14, 1]], *grades[1:]],
            lambda grades: [[[0, True]], *grades[1:]],
            lambda grades: [[0, 1], *grades[1:]],
            lambda grades: [None, *grades[1:]],
            lambda grades: "grades",
            lambda grades: None,
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(evaluated[1].folder, folder)
        path = folder / "test/queries-00000.safetensors"
        tensors, header = load_shard(path)
        header["stamp"]["grades"] = damage(header["stamp"]["grades"])
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        entry = write_shard(path, tensors, header["stamp"], {"count": len(tensors["image"])})
        manifest = read_index_manifest(folder / "manifest.json")
        split = manifest.splits["test"]
        split = replace(split, queries=(QueryShard(**entry),))
        write_index_manifest(folder / "manifest.json", replace(manifest, splits={"test": split}))
        with pytest.raises(InputError, match=r"grades can't be true|grades of test name images that are not there"):
            Index(folder).grades("test")
    assert torch.equal(Index(evaluated[1].folder).grades("test"), whole)


def test_the_report_shows_pages(evaluated, pages, script, tmp_path):
    index = evaluated[1].folder
    words = ["--cache-dir", index, "--output-json", tmp_path / "m.json", "--data-root", pages, "--reader", "vidore"]
    script("eval").main([str(word) for word in words])
    assert "question number" in (tmp_path / "m.html").read_text()
