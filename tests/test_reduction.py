"""What reduced towers cost and keep: counted FLOPs, the settings of a tier, k-NN, and scripts/reduce.py."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_towers import PICTURE, PLAIN, save_text, save_vision
from test_reduced_retrievers import ragged
from test_towers import make, pictures
from transformers import ViTConfig, ViTModel

from samer.compare.reduction import Cell, choose_cells, kinds_of, measure_cells, neighbours_right
from samer.compare.tower_tuning import tune_tower
from samer.config import InputError, ReduceConfig
from samer.data import make_reader
from samer.data.records import Caption, ImageRecord, Phrase
from samer.metrics import query_metrics
from samer.reducers.cost import Meter, flops, pace, tiers
from samer.reducers.running import reduced
from samer.report.reducers import distinct, findings
from samer.retrievers.hf import Retriever

WIDTH, MLP, HEADS, BLOCKS = 24, 48, 2, 5


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**PLAIN, **PICTURE), add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    place = tmp_path_factory.mktemp("towers")
    return str(make(place / "retriever", save_vision(place / "vision"), save_text(place / "text")))


def block_flops(before, after):
    """Of a block whose attention sees `before` tokens and whose MLP sees `after`."""
    return 8 * before * WIDTH**2 + 4 * before**2 * WIDTH + 4 * after * WIDTH * MLP


def test_flops_are_those_of_the_products(tower):
    image = torch.randn(1, 3, 32, 32)
    see = lambda: tower(image)
    patches = 2 * 64 * WIDTH * 3 * 4 * 4
    assert flops(see) == patches + BLOCKS * block_flops(65, 65)
    with reduced(tower, ReduceConfig("tome", r=4)):
        counts = [65 - 4 * n for n in range(BLOCKS + 1)]
        similar = [2 * (n // 2) * ((n - 1) - n // 2) * WIDTH // HEADS for n in counts[:BLOCKS]]
        wanted = sum(block_flops(*pair) for pair in itertools.pairwise(counts)) + sum(similar)
        assert flops(see) == patches + wanted
    with reduced(tower, ReduceConfig("cubist", r=2, layers=(3,))):
        assert flops(see) == patches + 3 * block_flops(65, 65) + 2 * block_flops(37, 37)


@pytest.mark.parametrize("method", ["tome", "cubist"])
def test_a_tier_has_the_settings_that_come_nearest(tower, method):
    images = [torch.randn(1, 3, 32, 32) for _ in range(2)]
    meter = Meter(tower, [lambda image=image: tower(image) for image in images])
    asked = (0.1, 0.25, 0.5)
    found = tiers(meter, ReduceConfig(method), lambda settings: settings, asked)
    if method == "tome":
        every = [ReduceConfig("tome", r=r) for r in range(0, 11)]
    else:
        every = [ReduceConfig("cubist", r=r, layers=(block,)) for block in (1, 2) for r in range(1, 5)]
    saved = [meter.saved(settings) for settings in every]
    for share, tier in zip(asked, found):
        assert tier.asked == share
        assert tier.saved == meter.saved(tier.settings)
        assert abs(tier.saved - share) <= min(abs(each - share) for each in saved) + 5e-3
    assert meter.saved(ReduceConfig("tome", r=30)) == 1.0  # more than there is


def test_pace_times_the_plain_tower_and_each_settings(tower):
    seen = []

    def see():
        tower(torch.randn(1, 3, 32, 32))
        seen.append("forward" in vars(tower.layers[0]))

    found = pace(tower, see, [ReduceConfig("tome", r=4)], runs=3)
    assert len(found) == 2
    assert min(found) > 0
    assert len(seen) == 2 * 4  # one call each does not count


def test_neighbours_vote_by_nearness_and_an_image_is_not_its_own():
    torch.manual_seed(0)
    cls, kinds = torch.randn(40, 6).numpy(), np.array([n % 4 - 1 for n in range(40)])  # a quarter has no kind
    own = [n for n in range(40) if kinds[n] >= 0]
    wanted = []
    for n in own:
        near = [
            (float(np.dot(cls[n], cls[m]) / np.linalg.norm(cls[n]) / np.linalg.norm(cls[m])), kinds[m])
            for m in own
            if m != n
        ]
        votes = [sum(value for value, kind in sorted(near, reverse=True)[:10] if kind == k) for k in range(3)]
        wanted.append(100.0 * (int(np.argmax(votes)) == kinds[n]))
    assert neighbours_right(cls, kinds).tolist() == wanted


def test_the_kind_of_an_image_is_what_its_largest_box_is_called(monkeypatch):
    def caption(*named):
        phrases = [Phrase(text, "1", ("x",), 0, 1, (box,) if box else ()) for text, box in named]
        return Caption(" ".join(text for text, _ in named), tuple(phrases), related=True)

    small, large = (0.0, 0.0, 0.2, 0.2), (0.0, 0.0, 0.9, 0.9)
    images = [
        [caption(("A brown dog", large), ("a man", small)), caption(("the dog", large))],
        [caption(("A man", large)), caption(("dogs", small), ("An old man", large))],
        [caption(("a dog", large)), caption(("a puppy", large)), caption(("the Dog", small))],
        [caption(("a boat", None))],
    ]
    records = [ImageRecord(str(n), None, tuple(captions)) for n, captions in enumerate(images)]
    monkeypatch.setattr("samer.compare.reduction.LEAST_OF_A_KIND", 2)
    assert kinds_of(records).tolist() == [0, -1, 0, -1]
    monkeypatch.setattr("samer.compare.reduction.LEAST_OF_A_KIND", 1)
    assert kinds_of(records).tolist() == [0, 1, 0, -1]


def test_cells_hold_what_the_towers_give_and_what_is_found(towers, world, tmp_path):
    retriever = Retriever.load(towers)
    records = make_reader("", world).load_split(world, "test", boxes=True)
    settings = ragged(retriever, pictures(3), 10)
    cells = [Cell("none", 0.0, 0.0, ReduceConfig()), Cell("adamerge", 0.25, 0.2, settings)]
    found = measure_cells(retriever, records, cells, [4], tmp_path, batch_size=3)
    inputs = retriever.record_inputs(records)
    with torch.no_grad():
        plain = retriever.tower(pixel_values=inputs["pixel_values"]).last_hidden_state
        with reduced(retriever.tower, settings) as run:
            few = retriever.tower(pixel_values=inputs["pixel_values"]).last_hidden_state
    patches = run.tokens.spread(few[:, 1:])
    values = found["adamerge-250"]
    wanted = torch.cosine_similarity(few[:, 0], plain[:, 0], dim=-1)
    assert np.allclose(values["cls_cosine"], wanted, atol=1e-3)  # the plain tower's are kept in float16
    assert np.allclose(
        values["patch_cosine"], torch.cosine_similarity(patches, plain[:, 1:], dim=-1).mean(1), atol=1e-3
    )
    assert np.allclose(found["none-000"]["patch_cosine"], 1, atol=1e-3)
    assert values["layer_tokens"].tolist() == torch.stack(run.tokens.counts, 1).tolist()
    assert values["vectors all"].tolist() == run.tokens.number.tolist()
    assert values["vectors 4"].tolist() == [4] * len(records)
    # what is found, by scores of each image alone
    retriever.use_reduction(settings)
    texts = [caption.text for record in records for caption in record.captions]
    queries = retriever.encode_queries(retriever.query_inputs(texts))
    scores = torch.zeros(len(texts), len(records))
    for column, record in enumerate(records):
        tokens = retriever.encode_images(retriever.record_inputs([record])).tokens[0]
        for row in range(len(texts)):
            scores[row, column] = (queries.tokens[row][queries.mask[row]] @ tokens.T).amax(1).mean()
    owner = torch.tensor([n for n, record in enumerate(records) for _ in record.captions])
    metrics = query_metrics(scores, owner[:, None] == torch.arange(len(records)))
    assert values["r@1 all"].tolist() == metrics["r@1"].tolist()
    before = (tmp_path / "adamerge-250.safetensors").read_bytes()
    again = measure_cells(retriever, records, cells, [4], tmp_path, batch_size=3)
    assert again["adamerge-250"]["r@1 4"].tolist() == values["r@1 4"].tolist()
    assert (tmp_path / "adamerge-250.safetensors").read_bytes() == before


def test_cells_of_another_model_or_method_are_refused(towers, tmp_path):
    retriever = Retriever.load(towers)
    with pytest.raises(InputError, match="methods tomme: use some of tome, adamerge"):
        choose_cells(retriever, [], tmp_path, ["tomme"])
    (tmp_path / "cells.json").write_text(json.dumps({"model": "x", "methods": {}}))
    with pytest.raises(InputError, match="cells of another model"):
        choose_cells(retriever, [], tmp_path, ["tome"])


def test_reduce_from_the_command_line(towers, world, script, tmp_path, capsys):
    words = ["--data-root", str(world), "--out", str(tmp_path / "out"), "--methods", "tome", "cubist", "adamerge"]
    words += ["--calibrate", "6", "--regions", "4", "--tiers", "0.25", f"model.name={towers}"]
    results = script("reduce").main([*words, "--tune", "--tune-tower"])
    assert [row["method"] for row in results["rows"]] == ["none", "tome", "cubist", "adamerge"]
    assert all(abs(row["saved"] - 0.25) < 0.1 for row in results["rows"][1:])
    assert results["rows"][0]["cls_cosine"]["value"] == pytest.approx(1, abs=1e-3)
    assert set(results["rows"][1]["retrieval"]) == {"all", "4"}
    assert [row["name"] for row in results["tuned"]["rows"]] == ["none", "tome", "cubist", "adamerge"]
    assert results["tuned"]["images"] == results["tower_tuned"]["images"] == 6
    assert [row["name"] for row in results["tower_tuned"]["rows"]] == ["tome", "cubist", "adamerge"]
    assert not list((tmp_path / "out").glob("tuned/*/features"))
    capsys.readouterr()
    again = script("reduce").main([*words, "--tune", "--tune-tower"])
    assert again == results
    assert "[1/" not in capsys.readouterr().out  # nothing was measured again
    speed = {"tower": "T", "picture_size": 32, "batch": 4, "runs": 3, "threads": 1, "device": "cpu", "command": "bench"}
    speed["rows"] = [{"method": "plain", "saved": 0.0, "r": 0.0, "seconds": 2.0, "speedup": 1.0}]
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    page = tmp_path / "page.md"
    out = str(tmp_path / "out")
    script("reduce").main(["--out", out, "--page", str(page), "--speed", str(tmp_path / "speed.json"), "--also", out])
    text = page.read_text()
    assert "| plain | 0.0% | 0 | 2.00 | 1.00 |" in text
    assert "| tome | " in text
    assert "before block" in text  # cubist's
    about = results["about"]
    assert f"### {about['picture_size']} pixels, {about['patches']} patches" in text
    assert "## The projection after one epoch" in text
    assert "| tome, trained | " in text


def test_a_tower_learns_to_give_what_it_gave_without(towers, world):
    retriever = Retriever.load(towers)
    records = make_reader("", world).load_split(world, "train", boxes=False)
    settings = ReduceConfig("tome", r=8)
    before = {name: weight.clone() for name, weight in retriever.tower.state_dict().items()}
    losses = tune_tower(retriever, settings, records, batch_size=4)
    assert len(losses) == 3
    inputs = retriever.record_inputs(records[:4])
    plain = type(retriever.tower)(retriever.tower.config).eval()
    plain.load_state_dict(before)

    def distance(tower):
        with torch.no_grad():
            wanted = plain(pixel_values=inputs["pixel_values"]).last_hidden_state
            with reduced(tower, replace(settings, unmerge=True)):
                found = tower(pixel_values=inputs["pixel_values"]).last_hidden_state
        return float((1 - torch.cosine_similarity(found, wanted, dim=-1)).mean())

    assert 0 < distance(retriever.tower) < distance(plain)
    assert not any(weight.requires_grad for weight in retriever.tower.parameters())


def test_findings_compare_methods_at_like_shares_of_flops():
    def row(method, saved, r, *ndcg):
        retrieval = {k: {"ndcg@10": {"value": value}} for k, value in zip(("all", "4"), ndcg)}
        return {"method": method, "saved": saved, "r": r, "layers": [], "retrieval": retrieval}

    rows = [row("none", 0.0, 0, 30.0, 29.5), row("tome", 0.1, 4, 29.0, 28.0), row("tome", 0.1, 4, 29.0, 28.0)]
    rows += [
        row("tome", 0.26, 9, 28.0, 27.0),
        row("adamerge", 0.24, 20, 25.5, 25.0),
        row("adamerge", 0.5, 50, 9.0, 9.0),
    ]
    rows = distinct(rows)
    assert len(rows) == 5
    after = {"name": "tome", "before": {"value": 12.0}, "after": {"value": 12.75}}
    lines = findings(rows, {"rows": [after]})
    assert any(line.endswith("gives: tome 12.0 to 12.8.") for line in lines)
    assert any("AdaMerge - ToMe" in line and line.endswith(": -2.5 at 24%.") for line in lines)
    assert any(line.endswith("plain -0.5, tome -1.0, adamerge -0.5.") for line in lines)
    assert not any("Cubist" in line for line in lines)


def test_reduce_needs_data_or_a_page(script, capsys):
    with pytest.raises(SystemExit):
        script("reduce").main(["--out", "x"])
    assert "give --data-root, or --page" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script("reduce").main(["--out", "x", "--data-root", "y", "--tiers", "0.25", "many"])
    assert "--tiers 0.25 many: give numbers" in capsys.readouterr().err
