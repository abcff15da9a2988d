"""Measures what fewer tokens inside the vision tower cost in quality, alone and with the index merged; writes the page.

    python scripts/reduce.py --data-root /data/flickr30k_entities --out outputs/reduce model.name=checkpoints/towers_224
    python scripts/reduce.py --out outputs/reduce --page assets/results/reducers.md --speed outputs/speed_448.json

model.name is a tower retriever (scripts/align.py), or a ColPali, of which "tome, unmerged" and its like give the
language model all placeholders where "tome" gives it fewer. ToMe, AdaMerge (as published, its order inverted, one r for
a batch, with token sizes) and CubistMerge, at the shares of FLOPs of AdaMerge's table and at 25 and 50 %: r is found by
counting, AdaMerge calibrated at each on pictures of the train split. Measured are the cosine to the plain tower's
features, k-NN, and retrieval with all tokens and with SaMer's K. --tune trains the projection for one epoch on the
reduced tower's tokens of the second half of train, the half that the retriever was not aligned on, at --tune-tier;
--tune-tower trains the tower to give what it gave without (four times as long as encoding these images, a method).
Everything measured is kept in --out: run again, it goes on. Prints beforehand how many passes there are; one is as long
as encoding the images.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse
from pathlib import Path

from samer.runtime.commands import add_compute_options, compute_device, run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of everything measured")
    parser.add_argument("--data-root", help="a data set's folder, boxes for k-NN; left out with --page")
    parser.add_argument("--split", default="test", help="what is measured on (test)")
    parser.add_argument("--limit-images", type=int, help="the first so many images of it")
    parser.add_argument("--methods", nargs="+", default=[], help="by name (all but those unmerged)")
    parser.add_argument("--tiers", nargs="+", default=[], help="shares of FLOPs to save, e.g. 0.25 (all)")
    parser.add_argument("--regions", nargs="+", default=["64", "16", "4"], help="K of the index (64 16 4)")
    parser.add_argument(
        "--calibrate", type=int, default=35, help="pictures of train that AdaMerge is calibrated on (35)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images per forward pass (8)")
    parser.add_argument("--tune", action="store_true", help="also train the projection for an epoch, variants left out")
    parser.add_argument("--tune-tower", action="store_true", help="also train the tower itself for an epoch, likewise")
    parser.add_argument("--tune-tier", type=float, default=0.25, help="at this share of FLOPs saved (0.25)")
    parser.add_argument("--page", help="write the page from what is in --out, and measure nothing")
    parser.add_argument("--also", nargs="+", default=[], help="folders of other models' --out, for the page")
    parser.add_argument("--speed", nargs="+", default=[], help="files of scripts/bench.py reduce --json, for the page")
    add_compute_options(parser, "--dtype")
    parser.add_argument("--config", help="YAML file with model settings")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. model.name=checkpoints/towers_224"
    )
    options = parser.parse_args(argv)
    words = []
    for name, kind in (("methods", str), ("tiers", float), ("regions", int)):
        given = getattr(options, name)
        words += [word for word in given if "=" in word]  # overrides right behind a list
        try:
            setattr(options, name, [kind(word) for word in given if "=" not in word])
        except ValueError:
            parser.error(f"--{name} {' '.join(given)}: give numbers")
    if not options.page and not options.data_root:
        parser.error("give --data-root, or --page to write the page of what was measured")
    from samer.runtime.files import atomic_path, only_writer, read_json

    out = Path(options.out)
    if options.page:
        from samer.report.reducers import page

        results, *also = (read_json(Path(folder) / "results.json") for folder in (out, *options.also))
        text = page(results, [read_json(path) for path in options.speed], also)
        with atomic_path(options.page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"-> {options.page}")
        return results
    from samer.compare.reduction_run import measure_reduction
    from samer.config import load_config

    config = load_config(options.config, [*words, *options.overrides])
    with only_writer(out):
        return measure_reduction(config, options, compute_device(options))


def command():
    run(main)


if __name__ == "__main__":
    command()
