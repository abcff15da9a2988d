"""Computes the frozen hidden states of images and captions once, for training, caching and evaluation to read.

    python scripts/features.py --data-root /data/flickr30k_entities --out features/colpali --splits train val test
    torchrun --nproc-per-node 4 scripts/features.py ...

Everything before the projection is frozen, so this replaces every later pass through the backbone: give the folder to
training as data.features=DIR and to scripts/cache.py as --features DIR. Says what it will take and checks the disk
first (Flickr30k-Entities with ColPali: about 130 GB in bfloat16, half in int8); run again, it goes on where it stopped.
scripts/verify.py reads a finished store and compares every checksum. --phrases adds the annotated phrases that have
boxes ("brown dog"), which scripts/compare.py asks as a second set of queries.
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

from samer.runtime.commands import (
    DATA_KINDS,
    add_compile_option,
    add_compute_options,
    compute_device,
    compute_dtype,
    run,
    split_words,
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the store")
    parser.add_argument("--data-root", required=True, help="the data set's folder; boxes are read for --phrases")
    parser.add_argument("--reader", help=DATA_KINDS)
    parser.add_argument("--splits", nargs="+", default=["train", "val", "test"], help="default: train val test")
    parser.add_argument("--batch-size", type=int, default=32, help="images and captions per forward pass (32)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 or int8; default: as the model computes")
    parser.add_argument("--limit-images", type=int, help="the first so many images of each split")
    parser.add_argument("--towers", help="store of the towers' outputs (scripts/align.py), for a tower retriever")
    parser.add_argument("--phrases", action="store_true", help="also of boxed phrases, which scripts/compare.py asks")
    parser.add_argument(
        "--no-signals", action="store_true", help="without the attention that SAP compressors ask for: quicker"
    )
    add_compute_options(parser, "--compute-dtype")
    add_compile_option(parser)
    parser.add_argument("--config", help="YAML file with model settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. model.name=assets/retriever")
    options = parser.parse_args(argv)
    splits, overrides = split_words(parser, options.splits, options.overrides)
    import torch

    from samer.config import load_config

    config = load_config(options.config, overrides)
    device = compute_device(options)
    from samer.data.pictures import limit_pixels
    from samer.features.read import open_encoder
    from samer.features.write import write_features
    from samer.runtime.processes import print0, process_group

    limit_pixels(config.data.max_megapixels)

    with process_group():
        retriever = open_encoder(
            config.model.name,
            device,
            local_files_only=config.model.local_files_only,
            revision=config.model.revision,
            dtype=torch.float32 if options.towers else compute_dtype(options),  # the adapters' own
            reduce=config.reduce,
        )
        if options.towers:
            from samer.features.towers import StoredTowers

            retriever = StoredTowers.open(retriever, options.towers)
        if options.compile:
            retriever.compile()
        entries = write_features(
            options.out,
            options.data_root,
            splits,
            retriever,
            batch_size=options.batch_size,
            dtype=options.dtype or retriever.origin["computed_in"].split()[0],
            limit_images=options.limit_images,
            reader=options.reader or config.data.name,
            strict=config.data.strict,
            phrases=options.phrases,
            signals=not options.no_signals,
        )
        for split, entry in entries.items():
            images, texts = (sum(shard.count for shard in shards) for shards in (entry.images, entry.texts))
            print0(f"{split}: {images:,} images, {texts:,} distinct texts -> {Path(options.out) / split}")
    return entries


def command():
    run(main, shared=True)


if __name__ == "__main__":
    command()
