"""Exporting: what a store then holds, found again by each engine's own search; kills, deletions, refusals."""

import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_index import DIM, NAMES, add, compressed, paint

from samer.config import InputError
from samer.export import run as export_run
from samer.export.run import export, facts_of, open_store, query_side, verify
from samer.index import pictures as index_pictures
from samer.index.columns import write_columns
from samer.index.names import point_id
from samer.index.pictures import delete_images
from samer.index.read import Index

ROOT = Path(__file__).resolve().parents[1]
# the command, whose process is killed when the second image of the second shard is to be written
DYING = """
import os, signal, sys
sys.path.insert(0, {root!r})
from samer.export import run
from scripts import export

run.BATCH_BYTES = 1
batches, shards = run._batches, []


def dying(*words):
    shards.append(words)
    for number, batch in enumerate(batches(*words)):
        if len(shards) == 2 and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


run._batches = dying
export.main(sys.argv[1:])
"""
LOCAL = {"qdrant": "qdrant_client", "lancedb": "lancedb", "parquet": "duckdb"}


def store_at(kind, folder, index, dtype="float32", coarse=0, collection="samer"):
    pytest.importorskip(LOCAL[kind])
    place = folder / kind
    return open_store(kind, str(place), collection, facts_of(index, "images", dtype, coarse))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return paint(tmp_path_factory.mktemp("exported"), NAMES)


@pytest.fixture
def index(pictures, tmp_path, monkeypatch):
    """12 pictures in shards of 4, in float32."""
    monkeypatch.setattr(index_pictures, "PICTURES_PER_SHARD", 4)
    add(tmp_path / "index", pictures, dtype="float32")
    return Index(tmp_path / "index")


def naive(query, images):
    """Scores of images {name: (k, D)} by loops, best first."""
    found = {}
    for name, vectors in images.items():
        best = [max(float(np.dot(token, vector)) for vector in vectors) for token in query]
        found[name] = sum(best) / len(best)
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))


@pytest.mark.parametrize("kind", LOCAL)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_store_finds_what_loops_over_the_images_find(kind, dtype, index, pictures, tmp_path):
    store = store_at(kind, tmp_path, index, dtype)
    done = export(index, "images", store, tmp_path / "cursor.json")
    assert (done.images, done.written, done.kept) == (12, 3, 0)
    truth = dict(zip(NAMES, compressed(pictures, NAMES).numpy().astype(dtype).astype("float32")))
    query = torch.nn.functional.normalize(torch.randn(3, DIM, generator=torch.manual_seed(5)), dim=-1).numpy()
    wanted, found = naive(query, truth)[:5], store.search(query, 5)
    assert [name for name, _ in found] == [name for name, _ in wanted]
    near = 1e-5 if dtype == "float32" or kind != "lancedb" else 1e-3  # its cosine divides by the rounded rows' lengths
    assert [score for _, score in found] == pytest.approx([score for _, score in wanted], abs=near)
    agreed = verify(index, "images", store, 200)
    assert (agreed.queries, agreed.overlap) == (12, 1.0)
    assert agreed.difference < near
    store.close()


@pytest.mark.parametrize("kind", LOCAL)
@pytest.mark.parametrize("dtype", ["int8", "binary", "bfloat16"])
def test_small_dtypes_are_written_out_as_numbers(kind, dtype, pictures, tmp_path):
    add(tmp_path / "small", pictures, dtype=dtype)
    index = Index(tmp_path / "small")
    store = store_at(kind, tmp_path, index)
    export(index, "images", store, tmp_path / "cursor.json")
    one = index.vectors("images", index.numbers("images")["p3.png"])
    unit = torch.nn.functional.normalize(one.tokens[one.mask], dim=-1).numpy()
    name, score = store.search(unit, 1)[0]
    lengths = 1 if kind == "lancedb" else float(one.tokens[one.mask].norm(dim=-1).mean())
    assert name == "p3.png"
    assert score == pytest.approx(lengths, abs=1e-3)
    store.close()


