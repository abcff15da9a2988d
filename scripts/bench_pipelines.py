"""Benchmark of what surrounds the model: decoding, index, features, training from them, a comparison's fixed costs.

python scripts/bench_pipelines.py --before CHECKOUT     each stage with another checkout's code and with this one's
python scripts/bench.py pipelines                       the same, this code alone

Each run is a process of its own, before and after in turn, so that a noisy moment hits both; medians. The retriever is
the small one (assets/retriever), pictures are those of the generated world, and photographs of 12 megapixels
(generated JPEGs). "outside" is the share of a stage's time that is not spent in the model's forward pass, "busy" that
of the cores' time which the process used. --json and --markdown name files for the figures.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from samer.runtime.commands import run

ROOT = Path(__file__).resolve().parents[1]
PHOTO = 4000, 3000
DISTINCT = 16  # photographs; beyond those they are copies, which cost the same to read
KEYS = ("seconds", "outside", "busy", "rate")


def decode(place, source, threads):
    """Pictures on their way to the model, which does not run: photographs, or the world's."""
    from samer.data import flickr
    from samer.retrievers.hf import Retriever
    from samer.runtime.progress import batched, prefetched

    retriever = Retriever.load(str(ROOT / "assets" / "retriever"))
    records = flickr.load_split(place / source, "test", boxes=False)
    batches = list(batched(records, 8))
    with measured(retriever) as found:
        try:
            from samer.retrievers.stream import read_images
        except ImportError:  # an earlier checkout
            stream = prefetched(retriever.record_inputs, batches)
        else:
            if threads:
                from samer.runtime.processes import use_threads

                use_threads(threads)
            stream = read_images(retriever, batches)
        count = sum(len(batch) for batch, _ in stream)
    return {**found, "rate": count / found["seconds"]}


def index(place, source, out):
    """scripts/cache.py's work."""
    from samer.config import MergeConfig
    from samer.index.write import build_index
    from samer.retrievers.hf import Retriever

    retriever = Retriever.load(str(ROOT / "assets" / "retriever"))
    with measured(retriever) as found:
        (summary,) = build_index(out, place / source, ["test"], retriever, MergeConfig(num_regions=16), dtype="int8")
    return {**found, "rate": summary.images / found["seconds"]}


def features(place, source, out):
    """scripts/features.py's work."""
    from samer.features.write import write_features
    from samer.retrievers.hf import Retriever

    retriever = Retriever.load(str(ROOT / "assets" / "retriever"))
    with measured(retriever) as found:
        entries = write_features(out, place / source, ["test"], retriever, dtype="float32")
    return {**found, "rate": sum(shard.count for shard in entries["test"].images) / found["seconds"]}


def training(place, source, out):
    """A training from stored features through three budgets, which may share what they have in common."""
    from samer.config import load_config
    from samer.features.write import write_features
    from samer.retrievers.hf import Retriever
    from samer.training.loop import train

    model = ROOT / "assets" / "retriever"
    write_features(out / "store", place / source, ["test"], Retriever.load(str(model)), dtype="float32")
    words = [f"data.root={place / source}", f"model.name={model}", f"data.features={out / 'store'}"]
    words += ["data.train_split=test", "data.eval_split=", f"train.output_dir={out / 'run'}"]
    words += ["train.num_train_epochs=2", "merge.num_regions=[4, 8, 16]"]
    config = load_config(ROOT / "configs" / "demo.yaml", words)
    with measured() as found:
        result = train(config)
    return {**found, "seconds": result.seconds, "rate": result.steps * config.train.train_batch_size / result.seconds}


def comparison(place, source, out):
    """What a comparison's trainings take beside their steps; `rate`: trainings a second of that."""
    import torch

    from samer.compare import run as compare_run
    from samer.compare.write import write_comparison
    from samer.config import load_config
    from samer.training.loop import Run

    words = [f"data.root={place / source}", f"model.name={ROOT / 'assets' / 'retriever'}"]
    words += ["data.train_split=test", "train.num_train_epochs=0.1", "merge.num_regions=8"]
    config, spent = load_config(ROOT / "configs" / "demo.yaml", words), {"all": 0.0, "steps": 0.0, "count": 0}

    def timed(function, key):
        def call(*words, **more):
            started = time.perf_counter()
            try:
                return function(*words, **more)
            finally:
                spent[key] += time.perf_counter() - started

        return call

    compare_run.train, Run.to_the_end = timed(compare_run.train, "all"), timed(Run.to_the_end, "steps")
    asked = {"seeds": [0, 1, 2], "sections": ["adapted"], "methods": ["none", "samer"], "split": "test"}
    with measured() as found:
        write_comparison(config, out, **asked, device=torch.device("cpu"))
    trained = len(list((out / "projectors").iterdir()))
    fixed = spent["all"] - spent["steps"]
    return {"seconds": fixed, "outside": None, "busy": found["busy"], "rate": trained / fixed}


STAGES = {  # name: (function, pictures)
    "decode": (decode, "photos"),
    "decode, one thread": (decode, "photos"),
    "decode, small": (decode, "world"),
    "index": (index, "world"),
    "index, 12 MP": (index, "photos"),
    "features": (features, "world"),
    "features, 12 MP": (features, "photos"),
    "training": (training, "world"),
    "comparison": (comparison, "world"),
}


