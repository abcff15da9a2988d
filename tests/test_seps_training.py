"""SEPS trained end to end on a small world: processes, interruptions, what is altered, what is picked and measured."""

import json
import math
import os
import random
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from PIL import Image
from safetensors.torch import load_file
from small_towers import PLAIN, SIDE, save_vision, small_tokenizer
from transformers import BertConfig, BertModel

from samer.config import InputError
from samer.data import flickr
from samer.runtime.signals import Stopped
from samer.seps import data as data_module
from samer.seps import evaluate, inputs
from samer.seps.data import SplitData, read_split
from samer.seps.head import Images, Texts
from samer.seps.model import load_model, make_model
from samer.seps.run import SepsRun
from samer.seps.selection import pooled
from samer.seps.settings import HeadSettings, SepsConfig, SepsData, SepsTowers, SepsTraining
from samer.seps.train import train_seps

CPU = torch.device("cpu")
MODES = [("code", "query"), ("code", "image"), ("code", "none"), ("paper", "query"), ("paper", "image")]


@pytest.fixture(scope="module")
def place(tmp_path_factory, world):
    """Towers without dropout, and dense texts of every image: all of its captions."""
    place = tmp_path_factory.mktemp("seps")
    records = {split: flickr.load_split(world, split, boxes=False) for split in ("train", "val", "test")}
    texts = [caption.text for split in records.values() for record in split for caption in record.captions]
    words = sorted({word.lower() for text in texts for word in text.replace(".", " .").replace(",", " ,").split()})
    save_vision(place / "vit", "vit"), save_vision(place / "swin", "swin")
    torch.manual_seed(1)
    tokenizer = small_tokenizer(words, longest=64)
    sizes = {**PLAIN, "num_hidden_layers": 1, "max_position_embeddings": 64}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes, **still)).save_pretrained(place / "bert")
    tokenizer.save_pretrained(place / "bert")
    (place / "dense").mkdir()
    for split, rows in records.items():
        told = [{"image_id": r.image_id, "text": " ".join(c.text for c in r.captions)} for r in rows]
        lines = "".join(json.dumps(row) + "\n" for row in reversed(told))
        (place / "dense" / f"world_{split}.jsonl").write_text(lines)
    return place


@pytest.fixture
def config(place, world, tmp_path):
    towers = SepsTowers(str(place / "vit"), str(place / "bert"), image_size=SIDE, embed_size=16, max_words=12)
    data = SepsData(str(world), eval_split="val", dense=str(place / "dense"), workers=1)
    training = SepsTraining(str(tmp_path / "out"), epochs=2, batch_size=16, learning_rate=2e-3, tower_rate=0.5)
    return SepsConfig(towers, data, HeadSettings(), training)


def of(config, *, seps=(), **settings):
    changed = replace(config, train=replace(config.train, **settings))
    return replace(changed, seps=replace(config.seps, **dict(seps)))


def made(config):
    """A run before its first step."""
    dense = config.seps.dense != "none"
    train = read_split(config.data, "train", None, dense=dense)
    torch.manual_seed(config.train.seed)
    model, feed = make_model(config, CPU, train.records)
    return SepsRun(config, model, feed, train, read_split(config.data, "val", None, dense=dense))


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "dense"), MODES)
def test_a_run_learns_and_its_model_is_measured(config, tmp_path, variant, dense, world):
    config = of(config, seps={"variant": variant, "dense": dense}, epochs=4, tower_rate=1.0)
    folder = train_seps(config, CPU)
    history = json.loads((folder / "history.json").read_text())
    losses = [entry["hinge"] for entry in history["epochs"]]
    assert losses[-1] < losses[1]  # the first is of sums
    best = max(history["epochs"], key=lambda entry: entry["val_rsum"])
    assert history["best_epoch"] == best["epoch"]
    assert not list(folder.glob("checkpoint-*"))
    found = evaluate.evaluate_folder(folder, config, "val", 1, tmp_path / "metrics", CPU)
    assert evaluate.recalls(found)["rsum"] == pytest.approx(best["val_rsum"])
    assert found["leak"] == (dense == "query")
    assert found["cost"]["bytes_per_image"] == (64 + 1 + (dense == "image")) * 16 * 2


