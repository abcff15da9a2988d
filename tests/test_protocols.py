"""Folds and sets against plain loops; data sets of every kind through training, index and evaluation."""

import json
import re
from pathlib import Path

import data_sets
import numpy as np
import pytest
import torch

from samer.config import InputError, load_config
from samer.data import READERS, make_reader
from samer.report.protocols import fold_means, protocol_lines, within_sets
from samer.training.loop import train

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def scores_of(queries, images, seed=0):
    return torch.randn(queries, images, generator=torch.Generator().manual_seed(seed))


def hits(row, own, others):
    """Whether `own` is better than all of `others`."""
    return all(row[own] > row[other] for other in others if other != own)


def test_folds_against_loops():
    """R@1 of both directions, folds of 3, 3 and 2 images with two captions each."""
    scores, image_of = scores_of(16, 8), torch.arange(8).repeat_interleave(2)
    forward, backward = [], []
    for fold in ([0, 1, 2], [3, 4, 5], [6, 7]):
        asked = [q for q in range(16) if int(image_of[q]) in fold]
        forward.append(np.mean([hits(scores[q], int(image_of[q]), fold) for q in asked]))
        best = [max(asked, key=lambda q: float(scores[q, image])) for image in fold]
        backward.append(np.mean([int(image_of[q]) == image for q, image in zip(best, fold)]))
    found = fold_means(scores, image_of, 3)
    assert found["images"] == [3, 3, 2]
    assert found["text_to_image"]["r@1"] == pytest.approx(100 * np.mean(forward))
    assert found["image_to_text"]["r@1"] == pytest.approx(100 * np.mean(backward))
    assert 0 < np.mean(forward) < 1


def test_one_fold_is_the_whole_split():
    from samer.metrics import retrieval_metrics

    scores, image_of = scores_of(20, 10), torch.arange(10).repeat_interleave(2)
    whole = retrieval_metrics(scores, image_of[:, None] == torch.arange(10))
    assert fold_means(scores, image_of, 1)["text_to_image"] == pytest.approx(whole, abs=1e-6)


def test_folds_that_can_t_be_are_refused():
    scores, image_of = scores_of(4, 4), torch.tensor([0, 0, 1, 1])
    for count in (0, 5):
        with pytest.raises(InputError, match=f"{count} folds of 4 images"):
            fold_means(scores, image_of, count)
    with pytest.raises(InputError, match="fold 2 of 2 has no query"):
        fold_means(scores, image_of, 2)


