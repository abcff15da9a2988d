"""Makes an index of another's vectors without a model: 996 bytes an image instead of 8,260, or smaller budgets too.

    python scripts/recode.py --cache-dir outputs/pictures --out outputs/pictures_1bit --dtype 1bit
    python scripts/recode.py --cache-dir outputs/pictures --out outputs/pictures_any --budgets 8 16 32
    python scripts/recode.py --cache-dir outputs/pages --out outputs/small --keep 27 --dtype 2bit \\
        --bank bank.safetensors

1bit, 2bit and 4bit are codes that are looked up in learned tables, so many bits a component, with no copy in floats
beside them; tables are learned on the index's own vectors, and with --bank (scripts/bank.py) on what queries ask of
them, which keeps more. --keep stores only so many vectors of each image, those that the bank's queries would miss
most; patches of the others belong to no vector then. --budgets stores each image's vectors at smaller K beside all of
them, for search.py --budget or --coarse and eval.py --budget. The new index is searched, served, evaluated, exported,
verified and added to like any other; the old one stays as it is. Start from float32 or int8: codes are not made of
codes. Run again, it goes on where it stopped.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", required=True, help="the index, made by scripts/index.py or scripts/cache.py")
    parser.add_argument("--out", required=True, help="folder of the new index")
    parser.add_argument("--dtype", default="", help="1bit, 2bit, 4bit, int8, float16, bfloat16, float32 (as it is)")
    parser.add_argument("--budgets", nargs="+", type=int, default=[], metavar="K", help="smaller K to store besides")
    parser.add_argument("--keep", type=int, default=0, metavar="K", help="only the K vectors that --bank misses most")
    parser.add_argument("--bank", default="", help="query bank in whose metric codes are learned (scripts/bank.py)")
    parser.add_argument("--no-assignments", action="store_true", help="leave out the byte per patch that pictures need")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all, or OMP_NUM_THREADS)")
    options = parser.parse_args(argv)
    if not options.dtype and not options.budgets and not options.keep:
        parser.error("nothing to do: give --dtype, --budgets or --keep")
    if options.threads is not None and options.threads < 1:
        parser.error("--threads must be at least 1")
    import torch

    from samer.index.manifest import describe
    from samer.index.recode import recode
    from samer.retrievers.banks import read_bank

    if options.threads:
        torch.set_num_threads(options.threads)
    bank = read_bank(options.bank) if options.bank else None
    how = {"keep": options.keep, "bank": bank, "assignments": not options.no_assignments}
    summaries = recode(options.cache_dir, options.out, options.dtype, options.budgets, **how)
    for summary in summaries:
        print(describe(summary, options.out))
    return summaries


def command():
    run(main)


if __name__ == "__main__":
    command()
