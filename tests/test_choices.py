"""The study of chosen captions and mixup: foils and measures against loops, arms alike in steps, going on, the page."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import naive_merge

from samer.compare import choices, foils
from samer.compare.choices import ARMS, PAIRS, Settings, compared, study
from samer.config import DataConfig, InputError, MergeConfig, load_config
from samer.data import training_records
from samer.features.read import FeatureStore
from samer.features.write import write_features
from samer.report.choices import holds, page
from samer.retrievers.hf import Retriever
from samer.selection.cpi import Scored
from samer.selection.phrases import TYPES, phrases_of


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def store(world, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write_features(folder, world, ["train", "test"], Retriever.load(str(base)), dtype="float32")
    return folder


@pytest.fixture
def config(world, base, store):
    words = {
        "model.name": base,
        "data.root": world,
        "data.features": store,
        "data.limit_train_images": 6,
        "data.limit_eval_images": 5,
        "merge.num_regions": 6,
        "train.bf16": "false",
        "train.train_batch_size": 5,
        "train.grad_accum_steps": 1,
        "train.num_train_epochs": 1,
        "train.eval_batch_size": 4,
        "train.dataloader_num_workers": 0,
        "train.logging_steps": 1,
    }
    return load_config(None, [f"{key}={value}" for key, value in words.items()])


@pytest.fixture
def run(config, store, base, tmp_path):
    """Runs the study in a folder."""

    def begin(seeds=(0,), settings=None, **changes):
        images, texts = FeatureStore(store, str(base)), Retriever.load(str(base))
        return study(
            replace(config, **changes),
            tmp_path / "study",
            images,
            texts,
            settings=settings or Settings(),
            seeds=seeds,
            split="test",
        )

    return begin


# --- foils ----------------------------------------------------------------------------------------------------------


def test_a_foil_has_one_phrase_of_another_image(world):
    records = training_records(DataConfig(root=str(world)), boxes=False)
    made = foils.foils(records, 0)
    assert made == foils.foils(records, 0) != foils.foils(records, 1)
    assert {foil.type for foil in made} == set(TYPES)
    captions = [record.captions[k % 5] for k, record in enumerate(records)]
    phrases = {(s.type, c.text[s.start : s.end].lower()) for c in captions for s in phrases_of(c)}
    assert len({(foil.image, foil.type) for foil in made}) == len(made)
    for foil in made:
        caption = captions[foil.image]
        assert foil.text == caption.text
        swapped = [
            foil.foil[s.start : len(foil.foil) - (len(foil.text) - s.end)]
            for s in phrases_of(caption)
            if s.type == foil.type
            and foil.foil.startswith(foil.text[: s.start])
            and foil.foil.endswith(foil.text[s.end :])
        ]
        assert any((foil.type, phrase) in phrases and phrase not in foil.text.lower() for phrase in swapped)


def test_measures_equal_loops(world, retriever, tmp_path):
    records = training_records(DataConfig(root=str(world), limit_train_images=5), boxes=False)
    merge = MergeConfig(num_regions=6)
    asked = foils.Asked(records, foils.foils(records, 0), tmp_path / "foils", retriever, 3)
    found = foils.measure(retriever, asked, merge)
    visual = [retriever.encode_images(retriever.record_inputs([record])) for record in records]
    images = [naive_merge(each.tokens[0], each.coords[0], merge)[0] for each in visual]
    query = lambda text: retriever.encode_queries(retriever.query_inputs([text])).tokens[0]
    score = lambda tokens, image: float((tokens @ image.T).amax(1).mean())
    texts = [(k, query(caption.text)) for k, record in enumerate(records) for caption in record.captions]
    rows = [[score(tokens, image) for image in images] for _, tokens in texts]
    assert found["r@1"].tolist() == [100.0 * (np.argmax(row) == k) for row, (k, _) in zip(rows, texts)]
    right = {kind: [] for kind in TYPES}
    for foil in asked.foils:
        margin = score(query(foil.text), images[foil.image]) - score(query(foil.foil), images[foil.image])
        assert abs(margin) > 1e-6
        right[foil.type].append(100.0 * (margin > 0))
    assert {kind: found[f"foil:{kind}"].tolist() for kind in TYPES} == right
    assert 0 < sum(map(sum, right.values())) < 100 * len(asked.foils)
    unit = lambda tokens: torch.nn.functional.normalize(tokens.mean(0), dim=0)
    means = [unit(image) for image in images]
    near = [float((unit(tokens) - means[k]).square().sum()) for k, tokens in texts]
    assert float(found["alignment"]) == pytest.approx(np.mean(near), abs=1e-5)
    spread = [np.exp(-2 * float((a - b).square().sum())) for k, a in enumerate(means) for b in means[:k]]
    assert float(found["uniformity"]) == pytest.approx(np.log(np.mean(spread)), abs=1e-5)


# --- the study ------------------------------------------------------------------------------------------------------


def test_arms_train_alike_on_what_their_rule_keeps(run, tmp_path):
    results = run()
    steps, captions = {}, {}
    for arm in ARMS[1:]:
        place = tmp_path / "study" / "runs" / f"{arm.name.replace(', ', '-')}-seed0"
        steps[arm.name] = json.loads((place / "history.json").read_text())[-1]["step"]
        trained = load_config(place / "config.yaml")
        assert trained.train.mixup == arm.mixup
        records = training_records(trained.data, boxes=False)
        captions[arm.name] = {(r.image_id, c.text) for r in records for c in r.captions}
    assert steps == dict.fromkeys(captions, 6)
    assert {name: len(own) for name, own in captions.items()} == {
        "all": 30,
        "random": 15,
        "alignment": 15,
        "cpi": 15,
        "all, mixup": 30,
    }
    assert len({frozenset(own) for own in captions.values()}) == 4  # three halves, and all of them twice
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == [arm.name for arm in ARMS]
    assert len({row["alignment"] for row in rows.values()}) == len(ARMS)  # no projector is another's
    assert [(entry["of"], entry["minus"]) for entry in results["differences"]] == list(PAIRS)
    assert results["choices"]["rules"]["cpi"]["captions"] == 15
    text = page(results)
    assert "one seed decides nothing" in text
    assert text.count("nothing holds") == len(PAIRS)


def test_a_study_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch):
    train, made = choices.train, []

    def stopping(config):
        if len(made) == 7:
            raise KeyboardInterrupt
        made.append(config.train.run_name)
        return train(config)

    monkeypatch.setattr(choices, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        run((0, 1))
    written = json.loads((tmp_path / "study" / "results.json").read_text())
    assert written["about"]["seeds"] == [0]  # the first seed was whole
    monkeypatch.setattr(choices, "train", train)
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "study").rglob("projector.safetensors")}
    assert len(finished) == 7 + 7  # of a run and of its last checkpoint
    again = run((0, 1))
    assert again["about"]["seeds"] == [0, 1]
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    first = {row["name"]: row["r@1"]["seeds"][0] for row in written["rows"]}
    assert {row["name"]: row["r@1"]["seeds"][0] for row in again["rows"]} == first
    with pytest.raises(InputError, match=r"settings.json: this study has drop 0.1, now 0.0"):
        run((0, 1), Settings(drop=0.0))


def test_what_can_not_be_studied_is_refused(run):
    with pytest.raises(InputError, match="seeds"):
        run(())
    with pytest.raises(InputError, match="querybank needs a bank"):
        run(merge=MergeConfig(compressor="querybank", num_regions=6))
    with pytest.raises(InputError, match="share"):
        Settings(share=0.95)


def test_the_script_writes_a_page(config, world, store, base, tmp_path, script):
    file = tmp_path / "config.yaml"
    file.write_text("train: {bf16: false, train_batch_size: 20, grad_accum_steps: 1, dataloader_num_workers: 0}\n")
    words = ["--data-root", world, "--out", tmp_path / "out", "--config", file, "--features", store]
    words += [f"model.name={base}", "merge.num_regions=4", "data.limit_train_images=4", "data.limit_eval_images=4"]
    words += ["--seeds", 0]
    results = script("choices").main([str(word) for word in words])
    assert (tmp_path / "out" / "results.md").read_text() == page(results)


# --- what is told ---------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_query_and_seed():
    """By hand: two seeds of two arms, an untouched one; three queries of two images."""
    asked = type("Asked", (), {"owner": np.array([0, 0, 1]), "records": [None, None], "foils": []})
    value = lambda *r1: {
        **{name: np.array(r1, dtype=float) for name in foils.RETRIEVAL},
        "back:r@1": np.array([100.0, 0.0]),
        "alignment": np.array([1.0]),
        "uniformity": np.array([-1.0]),
    }
    runs = {arm.name: [value(0, 0, 0), value(0, 0, 0)] for arm in ARMS}
    runs["untouched"] = [value(0, 0, 100)]
    runs["cpi"] = [value(100, 0, 100), value(100, 100, 100)]
    runs["random"] = [value(100, 0, 0), value(0, 0, 0)]
    found = compared(runs, asked)
    (entry,) = [e for e in found["differences"] if (e["of"], e["minus"]) == ("cpi", "random")]
    assert entry["r@1"]["difference"] == pytest.approx(200 / 3, abs=1e-3)  # (5 - 1) / 6 of 100
    assert entry["r@1"]["seeds"] == [pytest.approx(100 / 3, abs=1e-3), 100.0]
    (plain,) = [e for e in found["differences"] if (e["of"], e["minus"]) == ("all", "untouched")]
    assert plain["r@1"]["seeds"] == [pytest.approx(-100 / 3, abs=1e-3)] * 2
    (row,) = [row for row in found["rows"] if row["name"] == "cpi"]
    assert row["r@1"]["value"] == pytest.approx(500 / 6, abs=1e-3)


@pytest.mark.parametrize(
    ("interval", "seeds", "expected"),
    [
        ([0.1, 0.5], [0.2, 0.4], True),
        ([-0.5, -0.1], [-0.2, -0.4], True),
        ([0.1, 0.5], [0.2, -0.1], False),
        ([0.1, 0.5], [0.2], False),
        ([-0.1, 0.5], [0.2, 0.1], False),
    ],
)
def test_what_holds(interval, seeds, expected):
    assert holds({"interval": interval, "seeds": seeds}) is expected


def test_what_the_rules_keep_is_described():
    drops = lambda value: {"object": value, "attribute": None, "relation": None}
    scored = [Scored(f"i{k % 3}", "a b" + " c" * k, 0.9 - 0.1 * k, drops(0.1 * k)) for k in range(6)]
    found = choices.choices(scored, Settings(drop=0.0), [0])
    assert found["rank correlation of cpi and score"] == -1.0
    assert found["shared by cpi and alignment"] == 0.0
    assert found["rules"]["cpi"] == {
        **{"captions": 3, "images": 3, "words": 6.0, "score": 0.5},
        **{"object": 0.4, "attribute": None, "relation": None},
    }
