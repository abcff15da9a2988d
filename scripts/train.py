"""Trains the projector of a frozen retriever under the SaMer merge.

    python scripts/train.py --config configs/samer_k64_colpali.yaml data.root=/data/flickr30k_entities
    torchrun --nproc-per-node 4 scripts/train.py --config configs/samer_k64_colpali.yaml data.root=... train.bf16=true

Writes projector.safetensors, config.json (what it belongs to), config.yaml (the settings as resolved), history.json and
the last two checkpoints to train.output_dir; with merge.compressor=querybank also bank.safetensors, its query bank. Run
again, it resumes there.

Retrievers (model.name) in transformers format: ColPali, ColQwen2, ColModernVBert, NeoMME, or two towers joined by
scripts/align.py. Data sets (data.root), whose kind is guessed unless data.name says it: flickr (Flickr30k-Entities),
coco, imagecode, vidore, captions (*_caps.txt), jsonl (your own). Objects are learned from boxes where there are any.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse

from samer.runtime.commands import run


def main(argv=None):
    from samer.config import dump_config, load_config

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every setting, with its default:\n\n" + dump_config(load_config(None)),
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. merge.num_regions=32")
    options = parser.parse_args(argv)
    config = load_config(options.config, options.overrides)
    from samer.data.pictures import limit_pixels
    from samer.runtime.processes import print0, process_group
    from samer.training.loop import train

    limit_pixels(config.data.max_megapixels)

    with process_group():
        result = train(config)
    print0(f"done: {result.steps} steps in {result.seconds:.0f} s -> {result.output_dir / 'projector.safetensors'}")
    return result


def command():
    run(main, shared=True)


if __name__ == "__main__":
    command()
