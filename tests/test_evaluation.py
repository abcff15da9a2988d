"""Scores and metrics of a small cache against loops, in both directions."""

import math
import multiprocessing
import os
import random
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from samer.compressors import make_compressor
from samer.config import MergeConfig
from samer.data import flickr
from samer.data.records import ImageRecord
from samer.evaluation import both_directions, compress_images, encode_texts, evaluate_records, fitted_compressor
from samer.index.read import Index
from samer.index.write import build_index
from samer.retrievers.hf import Retriever
from samer.runtime.processes import process_group
from samer.runtime.progress import batched, prefetched
from samer.tokens import VisualTokens

METRICS = ["r@1", "r@5", "r@10", "median_rank", "mrr@10", "ndcg@5", "ndcg@10"]
MERGE = MergeConfig(num_regions=8)


@pytest.fixture(scope="module")
def frozen(base):
    return Retriever.load(str(base), dtype=torch.float32)


@pytest.fixture(scope="module")
def caches(world, frozen, tmp_path_factory):
    """Caches of the test split in each dtype, built three images at a time."""
    folder = tmp_path_factory.mktemp("caches")
    for dtype in ("float32", "bfloat16"):
        build_index(folder / dtype, world, ["test"], frozen, MERGE, batch_size=3, dtype=dtype)
    return folder


def naive_scores(cache, split):
    """MaxSim in float64, one query token and one image at a time."""
    images = [
        tokens[k][mask[k]].double().numpy() for _, tokens, mask in cache.images(split) for k in range(len(tokens))
    ]
    rows = []
    for queries, _, _ in cache.queries(split, block=3):
        for tokens, mask in zip(queries.tokens, queries.mask):
            row = []
            for image in images:
                best = [
                    max(float(np.dot(token, vector)) for vector in image)
                    for token, valid in zip(tokens.double().numpy(), mask)
                    if valid
                ]
                row.append(sum(best) / len(best))
            rows.append(row)
    return np.array(rows)


def naive_metrics(scores, positives):
    """Metrics of METHOD section 5 for a list of score rows and, per row, the set of right columns."""
    columns = {name: [] for name in METRICS}
    for row, right in zip(scores, positives):
        wrong = [row[k] for k in range(len(row)) if k not in right]
        ranks = []
        for place, value in enumerate(sorted((row[k] for k in right), reverse=True), start=1):
            ranks.append(place + sum(other >= value for other in wrong))
        for k in (1, 5, 10):
            columns[f"r@{k}"].append(100.0 if ranks[0] <= k else 0.0)
        columns["median_rank"].append(ranks[0])
        columns["mrr@10"].append(100.0 / ranks[0] if ranks[0] <= 10 else 0.0)
        for k in (5, 10):
            gain = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= k)
            ideal = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(right)) + 1))
            columns[f"ndcg@{k}"].append(100.0 * gain / ideal)
    middle = sorted(columns.pop("median_rank"))
    half = len(middle) // 2
    median = middle[half] if len(middle) % 2 else (middle[half - 1] + middle[half]) / 2
    return {"median_rank": median, **{name: sum(values) / len(values) for name, values in columns.items()}}


