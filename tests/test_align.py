"""Aligning two towers: the losses against loops, several processes against one, interruptions, and what comes of it."""

import json
import math
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from small_towers import SIDE, save_text, save_vision

from samer.config import DataConfig, InputError
from samer.data import flickr
from samer.features.read import FeatureStore
from samer.features.towers import StoredTowers
from samer.retrievers.hf import Retriever
from samer.retrievers.pretrained import TowerConfig
from samer.runtime.signals import Stopped
from samer.search.models import Models
from samer.search.open_index import SearchIndex
from samer.training import align as module
from samer.training.align import align
from samer.training.align_settings import AlignConfig, AlignSettings
from samer.training.alignment import Alignment

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "samer_k64_colpali.yaml"
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or hidden without -m gpu")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])


@pytest.fixture(scope="module")
def towers(tmp_path_factory, world):
    place = tmp_path_factory.mktemp("towers")
    captions = [
        c.text for split in ("train", "val") for r in flickr.load_split(world, split, boxes=False) for c in r.captions
    ]
    words = sorted({word.lower() for text in captions for word in text.replace(".", " .").replace(",", " ,").split()})
    save_vision(place / "vision"), save_text(place / "text", words=words)
    sizes = {"hidden_size": 32, "embedding_dim": 8, "heads": 4, "max_text_tokens": 16}
    return TowerConfig(str(place / "vision"), str(place / "text"), image_size=SIDE, **sizes)


@pytest.fixture
def config(towers, world, tmp_path):
    data = DataConfig(root=str(world))
    sizes = {"images_per_step": 4, "epochs": 3, "batch_size": 4}
    settings = AlignSettings(str(tmp_path / "out"), features_dtype="float32", phrases=1, **sizes)
    return AlignConfig(towers, data, settings)


def alignment(config):
    """An alignment before its first step."""
    records, validation = module._records(config)
    output = Path(config.align.output_dir)
    store = module._tower_outputs(config, output, CPU)
    torch.manual_seed(config.align.seed)
    model = module.TowerRetriever(config.towers, *module.load_towers(config.towers))
    encoder = StoredTowers(model, module.TowerProcessor.of_towers(config.towers), "small", store)
    return Alignment(config, encoder, records, validation)


def of(config, **settings):
    return replace(config, align=replace(config.align, **settings))


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_run_gives_a_retriever_that_has_learned(config, device):
    folder = align(of(config, epochs=25, learning_rate=5e-3, phrase_weight=1.0), torch.device(device))
    history = json.loads((folder / "history.json").read_text())["epochs"]
    assert [entry["epoch"] for entry in history] == list(range(1, 26))
    assert history[-1]["contrast"] < 0.7 * history[0]["contrast"]
    assert history[-1]["phrases"] < history[0]["phrases"]
    retriever = Retriever.load(str(folder))
    assert retriever.identity.weights
    assert retriever.model.config.temperature != config.towers.temperature  # learned
    assert not list(folder.glob("epoch-*"))
    assert (folder / "towers" / "config.json").is_file()


def test_stored_towers_give_what_the_retriever_gives(config, world):
    folder = align(config, CPU)
    retriever = Retriever.load(str(folder))
    stored = StoredTowers.open(retriever, folder / "features")
    records = flickr.load_split(world, "val", boxes=False)
    texts = [caption.text for caption in records[0].captions]
    for one, other in ((stored, retriever),):
        images, queries = (encoder.encode_images(encoder.record_inputs(records)) for encoder in (one, other))
        assert torch.allclose(images.tokens, queries.tokens, atol=1e-5)
        found, wanted = (encoder.encode_queries(encoder.query_inputs(texts)) for encoder in (one, other))
        assert torch.equal(found.mask, wanted.mask)
        assert torch.allclose(found.tokens[found.mask], wanted.tokens[wanted.mask], atol=1e-5)


