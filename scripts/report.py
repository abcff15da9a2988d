"""Makes the report of one or more indexes: metrics, and what the winning vectors stand on, in one HTML file.

    python scripts/report.py --data-root /data/flickr30k_entities --out report.html --split test \\
        --method "all tokens=outputs/none" "H-Pool=outputs/hpool" "SaMer=outputs/flickr_samer_k64"

The first method is the baseline, the last the one in question. Images are encoded again for the captions shown, with
--features from a store, so that evidence is what each vector was really made of; ranks are the indexes' own. The demo,
scripts/compare.py and scripts/eval.py make the same report.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samer.config import InputError
from samer.runtime.commands import add_compute_options, compute_device, run
from samer.runtime.files import read_json


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="Flickr30k-Entities folder, with boxes")
    parser.add_argument("--reader", default="flickr", help="kind of data set at --data-root (flickr)")
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
    parser.add_argument("--model", help="where the model is, if not where the indexes say")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--title", help="heading of the report")
    parser.add_argument("--batch-size", type=int, default=32, help="images and captions per forward pass (32)")
    add_compute_options(parser)
    options = parser.parse_args(argv)
    device = compute_device(options)
    from samer.compare.run import sweep
    from samer.data import make_reader
    from samer.evaluation import both_directions
    from samer.features.read import open_encoder
    from samer.index.read import Index
    from samer.report.gallery import Shown, check_images, make_gallery
    from samer.report.page import headline, metrics_table, write_report

    def pairs(words, what):
        found = []
        for word in words:
            name, equals, place = word.partition("=")
            if not (name and equals and place):
                parser.error(f"{word!r}: expected NAME={what}")
            found.append((name, place))
        if len({name for name, _ in found}) < len(found):
            raise InputError(f"{', '.join(words)}: give each name once")
        return found

    methods_in, regions_in = pairs(options.method, "CACHE_DIR"), pairs(options.regions, "CACHE_DIR")
    others = [(name, read_metrics(place, options.split)) for name, place in pairs(options.row, "METRICS.json")]
    unknown = set(options.sweep or ()) - {name for name, _ in methods_in}
    if unknown:
        raise InputError(f"--sweep {sorted(unknown)[0]!r}: name a method of --method")
    caches = {place: Index(place) for _, place in [*methods_in, *regions_in]}
    limit = max(cache.size(options.split)[0] for cache in caches.values())
    reader = make_reader(options.reader)
    records = reader.load_split(options.data_root, options.split, boxes=True, limit_images=limit)
    for cache in caches.values():
        check_images(cache, options.split, records, options.data_root)
    first = caches[methods_in[0][1]].manifest
    model = options.model or first.base_model
    encoder = open_encoder(model, device, features=options.features, revision=first.revision)
    for cache in caches.values():
        cache.check_model(encoder)

    def shown(name, cache, scores=None):
        return Shown(name, cache.manifest.merge, cache.projector(), scores)

    methods, rows = [], []
    for name, place in methods_in:
        scores, image_of = caches[place].scores(options.split, device)
        methods.append(shown(name, caches[place], scores))
        _, _, vectors, size = caches[place].size(options.split)
        measured = both_directions(scores, image_of)
        rows.append({"name": name, "vectors_per_image": vectors, "bytes_per_image": size, **measured})
    # a row of the table only that is compressed as the baseline is: what training alone does
    base = asdict(first.merge)
    controls = [{"name": name, **row} for name, row in others if row["cache"]["merge"] == base]
    tiles = headline(rows[0], rows[-1], controls)
    rows += [{"name": name, **row} for name, row in others]
    results = None
    if options.sweep is not None:
        data = Path(options.data_root).name
        results = sweep(encoder, records, methods, options.sweep, data, options.batch_size)
    regions = [shown(name, caches[place]) for name, place in regions_in]
    gallery = make_gallery(encoder, records, methods, regions, batch_size=options.batch_size)
    captions = sum(len(record.captions) for record in records)
    about = [
        ("data", f"{options.split} of {options.data_root}: {len(records):,} images, {captions:,} captions"),
        ("retriever", model),
        *methods_in,
        *pairs(options.row, "METRICS.json"),
    ]
    files = write_report(
        options.out,
        title=options.title or f"SaMer on {options.split} of {Path(options.data_root).name}",
        about=about,
        tiles=tiles,
        tables=[metrics_table(rows)],
        results=results,
        gallery=gallery,
    )
    print(f"-> {files[0]}" + (f", and {len(files) - 1} pictures in {files[1].parent}" if files[1:] else ""))
    return files


def read_metrics(path, split):
    """What scripts/eval.py wrote of a split."""
    row = read_json(path)
    wanted = {"split", "text_to_image", "image_to_text", "vectors_per_image", "bytes_per_image", "cache"}
    if not wanted <= set(row) or "merge" not in row["cache"]:
        raise InputError(f"{path}: no metrics of scripts/eval.py; make them anew")
    if row["split"] != split:
        raise InputError(f"{path}: metrics of {row['split']}, not of {split}")
    return row


if __name__ == "__main__":
    run(main)
