"""Scores every caption of a cached split against every image and reports recall, both ways.

    PYTHONPATH=. python scripts/eval.py --cache-dir outputs/flickr_samer_k64 --split test --output-json metrics.json

Needs the cache only: neither model nor images. Intervals are 95 % bootstrap over queries; captions of one image are
drawn together.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samer.runtime import add_compute_options, compute_device, run, write_json


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", required=True, help="made by scripts/cache.py")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--output-json", required=True, help="where the metrics go")
    add_compute_options(parser)
    options = parser.parse_args(argv)
    device = compute_device(options)
    from samer.cache_io import Cache
    from samer.evaluation import both_directions

    cache = Cache(options.cache_dir)
    images, queries, regions, size = cache.size(options.split)
    metrics = both_directions(*cache.scores(options.split, device))
    about = {key: cache.manifest[key] for key in ("base_model", "projector", "merge", "dtype")}
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
    print(f"-> {options.output_json}")
    return result


if __name__ == "__main__":
    run(main)
