"""Writes the built-in world: generated scenes in Flickr30k-Entities layout.

python scripts/scenes.py --out outputs/world --train 1000 --val 100 --test 500
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse

from samer.runtime.commands import run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--train", type=int, default=1000, help="images (1000)")
    parser.add_argument("--val", type=int, default=100, help="images (100)")
    parser.add_argument("--test", type=int, default=500, help="images (500)")
    parser.add_argument("--style", default="outdoor", help="outdoor (default) or page")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    from samer.world.write import write_world

    counts = {"train": options.train, "val": options.val, "test": options.test}
    fresh = write_world(options.out, counts, style=options.style, seed=options.seed)
    total = sum(counts.values())
    print(f"{total:,} scenes with {5 * total:,} captions {'written to' if fresh else 'already in'} {options.out}")


if __name__ == "__main__":
    run(main)
