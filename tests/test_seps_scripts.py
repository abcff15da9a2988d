"""SEPS by its commands, on the generated data set that shows the leak; the page of what is measured."""

import argparse
import json
import random
from pathlib import Path

import pytest
import torch
from small_towers import SIDE, save_text, save_vision

from samer.config import InputError, load_config
from samer.data import make_reader
from samer.report.seps import seps_page
from samer.retrievers.pretrained import TowerConfig
from samer.retrievers.towers import without_adapters
from samer.seps.settings import SepsConfig
from samer.world import leak

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("leak")
    leak.write_leak(place / "f30k", {"train": 16, "dev": 6, "test": 10}, seed=3)
    leak.save_towers(place / "towers")
    return place


def small(place):
    vision, text = (place / "towers" / kind for kind in ("vision", "text"))
    sizes = ("towers.image_size=32", "towers.embed_size=16", "train.epochs=1", "train.bf16=false", "data.workers=1")
    return [f"towers.vision={vision}", f"towers.text={text}", *sizes]


# --- the data set ---------------------------------------------------------------------------------------------------


def test_dense_texts_name_all_that_is_there_and_captions_two_of_it(place):
    reader = make_reader("captions")
    seen = set()
    for split, count in (("train", 16), ("dev", 6), ("test", 10)):
        plain = reader.load_split(place / "f30k", split, boxes=False)
        dense = reader.load_split(place / "f30k", f"dense_{split}", boxes=False)
        assert len(plain) == len(dense) == count
        for one, other in zip(plain, dense):
            assert one.image_id == other.image_id
            held = other.captions[0].text.removeprefix("a ").split(" and a ")
            assert len(set(held)) == 5
            assert set(held) <= set(leak.THINGS)
            named = [caption.text.removeprefix("a ").split(" and a ") for caption in one.captions]
            assert len({frozenset(pair) for pair in named}) == 5
            assert all(len(set(pair)) == 2 and set(pair) <= set(held) for pair in named)
            seen.add(one.image_id)
    assert len(seen) == 32
    written = (place / "f30k" / "id_mapping.json").stat().st_mtime_ns
    leak.write_leak(place / "f30k", {"train": 1})
    assert (place / "f30k" / "id_mapping.json").stat().st_mtime_ns == written


def test_the_ceiling_is_what_a_perfect_reader_of_captions_gets():
    """By trying: pictures that fit come first, in random order."""
    lot = random.Random(0)
    things = ("red disc", "red ring", "blue disc", "blue bar", "cyan post")
    held = [lot.sample(things, 3) for _ in range(12)]
    told = lambda some: " and ".join(f"a {thing}" for thing in some)
    captions = [[told(lot.sample(own, 2)) for _ in range(2)] for own in held]
    found = leak.ceiling(captions, [told(own) for own in held])
    hits, tries = dict.fromkeys((1, 5, 10), 0), 400
    for _ in range(tries):
        for right, own in enumerate(captions):
            for text in own:
                named = set(text.removeprefix("a ").split(" and a "))
                fit = [k for k, each in enumerate(held) if named <= set(each)]
                lot.shuffle(fit)
                for k in hits:
                    hits[k] += right in fit[:k]
    for k, count in hits.items():
        assert found[f"r@{k}"] == pytest.approx(100 * count / tries / 24, abs=2)
    assert 10 < found["r@1"] < found["r@5"] < found["r@10"] <= 100


# --- commands -------------------------------------------------------------------------------------------------------


