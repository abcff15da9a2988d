"""K as a share, from training to report, on a retriever whose grids differ: 3 x 5 patches or 4 x 3, six more tokens."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from oracle import naive_merge
from PIL import Image
from test_toy import Lines, recall, write_world
from toy_family import Toy, save_toy

from samer.config import InputError, MergeConfig, load_config
from samer.data import READERS
from samer.features.read import FeatureStore, open_encoder
from samer.features.write import write_features
from samer.index.read import Index
from samer.index.settings import Asked, settings_for
from samer.index.write import build_index
from samer.report.evaluate import means_and_totals
from samer.retrievers import FAMILIES
from samer.retrievers.projectors import load_projector
from samer.tokens import QueryTokens
from samer.training.batches import CaptionDataset, Collator
from samer.training.loop import train
from samer.training.model import ProjectorModel

WIDE, TALL, DIM = 3 * 5 + 6, 4 * 3 + 6, 16  # tokens of an image
MERGE = MergeConfig(num_regions="1/4", center_init="farthest")
KS = {math.ceil(WIDE / 4), math.ceil(TALL / 4)}


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Data of wide and tall pictures, a projector trained for two shares, and an index."""
    folder = tmp_path_factory.mktemp("ragged")
    root, model = folder / "world", save_toy(folder / "model")
    root.mkdir()
    write_world(root)
    for path in sorted(root.glob("*.png"))[::3]:
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, "lines", Lines())
        patch.setitem(FAMILIES, Toy.architecture, Toy)
        settings = {
            "model.name": model,
            "data.root": root,
            "data.reader": "lines",
            "merge.num_regions": "[1/8, 2/8]",
            "merge.center_init": "farthest",
            "train.output_dir": folder / "trained",
            "train.train_batch_size": 4,
            "train.eval_batch_size": 4,
            "train.grad_accum_steps": 1,
            "train.num_train_epochs": 1,
            "train.bf16": "false",
            "train.dataloader_num_workers": 0,
            "train.logging_steps": 1,
        }
        config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
        trained = train(config)
        encoder = open_encoder(str(model), "cpu", adapter_path=folder / "trained")
        records = READERS["lines"].load_split(root, "test", boxes=False)
        build_index(folder / "index", root, ["test"], encoder, config.merge, dtype="float32", reader="lines")
        yield SimpleNamespace(
            folder=folder, root=root, model=model, config=config, trained=trained, encoder=encoder, records=records
        )


def images_alone(encoder, records, merge=MERGE):
    """The merged vectors of each image, by loops, at its own K."""
    found = []
    for record in records:
        visual = encoder.encode_images(encoder.record_inputs([record]))
        tokens = visual.tokens[0]
        part, whole = map(int, merge.num_regions.split("/"))
        fixed = MergeConfig(num_regions=math.ceil(len(tokens) * part / whole), center_init=merge.center_init)
        found.append(naive_merge(tokens, visual.coords[0], fixed)[0])
    return found


def queries_alone(encoder, records):
    texts = [caption.text for record in records for caption in record.captions]
    return [encoder.encode_queries(encoder.query_inputs([text])).tokens[0] for text in texts]


def brute(queries, images):
    return torch.tensor([[float((q @ image.T).max(1).values.mean()) for image in images] for q in queries])


def test_images_differ_in_k(ragged):
    sizes = {len(image) for image in images_alone(ragged.encoder, ragged.records)}
    assert sizes == KS
    assert len(KS) == 2


