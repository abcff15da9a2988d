"""The whole job on generated scenes: scenes, training, caches, evaluation, one table. See bash/demo.sh.

bash bash/demo.sh                        (a few minutes on 2 cores; results in outputs/demo)
bash bash/demo.sh --quick --out /tmp/d   (a smaller world, to see that everything works)
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samer.config import load_config
from samer.runtime.commands import run
from samer.runtime.files import write_json

ROOT = Path(__file__).resolve().parents[1]
ROWS = (  # name, compressor of the index, what the projector was trained through (None: untouched)
    ("all tokens", "none", None),
    ("SaMer, raster", "samer raster", None),
    ("SaMer, farthest", "samer farthest", None),
    ("H-Pool", "hpool", None),
    ("K-means", "kmeans", None),
    ("SAP-mean", "sap-mean", None),
    ("HPC", "hpc", None),
    ("grid", "grid", None),
    ("random", "random", None),
    ("SaMer, raster, trained", "samer raster", "samer raster"),
    ("SaMer, farthest, trained", "samer farthest", "samer farthest"),
    ("H-Pool, trained", "hpool", "hpool"),
    ("SAP-mean, trained", "sap-mean", "sap-mean"),
    ("all tokens, same training", "none", "none"),
)
# the rows with pictures: the baseline first, the one in question last
SHOWN = (
    "all tokens",
    "H-Pool",
    "SAP-mean",
    "HPC",
    "SaMer, farthest",
    "SaMer, raster, trained",
    "SaMer, farthest, trained",
)
CURVES = ("SAP-mean", "SaMer, farthest", "SaMer, farthest, trained")  # recall at five budgets
REGIONS = ("SaMer, raster", "SaMer, raster, trained", "SaMer, farthest", "SaMer, farthest, trained")
SIZES = {False: (800, 60, 400), True: (80, 20, 60)}  # quick -> images in train, val, test


def main(argv=None):
    from scripts import cache, features, scenes, train
    from scripts import eval as evaluate
    from scripts import report as make_report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="outputs/demo", help="folder for everything (outputs/demo)")
    parser.add_argument("--quick", action="store_true", help="a small world; its figures mean little")
    options = parser.parse_args(argv)
    out = Path(options.out)
    config = ROOT / "configs" / "demo.yaml"
    model = f"model.name={ROOT / load_config(config).model.name}"
    started = time.monotonic()

    def step(title, script, *words):
        print(
            f"\n== {title}\n   python scripts/{script.__name__.split('.')[-1]}.py {' '.join(map(str, words))}",
            flush=True,
        )
        return script.main([str(word) for word in words])

    world = out / "world"
    counts = (word for pair in zip(("--train", "--val", "--test"), SIZES[options.quick]) for word in pair)
    step("generate scenes with captions and boxes", scenes, "--out", world, *counts)
    store = out / "features"
    step(
        "compute the frozen features, once for everything below", features, "--out", store, "--data-root", world, model
    )
    results = []
    for name, compressor, training in ROWS:
        label = folder_name(name)
        adapter = []
        if training is not None:
            folder = out / "checkpoints" / label
            words = (f"data.root={world}", f"data.features={store}", model, f"train.output_dir={folder}")
            step(f"train the projector: {name}", train, "--config", config, *words, *settings(training))
            adapter = ["--adapter-path", folder]
        index = out / "caches" / label
        words = (
            "--config",
            config,
            "--data-root",
            world,
            "--features",
            store,
            "--cache-dir",
            index,
            "--splits",
            "test",
            *adapter,
            *(["--assignments"] if compressor != "none" else []),  # for the search page; all tokens need none
        )
        step(f"build the index: {name}", cache, *words, model, *settings(compressor))
        report = step(
            "evaluate", evaluate, "--cache-dir", index, "--split", "test", "--output-json", index / "metrics.json"
        )
        results.append({"name": name, **report})
    write_json(out / "results.json", {"rows": results})
    report = out / "report.html"
    place = lambda name: f"{name}={out / 'caches' / folder_name(name)}"
    metrics = lambda name: place(name) + "/metrics.json"
    words = ["--data-root", world, "--features", store, "--out", report, "--title", "SaMer on generated scenes"]
    words += ["--method", *map(place, SHOWN), "--row", *(metrics(name) for name, *_ in ROWS if name not in SHOWN)]
    words += ["--regions", *map(place, REGIONS), "--sweep", *CURVES]
    step("make the report", make_report, *words)
    print("\n" + table(results))
    print(f"\n{time.monotonic() - started:.0f} s. Projectors in {out / 'checkpoints'}, indexes in {out / 'caches'},")
    print(f"scenes in {world}, these figures in {out / 'results.json'}. To search the scenes with words:")
    print(f"  CACHE_DIR={out / 'caches' / folder_name(SHOWN[-1])} DATA_ROOT={world} bash bash/serve.sh")
    print(f"What it all means, with pictures: {report}")
    return results


def folder_name(row):
    """Where a row's index and projector lie."""
    return row.replace(", ", "-").replace(" ", "-").lower()


def settings(compressor):
    """The overrides that choose a compressor."""
    name, _, centres = compressor.partition(" ")
    return [f"merge.compressor={name}", *([f"merge.center_init={centres}"] if centres else [])]


def table(results):
    """The rows as text: recall with 95 % intervals, vectors and bytes per image."""
    head = f"{'':28}{'R@1 text->image':>21}{'R@5':>7}{'nDCG@10':>9}{'R@1 image->text':>21}{'vectors':>9}{'bytes':>8}"
    lines = [head, "-" * len(head)]
    for row in results:
        text, image = row["text_to_image"], row["image_to_text"]
        r1, r1_back = ("{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]".format(**d["r@1"]) for d in (text, image))
        rest = f"{text['r@5']['value']:>7.1f}{text['ndcg@10']['value']:>9.1f}{r1_back:>21}"
        lines.append(f"{row['name']:28}{r1:>21}{rest}{row['vectors_per_image']:>9}{row['bytes_per_image']:>8.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
