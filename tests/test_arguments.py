"""Wrong combinations: what is of another kind than it should be, given to the library or to scripts, is named."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from samer import (
    InputError,
    MergeConfig,
    QueryTokens,
    VisualTokens,
    instance_labels,
    maxsim,
    merge_tokens,
    multi_positive_t2i_loss,
    retrieval_metrics,
    visual_coords,
)
from samer.compare.run import sweep
from samer.compressors import make_compressor
from samer.config import Config, DataConfig, ModelConfig, ObjectsConfig, TrainConfig, dump_config, load_config
from samer.data import READERS
from samer.data.flickr import Flickr
from samer.evaluation import both_directions, evaluate_records
from samer.index.read import Index
from samer.metrics import bootstrap_intervals
from samer.scoring import StoredImages, score_stored, search

UNIT = torch.nn.functional.normalize(torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
PLACES, K4 = visual_coords(5, 6), MergeConfig(num_regions=4)
QUERIES = torch.nn.functional.normalize(torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
FULL = torch.ones(2, 30, dtype=torch.bool)
LABELS = torch.zeros(2, 30, dtype=torch.long)
SCORES = torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
RIGHT = torch.zeros(3, 4, dtype=torch.bool)
RIGHT[:, 0] = True
ASKED = QueryTokens(QUERIES, torch.ones(3, 5, dtype=torch.bool))
BOXES = [[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.9, 0.9]]
NAN = float("nan")


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [64, 64.0, np.int64(64), np.uint8(64), np.float32(64), np.array(64), torch.tensor(64), torch.tensor(64.0)]
)
def test_a_whole_number_is_one_whatever_its_type(value):
    config = MergeConfig(num_regions=value)
    assert config == MergeConfig(num_regions=64)
    assert type(config.num_regions) is int
    assert load_config(None, []).merge == replace(config, num_regions=64)
    assert dump_config(Config(merge=config)) == dump_config(Config())


@pytest.mark.parametrize(
    "value", ["64", 64.5, True, np.bool_(True), None, [64], NAN, float("inf"), 10**30, np.array([64]), b"64", 64j]
)
def test_what_is_no_whole_number_is_refused_as_k(value):
    assert refusal(MergeConfig, num_regions=value).startswith("merge.num_regions must be ")


@pytest.mark.parametrize("value", [0, -1, 0.0])
def test_k_has_a_range(value):
    assert "at least 1" in refusal(MergeConfig, num_regions=value)


@pytest.mark.parametrize(
    ("settings", "values", "key"),
    [
        (MergeConfig, {"spatial_weight": None}, "merge.spatial_weight must be a number"),
        (MergeConfig, {"center_init": 3}, "merge.center_init"),
        (MergeConfig, {"compressor": None}, "merge.compressor must be text"),
        (ObjectsConfig, {"max_phrases": "4"}, "objects.max_phrases must be a whole number"),
        (ModelConfig, {"local_files_only": "no"}, "model.local_files_only must be true or false"),
        (DataConfig, {"limit_train_images": "5"}, "data.limit_train_images must be a whole number"),
        (DataConfig, {"strict": 1}, "data.strict must be true or false"),
        (TrainConfig, {"learning_rate": None}, "train.learning_rate must be a number"),
        (TrainConfig, {"bf16": "yes"}, "train.bf16 must be true or false"),
        (TrainConfig, {"budgets": 64}, "train.budgets must be a list of whole numbers"),
        (Config, {"merge": 64}, "merge"),
    ],
)
def test_a_setting_of_another_type_is_refused_by_name(settings, values, key):
    assert key in refusal(settings, **values)


def test_settings_that_are_exact_are_taken():
    made = Config(
        merge={"num_regions": 4.0}, data=DataConfig(root=Path("/a")), train=TrainConfig(budgets=[2, np.int64(4)])
    )
    assert (made.merge, made.data.root, made.train.budgets) == (MergeConfig(num_regions=4), "/a", (2, 4))


@pytest.mark.parametrize("size", [(5.0, 6), (np.int64(5), np.float64(6)), (torch.tensor(5), 6)])
def test_a_grid_of_exact_numbers(size):
    assert torch.equal(visual_coords(*size), PLACES)


# --- tensors ----------------------------------------------------------------------------------------------------------

OFF = UNIT.clone()
OFF[1, 7] *= 10
EMPTY = UNIT.clone()
EMPTY[1, 7] = 0
FAR = PLACES.clone()
FAR[7] = torch.tensor([448.0, 3.0])
LOST = PLACES.clone()
LOST[7, 0] = NAN

# name -> (the call, words of its message)
WRONG = {
    "tokens of numpy": (
        lambda: merge_tokens(UNIT.numpy(), PLACES, K4),
        "tokens must be a torch tensor; it is of type numpy.ndarray",
    ),
    "tokens in lists": (
        lambda: merge_tokens(UNIT.tolist(), PLACES, K4),
        "tokens must be a torch tensor; it is of type list",
    ),
    "whole visual tokens": (lambda: merge_tokens(VisualTokens(UNIT, PLACES), PLACES, K4), "give its tokens"),
    "coords of numpy": (lambda: merge_tokens(UNIT, PLACES.numpy(), K4), "coords must be a torch tensor"),
    "no coords": (lambda: merge_tokens(UNIT, None, K4), "coords must be a torch tensor; it is of type NoneType"),
    "coords of more images": (lambda: merge_tokens(UNIT, PLACES.expand(3, -1, -1), K4), "coords of shape (3, 30, 2)"),
    "coords in whole numbers": (lambda: merge_tokens(UNIT, PLACES.long(), K4), "coords are torch.int64"),
    "coords of NaN": (
        lambda: merge_tokens(UNIT, LOST.expand(2, -1, -1), K4),
        "image 0 of the batch has NaN or infinite coords",
    ),
    "coords elsewhere": (lambda: merge_tokens(UNIT, PLACES.to("meta"), K4), "coords must be on cpu; it is on meta"),
    "mask of numpy": (lambda: merge_tokens(UNIT, PLACES, K4, mask=FULL.numpy()), "mask must be a torch tensor"),
    "mask of numbers": (lambda: merge_tokens(UNIT, PLACES, K4, mask=FULL.long()), "mask is torch.int64; expected bool"),
    "mask elsewhere": (lambda: merge_tokens(UNIT, PLACES, K4, mask=FULL.to("meta")), "mask must be on cpu"),
    "labels of numpy": (
        lambda: merge_tokens(UNIT, PLACES, K4, instance_labels=LABELS.numpy()),
        "instance_labels must be a torch tensor",
    ),
    "labels of floats": (
        lambda: merge_tokens(UNIT, PLACES, K4, instance_labels=LABELS.float()),
        "instance_labels is torch.float32; expected int64",
    ),
    "labels without end": (
        lambda: merge_tokens(UNIT, PLACES, K4, instance_labels=LABELS + 10**9),
        "instance_labels must be >= 0 (0 is background) and below 65,536",
    ),
    "tokens of one image": (lambda: merge_tokens(UNIT[0], PLACES, K4), "(B, N, D)"),
    "no images": (lambda: merge_tokens(UNIT[:0], PLACES, K4), "at least one token"),
    "tokens of whole numbers": (lambda: merge_tokens(UNIT.long(), PLACES, K4), "got torch.int64"),
    "complex tokens": (lambda: merge_tokens(UNIT.cfloat(), PLACES, K4), "dense tensor of real numbers"),
    "tokens of NaN": (lambda: merge_tokens(UNIT * NAN, PLACES, K4), "image 0 of the batch has NaN"),
    "K for a config": (lambda: merge_tokens(UNIT, PLACES, 64), "config must be a MergeConfig"),
    "a dict for a config": (lambda: merge_tokens(UNIT, PLACES, {"num_regions": 4}), "config must be a MergeConfig"),
    "a grid in text": (lambda: visual_coords("5", 6), "height must be a whole number; it is '5'"),
    "half a grid": (lambda: visual_coords(5, 6.5), "width must be a whole number; it is 6.5"),
    "a flag for a grid": (lambda: visual_coords(True, 6), "height must be a whole number"),
    "prompt tokens in text": (lambda: visual_coords(5, 6, prompt_tokens="6"), "prompt_tokens must be a whole number"),
    "queries of numpy": (lambda: maxsim(QUERIES.numpy(), UNIT), "queries must be a torch tensor"),
    "images in lists": (lambda: maxsim(QUERIES, UNIT.tolist()), "images must be a torch tensor"),
    "whole merged tokens": (
        lambda: maxsim(QUERIES, merge_tokens(UNIT, PLACES, K4)),
        "images must be a torch tensor; it is of type samer.tokens.MergedTokens (give its tokens)",
    ),
    "a mask of numpy": (lambda: maxsim(QUERIES, UNIT, None, FULL.numpy()), "the mask of images must be a torch tensor"),
    "complex queries": (lambda: maxsim(QUERIES.cfloat(), UNIT.cfloat()), "queries must be a dense tensor of real"),
    "sparse queries": (lambda: maxsim(QUERIES.to_sparse(), UNIT), "queries must be a dense tensor"),
    "a block in text": (lambda: maxsim(QUERIES, UNIT, block_elements="5"), "block_elements must be a whole number"),
    "half a block": (lambda: maxsim(QUERIES, UNIT, block_elements=5.5), "block_elements must be a whole number"),
    "one query": (lambda: maxsim(QUERIES[0], UNIT), "queries have shape (5, 8)"),
    "another width": (lambda: maxsim(QUERIES[..., :4], UNIT), "must agree in width"),
    "scores of numpy": (lambda: multi_positive_t2i_loss(SCORES.numpy(), RIGHT), "scores must be a torch tensor"),
    "positives of numpy": (
        lambda: multi_positive_t2i_loss(SCORES, RIGHT.numpy()),
        "positive_mask must be a torch tensor",
    ),
    "positives of numbers": (
        lambda: multi_positive_t2i_loss(SCORES, RIGHT.long()),
        "positive_mask is torch.int64; expected bool",
    ),
    "positives elsewhere": (lambda: multi_positive_t2i_loss(SCORES, RIGHT.to("meta")), "positive_mask must be on cpu"),
    "complex scores": (
        lambda: multi_positive_t2i_loss(SCORES.cfloat(), RIGHT),
        "scores must be a dense tensor of real",
    ),
    "a temperature in text": (lambda: multi_positive_t2i_loss(SCORES, RIGHT, "1"), "temperature is '1'"),
    "no temperature": (lambda: multi_positive_t2i_loss(SCORES, RIGHT, None), "temperature is None"),
    "metrics of text": (lambda: retrieval_metrics([["a"]], [[True]]), "scores are no table of numbers"),
    "metrics of objects": (
        lambda: retrieval_metrics(SCORES.numpy().astype(object), RIGHT),
        "scores are no table of numbers",
    ),
    "metrics of unequal rows": (
        lambda: retrieval_metrics([[1.0], [1.0, 2.0]], RIGHT),
        "scores are no table of numbers",
    ),
    "metrics of nothing": (lambda: retrieval_metrics(None, RIGHT), "scores are no table of numbers"),
    "complex metrics": (lambda: retrieval_metrics(SCORES.cfloat(), RIGHT), "scores must be a dense tensor of real"),
    "metrics of numbered positives": (lambda: retrieval_metrics(SCORES, RIGHT.long()), "expected bool"),
    "images of queries in floats": (
        lambda: both_directions(SCORES, [0.0, 1.0, 2.0]),
        "image_of must be 3 whole numbers",
    ),
    "images of too few queries": (lambda: both_directions(SCORES, [0, 1]), "image_of must be 3 whole numbers"),
    "no scores": (lambda: both_directions(SCORES[:, :0], [0, 1, 2]), "scores must be (queries, images)"),
    "resamples in text": (
        lambda: bootstrap_intervals({"a": np.ones(3)}, resamples="5"),
        "resamples must be a whole number",
    ),
    "a seed below 0": (lambda: bootstrap_intervals({"a": np.ones(3)}, seed=-1), "seed -1"),
    "values in text": (lambda: bootstrap_intervals({"a": np.array(["x"])}), "per_query holds what is no number"),
    "values without names": (lambda: bootstrap_intervals([1.0, 2.0]), "per_query must be a dict"),
    "labels at numpy's places": (lambda: instance_labels(PLACES.numpy(), BOXES), "coords must be a torch tensor"),
    "labels at one place": (lambda: instance_labels(PLACES[0], BOXES), "coords must be floating (N, 2)"),
    "labels in space": (lambda: instance_labels(torch.rand(30, 3), BOXES), "coords must be floating (N, 2)"),
    "boxes in text": (lambda: instance_labels(PLACES, "abcd"), "boxes must be (n, 4) numbers"),
    "no boxes": (lambda: instance_labels(PLACES, None), "boxes must be (n, 4) numbers"),
    "a caption without its list": (lambda: instance_labels(PLACES, [None, BOXES]), "row 0 of boxes must be"),
    "one box for a list": (lambda: instance_labels(PLACES, BOXES[0]), "row 0 of boxes must be a box"),
    "a box of words": (lambda: instance_labels(PLACES, [["a", "b", "c", "d"]]), "boxes of caption 0 are no table"),
    "boxes of unequal length": (
        lambda: instance_labels(PLACES, [[0.1, 0.1, 0.5], [0.1]]),
        "boxes of caption 0 are no table",
    ),
    "boxes in pixels": (lambda: instance_labels(PLACES, [[1, 1, 50, 50]]), "give boxes as shares of the image"),
    "phrases of words": (
        lambda: instance_labels(PLACES, BOXES, phrases=["a", "b"]),
        "phrases of caption 0 are no table",
    ),
    "phrases of shares": (
        lambda: instance_labels(PLACES, BOXES, phrases=[0.5, 0.7]),
        "phrases of caption 0 are no table",
    ),
    "phrases counted in text": (
        lambda: instance_labels(PLACES, BOXES, max_phrases="4"),
        "max_phrases must be a whole number",
    ),
    "no phrases": (lambda: instance_labels(PLACES, BOXES, max_phrases=0), "max_phrases must be at least 1"),
    "an area in text": (lambda: instance_labels(PLACES, BOXES, min_area="x"), "min_area must be a number"),
    "a name for a compressor's settings": (lambda: make_compressor("samer"), "a compressor is made of a MergeConfig"),
    "stored images of numpy": (
        lambda: score_stored(ASKED, StoredImages(UNIT.numpy())),
        "images must be a torch tensor",
    ),
    "a tensor for stored images": (lambda: score_stored(ASKED, UNIT), "not QueryTokens against Tensor"),
    "stored queries of numpy": (
        lambda: score_stored(QueryTokens(QUERIES.numpy(), ASKED.mask), StoredImages((UNIT * 99).to(torch.int8), 1.0)),
        "queries must be a torch tensor",
    ),
    "a search in text": (lambda: search(ASKED, [(["a", "b"], StoredImages(UNIT))], "3"), "top must be a whole number"),
    "a search for a tensor": (
        lambda: search(QUERIES, [(["a", "b"], StoredImages(UNIT))], 3),
        "queries must be QueryTokens",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_in_a_line(name):
    call, words = WRONG[name]
    assert words in refusal(call)


@pytest.mark.parametrize("name", ["none", "samer", "hpool", "kmeans", "grid"])
def test_compressors_name_what_does_not_fit(name):
    compressor = make_compressor(replace(K4, compressor=name))
    for visual, words in (
        (UNIT, "takes VisualTokens"),
        (VisualTokens(UNIT.numpy(), PLACES), "tokens must be a torch tensor"),
        (VisualTokens(UNIT, PLACES, FULL.long()), "mask is torch.int64; expected bool"),
        (VisualTokens(UNIT, PLACES, patches=FULL.long()), "patches is torch.int64; expected bool"),
        (VisualTokens(UNIT, PLACES, seeds=torch.rand(2)), "seeds is torch.float32; expected int64"),
        (VisualTokens(3 * UNIT, PLACES), "image 0 of the batch has a token of length 3; give unit vectors"),
        (VisualTokens(OFF, PLACES), "image 1 of the batch has a token of length 10"),
        (VisualTokens(EMPTY, PLACES), "image 1 of the batch has a token of length 0"),
        (VisualTokens(UNIT, FAR), "image 0 of the batch has a token at [448.0, 3.0]; give coords in the unit square"),
        (VisualTokens(UNIT, FAR.expand(2, -1, -1)), "image 0 of the batch has a token at [448.0, 3.0]"),
        (VisualTokens(UNIT, LOST), "image 0 of the batch has NaN or infinite coords"),
    ):
        assert words in refusal(compressor, visual)


def test_padding_may_hold_anything():
    mask = FULL.clone()
    mask[1, 20:] = False
    tokens, coords, labels = UNIT.clone(), PLACES.repeat(2, 1, 1), LABELS.clone()
    tokens[1, 20:], coords[1, 20:], labels[1, 20:] = NAN, -7.0, -1
    found = merge_tokens(tokens, coords, K4, mask=mask, instance_labels=labels)
    clean = merge_tokens(UNIT, PLACES, K4, mask=mask, instance_labels=LABELS)
    assert torch.equal(found.tokens, clean.tokens)
    compressor = make_compressor(K4)
    assert torch.equal(
        compressor(VisualTokens(tokens, coords, mask)).tokens, compressor(VisualTokens(UNIT, PLACES, mask)).tokens
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_taken(dtype):
    """Rounding to half precision leaves tokens that count as unit vectors and places that count as in the square."""
    assert merge_tokens(UNIT.to(dtype), PLACES.to(dtype), K4).tokens.shape == (2, 4, 8)
    torch.testing.assert_close(
        maxsim(QUERIES.to(dtype), UNIT.to(dtype)).float(), maxsim(QUERIES, UNIT), atol=0.02, rtol=0
    )


@pytest.mark.parametrize(
    "scores",
    [
        SCORES.tolist(),
        SCORES.numpy(),
        SCORES.numpy().astype(">f4"),
        SCORES.numpy().astype(np.longdouble),
        np.asfortranarray(SCORES.double().numpy()),
        SCORES.clone().requires_grad_(),
    ],
)
def test_metrics_take_what_numpy_makes_numbers_of(scores):
    expected = retrieval_metrics(SCORES, RIGHT)
    assert retrieval_metrics(scores, RIGHT) == expected
    assert retrieval_metrics(scores, RIGHT.tolist()) == expected


@pytest.mark.parametrize("image_of", [[0, 1, 2], np.array([0, 1, 2], np.int32), torch.tensor([0, 1, 2])])
def test_images_of_queries_may_be_numbers_of_any_kind(image_of):
    expected = both_directions(SCORES, torch.tensor([0, 1, 2]), resamples=5)
    assert both_directions(SCORES, image_of, resamples=5) == expected
    assert both_directions(SCORES.numpy(), image_of, resamples=5) == expected


def test_boxes_may_be_numpys():
    one = instance_labels(PLACES, BOXES)
    assert set(one.tolist()) == {0, 1, 2}
    both = torch.stack([one, instance_labels(PLACES, BOXES[:1])])
    assert torch.equal(instance_labels(PLACES, np.array(BOXES)), one)
    assert torch.equal(instance_labels(PLACES, np.array([BOXES, BOXES])), one.repeat(2, 1))
    assert torch.equal(instance_labels(PLACES, [np.array(BOXES), np.array(BOXES[:1])]), both)
    assert torch.equal(instance_labels(PLACES, [np.array(BOXES), np.zeros((0, 4))])[1], torch.zeros(30).long())
    assert torch.equal(instance_labels(PLACES, BOXES, max_phrases=np.int64(4)), one)


# --- eval, report and compare -----------------------------------------------------------------------------------------


class Few(Flickr):
    """Captions for the first image only, or, with `kept` 0, for none."""

    kept = 1

    def load_split(self, *args, **kwargs):
        records = super().load_split(*args, **kwargs)
        return [replace(record, captions=record.captions[: 5 * (k < self.kept)]) for k, record in enumerate(records)]


@pytest.fixture(scope="module")
def made(world, base, script, tmp_path_factory):
    """Indexes: of the test split, of it without captions, with those of one image, and of a folder of pictures."""
    folder = tmp_path_factory.mktemp("made")
    none = Few()
    none.kept = 0
    READERS.update({"few": Few(), "none": none})
    words = [f"model.name={base}", "merge.num_regions=4"]
    for name in ("flickr", "few", "none"):
        script("cache").main(
            ["--data-root", str(world), "--reader", name, "--cache-dir", str(folder / name), "--splits", "test", *words]
        )
    script("index").main(["--images", str(world / "images/Images"), "--cache-dir", str(folder / "pictures"), *words])
    yield folder
    del READERS["few"], READERS["none"]


def no_scores(*_):
    raise AssertionError("work was begun")


@pytest.fixture
def evaluate(script, made, monkeypatch):
    def main(index, output, *rest):
        monkeypatch.setattr(Index, "scores", no_scores)
        return script("eval").main(["--cache-dir", str(made / index), "--output-json", str(output), *rest])

    return main


@pytest.mark.parametrize(("index", "split"), [("pictures", "images"), ("none", "test")])
def test_an_index_without_captions_is_not_evaluated(evaluate, made, tmp_path, script, index, split):
    words = f"{made / index}: {split} holds no captions, so there is nothing to evaluate"
    assert words in refusal(evaluate, index, tmp_path / "metrics.json", "--split", split)
    assert words in refusal(Index(made / index).check_captions, split)
    report = ["--data-root", "x", "--out", tmp_path / "r.html", "--split", split, "--method", f"a={made / index}"]
    assert words in refusal(script("report").main, list(map(str, report)))
    assert list(tmp_path.iterdir()) == []


def test_scores_of_an_index_without_captions_are_refused(made):
    assert "holds no captions" in refusal(Index(made / "none").scores, "test")


def test_a_picture_index_among_a_reports_methods_is_named(script, made, world, tmp_path):
    methods = [f"a={made / 'flickr'}", f"b={made / 'pictures'}"]
    words = ["--data-root", str(world), "--out", str(tmp_path / "r.html"), "--method", *methods]
    assert f"{made / 'pictures'}: no split 'test' in this index; it holds: images" in refusal(
        script("report").main, words
    )


@pytest.mark.parametrize("name", ["x.html", "report.HTML/../x.html"])
def test_metrics_dont_go_where_the_report_goes(evaluate, tmp_path, name):
    (tmp_path / "report.HTML").mkdir()
    assert "x.html: the report is written to that name" in refusal(evaluate, "flickr", tmp_path / name)


def test_places_are_looked_at_before_the_work(evaluate, made, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "a.html").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link.json").symlink_to(made / "flickr" / "manifest.json")
    (tmp_path / "round.json").symlink_to(tmp_path / "round.json")
    before = {path: path.read_bytes() for path in sorted(made.rglob("*")) if path.is_file()}
    for place, words in (
        (made / "flickr/manifest.json", "it is a part of the index"),
        (made / "flickr/projector.safetensors", "it is a part of the index"),
        (made / "flickr/test/images-00000.safetensors", "it is a part of the index"),
        (tmp_path / "link.json", "it is a part of the index"),
        (made / "flickr", "it is a folder; name a file"),
        ("", "it is a folder"),
        (tmp_path / "a.json", "a.html: can't be written (Is a directory); it is a folder"),
        (tmp_path / "pipe.json", "pipe.json: can't be written (No regular file)"),
        (tmp_path / "file/metrics.json", "a part of the path is a file"),
        (tmp_path / ("n" * 300 + ".json"), "File name too long"),
        (tmp_path / "round.json", "round.json"),
    ):
        assert words in refusal(evaluate, "flickr", place)
    assert {path: path.read_bytes() for path in sorted(made.rglob("*")) if path.is_file()} == before
    assert (tmp_path / "pipe.json").is_fifo()


def test_a_place_without_permission_is_named_before_the_work(evaluate, tmp_path, monkeypatch):
    """Root may write anywhere, so the answer is patched."""
    real = os.open

    def closed(path, *rest):
        if Path(path).parent == tmp_path:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest)

    monkeypatch.setattr(os, "open", closed)
    assert "metrics.json: can't be written (Permission denied)" in refusal(
        evaluate, "flickr", tmp_path / "new" / "metrics.json"
    )


def test_metrics_may_lie_in_the_index(script, made):
    script("eval").main(["--cache-dir", str(made / "flickr"), "--output-json", str(made / "flickr/metrics_test.json")])
    assert json.loads((made / "flickr/metrics_test.json").read_text())["queries"] == 40
    assert (made / "flickr/metrics_test.html").is_file()


def test_a_report_replaces_neither_what_it_reads_nor_an_index(script, made, world, tmp_path):
    row = tmp_path / "row.json"
    script("eval").main(["--cache-dir", str(made / "flickr"), "--output-json", str(row)])
    before = row.read_bytes()
    words = ["--data-root", str(world), "--method", f"a={made / 'flickr'}", "--row", f"b={row}", "--out"]
    for place, why in (
        (row, "it is read as well"),
        (made / "flickr/manifest.json", "it is a part of the index"),
        (tmp_path, "it is a folder"),
    ):
        assert why in refusal(script("report").main, [*words, str(place)])
    assert row.read_bytes() == before
    assert Index(made / "flickr").size("test")[0] == 8


def test_images_without_captions_are_named_where_both_directions_are_measured(
    script, made, world, base, retriever, tmp_path
):
    records = READERS["few"].load_split(world, "test", boxes=True)
    words = f"7 of 8 images have no caption, the first is {records[1].image_id}"
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{name: {base}}}\nmerge: {{num_regions: 4}}\ntrain: {{bf16: false}}\n")
    compare = ["--data-root", world, "--out", tmp_path / "out", "--config", config, "--seeds", "0"]
    compare += ["--sections", "untouched", "data.reader=few"]
    assert words in refusal(script("compare").main, list(map(str, compare)))
    assert words in refusal(sweep, retriever, records, [], [], "w", 4)
    report = ["--data-root", world, "--reader", "few", "--out", tmp_path / "r.html", "--method", f"a={made / 'few'}"]
    assert words in refusal(script("report").main, list(map(str, [*report, "--sweep", "a"])))


def test_some_captions_are_enough_for_eval_and_none_are_named(script, made, world, retriever, tmp_path):
    script("eval").main(["--cache-dir", str(made / "few"), "--output-json", str(tmp_path / "m.json")])
    found = json.loads((tmp_path / "m.json").read_text())
    assert (found["queries"], found["images"]) == (5, 8)
    records = READERS["few"].load_split(world, "test", boxes=False)
    assert evaluate_records(retriever, records, K4, batch_size=4)["r@10"] == 100.0  # of 8 images
    bare = READERS["none"].load_split(world, "test", boxes=False)
    assert "none of 8 images has a caption" in refusal(evaluate_records, retriever, bare, K4, batch_size=4)
