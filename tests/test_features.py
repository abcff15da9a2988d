"""The feature store: what is read equals what the model gives; nothing is lost by a kill; nothing stale is read."""

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save, save_file
from toy_family import Toy, save_toy

from samer.config import InputError, MergeConfig, ObjectsConfig, load_config
from samer.data import flickr
from samer.features import write as features_write
from samer.features.read import FeatureStore, open_encoder
from samer.features.write import quantise, write_features
from samer.index.verify import verify
from samer.retrievers import FAMILIES
from samer.retrievers.attention import ATTENTION
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector
from samer.runtime.shards import load_shard, write_manifest, write_shard
from samer.training import model as training_model
from samer.training.batches import CaptionDataset, Collator, WindowSampler
from samer.training.loop import train
from samer.training.model import ProjectorModel

SPLITS = ["train", "val", "test"]


def contents(folder):
    """Every file below a folder but what is remembered of times: relative path -> bytes."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "stamps.json")
    return {p.relative_to(folder): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def shards():
    """Small shards, so that a world has several."""
    patch = pytest.MonkeyPatch()
    patch.setattr(features_write, "IMAGES_PER_SHARD", 4)
    patch.setattr(features_write, "TEXTS_PER_SHARD", 16)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def store(shards, base, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "store"
    write_features(folder, world, SPLITS, Retriever.load(str(base)), batch_size=4, dtype="float32")
    return folder


def test_stored_tokens_equal_the_models(store, base, world):
    frozen, stored = Retriever.load(str(base)), FeatureStore(store, str(base))
    for split in SPLITS:
        records = flickr.load_split(world, split, boxes=False)
        ours = stored.encode_images(stored.record_inputs(records))
        theirs = frozen.encode_images(frozen.record_inputs(records))
        torch.testing.assert_close(ours.tokens, theirs.tokens, atol=1e-5, rtol=0)
        assert torch.equal(ours.coords, theirs.coords)
        texts = [caption.text for record in records for caption in record.captions]
        ours, theirs = (e.encode_queries(e.query_inputs(texts)) for e in (stored, frozen))
        assert torch.equal(ours.mask.sum(1), theirs.mask.sum(1))
        for mine, mask, other, other_mask in zip(ours.tokens, ours.mask, theirs.tokens, theirs.mask):
            torch.testing.assert_close(mine[mask], other[other_mask], atol=1e-5, rtol=0)


def test_texts_are_stored_once(store, world):
    for split in SPLITS:
        texts = [c.text for r in flickr.load_split(world, split, boxes=False) for c in r.captions]
        entry = json.loads((store / "manifest.json").read_text())["splits"][split]
        assert sum(shard["count"] for shard in entry["texts"]) == len(set(texts))


def test_verify_reads_everything_and_names_a_damaged_shard(store, base, tmp_path):
    size = sum(p.stat().st_size for p in store.glob("*/*.safetensors"))
    assert (found := verify(store)).damages == []
    assert found.bytes == size + (store / "base.safetensors").stat().st_size
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    victim = sorted(copy.glob("val/images-*.safetensors"))[0]
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    (damage,) = verify(copy).damages
    assert damage.startswith(f"{victim}: contents differ from their checksum")
    victim.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=f"{victim}"):
        FeatureStore(copy, str(base))


def test_int8_error_is_bounded_by_half_a_step():
    hidden = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    codes, scales = quantise(hidden)
    assert codes.dtype == torch.int8
    assert ((codes * scales[:, None] - hidden).abs() <= scales[:, None] * 0.5001).all()
    assert torch.equal(scales, hidden.abs().amax(1) / 127)
    assert torch.equal(quantise(torch.zeros(2, 4))[0], torch.zeros(2, 4, dtype=torch.int8))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_smaller_dtypes_stay_close(shards, base, world, store, tmp_path, dtype, tolerance):
    write_features(tmp_path / "small", world, ["val"], Retriever.load(str(base)), batch_size=4, dtype=dtype)
    records = flickr.load_split(world, "val", boxes=False)
    exact, small = (FeatureStore(folder, str(base)) for folder in (store, tmp_path / "small"))
    exact, small = (s.encode_images(s.record_inputs(records)).tokens for s in (exact, small))
    assert 1e-6 < (exact - small).abs().max() < tolerance
    bytes_of = lambda folder: sum(p.stat().st_size for p in (folder / "val").glob("images-*"))
    assert bytes_of(tmp_path / "small") < 0.75 * bytes_of(store)


def test_a_second_run_keeps_every_shard(store, shards, base, world):
    before = {p: p.stat().st_mtime_ns for p in store.glob("*/*.safetensors")}
    write_features(store, world, SPLITS, Retriever.load(str(base)), batch_size=4, dtype="float32")
    assert {p: p.stat().st_mtime_ns for p in store.glob("*/*.safetensors")} == before


def test_a_damaged_shard_is_made_anew(store, shards, base, world, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    victim = copy / "val" / "images-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1  # the header stays as it was
    victim.write_bytes(data)
    write_features(copy, world, SPLITS, Retriever.load(str(base)), batch_size=4, dtype="float32")
    assert contents(copy) == contents(store)


def test_a_stale_store_is_refused_by_name(store, base, world, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    tensors = load_file(changed / "model.safetensors")
    name = next(key for key in tensors if "vision" in key and key.endswith("weight"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{store}: stale, its weights are not those of '{changed}'"):
        FeatureStore(store, str(changed))
    with pytest.raises(InputError, match=rf"{store} holds features with weights="):
        write_features(store, world, ["val"], Retriever.load(str(changed)), batch_size=4, dtype="float32")
    other = tmp_path / "processor"
    shutil.copytree(base, other)
    settings = json.loads((other / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.4, 0.5, 0.5]
    (other / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="stale, its processor"):
        FeatureStore(store, str(other))
    with pytest.raises(InputError, match="holds features with dtype='float32', now 'int8'"):
        write_features(store, world, ["val"], Retriever.load(str(base)), batch_size=4, dtype="int8")


def test_bad_folders_are_refused(base, world, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="what is no feature store"):
        write_features(tmp_path / "file", world, ["val"], Retriever.load(str(base)), dtype="float32")
    (tmp_path / "file").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json"):
        FeatureStore(tmp_path, str(base))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="what is no feature store"):
        write_features(tmp_path, world, ["val"], Retriever.load(str(base)), dtype="float32")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


def test_too_little_disk_is_said_beforehand(base, world, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"the disk has 0\.0 GB free"):
        write_features(tmp_path / "store", world, ["val"], Retriever.load(str(base)), dtype="float32")
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_other_splits_bytes_are_no_progress(shards, base, world, tmp_path, monkeypatch):
    """With val there, test must not start on an almost full disk; what is there of test itself counts."""
    retriever = Retriever.load(str(base))
    write_features(tmp_path / "store", world, ["train"], retriever, batch_size=4, dtype="float32")
    before = contents(tmp_path / "store")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"need 0\.0 GB more, the disk has 0\.0 GB free"):
        write_features(tmp_path / "store", world, ["val"], retriever, batch_size=4, dtype="float32")
    assert contents(tmp_path / "store") == before
    write_features(tmp_path / "store", world, ["train"], retriever, batch_size=4, dtype="float32")


def test_missing_images_and_captions_are_refused_at_once(store, shards, base, world, tmp_path):
    write_features(tmp_path / "s", world, ["val"], Retriever.load(str(base)), batch_size=4, dtype="float32")
    stored = FeatureStore(tmp_path / "s", str(base))
    val, test = (flickr.load_split(world, split, boxes=False) for split in ("val", "test"))
    stored.check_records(val)
    first = test[2].image_id
    with pytest.raises(InputError, match=rf"no features of '{first}' and 5 more images of 12; it holds the splits val"):
        stored.check_records(val + test[2:])
    strange = replace(val[1], captions=(*val[1].captions[:4], replace(val[1].captions[4], text="never stored")))
    with pytest.raises(InputError, match="no features of 'never stored' and 0 more captions of"):
        stored.check_records([val[0], strange])


def test_a_missing_split_is_named(shards, base, world, tmp_path):
    write_features(tmp_path / "s", world, ["val"], Retriever.load(str(base)), batch_size=4, dtype="float32")
    record = flickr.load_split(world, "test", boxes=False)[0]
    with pytest.raises(InputError, match=f"no features of '{record.image_id}'.*holds the splits val"):
        FeatureStore(tmp_path / "s", str(base)).record_inputs([record])


# --- any grid, any format ------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, Toy.architecture, Toy)
    return Retriever.load(str(save_toy(tmp_path / "toy")))


def test_a_store_keeps_the_layout_of_every_image(toy, shards, world, tmp_path):
    """Without knowing the family: two grids in a batch, padding that stood on the left, no bias."""
    records = flickr.load_split(world, "val", boxes=False)
    for record in records[::2]:  # tall ones among the wide
        with Image.open(record.image_path) as picture:
            turned = picture.rotate(90, expand=True)
        record = replace(record, image_path=tmp_path / record.image_path.name)
        turned.save(record.image_path)
        records[[each.image_id for each in records].index(record.image_id)] = record
    patched = pytest.MonkeyPatch()
    patched.setattr(flickr.Flickr, "load_split", lambda *_, **__: records)
    write_features(tmp_path / "store", world, ["val"], toy, batch_size=3, dtype="float32")
    patched.undo()
    stored = FeatureStore(tmp_path / "store", toy.name)
    assert stored.grid is None
    assert stored.projection_layer == "multi_vector_head.proj"
    assert stored.identity == toy.identity
    ours, theirs = (e.encode_images(e.record_inputs(records), ATTENTION) for e in (stored, toy))
    assert sorted(set(map(tuple, ours.grid.tolist()))) == [(3, 5), (4, 3)]
    assert torch.equal(ours.grid, theirs.grid)
    for row in range(len(records)):
        mine, other = ours.mask[row], theirs.mask[row]
        assert not mine.equal(other) or mine.all()  # the store pads on the right
        torch.testing.assert_close(ours.tokens[row][mine], theirs.tokens[row][other], atol=1e-5, rtol=0)
        for name in ("coords", "patches"):
            assert torch.equal(getattr(ours, name)[row][mine], getattr(theirs, name)[row][other])
        torch.testing.assert_close(ours.attention["last"][row][mine], theirs.attention["last"][row][other])
        own = theirs.source[row] >= 0
        assert torch.equal(ours.source[row] >= 0, own)
        for place, wanted in zip(ours.source[row][own], theirs.source[row][own]):
            torch.testing.assert_close(ours.tokens[row, place], theirs.tokens[row, wanted], atol=1e-5, rtol=0)


def test_a_source_that_names_no_token_is_refused(store, base, world, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    path = next(copy.glob("val/images-*.safetensors"))
    tensors, header = load_shard(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["source"][3] = 70
    write_shard(path, tensors, header["stamp"], header["entry"])
    stored, records = FeatureStore(copy, str(base)), flickr.load_split(world, "val", boxes=False)
    with pytest.raises(InputError, match=f"{path}: source of row 0 names no token"):
        stored.record_inputs(records)


OLD = ROOT / "tests/fixtures/format3"  # made by main's code before format 4: make_format3_store.py
OLD_MODEL = str(ROOT / "assets/retriever")


def test_a_store_of_format_3_still_gives_its_tokens():
    stored = FeatureStore(OLD / "store", OLD_MODEL)
    records = flickr.load_split(OLD / "store_data", "val", boxes=False)
    stored.check_records(records)
    expected = {name: torch.tensor(row) for name, row in json.loads((OLD / "store.json").read_text()).items()}
    visual = stored.encode_images(stored.record_inputs(records), ["last"])
    query = stored.encode_queries(stored.query_inputs([records[0].captions[0].text]))
    torch.testing.assert_close(visual.tokens[0].sum(-1), expected["image"], atol=1e-5, rtol=0)
    torch.testing.assert_close(query.tokens[0].sum(-1), expected["query"], atol=1e-5, rtol=0)
    assert torch.equal(visual.coords[0], expected["coords"])
    assert torch.equal(visual.patches[0], expected["patches"])
    assert visual.grid.tolist() == [[16, 16]]
    assert torch.equal(visual.source[0], torch.arange(256))
    assert stored.grid == (16, 16)
    now = Retriever.load(OLD_MODEL)
    assert stored.identity.difference(now.identity) is None
    assert stored.identity.weights == now.identity.weights
    assert stored.identity.processor == ""  # how its pictures were resized is not known
    assert verify(OLD / "store").damages == []


def test_a_store_of_format_3_is_refused_where_it_was_before(base, tmp_path):
    with pytest.raises(InputError, match="stale, its weights"):
        FeatureStore(OLD / "store", str(base))
    other = tmp_path / "other"
    shutil.copytree(OLD_MODEL, other)
    settings = json.loads((other / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.4, 0.5, 0.5]
    (other / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="stale, its processor"):
        FeatureStore(OLD / "store", str(other))


def test_a_store_of_format_3_is_not_added_to(tmp_path):
    shutil.copytree(OLD / "store", tmp_path / "store")
    with pytest.raises(InputError, match="holds features of format 3, which are read but not added to"):
        write_features(tmp_path / "store", OLD / "store_data", ["val"], Retriever.load(OLD_MODEL), dtype="int8")
    assert contents(tmp_path / "store") == contents(OLD / "store")


def test_a_store_of_format_3_trains(tmp_path):
    changes = {"data.features": OLD / "store", "train.train_batch_size": 4, "train.num_train_epochs": 1}
    result = train(settings(OLD_MODEL, OLD / "store_data", tmp_path / "run", **changes))
    assert result.steps >= 1
    stored = FeatureStore(OLD / "store", OLD_MODEL)
    trained = load_projector(tmp_path / "run", stored)
    assert trained.hash != stored.base_projector.hash


def test_another_library_version_leaves_a_store_readable(store, base, world, shards, monkeypatch):
    monkeypatch.setattr(features_write.transformers, "__version__", "5.99.0")
    assert FeatureStore(store, str(base)).manifest.libraries["transformers"] != "5.99.0"
    with pytest.raises(InputError, match="holds features with libraries="):
        write_features(store, world, ["val"], Retriever.load(str(base)), batch_size=4, dtype="float32")


def test_a_manifest_of_a_newer_samer_is_refused_by_its_key(store, base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["checksum"]
    write_manifest(copy / "manifest.json", {**manifest, "rotation": 3})
    with pytest.raises(InputError, match=r"manifest\.json: unknown key rotation"):
        FeatureStore(copy, str(base))


def test_opening_an_encoder_leaves_the_collector_alone(base):
    """A library call that freezes the collector would keep its caller's garbage for ever."""
    before = gc.get_freeze_count()
    open_encoder(str(base), "cpu")
    assert gc.get_freeze_count() == before


