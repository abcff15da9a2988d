"""An index made of another's vectors: codes with learned tables, smaller budgets, and all that an index can do."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_index import NAMES, Drawn, add, contents, held, paint
from torch.nn.functional import normalize

from samer.codes import COMPONENTS
from samer.config import InputError, MergeConfig
from samer.export.run import export, facts_of, open_store
from samer.index import pictures as index_pictures
from samer.index import write as index_write
from samer.index.codes import read_codes
from samer.index.columns import read_columns, write_columns
from samer.index.manifest import read_index_manifest
from samer.index.merge import merge_indexes
from samer.index.pictures import compact_images, delete_images
from samer.index.read import Index
from samer.index.recode import recode
from samer.index.verify import verify
from samer.index.write import build_index
from samer.retrievers.banks import query_states
from samer.runtime.shards import write_manifest
from samer.scoring import maxsim
from samer.tokens import QueryTokens

MERGE = MergeConfig(num_regions=6)
CROWD = [f"{k:03}.png" for k in range(60)]  # 360 vectors
KINDS = [*COMPONENTS, "int8", "float16"]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """60 pictures in float32 with assignments and metadata, in shards of 25; a row of one is deleted."""
    folder = tmp_path_factory.mktemp("crowd")
    paint(folder / "root", CROWD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_pictures, "PICTURES_PER_SHARD", 25)
        add(folder / "c", folder / "root", CROWD, "float32", assignments=True)
    delete_images(folder / "c", "images", ["031.png"])
    write_columns(folder / "c", "images", {"002.png": {"page": 3}})
    return folder


@pytest.fixture(scope="module")
def coded(crowd):
    """The crowd in each kind, with budgets 2 and 4."""
    for kind in KINDS:
        recode(crowd / "c", crowd / kind, kind, [2, 4])
    return crowd


def ask(count=7):
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(count, 3, Drawn().embedding_dim, generator=generator)
    return QueryTokens(normalize(tokens, dim=-1), torch.ones(count, 3, dtype=torch.bool))


def vectors(index, split="images"):
    """Tokens (I, K, D) and mask of all live images, and their ids."""
    numbers = index.numbers(split)
    rows = [index.vectors(split, number) for number in numbers.values()]
    return list(numbers), torch.stack([row.tokens for row in rows]), torch.stack([row.mask for row in rows])


@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_what_the_other_holds(coded, kind):
    old, new = Index(coded / "c"), Index(coded / kind)
    ids, before, _ = vectors(old)
    names, after, _ = vectors(new)
    assert names == ids == [name for name in CROWD if name != "031.png"]
    error = float((after - before).square().sum(-1).mean())
    assert error < {"1bit": 0.5, "2bit": 0.2, "4bit": 0.02}.get(kind, 1e-4)
    for (_, ours, grids), (_, theirs, others) in zip(new.assignments("images"), old.assignments("images")):
        assert torch.equal(ours, theirs)
        assert torch.equal(grids, others)
    assert new.contents("images") == old.contents("images")
    assert read_columns(new.folder, "images") == {"002.png": {"page": 3}}
    assert new.manifest.splits["images"].root == str(coded / "root")
    stamps = [coded / name / "images" / "stamps.json" for name in ("c", kind)]
    assert stamps[0].exists() == stamps[1].exists()
    assert verify(coded / kind).damages == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [0, 2, 4])
def test_a_search_scores_what_is_stored(coded, kind, budget):
    index, queries = Index(coded / kind), ask()
    shards = list(index.stored("images", budget=budget))
    assert {images.tokens.shape[1] for _, images in shards} == {budget or 6}
    found = index.search(queries, "images", 59, budget=budget)
    if budget == 0:
        ids, tokens, mask = vectors(index)
        exact = maxsim(queries.tokens, tokens, queries.mask, mask)
        for row, scores in zip(found, exact):
            expected = dict(zip(ids, scores.tolist()))
            assert [score for _, score in row] == pytest.approx([expected[name] for name, _ in row], abs=0.02)
    assert {name for name, _ in found[0]} == set(CROWD) - {"031.png"}


@pytest.mark.parametrize("kind", ["1bit", "int8", "float16"])
@pytest.mark.parametrize(("columns", "together"), [(8192, 2**26), (1, 1), (40, 25 * 200)])  # 200: some bytes an image
def test_coarse_candidates_are_ranked_by_all_vectors(coded, kind, columns, together, monkeypatch):
    monkeypatch.setattr("samer.index.stages._COLUMNS", columns)
    monkeypatch.setattr("samer.index.stages._TOGETHER", together)
    index, queries = Index(coded / kind), ask()
    whole = index.search(queries, "images", 59)
    assert [[name for name, _ in row] for row in index.search(queries, "images", 59, coarse=2)] == [
        [name for name, _ in row] for row in whole
    ]
    monkeypatch.setattr("samer.index.stages.COARSE", 1)
    monkeypatch.setattr("samer.index.stages.COARSE_LEAST", 10)
    few = [{name for name, _ in row} for row in index.search(queries, "images", 10, budget=2)]
    keep = torch.ones(60, dtype=torch.bool)
    for row, all_of_it, candidates in zip(index.search(queries, "images", 5, coarse=2), whole, few):
        expected = [(name, score) for name, score in all_of_it if name in candidates][:5]
        assert [name for name, _ in row] == [name for name, _ in expected]
        assert [score for _, score in row] == pytest.approx([score for _, score in expected], abs=1e-5)
    keep[:50] = False
    for row in index.search(queries, "images", 5, keep=keep, coarse=4):
        assert {name for name, _ in row} <= set(CROWD[50:])


def test_a_budget_that_is_not_there_is_refused(coded):
    with pytest.raises(InputError, match=r"no budget of 3 vectors in this index; it holds: 4, 2"):
        Index(coded / "1bit").search(ask(), "images", 5, budget=3)
    with pytest.raises(InputError, match=r"it holds: none beside its own"):
        Index(coded / "c").search(ask(), "images", 5, coarse=3)


def test_codes_take_their_bytes_and_no_float_copy(coded):
    dim = Drawn().embedding_dim
    for kind, group in COMPONENTS.items():
        recode(coded / "c", coded / f"{kind}-alone", kind, assignments=False)
        index = Index(coded / f"{kind}-alone")
        assert index.size("images")[3] == 6 * dim // group + dim + 4  # codes, base and scale; no mask: none is missing
        assert not index.manifest.has_regions
        assert not list((coded / f"{kind}-alone").rglob("*exact*"))
        assert Index(coded / kind).size("images")[3] == (6 + 4 + 2) * dim // group + dim + 4


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(crowd, tmp_path):
    recode(crowd / "c", tmp_path / "c", "1bit", [3])
    whole = contents(tmp_path / "c")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("images-*")}
    (tmp_path / "c" / "manifest.json").unlink()
    spoilt = tmp_path / "c" / "images" / "images-00001.safetensors"
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"?")
    recode(crowd / "c", tmp_path / "c", "1bit", [3])
    assert contents(tmp_path / "c") == whole
    assert [path for path in times if path.stat().st_mtime_ns != times[path]] == [spoilt]
    (tmp_path / "c" / "manifest.json").unlink()
    (tmp_path / "c" / "codes.safetensors").write_bytes(b"none")
    recode(crowd / "c", tmp_path / "c", "1bit", [3])
    assert contents(tmp_path / "c") == whole


@pytest.fixture(scope="module")
def captions(world, tmp_path_factory):
    """A data set's splits with every token kept, and the same in 1bit."""
    folder = tmp_path_factory.mktemp("captions")
    build_index(folder / "c", world, ["val", "test", "train"], Drawn(), MergeConfig(compressor="none"), dtype="float32")
    return folder


