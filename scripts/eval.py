"""Scores every caption of a split in an index against every image and reports recall, both ways.

    PYTHONPATH=. python scripts/eval.py --cache-dir outputs/flickr_samer_k64 --split test --output-json metrics.json

Needs the index only: neither model nor images. Intervals are 95 % bootstrap over queries; captions of one image are
drawn together. A report (HTML) is written beside the JSON; with --data-root it shows pictures: failures by rule, and
what winning vectors stand on. For that the captions shown are encoded again, by the model or from --features.
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
    add_compute_options,
    add_gpu_memory,
    compute_device,
    compute_dtype,
    gpu_budget,
    run,
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", required=True, help="the index, made by scripts/cache.py")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--output-json", required=True, help="where the metrics go")
    parser.add_argument("--data-root", help="the data set's folder, for the report's pictures; boxes are read")
    parser.add_argument("--reader", default="", help=DATA_KINDS)
    parser.add_argument(
        "--budget", type=int, default=0, metavar="K", help="score by so many vectors of each image (all)"
    )
    parser.add_argument("--folds", type=int, help="also the mean over so many folds of the images (COCO 1K: 5)")
    parser.add_argument("--sets", action="store_true", help="also accuracy within an image's set (ImageCoDe)")
    parser.add_argument("--features", default="", help="feature store to read instead of images (scripts/features.py)")
    parser.add_argument("--model", help="where the model is, if not where the index says")
    add_compute_options(parser, "--dtype")
    add_gpu_memory(parser)
    options = parser.parse_args(argv)
    device = compute_device(options)
    from samer.index.read import Index
    from samer.index.uploads import Uploads
    from samer.report.evaluate import evaluate_index, index_gallery, metric_lines, metric_places, write_index_report
    from samer.report.protocols import check_protocols, protocol_lines, protocols_asked
    from samer.runtime.files import write_json

    folder, split = options.cache_dir, options.split
    index = Index(folder, Uploads(gpu_budget(options)))
    index.check_captions(split)
    check_protocols(index, split, options.folds, options.sets)
    output, report = metric_places(options.output_json, folder)
    result, scores = evaluate_index(index, split, device, options.budget)
    result |= protocols_asked(index, split, scores, options.folds, options.sets)
    images, queries = result["images"], result["queries"]
    print(f"{folder}, {split}: {images:,} images x {result['vectors_per_image']} vectors, {queries:,} queries")
    for line in [*metric_lines(result), *protocol_lines(result)]:
        print(f"  {line}")
    write_json(output, result)
    gallery = None
    if options.data_root:
        where = {"reader": options.reader, "features": options.features, "device": device, "model": options.model}
        where["dtype"] = compute_dtype(options)
        gallery = index_gallery(index, split, scores, options.data_root, **where)
    write_index_report(report, folder, result, gallery)
    print(f"-> {options.output_json}, {report}")
    return result


def command():
    run(main)


if __name__ == "__main__":
    command()
