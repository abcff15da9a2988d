"""Computes what an index of a million images and more takes, and writes the page about it.

    python scripts/scale.py --out assets/SCALE.md
    python scripts/scale.py --images 5000000 --regions 32 --encoded 30      (your own, on your own GPU)

Bytes are measured by writing a shard; times are those of the page's table of sources, and can be said otherwise.
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
    parser.add_argument("--out", help="the page; without it, standard output")
    parser.add_argument(
        "--images", nargs="+", type=int, default=[10**6, 10**8, 10**10], help="how many (1 M 100 M 10 B)"
    )
    parser.add_argument("--regions", type=int, default=64, help="K (64)")
    parser.add_argument("--encoded", type=float, help="images a second that one GPU encodes (measured on an H200)")
    parser.add_argument("--cpu-scan", type=float, help="seconds of a query among a million images (on 2 cores)")
    options = parser.parse_args(argv)
    if min(options.images) < 1 or min(options.encoded or 1, options.cpu_scan or 1) <= 0:
        parser.error("--images, --encoded and --cpu-scan must be more than 0")
    from samer.report.scale import Measured, page
    from samer.runtime.files import atomic_path

    given = {"encoded": options.encoded, "cpu_scan": options.cpu_scan}
    text = page(options.images, options.regions, Measured(**{key: value for key, value in given.items() if value}))
    if not options.out:
        print(text, end="")
        return text
    with atomic_path(options.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"-> {options.out}")
    return text


def command():
    run(main)


if __name__ == "__main__":
    command()
