"""Reads everything that has a checksum under the given paths: indexes, feature stores, training runs, measurements.

With --data, a data set instead: every split and every picture, and all that is wrong with them in one report.

    python scripts/verify.py outputs/flickr_samer_k64 features/flickr_colpali checkpoints/samer_k64_colpali
    python scripts/verify.py outputs                                     (everything below it)
    python scripts/verify.py --data /data/coco                          (its kind is guessed; or --name coco)

Prints a line per path, and one per file that is damaged, missing or can't be read; exits with 1 if there is any, else
with 2 if a path can't be verified at all. Of a data set, the first 20 defects and how many there are. Changes nothing,
but that pages in parquet files are unpacked beside these, once.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse

from samer.runtime.commands import DATA_KINDS, run

SHOWN = 20  # defects of a data set


def verify_data(root, name):
    from samer.data.survey import survey

    found = survey(root, name)
    print(f"{root}: a data set of kind {found.name}", flush=True)
    for split, (images, captions, boxes) in found.splits.items():
        print(f"  {split}: {images:,} images, {captions:,} captions, {boxes:,} boxes", flush=True)
    for line in found.notes:
        print(f"  note: {line}", flush=True)
    first = f", the first {SHOWN}:" if len(found.defects) > SHOWN else ":" * bool(found.defects)
    print(f"{len(found.defects):,} defects{first}", flush=True)
    for line in found.defects[:SHOWN]:
        print(f"  {line}", flush=True)
    if found.defects:
        sys.exit(1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="a folder, or one file")
    parser.add_argument("--data", metavar="DIR", help="a data set's folder")
    parser.add_argument("--name", default="", help=DATA_KINDS)
    options = parser.parse_args(argv)
    if bool(options.paths) == bool(options.data) or (options.name and not options.data):
        parser.error("name paths, or a data set with --data; --name goes with --data")
    if options.data:
        verify_data(options.data, options.name)
        return
    from samer.config import InputError
    from samer.index.verify import verify

    damages, refused = 0, None
    for path in options.paths:
        try:
            found = verify(path)
        except InputError as error:  # the others are read all the same
            print(error, flush=True)
            refused = error
            continue
        verdict = f"{len(found.damages)} damaged, missing or unreadable:" if found.damages else "every checksum holds"
        print(f"{path}: {found.files:,} files, {found.bytes / 1e6:,.1f} MB read, {verdict}", flush=True)
        for line in found.damages:
            print(f"  {line}", flush=True)
        damages += len(found.damages)
    if damages:
        sys.exit(1)
    if refused is not None:
        raise refused


def command():
    run(main)


if __name__ == "__main__":
    command()
