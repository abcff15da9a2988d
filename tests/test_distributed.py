"""One process against two and three on the CPU, and what is left when one of them dies, fails or is told to stop.

Processes are forked from a server that has everything imported, so a start takes a second, and they join as started by
hand: RANK, WORLD_SIZE and so on in the environment, and no agent of torchrun that would end the others. One test goes
through bash/train.sh and torchrun.

SAMER_FAULT_LONG=1 runs all combinations of process, job and number of processes. SAMER_FAULT_LOG: a file that gets one
JSON line per group: {"group", "cases", "survived", "bytes_lost", "recovery", "seconds"}, where recovery is the longest
time that a job started again took.
"""

import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from samer import evaluation
from samer.config import MergeConfig, ObjectsConfig, load_config
from samer.data import flickr
from samer.features import write as features_write
from samer.index import write as index_write
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector
from samer.runtime import commands as runtime_commands
from samer.runtime import processes as runtime_processes
from samer.runtime.gather import gather_ragged
from samer.training import loop as training_loop
from samer.training.batches import CaptionDataset, Collator
from samer.training.model import ProjectorModel

ROOT = Path(__file__).resolve().parents[1]
LONG = os.environ.get("SAMER_FAULT_LONG") == "1"
COUNTS = (2, 3)
MERGE = MergeConfig(num_regions=12)
# images 0 4 1 0 | 1 7 0 6 | 8 0 4 11: some have captions on several sides
ROWS = (0, 21, 7, 2, 8, 36, 1, 30, 44, 3, 22, 59)
WAYS = {"gathered": (True, None), "own": (False, None), "mixed": (True, 0.6)}  # negatives, share of mixup
# images of val 6, test 8, train 12 and five captions each; the last shard is short, and so is its last batch of 2
SHARDS = {"IMAGES_PER_SHARD": 3, "QUERIES_PER_SHARD": 7, "TEXTS_PER_SHARD": 7}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
MINUTE = 60
GONE = "another process of this job has ended"

# name: (script, words); every one is run by one, two and three processes
STORES = {
    "features": ("features", ["--splits", "val", "test", "train"]),
    "features-int8": ("features", ["--splits", "test", "--dtype", "int8"]),
    "features-few": ("features", ["--splits", "val", "--limit-images", "1"]),  # fewer shards than processes
    "cache": ("cache", ["--splits", "val", "test"]),
    "cache-int8": ("cache", ["--splits", "train", "val", "--cache-dtype", "int8"]),
    "cache-binary": ("cache", ["--splits", "test", "--cache-dtype", "binary", "--assignments"]),
    "cache-codebook": ("cache", ["--splits", "val", "test", "merge.compressor=hpc"]),
    "cache-bank": ("cache", ["--splits", "val", "merge.compressor=querybank", "merge.bank_size=50"]),
    "cache-stored": ("cache", ["--splits", "val", "test", "--features", "{folder}/features"]),
    "cache-few": ("cache", ["--splits", "val", "--limit-images", "1"]),
}
# name: (images of five captions each, captions of a step over all processes)
RUNS = {
    "even": (12, 12),  # 5 steps of 12 in an epoch
    "last-crosses": (8, 24),  # 24 and 16: of two processes the last has 4 of its 12, of three 0 of its 8
    "last-small": (7, 12),  # 12, 12 and 11
    "one-has-rows": (5, 12),  # 12, 12 and 1
}


# --- what a process does --------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What befalls process `rank` as it comes to its `count`th shard or training step."""

    kind: str  # killed, stopped (SIGTERM, and it goes on if it can) or held (until the file `release` is there)
    rank: int
    count: int
    release: Path | None = None


