"""Advice on one's own data: its figures are those of brute force, and what it recommends keeps what it says."""

import json
import math

import pytest
import torch
from test_vectors import refusal, unit, write_table

from samer.compressors import make_compressor
from samer.config import MergeConfig
from samer.coords import visual_coords
from samer.merging import merge_tokens
from samer.products import unpack_signs
from samer.scoring import pack_signs
from samer.tokens import VisualTokens
from samer.vectors.advice import advice
from samer.vectors.merge import Grid
from samer.vectors.places import store_of
from samer.vectors.queries import PSEUDO_VECTORS, held_out, pseudo_queries
from samer.vectors.rows import Row

pytest.importorskip("pyarrow", reason="parquet needs pyarrow")

IDS = [f"i{k:02}" for k in range(40)]
ROWS, COLUMNS, DIM = 3, 4, 16
# each image has a direction of its own, so that there is something to find
TOKENS = torch.nn.functional.normalize(unit(40, 1, DIM, seed=5) + 0.7 * unit(40, ROWS * COLUMNS, DIM, seed=6), dim=-1)
ASKED = torch.nn.functional.normalize(TOKENS[::4, :3] + 0.5 * unit(10, 3, DIM, seed=7), dim=-1)
PLACES = visual_coords(ROWS, COLUMNS)


@pytest.fixture
def place(tmp_path):
    return write_table(tmp_path / "in.parquet", TOKENS, IDS)


def brute(queries, images):
    """(Q, I), of every query vector with every image vector."""
    return torch.einsum("qmd,ind->qimn", queries, images).amax(3).mean(2).tolist()


def best(row, count=10):
    return sorted(range(len(row)), key=lambda image: -row[image])[:count]


def as_dtype(tokens, dtype):
    """What a stored dtype stands for, up to a factor that is the same for every image."""
    if dtype == "binary":
        return unpack_signs(pack_signs(tokens)).float()
    return tokens.half().float()