@pytest.mark.parametrize(("patches", "graded"), [(0, False), (20, False), (0, True)])
def test_the_losses_are_those_of_plain_loops(config, patches, graded):
    """Graded: image 2 answers the captions of image 0 as well."""
    run = alignment(of(config, patches=patches, dropout=0.0, captions=3, phrases=2))
    if graded:
        grades = tuple((run.records[k].image_id, grade) for k, grade in ((0, 2), (2, 1), (9, 1)))
        captions = tuple(replace(caption, grades=grades) for caption in run.records[0].captions)
        run.records = [replace(run.records[0], captions=captions), *run.records[1:]]
    records, asked = zip(*(run._some(number, 5) for number in range(3)))
    assert [len(record.captions) for record in records] == [3, 3, 3]
    losses = run.losses([0, 1, 2], step=5)
    encoder, tau = run.encoder, float(run.temperature.detach())
    images = encoder.encode_images(encoder.record_inputs(records))
    chosen = list(range(64))
    if patches:
        chosen = torch.randperm(64, generator=run._random(6))[:patches].tolist()
        states = encoder.tower_states(encoder.record_inputs(records))[:, chosen]
        tokens = encoder.project(encoder.model.vision_adapter(states)).detach()
    else:
        tokens = images.tokens
    scores, owners, phrases = [], [], []
    for number, record in enumerate(records):
        for caption in record.captions:
            words = encoder.encode_queries(encoder.query_inputs([caption.text]))
            scores.append([float((words.tokens[0] @ image.T).amax(1).mean()) for image in tokens])
            owners.append(number)
            for token, (first, last) in zip(words.tokens[0], words.offsets[0].tolist()):
                named = [p for p in caption.phrases if p.boxes and first < p.end and last > p.start]
                if not named:
                    continue
                inside = []
                for patch in chosen:
                    x, y = patch % 8 / 8, patch // 8 / 8
                    grid = [(x + (i + 0.5) / 160, y + (j + 0.5) / 160) for i in range(20) for j in range(20)]
                    held = [any(b[0] <= u <= b[2] and b[1] <= v <= b[3] for b in named[-1].boxes) for u, v in grid]
                    inside.append(sum(held) / len(held))
                if sum(inside):
                    share = (tokens[number] @ token / 0.1).softmax(0)
                    phrases.append(-math.log(sum(float(s) * max(w, 1e-9) for s, w in zip(share, inside))))
    answers = [[image == owner or (graded and (owner, image) == (0, 2)) for image in range(3)] for owner in owners]
    for phrase in (phrase for each in asked for phrase in each):
        words = encoder.encode_queries(encoder.query_inputs([phrase]))
        scores.append([float((words.tokens[0] @ image.T).amax(1).mean()) for image in tokens])
        told = [[p.typed for c in record.captions for p in c.phrases if p.boxes] for record in run.records[:3]]
        answers.append([phrase in each for each in told])
    assert len(scores) == 15
    logits, positive = torch.tensor(scores) / tau, torch.tensor(answers)
    forward = (logits.logsumexp(1) - logits.masked_fill(~positive, -math.inf).logsumexp(1)).mean()
    backward = (logits.logsumexp(0) - logits.masked_fill(~positive, -math.inf).logsumexp(0)).mean()
    assert float(losses["contrast"].detach()) == pytest.approx(float(forward + backward) / 2, abs=1e-4)
    assert len(phrases) > 10
    assert float(losses["phrases"].detach()) == pytest.approx(
        sum(phrases) / len(phrases), rel=0.03
    )  # areas by 400 points


def test_an_interrupted_run_goes_on_to_the_same_retriever(config, monkeypatch):
    whole = align(of(config, epochs=4), CPU)
    stopped = of(config, epochs=4, output_dir=f"{config.align.output_dir}-2")
    steps, before = [], Alignment.step

    def step(self, records, number):
        steps.append(number)
        if len(steps) == 8:  # in the middle of the third epoch of three steps
            raise Stopped
        return before(self, records, number)

    monkeypatch.setattr(Alignment, "step", step)
    with pytest.raises(Stopped):
        align(stopped, CPU)
    again = align(stopped, CPU)
    assert steps == [*range(8), *range(6, 12)]  # epochs that were finished are not trained again
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "history.json").read_text() == (again / "history.json").read_text()


def last_gradients(run):
    """Of the last step: AdamW would turn what is 0 but for rounding, as keys' biases have, into steps of full size."""
    return {name: value.grad for name, value in run.parameters.items()}


def one_of_two(rank, config, place):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(place["port"])}
    torch.set_num_threads(1)
    from samer.runtime.processes import process_group

    with process_group():
        run = alignment(config)
        run.train_epoch()
        if rank == 0:
            torch.save(last_gradients(run), place["file"])


def test_outputs_of_other_towers_left_by_a_killed_run_are_refused(config, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "StoredTowers", killed)
    with pytest.raises(KeyboardInterrupt):
        align(config, CPU)
    monkeypatch.undo()
    assert not (Path(config.align.output_dir) / "align.yaml").exists()
    larger = replace(config, towers=replace(config.towers, image_size=2 * SIDE))
    with pytest.raises(InputError, match=r"made with towers\.image_size"):
        align(larger, CPU)
    save_text(tmp_path / "other", seed=1)
    others = replace(config, towers=replace(config.towers, text=str(tmp_path / "other")))
    with pytest.raises(InputError, match=r"made with towers\.text"):
        align(others, CPU)
    assert align(of(config, epochs=1), CPU)


