"""Benchmarks of codes and of smaller budgets; scripts/bench.py calls it for `bits`, `coarse` and `small`.

python scripts/bench_bits.py bits --index FOLDER --built FOLDER... [--others FOLDER...] [--reference FOLDER]
                             [--bank FILE [--keep K...]] [--out FILE]
    what codes of 1, 2 and 4 bits keep of a float index, of those built for smaller K, and of what a bank keeps of it:
    bytes against recall; and budgets merged out of the first beside indexes built for them
python scripts/bench_bits.py coarse [--index FOLDER] [--images 100000] [--out FILE]
    two stages against one: time and overlap@10 by how many candidates, and what a bound could leave out
python scripts/bench_bits.py small [--images 1000000] [--regions 64] [--bits 1] [--out FILE]
    so many images in codes on disk: bytes, one query and 32, time and memory

Indexes are of float32 with captions (scripts/cache.py). --out FILE.md writes the tables, FILE.json beside it figures.
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
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from samer.runtime.commands import run

KINDS = ("int8", "4bit", "2bit", "1bit")
CANDIDATES = (100, 200, 500, 1000, 2000, 5000)


def overlap(exact, found):
    """Mean share of (Q, n) ids that two rankings have in common."""
    pairs = zip(exact.tolist(), found.tolist())
    return statistics.mean(len(set(a) & set(b)) / len(a) for a, b in pairs)


def figures_of(scores, owner):
    """R@1, R@10 and nDCG@10 of scores (Q, I), per cent."""
    import torch

    from samer.metrics import retrieval_metrics

    found = retrieval_metrics(scores, owner[:, None] == torch.arange(scores.shape[1]))
    return {name: found[name] for name in ("r@1", "r@10", "ndcg@10")}


def signs_of(index, split):
    """Scores by plain signs, (Q, I)."""
    import torch

    from samer.scoring import StoredImages, pack_signs, score_stored

    shards = [StoredImages(pack_signs(images.tokens), None, images.mask) for _, images in index.stored(split)]
    queries = [block for block, *_ in index.queries(split)]
    return torch.cat([torch.cat([score_stored(block, each) for block in queries]) for each in shards], dim=1)


def bits(options):
    """The table of bytes against recall, over K and code, and what a query bank keeps of the first index."""
    from samer.index.read import Index
    from samer.index.recode import recode
    from samer.retrievers.banks import read_bank

    bank, split = read_bank(options.bank) if options.bank else None, options.split
    whole = Index(options.reference).scores(split)[0].topk(10, dim=1).indices if options.reference else None
    index, rows = Index(options.index), []
    scores, owner = index.scores(split)
    first, merged = scores.topk(10, dim=1).indices, index.manifest.merge.compressor
    with tempfile.TemporaryDirectory(dir=options.work) as place:
        for folder in (options.index, *options.built, *options.others):
            stored_rows(rows, folder, Index(folder).manifest.merge.compressor, split, bank, place, first, whole)
        for keep in options.keep:
            kept = Path(place) / f"kept-{keep}"
            recode(options.index, kept, keep=keep, bank=bank, assignments=False)
            stored_rows(rows, kept, f"{merged}, kept by the bank", split, bank, place, first, whole)
        levels = budgets(options, Path(place))
    return {"rows": rows, "budgets": levels, "split": split, "images": index.size(split)[0], "queries": len(owner)}


def undominated(rows, reference):
    """Rows that no other equals with no more bytes and as much overlap with a reference, "first" or "all".

    The first row and those of signs always stay.
    """
    place = lambda row: (row["bytes"], -row[reference])
    beats = lambda ours, theirs: ours != theirs and ours[0] <= theirs[0] and ours[1] <= theirs[1]
    stays = lambda row: row is rows[0] or row["code"] == "signs" or not any(beats(place(o), place(row)) for o in rows)
    return sorted(filter(stays, rows), key=lambda row: -row["bytes"])


def stored_rows(rows, folder, name, split, bank, place, first, whole):
    """Adds the rows of an index: as it is, in codes, and as plain signs.

    Args:
        rows: so far.
        folder: of the index, float32.
        name: how its vectors are made.
        split: to search.
        bank: in whose metric codes are learned, those of the first index without it, too; None: in the vectors' own.
        place: where indexes are made meanwhile.
        first: (Q, 10) what the first index finds in float32.
        whole: likewise of the reference; None: there is none.
    """
    from samer.index.read import Index
    from samer.index.recode import recode

    banks = [None, bank] if bank else [None]
    if bank and rows:  # what the vectors' own metric costs is seen in the first index
        banks = [bank]
    index = Index(folder)
    regions, dim = index.size(split)[2], index.manifest.embedding_dim
    scores, owner = index.scores(split)
    best = scores.topk(10, dim=1).indices

    def row(code, size, scores):
        top = scores.topk(10, dim=1).indices
        about = {"K": regions, "merged": name, "code": code, "bytes": size, "own": overlap(best, top)}
        about |= {"all": overlap(whole, top)} if whole is not None else {}
        rows.append({**about, "first": overlap(first, top), **figures_of(scores, owner)})
        print(line(rows[-1]), flush=True)

    row(index.manifest.dtype, index.size(split)[3], scores)
    for kind in KINDS:
        for given in (None,) if kind == "int8" else banks:
            made = Path(place) / "made"
            recode(folder, made, kind, bank=given, assignments=False)
            coded = Index(made)
            row(f"{kind}, bank" if given else kind, coded.size(split)[3], coded.scores(split)[0])
            shutil.rmtree(made)
    row("signs", regions * dim // 8, signs_of(index, split))


def budgets(options, place):
    """Budgets merged out of the first index, beside those built for them; each in floats and in 1 bit."""
    from samer.index.read import Index
    from samer.index.recode import recode

    split, rows = options.split, []
    built = {Index(folder).size(split)[2]: folder for folder in options.built}
    if not built:
        return rows
    for kind in ("float32", "1bit"):
        recode(options.index, place / f"levels-{kind}", kind, list(built))
        levels = Index(place / f"levels-{kind}")
        for budget, folder in built.items():
            alone = folder
            if kind != "float32":
                alone = place / f"alone-{budget}"
                recode(folder, alone, kind)
            exact, owner = Index(alone).scores(split)
            scores, _ = levels.scores(split, budget=budget)
            mine, theirs = figures_of(scores, owner), figures_of(exact, owner)
            difference, low, high = paired(scores, exact, owner)
            rows.append({"K": budget, "code": kind, "budget": mine, "built": theirs, "r@1": [difference, low, high]})
            print(
                f"K {budget:3} {kind:8} out of all: R@1 {mine['r@1']:.2f}, built {theirs['r@1']:.2f}; "
                f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"
            )
    return rows


def paired(ours, theirs, owner):
    """Points of R@1 between two scores (Q, I), and the 95 % interval over images, whose captions go together."""
    import torch

    hits = [scores.argmax(1) == owner for scores in (ours, theirs)]
    points = 100 * (hits[0].double() - hits[1].double())
    sums = torch.zeros(int(owner.max()) + 1, 2, dtype=torch.float64)
    sums.index_add_(0, owner, torch.stack([points, torch.ones_like(points)], dim=1))
    drawn = torch.randint(len(sums), (2000, len(sums)), generator=torch.Generator().manual_seed(0))
    totals = torch.stack([sums[row].sum(0) for row in drawn])
    means = (totals[:, 0] / totals[:, 1]).sort().values
    return float(points.mean()), float(means[49]), float(means[1949])


def line(row):
    """A row of the table for the terminal."""
    told = f", {row['all']:.3f} with the reference" if "all" in row else ""
    return (
        f"K {row['K']:3} {row['merged']:26}{row['code']:12}{row['bytes']:9,.0f} B  overlap@10 {row['own']:.3f} with "
        f"its floats, {row['first']:.3f} with the first{told}; R@1 {row['r@1']:.2f} nDCG@10 {row['ndcg@10']:.2f}"
    )


def rows_table(rows, whole, reference):
    """One table: rows by the overlap with a reference, "first" or "all", that no other row dominates."""
    name = f"K = {whole['K']}" if reference == "first" else "all vectors"
    lines = [
        f"| K | merged by | stored as | bytes per image | overlap@10, same vectors | {name} | R@1 | R@10 "
        "| nDCG@10 kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in undominated(rows, reference):
        kept = f"{100 * row['ndcg@10'] / whole['ndcg@10']:.1f} %"
        about = f"| {row['K']} | {row['merged']} | {row['code']} | {row['bytes']:,.0f} | {row['own']:.3f} "
        lines.append(f"{about}| {row[reference]:.3f} | {row['r@1']:.1f} | {row['r@10']:.1f} | {kept} |")
    return lines


def bits_table(found):
    """The tables in markdown."""
    rows, whole = found["rows"], found["rows"][0]
    lines = [
        f"{found['images']:,} images, {found['queries']:,} captions of {found['split']}. Overlap@10 with the same "
        f"vectors in float32, and with K = {whole['K']} in float32, against which nDCG@10 kept is, too. Left out is "
        "what another row dominates, with no more bytes and as much overlap with the latter; but for plain signs.",
        "",
    ]
    lines += rows_table([row for row in rows if row["merged"].startswith(whole["merged"])], whole, "first")
    if "all" in whole:
        lines += ["", "The same with the overlap with all vectors in float32, and indexes merged otherwise:", ""]
        lines += rows_table(rows, whole, "all")
    if found["budgets"]:
        lines += ["", "| K | stored as | R@1, built for K | out of all vectors | difference |", "|---|---|---|---|---|"]
    for row in found["budgets"]:
        difference, low, high = row["r@1"]
        about = f"| {row['K']} | {row['code']} | {row['built']['r@1']:.2f} | {row['budget']['r@1']:.2f} "
        lines.append(f"{about}| {difference:+.2f} [{low:+.2f}, {high:+.2f}] |")
    return lines


def timed(function, runs=3):
    """What a function returns, and its median seconds after a first call."""
    result, seconds = function(), []
    for _ in range(runs):
        started = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - started)
    return result, statistics.median(seconds)


def real_images(options):
    """Vectors (I, K, D), mask, queries and words of a split of an index; without one clustered random ones."""
    import torch
    import torch.nn.functional as F

    from samer.index.exact import exact_blocks
    from samer.index.read import Index
    from samer.runtime.shards import joined
    from samer.tokens import QueryTokens

    if not options.index:
        generator = torch.Generator().manual_seed(1)
        themes = torch.randn(500, 128, generator=generator)
        picks = torch.randint(0, 500, (5000, 64), generator=generator)
        tokens = F.normalize(themes[picks] + 0.7 * torch.randn(5000, 64, 128, generator=generator), dim=-1)
        asked = tokens[::150, :32] + torch.randn(34, 32, 128, generator=generator) * 0.05
        queries = QueryTokens(F.normalize(asked, dim=-1)[:32], torch.ones(32, 32, dtype=torch.bool))
        return tokens, torch.ones(5000, 64, dtype=torch.bool), queries, "random vectors around 500 directions"
    index = Index(options.index)
    blocks = [
        block
        for shard in index.manifest.splits[options.split].images
        for block in exact_blocks(index, options.split, shard, 1024)
    ]
    queries = next(iter(index.queries(options.split)))[0]
    picked = torch.arange(32) * (len(queries.tokens) // 32)
    queries = QueryTokens(queries.tokens[picked].float(), queries.mask[picked])
    tokens, mask = joined([block.tokens for block in blocks]), joined([block.mask for block in blocks])
    return tokens, mask, queries, f"{len(tokens):,} real images of {options.split}"


def coarse(options):
    """One stage against two, on real images as they are, and on so many as are wanted: these again with noise."""
    tokens, mask, queries, words = real_images(options)
    found = {"real": stages(tokens, mask, queries, len(tokens), options.budget), "words": words}
    found["bound"] = open_share(tokens, mask, queries, options.budget)
    print(f"{words}: a bound by the radius of {options.budget} clusters leaves {100 * found['bound']:.2f} % open")
    if options.images > len(tokens):
        found["many"] = stages(tokens, mask, queries, options.images, options.budget)
    return found


def stages(tokens, mask, queries, count, budget):
    """Seconds and overlap@10 of a scan and of two stages over `count` images in 1 bit, by how many candidates."""
    import torch

    from samer.codes import learn
    from samer.index.stages import search_coarse
    from samer.scoring import search
    from samer.tokens import QueryTokens

    codebook = learn("1bit", tokens[:1024], mask[:1024])
    whole, few = [], []
    for start in range(0, count, 1000):
        rows = torch.arange(start, min(count, start + 1000)) % len(tokens)
        for level, images in zip((whole, few), coded(codebook, tokens[rows], mask[rows], start >= len(tokens), budget)):
            level.append(([f"{start + k:07}" for k in range(len(rows))], images))
    numbers = {name: k for k, name in enumerate(name for ids, _ in whole for name in ids)}
    shards = [images for _, images in whole]
    rows = []
    for asked in (QueryTokens(queries.tokens[:1], queries.mask[:1]), queries):
        exact, scan = timed(lambda asked=asked: search(asked, whole, 10))
        many = len(asked.tokens)
        print(f"{count:,} images, {many} queries: the scan {scan:.3f} s", flush=True)
        for candidates in [each for each in CANDIDATES if each < count]:
            how = asked, few, 10, numbers, shards, candidates
            got, seconds = timed(lambda how=how: search_coarse(*how))
            same = [len({n for n, _ in a} & {n for n, _ in b}) / 10 for a, b in zip(exact, got)]
            rows.append({"images": count, "queries": many, "candidates": candidates, "seconds": seconds, "scan": scan})
            rows[-1]["overlap"] = statistics.mean(same)
            told = f"{scan / seconds:5.2f} times as fast, overlap@10 {statistics.mean(same):.3f}"
            print(f"  {candidates:5} candidates: {told}", flush=True)
    return rows


def coded(codebook, tokens, mask, noisy, budget):
    """Images as `StoredImages` of all vectors and of a smaller budget."""
    import torch
    import torch.nn.functional as F

    from samer.budgets import smaller_budgets
    from samer.scoring import StoredImages

    if noisy:
        noise = torch.randn(tokens.shape) * tokens.std(dim=(0, 1))
        tokens = F.normalize(tokens + 0.5 * noise, dim=-1) * mask[..., None]
    images = codebook.encode(tokens, mask)
    ((few, here),) = smaller_budgets(tokens, mask, None, [budget])
    small = codebook.encode(few, here, (images.bases, images.scales))
    return [
        StoredImages(each.codes, images.scales, there, None, images.bases, codebook)
        for each, there in ((images, mask), (small, here))
    ]


def open_share(tokens, mask, queries, budget):
    """Share of images that a bound can't leave out of the best 10: products with few vectors and clusters' radii."""
    import torch

    from samer.budgets import smaller_budgets
    from samer.scoring import maxsim

    exact = maxsim(queries.tokens, tokens, queries.mask, mask)
    ((few, here),) = smaller_budgets(tokens, mask, None, [budget])
    similar = (tokens @ few.transpose(1, 2)).masked_fill(~here[:, None], -2)
    own = similar.argmax(2)  # (I, K)
    far = (tokens - few.gather(1, own[..., None].expand_as(tokens))).norm(dim=-1) * mask
    radius = torch.zeros(few.shape[:2]).scatter_reduce_(1, own, far, "amax")
    shares = []
    for tokens_of, valid, scores in zip(queries.tokens, queries.mask, exact):
        words = tokens_of[valid]
        bound = torch.einsum("md,ikd->imk", words, few) + radius[:, None] * words.norm(dim=-1)[:, None]
        bound = bound.masked_fill(~here[:, None], -9).amax(2).mean(1)
        shares.append(float((bound >= scores.topk(10).values[-1]).double().mean()))
    return statistics.mean(shares)


def coarse_table(found):
    """The tables in markdown."""
    lines = [f"Images in 1 bit a component, K = 64 and its smaller budget; {found['words']}. A bound by the clusters' "]
    lines[0] += f"radii leaves {100 * found['bound']:.2f} % of them open."
    for name, words in (("real", found["words"]), ("many", "the same, repeated with noise: for time, not for recall")):
        if name in found:
            lines += ["", f"{found[name][0]['images']:,} images ({words}):", ""]
            lines += [
                "| queries at once | candidates | scan | two stages | ratio | overlap@10 |",
                "|---|---|---|---|---|---|",
            ]
        for row in found.get(name, ()):
            times = f"{row['scan']:.3f} s | {row['seconds']:.3f} s | {row['scan'] / row['seconds']:.2f}"
            lines.append(f"| {row['queries']} | {row['candidates']:,} | {times} | {row['overlap']:.3f} |")
    return lines


def small(options):
    """An index of so many images in random codes, mapped from disk: what it takes, how long a search is."""
    import torch
    import torch.nn.functional as F

    from samer import InputError, QueryTokens
    from samer.index.read import Index

    found = {"images": options.images, "regions": options.regions, "bits": options.bits, "searches": []}
    with tempfile.TemporaryDirectory(dir=options.work) as place:
        folder = Path(place)
        if shutil.disk_usage(folder).free < 1.3 * options.images * (options.regions * 16 * options.bits + 200):
            raise InputError("too little disk here; name another with --work")
        write_small(folder, options.images, options.regions, f"{options.bits}bit")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        found |= {"bytes_per_image": Index(folder).size("images")[3], "disk": size}
        print(f"{options.images:,} images, {found['bytes_per_image']:,.0f} B each, {size / 1e9:.2f} GB on disk")
        for queries in (1, 32):
            batch = F.normalize(torch.randn(queries, 32, 128), dim=-1)
            query = QueryTokens(batch, torch.ones(queries, 32, dtype=torch.bool))
            index = Index(folder)
            _, seconds = timed(lambda index=index, query=query: index.search(query, "images", 10))
            own, mapped = resident()
            found["searches"].append({"queries": queries, "seconds": seconds, "own_gb": own, "mapped_gb": mapped})
            print(
                f"queries at once: {queries}; {seconds:.2f} s; resident {own:.2f} GB, {mapped:.1f} GB of mapped files"
            )
    return found


def write_small(folder, count, regions, kind, per=8192):
    """An index of random codes."""
    import torch

    from samer import MergeConfig
    from samer.codes import learn
    from samer.index.codes import FILE, codes_hash, write_codes
    from samer.index.manifest import IndexManifest, Making, Split, stamp_of, write_index_manifest
    from samer.index.write import write_image_shard
    from samer.retrievers.identity import ModelIdentity

    sample = torch.nn.functional.normalize(torch.randn(64, 64, 128), dim=-1)
    codebook = learn(kind, sample, torch.ones(64, 64, dtype=torch.bool))
    write_codes(folder / FILE, codebook, "")
    made = {"model": ModelIdentity("", "", "", ""), "projector": "none", "merge": MergeConfig(num_regions=regions)}
    made |= {"dtype": kind, "embedding_dim": 128, "codes": codes_hash(codebook)}
    tokens, shards = torch.randint(0, 256, (per, regions, codebook.code_bytes), dtype=torch.uint8), []
    bases = torch.randint(-127, 128, (per, 128), dtype=torch.int8)
    for start in range(0, count, per):
        rows = min(per, count - start)
        tensors = {"tokens": tokens[:rows].roll(start // per, 0), "bases": bases[:rows].roll(start // per, 0)}
        tensors |= {"scales": torch.full((rows,), 0.003), "grids": torch.zeros(rows, 2, dtype=torch.int32)}
        stamp = {**stamp_of(Making(**made)), "ids": [f"{start + k:07d}" for k in range(rows)], "texts": []}
        path = folder / "images" / f"images-{start // per:05d}.safetensors"
        shards.append(write_image_shard(path, tensors, {}, stamp))
    write_index_manifest(folder / "manifest.json", IndexManifest(**made, splits={"images": Split(tuple(shards), ())}))


def resident():
    """Gigabytes of this process's own, and of mapped files, that are in memory."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[key].split()[0]) / 1e6 for key in ("RssAnon", "RssFile"))


