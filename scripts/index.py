"""Makes or extends a searchable index of a folder of pictures; captions are not needed.

    python scripts/index.py --images ~/Pictures --cache-dir outputs/pictures --adapter-path checkpoints/samer_k64
    python scripts/index.py --images ~/Pictures --cache-dir outputs/pictures ...      (again: new pictures are added)
    python scripts/index.py --cache-dir outputs/pictures --delete trips/a.jpg
    python scripts/index.py --cache-dir outputs/pictures --compact    (after much adding and deleting)

Pictures are found in subfolders too; a file that can't be read is skipped and listed at the end. Interrupted, it goes
on where it stopped, in steps of 256 pictures. A picture that was taken out but is still in the folder comes back when
the folder is indexed again. Deleting notes rows and adding writes new files, so an index that changes for long grows
and slows down; --compact makes it as small as a new one. Search with scripts/search.py.
"""

import argparse
import sys
import time
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samer.data.pictures import find_pictures
from samer.runtime.commands import adapter_config, add_compute_options, compute_device, run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", required=True, help="the index; made if missing")
    parser.add_argument("--images", help="folder of pictures")
    parser.add_argument("--delete", nargs="+", metavar="PICTURE", help="take pictures out, by path under the folder")
    parser.add_argument("--compact", action="store_true", help="rewrite the index without deleted pictures")
    parser.add_argument("--adapter-path", default="", help="trained projector: folder or hub id; empty: untouched")
    parser.add_argument("--cache-dtype", default="int8", help="int8 (default), binary, bfloat16, float16 or float32")
    parser.add_argument("--assignments", action="store_true", help="keep each patch's region, a byte each")
    parser.add_argument("--batch-size", type=int, default=32, help="images per forward pass (32)")
    add_compute_options(parser)
    parser.add_argument("--config", help="YAML file with model and merge settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. merge.num_regions=32")
    options = parser.parse_args(argv)
    if bool(options.images) + bool(options.delete) + options.compact != 1:
        parser.error("give either --images FOLDER, or --delete PICTURE ..., or --compact")
    from samer.index.pictures import FOLDER_SPLIT, compact_images, delete_images

    if options.compact:
        saved = compact_images(options.cache_dir, FOLDER_SPLIT)
        print(f"compacted {options.cache_dir}: {saved / 1e6:,.1f} MB less on disk")
        return saved
    if options.delete:
        left = delete_images(options.cache_dir, FOLDER_SPLIT, options.delete)
        print(f"taken out of {options.cache_dir}: {len(set(options.delete))}; it holds {left:,}")
        return left
    return index_folder(options)


def index_folder(options):
    """Adds the pictures of a folder that the index does not have."""
    paths = find_pictures(options.images)
    root = Path(options.images).resolve()
    config = adapter_config(options.adapter_path, options.config, options.overrides)
    device = compute_device(options)
    from samer.features.read import open_encoder
    from samer.index.manifest import describe
    from samer.index.pictures import add_images

    where = {"local_files_only": config.model.local_files_only, "revision": config.model.revision}
    encoder = open_encoder(config.model.name, device, adapter_path=options.adapter_path, **where)
    print(f"{len(paths):,} pictures under {root}; writing the index to {options.cache_dir}", flush=True)
    started = time.monotonic()
    how = {"batch_size": options.batch_size, "dtype": options.cache_dtype, "assignments": options.assignments}
    summary, skipped = add_images(options.cache_dir, root, paths, encoder, config.merge, **how)
    print(describe(summary, options.cache_dir) + f"; {time.monotonic() - started:.0f} s")
    for line in skipped:
        print("skipped:", line)
    return summary


def command():
    run(main)


if __name__ == "__main__":
    command()
