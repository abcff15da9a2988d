"""Scores every caption of a cached split against every image and reports recall, both ways.

    PYTHONPATH=. python scripts/eval.py --cache-dir outputs/flickr_samer_k64 --split test --output-json metrics.json

Needs the cache only: neither model nor images. Intervals are 95 % bootstrap over queries; captions of one image are
drawn together. A report (HTML) is written beside the JSON; with --data-root it shows pictures: failures by rule, and
what winning vectors stand on. For that the captions shown are encoded again, by the model or from --features.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samer.runtime.commands import add_compute_options, compute_device, run
from samer.runtime.files import write_json


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", required=True, help="made by scripts/cache.py")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--output-json", required=True, help="where the metrics go")
    parser.add_argument("--data-root", help="Flickr30k-Entities folder, with boxes, for the report's pictures")
    parser.add_argument("--reader", default="flickr", help="kind of data set at --data-root (flickr)")
    parser.add_argument("--features", default="", help="feature store to read instead of images (scripts/features.py)")
    add_compute_options(parser)
    options = parser.parse_args(argv)
    device = compute_device(options)
    from samer.evaluation import both_directions
    from samer.index.read import Index

    cache = Index(options.cache_dir)
    images, queries, regions, size = cache.size(options.split)
    scores, image_of = cache.scores(options.split, device)
    metrics = both_directions(scores, image_of)
    made = cache.manifest
    about = {
        "base_model": made.base_model,
        "projector": made.projector,
        "merge": asdict(made.merge),
        "dtype": made.dtype,
    }
    result = {
        "split": options.split,
        "images": images,
        "queries": queries,
        "vectors_per_image": regions,
        "bytes_per_image": size,
        **metrics,
        "cache": about,
    }
    write_json(options.output_json, result)
    print(f"{options.cache_dir}, {options.split}: {images:,} images x {regions} vectors, {queries:,} queries")
    for direction, values in metrics.items():
        shown = [f"{n} {m['value']:.1f} [{m['interval'][0]:.1f}, {m['interval'][1]:.1f}]" for n, m in values.items()]
        print(f"  {direction.replace('_', ' ')}: " + ", ".join(shown))
    report = Path(options.output_json).with_suffix(".html")
    write_eval_report(report, cache, result, scores, options, device)
    print(f"-> {options.output_json}, {report}")
    return result


def write_eval_report(path, cache, result, scores, options, device):
    from samer.report.gallery import Shown, check_images, make_gallery
    from samer.report.page import headline, metrics_table, write_report

    gallery = None
    name = cache.manifest.merge.compressor
    if options.data_root:
        from samer.data import make_reader
        from samer.features.read import open_encoder

        reader = make_reader(options.reader)
        records = reader.load_split(options.data_root, options.split, boxes=True, limit_images=result["images"])
        check_images(cache, options.split, records, options.data_root)
        encoder = open_encoder(
            cache.manifest.base_model, device, features=options.features, revision=cache.manifest.revision
        )
        cache.check_model(encoder)
        shown = Shown(name, cache.manifest.merge, cache.projector(), scores)
        gallery = make_gallery(encoder, records, [shown])
    row = {"name": name, **result}
    merge = ", ".join(f"{key} {value}" for key, value in result["cache"]["merge"].items())
    write_report(
        path,
        title=f"{Path(options.cache_dir).name}: retrieval on {options.split}",
        about=[
            ("index", options.cache_dir),
            ("split", f"{options.split}: {result['images']:,} images, {result['queries']:,} captions"),
            ("retriever", result["cache"]["base_model"]),
            ("merge", merge),
            ("stored as", result["cache"]["dtype"]),
        ],
        tiles=headline(row, row),
        tables=[metrics_table([row])],
        gallery=gallery,
        note="" if gallery else "scripts/eval.py --data-root FOLDER shows pictures here, with what was found and why.",
    )


if __name__ == "__main__":
    run(main)
