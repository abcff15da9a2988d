"""Finds the layers that SAP's second version reads of a model, by how much of the scores their choice retains.

    python scripts/layers.py --data-root /data/flickr30k_entities --split train model.name=vidore/colpali-v1.3-hf

Prints the retention of every layer, the mean over pairs of an image and a caption of it, and the line to give where
merge.compressor is sap-mean or sap-max. A model of which some layers see a window only has those left out, and the
others numbered from 0. It reads pictures: a feature store holds the attention of the middle layers alone.
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
    parser.add_argument("--data-root", required=True, help="a data set's folder; boxes are not read")
    parser.add_argument("--reader", help=DATA_KINDS)
    parser.add_argument("--split", help="of the data set (data.train_split: train)")
    parser.add_argument("--pairs", type=int, default=500, help="how many, the first of the split (500, as published)")
    parser.add_argument("--adapter-path", default="", help="trained projector: folder or hub id; empty: untouched")
    parser.add_argument("--batch-size", type=int, default=8, help="images per forward pass (8)")
    add_compute_options(parser, "--dtype")
    parser.add_argument("--config", help="YAML file with model settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. model.name=assets/retriever")
    options = parser.parse_args(argv)
    if options.pairs < 1 or options.batch_size < 1:
        parser.error("--pairs and --batch-size must be at least 1")
    from samer.data import make_reader
    from samer.data.pictures import limit_pixels
    from samer.features.read import open_encoder
    from samer.index.settings import adapter_config
    from samer.retrievers.retention import anchor_layers, first_pairs, retention_curve

    config = adapter_config(options.adapter_path, options.config, options.overrides)
    data, model, root = config.data, config.model, options.data_root
    limit_pixels(data.max_megapixels)
    split = options.split or data.train_split
    records = make_reader(options.reader or data.name, root).load_split(root, split, boxes=False, strict=data.strict)
    records = first_pairs(records, options.pairs)
    encoder = open_encoder(
        model.name,
        compute_device(options),
        dtype=compute_dtype(options),
        adapter_path=options.adapter_path,
        local_files_only=model.local_files_only,
        revision=model.revision,
    )
    curve = retention_curve(encoder, records, options.batch_size)
    first, last = anchor_layers(curve)
    pairs = sum(len(record.captions) for record in records)
    print(f"{encoder.name}, {split} of {root}: score retention over {pairs:,} pairs of {len(records):,} images")
    for layer, value in enumerate(curve):
        print(f"  layer {layer:2}: {value:.4f}{'  read' if first <= layer <= last else ''}")
    print(f"merge.sap_layers={first}-{last}")
    return curve, (first, last)


def command():
    run(main)


if __name__ == "__main__":
    command()