def small_table(found):
    """The table in markdown."""
    how = f"K = {found['regions']}, {found['bits']} bit a component, {found['bytes_per_image']:,.0f} B each"
    size = f"{found['images']:,} images, {how}"
    lines = [f"{size}, {found['disk'] / 1e9:.2f} GB on disk (random codes):", ""]
    lines += ["| queries at once | time | resident | of mapped files |", "|---|---|---|---|"]
    for row in found["searches"]:
        memory = f"{row['own_gb']:.2f} GB | {row['mapped_gb']:.1f} GB"
        lines.append(f"| {row['queries']} | {row['seconds']:.2f} s | {memory} |")
    return lines


def main(argv=None):
    """Runs one of them."""
    what = {"bits": (bits, bits_table), "coarse": (coarse, coarse_table), "small": (small, small_table)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=what)
    parser.add_argument("--index", default="", help="an index of float32; coarse: else random vectors")
    parser.add_argument("--built", nargs="+", default=[], help="bits: indexes of the same images built for smaller K")
    parser.add_argument("--others", nargs="+", default=[], help="bits: indexes of the same images merged otherwise")
    parser.add_argument("--reference", default="", help="bits: the same images with all their vectors")
    parser.add_argument("--keep", nargs="+", type=int, default=[], help="bits: so many vectors, kept by --bank")
    parser.add_argument("--bank", default="", help="bits: also codes learned in this query bank's metric")
    parser.add_argument("--split", default="test", help="of the indexes (test)")
    parser.add_argument("--images", type=int, help="coarse: how many (100,000); small: likewise (1,000,000)")
    parser.add_argument("--budget", type=int, default=8, help="coarse: vectors of the first stage (8)")
    parser.add_argument("--regions", type=int, default=64, help="small: vectors an image (64)")
    parser.add_argument("--bits", type=int, default=1, choices=(1, 2, 4), help="small: of a component (1)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--work", default=".", help="where indexes are made meanwhile (.)")
    parser.add_argument("--out", default="", help="FILE.md for the tables; FILE.json gets the figures")
    options = parser.parse_args(argv)
    if options.what == "bits" and not options.index:
        parser.error("bits needs --index FOLDER")
    if options.keep and not options.bank:
        parser.error("--keep needs --bank FILE")
    options.images = options.images or (100_000 if options.what == "coarse" else 1_000_000)
    import torch

    from samer.runtime.files import check_writable

    if options.out:
        check_writable(options.out)
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    about = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(about)
    run_it, table = what[options.what]
    with torch.no_grad():
        found = run_it(options)
    if options.out:
        lines = [f"`python scripts/bench.py {options.what}`, {about}.", "", *table(found)]
        Path(options.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
        Path(options.out).with_suffix(".json").write_text(
            json.dumps({"about": about, **found}, indent=1), encoding="utf-8"
        )
    return found


if __name__ == "__main__":
    run(main)
