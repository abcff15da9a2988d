"""An index on a GPU: how many bytes it holds there, what it copies again, what becomes of the rest.

A device is played by a function that copies within this machine and counts; what it counts is what is alive.
"""

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from samer.config import InputError, MergeConfig
from samer.data.pictures import find_pictures
from samer.index import pictures as index_pictures
from samer.index.pictures import compact_images, delete_images
from samer.index.read import Index
from samer.index.sync import update_images
from samer.index.uploads import Uploads
from samer.retrievers.hf import Retriever
from samer.search.models import Models
from samer.search.open_index import SearchIndex

CPU = torch.device("cpu")
MERGE = MergeConfig(num_regions=6)


class Device:
    """Copies tensors, and counts the bytes of those that are alive, and how often each content came."""

    def __init__(self):
        self.alive, self.most, self.copies = 0, 0, []
        self.lock = threading.Lock()

    def __call__(self, tensor, device):
        copy = tensor.clone()
        with self.lock:
            self.alive += copy.nbytes
            self.most = max(self.most, self.alive)
            self.copies.append(tensor.view(torch.uint8).numpy().tobytes())
        weakref.finalize(copy, self._free, copy.nbytes)
        return copy

    def _free(self, size):
        with self.lock:
            self.alive -= size


class User:
    """Somebody who scans shards."""


def shard(value, rows=10):
    return {"tokens": torch.full((rows, 4), value, dtype=torch.int8)}  # 4 bytes a row


def scan(uploads, user, shards):
    """One pass as a search makes it; the values that were seen."""
    uploads.use(user, {name: parts["tokens"].nbytes for name, parts in shards.items()})
    found = []
    for name, parts in shards.items():
        found.append(int(uploads.on(CPU, name, parts)["tokens"][0, 0]))
    return found


def test_a_cpu_reads_what_is_mapped():
    parts = shard(1)
    assert Uploads().on("cpu", "a", parts) is parts


def test_what_is_unchanged_is_copied_once_and_what_nobody_uses_is_dropped():
    device = Device()
    uploads, shards = Uploads(copy=device), {"a": shard(1), "b": shard(2)}
    first = User()
    assert scan(uploads, first, shards) == scan(uploads, first, shards) == [1, 2]
    second, now = User(), {"a": shards["a"], "c": shard(3)}
    assert scan(uploads, second, now) == [1, 3]
    assert (len(device.copies), device.alive) == (3, 120)  # both openings are there, and share one of the shards
    del first
    assert scan(uploads, second, now) == [1, 3]
    assert (len(device.copies), device.alive) == (3, 80)


@pytest.mark.parametrize("budget", [80, 100, 120, 159])
def test_a_budget_is_kept_by_streaming(budget):
    device, user = Device(), User()
    uploads, shards = Uploads(budget, device), {name: shard(k) for k, name in enumerate("abcd")}
    for _ in range(3):
        assert scan(uploads, user, shards) == [0, 1, 2, 3]
    assert device.most <= budget
    staying = (budget - 80) // 40
    assert device.alive == 40 * staying  # what was streamed is gone
    assert len(device.copies) == staying + 3 * (4 - staying)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or hidden without -m gpu")
@pytest.mark.parametrize("kept", [0, 2, 5])
def test_a_scan_on_a_gpu_takes_no_more_than_its_budget(kept):
    size, user = 2**26, User()
    shards = {name: {"tokens": torch.full((2**20, 64), k, dtype=torch.int8)} for k, name in enumerate("abcde")}
    budget = size * (kept if kept == len(shards) else kept + 2)
    uploads = Uploads(budget)
    uploads.use(user, dict.fromkeys(shards, size))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        for k, (name, parts) in enumerate(shards.items()):
            assert int(uploads.on("cuda", name, parts)["tokens"][-1, -1]) == k
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() - before == size * kept
    assert torch.cuda.max_memory_allocated() - before <= budget
    del user
    uploads.on("cuda", "another", {"tokens": torch.zeros(4, 4, dtype=torch.int8)})
    assert torch.cuda.memory_allocated() - before < 2**20


def test_what_is_there_stays_when_others_come_before_it():
    device, first, second = Device(), User(), User()
    uploads = Uploads(120, device)
    old = {"a": shard(1), "b": shard(2)}
    scan(uploads, first, old)
    del first
    now = {"c": shard(3), "b": shard(2), "d": shard(4), "e": shard(5)}
    scan(uploads, second, now)
    scan(uploads, second, now)
    assert device.alive == 40
    assert sum(torch.full((10, 4), 2, dtype=torch.int8).numpy().tobytes() == each for each in device.copies) == 1


