"""Makes dense texts: a description of every image of a split, by any image-text-to-text model of transformers.

    python scripts/describe.py --model llava-hf/llava-1.5-7b-hf --data-root data/f30k --split dev --out f30k_dev.jsonl
    python scripts/describe.py --model DIR --data-root DIR --split train[:50%] --out half.jsonl --limit-images 100

Run again, it goes on behind the last description. SEPS reads the file as data.dense=FILE, or as *_SPLIT.jsonl beside
the captions. The published texts are LLaVA's; at test they describe the answers, so what uses them there is a leak
unless the candidates' own are used (seps.dense=image).
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse

from samer.runtime.commands import DATA_KINDS, add_compute_options, compute_device, run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--data-root", required=True, help="the data set's folder")
    parser.add_argument("--reader", default="", help=DATA_KINDS)
    parser.add_argument("--split", required=True, help="whose images are described")
    parser.add_argument("--out", required=True, help="file of JSON lines")
    parser.add_argument("--limit-images", type=int, help="the first so many")
    parser.add_argument("--prompt", help="what the model is asked (a comprehensive description)")
    parser.add_argument("--max-new-tokens", type=int, default=500, help="of a description (500)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0: the likeliest token each time (0.2)")
    parser.add_argument("--top-p", type=float, default=0.9, help="(0.9)")
    parser.add_argument("--seed", type=int, default=0, help="of the words (0)")
    add_compute_options(parser)
    options = parser.parse_args(argv)
    device = compute_device(options)
    from pathlib import Path

    from samer.data import make_reader
    from samer.seps.describe import PROMPT, Wording, describe_images

    reader = make_reader(options.reader, options.data_root)
    records = reader.load_split(options.data_root, options.split, boxes=False, limit_images=options.limit_images)
    asked = options.prompt or PROMPT, options.max_new_tokens, options.temperature, options.top_p, options.seed
    count = describe_images(records, Path(options.out), options.model, Wording(*asked), device)
    print(f"{count:,} of {len(records):,} images described now; all of them are in {options.out}")
    return count


def command():
    run(main)


if __name__ == "__main__":
    command()