@pytest.mark.parametrize("kind", LOCAL)
def test_a_killed_export_goes_on_and_writes_nothing_twice(kind, index, tmp_path, command):
    pytest.importorskip(LOCAL[kind])
    script, cursor, place = tmp_path / "dying.py", tmp_path / "cursor.json", tmp_path / kind
    script.write_text(DYING.format(root=str(ROOT)))
    words = ["--cache-dir", index.folder, "--to", kind, "--place", place, "--cursor", cursor, "--dtype", "float32"]
    killed = command(sys.executable, script, *words)
    assert killed.returncode == -signal.SIGKILL
    assert len(json.loads(cursor.read_text())["done"]) == 1  # and one image of the second shard is there
    store = store_at(kind, tmp_path, index)
    done = export(index, "images", store, cursor)
    assert (done.images, done.written, done.kept) == (12, 2, 1)
    assert sorted(name for name, _ in store.search(np.eye(DIM, dtype="float32")[:2], 50)) == sorted(NAMES)
    third = export(index, "images", store, cursor)
    assert (third.images, third.written, third.kept) == (12, 0, 3)
    cursor.unlink()
    assert export(index, "images", store, cursor).images == 12  # all of it written once more, nothing twice
    store.close()


@pytest.mark.parametrize("kind", LOCAL)
def test_deleted_and_changed_images_follow(kind, index, pictures, tmp_path, monkeypatch):
    root = shutil.copytree(pictures, tmp_path / "root")
    monkeypatch.setattr(index_pictures, "PICTURES_PER_SHARD", 4)
    add(tmp_path / "own", root, dtype="float32")
    own, cursor = Index(tmp_path / "own"), tmp_path / "cursor.json"
    store = store_at(kind, tmp_path, own)
    export(own, "images", store, cursor)
    delete_images(tmp_path / "own", "images", ["p1.png", "sub/a.png"])
    done = export(Index(tmp_path / "own"), "images", store, cursor)
    assert (done.images, done.written) == (10, 2)
    found = {name for name, _ in store.search(np.eye(DIM, dtype="float32")[:2], 50)}
    assert found == set(NAMES) - {"p1.png", "sub/a.png"}
    write_columns(tmp_path / "own", "images", {"p2.png": {"language": "Català", "page": 3}})
    done = export(Index(tmp_path / "own"), "images", store, cursor)
    assert (done.images, done.written) == (10, 1)  # the shard whose image has other metadata now
    told = metadata_in(store)
    assert told.pop("p2.png") == {"language": "Català", "page": 3}
    assert list(told.values()) == [{}] * 9
    store.close()


def metadata_in(store):
    """Metadata by id, as a store of ours holds it."""
    if store.name == "qdrant":
        points, _ = store._client.scroll("samer", limit=100)
        return {point.payload["id"]: point.payload["metadata"] for point in points}
    if store.name == "lancedb":
        table = store._table.to_arrow()
    else:
        import pyarrow.parquet as pq

        table = pq.read_table(store.place)
    return {name: json.loads(words) for name, words in zip(table["id"].to_pylist(), table["metadata"].to_pylist())}


@pytest.mark.parametrize("kind", LOCAL)
def test_a_collection_of_another_kind_is_refused_and_left_alone(kind, index, tmp_path):
    store = store_at(kind, tmp_path, index)
    export(index, "images", store, tmp_path / "cursor.json")
    store.close()
    with pytest.raises(InputError, match="name another --collection"):
        store_at(kind, tmp_path, index, dtype="float16")
    again = store_at(kind, tmp_path, index)
    assert len(again.search(np.eye(DIM, dtype="float32")[:2], 50)) == 12
    again.close()


def test_a_cursor_of_another_export_is_refused(index, tmp_path):
    store = store_at("parquet", tmp_path, index)
    export(index, "images", store, tmp_path / "cursor.json")
    other = store_at("parquet", tmp_path / "b", index)
    with pytest.raises(InputError, match="cursor of another export"):
        export(index, "images", other, tmp_path / "cursor.json")
    assert not (tmp_path / "b").exists()


