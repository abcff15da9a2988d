"""Draws the pictures of the README.

    python scripts/figures.py --out assets
    python scripts/figures.py --out assets --photos tests/fixtures/photos --retriever outputs/towers

The first draws architecture.png, the method around a generated scene; the second photo_regions.jpg and
photo_evidence.jpg: regions on photographs of a data set with boxes, and what the winning vectors of a phrase stand on.
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
    parser.add_argument("--photos", default="", help="folder of a data set in Flickr30k-Entities layout; draw these")
    parser.add_argument("--images", nargs="+", default=["1014", "1018", "1019", "1028"], help="ids, of any split")
    parser.add_argument("--regions", type=int, default=16, help="K (16)")
    options = parser.parse_args(argv)
    from samer.report.photographs import photograph_figures, photographs
    from samer.retrievers.hf import Retriever
    from samer.runtime.files import atomic_path, check_writable
    from samer.world.figure import architecture_figure

    names = ("photo_regions.jpg", "photo_evidence.jpg") if options.photos else ("architecture.png",)
    paths = [Path(options.out) / name for name in names]
    for path in paths:
        check_writable(path)
    if options.photos:
        records = photographs(options.photos, options.images)
        pictures = photograph_figures(Retriever.load(options.retriever), records, options.regions)
    else:
        pictures = [architecture_figure(Retriever.load(options.retriever))]
    for path, picture in zip(paths, pictures):
        with atomic_path(path) as temporary:
            kind = {"format": "PNG"} if path.suffix == ".png" else {"format": "JPEG", "quality": 88}
            picture.save(temporary, optimize=True, **kind)
        print(f"-> {path}")


if __name__ == "__main__":
    run(main)
