"""Compares every compressor at one budget and with the same training, and takes SaMer's gain apart.

    bash bash/compare.sh                                                     (the built-in world)
    python scripts/compare.py --data-root /data/flickr30k_entities --out outputs/compare_flickr \\
        --config configs/samer_k64_colpali.yaml --features features/flickr_colpali

Writes results.json, results.md and plots to --out; run again, it goes on where it stopped. Without --features the
frozen hidden states are computed first, into OUT/features (its size is said beforehand). Beside whole captions the
boxed phrases of the annotation are asked, which a store has that scripts/features.py made with --phrases; of data
without boxes, what is said of phrases, grounding and sizes is left out. Trained rows use the recipe of --config, one
run per seed: the published 32 x 2 x 4 captions per step are those of four processes (NPROC_PER_NODE=4 bash
bash/compare.sh, or torchrun), which share the trainings and the measurements; on one GPU add train.grad_accum_steps=8.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse

from samer.runtime.commands import DATA_KINDS, add_compute_options, compute_device, compute_dtype, run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help=f"the data set's folder; data.name: {DATA_KINDS}")
    parser.add_argument("--out", required=True, help="folder for projectors, measurements and results")
    parser.add_argument("--config", required=True, help="YAML file: model, K and recipe; see configs/")
    parser.add_argument("--features", default="", help="feature store with the splits needed (scripts/features.py)")
    parser.add_argument("--split", default="test", help="what is measured on (test)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trained rows (0 1 2)")
    parser.add_argument(
        "--sections", nargs="+", help="some of: untouched adapted budgets components crossed banks phrases cost (all)"
    )
    parser.add_argument(
        "--budgets", nargs="+", default=[], help="K of budgets and cost, e.g. 64 32, or shares, e.g. 1/16 (N/2 to N/32)"
    )
    parser.add_argument("--methods", nargs="+", default=[], help="compressors, e.g. none samer kmeans hpool (all)")
    parser.add_argument(
        "--banks", nargs="+", default=[], metavar="NAME=FILE", help="of other texts (scripts/bank.py), for querybank"
    )
    add_compute_options(parser, "--dtype")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. merge.num_regions=32")
    options = parser.parse_args(argv)
    given = options.sections or []
    words = [*given, *options.methods, *options.budgets]  # argparse takes overrides that follow for these
    overrides = [*(word for word in words if "=" in word), *options.overrides]
    overrides += [word for word in options.banks if word.partition("=")[0].count(".")]
    if lone := [word for word in options.banks if "=" not in word]:
        parser.error(f"--banks {lone[0]}: give it a name, as NAME={lone[0]}")
    banks = dict(word.partition("=")[::2] for word in options.banks if word not in overrides)
    from dataclasses import replace

    from samer.config import load_config

    config = load_config(options.config, overrides)
    config = replace(config, data=replace(config.data, root=options.data_root, features=options.features))
    from samer.compare.plan import SECTIONS, check_request, read_budgets
    from samer.compare.write import write_comparison
    from samer.data.pictures import limit_pixels
    from samer.runtime.files import only_writer
    from samer.runtime.processes import process_group

    limit_pixels(config.data.max_megapixels)

    sections = None if options.sections is None else [word for word in given if "=" not in word]
    methods = [word for word in options.methods if "=" not in word]
    budgets = read_budgets(word for word in options.budgets if "=" not in word)
    check_request(SECTIONS if sections is None else sections, options.seeds, budgets, methods, banks)
    asked = {"seeds": options.seeds, "sections": sections, "split": options.split}
    asked |= {"at_budgets": budgets, "methods": methods, "banks": banks}
    with process_group(), only_writer(options.out):
        where = {"device": compute_device(options), "dtype": compute_dtype(options)}
        return write_comparison(config, options.out, **asked, **where)


def command():
    run(main, shared=True)


if __name__ == "__main__":
    command()
