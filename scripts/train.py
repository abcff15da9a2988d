"""Trains the projector of a frozen ColPali under the SaMer merge.

    python scripts/train.py --config configs/samer_k64_colpali.yaml data.root=/data/flickr30k_entities
    torchrun --nproc-per-node 4 scripts/train.py --config configs/samer_k64_colpali.yaml data.root=... train.bf16=true

Writes projector.safetensors, config.json (what it belongs to), config.yaml (the settings as resolved), history.json and
the last two checkpoints to train.output_dir; run again, it resumes there.
"""

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samer.config import dump_config, load_config
from samer.runtime.commands import run
from samer.runtime.processes import print0, process_group


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every setting, with its default:\n\n" + dump_config(load_config(None)),
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. merge.num_regions=32")
    options = parser.parse_args(argv)
    config = load_config(options.config, options.overrides)
    from samer.training.loop import train

    with process_group():
        result = train(config)
    print0(f"done: {result.steps} steps in {result.seconds:.0f} s -> {result.output_dir / 'projector.safetensors'}")
    return result


def command():
    run(main, shared=True)


if __name__ == "__main__":
    command()
