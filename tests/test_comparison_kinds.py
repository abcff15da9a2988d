"""The comparison on data sets of every kind: without boxes, with boxes that no caption names, with graded relevance."""

import re

import data_sets
import pytest

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig
from samer.data import make_reader
from samer.evaluation import score_records

NOTHING = "nothing is said of grounding, sizes and short phrases"
NONE = "has no boxes, so rows with and without object labels are one"
COMPARED = ("none", "samer")


def pages(root):
    """v3: ten pages with a query each, which a second page answers as well, the boxes on the better one."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from parquet_sets import beir_form, box

    queries = [(k, f"question number {k} about a red box", "english") for k in range(10)]
    qrels = [(k, k, 2, [box(2, 2, 30, 40)]) for k in range(10)] + [(k, (k + 1) % 10, 1, []) for k in range(10)]
    return beir_form(root, "v3", range(10), queries, qrels)


KINDS = {  # how to make it, trained on, measured on
    "coco": (lambda root: data_sets.coco(root, count=6), "val2017[:3]", "val2017[3:]"),
    "imagecode": (data_sets.imagecode, "valid[:10]", "valid[10:]"),
    "captions": (lambda root: data_sets.captions(root, count=6), "test[:3]", "test[3:]"),
    "vidore": (pages, "test[:5]", "test[5:]"),
}


@pytest.fixture
def compared(script, base, tmp_path):
    def run(name, *rest):
        make, trained, measured = KINDS[name]
        root, config = make(tmp_path / "data" / name), tmp_path / "run.yaml"
        config.write_text(
            f"model: {{name: {base}}}\nmerge: {{num_regions: 6}}\n"
            "train: {bf16: false, num_train_epochs: 1, train_batch_size: 4, dataloader_num_workers: 0}\n"
        )
        words = ["--data-root", root, "--out", tmp_path / "out", "--config", config, "--seeds", 0, "--split", measured]
        words += ["--budgets", 4, "--methods", *COMPARED, *rest, f"data.train_split={trained}"]
        results = script("compare").main([str(word) for word in words])
        return results, make_reader(name).load_split(root, measured, boxes=False), tmp_path / "out"

    return run


@pytest.mark.parametrize("name", KINDS)
def test_every_section_that_the_data_allows_is_run(name, compared, retriever, capsys):
    """Of pages only some, whose captions name boxes as those do that other tests compare in full."""
    some = ["--sections", "untouched", "adapted", "phrases", "cost"] if name == "vidore" else []
    results, records, out = compared(name, *some)
    told, text = capsys.readouterr().out, (out / "results.md").read_text()
    named = name == "vidore"
    assert (NOTHING in told, NONE in told) == (not named, name in ("imagecode", "captions"))
    titles = re.findall("^## (.*)", text, re.M)
    assert {"Untouched projection", "Cost", "Paired differences"} <= set(titles)
    assert ("Taking the gain apart" in titles) is not bool(some)
    about_boxes = {"Grounding", "By the smallest object named", "By size", "Short phrases"}
    assert about_boxes & set(titles) == (about_boxes if named else set())
    assert ("What is kept" in titles) is not named
    assert bool(results["sizes"]) is named
    assert "phrases" in results["about"] if named else "phrases" not in results["about"]
    rows = {(row["section"], row["name"]): row for row in results["rows"]}
    boxes = name in ("coco", "vidore")
    assert (("adapted", "samer, raster, without boxes") in rows) is boxes
    assert (("components", "raster: feature + spatial + object") in rows) is (name == "coco")
    for row in rows.values():
        assert (row["box_mass"] is None) is not named
        assert (row["mixed_clusters"] is None) is not boxes
        assert row["osr"] is not None
    assert (out / "report.html").is_file()
    # recall by hand: the share of captions that an image answers which is ahead of all that don't
    scores = score_records(retriever, records, make_compressor(MergeConfig(compressor="none")), batch_size=4)
    captions = [(record.image_id, caption) for record in records for caption in record.captions]
    right = [{own, *(image for image, _ in caption.grades)} for own, caption in captions]
    marked = [[record.image_id in answers for record in records] for answers in right]
    pairs = [[*zip(row.tolist(), marks)] for row, marks in zip(scores, marked)]
    hits = [max(s for s, own in row if own) > max(s for s, own in row if not own) for row in pairs]
    assert rows["untouched", "none"]["r@1"] == pytest.approx(100 * sum(hits) / len(hits), abs=1e-3)


def test_phrases_that_are_asked_for_by_name_are_refused_where_there_are_none(compared):
    with pytest.raises(InputError, match="no phrase has a box, so there are no phrases to ask; leave the section"):
        compared("captions", "--sections", "untouched", "phrases")
