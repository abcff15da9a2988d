"""The frame of scripts/bench.py: tables as text, JSON and markdown, a quiet machine, engines in other processes."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from test_index import Drawn, paint

from samer.config import InputError, MergeConfig
from samer.data.pictures import Found
from samer.index.sync import update_images
from samer.scoring import maxsim

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(script):
    return script("bench")


def written(folder):
    return json.loads((folder / "t.json").read_text()), (folder / "t.md").read_text()


def files(folder):
    return ["--json", str(folder / "t.json"), "--markdown", str(folder / "t.md")]


def test_a_table_is_written_as_it_is_printed(bench, tmp_path, capsys, monkeypatch):
    rows = [{"": "one", "ms": 1234.5, "share": 0.12345, "n": 7}, {"": "other", "ms": 0.5, "share": None, "n": 12000}]
    monkeypatch.setattr(bench, "quality", lambda runs: [bench.Table("a name", rows, ["a note"])])
    monkeypatch.setattr(os, "getloadavg", lambda: (0.2, 1.0, 1.0))
    bench.main(["quality", "--runs", "1", *files(tmp_path)])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines == [
        "a name",
        "            ms  share       n",
        "  one    1,234  0.123       7",
        "  other    0.5         12,000",
        "a note",
    ]
    found, page = written(tmp_path)
    assert found["tables"] == [{"name": "a name", "rows": rows, "notes": ["a note"]}]
    assert found["command"].startswith("python scripts/bench.py quality --runs 1")
    assert (found["quiet"], found["load"]) == (True, 0.2)
    facts = found["machine"]
    assert (facts["cores"], facts["threads"]) == (os.cpu_count(), torch.get_num_threads())
    assert (facts["torch"], bool(facts["cpu"]), bool(facts["revision"])) == (torch.__version__, True, True)
    assert "| other | 0.5 |  | 12,000 |" in page
    assert "| --- | ---: | ---: | ---: |" in page
    assert page.rstrip().endswith(", quiet.")


@pytest.mark.parametrize(("loads", "quiet", "slept"), [([0.9, 0.9, 0.9, 0.7, 0.4], True, 2), ([0.9], False, 4)])
def test_it_waits_for_a_quiet_machine_or_says_that_it_was_not(
    bench, tmp_path, capsys, monkeypatch, loads, quiet, slept
):
    now, asked = [0.0], iter(loads)
    latest = [loads[0]]

    def load():
        latest[0] = next(asked, latest[0])
        return latest[0], 0, 0

    naps = []
    monkeypatch.setattr(bench.os, "getloadavg", load)
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bench.time, "sleep", lambda seconds: (naps.append(seconds), now.__setitem__(0, now[0] + 2)))
    found = bench.await_quiet(7)
    assert found == (quiet, latest[0])
    assert len(naps) == slept
    said = capsys.readouterr().out
    assert "waiting for a quiet machine, 7 s at most" in said
    assert ("NOT QUIET" in said) is not quiet


def test_a_page_says_that_others_ran_beside(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "quality", lambda runs: [bench.Table("a", [{"": "b", "c": 1}])])
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 1.0, 1.0))
    bench.main(["quality", "--wait", "0", *files(tmp_path)])
    found, page = written(tmp_path)
    assert not found["quiet"]
    assert "NOT quiet (load 3.0)" in page


def test_another_checkout_scores_the_same_data(bench, tmp_path, monkeypatch):
    """Itself in its place: the same ten images of each query, and the float ones are the exact ones."""
    words = ["--images", "70", "--runs", "1", "--wait", "0", "--threads", "1", "--before", str(ROOT)]
    monkeypatch.setattr(bench, "medians", lambda runs, *functions: [each() is None or 1.0 for each in functions])
    bench.main(["maxsim", *words, *files(tmp_path)])
    table = written(tmp_path)[0]["tables"][0]
    rows = {row[""]: row for row in table["rows"]}
    assert rows["SaMer, float32"]["recall@10"] == rows["before: float32"]["recall@10"] == 1.0
    for kind in ("float16", "int8", "1-bit, before re-ranking"):
        assert rows[f"SaMer, {kind}"]["recall@10"] == rows[f"before: {kind}"]["recall@10"]
        assert rows[f"SaMer, {kind}"]["bytes an image"] == rows[f"before: {kind}"]["bytes an image"]
    assert rows["transformers, score_retrieval"]["recall@10"] == 1.0
    others = ("sentence-transformers, maxsim", "maxsim-cpu", "Qdrant, in process, exact", "LanceDB, exact")
    assert all(rows[name]["recall@10"] == 1.0 for name in others if name in rows)  # they are exact


def test_a_process_that_fails_is_told(bench, tmp_path):
    other = bench.Elsewhere(sys.executable, "def answer(name):\n    return {'a': [[1]]}[name]\n", tmp_path)
    assert other.ask("a") == [[1]]
    with pytest.raises(InputError, match="b failed; what it said stands above"):
        other.ask("b")
    with pytest.raises(InputError, match="it could not be started"):
        bench.Elsewhere(sys.executable, "raise SystemExit(1)\n", tmp_path)


def test_features_of_an_index_are_its_captions_and_images(bench, base, world, tmp_path):
    from samer.index.read import Index
    from samer.index.write import build_index
    from samer.retrievers.hf import Retriever

    build_index(tmp_path / "c", world, ["test"], Retriever.load(str(base)), MergeConfig(num_regions=6), dtype="int8")
    queries, images = bench.stored_features(tmp_path / "c", 5)
    index = Index(tmp_path / "c")
    scores = maxsim(queries.tokens, images, queries.mask)
    every = torch.stack([index.vectors("test", k).tokens for k in range(5)])
    assert torch.equal(images, every)
    assert torch.equal(scores, maxsim(queries.tokens, every, queries.mask))
    rows = [row for query, *_ in index.queries("test") for row in query.tokens]
    assert len(queries.tokens) == min(32, len(rows))
    paint(tmp_path / "pictures", ["a.png"])
    update_images(
        tmp_path / "p", Found(tmp_path / "pictures", ["a.png"], []), Drawn(), MergeConfig(num_regions=6), dtype="int8"
    )
    with pytest.raises(InputError, match="no split with captions"):
        bench.stored_features(tmp_path / "p", 5)


def test_both_ways_of_h_pool_are_measured(bench, monkeypatch):
    monkeypatch.setattr(bench, "medians", lambda runs, *functions: [each() is None or 1.0 for each in functions])
    *_, table = bench.merge(1)
    assert [row[""].strip() for row in table.rows][2:4] == [
        "H-Pool",
        "distances between the square matrix's rows (before)",
    ]
    assert table.notes == ["H-Pool is 1.0 times as fast as before, its partition the same."]
