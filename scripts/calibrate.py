"""Measures what AdaMerge's rate of merging is held against: how similar tokens usually are in each block of a tower.

    python scripts/calibrate.py --data-root /data/flickr30k_entities --out adamerge_r20.json \\
        model.name=checkpoints/towers_224 reduce.r=20
    python scripts/cache.py ... reduce.method=adamerge reduce.r=20 reduce.statistics=adamerge_r20.json

reduce.r is r_max, the most tokens that a block may merge in an image; statistics hold for one tower, one r_max and one
size of pictures. It passes over the pictures once without merging and twice (--passes) with it, as the paper recommends
(a third is said to oscillate); about as long as encoding them so often. Pictures are taken evenly from the split, a
hundredth of it unless --images says how many.
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
    parser.add_argument("--data-root", required=True, help="a data set's folder; neither boxes nor captions are read")
    parser.add_argument("--out", required=True, help="the file to write, JSON")
    parser.add_argument("--reader", help=DATA_KINDS)
    parser.add_argument("--split", help="of the data set (data.train_split: train)")
    parser.add_argument("--images", type=int, help="how many (a hundredth of the split, and at least 16)")
    parser.add_argument("--passes", type=int, default=2, help="with merging (2)")
    parser.add_argument("--batch-size", type=int, default=8, help="images per forward pass (8)")
    add_compute_options(parser, "--dtype")
    parser.add_argument("--config", help="YAML file with model settings")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. reduce.r=20 reduce.order=inverse"
    )
    options = parser.parse_args(argv)
    if options.batch_size < 1 or (options.images is not None and options.images < 1):
        parser.error("--images and --batch-size must be at least 1")
    from samer.config import load_config
    from samer.data import make_reader
    from samer.data.pictures import limit_pixels
    from samer.features.read import open_encoder
    from samer.reducers.calibration import calibrate, write_statistics
    from samer.runtime.progress import batched

    config = load_config(options.config, ["reduce.method=adamerge", *options.overrides])
    data, model, root = config.data, config.model, options.data_root
    limit_pixels(data.max_megapixels)
    split = options.split or data.train_split
    records = make_reader(options.reader or data.name, root).load_split(root, split, boxes=False, strict=data.strict)
    count = min(len(records), options.images or max(16, len(records) // 100))
    records = records[:: max(1, len(records) // count)][:count]
    where = {"local_files_only": model.local_files_only, "revision": model.revision}
    encoder = open_encoder(model.name, compute_device(options), dtype=compute_dtype(options), **where)
    batches = list(batched(records, options.batch_size))
    found = calibrate(encoder.tower, encoder.name, config.reduce, batches, encoder.see, options.passes)
    write_statistics(options.out, found)
    print(f"{len(records):,} images of {split}, {found.patches} patches, r_max {found.r_max:g}: {options.out}")
    for number, means in enumerate(found.history):
        print(f"  pass {number}: mean similarity by block", *(f"{value:.4f}" for value in means))
    return found


def command():
    run(main)


if __name__ == "__main__":
    command()