def values(direction):
    return {name: metric["value"] for name, metric in direction.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_equal_the_loops(caches, dtype):
    scores, image_of = Index(caches / dtype).scores("test")
    assert scores.dtype == torch.float32
    assert image_of.tolist() == [k // 5 for k in range(40)]
    np.testing.assert_allclose(scores.numpy(), naive_scores(Index(caches / dtype), "test"), atol=1e-6)


def test_metrics_of_the_cache_equal_the_loops(caches):
    scores, image_of = Index(caches / "float32").scores("test")
    found = both_directions(scores, image_of)
    matrix = scores.double().tolist()
    by_image = [[matrix[q][i] for q in range(40)] for i in range(8)]
    expected = {
        "text_to_image": naive_metrics(matrix, [{q // 5} for q in range(40)]),
        "image_to_text": naive_metrics(by_image, [set(range(5 * i, 5 * i + 5)) for i in range(8)]),
    }
    assert list(found) == list(expected)
    for direction in expected:
        assert sorted(found[direction]) == sorted(METRICS)
        assert values(found[direction]) == pytest.approx(expected[direction], abs=1e-6)
    assert 0 < expected["text_to_image"]["mrr@10"] < 100  # the example tells right from wrong
    assert 0 < expected["image_to_text"]["ndcg@10"] < 100


@pytest.mark.parametrize("seed", range(5))
def test_metrics_of_coarse_scores_equal_the_loops(seed):
    """Few distinct scores: ties everywhere, across and within images, and an unequal number of captions."""
    draw = random.Random(seed)
    image_of = sorted(draw.randrange(9) for _ in range(30))
    matrix = [[draw.randrange(4) / 4 for _ in range(9)] for _ in image_of]
    found = both_directions(torch.tensor(matrix), torch.tensor(image_of), resamples=10)
    described = sorted(set(image_of))
    by_image = [[row[i] for row in matrix] for i in described]
    owned = [{q for q, image in enumerate(image_of) if image == i} for i in described]
    assert values(found["text_to_image"]) == pytest.approx(naive_metrics(matrix, [{i} for i in image_of]), abs=1e-6)
    assert values(found["image_to_text"]) == pytest.approx(naive_metrics(by_image, owned), abs=1e-6)


def test_an_image_is_found_by_any_of_its_five_captions():
    """By hand: two images, ten captions. For image 0, places 1 3 6 7 8 are its own; for image 1, places 2 4 5 9 10."""
    image_of = torch.tensor([0] * 5 + [1] * 5)
    first = [1.0, 0.8, 0.5, 0.4, 0.3, 0.9, 0.7, 0.6, 0.2, 0.1]
    found = both_directions(torch.tensor([first, first]).T.contiguous(), image_of)["image_to_text"]
    ideal = 1 + 1 / math.log2(3) + 1 / 2 + 1 / math.log2(5) + 1 / math.log2(6)
    one, two = 1 + 1 / 2, 1 / math.log2(3) + 1 / math.log2(5) + 1 / math.log2(6)  # within the first five
    assert found["r@1"]["value"] == 50.0
    assert found["r@5"]["value"] == 100.0
    assert found["mrr@10"]["value"] == 75.0
    assert found["median_rank"]["value"] == 1.5
    assert found["ndcg@5"]["value"] == pytest.approx(100 * (one + two) / 2 / ideal, abs=1e-6)


def test_a_tie_is_no_hit(world, frozen, tmp_path):
    """All test images are one picture: every score ties, and no query finds its image."""
    same = shutil.copytree(world, tmp_path / "world")
    ids = (same / "annotations" / "test.txt").read_text().split()
    for image_id in ids[1:]:
        shutil.copy(same / "images" / "Images" / f"{ids[0]}.jpg", same / "images" / "Images" / f"{image_id}.jpg")
    records = flickr.load_split(same, "test", boxes=False)
    live = evaluate_records(frozen, records, MERGE, batch_size=1)
    build_index(tmp_path / "c", same, ["test"], frozen, MERGE, batch_size=1)
    stored = both_directions(*Index(tmp_path / "c").scores("test"))
    for found in (live, values(stored["text_to_image"])):
        assert (found["r@1"], found["r@5"], found["r@10"], found["median_rank"]) == (0.0, 0.0, 100.0, 8.0)
    assert stored["text_to_image"]["r@1"]["interval"] == [0.0, 0.0]
    equal = both_directions(torch.zeros(40, 8), torch.arange(8).repeat_interleave(5))["image_to_text"]
    assert (equal["r@10"]["value"], equal["median_rank"]["value"]) == (0.0, 36.0)  # behind all 35 others


def test_intervals_hold_the_value_and_repeat(caches):
    scores, image_of = Index(caches / "float32").scores("test")
    found = both_directions(scores, image_of)
    for direction in found.values():
        for name, metric in direction.items():
            low, high = metric["interval"]
            assert low <= metric["value"] <= high, name
    low, high = found["text_to_image"]["mrr@10"]["interval"]
    assert high - low > 1
    assert both_directions(scores, image_of) == found
    assert both_directions(scores, image_of, seed=1) != found


def test_captions_of_one_image_are_drawn_together():
    """50 images, half of them found by all five captions: the interval is that of 50 draws, not of 250."""
    image_of = torch.arange(50).repeat_interleave(5)
    scores = torch.eye(50)[image_of] * torch.where(image_of % 2 == 0, 1.0, -1.0)[:, None]
    metric = both_directions(scores, image_of)["text_to_image"]["r@1"]
    assert metric["value"] == 50.0
    low, high = metric["interval"]
    theory = 2 * 1.96 * 50 / math.sqrt(50)  # 27.7; drawn one by one it would be 12.4
    assert 0.85 * theory < high - low < 1.15 * theory


@pytest.mark.parametrize("batch_size", [3, 8])
def test_evaluating_records_equals_evaluating_their_cache(world, frozen, caches, batch_size):
    records = flickr.load_split(world, "test", boxes=False)
    live = evaluate_records(frozen, records, MERGE, batch_size=batch_size)
    stored = values(both_directions(*Index(caches / "float32").scores("test"))["text_to_image"])
    assert live == pytest.approx(stored, abs=1e-6)


def test_boxes_in_the_records_change_nothing(world, frozen):
    """Evaluation merges without the object prior even where the records hold boxes."""
    with_boxes = flickr.load_split(world, "test", boxes=True)
    assert any(phrase.boxes for record in with_boxes for caption in record.captions for phrase in caption.phrases)
    without = flickr.load_split(world, "test", boxes=False)
    pairs = zip(
        *(compress_images(frozen, batched(records, 3), make_compressor(MERGE)) for records in (with_boxes, without))
    )
    for (_, _, ours), (_, _, theirs) in pairs:
        assert torch.equal(ours.tokens, theirs.tokens)


def test_batches_keep_order_and_leave_no_gradient(world, frozen):
    records = flickr.load_split(world, "test", boxes=False)
    seen = list(compress_images(frozen, batched(records, 3), make_compressor(MERGE)))
    assert [record.image_id for batch, _, _ in seen for record in batch] == [record.image_id for record in records]
    assert [len(merged.tokens) for _, _, merged in seen] == [3, 3, 2]
    assert not any(merged.tokens.requires_grad for _, _, merged in seen)
    texts = [caption.text for caption in records[0].captions]
    queries = list(encode_texts(frozen, texts, 2))
    assert [len(query.tokens) for query in queries] == [2, 2, 1]
    for text, query in zip(texts[::2], queries):
        alone = frozen.encode_queries(frozen.query_inputs([text])).tokens[0]
        torch.testing.assert_close(query.tokens[0][query.mask[0]], alone, atol=1e-5, rtol=0)


# --- several processes ----------------------------------------------------------------------------------------------


class Unequal:
    """Stands for an encoder on two devices: what it sees of an image differs in the last bit of every number."""

    def __init__(self, last_bit):
        self.last_bit, self.calls = last_bit, 0

    def record_inputs(self, records):
        return [record.image_id for record in records]

    def encode_images(self, ids, needs):
        self.calls += 1
        draw = lambda name: torch.randn(20, 8, generator=torch.Generator().manual_seed(int(name)))
        tokens = torch.nn.functional.normalize(torch.stack([draw(name) for name in ids]), dim=-1)
        moved = (tokens.view(torch.int32) ^ self.last_bit).view(torch.float32)
        attention = {name: torch.rand(moved.shape[:2], generator=torch.Generator().manual_seed(0)) for name in needs}
        return VisualTokens(moved, torch.zeros(20, 2), attention=attention)


CORPUS = [ImageRecord(str(number), Path(f"{number}.jpg"), ()) for number in range(30)]  # 600 tokens for 256 codes
CODED = MergeConfig(num_regions=5, compressor="hpc")


def fit_as_one_of_two(number, port, folder):
    """The life of one process: what it is given for a codebook, and what it made of the first images with it."""
    names = {"RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    encoder = Unequal(last_bit=number)
    with process_group():
        compressor = fitted_compressor(encoder, CORPUS, CODED, 4)
    calls = encoder.calls
    same = Unequal(last_bit=0).encode_images(["0", "1", "2"], compressor.needs)
    torch.save({"codes": compressor.codes, "tokens": compressor(same).tokens, "calls": calls}, folder / f"{number}.pt")


def test_two_processes_have_one_codebook_though_their_features_differ_in_a_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = [context.Process(target=fit_as_one_of_two, args=(number, port, tmp_path)) for number in range(2)]
    try:
        for each in job:
            each.start()
        for each in job:
            each.join(300)  # a process that waits for ever is killed, and has no exit code then
        assert [each.exitcode for each in job] == [0, 0]
    finally:
        for each in job:
            each.kill()
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2))
    assert torch.equal(first["codes"], second["codes"])
    assert torch.equal(first["tokens"], second["tokens"])
    assert (first["calls"], second["calls"]) == (8, 0)
    alone = [fitted_compressor(Unequal(last_bit=bit), CORPUS, CODED, 4).codes for bit in (0, 1)]
    assert torch.equal(first["codes"], alone[0])
    assert not torch.equal(*alone)  # the bit matters


# --- reading ahead --------------------------------------------------------------------------------------------------


def test_prefetched_keeps_order_computes_one_ahead_and_raises_in_turn():
    calls = []

    def double(number):
        calls.append(number)
        if number == 4:
            raise ValueError("four")
        return 2 * number

    found, seen = [], []

    def collect():
        for item, result in prefetched(double, iter(range(1, 9))):
            found.append((item, result))
            seen.append(max(calls))

    with pytest.raises(ValueError, match="four"):
        collect()
    assert found == [(1, 2), (2, 4), (3, 6)]
    assert all(ahead <= item + 1 for (item, _), ahead in zip(found, seen))
    assert list(prefetched(double, [])) == []


def test_prefetched_closed_early_waits_for_no_thread():
    """The garbage collector may close it where waiting would be for ever: while a thread is being started."""
    entered, go_on, done = threading.Event(), threading.Event(), []

    def slow(number):
        if number == 2:
            entered.set()
            assert go_on.wait(60)
        done.append(number)

    stream = prefetched(slow, iter(range(1, 9)))
    assert next(stream) == (1, None)
    assert entered.wait(60)
    stream.close()  # would not return before `go_on`
    assert done == [1]
    go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(60)
    assert done == [1, 2]
