"""Stored embeddings: what is merged equals `merge_tokens`, in every kind of place; bad rows; killed runs; indexes."""

import json
import zipfile
from datetime import datetime

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_index import GRID, Drawn, add, paint

from samer.config import InputError, MergeConfig
from samer.coords import visual_coords
from samer.index.columns import read_columns, write_columns
from samer.index.read import Index
from samer.index.write import build_index
from samer.merging import merge_tokens
from samer.scoring import pack_signs
from samer.vectors import merge as vectors_merge
from samer.vectors.merge import Grid, compress_vectors, source_coords
from samer.vectors.parquet import ParquetStore
from samer.vectors.places import store_of

pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

ROWS, COLUMNS, DIM = 4, 5, 16
COUNT = ROWS * COLUMNS
IDS = [f"pages/{k}.jpg" for k in range(9)]
NESTED = pa.list_(pa.list_(pa.float32()))


def unit(*shape, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


TOKENS = unit(len(IDS), COUNT, DIM)


def write_table(path, tokens=TOKENS, ids=IDS, kind=NESTED, **columns):
    lists = [each.tolist() if isinstance(each, torch.Tensor) else each for each in tokens]
    pq.write_table(
        pa.table({"id": pa.array(list(ids), pa.string()), "embedding": pa.array(lists, kind), **columns}), path
    )
    return path


def vectors_in(path):
    return torch.tensor(pq.read_table(path)["embedding"].to_pylist())


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def compress(source, target, **settings):
    dtype = settings.pop("dtype", "float32")
    grid, normalise = settings.pop("grid", Grid(ROWS, COLUMNS)), settings.pop("normalise", False)
    merge = MergeConfig(**{"num_regions": 4, **settings})
    return compress_vectors(
        store_of(str(source)), store_of(str(target)), merge, dtype=dtype, grid=grid, normalise=normalise
    )


# --- what is merged ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["raster", "farthest"])
def test_the_command_equals_the_library(tmp_path, script, start):
    write_table(tmp_path / "in.parquet")
    words = ["--num-regions", "6", "--rows", str(ROWS), "--columns", str(COLUMNS), "--center-init", start]
    script("compress").main(["--in", str(tmp_path / "in.parquet"), "--out", str(tmp_path / "out.parquet"), *words])
    expected = merge_tokens(TOKENS, visual_coords(ROWS, COLUMNS), MergeConfig(num_regions=6, center_init=start)).tokens
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.schema.field("embedding").type == NESTED
    assert found["id"].to_pylist() == IDS
    torch.testing.assert_close(vectors_in(tmp_path / "out.parquet"), expected, atol=1e-6, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]


def test_without_places_only_directions_count(tmp_path, script, capsys):
    write_table(tmp_path / "in.parquet")
    out = tmp_path / "out.parquet"
    script("compress").main(["--in", str(tmp_path / "in.parquet"), "--out", str(out), "--num-regions", "4"])
    said = capsys.readouterr()
    assert "the place term is off" in said.out + said.err
    settings = MergeConfig(num_regions=4, spatial_weight=0)
    expected = merge_tokens(TOKENS, visual_coords(ROWS, COLUMNS), settings).tokens
    torch.testing.assert_close(vectors_in(out), expected, atol=1e-6, rtol=0)
    with_places = merge_tokens(TOKENS, visual_coords(ROWS, COLUMNS), MergeConfig(num_regions=4)).tokens
    assert not torch.allclose(vectors_in(out), with_places, atol=1e-3)


@pytest.mark.parametrize("column", ["grid", "coords"])
def test_places_may_be_a_column(tmp_path, column):
    tokens = [unit(6, DIM, seed=1), unit(20, DIM, seed=2), unit(12, DIM, seed=3)]
    grids = [[2, 3], [5, 4], [3, 4]]
    places = [visual_coords(*grid) for grid in grids]
    held = grids if column == "grid" else [each.tolist() for each in places]
    write_table(tmp_path / "in.parquet", tokens, "abc", **{column: held})
    compress(tmp_path / "in.parquet", tmp_path / "out.parquet", grid=None)
    for own, place, found in zip(tokens, places, pq.read_table(tmp_path / "out.parquet")["embedding"].to_pylist()):
        expected = merge_tokens(own[None], place, MergeConfig(num_regions=4)).tokens[0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-6, rtol=0)


def test_a_share_gives_each_image_its_own_k_and_colpali_s_prompt_tokens_are_known(tmp_path):
    tokens = [unit(1030, DIM, seed=1), unit(1030, DIM, seed=2)]
    write_table(tmp_path / "in.parquet", tokens, "ab")
    compress(tmp_path / "in.parquet", tmp_path / "out.parquet", num_regions="1/16", grid=Grid(32, 32))
    places = visual_coords(32, 32, prompt_tokens=6)
    expected = merge_tokens(torch.stack(tokens), places, MergeConfig(num_regions="1/16")).tokens
    assert expected.shape[1] == 65
    torch.testing.assert_close(vectors_in(tmp_path / "out.parquet"), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["hpool", "kmeans", "grid", "random", "none"])
def test_every_compressor_that_needs_no_model(tmp_path, name):
    from samer.compressors import make_compressor
    from samer.data.records import ImageRecord
    from samer.retrievers.base import image_seeds
    from samer.tokens import VisualTokens

    write_table(tmp_path / "in.parquet")
    compress(tmp_path / "in.parquet", tmp_path / "out.parquet", compressor=name)
    seeds = image_seeds([ImageRecord(each, tmp_path, ()) for each in IDS])
    visual = VisualTokens(TOKENS, visual_coords(ROWS, COLUMNS).expand(len(IDS), -1, -1), seeds=seeds)
    merged = make_compressor(MergeConfig(num_regions=4, compressor=name))(visual)
    for found, tokens, mask in zip(
        pq.read_table(tmp_path / "out.parquet")["embedding"].to_pylist(), merged.tokens, merged.mask
    ):
        torch.testing.assert_close(torch.tensor(found), tokens[mask], atol=1e-6, rtol=0)


def test_querybank_learns_from_queries(tmp_path, script):
    write_table(tmp_path / "in.parquet")
    write_table(tmp_path / "q.parquet", unit(5, 3, DIM, seed=4), "abcde")
    words = ["--in", str(tmp_path / "in.parquet"), "--out", str(tmp_path / "out.parquet"), "--compressor", "querybank"]
    with pytest.raises(InputError, match="--queries"):
        script("compress").main([*words, "--num-regions", "4"])
    script("compress").main([*words, "--num-regions", "4", "--queries", str(tmp_path / "q.parquet")])
    from samer.compressors import make_compressor
    from samer.tokens import VisualTokens

    bank = make_compressor(MergeConfig(num_regions=4, compressor="querybank"))
    bank.fit_queries(unit(5, 3, DIM, seed=4).flatten(0, 1))
    expected = bank(VisualTokens(TOKENS, torch.full((len(IDS), COUNT, 2), 0.5))).tokens
    torch.testing.assert_close(vectors_in(tmp_path / "out.parquet"), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["hpc", "sap-mean"])
def test_a_compressor_that_needs_the_model_is_refused(tmp_path, name):
    write_table(tmp_path / "in.parquet")
    assert "attention" in refusal(compress, tmp_path / "in.parquet", tmp_path / "out.parquet", compressor=name)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


# --- dtypes and columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "int8", "binary"])
@pytest.mark.parametrize("suffix", ["parquet", "npz", "safetensors", "duckdb"])
def test_dtypes_as_they_are_stored(tmp_path, dtype, suffix):
    write_table(tmp_path / "in.parquet")
    out = tmp_path / f"out.{suffix}"
    if suffix == "duckdb":
        duckdb = pytest.importorskip("duckdb", reason="needs duckdb")
        if dtype == "float16":
            assert "float32" in refusal(compress, tmp_path / "in.parquet", out, dtype=dtype)
            return
    compress(tmp_path / "in.parquet", out, dtype=dtype)
    exact = merge_tokens(TOKENS, visual_coords(ROWS, COLUMNS), MergeConfig(num_regions=4)).tokens
    if suffix in ("parquet", "duckdb"):
        query = "select * from embeddings"
        table = pq.read_table(out) if suffix == "parquet" else duckdb.connect(str(out)).sql(query).to_arrow_table()
        values = torch.tensor(table["embedding"].to_pylist())
        scales = torch.tensor(table["scale"].to_pylist()) if "scale" in table.column_names else None
    else:
        held = dict(np.load(out)) if suffix == "npz" else {key: each.numpy() for key, each in load_file(out).items()}
        assert {"float16": np.float16, "int8": np.int8, "binary": np.uint8}[dtype] == held["embedding"].dtype
        values = torch.from_numpy(held["embedding"].copy())
        scales = torch.from_numpy(held["scale"].copy()) if "scale" in held else None
    if dtype == "binary":
        assert torch.equal(values.to(torch.uint8), pack_signs(exact))
        assert "1-bit" in refusal(lambda: list(store_of(str(out)).rows())) or suffix in ("npz", "safetensors")
        return
    assert (scales is None) == (dtype == "float16")
    read = torch.stack([row.vectors for row in store_of(str(out)).rows()])
    torch.testing.assert_close(read, values.float() * (1 if scales is None else scales[:, None, None]))
    assert float((read - exact).abs().max()) < (1 / 127 if dtype == "int8" else 1e-3)


def test_other_columns_are_carried_along(tmp_path, capsys):
    page, part = list(range(9)), [None, *[k / 4 for k in range(8)]]
    columns = {"page": page, "lang": ["de"] * 8 + [None], "part": part, "shown": [True] * 9, "raw": [b"x"] * 9}
    write_table(tmp_path / "in.parquet", **columns)
    compress(tmp_path / "in.parquet", tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.column_names == ["id", "embedding", "page", "lang", "part", "shown"]
    assert found.select(["page", "lang", "part", "shown"]).to_pydict() == {
        key: columns[key] for key in ("page", "lang", "part", "shown")
    }
    assert "not carried along: raw;" in capsys.readouterr().out


def test_dates_and_categories_are_carried_as_texts(tmp_path):
    days = pa.array([datetime(2024, 5, 1 + k) for k in range(9)], pa.timestamp("ns")).cast(pa.int64())
    when = pa.compute.add(days, 7).cast(pa.timestamp("ns"))  # nanoseconds, which Python's times don't have
    lang = pa.array(["de", "en", None] * 3).dictionary_encode()
    write_table(tmp_path / "in.parquet", when=when, day=when.cast(pa.date32(), safe=False), lang=lang)
    compress(tmp_path / "in.parquet", tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").select(["when", "day", "lang"]).to_pylist()
    assert found[1] == {"when": "2024-05-02T00:00:00", "day": "2024-05-02", "lang": "en"}
    assert found[2]["lang"] is None


# --- places -----------------------------------------------------------------------------------------------------------


def test_places_are_told_apart():
    kinds = {
        "a.parquet": "ParquetStore",
        "b/a.npz": "NpzStore",
        "a.safetensors": "SafetensorsStore",
        "a.duckdb#t": "DuckStore",
        "d/t.lance": "LanceStore",
        "qdrant:http://127.0.0.1:6333#pages": "QdrantStore",
        "outputs/index": "IndexStore",
        "outputs/index#test": "IndexStore",
    }
    assert {place: type(store_of(place)).__name__ for place in kinds} == kinds
    assert "FILE.npz" in refusal(store_of, "vectors.pt")


@pytest.mark.parametrize("place", ["out.npz", "out.safetensors", "out.duckdb#t", "out.lance", "qdrant:{}/q#c"])
def test_every_place_gives_back_what_it_was_given(tmp_path, place):
    """Written, read again and written as parquet: the merged vectors, and the metadata where the place has any."""
    needs = {"duckdb": "duckdb", "lance": "lancedb", "qdrant": "qdrant_client"}
    for word, module in needs.items():
        if word in place:
            pytest.importorskip(module, reason=f"needs {module}")
    target = place.format(tmp_path) if "{}" in place else str(tmp_path / place)
    write_table(tmp_path / "in.parquet", page=list(range(9)))
    assert compress(tmp_path / "in.parquet", target).vectors_out == 36
    compress(target, tmp_path / "back.parquet", compressor="none", grid=None)
    expected = merge_tokens(TOKENS, visual_coords(ROWS, COLUMNS), MergeConfig(num_regions=4)).tokens
    table = pq.read_table(tmp_path / "back.parquet")
    order = [table["id"].to_pylist().index(name) for name in IDS]
    torch.testing.assert_close(vectors_in(tmp_path / "back.parquet")[order], expected, atol=1e-6, rtol=0)
    if "npz" not in place and "safetensors" not in place:
        assert [table["page"].to_pylist()[k] for k in order] == list(range(9))


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("form", ["padded", "flat", "named"])
def test_the_forms_of_array_files(tmp_path, suffix, form):
    tokens = list(TOKENS) if form == "padded" else [unit(3 + k, DIM, seed=k) for k in range(4)]
    ids = [str(k) for k in range(len(tokens))]
    if form == "named":
        ids = [f"doc{k}" for k in range(4)]
        arrays = dict(zip(ids, tokens))
    elif form == "flat":
        arrays = {"embeddings": torch.cat(tokens), "lengths": torch.tensor([len(each) for each in tokens])}
    else:
        arrays = {"embedding": TOKENS}
    if suffix == "npz":
        np.savez_compressed(tmp_path / "in.npz", **{key: value.numpy() for key, value in arrays.items()})
    else:
        save_file({key: value.contiguous() for key, value in arrays.items()}, tmp_path / "in.safetensors")
    store = store_of(str(tmp_path / f"in.{suffix}"))
    assert list(store.ids()) == ids
    for row, name, own in zip(store.rows(), ids, tokens, strict=True):
        assert row.id == name
        assert torch.equal(row.vectors, own)


def test_a_folder_of_parquet_files_is_one_place(tmp_path):
    (tmp_path / "in").mkdir()
    write_table(tmp_path / "in" / "b.parquet", TOKENS[5:], IDS[5:])
    write_table(tmp_path / "in" / "a.parquet", TOKENS[:5], IDS[:5])
    compress(tmp_path / "in", tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == IDS


def test_a_multivector_may_have_a_name(tmp_path):
    qdrant = pytest.importorskip("qdrant_client", reason="needs qdrant-client")
    models = qdrant.models
    multi = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    config = {name: models.VectorParams(size=DIM, distance="Dot", multivector_config=multi) for name in ("all", "few")}
    client = qdrant.QdrantClient(path=str(tmp_path / "q"))
    for collection, names in (("one", ["all"]), ("two", ["all", "few"])):
        client.create_collection(
            collection, {**{name: config[name] for name in names}, "dense": models.VectorParams(size=2, distance="Dot")}
        )
        vectors = {name: TOKENS[0][: 6 if name == "few" else 9].tolist() for name in names}
        client.upsert(collection, [models.PointStruct(id=1, vector={**vectors, "dense": [1.0, 0.0]})])
    client.close()
    for place, count in (("one", 9), ("two/few", 6), ("two/all", 9)):
        (row,) = store_of(f"qdrant:{tmp_path}/q#{place}").rows()
        torch.testing.assert_close(row.vectors, TOKENS[0][:count])
    for place in ("two", "two/dense"):
        told = refusal(lambda where: list(store_of(where).rows()), f"qdrant:{tmp_path}/q#{place}")
        assert "it has all, few" in told


def test_a_collection_of_another_size_is_refused_and_points_are_not_doubled(tmp_path):
    qdrant = pytest.importorskip("qdrant_client", reason="needs qdrant-client")
    place = f"qdrant:{tmp_path}/q#pages"
    write_table(tmp_path / "in.parquet")
    for _ in range(2):
        compress(tmp_path / "in.parquet", place)
    client = qdrant.QdrantClient(path=f"{tmp_path}/q")
    assert client.count("pages").count == len(IDS)
    client.close()
    write_table(tmp_path / "other.parquet", unit(9, COUNT, 8), IDS)
    said = refusal(compress, tmp_path / "other.parquet", place)
    assert "16 numbers" in said
    assert "multivectors of 8" in said


def test_a_server_that_is_down_is_told_and_costs_nothing(tmp_path, monkeypatch):
    pytest.importorskip("qdrant_client", reason="needs qdrant-client")
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "in.parquet")
    assert "Qdrant says" in refusal(compress, tmp_path / "in.parquet", "qdrant:http://127.0.0.1:9#pages")
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


# --- bad rows ---------------------------------------------------------------------------------------------------------


def changed(row, place, value):
    tokens = [each.tolist() for each in TOKENS]
    if place is None:
        tokens[row] = value
    else:
        tokens[row][place] = value
    return tokens


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (changed(3, 2, [float("nan")] * DIM), ["row 3", "vector 2", "NaN"]),
        (changed(3, 2, [float("inf")] + [0.0] * (DIM - 1)), ["row 3", "vector 2", "infinity"]),
        (changed(3, 2, [0.0] * DIM), ["row 3", "vector 2", "padding"]),
        (changed(3, 2, [2.0] + [0.0] * (DIM - 1)), ["row 3", "vector 2", "length 2", "--normalise"]),
        (changed(3, 2, [1.0] + [0.0] * (DIM - 2)), ["row 3", "15 to 16"]),
        (changed(3, None, [[1.0] + [0.0] * 7] * COUNT), ["row 3", "8 numbers", "16"]),
        (changed(3, None, []), ["row 3", "at least one"]),
        (changed(3, None, None), ["row 3", "no embedding"]),
        (changed(3, 2, None), ["row 3", "null"]),
        (changed(3, 2, [None] + [1.0] * (DIM - 1)), ["row 3", "null"]),
        (changed(3, None, TOKENS[3, :7].tolist()), ["row 3", "7 vectors", "4 x 5", "--prompt-tokens"]),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, tokens, words):
    write_table(tmp_path / "in.parquet", tokens)
    said = refusal(compress, tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert all(word in said for word in words), said
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


def test_an_id_that_comes_twice_or_is_missing_is_named(tmp_path):
    write_table(tmp_path / "in.parquet", ids=[*IDS[:8], IDS[2]])
    said = refusal(compress, tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert "row 8" in said
    assert "row 2" in said
    write_table(tmp_path / "in.parquet", ids=[*IDS[:8], None])
    assert "row 8" in refusal(compress, tmp_path / "in.parquet", tmp_path / "out.parquet")


def test_lengths_are_mended_on_request_only(tmp_path):
    write_table(tmp_path / "in.parquet", 3 * TOKENS)
    assert "length 3" in refusal(compress, tmp_path / "in.parquet", tmp_path / "out.parquet")
    compress(tmp_path / "in.parquet", tmp_path / "out.parquet", normalise=True)
    expected = merge_tokens(TOKENS, visual_coords(ROWS, COLUMNS), MergeConfig(num_regions=4)).tokens
    torch.testing.assert_close(vectors_in(tmp_path / "out.parquet"), expected, atol=1e-5, rtol=0)


def test_tables_that_hold_something_else(tmp_path):
    path = tmp_path / "in.parquet"
    go = lambda: refusal(compress, path, tmp_path / "out.parquet")
    assert "no such file" in go()
    pq.write_table(pa.table({"id": ["a"], "vectors": [[[1.0]]]}), path)
    assert "no column 'embedding'" in go()
    pq.write_table(pa.table({"id": ["a"], "embedding": [[1.0, 0.0]]}), path)
    assert "list of lists" in go()
    write_table(path, [[[1, 2]]], "a", pa.list_(pa.list_(pa.int8())))
    assert "'scale'" in go()
    path.write_bytes(b"PAR1 no")
    assert "parquet" in go()
    write_table(path)
    assert "the same" in refusal(compress, path, path)


def test_array_files_that_hold_something_else(tmp_path):
    path = tmp_path / "in.npz"
    go = lambda: refusal(compress, path, tmp_path / "out.parquet", grid=None)
    np.savez(path, embedding=np.array([{"a": 1}], dtype=object))
    assert "Python objects" in go()
    np.savez(path, embedding=TOKENS.numpy(), ids=np.array(["a"]))
    assert "1 ids for 9 images" in go()
    np.savez(path, embedding=TOKENS[0].numpy())
    assert "'lengths'" in go()
    np.savez(path, embedding=TOKENS[0].numpy(), lengths=np.array([3, 4]))
    assert "add up to 7" in go()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("embedding.npy", b"no array")
    assert "no array" in go()
    path.write_bytes(b"no zip")
    assert "npz" in go()


# --- killed and started again -----------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors_merge, "PART_ROWS", 2)
    write_table(tmp_path / "in.parquet")
    merged, real = [], vectors_merge.merge_rows

    def dies(compressor, rows):
        if len(merged) == 3:
            raise KeyboardInterrupt
        merged.append([row.id for row in rows])
        return real(compressor, rows)

    monkeypatch.setattr(vectors_merge, "merge_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    assert len(list((tmp_path / "out.parquet.parts").glob("part-*"))) == 3
    monkeypatch.setattr(
        vectors_merge, "merge_rows", lambda compressor, rows: merged.append(1) or real(compressor, rows)
    )
    assert compress(tmp_path / "in.parquet", tmp_path / "out.parquet").reused == 3
    assert len(merged) == 5
    assert not (tmp_path / "out.parquet.parts").exists()
    expected = merge_tokens(TOKENS, visual_coords(ROWS, COLUMNS), MergeConfig(num_regions=4)).tokens
    torch.testing.assert_close(vectors_in(tmp_path / "out.parquet"), expected, atol=1e-6, rtol=0)


def test_parts_of_other_settings_or_vectors_are_not_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors_merge, "PART_ROWS", 2)
    write_table(tmp_path / "in.parquet")
    monkeypatch.setattr(vectors_merge.Parts, "__init__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "in.parquet", tmp_path / "out.parquet")
    monkeypatch.undo()
    monkeypatch.setattr(vectors_merge, "PART_ROWS", 2)
    tokens = TOKENS.clone()
    tokens[4] = unit(COUNT, DIM, seed=9)
    write_table(tmp_path / "in.parquet", tokens)
    assert compress(tmp_path / "in.parquet", tmp_path / "out.parquet").reused == 4  # of five, one holds row 4
    expected = merge_tokens(tokens, visual_coords(ROWS, COLUMNS), MergeConfig(num_regions=4)).tokens
    torch.testing.assert_close(vectors_in(tmp_path / "out.parquet"), expected, atol=1e-6, rtol=0)


def test_memory_is_a_part_not_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors_merge, "PART_ROWS", 2)
    write_table(tmp_path / "in.parquet")
    pulled, ahead = [], []
    rows, merge = ParquetStore.rows, vectors_merge.merge_rows

    def counted(self):
        for row in rows(self):
            pulled.append(row.id)
            yield row

    def merged(compressor, block):
        ahead.append(len(pulled) - sum(ahead))
        assert len(block) == ahead[-1]
        return merge(compressor, block)

    monkeypatch.setattr(ParquetStore, "rows", counted)
    monkeypatch.setattr(vectors_merge, "merge_rows", merged)
    compress(tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert ahead == [2, 2, 2, 2, 1]


def test_a_file_of_one_row_group_is_not_held_whole(tmp_path):
    """pyarrow's own tables have row groups of a million rows."""
    count, width = 2000, 64
    rows = pa.array(np.eye(width, dtype="float32")[np.arange(count * 8) % width].tolist(), pa.list_(pa.float32()))
    lists = pa.ListArray.from_arrays(np.arange(0, count * 8 + 1, 8, dtype="int32"), rows)
    table = pa.table({"id": [str(k) for k in range(count)], "embedding": lists})
    how = {"compression": "NONE", "use_dictionary": False, "data_page_size": 2**14}
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=count, **how)
    size = (tmp_path / "in.parquet").stat().st_size
    assert size > 4e6
    del rows, lists, table
    before, most = pa.total_allocated_bytes(), 0
    for _ in store_of(str(tmp_path / "in.parquet")).rows():
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < size / 2


# --- indexes of ours --------------------------------------------------------------------------------------------------


@pytest.fixture
def all_tokens(tmp_path):
    root = paint(tmp_path / "pictures", [f"p{k}.png" for k in range(7)])
    names = [f"p{k}.png" for k in range(7)]
    whole = MergeConfig(num_regions=64, compressor="none")
    add(tmp_path / "all", root, names, dtype="float32", merge=whole)
    write_columns(tmp_path / "all", "images", {"p1.png": {"page": 3}})
    return tmp_path, root, names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "binary"])
def test_an_index_of_all_tokens_becomes_what_the_retriever_would_have_made(all_tokens, dtype):
    folder, root, names = all_tokens
    merge = MergeConfig(num_regions=6)
    add(folder / "made", root, names, dtype=dtype, merge=merge, assignments=True)
    compress(folder / "all", folder / "out", num_regions=6, dtype=dtype, grid=None)
    made, out = Index(folder / "made"), Index(folder / "out")
    assert made.manifest.difference(out.manifest) is None
    assert out.projector().hash == made.projector().hash
    assert out.contents("images") == made.contents("images")
    assert read_columns(folder / "out", "images") == {"p1.png": {"page": 3}}
    for name, number in out.numbers("images").items():
        mine, theirs = (index.vectors("images", index.numbers("images")[name]) for index in (out, made))
        assert number == made.numbers("images")[name]
        torch.testing.assert_close(mine.tokens, theirs.tokens, atol=1e-6 if dtype == "float32" else 0.02, rtol=0)
        assert torch.equal(mine.mask, theirs.mask)
        assert torch.equal(mine.regions, theirs.regions)
        assert mine.grid == theirs.grid == (GRID, GRID)
    add(folder / "out", root, [*names], dtype=dtype, merge=merge, assignments=True)  # and it goes on


def test_metadata_that_a_table_can_not_hold(all_tokens, capsys):
    """A number of more than 64 bits is written as a text; columns named as a table's own are left out, and told."""
    folder, _, _ = all_tokens
    write_columns(folder / "all", "images", {"p1.png": {"page": 2**70, "grid": "x"}, "p2.png": {"page": 3}})
    compress(folder / "all", folder / "out.parquet", grid=None)
    assert "not carried along: grid;" in capsys.readouterr().out
    found = pq.read_table(folder / "out.parquet")
    assert found.column_names == ["id", "embedding", "page"]
    assert found["page"].to_pylist() == [None, str(2**70), "3", *[None] * 4]


def test_regions_name_the_vectors_that_are_there(all_tokens, monkeypatch):
    """A compressor that leaves regions empty (here: every other) has its patches follow the vectors that are kept."""
    from samer.compressors.kmeans import KMeans
    from samer.tokens import MergedTokens

    def holes(self, visual, labels):
        tokens = torch.stack([visual.tokens[:, 3], 0 * visual.tokens[:, 0], visual.tokens[:, 7]], dim=1)
        where = torch.full(visual.tokens.shape[:2], 2)
        where[:, :4], where[:, 4] = 0, -1
        filled = torch.tensor([True, False, True]).expand(len(tokens), -1)
        return MergedTokens(tokens, tokens[..., :2], filled, tokens[:, :0], where)

    folder = all_tokens[0]
    monkeypatch.setattr(KMeans, "compress", holes)
    compress(folder / "all", folder / "out", compressor="kmeans", grid=None)
    whole, out = Index(folder / "all"), Index(folder / "out")
    for name, number in out.numbers("images").items():
        mine, theirs = out.vectors("images", number), whole.vectors("images", whole.numbers("images")[name])
        assert torch.equal(mine.tokens, theirs.tokens[[3, 7]])
        assert mine.regions.tolist() == [0, 0, 0, 0, -1, *[1] * 11]


def test_an_index_of_captions_keeps_them(all_tokens, world, base):
    from samer.retrievers.hf import Retriever

    folder = all_tokens[0]
    retriever = Retriever.load(str(base), dtype=torch.float32)
    whole = MergeConfig(compressor="none")
    build_index(folder / "a", world, ["test"], retriever, whole, dtype="float32")
    build_index(folder / "k", world, ["test"], retriever, MergeConfig(num_regions=8), dtype="float32")
    compress(folder / "a", folder / "out", num_regions=8, grid=None)
    torch.testing.assert_close(Index(folder / "out").scores("test")[0], Index(folder / "k").scores("test")[0])
    compress(folder / "a", folder / "out.parquet", num_regions=8, grid=None)
    read = {row.id: row.vectors for row in store_of(str(folder / "out.parquet")).rows()}
    for row in store_of(str(folder / "k")).rows():
        torch.testing.assert_close(read[row.id], row.vectors, atol=1e-5, rtol=0)


def test_what_can_not_become_an_index(all_tokens, tmp_path):
    folder = all_tokens[0]
    write_table(tmp_path / "in.parquet")
    assert "which model" in refusal(compress, tmp_path / "in.parquet", folder / "new")
    compress(folder / "all", folder / "merged", num_regions=6, grid=None)
    assert "merged vectors" in refusal(compress, folder / "merged", folder / "again", num_regions=2, grid=None)
    assert "an index that is there" in refusal(compress, folder / "all", folder / "merged", grid=None)
    assert "no finished index" in refusal(compress, folder / "none", folder / "new", grid=None)
    assert not (folder / "new").exists()


def test_coordinates_of_an_index_s_vectors_are_those_of_their_patches():
    encoder = Drawn()
    source = torch.arange(GRID * GRID)
    torch.testing.assert_close(source_coords(GRID * GRID, (GRID, GRID), source), visual_coords(*encoder.grid))
    merged = source_coords(3, (2, 2), torch.tensor([0, 0, 2, -1]))
    assert merged.tolist() == [[0.5, 0.0], [0.5, 0.5], [0.0, 1.0]]


def test_the_command_prints_json(tmp_path, script, capsys):
    write_table(tmp_path / "in.parquet")
    words = ["--in", str(tmp_path / "in.parquet"), "--out", str(tmp_path / "o.npz"), "--num-regions", "4", "--json"]
    script("compress").main(words)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["rows"], told["vectors_in"], told["vectors_out"], told["bytes_per_image"]) == (9, 180, 36, 256.0)


def test_a_store_that_goes_down_in_the_middle_is_gone_on_with(tmp_path, monkeypatch):
    """Its points are sent once: `sent.json` says how far it came."""
    qdrant = pytest.importorskip("qdrant_client", reason="needs qdrant-client")
    from samer.vectors import points

    monkeypatch.setattr(points, "REQUEST_BYTES", 2 * points.NUMBER_BYTES * DIM * 4)  # two images a request
    write_table(tmp_path / "in.parquet", page=list(range(9)))
    place, sent, real = f"qdrant:{tmp_path}/q#pages", [], qdrant.QdrantClient.upsert

    def fails(self, collection, own, **rest):
        if len(sent) == 3:
            raise ConnectionError("connection refused")
        sent.append([point.payload["id"] for point in own])
        return real(self, collection, own, **rest)

    monkeypatch.setattr(qdrant.QdrantClient, "upsert", fails)
    assert "connection refused" in refusal(compress, tmp_path / "in.parquet", place)
    taken = lambda *a, **k: sent.append([point.payload["id"] for point in a[2]]) or real(*a, **k)
    monkeypatch.setattr(qdrant.QdrantClient, "upsert", taken)
    assert compress(tmp_path / "in.parquet", place).reused == 1
    assert sent == [IDS[:2], IDS[2:4], IDS[4:6], IDS[6:8], IDS[8:]]
    assert sorted(row.id for row in store_of(place).rows()) == IDS
    assert not (tmp_path / "q#pages.parts").exists()
