"""Two processes on the CPU against one: loss, gradients, training and the cache.

Run by torchrun, this file is one of the two processes: it writes what it computed for the test to compare.
"""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from samer import cache_io, evaluation, flickr, runtime, training
from samer.colpali import Retriever, load_projector
from samer.config import MergeConfig, ObjectsConfig, load_config
from samer.train_data import CaptionDataset, Collator
from samer.training import ProjectorModel

MERGE = MergeConfig(num_regions=12)
ROWS = (0, 21, 7, 2, 8, 36, 1, 30)  # images 0 4 1 0 | 1 7 0 6: some have captions on both sides
SHARDS = {"IMAGES_PER_SHARD": 3, "QUERIES_PER_SHARD": 7}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def batch_of(retriever, world, numbers):
    rows = CaptionDataset(flickr.load_split(world, "train", boxes=True)).rows
    return Collator(retriever, ObjectsConfig())([rows[k] for k in numbers])


def gradients(model):
    return [model.embedding_proj_layer.weight.grad, model.embedding_proj_layer.bias.grad]


def cache_words(base, world, folder):
    words = ["--data-root", world, "--cache-dir", folder, "--splits", "val", "test", "--batch-size", "2"]
    return [*map(str, words), f"model.name={base}", "merge.num_regions=12"]


def training_words(base, world, output, batch):
    values = {
        "model.name": base,
        "data.root": world,
        "data.limit_train_images": 8,
        "merge.num_regions": 12,
        "train.output_dir": output,
        "train.bf16": "false",
        "train.train_batch_size": batch,
        "train.grad_accum_steps": 1,
        "train.num_train_epochs": 2,
        "train.learning_rate": 2e-4,
        "train.logging_steps": 1,
        "train.dataloader_num_workers": 0,
    }
    return [f"{key}={value}" for key, value in values.items()]


def one_of_two(base, world, folder):
    """What each process that torchrun starts does."""
    retriever = Retriever.load(base)
    own = ROWS[4 * runtime.rank() :][:4]
    results = {}
    for gather in (True, False):
        model = ProjectorModel(retriever, MERGE, 0.07, gather)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)  # kept: without it nothing is averaged
        loss = wrapped(**batch_of(retriever, world, own))["loss"]
        loss.backward()
        results[gather] = (loss.item(), *gradients(model))
    torch.save(results, folder / f"rank-{runtime.rank()}.pt")

    for name, value in SHARDS.items():
        setattr(cache_io, name, value)
    written = []
    original = cache_io.write_shard
    cache_io.write_shard = lambda path, *more: written.append(path.name) or original(path, *more)
    importlib.import_module("scripts.cache").main(cache_words(base, world, folder / "cache"))
    (folder / f"written-{runtime.rank()}.json").write_text(json.dumps(written))

    # a process that looks late for an earlier run in the folder must not take this very run for one
    check = training._check_output
    training._check_output = lambda *words: time.sleep(3 * runtime.rank()) or check(*words)
    words = training_words(base, world, folder / "late", 4)
    training.train(load_config(None, [*words, "train.resume=false", "train.num_train_epochs=0.2", "data.eval_split="]))


@pytest.fixture(scope="module")
def two(base, world, command, tmp_path_factory):
    """The folder that two processes have filled."""
    folder = tmp_path_factory.mktemp("two")
    done = command(*torchrun(__file__), base, world, folder, env={**ONE_THREAD, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def torchrun(*words):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]


@pytest.mark.slow
@pytest.mark.parametrize("gather", [True, False])
def test_loss_and_gradients_equal_those_of_one_process(two, base, world, gather):
    ranks = [torch.load(two / f"rank-{rank}.pt", weights_only=True)[gather] for rank in (0, 1)]
    retriever = Retriever.load(str(base))
    model = ProjectorModel(retriever, MERGE, 0.07, gather)
    if gather:  # one batch of all rows
        loss = model(**batch_of(retriever, world, ROWS))["loss"]
    else:  # each half scored against its own images only
        loss = sum(model(**batch_of(retriever, world, half))["loss"] for half in (ROWS[:4], ROWS[4:])) / 2
    loss.backward()
    assert sum(rank[0] for rank in ranks) / 2 == pytest.approx(loss.item(), abs=1e-5)
    for rank in ranks:
        for ours, expected in zip(rank[1:], gradients(model)):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    other = torch.load(two / "rank-0.pt", weights_only=True)[not gather]
    assert (other[1] - ranks[0][1]).abs().max() > 1e-2  # the two ways do differ


@pytest.mark.slow
def test_the_cache_has_the_same_bytes(two, base, world, script, tmp_path, monkeypatch):
    for name, value in SHARDS.items():
        monkeypatch.setattr(cache_io, name, value)
    script("cache").main(cache_words(base, world, tmp_path / "cache"))
    files = {path.relative_to(tmp_path / "cache") for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert files == {path.relative_to(two / "cache") for path in (two / "cache").rglob("*") if path.is_file()}
    # manifest and projector, val of 6 images and 30 captions, test of 8 and 40
    assert len(files) == 2 + (2 + 5) + (3 + 6)
    for file in files:
        assert (tmp_path / "cache" / file).read_bytes() == (two / "cache" / file).read_bytes(), file
    written = [json.loads((two / f"written-{rank}.json").read_text()) for rank in (0, 1)]
    assert (len(written[0]), len(written[1])) == (1 + 3 + 2 + 3, 1 + 2 + 1 + 3)  # both did their share


@pytest.mark.slow
def test_a_slow_process_does_not_mistake_this_run_for_an_earlier_one(two):
    assert (two / "late/projector.safetensors").is_file()


@pytest.mark.slow
def test_training_reaches_the_same_projector(base, world, command, script, tmp_path):
    """Process r takes batch 2 i + r of the one shuffled order, so a step sees the rows of one batch twice as large.

    Not to the bit: where two regions tie for a query token within rounding, batches of other shapes pick another one,
    which leaves the loss and turns the gradient. The tolerance is a tenth of the way that the weights went.
    """
    config = tmp_path / "config.yaml"
    config.write_text("{}\n")
    words = training_words(base, world, tmp_path / "two", 4)
    done = command(*torchrun("scripts/train.py"), "--config", config, *words, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        script("train").main(["--config", str(config), *training_words(base, world, tmp_path / "one", 8)])
    retriever = Retriever.load(str(base))
    one, two = (load_projector(tmp_path / name, retriever) for name in ("one", "two"))
    torch.testing.assert_close(two.weight, one.weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(two.bias, one.bias, atol=1e-4, rtol=0)
    assert (one.weight - retriever.base_projector.weight).abs().max() > 5e-4
    logs = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two")]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert len(losses[0]) == 10
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    retriever.use_projector(two)
    records = flickr.load_split(world, "val", boxes=False)
    alone = evaluation.evaluate_records(retriever, records, MERGE, batch_size=4)
    shared_out = [entry for entry in logs[1] if "eval_r@1" in entry]
    assert [entry["step"] for entry in shared_out] == [5, 10]
    assert {name: shared_out[-1][f"eval_{name}"] for name in alone} == pytest.approx(alone)
    lines = done.stdout.splitlines()
    assert sum(line.startswith("training 528 parameters") for line in lines) == 1  # only the first process speaks
    assert sum(line.startswith("done: 10 steps") for line in lines) == 1


if __name__ == "__main__":
    with runtime.process_group():
        one_of_two(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
