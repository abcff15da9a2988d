"""Makes a searchable index of a folder of pictures, and keeps it as the folder is; captions are not needed.

    python scripts/index.py --images ~/Pictures --cache-dir outputs/pictures --adapter-path checkpoints/samer_k64
    python scripts/index.py --images ~/Pictures --cache-dir outputs/pictures   (again: what is new or changed)
    python scripts/index.py --cache-dir outputs/pictures --sync      (the same folder; what is gone is taken out)
    python scripts/index.py --cache-dir outputs/pictures --delete trips/a.jpg ~/Pictures/b.jpg
    python scripts/index.py --cache-dir outputs/pictures --compact   (after much adding and deleting)
    python scripts/index.py --cache-dir outputs/pictures --metadata pages.csv      (columns for search's --filter)
    python scripts/index.py --images s3://bucket/pages --cache-dir /shared/pages --engine ray   (all GPUs of a cluster)
    python scripts/index.py --images pages.parquet --cache-dir outputs/all/part-00003 --part 3/100   (one of many jobs)
    python scripts/index.py --cache-dir outputs/all --merge-indexes outputs/all/part-*   (of separate jobs)

Model, projector, merge and dtype are chosen when an index is made; from then on it answers for itself, and what is
asked for otherwise is refused. merge.compressor=querybank needs a query bank then: --bank, or bank.safetensors beside
the projector. A folder that was moved is named as --images: its pictures stay if they are the same.
Pictures are found in subfolders too; what can't be read is skipped, counted at the end, and listed in --skipped FILE.
Interrupted, it goes on where it stopped, in steps of 256 pictures. A picture that was taken out but is still in the
folder comes back when the folder is indexed again. Deleting notes rows and adding writes new files, so an index that
changes for long grows and slows down; --compact makes it as small as a new one. Search with scripts/search.py.

--images may also be parquet files (column image, and id), tar files of webdataset, a folder that holds either, or an
address in object storage. Of these, and with --engine or --part, a fixed set is indexed: run again, it goes on, and
what changed there is made anew. --engine ray joins the cluster that RAY_ADDRESS names, whose machines share the index's
folder, or starts one on this machine.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse
import os
import time

from samer.runtime.commands import add_also_computed_in, add_compile_option, add_compute_options, compute_device, run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", required=True, help="the index; made if missing")
    parser.add_argument("--images", help="folder of pictures; with --sync the index's own if not given")
    parser.add_argument("--sync", action="store_true", help="also take out what is gone from the folder")
    parser.add_argument("--skipped", metavar="FILE", help="where to list what was not taken, and why")
    parser.add_argument(
        "--delete", nargs="+", metavar="PICTURE", help="take pictures out, by path; -: a path a line of standard input"
    )
    parser.add_argument(
        "--metadata", metavar="FILE", help=".jsonl, .csv or .parquet: what a search may filter by, a row an id"
    )
    parser.add_argument("--compact", action="store_true", help="rewrite the index without deleted pictures")
    parser.add_argument("--merge-indexes", nargs="+", metavar="INDEX", help="join indexes that were made alike")
    parser.add_argument("--adapter-path", default="", help="trained projector: folder or hub id; empty: untouched")
    parser.add_argument("--cache-dtype", help="int8 (default), binary, bfloat16, float16 or float32")
    parser.add_argument(
        "--assignments", action=argparse.BooleanOptionalAction, help="keep each patch's region, a byte each (default)"
    )
    parser.add_argument("--bank", default="", help="query bank for merge.compressor=querybank (scripts/bank.py)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per forward pass (32)")
    parser.add_argument("--engine", choices=["process", "ray"], help="who works: this process (default), or Ray's")
    parser.add_argument("--workers", type=int, help="of --engine ray (one a GPU)")
    parser.add_argument(
        "--part", help="K/N: only the Kth of N parts, in an index of its own; --merge-indexes joins them"
    )
    add_compute_options(parser, "--dtype")
    add_compile_option(parser)
    add_also_computed_in(parser)
    parser.add_argument("--config", help="YAML file with model and merge settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. merge.num_regions=32")
    options = parser.parse_args(argv)
    jobs = bool(options.images or options.sync), bool(options.delete), options.compact, bool(options.merge_indexes)
    if sum(jobs) > 1 or not (any(jobs) or options.metadata) or not options.cache_dir:
        told = "--images FOLDER, --sync, --delete PICTURE ..., --compact, --merge-indexes INDEX ..., or --metadata FILE"
        parser.error(f"give --cache-dir INDEX and either {told}")
    if stray := [word for word in options.overrides if "=" not in word]:
        parser.error(f"{stray[0]!r}: --images takes one folder, all of whose pictures are indexed")
    if options.images or options.sync:
        summary = (index_fixed if is_fixed(parser, options) else index_folder)(options)
        if options.metadata:
            give_metadata(options)
        return summary
    if options.merge_indexes:
        return join_indexes(options)
    if options.metadata and not any(jobs):
        return give_metadata(options)
    from samer.index.names import picture_ids
    from samer.index.pictures import FOLDER_SPLIT, compact_images, delete_images

    if options.compact:
        saved = compact_images(options.cache_dir, FOLDER_SPLIT)
        print(f"compacted {options.cache_dir}: {saved / 1e6:,.1f} MB less on disk")
        return saved
    words = [name for word in options.delete for name in (lines() if word == "-" else [word])]
    ids = picture_ids(options.cache_dir, FOLDER_SPLIT, words)
    left = delete_images(options.cache_dir, FOLDER_SPLIT, ids)
    print(f"taken out of {options.cache_dir}: {len(ids)}; it holds {left:,}")
    return left


def is_fixed(parser, options):
    """Whether a fixed set of pictures is to be indexed, rather than a folder followed."""
    from samer.data.sources import is_bulk

    asked = [f"--{name}" for name in ("engine", "workers", "part") if getattr(options, name)]
    fixed = bool(asked) or bool(options.images and is_bulk(options.images))
    if fixed and options.sync:
        parser.error(f"--sync follows a folder of pictures; leave {asked[0] if asked else 'it'} out")
    if fixed and options.also_computed_in:
        parser.error("--also-computed-in is for a folder that is followed; a fixed set is computed in one dtype")
    if options.workers and options.engine != "ray":
        parser.error("--workers are those of --engine ray")
    return fixed


def asked_of(options):
    """What the command line says of the index."""
    from samer.index.settings import Asked

    made = options.adapter_path, options.config, options.overrides, options.cache_dtype, options.assignments
    return Asked(*made, options.computed_in, options.also_computed_in)


def index_fixed(options):
    """Makes the index of a fixed set of pictures, by one process or by many."""
    from contextlib import nullcontext

    from samer.index.bulk import InProcess, Task, index_source
    from samer.index.cluster import OnRay
    from samer.index.manifest import describe
    from samer.index.parts import part_named
    from samer.index.sync import NothingReadable, skipped_lines, write_skipped

    part = part_named(options.part) if options.part else (1, 1)
    asked = asked_of(options)
    task = Task(
        folder=os.path.abspath(options.cache_dir),
        asked=asked,
        bank=options.bank,
        batch_size=options.batch_size,
        device=options.device,
        threads=options.threads,
        compiled=options.compile,
        home=os.getcwd(),
    )
    with OnRay(options.workers) if options.engine == "ray" else nullcontext(InProcess()) as engine:
        try:
            summary, skipped = index_source(options.images, task, engine, part)
        except NothingReadable as error:
            if options.skipped:
                write_skipped(options.skipped, error.skipped)
            raise
    if options.skipped:
        write_skipped(options.skipped, skipped)
    for line in [describe(summary, options.cache_dir), *skipped_lines(skipped)]:
        print(line)
    return summary


def index_folder(options):
    """Makes the index what the folder of pictures is; what is gone stays unless --sync is given."""
    from samer.config import InputError
    from samer.data.pictures import SUFFIXES, find_pictures, limit_pixels
    from samer.index.banks import bank_for
    from samer.index.manifest import describe
    from samer.index.settings import settings_for
    from samer.index.sync import NothingReadable, update_images, write_skipped

    asked = asked_of(options)
    settings = settings_for(options.cache_dir, asked, "int8")
    limit_pixels(settings.config.data.max_megapixels)
    found = find_pictures(options.images or settings.pictures())
    if options.skipped:
        write_skipped(options.skipped, found.skipped)  # a place that can't be written is told before the work
    if not found.paths:
        why = f"; of {len(found.skipped):,} skipped the first: {found.skipped[0].detail}" if found.skipped else ""
        raise InputError(f"{found.root}: no pictures in it (looked for {', '.join(sorted(SUFFIXES))}){why}")
    device = compute_device(options)
    encoder = settings.open(device, compiled=options.compile)
    bank = bank_for(settings, encoder, options.bank)
    for note in settings.notes:
        print("note:", note)
    print(f"{len(found.paths):,} pictures under {found.root}; writing the index to {options.cache_dir}", flush=True)
    started = time.monotonic()
    how = {"batch_size": options.batch_size, "dtype": settings.dtype, "assignments": settings.assignments, "bank": bank}
    merge = settings.config.merge
    try:
        summary, changes = update_images(options.cache_dir, found, encoder, merge, **how, remove_gone=options.sync)
    except NothingReadable as error:
        if options.skipped:
            write_skipped(options.skipped, error.skipped)
        raise
    if options.skipped:
        write_skipped(options.skipped, changes.skipped)
    print(describe(summary, options.cache_dir) + f"; {time.monotonic() - started:.0f} s")
    for line in changes.lines():
        print(line)
    return summary


def give_metadata(options):
    """Gives the images of an index their metadata, in place of what they had."""
    from samer.index.columns import give_columns

    split, known, unknown = give_columns(options.cache_dir, options.metadata)
    print(f"metadata of {known:,} images of {split}" + (f"; {unknown:,} rows name none" if unknown else ""))
    return known


def join_indexes(options):
    """Makes one index of several."""
    from samer.index.manifest import describe
    from samer.index.merge import merge_indexes

    summaries = merge_indexes(options.cache_dir, options.merge_indexes)
    for summary in summaries:
        print(describe(summary, options.cache_dir))
    return summaries


def lines():
    """Lines of standard input that are not empty, as paths."""
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line.strip()]


def command():
    run(main)


if __name__ == "__main__":
    command()
