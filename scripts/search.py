"""Searches an index by words.

    python scripts/search.py --cache-dir outputs/pictures "two dogs on a beach" [--top 10] [--json]
    python scripts/search.py --cache-dir outputs/pictures          (asks for queries until an empty line or Ctrl-D)

Prints the best images with their scores, the mean over the query's tokens of the best similarity, 1 at most. The model
is loaded once; it is the one that the index was made with, as are projector and settings. --json prints one object per
query.
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samer.config import InputError
from samer.runtime.commands import add_compute_options, compute_device, run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", nargs="*", help="each a text of its own; none: read them from the terminal")
    parser.add_argument("--cache-dir", required=True, help="made by scripts/index.py or scripts/cache.py")
    parser.add_argument("--split", help="default: the index's only one")
    parser.add_argument("--top", type=int, default=10, help="how many images per query (10)")
    parser.add_argument("--json", action="store_true", help="one JSON object per query")
    parser.add_argument("--model", help="where the model is, if not where the index says")
    add_compute_options(parser)
    options = parser.parse_args(argv)
    if options.top < 1:
        parser.error("--top must be at least 1")
    device = compute_device(options)
    from samer.search.models import Models
    from samer.search.open_index import SearchIndex

    index = SearchIndex(options.cache_dir, Models(device, options.model), options.split)
    print(
        f"{index.images:,} images x {index.regions} vectors, {index.images * index.bytes_per_image / 1e6:,.1f} MB, "
        f"in {options.cache_dir}",
        file=sys.stderr,
    )
    if options.query:
        return [answer(index, text, options.top, options.json) for text in options.query]
    answers = []
    for text in lines():
        try:
            answers.append(answer(index, text, options.top, options.json))
        except InputError as error:  # a query that can't be encoded does not end the session
            print("error:", error, file=sys.stderr, flush=True)
    return answers


def answer(index, text, top, as_json):
    """Searches, prints what was found, and returns it."""
    found = index.search(text, top)
    rows = [
        {"id": name, "path": str(index.root / name if index.root else name), "score": round(score, 6)}
        for name, score in found.hits
    ]
    took = {"encode_ms": round(found.encode_ms, 2), "search_ms": round(found.search_ms, 2)}
    result = {"query": text, "results": rows, **took}
    if as_json:
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return result
    print(f"{text}   ({result['encode_ms']:.0f} ms to encode, {result['search_ms']:.1f} ms to search)")
    for place, row in enumerate(rows, 1):
        print(f"{place:3}  {row['score']:.4f}  {row['path']}", flush=True)
    return result


def lines():
    """Queries from standard input, with a prompt on a terminal, until an empty line or its end."""
    while True:
        if sys.stdin.isatty():
            print("query> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def command():
    run(main)


if __name__ == "__main__":
    command()
