"""Draws the pictures of the README.

python scripts/figures.py --out assets
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

from samer.runtime.commands import run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="assets", help="folder (assets)")
    parser.add_argument("--retriever", default="assets/retriever", help="whose regions are shown")
    options = parser.parse_args(argv)
    from samer.retrievers.hf import Retriever
    from samer.runtime.files import atomic_path, check_writable
    from samer.world.figure import architecture_figure

    path = Path(options.out) / "architecture.png"
    check_writable(path)
    picture = architecture_figure(Retriever.load(options.retriever))
    with atomic_path(path) as temporary:
        picture.save(temporary, "PNG", optimize=True)
    print(f"-> {path}")


if __name__ == "__main__":
    run(main)
