"""Makes the report of one or more indexes: metrics, and what the winning vectors stand on, in one HTML file.

    python scripts/report.py --data-root /data/flickr30k_entities --out report.html --split test \\
        --method "all tokens=outputs/none" "H-Pool=outputs/hpool" "SaMer=outputs/flickr_samer_k64"

The first method is the baseline, the last the one in question. Images are encoded again for the captions shown, with
--features from a store, so that evidence is what each vector was really made of; ranks are the indexes' own. The demo,
scripts/compare.py and scripts/eval.py make the same report.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse

from samer.runtime.commands import DATA_KINDS, add_compute_options, compute_device, compute_dtype, run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="the data set's folder; boxes are read where there are any")
    parser.add_argument("--reader", default="", help=DATA_KINDS)
    parser.add_argument("--out", required=True, help="the HTML file; pictures for papers go beside it")
    parser.add_argument("--method", nargs="+", required=True, metavar="NAME=CACHE_DIR", help="in the gallery and table")
    parser.add_argument(
        "--row", nargs="+", default=[], metavar="NAME=METRICS.json", help="by scripts/eval.py; in the table only"
    )
    parser.add_argument("--regions", nargs="+", default=[], metavar="NAME=CACHE_DIR", help="whose regions are drawn")
    parser.add_argument(
        "--sweep", nargs="*", metavar="NAME", help="measure grounding over the whole split, and NAMEs at all budgets"
    )
    parser.add_argument("--features", default="", help="feature store to read instead of images (scripts/features.py)")
    parser.add_argument("--model", default="", help="where the model is, if not where the indexes say")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--title", default="", help="heading of the report")
    parser.add_argument("--batch-size", type=int, default=32, help="images and captions per forward pass (32)")
    parser.add_argument("--max-megapixels", type=float, default=256.0, help="larger pictures are not read (256)")
    add_compute_options(parser, "--dtype")
    options = parser.parse_args(argv)
    methods, regions = pairs(parser, options.method, "CACHE_DIR"), pairs(parser, options.regions, "CACHE_DIR")
    rows = pairs(parser, options.row, "METRICS.json")
    device = compute_device(options)
    from samer.compare.indexes import Request, report_indexes
    from samer.data.pictures import limit_pixels

    limit_pixels(options.max_megapixels)
    asked = {name: getattr(options, name) for name in ("data_root", "reader", "split", "features", "model", "title")}
    asked |= {"rows": rows, "regions": regions, "curves": options.sweep, "batch_size": options.batch_size}
    asked["dtype"] = compute_dtype(options)
    files = report_indexes(options.out, Request(methods, **asked), device)
    print(f"-> {files[0]}" + (f", and {len(files) - 1} pictures in {files[1].parent}" if files[1:] else ""))
    return files


def pairs(parser, words, what):
    """(name, place) of every NAME=PLACE."""
    found = []
    for word in words:
        name, equals, place = word.partition("=")
        if not (name and equals and place):
            parser.error(f"{word!r}: expected NAME={what}")
        found.append((name, place))
    if len({name for name, _ in found}) < len(found):
        from samer.config import InputError

        raise InputError(f"{', '.join(words)}: give each name once")
    return found


def command():
    run(main)


if __name__ == "__main__":
    command()
