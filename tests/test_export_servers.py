"""Stores that are servers: PostgreSQL really runs (pgserver's, with the operator of VectorChord written in SQL).

Vespa and Weaviate are spoken to as their documentation says: a small server here records every request and answers as
they would, from what it was sent. Milvus' client is stood in for: its local edition knows no arrays of structs.
"""

import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from samer.config import InputError
from samer.export.base import Facts, Point
from samer.export.run import open_store
from samer.index.names import point_id

DIM = 8
OPERATOR = """
create extension vector;
create function best_of(a vector[], q vector[]) returns float language sql immutable as
  'select sum(near) from (select (select min(v <#> t) from unnest(a) v) as near from unnest(q) t) s';
create operator @# (leftarg = vector[], rightarg = vector[], function = best_of)
"""


def facts(dim=DIM, dtype="float32", coarse=0):
    return Facts("some/model", "main", "abc", {"query_prefix": "Query: "}, dim, dtype, "/pictures", coarse)


def drawn(count, seed=0, dtype="float32"):
    """Points of 2 to 4 unit vectors each."""
    generator, points = np.random.default_rng(seed), []
    for number in range(count):
        rows = generator.standard_normal((2 + number % 3, DIM))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)
        points.append(Point(f"sub/it's {number}.jpg", f"/pictures/{number}", (2, 3), rows, rows[:1]))
    return points


def ranked(query, points):
    """Ids and scores by loops, best first."""
    scores = [np.mean([max(token @ row for row in point.vectors) for token in query]) for point in points]
    return sorted(((point.id, float(score)) for point, score in zip(points, scores)), key=lambda pair: -pair[1])


def check_database(store, points, query):
    """Writes, writes again, searches, deletes: what every database must do."""
    store.put(points)
    store.put(points)
    assert sorted(store.ids()) == sorted(point.id for point in points)
    wanted, found = ranked(query, points)[:5], store.search(query, 5)
    assert [name for name, _ in found] == [name for name, _ in wanted]
    assert [score for _, score in found] == pytest.approx([score for _, score in wanted], abs=1e-5)
    live = {point.id for point in points[2:]}
    assert store.settle(set(), live) == len(points) - 2
    assert set(store.ids()) == live


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The URI of a PostgreSQL of its own."""
    pgserver = pytest.importorskip("pgserver")
    psycopg = pytest.importorskip("psycopg")
    try:
        server = pgserver.get_server(str(tmp_path_factory.mktemp("postgres")))
    except (subprocess.SubprocessError, OSError) as error:  # it wants a user of its own where this one is root
        pytest.skip(f"PostgreSQL does not start here: {str(error)[:200]}")
    with psycopg.connect(server.get_uri(), autocommit=True) as base:
        base.execute(OPERATOR)
    yield server.get_uri()
    server.cleanup()


def test_postgres_holds_and_finds(postgres, capsys):
    store, points = open_store("vectorchord", postgres, "pages", facts()), drawn(30)
    query = points[7].vectors + 0.1
    check_database(store, points, query)
    exec(store.query_code(), {"query": query})
    assert capsys.readouterr().out.startswith(ranked(query, points[2:])[0][0])
    store.close()
    with pytest.raises(InputError, match=r"no column vectors vector\(4\)\[\]; name another"):
        open_store("vectorchord", postgres, "pages", facts(dim=4))


def test_postgres_writes_a_batch_whole_or_not_at_all(postgres):
    store, points = open_store("vectorchord", postgres, "whole", facts()), drawn(3)
    bad = Point("bad", "", (0, 0), np.zeros((1, DIM + 1), "float32"))
    with pytest.raises(InputError, match="expected 8 dimensions, not 9"):
        store.put([*points, bad])
    assert list(store.ids()) == []
    store.close()


@pytest.mark.parametrize("name", ['a"; drop table x; --', "", "1a", "a b"])
def test_a_tables_name_is_no_sql(name):
    pytest.importorskip("psycopg")
    with pytest.raises(InputError, match="no table's name"):
        open_store("vectorchord", "postgresql://nobody@127.0.0.1:9/x", name, facts())


class Recorder(BaseHTTPRequestHandler):
    """Keeps requests and hands them to the server's `answer(method, path, value)`, which gives (status, JSON)."""

    def handle_any(self):
        size = int(self.headers.get("Content-Length") or 0)
        value = json.loads(self.rfile.read(size)) if size else None
        self.server.requests.append((self.command, self.path, value))
        self.server.keys.add(self.headers.get("Authorization"))
        status, answer = self.server.answer(self.command, self.path, value)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = handle_any

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    served = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    served.requests, served.held, served.classes, served.keys = [], {}, [], set()
    served.url = f"http://127.0.0.1:{served.server_address[1]}"
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def total(query, vectors):
    return float(sum(max(np.dot(token, row) for row in vectors) for token in query))