def process(rank, count, port, folder, faults, work, *words):
    """The life of one process: it joins the others, does its work and leaves what it said in `folder`."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    torch.set_num_threads(1)
    for module in (index_write, features_write):
        for name in SHARDS.keys() & vars(module).keys():
            setattr(module, name, SHARDS[name])
    for fault in faults:
        if fault.rank == rank:
            arm(fault)
    runtime_commands.run(lambda: work(*words), shared=True)


def arm(fault):
    calls = 0

    def before(*_):
        nonlocal calls
        calls += 1
        if calls == fault.count:
            befall(fault)

    for owner, name in ((index_write, "write_shard"), (features_write, "write_shard"), (ProjectorModel, "forward")):
        setattr(owner, name, preceded(getattr(owner, name), before))


def preceded(function, before):
    def both(*words, **settings):
        before()
        return function(*words, **settings)

    return both


def befall(fault):
    if fault.kind == "held":
        fault.release.with_suffix(".held").touch()
        while not fault.release.exists():
            time.sleep(0.02)
    else:
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGTERM}[fault.kind])


def script_words(base, world, folder, name):
    """Script and words of one of `STORES` or of `RUNS`, whose output goes to folder/name."""
    if name in RUNS:
        return "train", ["--config", str(folder / "config.yaml"), *training_words(base, world, folder, name)]
    script, words = STORES[name]
    place = ["--out" if script == "features" else "--cache-dir", str(folder / name)]
    words = ["--data-root", str(world), *place, *words, "--batch-size", "2", f"model.name={base}"]
    words = [word.format(folder=folder) for word in words]
    return script, words if script == "features" else [*words, "merge.num_regions=12"]


def training_words(base, world, folder, name, count=None):
    images, captions = RUNS[name]
    values = {
        "model.name": base,
        "data.root": world,
        "data.limit_train_images": images,
        "data.limit_eval_images": 5,
        "merge.num_regions": 12,
        "train.output_dir": folder / name,
        "train.bf16": "false",
        "train.train_batch_size": captions // (count or runtime_processes.world_size()),
        "train.grad_accum_steps": 1,
        "train.num_train_epochs": 2,
        "train.learning_rate": 2e-4,
        "train.logging_steps": 1,
        "train.save_steps": 2,
        "train.dataloader_num_workers": 0,
    }
    return [f"{key}={value}" for key, value in values.items()]


def one_script(base, world, folder, name, more=()):
    """What each process of a job does that is to be disturbed."""
    script, words = script_words(base, world, folder, name)
    importlib.import_module(f"scripts.{script}").main([*words, *more])


def everything(base, world, folder):
    """What each process of an undisturbed job does."""
    written = []
    for module in (index_write, features_write):
        original = module.write_shard
        remember = lambda path, *more, write=original: written.append(f"{path.parents[1].name}") or write(path, *more)
        module.write_shard = remember
    with runtime_processes.process_group():
        if runtime_processes.world_size() > 1:
            save_gradients(base, world, folder)
        for name in (*STORES, *RUNS):
            one_script(base, world, folder, name)
        if runtime_processes.world_size() == 2:
            train_with_a_late_process(base, world, folder)
    shares = {name: written.count(name) for name in STORES}
    (folder / f"written-{runtime_processes.rank()}.json").write_text(json.dumps(shares))


def save_gradients(base, world, folder):
    retriever = Retriever.load(base)
    results = {}
    for name, (gather, share) in WAYS.items():
        model = ProjectorModel(retriever, MERGE, 0.07, gather)
        model.mixup_share = share
        wrapped = torch.nn.parallel.DistributedDataParallel(model)  # kept: without it nothing is averaged
        loss = wrapped(**batch_of(retriever, world, ROWS[4 * runtime_processes.rank() :][:4]))["loss"]
        loss.backward()
        results[name] = (loss.item(), *gradients(model))
    torch.save(results, folder / f"rank-{runtime_processes.rank()}.pt")


def batch_of(retriever, world, numbers):
    rows = CaptionDataset(flickr.load_split(world, "train", boxes=True)).rows
    return Collator(retriever, ObjectsConfig())([rows[k] for k in numbers])


def gradients(model):
    return [model.projection.weight.grad, model.projection.bias.grad]


def gather_several_widths(folder):
    """What each process of a job does whose images have other numbers of vectors."""
    with runtime_processes.process_group():
        rank = runtime_processes.rank()
        tokens, mask = rows_of(rank)
        gathered, valid = gather_ragged(tokens.requires_grad_(), mask)
        (gathered * (1 + rank)).square().sum().backward()
        torch.save((gathered.detach(), valid, tokens.grad), folder / f"ragged-{rank}.pt")


def rows_of(rank):
    """Two images with 3 vectors at most, of the second process with 5."""
    tokens = torch.randn(2, 3 + 2 * (rank == 1), 4, generator=torch.Generator().manual_seed(rank))
    return tokens, torch.arange(tokens.shape[1]) < torch.tensor([[1], [tokens.shape[1]]])


def train_with_a_late_process(base, world, folder):
    """A process that looks late for an earlier run in the folder must not take this very run for one."""
    check = training_loop.check_output
    training_loop.check_output = lambda *words: time.sleep(2 * runtime_processes.rank()) or check(*words)
    words = [*training_words(base, world, folder, "even"), f"train.output_dir={folder / 'late'}"]
    training_loop.train(
        load_config(None, [*words, "train.resume=false", "train.num_train_epochs=0.2", "data.eval_split="])
    )


# --- starting and ending processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def server():
    """Imports once what every process needs; the processes are forks of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_distributed", "transformers.integrations", "accelerate"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    yield context
    multiprocessing.forkserver._forkserver._stop()


