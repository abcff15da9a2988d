"""Writes an index out into the store that you run: Qdrant, LanceDB, parquet, VectorChord, Milvus, Vespa, Weaviate.

    python scripts/export.py --cache-dir outputs/pictures --to qdrant --place http://localhost:6333
    python scripts/export.py --cache-dir outputs/pictures --to lancedb --place outputs/lance --verify 200
    python scripts/export.py --cache-dir outputs/pictures --to parquet --place outputs/parquet --dtype float32
    python scripts/export.py --cache-dir outputs/pictures --to vespa --place http://localhost:8080 --schema > samer.sd

The same command again brings the store to what the index holds by then: new and changed images are written, deleted
ones removed. A file in the index's folder (--cursor) notes what is done, so that a run that was stopped goes on. With
--verify N, N queries are asked of the store and of our exact search: the overlap of the best 10, and the largest
difference of a score. Vectors are float16 unless --dtype says float32; int8 ones are multiplied out, of 1-bit ones the
exact file is taken. Vespa keeps bfloat16 for float16, Weaviate float32 always. --schema prints what Vespa must be
deployed with before the first export. A hosted store's key is taken from the environment, SAMER_STORE_KEY. Prints the
lines of Python that search the store by words.
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
    from samer.export import STORES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", required=True, help="made by scripts/index.py or scripts/cache.py")
    parser.add_argument("--split", help="default: the index's only one")
    parser.add_argument("--to", required=True, choices=STORES, help="kind of store")
    parser.add_argument("--place", required=True, help="URL of a server, or a folder")
    parser.add_argument("--collection", default="samer", help="collection, table, class (samer)")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"], help="of vectors (float16)")
    parser.add_argument("--coarse", type=int, default=0, metavar="K", help="so many vectors besides, as a first stage")
    parser.add_argument("--cursor", help="file that notes what is done (export-STORE-COLLECTION.json in the index)")
    parser.add_argument("--schema", action="store_true", help="print what the store must know beforehand, and end")
    parser.add_argument("--verify", type=int, metavar="N", help="ask the store and our search N queries")
    options = parser.parse_args(argv)
    if options.coarse < 0:
        parser.error("--coarse must be 0 or more")
    from pathlib import Path

    from samer.config import InputError
    from samer.export.run import export, facts_of, make_store, query_side, verify
    from samer.index.read import Index

    index = Index(options.cache_dir)
    splits = list(index.manifest.splits)
    if options.split is None and len(splits) != 1:
        raise InputError(f"{options.cache_dir}: holds {', '.join(splits)}; name one with --split")
    split = options.split or splits[0]
    facts = facts_of(index, split, options.dtype, options.coarse)
    store = make_store(options.to, options.place, options.collection, facts)
    if options.schema:
        print(store.schema(), end="", flush=True)
        return None
    store.open()
    try:
        name = f"export-{options.to}-{options.collection}.json"
        done = export(index, split, store, options.cursor or Path(options.cache_dir) / name)
        print(f"{done.images:,} images in {options.place}: {done.written} shards written, {done.kept} kept", flush=True)
        if options.verify is not None:
            found = verify(index, split, store, options.verify)
            print(
                f"{found.queries} queries ({found.kind}): overlap@10 {found.overlap:.4f}, largest score difference "
                f"{found.difference:.2e}",
                flush=True,
            )
        print(query_side(store, options.cache_dir), end="", flush=True)
        return done
    finally:
        store.close()


def command():
    run(main)


if __name__ == "__main__":
    command()