def vespa(server):
    """Answers as /document/v1 and /search/ do."""

    def answer(method, path, value):
        key = path.partition("?")[0].rpartition("/")[2]
        if path.startswith("/search/"):
            query = [value["input.query(q)"][str(row)] for row in range(len(value["input.query(q)"]))]
            found = [(total(query, each["vectors"].values()), each["id"]) for each in server.held.values()]
            best = sorted(found, reverse=True)[: value["hits"]]
            return 200, {"root": {"children": [{"relevance": score, "fields": {"id": name}} for score, name in best]}}
        if method == "POST":
            server.held[key] = value["fields"]
        elif method == "DELETE":
            del server.held[key]
        else:  # two to a page
            start = int(path.partition("&continuation=")[2] or 0)
            rows = list(server.held.values())
            page = {"documents": [{"fields": {"id": each["id"]}} for each in rows[start : start + 2]]}
            return 200, page | ({"continuation": str(start + 2)} if start + 2 < len(rows) else {})
        return 200, {}

    return answer


def weaviate(server):
    """Answers as /v1 does."""

    def answer(method, path, value):
        if path == "/v1/schema":
            server.classes += [value] if method == "POST" else []
            return 200, {"classes": server.classes}
        if path == "/v1/batch/objects":
            server.held |= {each["id"]: each for each in value["objects"]}
            return 200, [{**each, "result": {"status": "SUCCESS"}} for each in value["objects"]]
        if path == "/v1/graphql":
            words = value["query"]
            query = json.loads(words.partition("vectorPerTarget: {samer: ")[2].partition("}")[0])
            far = [(-total(query, each["vectors"]["samer"]), each["properties"]["image"]) for each in objects()]
            top = int(words.partition("limit: ")[2].partition(",")[0])
            rows = [{"image": name, "_additional": {"distance": one}} for one, name in sorted(far)[:top]]
            return 200, {"data": {"Get": {"Samer": rows}}}
        if method == "DELETE":
            del server.held[path.rpartition("/")[2]]
            return 204, {}
        after = path.partition("&after=")[2]
        return 200, {"objects": [each for each in objects() if each["id"] > after][:7]}

    def objects():
        return sorted(server.held.values(), key=lambda each: each["id"])

    return answer


def test_what_vespa_is_sent(server, capsys):
    server.answer = vespa(server)
    store, points = open_store("vespa", server.url, "samer", facts(coarse=1)), drawn(9)
    check_database(store, points, points[4].vectors + 0.1)
    posted = next(each for each in server.requests if each[0] == "POST")
    assert posted[1] == f"/document/v1/samer/samer/docid/{point_id(points[0].id)}"
    fields = posted[2]["fields"]
    assert fields["vectors"] == {str(k): pytest.approx(row.tolist()) for k, row in enumerate(points[0].vectors)}
    assert list(fields["coarse"]) == ["0"]
    assert (fields["id"], fields["rows"], fields["columns"], fields["projector"]) == (points[0].id, 2, 3, "abc")
    schema = store.schema()
    assert "field vectors type tensor<float>(dt{}, x[8])" in schema
    assert "first-phase { expression: sum(reduce(sum(query(q) * attribute(coarse), x), max, dt), qt) }" in schema
    assert "second-phase { expression: sum(reduce(sum(query(q) * attribute(vectors), x), max, dt), qt) }" in schema
    exec(store.query_code(), {"query": points[4].vectors})
    assert points[4].id in capsys.readouterr().out


