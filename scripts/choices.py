"""Measures what a training gains by its choice of captions (CPI) and by midpoint mixup, on data of your own.

    python scripts/choices.py --data-root /data/flickr30k_entities --out outputs/choices --config configs/photos.yaml \\
        --features features/flickr_towers model.name=checkpoints/towers_224 --page outputs/choices.md

Trains one projector per arm and seed with the recipe of --config: all captions, half of them by lot, by score and by
CPI, and all with mixup; each with as many steps. Measures retrieval on --split, and whether captions are told from
foils, in which a phrase is another image's. Says how long the rest takes as soon as one training is done; run again, it
goes on where it stopped. Results are written after every seed: OUT/results.json, and a page of tables.
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

from samer.runtime.commands import DATA_KINDS, add_compute_options, compute_device, compute_dtype, run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help=f"the data set's folder; data.name: {DATA_KINDS}")
    parser.add_argument("--out", required=True, help="folder for everything")
    parser.add_argument("--config", required=True, help="YAML file: model, K and recipe; see configs/")
    parser.add_argument("--features", required=True, help="feature store of both splits (scripts/features.py)")
    parser.add_argument("--split", default="test", help="what is measured on (test)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trainings (0 1 2)")
    parser.add_argument("--share", type=float, default=0.5, help="of the captions that is kept (0.5)")
    parser.add_argument("--drop", type=float, default=0.1, help="share of the lowest scores that CPI leaves out (0.1)")
    parser.add_argument("--replacements", type=int, default=1, help="nonce words tried for each phrase (1)")
    parser.add_argument("--page", help="the page of tables (OUT/results.md)")
    add_compute_options(parser, "--dtype")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. merge.num_regions=32")
    options = parser.parse_args(argv)
    from dataclasses import replace

    from samer.compare.choices import Settings, study
    from samer.config import load_config
    from samer.report.choices import page
    from samer.runtime.files import atomic_path, check_writable, only_writer
    from samer.selection.cpi import open_scorers

    config = load_config(options.config, options.overrides)
    config = replace(config, data=replace(config.data, root=options.data_root, features=options.features))
    settings = Settings(share=options.share, drop=options.drop, replacements=options.replacements)
    out = Path(options.out)
    file = Path(options.page) if options.page else out / "results.md"
    check_writable(file)
    with only_writer(out):
        images, texts = open_scorers(config.model, compute_device(options), options.features, compute_dtype(options))
        results = study(config, out, images, texts, settings=settings, seeds=options.seeds, split=options.split)
    with atomic_path(file) as temporary:
        temporary.write_text(page(results), encoding="utf-8")
    print(f"-> {file}")
    return results


def command():
    run(main)


if __name__ == "__main__":
    command()
