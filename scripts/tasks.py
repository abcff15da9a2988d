"""Runs retrieval tasks of MTEB with one retriever at one budget, and reports scores beside vectors, bytes and seconds.

    python scripts/tasks.py --data-root /data/vidore/docvqa --cache-dir outputs/mteb merge.num_regions=64
    python scripts/tasks.py --tasks Vidore3HrRetrieval --cache-dir outputs/mteb --adapter-path checkpoints/samer_k64
    DATA_ROOT=/data/flickr30k_entities bash bash/mteb.sh

--data-root names data on this machine (ViDoRe, Flickr30k, COCO, any kind that is read here) and needs no network;
--tasks names tasks of MTEB, whose data MTEB fetches unless it has it. Needs the extra `mteb`. Each task's index stays
in CACHE_DIR, MTEB's result files and results.json in CACHE_DIR/results; run again, what is there is not made anew.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse

from samer.runtime.commands import add_compute_options, compute_device, run, split_words


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", help="a data set's folder; boxes are not read")
    parser.add_argument("--reader", default="", help="kind of data set at --data-root (guessed)")
    parser.add_argument("--splits", nargs="+", default=["test"], help="of --data-root; default: test")
    parser.add_argument("--main-score", default="ndcg_at_10", help="of --data-root (ndcg_at_10; ViDoRe 1, 2 ndcg_at_5)")
    parser.add_argument("--limit-images", type=int, help="of --data-root: the first so many of each split")
    parser.add_argument("--tasks", nargs="+", default=[], help="tasks of MTEB by name")
    parser.add_argument("--cache-dir", required=True, help="where indexes and results go")
    parser.add_argument("--adapter-path", default="", help="trained projector: folder or hub id; empty: untouched")
    parser.add_argument("--batch-size", type=int, default=8, help="images and queries per forward pass (8)")
    parser.add_argument("--cache-dtype", default="bfloat16", help="bfloat16 (default), float32, float16, int8, binary")
    parser.add_argument("--bank", default="", help="query bank for merge.compressor=querybank (scripts/bank.py)")
    add_compute_options(parser, "--dtype")
    parser.add_argument("--config", help="YAML file with model and merge settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. merge.num_regions=32")
    options = parser.parse_args(argv)
    splits, overrides = split_words(parser, options.splits, options.overrides)
    overrides += [word for word in options.tasks if "=" in word]  # argparse takes what follows --tasks for one
    names = [word for word in options.tasks if "=" not in word]
    if not (options.data_root or names):
        parser.error("nothing to run: give --data-root, or --tasks")
    device = compute_device(options)
    from samer.config import InputError
    from samer.data.pictures import limit_pixels
    from samer.index.banks import bank_for
    from samer.index.settings import Asked, settings_for

    try:
        from samer.mteb import LocalTask, SamerSearch, evaluate, named_tasks, told
    except ImportError as error:
        raise InputError(str(error)) from None
    asked = Asked(options.adapter_path, options.config, overrides, options.cache_dtype, computed_in=options.computed_in)
    settings = settings_for(options.cache_dir, asked, "bfloat16")
    limit_pixels(settings.config.data.max_megapixels)
    tasks = named_tasks(names)
    if options.data_root:
        own = {"reader": options.reader or settings.config.data.name, "main_score": options.main_score}
        own["limit_images"] = options.limit_images
        tasks += [LocalTask(options.data_root, split, **own) for split in splits]
    retriever = settings.open(device)
    for note in settings.notes:
        print("note:", note)
    bank = bank_for(settings, retriever, options.bank)
    making = {"dtype": settings.dtype, "batch_size": options.batch_size, "bank": bank}
    search = SamerSearch(retriever, settings.config.merge, options.cache_dir, **making)
    rows = evaluate(search, tasks, f"{options.cache_dir}/results")
    for row in rows:
        print(told(row))
    print(f"-> {options.cache_dir}/results/results.json")
    return rows


def command():
    run(main)


if __name__ == "__main__":
    command()
