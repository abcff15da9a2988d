"""Benchmarks: medians of many runs, the baseline in the same process, ratios reported.

python scripts/bench.py merge     the operator against its own matrix products
python scripts/bench.py maxsim    exact scoring against the bare matrix product
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from samer import MergeConfig, maxsim, merge_tokens, visual_coords
from samer.runtime import run


def medians(runs, *functions):
    """Median milliseconds of each function, called in turn so that a noisy moment hits all of them."""
    times = [[] for _ in functions]
    for turn in range(runs + 3):
        for function, row in zip(functions, times):
            started = time.perf_counter()
            function()
            if turn >= 3:
                row.append(1000 * (time.perf_counter() - started))
    return [statistics.median(row) for row in times]


def merge(runs):
    """One image of 1,030 x 128 to 64, published settings, no gradient."""
    tokens, coords = F.normalize(torch.randn(1, 1030, 128), dim=-1), visual_coords(32, 32, prompt_tokens=6)
    config = MergeConfig()
    centres, weights = tokens[0, :64].t().contiguous(), torch.rand(64, 1030)
    similarities = lambda: [tokens[0] @ centres for _ in range(config.cluster_iters + 1)]
    products = lambda: (similarities(), weights @ tokens[0])
    all_products = lambda: (products(), [weights @ tokens[0] for _ in range(config.cluster_iters)])
    ours, some, every = medians(runs, lambda: merge_tokens(tokens, coords, config), products, all_products)
    print(f"merge 1,030 x 128 -> 64: {ours:.2f} ms")
    print(f"  its T + 1 similarity products and the weighted sum: {some:.2f} ms, ratio {ours / some:.2f}")
    print(f"  the same, and T means written as products: {every:.2f} ms, ratio {ours / every:.2f}")


def score(runs):
    """32 queries of 32 tokens against 5,000 images of 64 x 128, float32."""
    queries, images = F.normalize(torch.randn(32, 32, 128), dim=-1), F.normalize(torch.randn(5000, 64, 128), dim=-1)
    flat = queries.reshape(-1, 128).t()
    product = lambda: [block.reshape(-1, 128) @ flat for block in images.split(16)]
    ours, floor = medians(max(3, runs // 40), lambda: maxsim(queries, images), product)
    print(f"maxsim 32 x 32 against 5,000 x 64 x 128: {ours:.0f} ms")
    print(f"  the blocked product alone: {floor:.0f} ms, ratio {ours / floor:.2f}")


ROOT = Path(__file__).resolve().parents[1]


def epoch(words):
    """Seconds, captions and peak memory (GB) of one training run in a process of its own."""
    from samer.config import load_config
    from samer.training import train

    config = load_config(ROOT / "configs" / "demo.yaml", words)
    result = train(config)
    return (
        result.seconds,
        result.steps * config.train.train_batch_size,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    )


def training(runs):
    """Captions per second with the demo's settings, 200 images with 1,000 captions, no validation."""
    from samer.colpali import Retriever
    from samer.features import write_features
    from samer.scenes import write_world

    rows = {"pixels": [], "features": []}
    with tempfile.TemporaryDirectory() as place:
        place, model = Path(place), str(ROOT / "assets" / "retriever")
        write_world(place / "world", {"train": 200})
        started = time.perf_counter()
        write_features(place / "store", place / "world", ["train"], Retriever.load(model), dtype="float32")
        once = time.perf_counter() - started
        size = sum(file.stat().st_size for file in place.glob("store/*/*.safetensors"))
        for turn in range(max(3, runs // 60)):
            for source, row in rows.items():
                words = [f"data.root={place / 'world'}", f"model.name={model}", "data.eval_split="]
                words += ["train.num_train_epochs=2", f"train.output_dir={place / f'{source}-{turn}'}"]
                words += [f"data.features={place / 'store'}"] if source == "features" else []
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row.append(pool.apply(epoch, (words,)))
    speeds = {}
    for source, row in rows.items():
        pace = speeds[source] = statistics.median(captions / seconds for seconds, captions, _ in row)
        memory = statistics.median(gigabytes for _, _, gigabytes in row)
        print(f"from {source}: {pace:.0f} captions/s, {1000 / pace:.2f} s per epoch, peak {memory:.2f} GB")
    print(
        f"ratio {speeds['features'] / speeds['pixels']:.1f}; the store: {once:.1f} s once, {size / 1e6:.0f} MB, mapped"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["merge", "maxsim", "train"])
    parser.add_argument("--runs", type=int, default=200, help="timed calls (200; maxsim a fortieth, train a sixtieth)")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.what == "train":
        return training(options.runs)
    with torch.no_grad():
        {"merge": merge, "maxsim": score}[options.what](options.runs)


if __name__ == "__main__":
    run(main)