def test_an_interrupted_run_goes_on_to_the_same_model(config, monkeypatch):
    """Killed in a step, and stopped after one by SIGTERM, whose checkpoint is of that very step."""
    config = of(config, seps={"variant": "paper", "dense": "query"}, epochs=3)
    whole = train_seps(config, CPU)
    other = of(config, output_dir=f"{config.train.output_dir}-2", save_steps=2)
    steps, before, asked = [], SepsRun.update, []

    def update(self, batch, number):
        steps.append(number)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return before(self, batch, number)

    monkeypatch.setattr(SepsRun, "update", update)
    with pytest.raises(KeyboardInterrupt):
        train_seps(other, CPU)
    monkeypatch.setattr("samer.seps.run.stop_asked", lambda: asked.append(1) or len(asked) == 3)
    with pytest.raises(Stopped):
        train_seps(other, CPU)
    monkeypatch.setattr("samer.seps.run.stop_asked", lambda: False)
    again = train_seps(other, CPU)
    # 60 captions make 3 steps of 16; steps 0 to 4 end an epoch and fill a save_steps, 5 was lost
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "history.json").read_text() == (again / "history.json").read_text()


def last_gradients(run):
    return {name: value.grad for name, value in run.parameters.items() if value.grad is not None}


def one_of_two(rank, config, place):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(place["port"])}
    torch.set_num_threads(1)
    from samer.runtime.processes import process_group

    with process_group():
        run = made(of(config, batch_size=config.train.batch_size // 2))
        losses = run.losses(run.batch(1), run.steps + 1)
        (losses["hinge"] + losses["ratio"]).backward()
        run.share_gradients()
        kept = {name: value.clone() for name, value in last_gradients(run).items()}
        values = run.validate()
        if rank == 0:
            losses = {name: float(value.detach()) for name, value in losses.items()}
            torch.save({"losses": losses, "gradients": kept, "values": values}, place["file"])


@pytest.mark.parametrize(("variant", "dense"), [("code", "query"), ("paper", "image")])
def test_two_processes_give_the_loss_gradients_and_recalls_of_one(config, tmp_path, variant, dense):
    config = of(config, seps={"variant": variant, "dense": dense})
    run = made(config)
    losses = run.losses(run.batch(1), run.steps + 1)
    (losses["hinge"] + losses["ratio"]).backward()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"port": port, "file": str(tmp_path / "two.pt")}
    torch.multiprocessing.spawn(one_of_two, (config, place), nprocs=2)
    two = torch.load(place["file"], weights_only=True)
    for name, value in losses.items():
        assert two["losses"][name] == pytest.approx(float(value.detach()), abs=1e-5), name
    own = last_gradients(run)
    assert set(own) == set(two["gradients"])
    assert len(own) > 40
    assert sum(value.abs().sum() > 0 for value in own.values()) > 40
    for name, value in own.items():
        assert torch.allclose(value, two["gradients"][name], atol=1e-5 * max(1, float(value.abs().max()))), name
    assert run.validate() == pytest.approx(two["values"])


def test_a_vision_tower_without_a_class_token_learns_only_by_the_chosen_tokens(config, place):
    """The released code's cut leaves a Swin without any gradient, and a ViT with that of its [CLS]."""
    for tower, released, ours in (("swin", False, True), ("vit", True, True)):
        for select, expected in ((False, released), (True, ours)):
            changed = replace(config, towers=replace(config.towers, vision=str(place / tower)))
            run = made(of(changed, seps={"select_gradient": select}))
            run.losses(run.batch(0), run.steps)["hinge"].backward()
            grown = [name for name in last_gradients(run) if name.startswith("vision")]
            assert bool(grown) == expected, (tower, select)


def test_rates_fall_and_the_first_epoch_warms_up(config):
    run = made(of(config, decay_epochs=(1, 2), decay=0.5, epochs=3))
    rates = []
    for number in (0, run.steps, 2 * run.steps):
        run.update(run.batch(number), number)
        rates.append([group["lr"] for group in run.optimizer.param_groups])
    assert np.allclose(rates, [[2e-3, 1e-3], [1e-3, 5e-4], [5e-4, 2.5e-4]])
    before = {name: value.detach().clone() for name, value in run.parameters.items()}
    moved = made(of(config, weight_decay=0.0))
    moved.update(moved.batch(0), 0)
    assert all(torch.equal(value, dict(made(config).parameters)[name]) for name, value in moved.parameters.items())
    assert any(not torch.equal(value, moved.parameters[name]) for name, value in before.items())


def test_a_loss_that_is_not_finite_is_an_error_unless_asked_for(config):
    run = made(config)
    with torch.no_grad():
        run.model.head.aggregators[0].scale.fill_(float("nan"))
    with pytest.raises(InputError, match="the loss is nan at step 5"):
        run.update(run.batch(4), 4)
    run.settings = replace(run.settings, nan_as_zero=True)
    before = [value.detach().clone() for value in run.parameters.values()]
    assert set(run.update(run.batch(4), 4).values()) == {0.0}
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, run.parameters.values()))