def test_it_trains_for_several_shares(ragged):
    assert ragged.config.train.budgets == ("1/8", "1/4")
    assert ragged.config.merge == MERGE
    history = json.loads((ragged.folder / "trained" / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert all(map(math.isfinite, losses))
    weights = load_projector(ragged.folder / "trained", ragged.encoder)
    assert not torch.equal(weights.weight, ragged.encoder.base_projector.weight)
    held = json.loads((ragged.folder / "trained" / "config.json").read_text())
    assert held["merge"]["num_regions"] == "1/4"


def test_its_loss_is_that_of_loops_over_images(ragged):
    retriever = open_encoder(str(ragged.model), "cpu")
    rows = CaptionDataset(READERS["lines"].load_split(ragged.root, "train", boxes=True)).rows[:8:2]
    batch = Collator(retriever, ragged.config.objects)(rows)
    model = ProjectorModel(retriever, MERGE, 0.07, False, budgets=("1/8", "1/4"))
    model.diagnose = True
    loss = model(**batch)["loss"]
    losses = []
    for share in (8, 4):
        images = []
        for row, labels in zip(rows, batch["labels"]):
            inputs = retriever.record_inputs([row.record])
            visual = retriever.encode_images(inputs)
            own = labels[batch["image_inputs"]["attention_mask"][batch["image_of"][len(images)]].bool()]
            fixed = MergeConfig(num_regions=math.ceil(len(own) / share), center_init="farthest")
            images.append(naive_merge(visual.tokens[0], visual.coords[0], fixed, own)[0])
        texts = [row.caption.text for row in rows]
        queries = [retriever.encode_queries(retriever.query_inputs([text])).tokens[0] for text in texts]
        scores = brute(queries, images) / 0.07
        losses.append(-scores.log_softmax(1).diagonal().mean())
    assert loss.item() == pytest.approx(float(sum(losses) / 2), abs=1e-4)
    assert model.diagnostics
    assert all(map(math.isfinite, model.diagnostics.values()))


def test_an_index_answers_as_loops_over_images(ragged):
    index = Index(ragged.folder / "index")
    assert index.manifest.merge == MERGE
    queries, images = queries_alone(ragged.encoder, ragged.records), images_alone(ragged.encoder, ragged.records)
    expected = brute(queries, images)
    scores, _ = index.scores("test")
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    for number, image in enumerate(images):
        held = index.vectors("test", number)
        assert int(held.mask.sum()) == len(image)
        torch.testing.assert_close(held.tokens[held.mask], image, atol=1e-5, rtol=0)
    width = max(map(len, queries))
    tokens = torch.stack([torch.nn.functional.pad(query, (0, 0, 0, width - len(query))) for query in queries])
    mask = torch.arange(width) < torch.tensor([len(query) for query in queries])[:, None]
    for row, found in zip(expected, index.search(QueryTokens(tokens, mask), "test", 3)):
        assert [name for name, _ in found] == [ragged.records[k].image_id for k in row.argsort(descending=True)[:3]]


@pytest.mark.parametrize("dtype", ["int8", "binary", "bfloat16"])
def test_other_dtypes(ragged, tmp_path, dtype):
    build_index(tmp_path, ragged.root, ["test"], ragged.encoder, MERGE, dtype=dtype, reader="lines", assignments=True)
    index = Index(tmp_path)
    expected = brute(queries_alone(ragged.encoder, ragged.records), images_alone(ragged.encoder, ragged.records))
    torch.testing.assert_close(index.scores("test")[0], expected, atol=0.02, rtol=0)
    size = {"int8": DIM, "binary": DIM // 8, "bfloat16": 2 * DIM}[dtype]
    total = sum(map(len, images_alone(ragged.encoder, ragged.records)))
    assert means_and_totals(index, "test")["sizes"]["bytes"] == {"mean": size * total / 7, "total": size * total}
    for number, record in enumerate(ragged.records):
        patches = ragged.encoder.encode_images(ragged.encoder.record_inputs([record])).grid.prod()
        regions = index.vectors("test", number).regions
        assert len(regions) == patches
        assert 0 <= int(regions.min()) <= int(regions.max()) < int(index.vectors("test", number).mask.sum())


def test_a_feature_store_gives_the_same(ragged, tmp_path):
    plain = open_encoder(str(ragged.model), "cpu")
    write_features(tmp_path / "store", ragged.root, ["test"], plain, dtype="float32", reader="lines")
    store = FeatureStore(tmp_path / "store", str(ragged.model), "cpu")
    store.use_projector(load_projector(ragged.folder / "trained", store))
    build_index(tmp_path / "index", ragged.root, ["test"], store, MERGE, dtype="float32", reader="lines")
    ours, theirs = (Index(place).scores("test")[0] for place in (tmp_path / "index", ragged.folder / "index"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_what_contradicts_the_share_of_an_index_is_refused(ragged):
    folder = ragged.folder / "index"
    assert settings_for(folder, Asked(overrides=("merge.num_regions=2/8",)), "int8").config.merge == MERGE
    with pytest.raises(InputError, match=r"merge\.num_regions=1/4, now 1/8"):
        settings_for(folder, Asked(overrides=("merge.num_regions=1/8",)), "int8")
    with pytest.raises(InputError, match=r"merge\.num_regions=1/4, now 6"):
        settings_for(folder, Asked(overrides=("merge.num_regions=6",)), "int8")


def test_regions_of_patches_are_kept_where_a_byte_tells_them_apart(ragged, tmp_path, monkeypatch):
    kept = {share: settings_for(tmp_path, Asked(overrides=(f"merge.num_regions={share}",)), "int8") for share in SHARES}
    assert {share: settings.assignments for share, settings in kept.items()} == SHARES
    monkeypatch.setattr("samer.index.manifest.NO_REGION", max(KS) - 1)
    with pytest.raises(InputError, match=f"at most {max(KS) - 1} regions, not {max(KS)}; leave --assignments out"):
        build_index(tmp_path / "x", ragged.root, ["test"], ragged.encoder, MERGE, reader="lines", assignments=True)


SHARES = {"1/16": True, "1/8": True, "1/2": False}


def test_evaluation_tells_means_and_totals(ragged, script, tmp_path):
    words = ["--cache-dir", ragged.folder / "index", "--split", "test", "--output-json", tmp_path / "test.json"]
    script("eval").main([str(word) for word in words])
    result = json.loads((tmp_path / "test.json").read_text())
    queries, images = queries_alone(ragged.encoder, ragged.records), images_alone(ragged.encoder, ragged.records)
    lengths, tokens = list(map(len, images)), sum(map(len, queries))
    operations = sum(2 * DIM * len(query) * length for query in queries for length in lengths)
    assert operations == 2 * DIM * tokens * sum(lengths)
    assert result["sizes"] == {
        "vectors": {"mean": sum(lengths) / 7, "fewest": min(KS), "most": max(KS), "total": sum(lengths)},
        "bytes": {"mean": 4 * DIM * sum(lengths) / 7, "total": 4 * DIM * sum(lengths)},
        "operations": {"mean": operations / (7 * len(queries)), "total": operations},
    }
    assert result["text_to_image"]["r@1"]["value"] == pytest.approx(recall(brute(queries, images).tolist(), 1))
    page = (tmp_path / "test.html").read_text()
    assert f"{min(KS)} to {max(KS)} (mean {sum(lengths) / 7:.1f}), {sum(lengths)} in all" in page
    assert f"{4 * DIM * sum(lengths):,} in all" in page
    assert "num_regions 1/4" in page


def test_images_of_one_size_are_told_as_before(ragged, tmp_path):
    fixed = MergeConfig(num_regions=4, center_init="farthest")
    build_index(tmp_path, ragged.root, ["test"], ragged.encoder, fixed, dtype="float32", reader="lines")
    assert means_and_totals(Index(tmp_path), "test") == {}


def test_a_comparison_at_shares(ragged, script, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{name: {ragged.model}}}\nmerge: {{num_regions: 1/4}}\ndata: {{reader: lines}}\n")
    words = ["--data-root", ragged.root, "--out", tmp_path / "out", "--config", config, "--seeds", 0]
    words += ["--sections", "untouched", "budgets", "cost", "--methods", "none", "random", "samer"]
    script("compare").main([str(word) for word in [*words, "--budgets", "1/8", "1/2", "6"]])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    plain = open_encoder(str(ragged.model), "cpu")
    queries = queries_alone(plain, ragged.records)
    counts = [len(plain.encode_images(plain.record_inputs([record])).tokens[0]) for record in ragged.records]
    rows = {(row["section"], row["name"]): row for row in results["rows"]}
    for name, divisor in (
        (("untouched", "random"), 4),
        (("budgets", "random @ 1/8"), 8),
        (("budgets", "random @ 1/2"), 2),
    ):
        assert rows[name]["vectors"] == pytest.approx(sum(math.ceil(n / divisor) for n in counts) / 7, abs=1e-4)
    for name, share in (("samer, raster", "1/4"), ("samer, raster @ 1/2", "1/2")):
        merge = MergeConfig(num_regions=share)
        expected = recall(brute(queries, images_alone(plain, ragged.records, merge)).tolist(), 1)
        assert rows["budgets" if "@" in name else "untouched", name]["r@1"] == pytest.approx(expected, abs=1e-3)
    totals = [sum(counts), *(sum(math.ceil(n / k) for n in counts) for k in (8, 2)), 6 * 7]
    assert [row["budget"] for row in results["cost"]["rows"]] == [max(counts), "1/8", "1/2", 6]
    assert [row["vectors"] for row in results["cost"]["rows"]] == totals
    assert [row["bytes"] for row in results["cost"]["rows"]] == [2 * DIM * total for total in totals]
    asked = sum(map(len, queries))
    assert [row["operations"] for row in results["cost"]["rows"]] == [2 * DIM * asked * total for total in totals]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "compressed to K = N/4" in text
    assert "| | K = N/2 | K = 6 | K = N/8 |" in text.replace("|  |", "| |")
    row = f"| N/8 | {2 * DIM * totals[1] / 7 / 1e3:.2f} |"
    assert row in text
    assert f"| {totals[1] / 7:.1f} | {2 * DIM * totals[1] / 7:,.0f} | {2 * DIM * totals[1]:,} |" in text
    assert "N/4 vectors" in (tmp_path / "out" / "report.html").read_text()
