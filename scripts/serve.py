"""Serves a page to search indexes by words, and to see what each word of a query looked at.

    python scripts/serve.py --cache-dir outputs/pictures                             -> http://127.0.0.1:8000/
    python scripts/serve.py --cache-dir outputs/k8 outputs/k64 --data-root /data/flickr30k_entities --split test

Several indexes of the same pictures make a slider from the smallest to the largest. What a word looked at is drawn
unless an index was made with --no-assignments. --coarse K chooses candidates by the K vectors of a smaller budget
(scripts/recode.py --budgets) and ranks those by all, which takes less time in a large index. --data-root says where
the pictures of indexes lie that scripts/cache.py made, and with its Annotations the page also shows boxes, and how
much of the evidence lies in them. The page answers to this machine only; --host 0.0.0.0 opens it, and the pictures,
to the network. Ctrl-C ends it.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse

from samer.runtime.commands import (
    DATA_KINDS,
    add_compute_options,
    add_gpu_memory,
    compute_device,
    compute_dtype,
    gpu_budget,
    run,
    wait_quietly,
)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", required=True, nargs="+", help="made by scripts/index.py or scripts/cache.py")
    parser.add_argument("--split", help="default: each index's only one")
    parser.add_argument("--data-root", help="the data set's folder, for indexes that scripts/cache.py made")
    parser.add_argument("--reader", default="", help=DATA_KINDS)
    parser.add_argument("--model", help="where the model is, if not where the indexes say")
    parser.add_argument("--coarse", type=int, default=0, metavar="K", help="choose candidates by so many vectors")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="8000; 0: any that is free")
    parser.add_argument("--max-megapixels", type=float, default=256.0, help="larger pictures are not read (256)")
    add_compute_options(parser, "--dtype")
    add_gpu_memory(parser)
    options = parser.parse_args(argv)
    if options.coarse < 0:
        parser.error("--coarse is above 0")
    device = compute_device(options)
    from samer.data.pictures import limit_pixels
    from samer.index.uploads import Uploads
    from samer.search.models import Models
    from samer.search.open_index import SearchIndex
    from samer.search.server import serve

    limit_pixels(options.max_megapixels)
    models = Models(device, options.model, dtype=compute_dtype(options), uploads=Uploads(gpu_budget(options)))
    place = options.split, options.data_root, options.reader
    indexes = [SearchIndex(folder, models, *place) for folder in options.cache_dir]
    serve(indexes, options.host, options.port, options.coarse)


def command():
    wait_quietly()
    run(main)


if __name__ == "__main__":
    command()
