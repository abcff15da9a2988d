"""Measures a SEPS model: every caption against every picture, both directions, R@1, R@5, R@10 and rSum.

    python scripts/seps_eval.py --model runs/f30k_vit --data-root data/f30k --split test --out outputs/f30k
    python scripts/seps_eval.py --model runs/coco_vit --data-root data/coco --split testall --folds 5 --out coco
    torchrun --nproc-per-node 8 scripts/seps_eval.py --model runs/coco_vit --data-root data/coco --split testall ...

A pair's score needs both sides, so nothing is indexed: COCO 5K is 125,000,000 pairs, with ViT-224 and d = 512 about 13
hours of one CPU core (0.4 ms a pair), 18 with dense text. They are scored in blocks of pictures, which lie in --out, so
a run that was stopped goes on; the time that is left is shown. --folds 5 is COCO 1K, the means of five folds. A model
trained with seps.dense=query needs the dense texts of the answers: a leak, and metrics.json says so.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse

from samer.runtime.commands import add_compute_options, compute_device, run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that scripts/seps_train.py wrote")
    parser.add_argument("--data-root", required=True, help="the data set's folder")
    parser.add_argument("--split", default="test", help="that is measured (test)")
    parser.add_argument("--folds", type=int, default=1, help="parts that are asked each for itself (1)")
    parser.add_argument("--out", required=True, help="folder for metrics.json and the blocks of scores")
    add_compute_options(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="of data and train, e.g. data.dense=FILE"
    )
    options = parser.parse_intermixed_args(argv)
    device = compute_device(options)
    from pathlib import Path

    from samer.config import load_config
    from samer.data.pictures import limit_pixels
    from samer.runtime.processes import print0, process_group
    from samer.seps.evaluate import evaluate_folder, recalls
    from samer.seps.settings import SepsConfig

    config = load_config(None, [f"data.root={options.data_root}", *options.overrides], SepsConfig)
    limit_pixels(config.data.max_megapixels)
    with process_group():
        found = evaluate_folder(options.model, config, options.split, options.folds, Path(options.out), device)
        shown = ", ".join(f"{name} {value:.1f}" for name, value in recalls(found).items())
        leak = "; each text brought a description of its answer along, a leak" if found["leak"] else ""
        print0(f"{found['images']:,} images, {found['captions']:,} captions: {shown}{leak}")
    return found


def command():
    run(main, shared=True)


if __name__ == "__main__":
    command()