@pytest.fixture(scope="module")
def start(server):
    """Starts a job of `count` processes by hand."""
    running = []

    def begin(count, folder, work, *words, faults=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("out-*.txt"), *folder.glob("err-*.txt")):
            old.unlink()
        job = [
            server.Process(target=process, args=(k, count, port, folder, faults, work, *words)) for k in range(count)
        ]
        for each in job:
            each.start()
        running.extend(job)
        return job

    yield begin
    for each in running:
        each.kill()


def ended(job, folder, seconds=2 * MINUTE):
    """Exit codes and what each process wrote to stderr; a job that takes longer hangs."""
    deadline = time.monotonic() + seconds
    for each in job:
        each.join(max(0, deadline - time.monotonic()))
    codes = [each.exitcode for each in job]
    for each in job:
        each.kill()
    said = [(folder / f"err-{rank}.txt").read_text() for rank in range(len(job))]
    assert None not in codes, f"still running after {seconds} s: {codes}\n{said}"
    return codes, said


def files_of(folder):
    """Bytes of every file below a folder but of what is remembered of times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "stamps.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def setting(base, world, tmp_path_factory):
    """Makes a folder for the output of a job, and the words of its work."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.yaml").write_text("{}\n")
        return folder, (str(base), str(world), folder)

    return make


@pytest.fixture(scope="module")
def done(start, setting):
    """The folders that undisturbed jobs of one, two and three processes have filled."""
    folders = {}
    for count in (1, *COUNTS):
        folder, words = setting(f"done-{count}")
        codes, said = ended(start(count, folder, everything, *words), folder)
        assert codes == [0] * count, "\n".join(said)[-3000:]
        folders[count] = folder
    return folders


@pytest.mark.parametrize("count", COUNTS)
def test_rows_of_several_widths_are_gathered(start, tmp_path, count):
    codes, said = ended(start(count, tmp_path, gather_several_widths, tmp_path), tmp_path)
    assert codes == [0] * count, said
    parts = [rows_of(rank) for rank in range(count)]
    pads = [5 - tokens.shape[1] for tokens, _ in parts]
    wanted = torch.cat([torch.nn.functional.pad(tokens, (0, 0, 0, pad)) for (tokens, _), pad in zip(parts, pads)])
    seen = torch.cat([torch.nn.functional.pad(mask, (0, pad)) for (_, mask), pad in zip(parts, pads)])
    for rank, (tokens, _) in enumerate(parts):
        gathered, valid, gradient = torch.load(tmp_path / f"ragged-{rank}.pt", weights_only=True)
        assert torch.equal(gathered, wanted)
        assert torch.equal(valid, seen)
        # every process's sum of squares, times (1 + its number) squared
        torch.testing.assert_close(gradient, 2 * tokens * sum((1 + k) ** 2 for k in range(count)))