def test_parquet_files_are_what_compress_reads(index, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    export(index, "images", store_at("parquet", tmp_path, index), tmp_path / "cursor.json")
    rows = [row for path in sorted((tmp_path / "parquet").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [row["id"] for row in rows] == list(index.numbers("images"))
    for row in rows:
        one = index.vectors("images", index.numbers("images")[row["id"]])
        assert np.array_equal(np.array(row["embedding"], "float32"), one.tokens[one.mask].numpy())
        assert (row["rows"], row["columns"]) == one.grid
        assert row["path"].endswith("/" + row["id"])
    words = pq.read_schema(next((tmp_path / "parquet").iterdir())).metadata
    assert words[b"projector"].decode() == index.manifest.projector


def test_qdrant_has_a_first_stage_and_ids_that_stay(index, tmp_path):
    store = store_at("qdrant", tmp_path, index, coarse=2)
    export(index, "images", store, tmp_path / "cursor.json")
    (point,) = store._client.retrieve("samer", [point_id("p2.png")], with_vectors=True)
    assert point.payload["id"] == "p2.png"
    assert point.payload["projector"] == index.manifest.projector
    assert np.array(point.vector["coarse"]).shape == (2, DIM)
    scope = {"query": np.eye(DIM, dtype="float32")[:2]}
    wanted = store.search(scope["query"], 10)
    store.close()
    code = store.query_code().replace("print(", "answer = (")
    exec(code, scope)
    assert [name for name, _ in scope["answer"]] == [name for name, _ in wanted]


@pytest.mark.parametrize("kind", ["lancedb", "parquet"])
def test_stores_without_a_first_stage_say_so(kind, index, tmp_path):
    with pytest.raises(InputError, match="no first stage"):
        store_at(kind, tmp_path, index, coarse=2)


@pytest.mark.parametrize("kind", LOCAL)
def test_the_query_side_runs(kind, index, tmp_path, capsys):
    store = store_at(kind, tmp_path, index)
    export(index, "images", store, tmp_path / "cursor.json")
    query = np.eye(DIM, dtype="float32")[:2]
    best = store.search(query, 1)[0][0]
    store.close()
    exec(store.query_code(), {"query": query})
    assert best in capsys.readouterr().out
    compile(query_side(store, tmp_path), "query", "exec")


def test_collections_of_one_folder_know_their_own_files(index, pictures, tmp_path):
    add(tmp_path / "few", pictures, names=NAMES[:3], dtype="float32")
    few = Index(tmp_path / "few")
    export(few, "images", store_at("parquet", tmp_path, few, collection="samer_few"), tmp_path / "few.json")
    for _ in range(2):  # the second time with a cursor, which lets it remove what is its own
        export(index, "images", store_at("parquet", tmp_path, index), tmp_path / "cursor.json")
    query = np.eye(DIM, dtype="float32")[:2]
    assert len(store_at("parquet", tmp_path, index).search(query, 50)) == 12
    assert len(store_at("parquet", tmp_path, few, collection="samer_few").search(query, 50)) == 3
    for name in ("samer-few", "a/b", "*", ""):
        with pytest.raises(InputError, match="use letters, digits and _"):
            store_at("parquet", tmp_path, index, collection=name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_request_to_qdrant_is_as_large_as_batches_are_said_to_be(dtype, index, tmp_path, monkeypatch):
    limit = 2 * (index.manifest.merge.num_regions + 2) * DIM * 21  # two images'
    monkeypatch.setattr(export_run, "BATCH_BYTES", limit)
    store, sent = store_at("qdrant", tmp_path, index, dtype, coarse=2), []
    monkeypatch.setattr(type(store), "put", lambda self, batch: sent.append(batch))
    shard = index.manifest.splits["images"].images[0]
    store.write("part", export_run._batches(index, "images", shard, store, {}))
    assert list(map(len, sent)) == [2, 2]
    numbers = [[point.vectors.tolist() + point.coarse.tolist() for point in batch] for batch in sent]
    assert all(limit / 3 < len(json.dumps(each)) < limit * 1.1 for each in numbers)
    store.close()


def test_a_server_that_is_down_is_one_line(index):
    pytest.importorskip("qdrant_client")
    with pytest.raises(InputError, match=r"http://127.0.0.1:9: the store does not take that .*run the same again"):
        open_store("qdrant", "http://127.0.0.1:9", "samer", facts_of(index, "images", "float32"))


def test_the_command_exports_and_verifies(index, tmp_path, command):
    pytest.importorskip("duckdb")
    words = ["--to", "parquet", "--place", tmp_path / "out", "--verify", "7"]
    done = command(sys.executable, "scripts/export.py", "--cache-dir", index.folder, *words)
    assert done.returncode == 0, done.stderr
    assert "12 images" in done.stdout
    assert "7 queries (vectors of the index's own images): overlap@10 1.0000" in done.stdout
    assert json.loads((index.folder / "export-parquet-samer.json").read_text())["store"] == "parquet"


@pytest.mark.parametrize("kind", LOCAL)
def test_what_somebody_else_put_there_is_left_alone(kind, index, pictures, tmp_path):
    add(tmp_path / "few", pictures, names=NAMES[:3], dtype="float32")
    few, store = Index(tmp_path / "few"), store_at(kind, tmp_path, index)
    export(index, "images", store, tmp_path / "cursor.json")
    with pytest.raises(InputError, match="holds what this index does not"):
        export(few, "images", store, tmp_path / "other.json")
    assert len(store.search(np.eye(DIM, dtype="float32")[:2], 50)) == 12
    assert not (tmp_path / "other.json").exists()
    store.close()
