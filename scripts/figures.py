"""Draws the pictures of the README.

python scripts/figures.py --out assets
"""

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samer.runtime.commands import run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="assets", help="folder (assets)")
    parser.add_argument("--retriever", default="assets/retriever", help="whose regions are shown")
    options = parser.parse_args(argv)
    from samer.retrievers.hf import Retriever
    from samer.world.figure import architecture_figure

    path = Path(options.out) / "architecture.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    architecture_figure(Retriever.load(options.retriever)).save(path, optimize=True)
    print(f"-> {path}")


if __name__ == "__main__":
    run(main)