def test_train_and_eval_by_the_flags_of_the_seed(place, tmp_path, script, capsys):
    out = tmp_path / "runs" / "f30k_vit"
    flags = ["--dataset", "f30k", "--data_path", str(place), "--logger_name", str(out), "--batch_size", "16"]
    flags += ["--vit_type", "vit", "--embed_size", "16", "--sparse_ratio", "0.6", "--aggr_ratio", "0.5"]
    assert script("seps_train").main([*flags, *small(place), "seps.dense=query"]) == out
    said = capsys.readouterr().out
    assert "the published f30k 29,000 and 145,000" in said
    settings = load_config(out / "seps.yaml", [], SepsConfig)
    assert (settings.seps.sparse_ratio, settings.seps.aggr_ratio) == (0.6, 0.5)
    assert settings.data.root == str(place / "f30k")
    words = [
        "--model",
        str(out),
        "--data-root",
        str(place / "f30k"),
        "--out",
        str(tmp_path / "test"),
        "data.name=captions",
    ]
    found = script("seps_eval").main([*words, "--folds", "2", "train.eval_block=4"])
    assert "a leak" in capsys.readouterr().out
    assert len(found["folds"]) == 2
    assert found == json.loads((tmp_path / "test" / "metrics.json").read_text())
    assert len(list((tmp_path / "test").glob("scores-*.safetensors"))) == 3
    alone = script("seps_eval").main([*words, "train.eval_block=4"])  # the same blocks, another question
    assert alone["cost"]["seconds_per_pair"] is None
    with pytest.raises(InputError, match="10 images can't be cut into 3 folds"):
        script("seps_eval").main([*words, "--folds", "3", "train.eval_block=4"])


def test_flags_choose_towers_and_override_the_config(script, capsys):
    module = script("seps_train")
    options = argparse.Namespace(
        data_path="d", dataset="coco", img_res=None, vit_type="swin_384", overrides=["seps.dense=query"],
        logger_name=None, batch_size="8", embed_size=None, sparse_ratio="0.7", aggr_ratio=None,
    )  # fmt: skip
    assert module.settings(options, "swin") == [
        "data.root=d",
        "towers.vision=microsoft/swin-base-patch4-window12-384",
        "towers.image_size=384",
        "train.batch_size=8",
        "seps.sparse_ratio=0.7",
        "seps.dense=query",
    ]
    with pytest.raises(SystemExit):
        module.main(["--multi_gpu", "1"])
    assert "--multi_gpu 1 needs torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["f30k", "coco"])
@pytest.mark.parametrize(("kind", "rho", "aggr"), [("vit", 0.5, 0.4), ("swin", 0.8, 0.6)])
def test_configs_are_the_released_settings_without_the_traps(dataset, kind, rho, aggr):
    config = load_config(ROOT / "configs" / f"seps_{dataset}_{kind}.yaml", [], SepsConfig)
    assert (config.seps.sparse_ratio, config.seps.aggr_ratio, config.seps.margin) == (rho, aggr, 0.2)
    assert (config.towers.embed_size, config.towers.max_words, config.towers.image_size) == (512, 90, 224)
    assert kind in config.towers.vision
    training = config.train
    assert (training.epochs, training.batch_size, training.learning_rate, training.tower_rate) == (30, 64, 2e-4, 0.1)
    assert (training.decay_epochs, training.decay, training.max_grad_norm) == ((9, 15, 20, 25), 0.3, 2.0)
    assert (training.weight_decay, training.augment, training.sum_epochs) == (1e-4, 0.2, 1)
    assert (config.seps.dense, config.seps.select_gradient, training.nan_as_zero) == ("none", True, False)
    assert (config.data.eval_split, config.data.published) == ("dev", dataset)


# --- evidence -------------------------------------------------------------------------------------------------------


def test_the_leak_is_measured_and_told(tmp_path, script, monkeypatch):
    module = script("seps_evidence")
    monkeypatch.setattr(module, "VARIANTS", ("code",))
    words = ["--out", str(tmp_path), "--seeds", "0", "--epochs", "1", "--train", "32", "--test", "12"]
    module.main(["leak", *words])
    found = json.loads((tmp_path / "seps.json").read_text())["leak"]
    assert [row["dense"] for row in found["rows"]] == ["none", "image", "query"]
    assert 0 < found["ceiling"]["r@1"] <= 100
    module.main(["page", "--out", str(tmp_path), "--page", str(tmp_path / "seps.md")])
    page = (tmp_path / "seps.md").read_text()
    assert "**the answer's (leak)**" in page
    assert f"best possible R@1 is {found['ceiling']['r@1']:.1f}" in page