# --- the same results -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("count", COUNTS)
def test_loss_and_gradients_equal_those_of_one_process(done, base, world, count, name):
    saved = [torch.load(done[count] / f"rank-{rank}.pt", weights_only=True) for rank in range(count)]
    ranks, (gather, share) = [each[name] for each in saved], WAYS[name]
    model = ProjectorModel(Retriever.load(str(base)), MERGE, 0.07, gather)
    model.mixup_share = share
    shares = [ROWS[4 * rank :][:4] for rank in range(count)]
    if gather:  # one batch of all rows
        loss = model(**batch_of(model.retriever, world, sum(shares, ())))["loss"]
    else:  # each share scored against its own images only
        loss = sum(model(**batch_of(model.retriever, world, share))["loss"] for share in shares) / count
    loss.backward()
    assert sum(rank[0] for rank in ranks) / count == pytest.approx(loss.item(), abs=1e-5)
    for rank in ranks:
        for ours, expected in zip(rank[1:], gradients(model)):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    for other in WAYS.keys() - {name}:  # the ways do differ
        assert (saved[0][other][1] - ranks[0][1]).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("count", COUNTS)
def test_features_and_caches_have_the_same_bytes(done, count, name):
    one, several = (files_of(done[k] / name) for k in (1, count))
    assert one.keys() == several.keys()
    assert "manifest.json" in one
    assert len(one) > 3
    assert [file for file in one if one[file] != several[file]] == []


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_every_process_writes_its_share(done, count):
    shares = [json.loads((done[count] / f"written-{rank}.json").read_text()) for rank in range(count)]
    alone = json.loads((done[1] / "written-0.json").read_text())
    assert {name: sum(share[name] for share in shares) for name in STORES} == alone
    # val of 2 shards of images and 5 of queries, test of 3 and 6
    assert [share["cache"] for share in shares] == {2: [1 + 3 + 2 + 3, 1 + 2 + 1 + 3], 3: [6, 6, 4]}[count]