def test_a_swin_tower_is_aligned_and_compared_without_what_needs_attention(config, world, tmp_path, script, capsys):
    vision = str(save_vision(tmp_path / "swin", "swin"))
    folder = align(of(replace(config, towers=replace(config.towers, vision=vision)), epochs=1), CPU)
    store = tmp_path / "features"
    words = [
        "--out",
        str(store),
        "--data-root",
        str(world),
        "--towers",
        str(folder / "features"),
        f"model.name={folder}",
    ]
    script("features").main([*words, "--splits", "train", "val"])
    words = ["--data-root", str(world), "--features", str(store), "--config", str(CONFIG), "--split", "val"]
    words += ["--sections", "untouched", "--", f"model.name={folder}", "merge.num_regions=2"]
    script("compare").main(["--out", str(tmp_path / "compare"), *words])
    assert "sap-mean, sap-max left out" in capsys.readouterr().out
    rows = json.loads((tmp_path / "compare" / "results.json").read_text())["rows"]
    assert {"samer, raster", "kmeans"} < {row["name"] for row in rows}
    assert not {"sap-mean", "sap-max"} & {row["name"] for row in rows}


def test_a_relative_tower_is_kept_by_its_real_path(config, tmp_path, monkeypatch):
    vision = Path(config.towers.vision)
    monkeypatch.chdir(vision.parent)
    folder = align(of(replace(config, towers=replace(config.towers, vision=vision.name)), epochs=1), CPU)
    monkeypatch.chdir(tmp_path)
    assert Retriever.load(str(folder)).model.config.vision == str(vision.resolve())


def test_a_store_without_phrases_is_refused_where_they_are_asked(config, tmp_path, world, script):
    folder = align(of(config, epochs=1, phrases=0), CPU)
    shared = replace(config, data=replace(config.data, features=str(folder / "features")))
    with pytest.raises(InputError, match="--phrases"):
        align(of(shared, output_dir=str(tmp_path / "asks")), CPU)


def test_two_processes_train_as_one_does(config, tmp_path):
    config = of(config, dropout=0.0, learning_rate=1e-5)
    run = alignment(config)
    run.train_epoch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"port": port, "file": str(tmp_path / "two.pt")}
    torch.multiprocessing.spawn(one_of_two, (config, place), nprocs=2)
    two = torch.load(place["file"])
    for name, value in last_gradients(run).items():
        assert torch.allclose(value, two[name], atol=1e-3 * float(value.abs().max()) + 1e-5), name


def test_a_finished_run_is_left_alone_and_another_is_refused(config, capsys):
    folder = align(config, CPU)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert align(config, CPU) == folder
    assert "nothing is left to train" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(InputError, match=r"align\.epochs=3, now 5"):
        align(of(config, epochs=5), CPU)
    (folder / "align.yaml").unlink()
    with pytest.raises(InputError, match="holds another model"):
        align(config, CPU)


def test_it_starts_from_another_retriever_of_the_same_towers(config, tmp_path):
    """On pictures of another size: what is trained has the same sizes, and only the number of patches differs."""
    first = align(of(config, epochs=8, learning_rate=5e-3), CPU)
    larger = replace(config, towers=replace(config.towers, image_size=2 * SIDE))
    settings = {"output_dir": str(tmp_path / "larger"), "start": str(first), "epochs": 1, "learning_rate": 1e-9}
    folder = align(of(larger, **settings), CPU)
    assert Retriever.load(str(folder)).grid == (16, 16)  # of 4 pixels each
    own, other = (load_file(place / "model.safetensors") for place in (folder, first))
    assert max((own[name] - other[name]).abs().max() for name in own) < 1e-6
    temperatures = [Retriever.load(str(place)).model.config.temperature for place in (folder, first)]
    assert temperatures[0] == pytest.approx(temperatures[1])
    split = replace(config, towers=replace(config.towers, heads=8))
    with pytest.raises(InputError, match=r"towers\.heads=4, now 8"):
        align(of(split, output_dir=str(tmp_path / "split"), start=str(first)), CPU)
    wider = replace(config, towers=replace(config.towers, embedding_dim=4))
    with pytest.raises(InputError, match=r"towers\.embedding_dim=8, now 4"):
        align(of(wider, output_dir=str(tmp_path / "wider"), start=str(first)), CPU)
    save_text(tmp_path / "text", seed=1)
    others = replace(config, towers=replace(config.towers, text=str(tmp_path / "text")))
    with pytest.raises(InputError, match="another text tower"):
        align(of(others, output_dir=str(tmp_path / "others"), start=str(first)), CPU)