def test_captions_and_their_images_go_along(captions):
    recode(captions / "c", captions / "2bit", "2bit", [8, 3])
    old, new = Index(captions / "c"), Index(captions / "2bit")
    for split in ("val", "test"):
        for (ours, image, texts), (theirs, others, words) in zip(new.queries(split), old.queries(split)):
            assert torch.equal(ours.tokens, theirs.tokens)
            assert image.tolist() == others.tolist()
            assert texts == words
        scores, image = new.scores(split)
        assert scores.shape == old.scores(split)[0].shape
        for budget in (0, 8, 3):
            few, _ = new.scores(split, budget=budget)
            queries = next(iter(new.queries(split)))[0]
            found = new.search(queries, split, 1, budget=budget)
            names = list(new.numbers(split))
            assert [row[0][0] for row in found] == [names[k] for k in few[: len(found)].argmax(1).tolist()]
    assert torch.equal(next(iter(new.assignments("val")))[1], next(iter(old.assignments("val")))[1])


def test_a_bank_moves_the_tables(captions):
    encoder = Drawn()
    bank = query_states(encoder, ["a cat", "two dogs on a beach"], 8, "a test").bank(encoder.current_projector())
    recode(captions / "c", captions / "alone", "1bit")
    recode(captions / "c", captions / "banked", "1bit", bank=bank)
    hashes = [read_index_manifest(captions / name / "manifest.json").codes for name in ("alone", "banked")]
    assert hashes[0] != hashes[1]
    with pytest.raises(InputError, match="the query bank is of projector"):
        recode(captions / "c", captions / "x", "1bit", bank=replace(bank, projector="0" * 64))
    with pytest.raises(InputError, match="leave it out for int8"):
        recode(captions / "c", captions / "x", "int8", bank=bank)