def test_frozen_towers_stay_and_are_not_written(config, world):
    folder = train_seps(of(config, tower_rate=0.0, epochs=1), CPU)
    assert not [name for name in load_file(folder / "model.safetensors") if name.startswith(("vision.", "text."))]
    records = flickr.load_split(world, "val", boxes=False)
    model, _ = load_model(folder, config, CPU, records)
    fresh, _ = make_model(config, CPU, records)
    assert torch.equal(next(model.vision.parameters()), next(fresh.vision.parameters()))
    torch.manual_seed(5)
    other = Path(config.towers.vision).parent / "other"
    save_vision(other, "vit", seed=5)
    content = json.loads((folder / "config.json").read_text())
    content["towers"]["vision"] = str(other)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="was trained on other files of vision"):
        load_model(folder, config, CPU, records)


def test_heads_train_on_stored_features(config, tmp_path, world, place, script):
    from samer.retrievers.pretrained import TowerConfig
    from samer.retrievers.towers import without_adapters

    towers = TowerConfig(str(place / "swin"), str(place / "bert"), image_size=SIDE, max_text_tokens=64)
    without_adapters(towers, tmp_path / "bare")
    words = ["--data-root", str(world), "--dtype", "float32", "--splits", "train", "val"]
    script("features").main(["--out", str(tmp_path / "store"), *words, f"model.name={tmp_path / 'bare'}"])
    data = replace(config.data, features=str(tmp_path / "store"))
    folder = train_seps(replace(config, data=data), CPU)
    found = evaluate.evaluate_folder(folder, replace(config, data=data), "val", 1, tmp_path / "metrics", CPU)
    assert found["cost"]["vectors_per_image"] == 16
    live = replace(config, towers=replace(config.towers, vision=str(place / "swin")))
    stored, feed = make_model(replace(live, data=data), CPU, flickr.load_split(world, "val", boxes=False))
    records = flickr.load_split(world, "val", boxes=False)
    model, pictures = make_model(live, CPU, records)
    states = model.vision(**pictures.pictures(records)).last_hidden_state
    kept = feed.pictures(records)["hidden"]
    assert kept.shape[:2] == states.shape[:2]
    assert stored.encode_images(feed.pictures(records)).cls is None
    with pytest.raises(InputError, match="was trained on stored features"):
        evaluate.evaluate_folder(folder, config, "val", 1, tmp_path / "other", CPU)


def test_a_finished_run_is_left_alone_and_another_is_refused(config, capsys):
    folder = train_seps(of(config, epochs=1), CPU)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    train_seps(of(config, epochs=1, eval_batch_size=3), CPU)
    assert "nothing is left to train" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(InputError, match=r"train\.epochs=1, now 2"):
        train_seps(of(config, epochs=2), CPU)
    (folder / "seps.yaml").unlink()
    with pytest.raises(InputError, match="holds another model"):
        train_seps(config, CPU)


