"""Searching, adding, deleting and compacting, over and over, on one index: memory stays, answers don't drift.

SAMER_FAULT_MINUTES: how long; unset, 12 rounds. SAMER_FAULT_LOG: a file that gets one JSON line: counts, and what the
process held in the second and in the last quarter of its rounds.
"""

import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from samer.config import MergeConfig
from samer.data import flickr
from samer.data.pictures import Found
from samer.index import pictures as index_pictures
from samer.index.pictures import FOLDER_SPLIT, compact_images, delete_images
from samer.index.read import Index
from samer.index.sync import update_images
from samer.retrievers.hf import Retriever
from samer.world.write import write_world

ROOT = Path(__file__).resolve().parents[2]
MINUTES = float(os.environ.get("SAMER_FAULT_MINUTES") or 0)
ROUNDS = 12  # at least, and all of the short form, however long they take
MERGE = MergeConfig(num_regions=16, center_init="farthest")
FEWEST = 16  # pictures that stay
COMPACTED_EVERY = 40 if MINUTES else 5  # rounds: by 40 there are dozens of small shards
REBUILT_EVERY = 100
QUERIES = 8


def resources():
    """What this process holds: resident memory and the part of it that is no mapped file (MB), open files, maps."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    megabytes = lambda key: int(status[key].split()[0]) / 1024
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return megabytes("VmRSS"), megabytes("RssAnon"), len(os.listdir("/proc/self/fd")), sum(1 for _ in maps)


class Soak:
    """One index, what it should hold, and what happened to it."""

    def __init__(self, place, images, dtype, seed=0):
        self.place, self.folder, self.dtype, self.rng = Path(place), Path(place) / "index", dtype, random.Random(seed)
        world = self.place / "world"
        write_world(world, {"train": 4, "val": 4, "test": images})
        records = flickr.load_split(world, "test", boxes=False)
        self.root = records[0].image_path.parent
        self.names = [record.image_path.name for record in records]
        self.texts = [record.captions[0].text for record in records]
        self.retriever = Retriever.load(str(ROOT / "assets" / "retriever"))
        self.done, self.samples = Counter(compactions=0), []
        self.live = self.names[: images // 2]
        self.add(self.folder, self.live)

    def add(self, folder, names):
        # one at a time through the model: then a picture's vectors do not depend on its neighbours, and bytes compare
        found, how = Found(self.root, names, []), {"batch_size": 1, "dtype": self.dtype, "assignments": False}
        update_images(folder, found, self.retriever, MERGE, **how)

    def round(self):
        """Adds some, deletes some, searches; what the index holds is checked by every search."""
        away = [name for name in self.names if name not in set(self.live)]
        more = self.rng.sample(away, min(len(away), self.rng.randint(1, 6)))
        self.add(self.folder, more)
        self.live += more
        gone = self.rng.sample(self.live, self.rng.randint(1, 6) if len(self.live) > FEWEST else 0)
        delete_images(self.folder, FOLDER_SPLIT, gone)
        self.live = [name for name in self.live if name not in set(gone)]
        self.done.update(rounds=1, added=len(more), deleted=len(gone))
        if self.done["rounds"] % COMPACTED_EVERY == 0:
            compact_images(self.folder, FOLDER_SPLIT)
            self.done["compactions"] += 1
        cache, queries = Index(self.folder), self.queries(self.rng.sample(self.texts, QUERIES))
        found = cache.search(queries, FOLDER_SPLIT, len(self.live) + 5)
        wrong = sum(sorted(name for name, _ in hits) != sorted(self.live) for hits in found)
        self.done.update(searches=len(found), wrong=wrong)
        if self.done["rounds"] % REBUILT_EVERY == 0:
            self.compare()

    def queries(self, texts):
        with torch.no_grad():
            return self.retriever.encode_queries(self.retriever.query_inputs(texts))

    def compare(self):
        """Every text's whole ranking, with scores, against an index built anew; they must be equal to the bit."""
        with tempfile.TemporaryDirectory(dir=self.place) as fresh:
            self.add(fresh, self.live)
            queries = self.queries(self.texts)
            ours, theirs = (Index(f).search(queries, FOLDER_SPLIT, len(self.names)) for f in (self.folder, fresh))
        self.done.update(compared=len(ours), different=sum(a != b for a, b in zip(ours, theirs)))

    def run(self):
        """Rounds for so long, at least the fewest; returns the summary."""
        started = time.monotonic()
        while self.done["rounds"] < ROUNDS or time.monotonic() - started < 60 * MINUTES:
            self.round()
            self.samples.append(resources())
        self.compare()
        return self.summary(time.monotonic() - started)

    def summary(self, seconds):
        """Counts, and each resource's median over the second and over the last quarter of its rounds."""
        quarter = len(self.samples) // 4
        middle, last = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        median = lambda rows, k: round(statistics.median(row[k] for row in rows), 1)
        names = ("resident_mb", "own_mb", "files", "maps")
        grown = {name: [median(middle, k), median(last, k)] for k, name in enumerate(names)}
        return {"seconds": round(seconds), **self.done, **grown}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8"])
def test_an_index_in_use_stays_as_it_is(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(index_pictures, "PICTURES_PER_SHARD", 64)
    found = Soak(tmp_path, 200, dtype).run()
    if log := os.environ.get("SAMER_FAULT_LOG"):
        with open(log, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"group": "soak", **found}) + "\n")
    assert (found["wrong"], found["different"]) == (0, 0)
    assert found["compared"] >= 200
    if not MINUTES:
        assert (found["rounds"], found["compactions"], found["searches"]) == (12, 2, 12 * QUERIES)
    assert found["files"][1] <= found["files"][0]
    assert found["own_mb"][1] <= 1.05 * found["own_mb"][0] + 20
