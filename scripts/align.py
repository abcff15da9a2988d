"""Makes a late-interaction retriever of two pretrained towers, one for pictures and one for text.

    python scripts/align.py --config configs/towers_224.yaml data.root=/data/flickr30k_entities
    torchrun --nproc-per-node 4 scripts/align.py --config configs/towers_224.yaml data.root=... towers.vision=DIR

The towers stay as they are; adapters and the shared projection are trained on pictures and captions. Writes a folder to
align.output_dir that every other command takes as model.name; run again, it goes on where it stopped. What the towers
give is computed once, into OUTPUT_DIR/features; another alignment of the same towers takes it as data.features.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse

from samer.runtime.commands import add_compute_options, compute_device, compute_dtype, run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file; see configs/towers_224.yaml, which names every setting")
    add_compute_options(parser, "--dtype")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. align.epochs=10")
    options = parser.parse_args(argv)
    device = compute_device(options)
    from samer.config import load_config
    from samer.data.pictures import limit_pixels
    from samer.runtime.processes import print0, process_group
    from samer.training.align import align
    from samer.training.align_settings import AlignConfig

    config = load_config(options.config, options.overrides, AlignConfig)
    limit_pixels(config.data.max_megapixels)
    with process_group():
        folder = align(config, device, compute_dtype(options))
        print0(f"done: a retriever in {folder}; other commands take it as model.name={folder}")
    return folder


def command():
    run(main, shared=True)


if __name__ == "__main__":
    command()
