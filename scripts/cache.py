"""Builds the compressed index of one or more splits, without reading any box.

    python scripts/cache.py --data-root /data/flickr30k_entities --cache-dir outputs/flickr_samer_k64 \\
        --adapter-path checkpoints/samer_k64_colpali --splits val test
    torchrun --nproc-per-node 4 scripts/cache.py ...

Writes CACHE_DIR/manifest.json and, per split, shards of image and query tokens; run again, it goes on where it stopped.
An index that is there answers for its model, projector, merge and dtype; what is asked for otherwise is refused. For a
new one, without --adapter-path the retriever's own projection is used. Model and merge settings come from --config if
given, else from the adapter's config.json, else from the defaults; section.key=value overrides any of them.
merge.compressor=querybank takes its query bank from --bank, else from bank.safetensors beside the adapter, else makes
one of the captions of data.train_split; the index keeps it. --part 3/100, of a job array, takes the third of a hundred
parts of each split, in whole shards; scripts/index.py --merge-indexes joins such indexes to that of one job.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse

from samer.runtime.commands import (
    DATA_KINDS,
    add_also_computed_in,
    add_compile_option,
    add_compute_options,
    compute_device,
    run,
    split_words,
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="the data set's folder; boxes are not read")
    parser.add_argument("--reader", help=DATA_KINDS)
    parser.add_argument("--cache-dir", required=True, help="where the index goes")
    parser.add_argument("--adapter-path", default="", help="trained projector: folder or hub id; empty: untouched")
    parser.add_argument("--splits", nargs="+", default=["val", "test"], help="default: val test")
    parser.add_argument("--batch-size", type=int, default=32, help="images and captions per forward pass (32)")
    parser.add_argument("--cache-dtype", help="bfloat16 (default), float32, float16, int8 or binary")
    parser.add_argument(
        "--assignments", action=argparse.BooleanOptionalAction, help="keep each patch's region, a byte each (default)"
    )
    parser.add_argument("--limit-images", type=int, help="the first so many images of each split")
    parser.add_argument("--part", help="K/N: only the Kth of N parts of each split, in an index of its own")
    parser.add_argument("--features", default="", help="feature store to read instead of images (scripts/features.py)")
    parser.add_argument("--bank", default="", help="query bank for merge.compressor=querybank (scripts/bank.py)")
    add_compute_options(parser, "--dtype")
    add_compile_option(parser)
    add_also_computed_in(parser)
    parser.add_argument("--config", help="YAML file with model and merge settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. merge.num_regions=32")
    options = parser.parse_args(argv)
    splits, overrides = split_words(parser, options.splits, options.overrides)
    if not options.cache_dir:
        parser.error("--cache-dir is empty; name the index")
    from samer.data.pictures import limit_pixels
    from samer.index.banks import bank_for
    from samer.index.manifest import describe
    from samer.index.parts import part_named
    from samer.index.settings import Asked, settings_for
    from samer.index.write import build_index
    from samer.runtime.processes import print0, process_group

    part = part_named(options.part) if options.part else None
    made = options.adapter_path, options.config, overrides, options.cache_dtype, options.assignments
    asked = Asked(*made, options.computed_in, options.also_computed_in)
    settings = settings_for(options.cache_dir, asked, "bfloat16")
    limit_pixels(settings.config.data.max_megapixels)
    device = compute_device(options)
    with process_group():
        retriever = settings.open(device, options.features, options.compile)
        for note in settings.notes:
            print0("note:", note)
        print0(f"writing the index to {options.cache_dir} ({settings.projector_words()})")
        summaries = build_index(
            options.cache_dir,
            options.data_root,
            splits,
            retriever,
            settings.config.merge,
            batch_size=options.batch_size,
            dtype=settings.dtype,
            limit_images=options.limit_images,
            assignments=settings.assignments,
            reader=options.reader or settings.config.data.name,
            strict=settings.config.data.strict,
            bank=bank_for(settings, retriever, options.bank),
            bank_split=settings.config.data.train_split,
            part=part,
        )
        for line in [*(describe(summary, options.cache_dir) for summary in summaries), *retriever.notes]:
            print0(line)
    return summaries


def command():
    run(main, shared=True)


if __name__ == "__main__":
    command()