def test_a_hosted_store_is_given_its_key(server, monkeypatch):
    server.answer = vespa(server)
    monkeypatch.setenv("SAMER_STORE_KEY", "abc")
    open_store("vespa", server.url, "samer", facts()).put(drawn(1))
    assert server.keys == {"Bearer abc"}


def test_what_weaviate_is_sent(server, capsys):
    server.answer = weaviate(server)
    store, points = open_store("weaviate", server.url, "samer", facts()), drawn(9)
    check_database(store, points, points[4].vectors + 0.1)
    (made,) = server.classes
    index = made["vectorConfig"]["samer"]["vectorIndexConfig"]
    assert index == {"distance": "dot", "multivector": {"enabled": True, "aggregation": "maxSim"}}
    exec(store.query_code(), {"query": points[4].vectors})
    assert points[4].id in capsys.readouterr().out
    with pytest.raises(InputError, match="vectors of another size"):
        open_store("weaviate", server.url, "samer", facts(dim=4))


@pytest.mark.parametrize("kind", ["vespa", "weaviate"])
def test_a_server_that_refuses_or_is_gone_is_one_line(kind, server):
    server.answer = lambda method, path, value: (503, {"message": "overloaded"})
    with pytest.raises(InputError, match=r"503 .*overloaded.*run the same again"):
        open_store(kind, server.url, "samer", facts())
    with pytest.raises(InputError, match=r"127.0.0.1:9.*run the same again"):
        open_store(kind, "http://127.0.0.1:9", "samer", facts())
    with pytest.raises(InputError, match="no URL of a server"):
        open_store(kind, "somewhere", "samer", facts())


class FakeMilvus:
    """What the exporter asks of pymilvus' client, kept in a dictionary; the schema is pymilvus' own."""

    made, held = {}, {}

    def __init__(self, place, token):
        self.place, self.token = place, token

    def has_collection(self, name):
        return name in self.made

    def create_collection(self, name, schema, index_params):
        self.made[name] = schema.to_dict()
        self.index = [each.to_dict() for each in index_params]

    def describe_collection(self, name):
        return self.made[name]

    def load_collection(self, name):
        assert name in self.made

    def upsert(self, name, rows):
        self.held |= {row["key"]: row for row in rows}

    def delete(self, name, ids):
        for key in ids:
            del self.held[key]

    def query_iterator(self, name, batch_size, filter, output_fields):
        pages = iter([list(self.held.values()), []])

        class Pages:
            next = staticmethod(lambda: next(pages))
            close = staticmethod(lambda: None)

        return Pages

    def search(self, name, data, anns_field, limit, output_fields):
        assert anns_field == "parts[vector]"
        query = np.array(data[0].to_numpy() if hasattr(data[0], "to_numpy") else list(data[0]))
        found = [
            {"entity": {"id": row["id"]}, "distance": total(query, [each["vector"] for each in row["parts"]])}
            for row in self.held.values()
        ]
        return [sorted(found, key=lambda hit: -hit["distance"])[:limit]]

    def close(self):
        pass


def test_what_milvus_is_asked(monkeypatch):
    pymilvus = pytest.importorskip("pymilvus")
    for name in ("create_schema", "create_struct_field_schema", "prepare_index_params"):  # need no server
        monkeypatch.setattr(FakeMilvus, name, staticmethod(getattr(pymilvus.MilvusClient, name)), raising=False)
    monkeypatch.setattr(FakeMilvus, "made", {})
    monkeypatch.setattr(FakeMilvus, "held", {})
    monkeypatch.setattr(pymilvus, "MilvusClient", FakeMilvus)
    store, points = open_store("milvus", "http://127.0.0.1:9", "samer", facts()), drawn(9)
    check_database(store, points, points[4].vectors + 0.1)
    (index,) = store._client.index
    assert (index["metric_type"], index["index_type"], index["field_name"]) == ("MAX_SIM_IP", "FLAT", "parts[vector]")
    with pytest.raises(InputError, match="another size or dtype"):
        open_store("milvus", "http://127.0.0.1:9", "samer", facts(dim=4))