def test_a_store_of_other_towers_is_refused(config, tmp_path):
    folder = align(config, CPU)
    other = save_vision(tmp_path / "other", seed=9)
    with pytest.raises(InputError, match="stale, its weights"):
        align(
            replace(
                of(config, output_dir=str(tmp_path / "new")),
                towers=replace(config.towers, vision=str(other)),
                data=replace(config.data, features=str(folder / "features")),
            ),
            CPU,
        )
    colpali = FeatureStore(folder / "features", str(folder / "towers"))
    assert colpali.manifest.hidden_size == 24


def test_settings_that_cannot_be_are_refused(config):
    with pytest.raises(InputError, match=r"data\.root is not set"):
        align(replace(config, data=DataConfig()), CPU)
    with pytest.raises(InputError, match="12 images with captions are fewer"):
        align(of(config, images_per_step=13), CPU)
    for name, value in (("epochs", 0), ("learning_rate", -1.0), ("dropout", 1.0), ("patches", -1)):
        with pytest.raises(InputError, match=rf"align\.{name}"):
            of(config, **{name: value})


def test_from_two_towers_to_an_index_by_the_commands(config, world, tmp_path, script):
    """align, features of what it made, training through the merge, an index and its metrics."""
    towers, out = config.towers, tmp_path / "retriever"
    words = [
        f"towers.{name}={getattr(towers, name)}" for name in ("vision", "text", "image_size", "hidden_size", "heads")
    ]
    settings = ["align.images_per_step=4", "align.epochs=2", f"align.output_dir={out}", f"data.root={world}"]
    script("align").main([*words, "towers.embedding_dim=8", *settings, "align.phrase_weight=0"])
    model = f"model.name={out}"
    store = tmp_path / "features"
    more = ["--towers", str(out / "features"), "--splits", "train", "val", model]
    script("features").main(["--out", str(store), "--data-root", str(world), *more])
    found = FeatureStore(store, str(out))
    assert found.manifest.computed_in == "float32 from float16 towers"
    retriever = Retriever.load(str(out))
    records = flickr.load_split(world, "val", boxes=False)
    stored, computed = (e.encode_images(e.record_inputs(records)).tokens for e in (found, retriever))
    assert torch.allclose(stored, computed, atol=2e-2)
    settings = ["train.train_batch_size=8", "train.num_train_epochs=1", "train.bf16=false", "merge.num_regions=4"]
    place = f"train.output_dir={tmp_path / 'projector'}"
    script("train").main(
        ["--config", str(CONFIG), f"data.root={world}", f"data.features={store}", model, place, *settings]
    )
    options = ["--adapter-path", str(tmp_path / "projector"), "--features", str(store), "--splits", "val"]
    script("cache").main(["--data-root", str(world), "--cache-dir", str(tmp_path / "index"), *options, model])
    script("eval").main(
        ["--cache-dir", str(tmp_path / "index"), "--split", "val", "--output-json", str(tmp_path / "m")]
    )
    assert json.loads((tmp_path / "m").read_text())["vectors_per_image"] == 4


def test_photographs_are_searched_with_evidence_by_a_tower_retriever(config, tmp_path, script):
    """The vectors that an index keeps are those that the retriever gives, and each word looks at its own best one."""
    folder = align(of(config, epochs=1), CPU)
    photographs, cache = Path(__file__).parent / "fixtures" / "photos" / "images", str(tmp_path / "index")
    script("index").main(
        ["--images", str(photographs), "--cache-dir", cache, f"model.name={folder}", "merge.num_regions=4"]
    )
    index = SearchIndex(cache, Models("cpu"))
    found = index.search("a red circle", 3)
    words, rows = index.explain("a red circle", found)
    assert [word.text for word in words] == ["a", "red", "circle"]
    assert all(len(word.tokens) == 1 for word in words)
    numbers, tokens = index.index.numbers(index.split), found.query.tokens[0][found.query.mask[0]]
    for (name, score), row in zip(found.hits, rows):
        vectors = index.index.vectors(index.split, numbers[name]).tokens
        assert row["grid"] == [8, 8]
        assert set(row["regions"]) <= set(range(len(vectors)))
        best = (tokens @ vectors.T).max(1)
        assert score == pytest.approx(float(best.values.mean()), abs=1e-2)  # stored in int8
        assert [own["vectors"] for own in row["words"]] == [[int(best.indices[word.tokens[0]])] for word in words]


def test_what_is_no_tower_retriever_has_no_tower_store(retriever, config):
    folder = align(of(config, epochs=1), CPU)
    with pytest.raises(InputError, match="no tower retriever"):
        StoredTowers.open(retriever, folder / "features")
