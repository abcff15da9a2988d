"""Merges embeddings that are stored already, whatever model made them, and says what that costs on your own data.

    python scripts/compress.py --in all.parquet --out merged.parquet --num-regions 64 --rows 32 --columns 32
    python scripts/compress.py --in all.lance --out merged.lance --num-regions 1/16 --dtype float16
    python scripts/compress.py --in outputs/all_tokens --out outputs/k64 --dtype int8      (indexes of ours)
    python scripts/compress.py --in all.parquet --advise --queries queries.parquet --out outputs/advice

A place is FILE.parquet (or a folder of such files), FILE.npz, FILE.safetensors, FILE.duckdb[#TABLE],
FOLDER/TABLE.lance, qdrant:http://HOST:6333#COLLECTION (qdrant:FOLDER#COLLECTION, its local mode), or an index's folder.
Tables have columns `id` and `embedding`, a list of vectors; others are carried along. Where vectors stand in
the picture is said by --rows and --columns, by a column `grid` ([rows, columns]) or `coords` (a list of [x, y]), or is
not known: then only directions count. int8 comes with a column `scale`; binary are the signs, packed into bytes.

Killed, it goes on when it is called again; what is merged so far lies in OUT.parts until OUT is written.

--advise merges nothing but a sample, for many K and dtypes, and recommends the smallest that keeps 99 % of what all
vectors find; --num-regions [8,16,32] says which K. Queries are vectors in the same kinds of places (a column `relevant`
names the ids that answer, if they are known); an index brings its own. Without any, images held out of the sample stand
for queries, and the answer says so.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse
import json
import time

from samer.runtime.commands import run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in", dest="source", required=True, metavar="PLACE", help="embeddings")
    parser.add_argument("--out", metavar="PLACE", help="where merged ones go; with --advise a folder for its files")
    parser.add_argument("--num-regions", metavar="K", help="vectors per image (64), or a share such as 1/16")
    parser.add_argument("--compressor", default="samer", help="samer (default), hpool, kmeans, querybank, grid, random")
    parser.add_argument("--center-init", default="raster", help="where clusters start: raster (published), or farthest")
    parser.add_argument("--dtype", help="float32, float16, int8 or binary (default: float32; of an index its own)")
    parser.add_argument("--rows", type=int, help="of every image's patch grid")
    parser.add_argument("--columns", type=int, help="of every image's patch grid")
    parser.add_argument("--prompt-tokens", type=int, help="vectors after the grid (ColPali's 6 are known)")
    parser.add_argument("--normalise", action="store_true", help="divide vectors by their lengths")
    parser.add_argument("--queries", metavar="PLACE", help="vectors of queries, for --advise and querybank")
    parser.add_argument("--advise", action="store_true", help="which K and dtype keep 99 %% on this data")
    parser.add_argument("--sample", type=int, default=2000, help="images that --advise looks at (2000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="merge.KEY=VALUE", help="e.g. merge.spatial_weight=0.2")
    options = parser.parse_args(argv)
    if (options.rows is None) != (options.columns is None):
        parser.error("--rows and --columns go together")
    if options.prompt_tokens is not None and options.rows is None:
        parser.error("--prompt-tokens goes with --rows and --columns")
    if not (options.out or options.advise):
        parser.error("say with --out where to write, or ask with --advise")
    from samer.config import load_config
    from samer.vectors.merge import Grid, compress_vectors
    from samer.vectors.places import store_of
    from samer.vectors.queries import query_bank

    named = {"num_regions": options.num_regions, "compressor": options.compressor, "center_init": options.center_init}
    said = [f"merge.{key}={value}" for key, value in named.items() if value is not None]
    config = load_config(None, [*said, *options.overrides])
    merge, budgets = config.merge, config.train.budgets
    grid = Grid(options.rows, options.columns, options.prompt_tokens) if options.rows is not None else None
    source = store_of(options.source)
    if options.advise:
        alone = (merge.num_regions,) if options.num_regions and not budgets else budgets
        return advise(options, source, merge, grid, alone)
    if budgets:
        parser.error("several K are for --advise; name one")
    target = store_of(options.out)
    dtype = options.dtype or target.dtype_for(source)
    queries = query_bank(options.queries, options.normalise) if options.queries else None
    started = time.monotonic()
    how = {"dtype": dtype, "grid": grid, "normalise": options.normalise, "queries": queries}
    done = compress_vectors(source, target, merge, **how)
    if options.json:
        print(json.dumps(vars(done)))
    else:
        print(
            f"{done.rows:,} images, {done.vectors_in:,} vectors -> {done.vectors_out:,} as {dtype}, "
            f"{done.bytes_per_image:,.0f} bytes per image, in {options.out}; {time.monotonic() - started:.0f} s"
        )
    return done


def advise(options, source, merge, grid, budgets):
    """Prints, and with --out writes, what each budget costs on this data."""
    from samer.vectors.advice import advice, write_advice

    how = {"queries": options.queries, "grid": grid, "normalise": options.normalise, "sample": options.sample}
    found = advice(source, merge, budgets=budgets, **how)
    if options.out:
        write_advice(options.out, found)
    print(json.dumps(found.to_json()) if options.json else "\n".join(found.lines()))
    return found


def command():
    run(main)


if __name__ == "__main__":
    command()