@pytest.mark.parametrize("kind", ["1bit", "float16"])
def test_pictures_are_added_with_the_tables_that_are_there(crowd, coded, tmp_path, kind):
    recode(crowd / "c", tmp_path / "c", kind, [2, 4])
    shutil.copytree(crowd / "root", tmp_path / "root")
    names = [name for name in CROWD if name != "031.png"]
    paint(tmp_path / "root", NAMES)
    add(tmp_path / "c", tmp_path / "root", [*names, *NAMES], kind, assignments=True)
    index = Index(tmp_path / "c")
    before, after = held(Index(coded / kind)), held(index)
    assert set(after) == {*names, *NAMES}
    assert all(torch.equal(after[name], row) for name, row in before.items())
    add(tmp_path / "f", tmp_path / "root", NAMES, "float32")
    ids, tokens, _ = vectors(Index(tmp_path / "f"))
    for name, exact in zip(ids, tokens):
        found = index.vectors("images", index.numbers("images")[name]).tokens
        assert float((found - exact).square().sum(-1).mean()) < (0.8 if kind == "1bit" else 1e-5)
    assert verify(tmp_path / "c").damages == []
    found = index.search(ask(), "images", 12, budget=2)
    compact_images(tmp_path / "c", "images")
    compacted = Index(tmp_path / "c")
    assert [[name for name, _ in row] for row in compacted.search(ask(), "images", 12, budget=2)] == [
        [name for name, _ in row] for row in found
    ]
    assert {name: row.tolist() for name, row in held(compacted).items()} == {k: v.tolist() for k, v in after.items()}


def test_a_new_index_of_codes_names_the_way(pictures_root, tmp_path):
    with pytest.raises(InputError, match=r"make it in int8 or float32 and then scripts/recode.py"):
        add(tmp_path / "c", pictures_root, NAMES, "1bit")
    assert not (tmp_path / "c").exists()


@pytest.fixture
def pictures_root(tmp_path):
    return paint(tmp_path / "pictures", NAMES)


def test_what_can_not_be_made_is_refused(coded, tmp_path):
    for words, message in (
        ((coded / "1bit", tmp_path / "x", "2bit"), "holds 1bit codes, which have lost"),
        ((coded / "c", coded / "2bit", "1bit"), "holds an index already"),
        ((coded / "c", tmp_path / "x", "binary"), "dtype 'binary'"),
        ((coded / "c", tmp_path / "x", "3bit"), "dtype '3bit'"),
        ((coded / "c", tmp_path / "x", "1bit", [6]), "--budgets 6: smaller budgets lie between 1 and 5"),
        ((coded / "c", tmp_path / "x", "1bit", [0]), "--budgets 0"),
        ((coded / "root", tmp_path / "x", "1bit"), "no manifest.json"),
    ):
        with pytest.raises(InputError, match=message):
            recode(*words)
    assert not (tmp_path / "x").exists()