@contextlib.contextmanager
def measured(retriever=None):
    """Seconds of a block, and the shares of them that are outside the model, and that the cores were at work."""
    inside, found = [0.0], {}
    if retriever is not None:
        plain = retriever.hidden_states

        def hidden_states(inputs):
            started = time.perf_counter()
            try:
                return plain(inputs)
            finally:
                inside[0] += time.perf_counter() - started

        retriever.hidden_states = hidden_states
    started, used = time.perf_counter(), time.process_time()
    yield found
    seconds, cores = time.perf_counter() - started, len(os.sched_getaffinity(0))
    found["seconds"] = seconds
    found["outside"] = 1 - inside[0] / seconds if inside[0] else None
    found["busy"] = (time.process_time() - used) / seconds / cores


def write_photo(path, width, height, seed):
    """A JPEG with shapes and grain, so that it is as large as a camera's; the same for the same seed."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = Image.fromarray(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)).resize((1024, 1024), Image.BICUBIC)
    for top in range(0, height, 1024):
        for left in range(0, width, 1024):
            box = left, top, min(left + 1024, width), min(top + 1024, height)
            size = box[2] - left, box[3] - top
            shapes.paste(Image.blend(shapes.crop(box), grain.crop((0, 0, *size)), 0.15), box)
    shapes.save(path, "JPEG", quality=88)


def make_pictures(place, images, photos):
    """The world, and the same with photographs in the place of its first pictures."""
    from samer.data import flickr
    from samer.world.write import write_world

    write_world(place / "world", {"test": images})
    write_world(place / "photos", {"test": photos})
    paths = [record.image_path for record in flickr.load_split(place / "photos", "test", boxes=False)]
    for number, path in enumerate(paths):
        if number < DISTINCT:
            write_photo(path, *PHOTO, number)
        else:
            shutil.copyfile(paths[number % DISTINCT], path)


def one(stage, checkout, place):
    """One run of a stage with the code of a checkout, in a process of its own."""
    # this file as a module of no folder: a script would put its own checkout before the other
    code = (
        "import importlib.util, sys; sys.path.insert(0, sys.argv[1]); "
        "found = importlib.util.spec_from_file_location('scripts.bench_here', sys.argv[2]); "
        "module = importlib.util.module_from_spec(found); found.loader.exec_module(module); module.main(sys.argv[3:])"
    )
    words = [sys.executable, "-c", code, str(checkout), __file__, "--stage", stage, "--place", str(place)]
    done = subprocess.run(words, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{stage} with {checkout}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def tables(rows):
    """Rows as a table in Markdown."""
    lines = ["| stage | code | seconds | outside | busy | per second | ratio |", "|---|---|---|---|---|---|---|"]
    for stage, found in rows.items():
        for code, values in found.items():
            share = lambda value: "" if value is None else f"{100 * value:.1f} %"
            ratio = f"{values['rate'] / found['before']['rate']:.2f}" if code == "after" and "before" in found else ""
            cells = stage, code, f"{values['seconds']:.2f}", share(values["outside"]), share(values["busy"])
            lines.append("| " + " | ".join((*cells, f"{values['rate']:.1f}", ratio)) + " |")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="", help="a checkout whose code is measured beside this one's")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="some of them (all)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each, after one that is not (5)")
    parser.add_argument("--images", type=int, default=600, help="pictures of the world (600)")
    parser.add_argument("--photos", type=int, default=48, help="photographs (48)")
    parser.add_argument("--json", default="", help="file for the figures")
    parser.add_argument("--markdown", default="", help="file for the table")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)  # what a process of its own does
    parser.add_argument("--place", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.stage:
        function, source = STAGES[options.stage]
        with tempfile.TemporaryDirectory(dir=options.place) as out, contextlib.redirect_stdout(sys.stderr):
            last = 1 if options.stage == "decode, one thread" else 0 if function is decode else Path(out)
            found = function(Path(options.place), source, last)
        print(json.dumps(found))
        return found
    codes = {**({"before": Path(options.before).resolve()} if options.before else {}), "after": ROOT}
    with tempfile.TemporaryDirectory() as place:
        make_pictures(Path(place), options.images, options.photos)
        rows = {}
        for stage in options.stages:
            times = {code: [] for code in codes}
            for turn in range(options.runs + 1):
                for code, checkout in codes.items():
                    found = one(stage, checkout, place)
                    times[code] += [found] if turn else []
            middle = lambda runs, key: None if runs[0][key] is None else statistics.median(each[key] for each in runs)
            rows[stage] = {code: {key: middle(runs, key) for key in KEYS} for code, runs in times.items()}
            print("\n".join(tables({stage: rows[stage]})[0 if len(rows) == 1 else 2 :]), flush=True)
    about = {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg(), "runs": options.runs}
    if options.json:
        Path(options.json).write_text(json.dumps({"about": about, "stages": rows}, indent=1) + "\n")
    if options.markdown:
        Path(options.markdown).write_text("\n".join(tables(rows)) + "\n")
    return rows


if __name__ == "__main__":
    run(main)