@pytest.mark.parametrize("known", [True, False])
def test_figures_are_those_of_brute_force(place, tmp_path, known):
    right = [IDS[4 * k] for k in range(10)]
    columns = {"relevant": right} if known else {}
    write_table(tmp_path / "q.parquet", ASKED, [str(k) for k in range(10)], **columns)
    how = {"budgets": (2, 5), "queries": str(tmp_path / "q.parquet"), "grid": Grid(ROWS, COLUMNS)}
    found = advice(store_of(str(place)), MergeConfig(), **how)
    cells = {(row.regions, row.dtype) for row in found.rows}
    assert cells == {(k, dtype) for k in (2, 5, "all") for dtype in ("float16", "int8", "binary")}
    assert len(found.rows) == 9
    assert sorted(row.bytes_per_image for row in found.rows) == [row.bytes_per_image for row in found.rows]
    reference = brute(ASKED, TOKENS)
    for row in found.rows:
        count = ROWS * COLUMNS if row.regions == "all" else row.regions
        sizes = {"float16": 2 * DIM * count, "int8": DIM * count + 4, "binary": DIM // 8 * count}
        assert row.bytes_per_image == sizes[row.dtype]
        assert row.kept_interval[0] <= row.kept <= row.kept_interval[1]
        if row.dtype == "int8":  # queries are rounded, too: tests/test_stored_scores.py has that
            continue
        settings = MergeConfig(num_regions=count)
        images = TOKENS if row.regions == "all" else merge_tokens(TOKENS, PLACES, settings).tokens
        scores = brute(ASKED, as_dtype(images, row.dtype))
        overlap = [len(set(best(own)) & set(best(truth))) for own, truth in zip(scores, reference)]
        assert row.overlap == pytest.approx(10 * sum(overlap) / 10, abs=2.1)  # a tie of 1 bit may fall otherwise
        if known:
            gains = [{4 * k: 1} for k in range(10)]
        else:
            gains = [{image: 10 - place for place, image in enumerate(best(truth))} for truth in reference]
        gain = [ndcg(own, each) for own, each in zip(scores, gains)]
        full = [ndcg(own, each) for own, each in zip(reference, gains)]
        assert row.kept == pytest.approx(100 * sum(gain) / sum(full), abs=1.0 if row.dtype == "binary" else 0.05)
        assert (row.recall is None) == (not known)
    assert (found.reference["recall"] is None) == (not known)


def ndcg(scores, gains):
    ideal = sum(gain / math.log2(place + 2) for place, gain in enumerate(sorted(gains.values(), reverse=True)[:10]))
    return sum(gains.get(image, 0) / math.log2(place + 2) for place, image in enumerate(best(scores))) / ideal


def test_the_smallest_that_keeps_99_percent_is_recommended(place, tmp_path):
    write_table(tmp_path / "q.parquet", ASKED, [str(k) for k in range(10)], relevant=[IDS[4 * k] for k in range(10)])
    found = advice(store_of(str(place)), MergeConfig(), queries=str(tmp_path / "q.parquet"), grid=Grid(ROWS, COLUMNS))
    assert {row.regions for row in found.rows} == {4, 8, "all"}
    keeps = [row for row in found.rows if row.kept >= 99]
    assert found.recommended == min(keeps, key=lambda row: row.bytes_per_image)
    sure = [row for row in found.rows if row.kept_interval[0] >= 99]
    assert found.sure == min(sure, key=lambda row: row.bytes_per_image)
    assert any(f"--dtype {found.recommended.dtype}" in line for line in found.lines())


def test_without_queries_images_stand_for_them_and_this_is_said(place, tmp_path, script, capsys):
    words = ["--in", str(place), "--advise", "--num-regions", "[2,5]", "--rows", "3", "--columns", "4"]
    found = script("compress").main([*words, "--out", str(tmp_path / "advice")])
    assert found.images == 36
    said = capsys.readouterr().out
    assert "4 pseudo-queries" in said
    assert "| all |" in said
    told = json.loads((tmp_path / "advice" / "advice.json").read_text())
    assert [row["regions"] for row in told["rows"]].count(2) == 3
    assert told["recommended"]["kept"] >= 99
    assert (tmp_path / "advice" / "advice.svg").read_bytes().startswith(b"<?xml")
    assert "pseudo-queries" in (tmp_path / "advice" / "advice.md").read_text()
    capsys.readouterr()
    script("compress").main([*words, "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == told["rows"]


def test_images_that_stand_for_queries_are_left_out_and_always_the_same():
    out = held_out(IDS)
    assert sorted(out) == ["i00", "i10", "i20", "i30"]
    rows = [Row(name, unit(50, DIM, seed=k)) for k, name in enumerate(sorted(out))]
    asked, again = pseudo_queries(rows), pseudo_queries(rows)
    for row, one, two in zip(rows, asked.tokens, again.tokens):
        assert torch.equal(one, two)
        assert len(one) == PSEUDO_VECTORS
        assert all(any(torch.equal(each, vector) for vector in row.vectors) for each in one)
    assert "too few" in refusal(held_out, IDS[:19])


def test_an_index_brings_its_captions(world, base, tmp_path):
    from samer.index.write import build_index
    from samer.retrievers.hf import Retriever

    retriever = Retriever.load(str(base), dtype=torch.float32)
    build_index(tmp_path / "a", world, ["test"], retriever, MergeConfig(compressor="none"), dtype="float32")
    found = advice(store_of(str(tmp_path / "a")), MergeConfig(), budgets=(8,))
    assert "captions" in found.queries
    assert found.images == 8
    from samer.index.read import Index
    from samer.metrics import query_metrics

    scores, image_of = Index(tmp_path / "a").scores("test")
    values = query_metrics(scores, torch.nn.functional.one_hot(image_of, 8).bool())
    assert found.reference["recall"] == pytest.approx(values["r@1"].mean(), abs=0.01)
    assert found.reference["ndcg"] == pytest.approx(values["ndcg@10"].mean(), abs=0.01)


def test_what_a_bank_learns_from_is_not_asked(place, tmp_path):
    write_table(tmp_path / "q.parquet", ASKED, [str(k) for k in range(10)])
    how = {"budgets": (5,), "queries": str(tmp_path / "q.parquet")}
    found = advice(store_of(str(place)), MergeConfig(compressor="querybank"), **how)
    compressor = make_compressor(MergeConfig(num_regions=5, compressor="querybank"))
    compressor.fit_queries(ASKED[::2].flatten(0, 1))
    images = compressor(VisualTokens(TOKENS, torch.full((*TOKENS.shape[:2], 2), 0.5))).tokens
    scores, reference = (brute(ASKED[1::2], each) for each in (images.half().float(), TOKENS))
    overlap = [len(set(best(own)) & set(best(truth))) for own, truth in zip(scores, reference)]
    row = next(row for row in found.rows if (row.regions, row.dtype) == (5, "float16"))
    assert row.overlap == pytest.approx(10 * sum(overlap) / 5)
    assert found.queries.startswith("half of 10 queries")


@pytest.mark.parametrize("what", ["width", "relevant", "none"])
def test_queries_that_ask_nothing_here(place, tmp_path, what):
    tokens = unit(3, 2, 8) if what == "width" else ASKED[:3]
    columns = {"relevant": ["x", "y", "z"]} if what == "relevant" else {}
    ids = "abc" if what != "none" else ""
    write_table(tmp_path / "q.parquet", tokens[: len(ids)], ids, **columns)
    said = refusal(advice, store_of(str(place)), MergeConfig(), queries=str(tmp_path / "q.parquet"))
    assert {"width": "8 numbers a vector", "relevant": "no query names", "none": "holds no queries"}[what] in said
