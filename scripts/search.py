"""Searches an index by words.

    python scripts/search.py --cache-dir outputs/pictures "two dogs on a beach" [--top 10] [--json]
    python scripts/search.py --cache-dir outputs/pages "cash flow" --filter "year>=2020" --documents report --pages 2
    python scripts/search.py --cache-dir outputs/many "two dogs on a beach" --coarse 8
    python scripts/search.py --cache-dir outputs/pictures          (asks for queries until an empty line or Ctrl-D)
    python scripts/search.py --cache-dir outputs/pictures --json < queries.txt            (a query a line, to the end)

Prints the best images with their scores, the mean over the query's tokens of the best similarity, 1 at most. The model
is loaded once; it is the one that the index was made with, as are projector and settings. --json prints one object per
query, with paths as they are; without it what would move a terminal's cursor is escaped in them. Lines of a file or a
pipe are UTF-8, UTF-16 with its mark, or what the locale says; empty ones are passed over. A query that is refused is
told on standard error, with its line, the others are answered, and the exit status is 2.

Metadata is given to an index by scripts/index.py --metadata. A filter is a column, =, !=, <, <=, > or >=, and a value
(several parted by | are one or another). --documents COLUMN joins the images that have the same value there: a document
scores the mean of its best --pages, all of them if it has fewer; an image without the column is one by itself.

Of an index with smaller budgets (scripts/recode.py --budgets) --budget K scores by K vectors of each image; --coarse K
chooses candidates by them and ranks those by all vectors, which takes a part of the time and misses few.
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
    parser.add_argument("query", nargs="*", help="each a text of its own; none: read them from standard input")
    parser.add_argument("--cache-dir", required=True, help="made by scripts/index.py or scripts/cache.py")
    parser.add_argument("--split", help="default: the index's only one")
    parser.add_argument("--top", type=int, default=10, help="how many images per query (10)")
    parser.add_argument(
        "--filter", action="append", default=[], metavar="CONDITION", help="on metadata: language=en, page>=2; all hold"
    )
    parser.add_argument("--documents", default="", metavar="COLUMN", help="find documents, which this column names")
    parser.add_argument("--pages", type=int, default=1, help="a document counts by its best so many pages (1)")
    parser.add_argument("--budget", type=int, default=0, metavar="K", help="score by so many vectors (all)")
    parser.add_argument("--coarse", type=int, default=0, metavar="K", help="choose candidates by so many vectors")
    parser.add_argument("--json", action="store_true", help="one JSON object per query")
    parser.add_argument("--model", help="where the model is, if not where the index says")
    add_compute_options(parser, "--dtype")
    add_gpu_memory(parser)
    options = parser.parse_args(argv)
    if options.top < 1 or options.pages < 1:
        parser.error("--top and --pages must be at least 1")
    if options.pages > 1 and not options.documents:
        parser.error("--pages goes with --documents COLUMN")
    if min(options.budget, options.coarse) < 0 or (options.coarse and (options.budget or options.documents)):
        parser.error("--budget and --coarse are above 0; --coarse goes without --budget and --documents")
    device = compute_device(options)
    from samer.index.uploads import Uploads
    from samer.runtime.streams import printable
    from samer.search.answers import answer, answers
    from samer.search.models import Models
    from samer.search.open_index import SearchIndex, Wanted
    from samer.search.queries import Asked, typed_queries

    where = {"dtype": compute_dtype(options), "uploads": Uploads(gpu_budget(options))}
    index = SearchIndex(options.cache_dir, Models(device, options.model, **where), options.split)
    print(
        f"{index.images:,} images x {index.regions} vectors, {index.images * index.bytes_per_image / 1e6:,.1f} MB, "
        f"in {printable(options.cache_dir)}",
        file=sys.stderr,
    )
    wanted = Wanted(
        options.top, tuple(options.filter), options.documents, options.pages, options.budget, options.coarse
    )
    how = wanted, options.json
    if len(options.query) == 1:
        return [answer(index, options.query[0], *how)]
    if options.query:
        asked = (Asked(text, f"query {number}") for number, text in enumerate(options.query, 1))
        return list(answers(index, asked, *how))
    return sum(1 for _ in answers(index, typed_queries(), *how))  # how many were answered


def command():
    wait_quietly()
    run(main)


if __name__ == "__main__":
    command()
