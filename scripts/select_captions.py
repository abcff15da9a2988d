"""Chooses the captions that a training takes by contrastive phrase influence (CPI); any of our retrievers scores.

    python scripts/select_captions.py --data-root /data/flickr30k_entities --out outputs/cpi.jsonl \\
        model.name=checkpoints/towers_224 --features features/flickr_towers
    python scripts/train.py --config configs/photos.yaml data.root=... data.captions=outputs/cpi.jsonl

A caption's phrases (annotated ones, else noun chunks by a small rule for English) are replaced by nonce words, and what
its score with its image loses is the phrase's influence. The file names the captions kept, with their scores; every
trainer reads it as data.captions. Scores stay in OUT's folder, OUT without its ending and "_scores" after it: another
--share or --by takes seconds, and a killed run goes on. --by alignment and --by random are what CPI is held against.
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
    parser.add_argument("--out", required=True, help="the file of kept captions")
    parser.add_argument("--split", help="of the data set, or a part of it (data.train_split: train)")
    parser.add_argument("--by", default="cpi", choices=("cpi", "alignment", "random"), help="what ranks them (cpi)")
    parser.add_argument("--share", type=float, default=0.5, help="of all captions that is kept (0.5)")
    parser.add_argument("--drop", type=float, default=0.1, help="share of the lowest scores that CPI leaves out (0.1)")
    parser.add_argument("--replacements", type=int, default=2, help="nonce words tried for each phrase (2)")
    parser.add_argument("--seed", type=int, default=0, help="of nonce words, and of --by random (0)")
    parser.add_argument("--scores", help="folder of the scores (beside the file)")
    parser.add_argument("--features", default="", help="feature store to read the images from (scripts/features.py)")
    parser.add_argument("--batch-size", type=int, default=64, help="images, and texts, per forward pass (64)")
    add_compute_options(parser, "--dtype")
    parser.add_argument("--config", help="YAML file with model and data settings")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. model.name=assets/retriever")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    from dataclasses import replace

    from samer.config import load_config
    from samer.data import training_records
    from samer.data.pictures import limit_pixels
    from samer.runtime.files import check_writable, only_writer
    from samer.selection.choose import check_choice, choose, write_chosen
    from samer.selection.cpi import open_scorers, score_captions

    config = load_config(options.config, options.overrides)
    limit_pixels(config.data.max_megapixels)
    check_choice(options.by, options.share, options.drop)
    check_writable(options.out)
    out = Path(options.out)
    scores = Path(options.scores) if options.scores else out.with_name(f"{out.stem}_scores")
    data = replace(config.data, root=options.data_root, train_split=options.split or config.data.train_split)
    records = training_records(replace(data, captions=""), boxes=False)
    images, texts = open_scorers(config.model, compute_device(options), options.features, compute_dtype(options))
    images.check_records(records)
    how = {"replacements": options.replacements, "seed": options.seed, "batch_size": options.batch_size}
    with only_writer(scores):
        scored = score_captions(images, texts, records, scores, **how)
    kept = choose(scored, options.by, share=options.share, drop=options.drop, seed=options.seed)
    write_chosen(out, kept)
    print(f"{out}: {len(kept):,} of {len(scored):,} captions, {len({each.image_id for each in kept}):,} images")
    return kept


def command():
    run(main)


if __name__ == "__main__":
    command()
