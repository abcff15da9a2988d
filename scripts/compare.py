"""Compares every compressor at one budget and with the same training, and takes SaMer's gain apart.

    bash bash/compare.sh                                                     (the built-in world)
    python scripts/compare.py --data-root /data/flickr30k_entities --out outputs/compare_flickr \\
        --config configs/samer_k64_colpali.yaml --features features/flickr_colpali

Writes results.json, results.md and plots to --out; run again, it goes on where it stopped. Without --features the
frozen hidden states are computed first, into OUT/features (its size is said beforehand). Trained rows use the recipe of
--config, one run per seed, in this one process: for the published 32 x 2 x 4 captions per step on one GPU, add
train.grad_accum_steps=8.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samer.config import load_config
from samer.runtime.commands import pick_device, run
from samer.runtime.files import only_writer

TILES = {  # the figures in large
    "none": "all tokens",
    "none, trained": "all tokens, same training",
    "samer, farthest, trained": "SaMer, farthest, trained",
    "samer, raster, trained": "SaMer, raster, trained",
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="Flickr30k-Entities folder, with boxes")
    parser.add_argument("--out", required=True, help="folder for projectors, measurements and results")
    parser.add_argument("--config", required=True, help="YAML file: model, K and recipe; see configs/")
    parser.add_argument("--features", default="", help="feature store with the splits needed (scripts/features.py)")
    parser.add_argument("--split", default="test", help="what is measured on (test)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trained rows (0 1 2)")
    parser.add_argument(
        "--sections", nargs="+", help="some of: untouched adapted budgets components crossed cost (all)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. merge.num_regions=32")
    options = parser.parse_args(argv)
    given = options.sections or []
    overrides = [*(word for word in given if "=" in word), *options.overrides]  # argparse takes them for sections
    config = load_config(options.config, overrides)
    from samer.compare.plan import SECTIONS, check_request

    sections = SECTIONS if options.sections is None else [word for word in given if "=" not in word]
    check_request(sections, options.seeds)
    with only_writer(options.out):
        return run_comparison(options, config, sections, overrides)


def run_comparison(options, config, sections, overrides):
    """What `main` does with what it was asked for, in a folder of its own."""
    features = options.features or str(Path(options.out) / "features")
    started = time.monotonic()
    if not options.features:
        from scripts import features as write

        limits = config.data.limit_train_images, config.data.limit_eval_images
        for split, limit in zip((config.data.train_split, options.split), limits):
            words = ["--out", features, "--data-root", options.data_root, "--config", options.config, "--splits", split]
            write.main([*words, *(["--limit-images", str(limit)] if limit else []), *overrides])
    from samer.compare.plan import shown_methods
    from samer.compare.run import compare
    from samer.data import make_reader
    from samer.features.read import FeatureStore
    from samer.report.gallery import make_gallery
    from samer.report.page import Table, write_report
    from samer.report.results import write_tables
    from samer.report.tables import recall_table

    config = replace(config, data=replace(config.data, root=options.data_root, features=features))
    store = FeatureStore(features, config.model.name, pick_device(), revision=config.model.revision)
    results = compare(config, options.out, store, seeds=options.seeds, sections=sections, split=options.split)
    files = write_tables(results, options.out)
    files = [Path(options.out) / "results.json", *files]
    records = make_reader(config.data.reader).load_split(
        options.data_root, options.split, boxes=True, limit_images=config.data.limit_eval_images
    )
    methods, regions = shown_methods(config.merge, options.out, store, sections, options.seeds[0])
    gallery = make_gallery(store, records, methods, regions, batch_size=config.train.eval_batch_size)
    about = results["about"]
    head, rows = recall_table(results)
    note = (
        f"In percent, text to image unless said otherwise, 95 % bootstrap intervals over images. Trained rows: mean of "
        f"{len(options.seeds)} seed{'s' * (len(options.seeds) > 1)}, ± standard deviation. Pictures below: seed "
        f"{options.seeds[0]}."
    )
    report = Path(options.out) / "report.html"
    write_report(
        report,
        title=f"Compressors compared on {about['data']}",
        about=[
            (
                "data",
                f"{about['split']} of {options.data_root}: {about['images']:,} images, {about['captions']:,} captions",
            ),
            ("retriever", f"{about['model']}, {about['tokens_per_image']} tokens per image"),
            ("compressed to", f"{about['merge']['num_regions']} vectors"),
            ("training", ", ".join(f"{name} {value:g}" for name, value in about["train"].items())),
            ("all tables", str(Path(options.out) / "results.md")),
        ],
        tiles=[(f"{float(row[1].split()[0]):.1f} %", f"R@1, {TILES[row[0]]}") for row in rows if row[0] in TILES],
        tables=[Table("Retrieval", note, head, rows)] if rows else [],
        results=results,
        gallery=gallery,
    )
    files.append(report)
    print(f"{time.monotonic() - started:.0f} s; wrote {', '.join(map(str, files))}")
    return results


if __name__ == "__main__":
    run(main)