def test_sets_against_loops():
    ids = [f"{group}/img{k}" for group in ("a", "b/c", "d") for k in range(5)]
    scores, image_of = scores_of(40, 15), torch.arange(40) % 10  # no query of d
    expected = [hits(scores[q], own, range(own // 5 * 5, own // 5 * 5 + 5)) for q, own in enumerate(image_of.tolist())]
    found = within_sets(scores, image_of, ids)
    assert (found["sets"], found["images_per_set"]) == (2, 5)
    assert found["accuracy"]["value"] == pytest.approx(100 * np.mean(expected))
    assert 0 < np.mean(expected) < 1
    low, high = found["accuracy"]["interval"]
    assert low <= found["accuracy"]["value"] <= high
    assert within_sets(torch.zeros(40, 15), image_of, ids)["accuracy"]["value"] == 0  # ties favour nobody
    perfect = torch.nn.functional.one_hot(image_of, 15).float()
    assert within_sets(perfect, image_of, ids)["accuracy"]["value"] == 100
    with pytest.raises(InputError, match="image 'img1' is of no set"):
        within_sets(scores, image_of, ["img1", *ids[1:]])


# --- through the scripts ----------------------------------------------------------------------------------------------

KINDS = {
    "coco": (data_sets.coco, "val2017", "--folds", "2"),
    "imagecode": (data_sets.imagecode, "valid", "--sets"),
    "captions": (data_sets.captions, "test", "--folds", "3"),
    "jsonl": (data_sets.lines, "train"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_data_set_is_trained_on_indexed_and_evaluated(name, script, base, tmp_path, capsys):
    """The kind is guessed everywhere; objects come from boxes where there are any, and a line says where not."""
    make, split, *protocol = KINDS[name]
    root, out = make(tmp_path / "data" / name), tmp_path / "trained"
    settings = {
        "model.name": base,
        "data.root": root,
        "data.train_split": split,
        "data.eval_split": split,
        "merge.num_regions": 6,
        "train.output_dir": out,
        "train.train_batch_size": 2,
        "train.grad_accum_steps": 1,
        "train.num_train_epochs": 1,
        "train.bf16": "false",
        "train.dataloader_num_workers": 0,
    }
    train(load_config(None, [f"{key}={value}" for key, value in settings.items()]))
    told = capsys.readouterr().out
    assert f"note: {root} is read as {name} (data.name={name})" in told
    boxes = name in ("coco", "jsonl")
    assert (f"note: {split} of {root} has no boxes: trained without object labels" in told) is not boxes
    index, metrics = tmp_path / "index", tmp_path / "metrics.json"
    words = ["--data-root", root, "--cache-dir", index, "--splits", split, "--adapter-path", out]
    script("cache").main([str(word) for word in (*words, f"model.name={base}", "merge.num_regions=6")])
    words = ["--cache-dir", index, "--split", split, "--output-json", metrics, "--data-root", root, *protocol]
    result = script("eval").main([str(word) for word in words])
    records = make_reader(name).load_split(root, split, boxes=False)
    assert (result["images"], result["queries"]) == (len(records), sum(len(r.captions) for r in records))
    held = json.loads(metrics.read_text())
    told = capsys.readouterr().out
    if "--folds" in protocol:
        assert held["folds"]["count"] == int(protocol[1])
        assert f"mean of {protocol[1]} folds, image to text: r@1" in told
    if "--sets" in protocol:
        assert (held["within_sets"]["sets"], held["within_sets"]["images_per_set"]) == (2, 10)
        assert "within 2 sets of 10: accuracy" in told
    assert len(protocol_lines(held)) == {"--folds": 2, "--sets": 1}.get(protocol[0] if protocol else "", 0)


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["--folds", "9"], "9 folds of 8 images"), (["--folds", "0"], "0 folds of 8"), (["--sets"], "is of no set")],
)
def test_a_protocol_that_can_t_be_is_refused_before_the_work(script, base, world, tmp_path, monkeypatch, words, reason):
    asked = ["--data-root", world, "--cache-dir", tmp_path / "c", "--splits", "test", f"model.name={base}"]
    script("cache").main([str(word) for word in (*asked, "merge.num_regions=4")])

    def scored(*_):
        raise AssertionError("the split was scored")

    monkeypatch.setattr("samer.report.evaluate.evaluate_index", scored)
    with pytest.raises(InputError, match=reason):
        script("eval").main(["--cache-dir", str(tmp_path / "c"), "--output-json", str(tmp_path / "m.json"), *words])


def karpathy_of_six(root):
    """Six images of test with seven captions each, and one of train."""
    rows = [(k, "test", [f"Caption {n} of {k}." for n in range(7)]) for k in range(1, 7)]
    return data_sets.karpathy(root, [*rows, (9, "train", ["A caption."] * 5)])


def questions(root):
    """Four pages; one question is asked of two of them."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from parquet_sets import question_form

    return question_form(root, [("How many?", 1), ("Who?", 2), ("How many?", 3), ("Why?", 4)])


PROTOCOLS = {  # images and queries that count
    "coco": (karpathy_of_six, 6, 30),
    "flickr30k": (None, 8, 40),
    "imagecode": (data_sets.imagecode, 20, 4),
    "docvqa": (questions, 4, 3),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_s_commands_run_as_its_config_states_them(name, script, base, world, tmp_path):
    """With a small model, of a small data set."""
    make, images, queries = PROTOCOLS[name]
    root = make(tmp_path / "data") if make else world
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert load_config(CONFIGS / f"{name}.yaml").data.name in READERS
    commands = re.findall(r"python scripts/(\w+)\.py ((?:.|\n#)*?[^\\])$", text, re.M)
    assert [command for command, _ in commands] == ["cache", "eval"]
    places = {"DIR": str(root), f"configs/{name}.yaml": str(CONFIGS / f"{name}.yaml")}
    for command, words in commands:
        words = words.replace("\\\n#", " ").split()
        words = [places.get(word, word.replace("outputs/", f"{tmp_path}/")) for word in words]
        if "--adapter-path" in words:
            words = [*words[: words.index("--adapter-path")], f"model.name={base}", "merge.num_regions=6"]
        result = script(command).main(words)
    assert (result["images"], result["queries"]) == (images, queries)
    assert ("folds" in result, "within_sets" in result) == (name == "coco", name == "imagecode")
    assert ("rsum" in result) is (name != "docvqa")


def test_a_run_goes_on_whether_or_not_its_kind_is_named(base, tmp_path, capsys):
    """The config of an earlier version names flickr where today's is guessed."""
    root = data_sets.lines(tmp_path / "data")
    settings = ["train.bf16=false", "train.dataloader_num_workers=0", "data.eval_split=", f"model.name={base}"]
    settings += [f"data.root={root}", f"train.output_dir={tmp_path / 'out'}", "train.num_train_epochs=1"]
    train(load_config(None, [*settings, "data.reader=jsonl"]))
    train(load_config(None, settings))
    assert "nothing is left to train" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"data\.name='jsonl', now 'coco'"):
        train(load_config(None, [*settings, "data.name=coco"]))
