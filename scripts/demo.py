"""The whole job on generated scenes: scenes, training, caches, evaluation, one table. See bash/demo.sh.

bash bash/demo.sh                        (a few minutes on 2 cores; results in outputs/demo)
bash bash/demo.sh --quick --out /tmp/d   (a smaller world, to see that everything works)
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse
import time
from pathlib import Path

from samer.runtime.commands import run

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"
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
    from scripts import features, scenes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="outputs/demo", help="folder for everything (outputs/demo)")
    parser.add_argument("--quick", action="store_true", help="a small world; its figures mean little")
    options = parser.parse_args(argv)
    out = Path(options.out)
    started = time.monotonic()
    world, store = out / "world", out / "features"
    counts = (word for pair in zip(("--train", "--val", "--test"), SIZES[options.quick]) for word in pair)
    step("generate scenes with captions and boxes", scenes, "--out", world, *counts)
    words = ("--out", store, "--data-root", world, model())
    step("compute the frozen features, once for everything below", features, *words)
    results = [train_and_measure(out, world, store, *row) for row in ROWS]
    from samer.runtime.files import write_json

    write_json(out / "results.json", {"rows": results})
    report = make_report(out, world, store)
    print("\n" + table(results))
    print(f"\n{time.monotonic() - started:.0f} s. Projectors in {out / 'checkpoints'}, indexes in {out / 'caches'},")
    print(f"scenes in {world}, these figures in {out / 'results.json'}. To search the scenes with words:")
    print(f"  CACHE_DIR={index_of(out, SHOWN[-1])} DATA_ROOT={world} bash bash/serve.sh")
    print(f"What it all means, with pictures: {report}")
    return results


def step(title, script, *words):
    """Runs an entry point as the line that is printed would."""
    name = script.__name__.split(".")[-1]
    print(f"\n== {title}\n   python scripts/{name}.py {' '.join(map(str, words))}", flush=True)
    return script.main([str(word) for word in words])


def train_and_measure(out, world, store, name, compressor, training):
    """One row: trains its projector if it has one, builds the index, evaluates it."""
    from scripts import cache, train
    from scripts import eval as evaluate

    adapter = []
    if training is not None:
        folder = out / "checkpoints" / folder_name(name)
        words = (f"data.root={world}", f"data.features={store}", model(), f"train.output_dir={folder}")
        step(f"train the projector: {name}", train, "--config", CONFIG, *words, *settings(training))
        adapter = ["--adapter-path", folder]
    index = index_of(out, name)
    words = ["--config", CONFIG, "--data-root", world, "--features", store, "--cache-dir", index, "--splits", "test"]
    words += [*adapter, *(["--assignments"] if compressor != "none" else [])]  # for the search page
    step(f"build the index: {name}", cache, *words, model(), *settings(compressor))
    words = ("--cache-dir", index, "--split", "test", "--output-json", index / "metrics.json")
    return {"name": name, **step("evaluate", evaluate, *words)}


def make_report(out, world, store):
    """The page with pictures; returns its path."""
    from scripts import report

    path = out / "report.html"
    places = {name: f"{name}={index_of(out, name)}" for name, *_ in ROWS}
    words = ["--data-root", world, "--features", store, "--out", path, "--title", "SaMer on generated scenes"]
    words += ["--method", *(places[name] for name in SHOWN)]
    words += ["--row", *(f"{place}/metrics.json" for name, place in places.items() if name not in SHOWN)]
    words += ["--regions", *(places[name] for name in REGIONS), "--sweep", *CURVES]
    step("make the report", report, *words)
    return path


def model():
    """The override that names the small retriever wherever the demo is run."""
    from samer.config import load_config

    return f"model.name={ROOT / load_config(CONFIG).model.name}"


def index_of(out, name):
    """Where a row's index lies."""
    return out / "caches" / folder_name(name)


def folder_name(row):
    """What a row's index and projector are called."""
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