def test_what_flatters_is_told(config, capsys):
    config = of(config, seps={"dense": "query"}, epochs=1)
    train_seps(replace(config, data=replace(config.data, eval_split="test")), CPU)
    said = capsys.readouterr().out
    assert "picked on test, as released" in said
    assert "of a leak" in said


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "dense"), MODES)
def test_blocks_of_a_split_give_the_scores_of_single_pairs(config, variant, dense, tmp_path, monkeypatch):
    config = of(config, seps={"variant": variant, "dense": dense})
    run = made(config)
    model, feed, data = run.model.eval(), run.inputs, run.validation
    monkeypatch.setattr(evaluate, "TEXTS_AT_ONCE", 7)
    stamp = {"a": 1}
    blocks = {"batch_size": 3, "block": 4, "folder": tmp_path, "stamp": stamp}
    scores, pace = evaluate.score_split(model, feed, data, **blocks)
    assert scores.shape == (30, 6)
    assert pace > 0
    most = config.towers.max_words
    with torch.no_grad():
        for query, picture in ((0, 0), (7, 3), (29, 5), (13, 5)):
            owner = data.records[query // 5]
            words = model.encode_texts(feed.texts([owner.captions[query % 5].text])).tokens[:, :most]
            told = guide = None
            if dense != "none":
                whose = owner if dense == "query" else data.records[picture]
                told = model.encode_texts(feed.texts([data.dense[whose.image_id]])).tokens
                assert told.shape[1] > most  # so that it is cut
                told = told[:, :most]
            if dense == "image":
                guide, told = pooled(told), None
            images = model.encode_images(feed.pictures([data.records[picture]]))
            whole = lambda tokens: torch.ones(tokens.shape[:2], dtype=torch.bool)
            more = {} if told is None else {"dense": Texts(told, whole(told)), "dense_of": torch.tensor([0])}
            alone = model.head(Images(images.tokens, images.cls, guide), Texts(words, whole(words), **more))[0]
            assert float(alone) == pytest.approx(float(scores[query, picture]), abs=1e-5)
    monkeypatch.setattr(evaluate, "score_block", lambda *_: pytest.fail("a block that is there was scored again"))
    again, pace = evaluate.score_split(model, feed, data, **blocks)
    assert torch.equal(scores, again)
    assert np.isnan(pace)


def test_folds_are_means_of_parts():
    torch.manual_seed(0)
    scores, image_of = torch.randn(60, 12), torch.arange(12).repeat_interleave(5)
    found = evaluate.split_metrics(scores, image_of, folds=3)
    for name in ("text_to_image", "image_to_text"):
        values = []
        for fold in range(3):
            part = scores[20 * fold : 20 * fold + 20, 4 * fold : 4 * fold + 4]
            hits = []
            for q in range(20) if name == "text_to_image" else range(4):
                if name == "text_to_image":
                    hits.append(int(part[q].argmax()) == q // 5)
                else:
                    hits.append(int(part[:, q].argmax()) // 5 == q)
            values.append(100 * sum(hits) / len(hits))
        assert found[name]["r@1"]["value"] == pytest.approx(sum(values) / 3, abs=1e-5)
    total = sum(value for name, value in evaluate.recalls(found).items() if name != "rsum")
    assert found["rsum"] == pytest.approx(total, abs=1e-4)
    with pytest.raises(InputError, match="12 images can't be cut into 5 folds"):
        evaluate.split_metrics(scores, image_of, folds=5)


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_words_are_altered_whole_and_specials_stay():
    ids, words = [2, 10, 11, 12, 13, 3], [None, 0, 0, 1, 2, None]
    fates = Counter()
    for seed in range(4000):
        found = inputs.altered(ids, words, random.Random(seed), 0.2, 4, 1000)
        assert (found[0], found[-1]) == (2, 3)
        inner = found[1:-1]
        assert len(inner) in (0, 1, 2, 3, 4)
        if inner[-2:] == [12, 13]:  # only the first word may be changed
            first = inner[:-2]
            if first == [10, 11]:
                fates["kept"] += 1
            elif first == [4, 4]:
                fates["masked"] += 1
            elif first:
                assert len(first) == 2
                fates["replaced"] += 1
            else:
                fates["deleted"] += 1
    total = sum(fates.values())
    for name, share in (("kept", 0.8), ("masked", 0.1), ("replaced", 0.02), ("deleted", 0.08)):
        assert fates[name] / total == pytest.approx(share, abs=0.025), name
    assert inputs.altered(ids, words, random.Random(0), 0.0, 4, 1000) == ids


def test_crops_lie_inside_and_have_the_asked_shares():
    areas, shapes = [], []
    for seed in range(500):
        x1, y1, x2, y2 = inputs.crop_box((400, 300), random.Random(seed))
        assert 0 <= x1 < x2 <= 400
        assert 0 <= y1 < y2 <= 300
        areas.append((x2 - x1) * (y2 - y1) / 120_000)
        shapes.append((x2 - x1) / (y2 - y1))
    assert min(areas) > 0.59
    assert max(areas) <= 1
    assert max(areas) - min(areas) > 0.3
    assert min(shapes) > 0.74
    assert max(shapes) < 1.35
    x1, y1, x2, y2 = inputs.crop_box((1000, 10), random.Random(0))  # nothing fits
    assert (x2 - x1, y2 - y1) == (13, 10)
    assert x1 == 493


def test_pixels_are_stretched_and_normalised():
    image = Image.new("RGB", (40, 20), (255, 0, 128))
    image.paste((0, 255, 0), (20, 0, 40, 20))
    values = inputs.pixels(image, 8, None)
    assert values.shape == (3, 8, 8)
    wanted = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    assert values[:, 0, 0].tolist() == pytest.approx(wanted, abs=0.05)
    turned = [inputs.pixels(image, 8, random.Random(seed)) for seed in range(8)]
    assert {bool(each[0, 0, 0] > each[0, 0, -1]) for each in turned} == {True, False}  # flipped or not


# --- data -----------------------------------------------------------------------------------------------------------


def test_published_counts_are_held_against(tmp_path, capsys):
    import data_sets

    data_sets.captions(tmp_path / "f30k")
    data = SepsData(str(tmp_path / "f30k"), published="f30k")
    assert len(read_split(data, "test", None, dense=False).records) == 3
    assert "the published f30k 1,000 and 5,000" in capsys.readouterr().out
    with pytest.raises(InputError, match="has 3 images and 15 captions, the published f30k 1,000 and 5,000"):
        read_split(replace(data, strict=True), "test", None, dense=False)
    read_split(replace(data, strict=True), "test", 2, dense=False)
    assert data_module.COUNTS[("coco", "testall")] == (5000, 25_000)


def test_dense_texts_by_order_and_by_id(world, place, tmp_path):
    data = SepsData(str(world), dense=str(place / "dense"))
    named = read_split(data, "val", None, dense=True)
    ids = [record.image_id for record in named.records]
    lines = [json.dumps({"text": named.dense[image_id]}) for image_id in ids]
    (tmp_path / "own_val.jsonl").write_text("\n".join(lines))
    ordered = replace(data, dense=str(tmp_path / "own_val.jsonl"))
    assert read_split(ordered, "val", None, dense=True).dense == named.dense
    part = read_split(ordered, "val[2:4]", None, dense=True)
    assert part.dense == {image_id: named.dense[image_id] for image_id in ids[2:4]}
    assert list(read_split(ordered, "val", 1, dense=True).dense) == ids[:1]
    for content, words in (
        ("\n".join(lines[:-1]), "5 lines for 6 images of the split"),
        (json.dumps({"image_id": ids[0], "text": "A dog."}), f"no text of 5 of 6 images, the first is {ids[1]}"),
        (
            "\n".join([json.dumps({"image_id": ids[0], "text": "A."})] * 2),
            f"line 2: a second text for image '{ids[0]}'",
        ),
        ("\n".join([*lines[:-1], '{"text": " "}']), "line 6: empty text"),
        ("\n".join([*lines[:-1], '{"text": 3}']), "line 6: text must be text"),
    ):
        (tmp_path / "own_val.jsonl").write_text(content)
        with pytest.raises(InputError, match=words):
            read_split(ordered, "val", None, dense=True)
    with pytest.raises(InputError, match=r"0 files \*_val.jsonl"):
        read_split(replace(data, dense=str(tmp_path / "..")), "val", None, dense=True)


def test_pairs_leave_unrelated_captions_out(world):
    records = flickr.load_split(world, "val", boxes=False)
    first = records[0]
    captions = (replace(first.captions[0], related=False), *first.captions[1:])
    data = SplitData("val", [replace(first, captions=captions), *records[1:]], {})
    assert len(data.pairs()) == 29
    assert (0, 0) not in data.pairs()


def test_mixup_moves_tokens_towards_another_picture_and_keeps_their_lengths(config):
    run = made(of(config, mixup="midpoint"))
    torch.manual_seed(0)
    tokens, cls, numbers = torch.randn(4, 5, 16), torch.randn(4, 16), torch.tensor([7, 3, 7, 9])
    start = run.mixed([tokens, cls], numbers, 0)
    assert torch.allclose(start[0], tokens, atol=1e-5)
    assert torch.allclose(start[1], cls, atol=1e-5)
    end, _ = run.mixed([tokens, None], numbers, run.steps * 2)
    partner = {0: 3, 1: 0, 2: 3, 3: 1}  # of 7: 9, of 3: 7, of 9: 3
    for k, other in partner.items():
        for i in range(5):
            own = tokens[k, i] / tokens[k, i].norm()
            units = [token / token.norm() for token in tokens[other]]
            near = max(units, key=lambda unit, own=own: float(unit @ own))
            middle = (own + near) / (own + near).norm() * tokens[k, i].norm()
            assert torch.allclose(end[k, i], middle, atol=1e-5)
    plain = made(config)
    values = [float(each.losses(each.batch(2), 2)["hinge"].detach()) for each in (plain, run)]
    assert abs(values[0] - values[1]) > 1e-4


def test_what_is_logged_of_a_step_is_that_of_loops(config):
    run = made(config)
    batch = run.batch(0)
    losses = run.losses(batch, 0)
    unit = lambda vector: vector / vector.norm()
    with torch.no_grad():
        tokens = run.model.encode_images(batch["pictures"]).tokens
        words = run.model.encode_texts(batch["texts"])
        pictures = [unit(each.mean(0)) for each in tokens]
        texts = [unit(each[mask].mean(0)) for each, mask in zip(words.tokens, words.mask)]
    wanted = sum(float((p - t).square().sum()) for p, t in zip(pictures, texts)) / len(texts)
    assert float(losses["alignment"]) == pytest.approx(wanted, abs=1e-5)
    distinct = list({int(number): p for number, p in reversed(list(zip(batch["images"], pictures)))}.values())
    pairs = [(a, b) for k, a in enumerate(distinct) for b in distinct[k + 1 :]]
    mean = sum(math.exp(-2 * float((a - b).square().sum())) for a, b in pairs) / len(pairs)
    assert float(losses["uniformity"]) == pytest.approx(math.log(mean), abs=1e-5)


def test_chosen_captions_are_what_is_trained_on(config, world, tmp_path):
    records = flickr.load_split(world, "train", boxes=False)
    rows = [{"image_id": r.image_id, "text": r.captions[0].text} for r in records[:8]]
    (tmp_path / "chosen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = replace(config.data, captions=str(tmp_path / "chosen.jsonl"))
    config = replace(of(config, batch_size=4, epochs=1), data=data)
    folder = train_seps(config, CPU)
    assert (folder / "history.json").is_file()
    chosen = read_split(data, "train", None, dense=True, captions=data.captions)
    assert [len(record.captions) for record in chosen.records] == [1] * 8
    assert len(chosen.dense) == 12


def test_a_tracker_hears_of_every_epoch(config, monkeypatch):
    class Tracker:
        heard, ended = [], False

        def log(self, values, step):
            self.heard.append((step, sorted(values)))

        def end_training(self):
            self.ended = True

    tracker = Tracker()
    monkeypatch.setattr("samer.seps.train.check_trackers", lambda names: names.split(","))
    monkeypatch.setattr("samer.seps.train._tracker", lambda *_: tracker)
    train_seps(of(config, report_to="some"), CPU)
    assert [step for step, _ in tracker.heard] == [3, 6]
    assert {"hinge", "uniformity", "val_rsum"} <= set(tracker.heard[0][1])
    assert tracker.ended


def test_bfloat16_reaches_the_towers_and_not_the_head(config):
    run = made(of(config, bf16=True))
    plain = made(config)
    tokens = [each.model.encode_images(each.batch(0)["pictures"]).tokens for each in (run, plain)]
    assert tokens[0].dtype == torch.float32
    assert torch.allclose(tokens[0], tokens[0].bfloat16().float())  # they were bfloat16
    assert not torch.allclose(tokens[1], tokens[1].bfloat16().float())
    run.update(run.batch(4), 4)
    assert all(each.dtype == torch.float32 for each in run.parameters.values())