def test_photographs_are_measured_beside_an_index(tmp_path, script, world):
    save_vision(tmp_path / "swin", "swin"), save_text(tmp_path / "bert")
    sizes = {"image_size": SIDE, "max_text_tokens": 16}
    without_adapters(TowerConfig(str(tmp_path / "swin"), str(tmp_path / "bert"), **sizes), tmp_path / "model")
    words = ["--data-root", str(world), "--dtype", "float32", "--splits", "train", "val", "test"]
    script("features").main(["--out", str(tmp_path / "store"), *words, f"model.name={tmp_path / 'model'}"])
    words = ["--data-root", str(world), "--features", str(tmp_path / "store"), "--model", str(tmp_path / "model")]
    words += ["--seeds", "0", "--epochs", "1", "--regions", "4", "--train-split", "train", "--batch-size", "12"]
    script("seps_evidence").main(["photos", "--out", str(tmp_path / "out"), *words])
    rows = json.loads((tmp_path / "out" / "seps.json").read_text())["photos"]["rows"]
    assert [(row["name"].split()[0], row["k"]) for row in rows] == [
        ("late", None), ("SaMer", 4), ("LAPS-like:", 4), ("SEPS", 4), ("SEPS", 4),
    ]  # fmt: skip
    width = 128
    assert [row["bytes_per_image"] for row in rows] == [width * 2 * n for n in (16, 4, 16, 16, 16)]
    assert all(row["seconds_per_query_1m"] > 0 for row in rows)
    settings = load_config(tmp_path / "out" / "photos" / "laps_4_0" / "seps.yaml", [], SepsConfig)
    torch.testing.assert_close(settings.seps.aggr_ratio * 0.5 * 16, 3.5)  # and the dropped ones' mean


def test_the_page_says_what_the_rows_hold():
    recalls = ("t2i_r@1", "t2i_r@5", "t2i_r@10", "i2t_r@1", "i2t_r@5", "i2t_r@10", "rsum")
    row = lambda value, **facts: {**facts, **dict.fromkeys(recalls, value)}
    leaky = [
        row(value, variant="code", dense=mode, seed=seed)
        for mode, values in (("none", (10.0, 20.0)), ("image", (12.0, 14.0)), ("query", (80.0, 90.0)))
        for seed, value in enumerate(values)
    ]
    cost = {"bytes_per_image": 65_536, "seconds_per_query_1m": 1234.5}
    photos = [row(30.0, name="LAPS-like", k=16, seed=0, **cost), row(40.0, name="late", k=None, seed=0, **cost)]
    best = {"r@1": 25.0, "r@5": 60.0, "r@10": 80.0}
    page = seps_page(
        {
            "leak": {"train": 2000, "test": 300, "epochs": 4, "ceiling": best, "rows": leaky},
            "photos": {"train_split": "train", "epochs": 4, "limit_images": None, "rows": photos},
        }
    )
    assert "`code`: none 15.0, the candidate's own 13.0, the answer's 85.0." in page
    assert "Above what captions allow: `code` with **the answer's (leak)**." in page
    assert "| code | none | 15.0 (10.0 to 20.0) |" in page
    assert "|  | *best that captions allow* | 25.0 | 60.0 | 80.0 |" in page
    assert "| LAPS-like | 16 | 30.0 |" in page
    assert "| late | all | 40.0 |" in page
    assert "| 65,536 | 1,234.5 |" in page
    assert "seeds, " not in page
    more = {
        "photos": {"train_split": "train", "epochs": 4, "limit_images": 9, "rows": [*photos, {**photos[1], "seed": 1}]}
    }
    assert "Of 2 seeds, LAPS-like, 16 vectors: 1." in seps_page(more)
    assert "Best rSum of an index late: 40.0, 65,536 bytes" in page
    assert "; of what scores pairs LAPS-like, 16 vectors: 30.0, 65,536 bytes" in page
    assert "COCO 5K is 125,000,000 pairs: at this pace 42.9 hours by 16 vectors." in page  # 1,234.5e-6 s a pair
    poor = [{**each, "t2i_r@1": 20.0} for each in leaky]
    page = seps_page({"leak": {"train": 2000, "test": 300, "epochs": 4, "ceiling": best, "rows": poor}})
    assert "Above what captions allow" not in page
    assert "Photographs" not in page