@pytest.mark.slow
def test_a_slow_process_does_not_mistake_this_run_for_an_earlier_one(done):
    assert (done[2] / "late/projector.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("count", COUNTS)
def test_training_reaches_the_same_projector(done, base, count, name):
    """Process r takes batch W i + r of the one shuffled order, so a step sees the rows of one batch W times as large.

    Not to the bit: where two regions tie for a query token within rounding, batches of other shapes pick another one,
    which leaves the loss and turns the gradient. The tolerance is a tenth of the way that the weights went.
    """
    retriever = Retriever.load(str(base))
    one, several = (load_projector(done[k] / name, retriever) for k in (1, count))
    way = (one.weight - retriever.base_projector.weight).abs().max()
    tolerance = float(way) / 10
    assert way > 3e-4
    torch.testing.assert_close(several.weight, one.weight, atol=tolerance, rtol=0)
    torch.testing.assert_close(several.bias, one.bias, atol=tolerance, rtol=0)
    logs = [json.loads((done[k] / name / "history.json").read_text()) for k in (1, count)]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    images, captions = RUNS[name]
    assert len(losses[0]) == 2 * -(-5 * images // captions)
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    measured = [{entry["step"]: entry["eval_r@1"] for entry in log if "eval_r@1" in entry} for log in logs]
    assert len(measured[0]) == 2
    assert measured[1] == pytest.approx(measured[0])


# each process scores its own images, as a single one does that accumulates the batches of two
ALONE = ["train.train_batch_size=6", "train.num_train_epochs=4", "train.gather_negatives=false"]


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one(start, setting, base):
    """The same steps, epochs and learning rates, and the same projector: one process accumulates two batches a step."""
    undisturbed, words = setting("undisturbed")
    codes, said = ended(start(2, undisturbed, one_script, *words, "last-small", ALONE), undisturbed)
    assert codes == [0, 0], said
    folder, words = setting("fewer")
    faults = [Fault("stopped", rank, 8) for rank in range(2)]
    codes, said = ended(start(2, folder, one_script, *words, "last-small", ALONE, faults=faults), folder, MINUTE)
    assert codes == [143, 143], said
    assert (folder / "last-small/checkpoint-8").is_dir()
    codes, said = ended(start(1, folder, one_script, *words, "last-small", ALONE), folder, MINUTE)
    assert codes == [0], said
    spoken = (folder / "out-0.txt").read_text()
    assert "2 processes x 6 captions x 1 accumulated so far, 1 x 6 x 2 from here on: 12 captions a step" in spoken
    ours, expected = (json.loads((at / "last-small/history.json").read_text()) for at in (folder, undisturbed))
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in expected]
    assert ours[-1] == expected[-1] == {"step": 12, "epoch": 4.0}
    for mine, other in zip(ours, expected):
        assert mine["epoch"] == other["epoch"]
        assert mine.get("learning_rate") == other.get("learning_rate")
        assert mine.get("loss") == pytest.approx(other.get("loss"), abs=1e-5)
    retriever = Retriever.load(str(base))
    one, two = (load_projector(at / "last-small", retriever) for at in (folder, undisturbed))
    torch.testing.assert_close(one.weight, two.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(one.bias, two.bias, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_the_shared_validation_is_that_of_one_process(done, base, world, count):
    retriever = Retriever.load(str(base))
    retriever.use_projector(load_projector(done[count] / "even", retriever))
    records = flickr.load_split(world, "val", boxes=False, limit_images=5)
    alone = evaluation.evaluate_records(retriever, records, MERGE, batch_size=4)
    log = json.loads((done[count] / "even/history.json").read_text())
    shared_out = [entry for entry in log if "eval_r@1" in entry]
    assert [entry["step"] for entry in shared_out] == [5, 10]
    assert {name: shared_out[-1][f"eval_{name}"] for name in alone} == pytest.approx(alone)


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_only_the_first_process_speaks(done, count):
    lines = (done[count] / "out-0.txt").read_text().splitlines()
    assert sum(line.startswith("training 528 parameters") for line in lines) == len(RUNS) + (count == 2)
    assert sum(line.startswith("done: 10 steps") for line in lines) == 1
    assert [(done[count] / f"out-{rank}.txt").read_text() for rank in range(1, count)] == [""] * (count - 1)


# --- pictures that are replaced between two runs -------------------------------------------------------------------


def turned(path):
    """Another picture under the same name."""
    with Image.open(path) as old:
        picture = old.rotate(180)
    picture.save(path, quality=95)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cache", "features"])
def test_replaced_pictures_are_found_by_the_process_that_has_their_shard(start, setting, base, world, tmp_path, name):
    data = shutil.copytree(world, tmp_path / "world")
    folder, _ = setting("replaced")

    def job(count, name, place=folder):
        codes, said = ended(start(count, place, one_script, str(base), str(data), place, name), place)
        return codes, said, [(place / f"out-{rank}.txt").read_text() for rank in range(count)]

    assert job(2, name)[0] == [0, 0]
    records = flickr.load_split(data, "val", boxes=False)
    for number in (1, 3, 4):  # of the first shard one, of the second, which is another process's, two
        turned(records[number].image_path)
    if name == "features":  # whichever process looks at a picture, all refuse together
        codes, said, _ = job(2, "cache-stored")
        assert codes == [2, 2]
        told = [
            re.search(r"3 of 14 pictures were replaced .* run bash/features\.sh again for val", each) for each in said
        ]
        assert all(told), said
    settled = 2.1 + max(path.stat().st_ctime for path in data.rglob("*.jpg"))
    time.sleep(max(0, settled - time.time()))  # younger files are not remembered
    codes, said, (first, second) = job(2, name)
    assert codes == [0, 0], said
    assert "val: 3 pictures changed since" in first
    assert ": 2 shards made anew" in first
    assert second == ""
    alone, _ = setting("alone")
    assert job(1, name, alone)[0] == [0]
    assert files_of(folder / name) == files_of(alone / name)
    stamps = (folder / name / "val" / "stamps.json").read_text()
    assert sorted(json.loads(stamps)["files"]) == sorted(record.image_id for record in records)  # of both processes


# --- a process that dies, fails or is told to stop ------------------------------------------------------------------


@pytest.fixture(scope="module")
def tally():
    """Counts cases of a group; what they took and whether they held goes to SAMER_FAULT_LOG."""
    groups = defaultdict(lambda: {"cases": 0, "survived": 0, "bytes_lost": 0, "recovery": 0.0, "seconds": 0.0})

    @contextmanager
    def case(name):
        group, begun = groups[name], time.monotonic()
        group["cases"] += 1
        try:
            yield group
            group["survived"] += 1
        finally:
            group["seconds"] += time.monotonic() - begun

    yield case
    if path := os.environ.get("SAMER_FAULT_LOG"):
        rounded = lambda group: {key: round(value, 1) for key, value in group.items()}
        with open(path, "a", encoding="utf-8") as log:
            log.writelines(json.dumps({"group": f"distributed, {k}", **rounded(v)}) + "\n" for k, v in groups.items())


def finished(name, folder):
    """Whether the job has come to its end: a run's history, the last split in a manifest."""
    if name in RUNS:
        return (folder / name / "history.json").exists()
    manifest = folder / name / "manifest.json"
    return manifest.exists() and len(json.loads(manifest.read_text())["splits"]) == len(STORES[name][1]) - 1


def unharmed(name, done, count, folder):
    """The output is that of an undisturbed job."""
    if name not in RUNS:
        assert files_of(folder / name) == files_of(done[1] / name)
        return
    ours, expected = (files_of(place / name)["projector.safetensors"] for place in (folder, done[count]))
    assert ours == expected
    logs = [json.loads((place / name / "history.json").read_text()) for place in (folder, done[count])]
    ours, expected = ([(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs)
    assert ours == expected


def started_again(start, count, folder, words, group):
    begun = time.monotonic()
    codes, said = ended(start(count, folder, one_script, *words), folder)
    assert codes == [0] * count, "\n".join(said)[-3000:]
    group["recovery"] = max(group["recovery"], time.monotonic() - begun)


CHOSEN = [(2, "features", 1), (2, "cache", 0), (2, "even", 0), (3, "even", 1)]
EVERY = [(count, name, rank) for count in COUNTS for name in ("features", "cache", "even") for rank in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "name", "rank"), EVERY if LONG else CHOSEN)
def test_a_dead_process_ends_the_job_which_then_goes_on(start, setting, done, tally, count, name, rank):
    """Training dies in its second epoch, so that what is skipped on resuming is of the order of that epoch."""
    with tally("dead rank") as group:
        folder, words = setting("dead")
        job = start(count, folder, one_script, *words, name, faults=[Fault("killed", rank, 8 if name in RUNS else 4)])
        job[rank].join(MINUTE)
        codes, said = ended(job, folder, 30)
        assert codes == [-signal.SIGKILL if k == rank else 2 for k in range(count)], said
        for other in set(range(count)) - {rank}:
            message = said[other].splitlines()[-1]
            assert message.startswith(f"error: process {other} of {count}: {GONE}")
            assert message.endswith("run the same command again to go on")
            assert "Traceback" not in said[other]
        assert not finished(name, folder)
        started_again(start, count, folder, (*words, name), group)
        unharmed(name, done, count, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "name"), [(k, n) for k in COUNTS for n in ("features", "even")][:: 1 if LONG else 3])
def test_a_process_that_meets_bad_input_ends_the_job_with_its_message(
    start, setting, done, tally, base, world, tmp_path, count, name
):
    with tally("bad input on one rank") as group:
        spoiled = tmp_path / "world"
        shutil.copytree(world, spoiled)
        record = flickr.load_split(spoiled, "train" if name in RUNS else "val", boxes=False)[3]  # of the second shard
        picture = spoiled / Path(record.image_path).relative_to(spoiled)
        content = picture.read_bytes()
        picture.write_bytes(content[:20])
        folder, _ = setting("spoiled")
        words = (str(base), str(spoiled), folder, name)
        codes, said = ended(start(count, folder, one_script, *words), folder, 30)
        assert codes == [2] * count
        assert sum(picture.name in each for each in said) >= 1
        assert all(picture.name in each or GONE in each for each in said), said
        assert "Traceback" not in "".join(said)
        if name not in RUNS:
            assert [picture.name in each for each in said] == [k == 1 for k in range(count)]
        picture.write_bytes(content)
        started_again(start, count, folder, words, group)
        unharmed(name, done, count, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "name"),
    [(k, n) for k in COUNTS for n in ("even", "features", "cache")] if LONG else [(2, "features"), (3, "even")],
)
def test_told_to_stop_all_processes_stop_and_go_on_later(start, setting, done, tally, count, name):
    """The signal reaches the processes at different steps; in training they stop after the same one all the same."""
    with tally("SIGTERM") as group:
        folder, words = setting("stopped")
        faults = [Fault("stopped", rank, 6 + count - rank if name in RUNS else 1) for rank in range(count)]
        codes, said = ended(start(count, folder, one_script, *words, name, faults=faults), folder, MINUTE)
        assert codes == [143] * count, said
        assert "Traceback" not in "".join(said)
        assert not finished(name, folder)
        if name in RUNS:
            steps = {int(path.name.partition("-")[2]) for path in (folder / name).glob("checkpoint-*")}
            assert 7 in steps  # where the last process got the signal first; of itself every second step has one
        started_again(start, count, folder, (*words, name), group)
        unharmed(name, done, count, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cache", "features", "even"][: None if LONG else 1])
def test_a_second_job_on_the_same_folder_is_refused(start, setting, done, tally, name, tmp_path):
    with tally("two jobs on one folder"):
        folder, words = setting("shared")
        release = tmp_path / "go"
        first = start(2, folder, one_script, *words, name, faults=[Fault("held", 1, 2, release)])
        wait_for(release.with_suffix(".held").exists)
        second = folder / "second"
        codes, said = ended(start(2, second, one_script, *words, name), second, 30)
        release.touch()
        assert codes == [2, 2], said
        assert "another process is writing to it" in said[0]
        assert "Traceback" not in "".join(said)
        codes, said = ended(first, folder)
        assert codes == [0, 0], said
        unharmed(name, done, 2, folder)


def wait_for(condition, seconds=MINUTE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing after {seconds} s"
        time.sleep(0.02)


# --- through bash/train.sh and torchrun -----------------------------------------------------------------------------

SLOWLY = ["train.num_train_epochs=8", "data.eval_split="]  # 40 steps: time enough for a signal to come in between


@contextmanager
def train_sh(base, world, folder):
    """bash/train.sh with two processes, as a user starts it; what it says goes to lines.txt."""
    words = [*training_words(base, world, folder, "even", 2), *SLOWLY]
    values = {"DATA_ROOT": str(world), "CONFIG": str(folder / "config.yaml"), "NPROC_PER_NODE": "2", **ENVIRONMENT}
    values["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with open(folder / "lines.txt", "w") as lines:
        settings = {"cwd": ROOT, "env": {**os.environ, **values}, "stdout": lines, "stderr": lines}
        job = subprocess.Popen(["bash", "bash/train.sh", *words], **settings)
    try:
        yield job
    finally:
        for pid in [*descendants(job.pid), job.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait()


def descendants(pid):
    """Ids of the processes below `pid`: of torchrun, then of its workers."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [each for child in children for each in descendants(child)]


def steps_done(folder):
    numbers = re.findall(r"^step (\d+)/", (folder / "lines.txt").read_text(), re.MULTILINE)
    return int(numbers[-1]) if numbers else 0


@pytest.mark.slow
def test_train_sh_is_stopped_loses_a_worker_and_goes_on(start, setting, tally, base, world):
    with tally("torchrun") as group:
        expected, words = setting("undisturbed")
        codes, said = ended(start(2, expected, one_script, *words, "even", SLOWLY), expected)
        assert codes == [0, 0], said
        folder, _ = setting("torchrun")

        with train_sh(base, world, folder) as job:  # SIGTERM: bash hands it to torchrun, torchrun to the workers
            wait_for(lambda: steps_done(folder) >= 5)
            job.send_signal(signal.SIGTERM)
            assert job.wait(MINUTE) == 143
        stopped = steps_done(folder)
        assert 5 <= stopped < 40
        assert (folder / f"even/checkpoint-{stopped}/state.json").is_file()
        assert not (folder / "even/history.json").exists()

        with train_sh(base, world, folder) as job:
            wait_for(lambda: steps_done(folder) >= stopped + 5)
            workers = descendants(job.pid)[1:]
            assert len(workers) == 2
            os.kill(workers[1], signal.SIGKILL)
            assert job.wait(MINUTE) not in (0, 143)
            said = (folder / "lines.txt").read_text()
            assert f"resuming from {folder}/even/checkpoint-{stopped}" in said
            assert not any(map(alive, workers))

        begun = time.monotonic()
        with train_sh(base, world, folder) as job:
            assert job.wait(2 * MINUTE) == 0
        group["recovery"] = time.monotonic() - begun
        assert re.search(rf"resuming from {folder}/even/checkpoint-\d+\n", (folder / "lines.txt").read_text())
        ours, undisturbed = (files_of(place / "even")["projector.safetensors"] for place in (folder, expected))
        assert ours == undisturbed


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
