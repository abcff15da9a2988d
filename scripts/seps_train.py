"""Trains SEPS, or LAPS (no dense text), end to end; by the flags of the released command, or by a config.

    python scripts/seps_train.py --dataset f30k --data_path data --logger_name runs/f30k_vit --vit_type vit
    torchrun --nproc-per-node 4 scripts/seps_train.py --dataset coco --data_path data --multi_gpu 1 --vit_type swin
    python scripts/seps_train.py --config configs/seps_f30k_vit.yaml data.root=data/f30k seps.dense=query

Writes the model of the epoch that is best on the validation split; run again, it goes on where it stopped. Dense texts
lie beside the captions, or come from scripts/describe.py (data.dense=FILE).
"""

import sys
from os.path import dirname, isdir, join, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse
import os

from samer.runtime.commands import add_compute_options, compute_device, run

CONFIGS = join(dirname(dirname(realpath(__file__))), "configs")
LARGE = {"vit": "google/vit-base-patch16-384", "swin": "microsoft/swin-base-patch4-window12-384"}
KEYS = {  # flag: setting
    "logger_name": "train.output_dir",
    "batch_size": "train.batch_size",
    "embed_size": "towers.embed_size",
    "sparse_ratio": "seps.sparse_ratio",
    "aggr_ratio": "seps.aggr_ratio",
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file, instead of the one that --dataset and --vit_type choose")
    parser.add_argument("--dataset", choices=("f30k", "coco"), default="f30k", help="Flickr30k or MS-COCO (f30k)")
    sizes = [f"{kind}{size}" for kind in LARGE for size in ("", "_224", "_384")]
    parser.add_argument("--vit_type", choices=sizes, default="vit", help="vision tower (vit)")
    parser.add_argument("--img_res", type=int, choices=(224, 384), help="pixels of a side; also vit_384, swin_384")
    parser.add_argument("--data_path", help="folder of the caption files, or the one that holds f30k/ and coco/")
    parser.add_argument("--logger_name", help="folder for the model and the run's files (train.output_dir)")
    parser.add_argument("--batch_size", help="captions per process")
    parser.add_argument("--embed_size", help="width of the shared space")
    parser.add_argument("--sparse_ratio", help="share of the patches that is kept")
    parser.add_argument("--aggr_ratio", help="merged vectors per kept patch")
    parser.add_argument("--multi_gpu", type=int, choices=(0, 1), default=0, help="1: started by torchrun")
    parser.add_argument("--gpu-id", type=int, help="the one GPU to use")
    add_compute_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. seps.dense=query")
    options = parser.parse_intermixed_args(argv)
    if options.multi_gpu and int(os.environ.get("WORLD_SIZE", 1)) < 2:
        parser.error("--multi_gpu 1 needs torchrun: torchrun --nproc-per-node N scripts/seps_train.py ...")
    if options.gpu_id is not None:
        options.device = f"cuda:{options.gpu_id}"
    device = compute_device(options)
    from samer.config import load_config
    from samer.data.pictures import limit_pixels
    from samer.runtime.processes import print0, process_group
    from samer.seps.settings import SepsConfig
    from samer.seps.train import train_seps

    kind = options.vit_type.partition("_")[0]
    config = load_config(
        options.config or join(CONFIGS, f"seps_{options.dataset}_{kind}.yaml"), settings(options, kind), SepsConfig
    )
    limit_pixels(config.data.max_megapixels)
    with process_group():
        folder = train_seps(config, device)
        print0(f"done: a model in {folder}; scripts/seps_eval.py --model {folder} measures it")
    return folder


def settings(options, kind):
    """The flags as section.key=value, before those that were given so."""
    found = []
    if options.data_path:
        inner = join(options.data_path, options.dataset)
        found.append(f"data.root={inner if isdir(inner) else options.data_path}")
    if options.img_res == 384 or options.vit_type.endswith("_384"):
        found += [f"towers.vision={LARGE[kind]}", "towers.image_size=384"]
    found += [f"{key}={value}" for name, key in KEYS.items() if (value := getattr(options, name)) is not None]
    return [*found, *options.overrides]


def command():
    run(main, shared=True)


if __name__ == "__main__":
    command()
