"""Remakes the small retriever in assets/retriever: a ColPali of the real classes, pretrained on generated pages.

python scripts/pretrain.py --out assets/retriever        (about 45 minutes on one core)
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse
from functools import partial
from pathlib import Path

from samer.runtime.commands import run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for model, processor and tokenizer")
    parser.add_argument("--steps", type=int, default=2000, help="batches of 32 pages (2000)")
    parser.add_argument("--pages", type=int, default=10000, help="how many pages to draw from (10000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    from samer.world.pretrain import pretrain

    metrics = pretrain(
        Path(options.out),
        steps=options.steps,
        groups=options.pages,
        seed=options.seed,
        log=partial(print, flush=True),
    )
    print(f"text to image R@1 {metrics['r@1']:.1f} on 500 held-out pages -> {options.out}")


if __name__ == "__main__":
    run(main)