def test_tables_that_are_damaged_or_others_are_refused(coded, captions, tmp_path):
    for name in ("a", "b", "c"):
        shutil.copytree(coded / "1bit", tmp_path / name)
    file = tmp_path / "a" / "codes.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    (tmp_path / "b" / "codes.safetensors").unlink()
    shutil.copy(coded / "2bit" / "codes.safetensors", tmp_path / "c")
    for name in ("a", "b", "c"):
        with pytest.raises(InputError, match=r"codes\.safetensors"):
            Index(tmp_path / name).search(ask(), "images", 3)
        assert any("codes.safetensors" in line for line in verify(tmp_path / name).damages)


def test_the_header_of_a_file_with_a_hole_is_refused(coded, tmp_path):
    shutil.copytree(coded / "1bit", tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    for change in ({"codes": ""}, {"budgets": [2, 4]}, {"dtype": "2bit"}):
        spoilt = {key: value for key, value in {**manifest, **change}.items() if key != "checksum"}
        write_manifest(tmp_path / "c" / "manifest.json", spoilt)
        with pytest.raises(InputError):
            list(Index(tmp_path / "c").images("images"))


def test_codes_are_exported_as_numbers(coded, tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    index = Index(coded / "1bit")
    store = open_store("parquet", str(tmp_path / "p"), "samer", facts_of(index, "images", "float32"))
    assert export(index, "images", store, tmp_path / "cursor.json").images == 59
    ids, tokens, _ = vectors(index)
    rows = pyarrow.read_table(tmp_path / "p").to_pylist()
    assert {row["id"] for row in rows} == set(ids)
    for row in rows[:5]:
        exact = tokens[ids.index(row["id"])].flatten()
        found = torch.tensor(next(value for value in row.values() if isinstance(value, list) and len(value) in (6, 96)))
        torch.testing.assert_close(found.flatten(), exact, atol=1e-6, rtol=0)


def test_indexes_with_the_same_tables_are_joined(coded, tmp_path):
    merge_indexes(tmp_path / "one", [coded / "1bit"])
    assert Index(tmp_path / "one").search(ask(), "images", 9) == Index(coded / "1bit").search(ask(), "images", 9)
    with pytest.raises(InputError, match="dtype="):
        merge_indexes(tmp_path / "two", [coded / "1bit", coded / "2bit"])


def test_files_without_codes_are_as_before(crowd):
    held_keys = json.loads((crowd / "c" / "manifest.json").read_text()).keys()
    assert not held_keys & {"codes", "budgets"}


def test_the_script_and_who_reads_what_it_makes(crowd, captions, script, tmp_path, capsys):
    words = ["--cache-dir", str(captions / "c"), "--out", str(tmp_path / "c"), "--dtype", "1bit", "--budgets", "4"]
    first, *_ = script("recode").main([*words, "--threads", "1"])
    assert first.split == "val"
    assert f"-> {tmp_path / 'c' / 'val'}" in capsys.readouterr().out
    metrics = ["--cache-dir", str(tmp_path / "c"), "--output-json", str(tmp_path / "m.json")]
    whole = script("eval").main(metrics)
    few = script("eval").main([*metrics, "--budget", "4"])
    assert (whole["vectors_per_image"], few["vectors_per_image"]) == (Index(captions / "c").size("test")[2], 4)
    dim = Drawn().embedding_dim
    assert few["bytes_per_image"] == 4 * dim // 8 + dim + 4
    with pytest.raises(SystemExit):
        script("recode").main(words[:4])
    with pytest.raises(SystemExit):
        script("search").main(["--cache-dir", str(tmp_path / "c"), "x", "--coarse", "4", "--budget", "4"])


def test_tables_are_read_back_as_they_were_written(coded):
    codebook, source = read_codes(Path(coded / "4bit" / "codes.safetensors"))
    assert len(source) == 64
    assert codebook.tables.shape[2] == 2
    assert index_write.CODES == "codes.safetensors"