# --- training from the store ----------------------------------------------------------------------------------------


def settings(base, world, out, **changes):
    words = {
        "data.root": world,
        "model.name": base,
        "merge.num_regions": 8,
        "train.output_dir": out,
        "train.train_batch_size": 10,
        "train.grad_accum_steps": 1,
        "train.num_train_epochs": 2,
        "train.learning_rate": 1e-3,
        "train.bf16": "false",
        "train.logging_steps": 1,
        "train.dataloader_num_workers": 0,
        **changes,
    }
    return load_config(None, [f"{key}={value}" for key, value in words.items()])


def losses(out):
    return [entry["loss"] for entry in json.loads((out / "history.json").read_text()) if "loss" in entry]


def test_training_from_the_store_gives_the_same_curve(store, base, world, tmp_path):
    pixels = train(settings(base, world, tmp_path / "pixels"))
    stored = train(settings(base, world, tmp_path / "stored", **{"data.features": store}))
    assert pixels.steps == stored.steps == 12
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "pixels")), torch.tensor(losses(tmp_path / "stored")), atol=1e-4, rtol=0
    )
    assert pixels.validation == pytest.approx(stored.validation, abs=1e-6)


def test_the_index_from_the_store_equals_the_one_from_pixels(store, base, world, tmp_path, script):
    cache = script("cache")
    words = ["--data-root", world, "--splits", "test", f"model.name={base}", "merge.num_regions=8"]
    for name, more in (("pixels", []), ("stored", ["--features", store])):
        folder = ["--cache-dir", tmp_path / name, "--batch-size", 4, "--cache-dtype", "float32"]
        cache.main([str(word) for word in (*folder, *more, *words)])
    from samer.index.read import Index

    ours, theirs = (Index(tmp_path / name).scores("test")[0] for name in ("stored", "pixels"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def batch_loss(model, batch):
    model.zero_grad()
    loss = model(**batch)["loss"]
    loss.backward()
    return loss.detach(), model.projection.weight.grad.clone(), model.projection.bias.grad.clone()


def test_chunked_loss_and_gradients_equal_the_plain_ones(store, base, world, monkeypatch):

    stored = FeatureStore(store, str(base))
    dataset = CaptionDataset(flickr.load_split(world, "train", boxes=True))
    batch = Collator(stored, ObjectsConfig())([dataset[k] for k in range(50)])
    model = ProjectorModel(stored, MergeConfig(num_regions=8), 0.07, gather_negatives=True)
    plain = batch_loss(model, batch)
    calls = []
    original = training_model.checkpoint
    monkeypatch.setattr(training_model, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    monkeypatch.setattr(training_model, "CHUNK_ELEMENTS", 60_000)
    chunked = batch_loss(model, batch)
    assert len(calls) > 4  # it was cut
    for ours, theirs in zip(chunked, plain):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_budgets_train_together(store, base, world, tmp_path):
    stored = FeatureStore(store, str(base))
    dataset = CaptionDataset(flickr.load_split(world, "train", boxes=True))
    batch = Collator(stored, ObjectsConfig())([dataset[k] for k in range(10)])
    singles = [batch_loss(ProjectorModel(stored, MergeConfig(num_regions=k), 0.07, True), batch) for k in (4, 8, 16)]
    nested = batch_loss(ProjectorModel(stored, MergeConfig(num_regions=16), 0.07, True, budgets=(4, 8, 16)), batch)
    for position, ours in enumerate(nested):
        mean = torch.stack([single[position] for single in singles]).mean(0)
        torch.testing.assert_close(ours, mean, atol=1e-6, rtol=1e-5)
    config = settings(base, world, tmp_path / "run", **{"merge.num_regions": "[4, 8]", "data.features": store})
    assert (config.merge.num_regions, config.train.budgets) == (8, (4, 8))
    train(config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["merge"]["num_regions"] == 8


def test_the_best_epoch_is_kept_and_training_stops_early(store, base, world, tmp_path, monkeypatch):
    from samer import evaluation
    from samer.training import loop as training_loop

    script = iter([30.0, 50.0, 40.0, 45.0, 60.0])
    seen = []

    def fake(retriever, records, merge, *, batch_size, bank):
        seen.append(retriever.current_projector().hash)
        value = next(script)
        return {"r@1": value, "r@5": value, "r@10": value}

    monkeypatch.setattr(evaluation, "evaluate_records", fake)
    more = {"data.features": store, "train.select_best": "true", "train.early_stop_patience": 2}
    result = training_loop.train(settings(base, world, tmp_path / "run", **more, **{"train.num_train_epochs": 5}))
    assert len(seen) == 4  # 50 was the best; two epochs without a better one end it
    assert result.validation["r@1"] == 50.0
    stored = FeatureStore(store, str(base))
    assert load_projector(tmp_path / "run", stored).hash == seen[1]


def test_an_early_stopped_run_stays_finished(store, base, world, tmp_path, monkeypatch):
    from samer import evaluation
    from samer.training import loop as training_loop

    script = iter([50.0, 40.0])
    fake = lambda *_, **__: dict.fromkeys(("r@1", "r@5", "r@10"), next(script))
    monkeypatch.setattr(evaluation, "evaluate_records", fake)
    changes = {"data.features": store, "train.early_stop_patience": 1, "train.num_train_epochs": 5}
    first = training_loop.train(settings(base, world, tmp_path / "run", **changes))
    before = contents(tmp_path / "run")
    again = training_loop.train(settings(base, world, tmp_path / "run", **changes))
    assert contents(tmp_path / "run") == before
    assert first.steps == again.steps == 12
    assert again.validation["r@1"] == first.validation["r@1"] == 40.0
    assert (tmp_path / "run" / "checkpoint-12" / "state.json").is_file()


def test_a_store_survives_the_way_to_a_worker(store, base, world):
    import pickle

    stored = FeatureStore(store, str(base))
    sent = pickle.dumps(stored)
    assert len(sent) < 2000  # a path, not the features
    records = flickr.load_split(world, "val", boxes=False)
    ours, theirs = (s.record_inputs(records) for s in (pickle.loads(sent), stored))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_damaged_base_or_manifest_is_named(store, base, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    tensors = load_file(copy / "base.safetensors")
    save_file({**tensors, "bias": tensors["bias"] + 1}, copy / "base.safetensors")
    with pytest.raises(InputError, match=r"base\.safetensors: differs from the manifest"):
        FeatureStore(copy, str(base))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["base_projector"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: contents differ from their own checksum"):
        FeatureStore(copy, str(base))
    del manifest["checksum"]
    write_manifest(copy / "manifest.json", manifest)
    with pytest.raises(InputError, match=r"manifest\.json: base_projector is missing or no text"):
        FeatureStore(copy, str(base))


def test_a_cache_of_other_features_is_refused(store, base, world, tmp_path, script):
    words = ["--data-root", world, "--splits", "test", "--cache-dir", tmp_path / "c", f"model.name={base}"]
    script("cache").main([str(word) for word in words])
    with pytest.raises(InputError, match="holds an index with hidden_states="):
        script("cache").main([str(word) for word in (*words, "--features", store)])


def test_the_sampler_reads_each_image_in_one_window(world, monkeypatch):
    from samer.training import batches as training_batches

    dataset = CaptionDataset(flickr.load_split(world, "train", boxes=False))
    plain = list(WindowSampler(dataset, seed=1))
    assert sorted(plain) == list(range(len(dataset)))
    monkeypatch.setattr(training_batches, "WINDOW_IMAGES", 3)
    sampler = WindowSampler(dataset, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(len(dataset)))
    assert order == list(sampler)
    windows = [{dataset[k].image for k in order[start : start + 15]} for start in range(0, len(order), 15)]
    assert [len(window) for window in windows] == [3, 3, 3, 3]
    assert not set.intersection(*windows)
    sampler.set_epoch(1)
    assert list(sampler) != order
    assert list(WindowSampler(dataset, seed=2)) != order


MEMORY = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
from samer.retrievers.base import Encoder, Projector
from samer.config import MergeConfig
from samer.training.model import ProjectorModel
torch.manual_seed(0)
captions, tokens, hidden, words = 1024, 262, 128, 40

class Random(Encoder):
    def hidden_states(self, inputs):
        return inputs["hidden"]

base = Projector(torch.randn(64, hidden) / hidden**0.5, torch.zeros(64))
frozen = Random("random", base, grid=(16, 16), image_token_id=7)
ids = torch.full((captions, tokens), 7)
ids[:, 256:] = 1
full = lambda rows: torch.ones(captions, rows, dtype=torch.long)
batch = {{
    "image_inputs": {{
        "hidden": torch.randn(captions, tokens, hidden), "input_ids": ids, "attention_mask": full(tokens)
    }},
    "query_inputs": {{"hidden": torch.randn(captions, words, hidden), "attention_mask": full(words)}},
    "image_of": torch.arange(captions),
    "image_numbers": torch.arange(captions),
    "labels": torch.randint(0, 4, (captions, tokens)),
    "real": torch.ones(captions, dtype=torch.bool),
}}
model = ProjectorModel(frozen, MergeConfig(num_regions=16), 0.07, True)
model(**batch)["loss"].backward()
assert model.projection.weight.grad.isfinite().all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def test_a_batch_of_1024_captions_trains_within_4_gb():
    root = str(features_write.__file__).rsplit("/samer/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(root=root)], capture_output=True, text=True, env={**os.environ}, check=True
    )
    assert float(done.stdout) < 4.0


# --- what is written, and what is not asked for ---------------------------------------------------------------------


def test_a_shard_has_the_bytes_that_safetensors_gives_it(tmp_path):
    """Written piece by piece, of every kind of numbers and with odd names in its stamp."""
    kinds = (torch.int64, torch.float64, torch.float32, torch.int32, torch.bfloat16, torch.float16, torch.int8)
    tensors = {f"{name}{k}": torch.arange(30).view(5, 3, 2).to(kind) for k, kind in enumerate(kinds) for name in "ba"}
    tensors |= {"flags": torch.arange(7) % 2 == 0, "bytes": torch.arange(6, dtype=torch.uint8).view(2, 3)}
    names = {"names": ["Käfer", '\x7f\x01\t"\\/\u2028', "猫"]}
    parts = {name: list(tensor.split(2)) for name, tensor in tensors.items()}
    entry = write_shard(tmp_path / "parts.safetensors", parts, names, {"count": 3})
    whole = write_shard(tmp_path / "whole.safetensors", tensors, names, {"count": 3})
    found = (tmp_path / "parts.safetensors").read_bytes()
    digest = hashlib.sha256(b"".join(tensors[name].view(torch.uint8).numpy().tobytes() for name in sorted(tensors)))
    header = {"stamp": names, "entry": {"count": 3}, "checksum": digest.hexdigest()}
    assert found == save(tensors, metadata={"samer": json.dumps(header, ensure_ascii=False)})
    assert found == (tmp_path / "whole.safetensors").read_bytes()
    assert entry["sha256"] == whole["sha256"] == hashlib.sha256(found).hexdigest()


def test_signals_that_are_not_asked_for_are_left_out(shards, base, world, store, tmp_path):
    """All else is the same; such a store says why it has none, and is not mixed with one that has them."""
    frozen, folder = Retriever.load(str(base)), tmp_path / "plain"
    write_features(folder, world, ["val"], frozen, batch_size=4, dtype="float32", signals=False)
    for path in sorted(folder.glob("val/images-*.safetensors")):
        ours, theirs = load_file(path), load_file(store / "val" / path.name)
        assert ours.pop("attention").isnan().all()
        assert not theirs.pop("attention").isnan().any()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    plain, records = FeatureStore(folder, str(base)), flickr.load_split(world, "val", boxes=False)
    with pytest.raises(InputError, match="signals were not asked for"):
        plain.image_states(plain.record_inputs(records[:1]), ATTENTION)
    with pytest.raises(InputError, match="without the attention that SAP compressors ask for"):
        write_features(folder, world, ["val"], frozen, batch_size=4, dtype="float32")
    shutil.copytree(store, tmp_path / "full")
    before = contents(tmp_path / "full")
    write_features(tmp_path / "full", world, SPLITS, frozen, batch_size=4, dtype="float32", signals=False)
    assert contents(tmp_path / "full") == before


def test_a_compiled_model_is_told_from_the_plain_one(base, world, store, monkeypatch):
    """With torch's compiler stood in for by the modules themselves, which takes no minutes."""
    monkeypatch.setattr(torch, "compile", lambda model, *_, **__: model)
    plain, compiled = (Retriever.load(str(base)) for _ in range(2))
    compiled.compile()
    assert compiled.origin == {**plain.origin, "computed_in": "float32 compiled"}
    records = flickr.load_split(world, "val", boxes=False)
    ours, theirs = (each.hidden_states(each.record_inputs(records)) for each in (compiled, plain))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(InputError, match="no model to compile"):
        FeatureStore(store, str(base)).compile()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        plain.compile()
