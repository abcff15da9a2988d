"""The evidence on photographs: a retriever of two towers, every compressor, the same training. See bash/photos.sh.

bash bash/photos.sh /data/flickr30k_entities                  (results in outputs/photos; hours, said beforehand)
bash bash/photos.sh DATA_ROOT --vision DIR --text DIR --sizes 224 --seeds 0

One half of train aligns the towers, the other trains projectors; val picks the retriever's epoch, test is measured.
With --cutouts and --backgrounds all of it is done on collages as well, with a retriever of their own: there objects
have the sizes that were asked for, while photographs are as they are. Run again, it goes on where it stopped.
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
CONFIG = ROOT / "configs" / "photos.yaml"
MANY = 512  # patches, from which on only the main rows are compared
MAIN = ("none", "samer", "querybank", "kmeans", "hpool", "sap-mean", "grid", "random")
SCENES = ("--train", "1600", "--val", "100", "--test", "400")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_root", help="photographs in Flickr30k-Entities layout, with boxes: train, val, test")
    parser.add_argument("--out", default="outputs/photos", help="folder for everything (outputs/photos)")
    parser.add_argument("--vision", help="vision tower, a hub id or a folder (facebook/dinov2-small)")
    parser.add_argument("--text", help="text tower, likewise (sentence-transformers/all-MiniLM-L6-v2)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 448], help="pixels of a picture's side (224 448)")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"], help="of the trained rows (0 1 2)")
    parser.add_argument("--sections", nargs="+", default=[], help="of scripts/compare.py (all)")
    parser.add_argument("--cutouts", nargs="+", default=[], help="folders of cut-outs with names, for collages")
    parser.add_argument("--backgrounds", nargs="+", default=[], help="folders of photographs behind them")
    parser.add_argument("--align", nargs="+", default=[], metavar="section.key=value", help="e.g. align.epochs=5")
    options = parser.parse_args(argv)
    if bool(options.cutouts) != bool(options.backgrounds):
        parser.error("--cutouts and --backgrounds go together")
    out, tables = Path(options.out), []
    for size in options.sizes:
        tables.append(evidence(out / "photographs" / str(size), options.data_root, size, options))
    if options.cutouts:
        from scripts import collage

        scenes = out / "collages" / "scenes"
        words = ("--out", scenes, "--cutouts", *options.cutouts, "--backgrounds", *options.backgrounds, *SCENES)
        step("collages", collage, *words)
        for size in options.sizes:
            tables.append(evidence(out / "collages" / str(size), scenes, size, options))
    print("\n" + "\n".join(f"tables: {table}" for table in tables))
    return tables


def evidence(place, data_root, size, options):
    """A retriever for pictures of that size, what it gives, and the comparison; returns the page of tables."""
    from samer.retrievers.hf import Retriever
    from scripts import align, compare, features

    retriever, aligned, store = place / "retriever", place / "features", place / "compare"
    towers = [f"towers.{name}={value}" for name in ("vision", "text") if (value := getattr(options, name))]
    config = ROOT / "configs" / ("towers_448.yaml" if size > 336 else "towers_224.yaml")
    words = [f"data.root={data_root}", "data.train_split=train[:50%]", f"align.output_dir={retriever}", *options.align]
    step(f"align the towers, {size} pixels", align, "--config", config, f"towers.image_size={size}", *towers, *words)
    words = ("--data-root", data_root, "--dtype", "float16", "--phrases")
    own = ("--out", retriever / "features", *words, f"model.name={retriever / 'towers'}")
    step("what the towers give for all splits, once", features, *own)
    words = ("--out", aligned, "--towers", retriever / "features", *words, f"model.name={retriever}")
    step("what the adapters make of it", features, *words)
    rows, columns = Retriever.load(str(retriever)).grid
    words = ["--data-root", data_root, "--out", store, "--features", aligned, "--config", CONFIG]
    words += [f"model.name={retriever}", f"merge.num_regions={max(1, rows * columns // 16)}"]
    words += ["--seeds", *options.seeds, *(["--sections", *options.sections] if options.sections else [])]
    if rows * columns > MANY:
        words += ["--methods", *MAIN, "--budgets", *(rows * columns // share for share in (16, 32, 64))]
    step("compare", compare, *words)
    return store / "results.md"


def step(title, script, *words):
    """Runs an entry point as the line that is printed would."""
    name = script.__name__.split(".")[-1]
    print(
        f"\n== {title}, {time.strftime('%H:%M')}\n   python scripts/{name}.py {' '.join(map(str, words))}", flush=True
    )
    return script.main([str(word) for word in words])


def command():
    run(main)


if __name__ == "__main__":
    command()