def test_a_budget_that_is_too_small_is_refused():
    uploads = Uploads(79, Device())
    with pytest.raises(InputError, match=r"two shards of this index take 8e-08 GB on cpu.*raise --gpu-memory"):
        scan(uploads, User(), {name: shard(1) for name in "abc"})
    assert scan(uploads, User(), {"a": shard(1)}) == [1]  # all of it fits


def test_threads_that_reload_and_scan_lose_nothing():
    device, errors = Device(), []
    uploads, shards = Uploads(copy=device), {name: shard(k) for k, name in enumerate("abcdef")}

    def work(start):
        try:
            for turn in range(40):
                own = dict(list(shards.items())[(start + turn) % 4 :])
                expected = [int(parts["tokens"][0, 0]) for parts in own.values()]
                assert scan(uploads, User(), own) == expected
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    gc.collect()
    scan(uploads, User(), {"a": shards["a"]})
    assert device.alive == 40


# --- the server -----------------------------------------------------------------------------------------------------


def paint(folder, names):
    folder.mkdir(exist_ok=True)
    for name in names:
        pixels = np.random.default_rng(int(name[1:3])).integers(0, 255, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(index_pictures, "PICTURES_PER_SHARD", 4)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "binary"])
@pytest.mark.parametrize("share", [None, 1.0, 0.7])
def test_a_server_that_sees_commits_stays_within_its_budget(base, tmp_path, small_shards, dtype, share):
    """Pictures are added, deleted and compacted while it serves; answers are those of an index without a device."""
    retriever, folder, album = Retriever.load(str(base)), tmp_path / "c", tmp_path / "album"

    def commit(names):
        paint(album, names)
        update_images(folder, find_pictures(album), retriever, MERGE, dtype=dtype, batch_size=4)

    commit([f"p{k:02}.png" for k in range(20)])
    sizes = [shard.bytes + 4 * shard.count for shard in Index(folder).manifest.splits["images"].images]
    device, budget = Device(), None if share is None else int(share * sum(sizes))
    uploads = Uploads(budget, device)
    index = SearchIndex(folder, Models("cpu", uploads=uploads))
    steps = [
        lambda: None,
        lambda: commit(["p20.png", "p21.png", "p22.png"]),
        lambda: commit(["p23.png", "p24.png"]),
        lambda: delete_images(folder, "images", ["p01.png", "p20.png"]),
        lambda: compact_images(folder, "images"),
        lambda: commit(["p25.png"]),
    ]
    seen = set()
    for step in steps:
        step()
        index = index.now()
        shards = Index(folder).manifest.splits["images"].images
        known = {shard.sha256 for shard in shards} <= seen
        for text in ("a small red car beside a dog", "noise"):
            before = len(device.copies)
            found = index.search(text, 5)
            assert found.hits == Index(folder).search(found.query, "images", 5)[0]
            if share is None and known:
                assert len(device.copies) == before
            known = True
        seen |= {shard.sha256 for shard in shards}
        total = sum(shard.bytes + 4 * shard.count for shard in shards)
        assert device.alive <= (total if budget is None else budget)  # nothing of what was replaced
    if budget is not None:
        assert device.most <= budget
    else:  # each shard's content came once, whatever was opened anew
        assert len(device.copies) == len(set(device.copies))


def test_the_budget_of_a_gpu_is_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (150, 1000))
    uploads, user = Uploads(copy=lambda tensor, device: tensor.clone()), User()
    uploads.use(user, dict.fromkeys("abcd", 40))
    for name in "abcd":
        uploads.on("cuda", name, shard(1))
    assert uploads.budget == 120
    assert len(uploads._held) == 1


@pytest.mark.parametrize("name", ["serve", "search", "eval"])
def test_a_budget_that_is_no_number_of_gigabytes_is_refused(script, tmp_path, name):
    words = {"serve": [], "search": ["a"], "eval": ["--output-json", str(tmp_path / "m.json")]}[name]
    for value in ("0", "-1", "nan", "inf"):
        with pytest.raises(InputError, match=r"--gpu-memory is .*; it must be a number of GB above 0"):
            script(name).main([*words, "--cache-dir", str(tmp_path), f"--gpu-memory={value}"])
