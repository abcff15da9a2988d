"""Benchmarks: medians of several runs, the baseline in the same process, ratios reported.

python scripts/bench.py merge     the operator against its own products, a loop over images and clusters, and H-Pool
python scripts/bench.py querybank merging in the space of queries, beside farthest and raster SaMer
python scripts/bench.py maxsim    exact scoring against the bare product and other engines (the extra `peers`)
                                  also: --index INDEX --before CHECKOUT --fast-plaid PYTHON
python scripts/bench.py scale     one million images of 64 x 128 int8 on disk: time and memory of a search (8.2 GB)
python scripts/bench.py export    the same million exported to parquet in float16: pace and memory (25 GB)
python scripts/bench.py eval      5,000 captions against 1,000 images: scores, metrics, memory
python scripts/bench.py cache     how much of building an index is spent outside the backbone
python scripts/bench.py quality   what each stored dtype keeps: recall, overlap with float32, bytes
python scripts/bench.py train     training from pixels and from stored features
python scripts/bench.py pictures  photographs of 12, 50 and 108 megapixels: memory, pace, what reducing costs
python scripts/bench.py latency   one query at a time, alone and beside a busy process, by how torch's threads wait
python scripts/bench.py reduce    a vision tower on fewer tokens: pictures a second and FLOPs, by reducer and tier
python scripts/bench.py gpu       a random ColPali of the published size on a GPU: encoding, merging, training
python scripts/bench.py bits      codes of 1, 2 and 4 bits, and smaller budgets: bytes against recall (bits --help)
python scripts/bench.py coarse    two stages of search against one (coarse --help)
python scripts/bench.py small     one million images in 1 bit a component on disk (small --help)
python scripts/bench.py pipelines decoding, index, features, training: what surrounds the model (pipelines --help)
python scripts/bench.py help      how long --help of every script takes, beside an interpreter that does nothing

Each waits until the machine is quiet (a load below 0.5), --wait SECONDS at most, and says so where it was not. Those
whose result is a table write it with --json FILE and --markdown FILE, and what it was measured on.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from samer.runtime.commands import WAITING, run
from scripts.bench_bits import overlap, resident

ROOT = Path(__file__).resolve().parents[1]
FLOOR = "the product alone, blocked (the floor)"
QUIET = 0.5  # load of the last minute


@dataclass(frozen=True)
class Table:
    """What a benchmark returns to be printed, and written by --json and --markdown.

    Attributes:
        name: its heading.
        rows: all with the same keys, which head the columns; a value is a text, a number or None.
        notes: lines below it.
    """

    name: str
    rows: list[dict]
    notes: list[str] = field(default_factory=list)

    def cells(self):
        """Every row as texts, the heads first."""
        return [list(self.rows[0]), *([shown(value) for value in row.values()] for row in self.rows)]

    def text(self):
        """As a terminal shows it."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells)
        return "\n".join([self.name, *(f"  {line}" for line in lines), *self.notes])

    def markdown(self):
        """As a page shows it."""
        head, *rows = self.cells()
        marks = ["---", *("---:" for _ in head[1:])]
        lines = [f"| {' | '.join(row)} |" for row in (head, marks, *rows)]
        return "\n".join([f"**{self.name}**", "", *lines, *(f"\n{note}" for note in self.notes), ""])


def shown(value):
    """A cell: three significant digits of a number below 100, whole ones above."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def await_quiet(seconds):
    """Waits until little else runs on this machine, so many seconds at most; (quiet or not, the load that it had)."""
    until = time.monotonic() + seconds
    if seconds and os.getloadavg()[0] >= QUIET:
        print(f"load {os.getloadavg()[0]:.2f}: waiting for a quiet machine, {seconds:g} s at most", flush=True)
    while os.getloadavg()[0] >= QUIET and time.monotonic() < until:
        time.sleep(min(2, max(0.0, until - time.monotonic())))
    load = os.getloadavg()[0]
    if load >= QUIET:
        print(f"NOT QUIET: load {load:.2f} before the first run; others share the times below", flush=True)
    return load < QUIET, round(load, 2)


def machine():
    """What figures depend on: the processor, torch, and the revision of this code."""
    import torch

    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    found = {"cpu": models[0].partition(":")[2].strip() if models else platform.processor(), "cores": os.cpu_count()}
    found |= {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "", "torch": torch.__version__}
    found |= {"threads": torch.get_num_threads(), "python": platform.python_version()}
    return {**found, "revision": git.stdout.strip()}


def keep(tables, about, options):
    """Prints tables and writes them where --json and --markdown say."""
    for table in tables:
        print(table.text())
    if options.json:
        found = {**about, "tables": [asdict(table) for table in tables]}
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        facts = about["machine"]
        words = f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}"
        state = "quiet" if about["quiet"] else f"NOT quiet (load {about['load']})"
        line = f"`{about['command']}`, {facts['revision']}, {words}, {state}."
        text = "\n".join([*(table.markdown() for table in tables), line, ""])
        Path(options.markdown).write_text(text, encoding="utf-8")


def medians(runs, *functions):
    """Median milliseconds of each function, called in turn so that a noisy moment hits all of them."""
    times = [[] for _ in functions]
    for turn in range(runs + 3):
        for function, row in zip(functions, times):
            started = time.perf_counter()
            function()
            if turn >= 3:
                row.append(1000 * (time.perf_counter() - started))
    return [statistics.median(row) for row in times]


def merge(runs):
    """One image of 1,030 x 128 to 64, published settings, no gradient."""
    import torch
    import torch.nn.functional as F
    from scipy.cluster.hierarchy import linkage

    from samer import MergeConfig, merge_tokens, visual_coords
    from samer.compressors.hpool import row_distances, ward_labels

    tokens, coords = F.normalize(torch.randn(1, 1030, 128), dim=-1), visual_coords(32, 32, prompt_tokens=6)
    config = MergeConfig()
    centres, weights = tokens[0, :64].t().contiguous(), torch.rand(64, 1030)
    similarities = lambda: [tokens[0] @ centres for _ in range(config.cluster_iters + 1)]
    products = lambda: (similarities(), weights @ tokens[0])
    all_products = lambda: (products(), [weights @ tokens[0] for _ in range(config.cluster_iters)])
    ours, some, every = medians(runs, lambda: merge_tokens(tokens, coords, config), products, all_products)
    rows = [
        ("SaMer", ours, ours),
        ("  its T + 1 similarity products and the weighted sum", some, ours),
        ("  the same, and T means written as products", every, ours),
    ]
    alone = [{"": name, "ms": each, "SaMer /": whole / each} for name, each, whole in rows]
    many = tokens.expand(16, -1, -1).contiguous()
    real = photographed(1)[0][0].double()
    condensed = row_distances(real)
    jobs = {
        "SaMer": lambda: merge_tokens(many, coords, config),
        "  a loop over clusters, image by image": lambda: merge_loop(tokens[0], coords, config),
        "H-Pool": lambda: ward_labels(real, 64),
        "  distances between the square matrix's rows (before)": lambda: square_ward(real, 64),
        "  scipy's linkage of its distances (the floor)": lambda: linkage(condensed, "ward"),
    }
    times = dict(zip(jobs, medians(max(5, runs // 20), *jobs.values())))
    times["SaMer"] /= 16
    batch = [{"": name, "ms": each, "/ SaMer": each / times["SaMer"]} for name, each in times.items()]
    after, before = ward_labels(real, 64).numpy(), square_ward(real, 64)
    same = bool(((after[:, None] == after) == (before[:, None] == before)).all())
    speed = times["  distances between the square matrix's rows (before)"] / times["H-Pool"]
    note = f"H-Pool is {speed:.1f} times as fast as before, its partition {'the same' if same else 'ANOTHER'}."
    return [
        Table("one image of 1,030 x 128 to 64", alone),
        Table("per image of 1,030 x 128 to 64, SaMer's of a batch of 16", batch, [note]),
    ]


def square_ward(tokens, regions):
    """H-Pool as people use it: scipy is given the matrix of distances, a row an observation."""
    from scipy.cluster.hierarchy import fcluster, linkage

    rows = tokens.numpy()
    return fcluster(linkage(1 - rows @ rows.T, method="ward", metric="euclidean"), regions, "maxclust")


def merge_loop(tokens, coords, config):
    """The merge of one image as METHOD section 2 reads, a cluster at a time: what one writes first."""
    import torch
    import torch.nn.functional as F

    chosen = torch.linspace(0, len(tokens) - 1, config.num_regions).round().long()
    centres, places = tokens[chosen].clone(), coords[chosen].clone()
    distance = lambda: torch.stack(
        [
            1 - tokens @ centre + config.spatial_weight * (coords - place).square().sum(1)
            for centre, place in zip(centres, places)
        ],
        dim=1,
    )
    for _ in range(config.cluster_iters):
        nearest = distance().argmin(1)
        for k in range(config.num_regions):
            members = nearest == k
            if members.any():
                centres[k] = F.normalize(tokens[members].mean(0), dim=0)
                places[k] = coords[members].mean(0)
    weights = (-distance() / config.assignment_temperature).softmax(1)
    return torch.stack([F.normalize((w[:, None] * tokens).sum(0) / w.sum(), dim=0) for w in weights.t()])


def queries(runs):
    """Images of 1,030 x 128 to 64 by a bank of 2,048, in batches of 1 and 8, no gradient; SaMer on the same images.

    The images are drawn around a few directions each, as real ones are, and bank and patches about the same ones.
    """
    import torch

    from samer import MergeConfig, visual_coords
    from samer.compressors import make_compressor
    from samer.compressors.querybank import pick_one
    from samer.tokens import VisualTokens

    images, bank = photographed(8)
    visual = VisualTokens(images, visual_coords(32, 32, prompt_tokens=6))
    one = VisualTokens(images[:1], visual.coords)
    merges = {name: MergeConfig(compressor="samer", center_init=name) for name in ("raster", "farthest")}
    merges["querybank"] = MergeConfig(compressor="querybank")
    makers = {name: make_compressor(merge) for name, merge in merges.items()}
    makers["querybank"].fit_queries(bank)
    share, room = torch.full((len(bank),), 1 / len(bank)), torch.empty(2, len(bank), images.shape[1])
    jobs = [lambda each=each, some=some: each(some) for each in makers.values() for some in (one, visual)]
    product = lambda: torch.mm(bank, images[0].T, out=room[0])
    times = medians(max(9, runs // 10), product, lambda: pick_one(images[0], bank, share, 64, room), *jobs)
    raster = times[3] / len(images)
    rows = []
    for place, name in enumerate(makers):
        alone, many = times[2 + 2 * place], times[3 + 2 * place] / len(images)
        rows.append({"": name, "ms alone": alone, "ms in a batch of 8": many, "/ raster": many / raster})
    note = f"The product of bank and tokens takes {times[0]:.2f} ms, with the picks of 64 {times[1]:.2f} ms."
    return [Table("per image of 1,030 x 128 to 64 vectors, bank of 2,048", rows, [note])]


def photographed(count):
    """Unit tokens (count, 1030, 128) and a bank (2048, 128): smooth fields of directions, a common one in all."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    themes, common = normal(300, 128), normal(128)
    fields = F.interpolate(normal(count, 20, 6, 6), size=(32, 32), mode="bicubic").flatten(2)  # which theme where
    held = themes[torch.randint(0, 300, (count, 20), generator=generator)]
    patches = (3 * fields).softmax(1).transpose(1, 2) @ held  # (count, 1024, 128)
    tokens = torch.cat([patches, normal(count, 6, 128)], dim=1) + common + 0.3 * normal(count, 1030, 128)
    asked = themes[torch.randint(0, 300, (2048,), generator=generator)] + 0.5 * common + 0.5 * normal(2048, 128)
    return F.normalize(tokens, dim=-1), F.normalize(asked, dim=-1)


def score(runs, options):
    """32 queries against images of 64 x 128 or so: every engine on the same data, in turn; and what each finds."""
    import torch

    from samer import QueryTokens
    from samer.products import int8_product_works
    from samer.scoring import StoredImages, quantise_images, search

    data = {"clustered": drawn(options.images)}
    if options.index:
        data = {"real features": stored_features(options.index, options.images)}
    ((kind, (queries, images)),) = data.items()
    tables = [compared(f"{kind}, float32 to 1-bit and other engines", queries, images, runs, options)]
    word = "in use" if int8_product_works(torch.device("cpu")) else "not to be had here"
    tables[0].notes.append(f"The CPU's int8 product is {word}.")
    one = QueryTokens(queries.tokens[:1], queries.mask[:1])
    small, scale = quantise_images(images)
    copies = -(-100_000 // len(images))
    many = StoredImages(small.repeat(copies, 1, 1)[:100_000], scale.repeat(copies)[:100_000])
    names = list(map(str, range(100_000)))
    single = medians(max(3, runs // 20), lambda: search(one, [(names, many)], 10))[0]
    return [*tables, Table("one query, top 10 of 100,000 images", [{"": "SaMer, int8", "ms": single}])]


def drawn(count):
    """32 `QueryTokens` of 32 tokens, each about one of `count` images, in other words; and the images."""
    import torch
    import torch.nn.functional as F

    from samer import QueryTokens

    images = clustered(count)
    about = images[torch.arange(32) * count // 32, :32]
    queries = F.normalize(about + 0.5 * F.normalize(torch.randn(32, 32, 128), dim=-1), dim=-1)
    return QueryTokens(queries, torch.ones(32, 32, dtype=torch.bool)), images


def stored_features(folder, count):
    """32 captions of an index, evenly out of the first split that has some, and its first images, in float32."""
    import torch

    from samer import InputError, QueryTokens
    from samer.index.read import Index

    index = Index(folder)
    split = next((name for name, held in index.manifest.splits.items() if held.queries), None)
    if split is None:
        raise InputError(f"{folder}: no split with captions; make the index with scripts/cache.py")
    whole = [index.vectors(split, number) for number in list(index.numbers(split).values())[:count]]
    images = torch.stack([each.tokens for each in whole if each.mask.all()])
    if len(images) < len(whole):
        print(f"{len(whole) - len(images):,} images with fewer vectors than the others are left out")
    found = [row for query, *_ in index.queries(split) for row in zip(query.tokens.float(), query.mask)]
    rows = [tokens[mask] for tokens, mask in found[:: max(1, len(found) // 32)][:32]]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor(list(map(len, rows)))
    return QueryTokens(padded, torch.arange(padded.shape[1]) < lengths[:, None]), images


def compared(name, queries, images, runs, options):
    """A `Table` of engines: time, its ratios, the share of the exact ten best that is found, bytes."""
    import torch

    from samer import maxsim

    count, regions, width = images.shape
    flat = queries.tokens[queries.mask].t().contiguous()  # (D, n)
    room = torch.empty(16 * regions, flat.shape[1])
    blocks = lambda: [torch.mm(b.view(-1, width), flat, out=room[: regions * len(b)]) for b in images.split(16)]
    exact = maxsim(queries.tokens, images, queries.mask).topk(10, dim=1).indices
    with tempfile.TemporaryDirectory() as place:
        found = engines(queries, images, Path(place), options)
        try:
            times = dict(zip([FLOOR, *found], medians(max(3, runs // 40), blocks, *(run for run, _ in found.values()))))
            recalls = {name: overlap(exact, torch.as_tensor(run())) for name, (run, _) in found.items()}
        finally:
            for close in CLOSING:
                close()
            CLOSING.clear()
    rows = []
    for engine, milliseconds in times.items():
        row = {"": engine, "ms": milliseconds, "/ floor": milliseconds / times[FLOOR]}
        row["einsum /"] = times[EINSUM] / milliseconds
        row |= {"recall@10": recalls.get(engine), "bytes an image": found[engine][1] if engine in found else None}
        rows.append(row)
    tokens = f"{len(queries.tokens)} queries of {int(queries.mask.sum()):,} tokens in all"
    words = f"{tokens} against {count:,} images x {regions} x"
    return Table(f"{name}: {words} {width}, the ten best of each query", rows, [f"einsum: {EINSUM}."])


EINSUM = "transformers, score_retrieval"
CLOSING = []  # what ends the processes and files of engines


def engines(queries, images, place, options):
    """By name: what finds the ten best images of each query, (Q, 10), and bytes of an image.

    Those of other libraries where they are installed: pip install -e ".[peers]".
    """
    import torch
    from transformers import ColPaliProcessor

    from samer import maxsim
    from samer.codes import COMPONENTS, learn
    from samer.scoring import StoredImages, pack_signs, quantise_images, score_stored

    ten = lambda scores: scores.topk(10, dim=1).indices
    each = images[0].numel()
    rows = [tokens[mask] for tokens, mask in zip(queries.tokens, queries.mask)]  # of a query
    coded, stored = (
        {},
        {
            "float16": (StoredImages(images.half()), 2 * each),
            "int8": (StoredImages(*quantise_images(images)), each + 4),
            "1-bit, before re-ranking": (StoredImages(pack_signs(images)), each // 8),
        },
    )
    full = torch.ones(images.shape[:2], dtype=torch.bool)
    for kind in COMPONENTS:
        book = learn(kind, images[:1024], full[:1024])
        held = book.encode(images, full)
        size = held.codes[0].numel() + images.shape[2] + 4
        coded[f"code {kind}"] = StoredImages(held.codes, held.scales, None, None, held.bases, book), size
    found = {"SaMer, float32": (lambda: ten(maxsim(queries.tokens, images, queries.mask)), 4 * each)}
    ours = {**stored, **coded}
    found |= {f"SaMer, {k}": (lambda v=v: ten(score_stored(queries, v)), size) for k, (v, size) in ours.items()}
    if options.before or options.fast_plaid:
        held = {"images": images.numpy(), "queries": queries.tokens.numpy(), "mask": queries.mask.numpy()}
        import numpy as np

        np.savez(place / "data.npz", **held)
    if options.before:
        other = Elsewhere(sys.executable, BEFORE, place, PYTHONPATH=str(Path(options.before).resolve()))
        sizes = {"float32": 4 * each, **{name: size for name, (_, size) in stored.items()}}
        found |= {f"before: {name}": (lambda name=name: other.ask(name), size) for name, size in sizes.items()}
    found[EINSUM] = lambda: ten(ColPaliProcessor.score_retrieval(None, rows, images)), 4 * each
    for make in (sentence_transformers, maxsim_cpu, qdrant, lance):
        try:
            found |= make(rows, images, place)
        except ImportError as error:
            print(f"{make.__name__}: {error.name} is not installed")
    if options.fast_plaid:
        plaid = Elsewhere(options.fast_plaid, PLAID, place)
        size = sum(file.stat().st_size for file in (place / "plaid").rglob("*") if file.is_file()) / len(images)
        names = {"fast-plaid, 4 bits": "8", "fast-plaid, 4 bits, 64 probes": "64"}
        found |= {name: (lambda probes=probes: plaid.ask(probes), size) for name, probes in names.items()}
    return found


def clustered(count):
    """Unit tokens (count, 64, 128) of images that differ as real ones do: around a few directions each."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(1)
    themes = torch.randn(500, 128, generator=generator)
    picks = torch.randint(0, 500, (count, 64), generator=generator)
    return F.normalize(themes[picks] + 0.7 * torch.randn(count, 64, 128, generator=generator), dim=-1)


def sentence_transformers(rows, images, place):
    """Its scorer of multi-vector models."""
    from sentence_transformers.util import maxsim

    return {
        "sentence-transformers, maxsim": (lambda: maxsim(rows, images).topk(10, dim=1).indices, 4 * images[0].numel())
    }


def maxsim_cpu(rows, images, place):
    """A library of kernels for CPUs."""
    import maxsim_cpu as library
    import torch

    arrays, stack = [row.numpy() for row in rows], images.numpy()
    scores = lambda: torch.stack([torch.from_numpy(library.maxsim_scores(row, stack)) for row in arrays])
    return {"maxsim-cpu": (lambda: scores().topk(10, dim=1).indices, 4 * images[0].numel())}


def qdrant(rows, images, place):
    """Qdrant's client without a server, which computes in numpy."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")
    most = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    vectors = models.VectorParams(size=images.shape[2], distance=models.Distance.DOT, multivector_config=most)
    client.create_collection("images", vectors_config=vectors)
    for start in range(0, len(images), 250):
        block = images[start : start + 250].tolist()
        client.upsert("images", [models.PointStruct(id=start + k, vector=vector) for k, vector in enumerate(block)])
    CLOSING.append(client.close)
    texts = [row.tolist() for row in rows]
    ask = lambda text: [point.id for point in client.query_points("images", query=text, limit=10).points]
    return {"Qdrant, in process, exact": (lambda: [ask(text) for text in texts], 4 * images[0].numel())}


def lance(rows, images, place):
    """LanceDB without an index: it scans its files."""
    import lancedb
    import pyarrow as pa

    count, regions, width = images.shape
    flat = pa.FixedSizeListArray.from_arrays(pa.array(images.flatten().numpy()), width)
    vectors = pa.ListArray.from_arrays(pa.array(range(0, count * regions + 1, regions), pa.int32()), flat)
    table = pa.table({"id": pa.array(range(count), pa.int32()), "vectors": vectors})
    table = lancedb.connect(str(place / "lance")).create_table("images", table)

    def ask(row):
        found = table.search(row, vector_column_name="vectors").distance_type("cosine").limit(10)
        return [each["id"] for each in found.select(["id", "_distance"]).to_list()]

    arrays = [row.numpy() for row in rows]
    return {"LanceDB, exact": (lambda: [ask(row) for row in arrays], 4 * images[0].numel())}


class Elsewhere:
    """Engines in a process of their own, which answers with ids while this one waits."""

    def __init__(self, python, code, place, **environment):
        """Starts `code` with an interpreter, the folder of data.npz and the number of threads."""
        import torch

        words = [str(python), "-c", code + ANSWERING, str(place), str(torch.get_num_threads())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(words, env={**os.environ, **environment}, cwd=place, **pipes)
        CLOSING.append(self.close)
        self._read("it could not be started")

    def ask(self, name):
        """The ten best of each query, as an engine finds them."""
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self._read(f"{name} failed")

    def _read(self, trouble):
        while line := self.process.stdout.readline():
            if line.startswith("ANSWER "):  # libraries print, too
                return json.loads(line.removeprefix("ANSWER "))
        from samer import InputError

        raise InputError(f"{self.process.args[0]}: {trouble}; what it said stands above")

    def close(self):
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait(60)


OPENING = """
import json, sys
import numpy as np
import torch

torch.set_num_threads(int(sys.argv[2]))
torch.set_grad_enabled(False)
held = np.load(sys.argv[1] + "/data.npz")
images, queries, mask = (torch.from_numpy(held[name]) for name in ("images", "queries", "mask"))
"""
BEFORE = (
    OPENING
    + """
from samer import QueryTokens, maxsim
from samer.scoring import StoredImages, pack_signs, quantise_images, score_stored

asked = QueryTokens(queries, mask)
stored = {
    "float16": StoredImages(images.half()),
    "int8": StoredImages(*quantise_images(images)),
    "1-bit, before re-ranking": StoredImages(pack_signs(images)),
}

def answer(name):
    scores = maxsim(queries, images, mask) if name == "float32" else score_stored(asked, stored[name])
    return scores.topk(10, dim=1).indices.tolist()
"""
)
PLAID = (
    OPENING
    + """
from fast_plaid.search import FastPlaid

index = FastPlaid(index=sys.argv[1] + "/plaid", device="cpu")
index.create(documents_embeddings=list(images), nbits=4)
rows = [tokens[own] for tokens, own in zip(queries, mask)]

def answer(probes):
    found = index.search(rows, top_k=10, n_ivf_probe=int(probes), show_progress=False)
    return [([name for name, _ in row] + [-1] * 10)[:10] for row in found]
"""
)
ANSWERING = """
import json, sys

if __name__ == "__main__":
    print("ANSWER 0", flush=True)
    for line in sys.stdin:
        print("ANSWER", json.dumps(answer(line.strip())), flush=True)
"""


def million(folder):
    """An index of a million images of 64 x 128 int8 at `folder`, 8.3 GB of random numbers."""
    import torch

    from samer import MergeConfig
    from samer.index.manifest import IndexManifest, Making, Shard, Split, stamp_of, write_index_manifest
    from samer.retrievers.identity import ModelIdentity
    from samer.runtime.shards import write_shard

    count, per = 1_000_000, 8192
    tokens = torch.randint(-127, 128, (per, 64, 128), dtype=torch.int8)
    made = {"model": ModelIdentity("", "", "", ""), "projector": "none", "merge": MergeConfig()}
    made |= {"dtype": "int8", "embedding_dim": 128}
    shards = []
    for start in range(0, count, per):
        rows = min(per, count - start)
        tensors = {"tokens": tokens[:rows].roll(start // per, 0), "mask": torch.ones(rows, 64, dtype=torch.bool)}
        tensors |= {"scales": torch.full((rows,), 0.003), "grids": torch.zeros(rows, 2, dtype=torch.int32)}
        stamp = {**stamp_of(Making(**made)), "ids": [f"{start + k:07d}" for k in range(rows)]}
        facts = {"count": rows, "regions": 64, "bytes": rows * (64 * 129 + 4)}
        path = folder / "images" / f"images-{start // per:05d}.safetensors"
        shards.append(Shard(**write_shard(path, tensors, stamp, facts)))
    write_index_manifest(folder / "manifest.json", IndexManifest(**made, splits={"images": Split(tuple(shards), ())}))
    print(
        f"1,000,000 images, {sum(f.stat().st_size for f in folder.glob('images/*')) / 1e9:.1f} GB on disk", flush=True
    )


def scale(runs):
    """A search over one million images of 64 x 128 int8, mapped from disk; what is resident beside the page cache."""
    import torch
    import torch.nn.functional as F

    from samer import InputError, QueryTokens
    from samer.index.read import Index

    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place)
        if shutil.disk_usage(folder).free < 9e9:
            raise InputError("the scale run needs 9 GB of disk here")
        million(folder)
        for queries in (1, 32):
            batch = F.normalize(torch.randn(queries, 32, 128), dim=-1)
            query = QueryTokens(batch, torch.ones(queries, 32, dtype=torch.bool))
            cache, seconds = Index(folder), []
            for _ in range(4):
                started = time.perf_counter()
                cache.search(query, "images", 10)
                seconds.append(time.perf_counter() - started)
            own, mapped = resident()
            words = f"first {seconds[0]:.2f} s, then {statistics.median(seconds[1:]):.2f} s"
            print(f"queries at once: {queries}; {words}; resident {own:.2f} GB, and {mapped:.1f} GB of mapped files")


def exporting(runs):
    """Exporting one million images of 64 x 128 to parquet in float16: pace, and the most memory of its own."""
    import threading

    from samer import InputError
    from samer.export.run import export, facts_of, open_store
    from samer.index.read import Index

    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place)
        if shutil.disk_usage(folder).free < 26e9:
            raise InputError("the export run needs 26 GB of disk here")
        million(folder)
        index, most, ended = Index(folder), [], threading.Event()

        def watch():
            while not ended.wait(0.2):
                most.append(resident()[0])

        before = resident()[0]
        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        store = open_store("parquet", str(folder / "out"), "samer", facts_of(index, "images", "float16"))
        done = export(index, "images", store, folder / "cursor.json")
        seconds = time.perf_counter() - started
        ended.set()
        watcher.join()
        written = sum(file.stat().st_size for file in (folder / "out").iterdir())
        told = f"{written / 1e9:.1f} GB in {seconds:.0f} s: {written / 1e6 / seconds:.0f} MB/s"
        memory = f"at most {max(most):.2f} GB of its own in memory ({before:.2f} GB before)"
        print(f"{done.images:,} images to parquet, {told}; {memory}")


def building(runs):
    """Building an index of 1,500 generated images: what merging, storing and the rest take beside the model."""
    from samer import MergeConfig
    from samer.data import flickr, pictures
    from samer.features.read import open_encoder
    from samer.index.write import build_index
    from samer.world.write import write_world

    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        write_world(place / "world", {"test": 1500})
        retriever = open_encoder(str(ROOT / "assets" / "retriever"), "cpu")
        records = flickr.load_split(place / "world", "test", boxes=False)
        inside = {}

        def timed(function):
            def call(*words):
                started = time.perf_counter()
                try:
                    return function(*words)
                finally:
                    inside[function.__name__] = inside.get(function.__name__, 0) + time.perf_counter() - started

            return call

        retriever.hidden_states, retriever.project = timed(retriever.hidden_states), timed(retriever.project)
        rest = []
        for turn in range(5):
            inside.clear()
            started = time.perf_counter()
            build_index(
                place / f"c{turn}", place / "world", ["test"], retriever, MergeConfig(num_regions=16), dtype="int8"
            )
            whole = time.perf_counter() - started
            started = time.perf_counter()
            for record in records:
                pictures.load_image(record.image_path)
            decode = time.perf_counter() - started
            parts = whole - inside["hidden_states"], inside["project"], decode, whole
            rest.append([100 * part / whole for part in parts[:3]] + [whole])
        outside, project, decode, whole = (statistics.median(column) for column in zip(*rest))
        print(f"outside the backbone: {outside:.1f} % of {whole:.1f} s; the projection is {project:.1f} % of it")
        print(f"  decoding the pictures takes {decode:.1f} % of it, in a thread beside the model")


def evaluation(runs):
    """5,000 captions of 8 to 24 tokens against 1,000 images of 64 x 128: scores and metrics, time and peak memory."""
    import torch
    import torch.nn.functional as F

    from samer import QueryTokens
    from samer.evaluation import both_directions
    from samer.scoring import StoredImages, score_stored

    images = clustered(1000)
    lengths = torch.randint(8, 25, (5000,), generator=torch.Generator().manual_seed(2))
    owner = torch.arange(5000) // 5
    words = torch.stack([images[k, torch.randperm(64)[:24]] for k in owner.tolist()])
    words = F.normalize(words + 0.5 * F.normalize(torch.randn(5000, 24, 128), dim=-1), dim=-1)
    queries = QueryTokens(words, torch.arange(24) < lengths[:, None])
    scale = float(images.abs().max()) / 127
    kinds = {"float32": StoredImages(images), "int8": StoredImages((images / scale).round().to(torch.int8), scale)}
    whole = 5000 * 1000 * 64 * float(lengths.float().mean()) * 4 / 1e9
    print(f"5,000 captions x 1,000 images; all query x image x token products would take {whole:.0f} GB")
    for name, stored in kinds.items():
        before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
        for _ in range(3):
            started = time.perf_counter()
            scores = score_stored(queries, stored)
            scored = time.perf_counter()
            metrics = both_directions(scores, owner)
            seconds.append((scored - started, time.perf_counter() - scored))
        scoring, measuring = (statistics.median(column) for column in zip(*seconds))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
        words = f"scores {scoring:.1f} s, metrics with intervals {measuring:.1f} s, peak memory {grown:.2f} GB more"
        print(f"{name}: {words}; R@1 {metrics['text_to_image']['r@1']['value']:.1f}")


def quality(runs):
    """400 generated images with 2,000 captions, 262 tokens to 16 from farthest centres, in every dtype of an index."""
    import torch

    from samer import MergeConfig
    from samer.index.manifest import DTYPES
    from samer.index.read import Index
    from samer.index.write import build_index
    from samer.metrics import retrieval_metrics
    from samer.retrievers.hf import Retriever
    from samer.world.write import write_world

    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        write_world(place / "world", {"test": 400})
        retriever = Retriever.load(str(ROOT / "assets" / "retriever"))
        settings = MergeConfig(num_regions=16, center_init="farthest")
        exact, rows = None, []
        for dtype in DTYPES:
            build_index(place / dtype, place / "world", ["test"], retriever, settings, dtype=dtype)
            cache = Index(place / dtype)
            scores, owner = cache.scores("test")
            metrics = retrieval_metrics(scores, owner[:, None] == torch.arange(scores.shape[1]))
            best = scores.topk(10, dim=1).indices
            exact = best if exact is None else exact
            row = {"": dtype, "R@1": metrics["r@1"], "R@10": metrics["r@10"], "overlap@10": overlap(exact, best)}
            row["bytes an image"] = cache.size("test")[3]
            extra = sum(shard.exact.bytes for shard in cache.manifest.splits["test"].images if shard.exact)
            rows.append({**row, "on disk to re-rank with": extra / 400 or None})
        return [Table("400 generated images with 2,000 captions, 262 tokens to 16", rows)]


def epoch(words):
    """Seconds, captions and peak memory (GB) of one training run in a process of its own."""
    from samer.config import load_config
    from samer.training.loop import train

    config = load_config(ROOT / "configs" / "demo.yaml", words)
    result = train(config)
    return (
        result.seconds,
        result.steps * config.train.train_batch_size,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    )


def training(runs):
    """Captions per second with the demo's settings, 200 images with 1,000 captions, no validation."""
    from samer.features.write import write_features
    from samer.retrievers.hf import Retriever
    from samer.world.write import write_world

    rows = {"pixels": [], "features": []}
    with tempfile.TemporaryDirectory() as place:
        place, model = Path(place), str(ROOT / "assets" / "retriever")
        write_world(place / "world", {"train": 200})
        started = time.perf_counter()
        write_features(place / "store", place / "world", ["train"], Retriever.load(model), dtype="float32")
        once = time.perf_counter() - started
        size = sum(file.stat().st_size for file in place.glob("store/*/*.safetensors"))
        for turn in range(max(3, runs // 60)):
            for source, row in rows.items():
                words = [f"data.root={place / 'world'}", f"model.name={model}", "data.eval_split="]
                words += ["train.num_train_epochs=2", f"train.output_dir={place / f'{source}-{turn}'}"]
                words += [f"data.features={place / 'store'}"] if source == "features" else []
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row.append(pool.apply(epoch, (words,)))
    speeds = {}
    for source, row in rows.items():
        pace = speeds[source] = statistics.median(captions / seconds for seconds, captions, _ in row)
        memory = statistics.median(gigabytes for _, _, gigabytes in row)
        print(f"from {source}: {pace:.0f} captions/s, {1000 / pace:.2f} s per epoch, peak {memory:.2f} GB")
    print(
        f"ratio {speeds['features'] / speeds['pixels']:.1f}; the store: {once:.1f} s once, {size / 1e6:.0f} MB, mapped"
    )


def index_photos(folder, batch, whole):
    """Pictures per second and peak memory (GB) of scripts/index.py in a process of its own; `whole`: not reduced."""
    from samer.retrievers.hf import Retriever
    from scripts import index

    if whole:
        Retriever.picture_size = None
    Retriever.load(str(ROOT / "assets" / "retriever"))  # what is imported and read once does not count
    with tempfile.TemporaryDirectory() as place:
        words = ["--images", str(folder), "--cache-dir", place, "--batch-size", str(batch)]
        started = time.perf_counter()
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
            index.main([*words, f"model.name={ROOT / 'assets' / 'retriever'}", "merge.num_regions=16"])
        seconds = time.perf_counter() - started
    status = Path("/proc/self/status")  # on Linux, ru_maxrss of a new process begins with its parent's
    if status.exists():
        peak = int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1e6
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return len(list(folder.iterdir())) / seconds, peak


def photographs(runs):
    """Indexing generated photographs with the small retriever, each run in a process of its own, whole and reduced."""
    from scripts.bench_pipelines import write_photo

    sizes = {12: (4000, 3000, 24), 50: (8192, 6144, 24), 108: (12000, 9000, 6)}
    with tempfile.TemporaryDirectory() as place:
        print(f"{'':18}{'batch':>6}{'whole, GB':>11}{'reduced, GB':>13}{'whole, 1/s':>12}{'reduced, 1/s':>14}")
        for megapixels, (width, height, count) in sizes.items():
            folder = Path(place) / str(megapixels)
            folder.mkdir()
            for number in range(count):
                write_photo(folder / f"{number:02}.jpg", width, height, number)
            for batch in (1, 8, 32):
                rows = []
                for whole in (True, False):
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        rows.append(pool.apply(index_photos, (folder, batch, whole)))
                (pace, peak), (quick, small) = rows
                name = f"{count} x {megapixels} MP"
                print(f"{name:18}{batch:6}{peak:11.2f}{small:13.2f}{pace:12.2f}{quick:14.2f}", flush=True)
            shutil.rmtree(folder)
    compare_reduced()


def compare_reduced():
    """How far vectors and scores move when pictures are read reduced, beside those of the picture stored once more."""
    import torch
    import torch.nn.functional as F
    from PIL import Image

    from samer import maxsim
    from samer.data.pictures import load_image
    from samer.retrievers.hf import Retriever

    retriever = Retriever.load(str(ROOT / "assets" / "retriever"))
    found = retriever.encode_queries(retriever.query_inputs(["a red circle on the left", "a man with a dog"]))
    queries = found.tokens, found.mask
    cosines, scores = {"reduced": [], "stored again": []}, {"reduced": [], "stored again": []}
    with tempfile.TemporaryDirectory() as place:
        paths = sorted((ROOT / "tests/fixtures/photos/images/Images").iterdir())
        for path in paths:
            image = load_image(path)
            file, again = Path(place) / "a.jpg", Path(place) / "b.jpg"
            image.resize((10 * image.width, 10 * image.height), Image.LANCZOS).save(file, quality=92)
            load_image(file).save(again, quality=80)
            read = {"reduced": load_image(file, retriever.picture_size), "stored again": load_image(again)}
            whole = retriever.encode_images(retriever.image_inputs([load_image(file)]))
            for name, other in read.items():
                tokens = retriever.encode_images(retriever.image_inputs([other])).tokens
                cosines[name].append(F.cosine_similarity(tokens, whole.tokens, dim=-1).flatten())
                scores[name].append(
                    (maxsim(queries[0], tokens, queries[1]) - maxsim(queries[0], whole.tokens, queries[1]))
                    .abs()
                    .flatten()
                )
    print(f"{len(paths)} photographs of 400 pixels, enlarged 10 times, against the same read whole:")
    for name in cosines:
        cosine, score = torch.cat(cosines[name]), torch.cat(scores[name])
        print(f"  {name}: cosine of vectors {cosine.mean():.5f}, least {cosine.min():.4f};", end=" ")
        print(f"MaxSim moves by {score.mean():.5f}, at most {score.max():.5f}")


def one_by_one(folder, queries):
    """Milliseconds of each of so many queries, each another one, asked of an open index; in a process of its own."""
    from samer.search.models import Models
    from samer.search.open_index import SearchIndex

    index, times = SearchIndex(folder, Models("cpu")), []
    for k in range(queries + 5):
        started = time.perf_counter()
        index.search(f"a red car and {k} people in a grassy field", 10)
        times.append(1000 * (time.perf_counter() - started))
    return times[5:]


def busy(threads, started):
    """Matrix products without end, on so many threads; in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    square = torch.randn(512, 512)
    started.set()
    while True:
        square @ square


@contextlib.contextmanager
def environment(**values):
    """Variables for the processes that are started meanwhile."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def latency(runs):
    """Queries of an index of 400 generated images, one at a time, each setting in a process of its own, in turn."""
    from samer import MergeConfig
    from samer.features.read import open_encoder
    from samer.index.write import build_index
    from samer.world.write import write_world

    settings = {
        "as torch has it": {},
        "threads sleep": {"OMP_WAIT_POLICY": "PASSIVE"},
        "as search has it": WAITING,
        "one thread": {"OMP_NUM_THREADS": "1"},
    }
    spawn, cores = multiprocessing.get_context("spawn"), os.cpu_count()
    times = {name: {"alone": [], "beside": []} for name in settings}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        write_world(place / "world", {"test": 400})
        retriever = open_encoder(str(ROOT / "assets" / "retriever"), "cpu")
        build_index(place / "c", place / "world", ["test"], retriever, MergeConfig(num_regions=16), dtype="int8")
        for _ in range(max(3, runs // 60)):
            for beside in ("alone", "beside"):
                other, started = None, spawn.Event()
                if beside == "beside":
                    other = spawn.Process(target=busy, args=(cores, started), daemon=True)
                    other.start()
                    started.wait()
                for name, values in settings.items():
                    with environment(**values), spawn.Pool(1) as pool:
                        times[name][beside].append(pool.apply(one_by_one, (place / "c", 40)))
                if other is not None:
                    other.kill()
                    other.join()
    print(f"ms per query; the other process multiplies matrices on {cores} threads, as many as this machine has cores")
    print(f"{'':18}{'alone':>8}{'p90':>8}{'/ torch':>9}{'beside':>10}{'p90':>8}{'/ torch':>9}")
    floor = {}
    for name, row in times.items():
        cells = ""
        for beside, turns in row.items():
            median = statistics.median(statistics.median(turn) for turn in turns)
            late = statistics.median(statistics.quantiles(turn, n=10)[-1] for turn in turns)
            ratio = median / floor.setdefault(beside, median)
            cells += f"{median:{8 if beside == 'alone' else 10}.1f}{late:8.1f}{ratio:9.2f}"
        print(f"{name:18}{cells}")


def helps(runs):
    """Seconds until --help of every script is printed, the median of 7 turns, and of `python -c pass`."""
    paths = [path for path in sorted((ROOT / "scripts").glob("*.py")) if path.name != "__init__.py"]
    lines = {"python -c pass": ["-c", "pass"], **{path.name: [str(path), "--help"] for path in paths}}
    times = {name: [] for name in lines}
    for _ in range(7):
        for name, words in lines.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
            times[name].append(time.perf_counter() - started)
    for name, row in times.items():
        print(f"{name:18}{statistics.median(row):7.3f} s, at most {max(row):.3f} s")


def on_gpu(runs):
    """A random ColPali of the published size, 2.9 billion parameters in bfloat16, through every command on a GPU.

    Pictures are generated ones; times and memory do not depend on what is seen.
    """
    import torch

    from samer.config import InputError
    from samer.retrievers.hf import Retriever
    from samer.world.retriever import PUBLISHED, build_colpali, in_halves, page_texts, train_tokenizer
    from samer.world.write import write_world

    if not torch.cuda.is_available():
        raise InputError("no CUDA device here; `bench.py gpu` is for one with 24 GB")
    print(torch.cuda.get_device_name(), f"{os.cpu_count()} CPU cores")
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        with in_halves("cuda"):
            model, processor = build_colpali(train_tokenizer(page_texts(20, 0), 500), PUBLISHED, seed=0)
        for made in (model, processor):
            made.save_pretrained(place / "model")
        del model
        write_world(place / "world", {"train": 192, "test": 192})
        started = time.perf_counter()
        retriever = Retriever.load(str(place / "model"), device="cuda", dtype=torch.bfloat16)
        loaded = time.perf_counter()
        retriever.identity  # noqa: B018
        words = f"its files hashed in {time.perf_counter() - loaded:.0f} s, once a process"
        print(f"loaded in {loaded - started:.0f} s; {words}", flush=True)
        tokens = encoding(retriever, place / "world", max(3, runs // 40))
        merging_on_gpu(tokens, max(5, runs // 10))
        commands_on_gpu(retriever, place)
        compiled_on_gpu(retriever, place / "world", max(3, runs // 40))


def gpu_seconds(runs, function):
    """Median seconds of a function on the GPU after one call that does not count, and peak memory in GB."""
    import torch

    times = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:]), torch.cuda.max_memory_allocated() / 1e9


def encoding(retriever, world, runs):
    """Pictures and captions per second, by batch; returns the tokens of 32 pictures."""
    from samer.data import flickr

    records = flickr.load_split(world, "test", boxes=False)
    for batch in (1, 4, 16, 32):
        inputs = retriever.record_inputs(records[:batch])
        seconds, peak = gpu_seconds(runs, lambda inputs=inputs: retriever.encode_images(inputs))
        started = time.perf_counter()
        retriever.record_inputs(records[:batch])
        before = time.perf_counter() - started
        words = (
            f"{batch / seconds:.1f} pictures/s, peak {peak:.1f} GB; read and resized on the CPU {batch / before:.0f}/s"
        )
        print(f"encode, batch {batch}: {words}", flush=True)
    inputs = retriever.query_inputs([caption.text for record in records[:8] for caption in record.captions][:32])
    seconds, _ = gpu_seconds(runs, lambda: retriever.encode_queries(inputs))
    print(f"encode 32 captions: {1000 * seconds:.0f} ms")
    return retriever.encode_images(retriever.record_inputs(records[:32]))


def compiled_on_gpu(retriever, world, runs):
    """What --compile of features and indexes gains, and takes at first; the retriever is compiled from then on."""
    import torch.nn.functional as F

    from samer.data import flickr

    inputs = retriever.record_inputs(flickr.load_split(world, "test", boxes=False)[:32])
    plain, _ = gpu_seconds(runs, lambda: retriever.encode_images(inputs))
    before = retriever.encode_images(inputs).tokens
    retriever.compile()
    started = time.perf_counter()
    after = retriever.encode_images(inputs).tokens
    first = time.perf_counter() - started
    compiled, peak = gpu_seconds(runs, lambda: retriever.encode_images(inputs))
    near = float(F.cosine_similarity(before, after, dim=-1).min())
    words = f"{32 / plain:.1f} pictures/s as it is, {32 / compiled:.1f} compiled, ratio {plain / compiled:.2f}"
    print(
        f"--compile, batch 32: {words}; first {first:.0f} s; peak {peak:.1f} GB; cosine at least {near:.4f}", flush=True
    )


def merging_on_gpu(visual, runs):
    """Milliseconds an image, 32 at a time, of compressors that run on the GPU, K = 64."""
    import torch

    from samer import MergeConfig
    from samer.compressors import make_compressor

    found, bank = photographed(32)
    visual = replace(visual, tokens=found.to(visual.tokens.device))
    rows = {}
    for name, merge in {
        "raster": MergeConfig(),
        "farthest": MergeConfig(center_init="farthest"),
        "querybank": MergeConfig(compressor="querybank"),
        "kmeans": MergeConfig(compressor="kmeans"),
    }.items():
        compressor = make_compressor(merge)
        if name == "querybank":
            compressor.fit_queries(bank.to(visual.tokens.device))
        with torch.no_grad():
            rows[name] = gpu_seconds(runs, lambda compressor=compressor: compressor(visual))
    for name, (seconds, peak) in rows.items():
        print(f"merge 32 x 1,030 to 64, {name}: {1000 * seconds / 32:.3f} ms an image, peak {peak:.1f} GB", flush=True)


def commands_on_gpu(retriever, place):
    """The store, training by the published recipe from it and from pixels, and the index: pace and memory of each."""
    import torch

    from samer import MergeConfig
    from samer.config import load_config
    from samer.features.write import write_features
    from samer.index.write import build_index
    from samer.training.loop import train

    def timed(name, count, what, function):
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            done = function()
        seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() / 1e9
        seconds = getattr(done, "seconds", seconds)
        print(f"{name}: {count / seconds:.1f} {what}/s, {seconds:.0f} s, peak {peak:.1f} GB", flush=True)

    world, store = place / "world", place / "store"
    timed("feature store", 192, "pictures", lambda: write_features(store, world, ["train"], retriever))
    words = [f"model.name={place / 'model'}", f"data.root={world}", "data.eval_split=", "train.num_train_epochs=1"]
    sources = {"pixels": [], "the store": [f"data.features={store}"]}
    for number, (source, more) in enumerate(sources.items()):
        out = f"train.output_dir={place / f'run{number}'}"
        config = load_config(ROOT / "configs" / "samer_k64_colpali.yaml", [*words, out, *more])
        timed(f"training from {source}, 32 captions at a time", 960, "captions", lambda config=config: train(config))
        torch.cuda.empty_cache()
    for name, merge in {"SaMer": MergeConfig(), "farthest": MergeConfig(center_init="farthest")}.items():
        index = lambda merge=merge, name=name: build_index(place / name, world, ["test"], retriever, merge)
        timed(f"index, {name}", 192, "pictures (and 960 captions)", index)


def reducing(runs, folder="", size=448, batch=4, file=""):
    """Pictures a second of a vision tower, plain and reduced to 75 and 50 % of its FLOPs, in turn in one process.

    A tower of DINOv2-S's shape with random weights unless a folder names one. AdaMerge is calibrated on as many other
    pictures; how much it merges depends on them.
    """
    import torch

    from samer.reducers.calibration import calibrate
    from samer.reducers.cost import Meter, pace, tiers
    from samer.runtime.commands import pick_device

    device = pick_device()
    tower, pixels = dino(folder).to(device), smooth(4 * batch, size).to(device)
    see = lambda: tower(pixel_values=pixels[:batch]).last_hidden_state.sum().item()  # waits for a GPU
    one = [lambda n=n: tower(pixel_values=pixels[n : n + 1]) for n in range(2)]
    some = [pixels[start : start + batch] for start in range(batch, 4 * batch, batch)]

    def calibrated(settings):
        if settings.method != "adamerge":
            return settings
        found = calibrate(tower, "", settings, some, lambda batch: tower(pixel_values=batch))
        return replace(settings, mean=found.mean, deviation=found.deviation)

    meter = Meter(tower, one)
    chosen = []
    for name, base in REDUCED.items():
        chosen += [(name, tier) for tier in tiers(meter, reduce_settings(base), calibrated, (0.25, 0.5))]
    plain, *times = pace(tower, see, [tier.settings for _, tier in chosen], runs)
    words = f"{size} pixels, {meter.patches:,} patches, batches of {batch}, {meter.plain[0] / 1e9:.1f} GFLOPs a picture"
    print(f"{type(tower).__name__}, {words}: plain {batch / plain:.2f} pictures/s")
    rows = [{"method": "plain", "saved": 0.0, "r": 0.0, "seconds": plain, "speedup": 1.0}]
    for (name, tier), seconds in zip(chosen, times):
        print(
            f"  {name:18} r {tier.settings.r:4g} {tier.saved:6.1%} of FLOPs saved {batch / seconds:8.2f} pictures/s "
            f"{plain / seconds:5.2f} times as fast"
        )
        row = {"method": name, "saved": tier.saved, "r": tier.settings.r, "layers": tier.settings.layers}
        rows.append({**row, "seconds": seconds, "speedup": plain / seconds})
    if file:
        name = f"{type(tower).__name__}, {tower.config.hidden_size} wide" + (", random weights" if not folder else "")
        about = {"tower": name, "picture_size": size, "batch": batch, "runs": runs, "rows": rows}
        about |= {"threads": torch.get_num_threads(), "device": str(device)}
        about["command"] = f"python scripts/bench.py reduce --size {size}" + (" --tower TOWER" if folder else "")
        Path(file).write_text(json.dumps(about, indent=1), encoding="utf-8")


REDUCED = {
    "tome": {"method": "tome"},
    "adamerge": {"method": "adamerge"},
    "adamerge, shared": {"method": "adamerge", "batch": "shared"},
    "cubist": {"method": "cubist"},
}


def reduce_settings(values):
    from samer.config import ReduceConfig

    return ReduceConfig(**values)


def dino(folder):
    """The vision tower in a folder, or one of DINOv2-S's shape."""
    from transformers import AutoModel, Dinov2Config, Dinov2Model

    if folder:
        return AutoModel.from_pretrained(folder).eval()
    shape = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "patch_size": 14}
    return Dinov2Model(Dinov2Config(**shape, image_size=518)).eval()


def smooth(count, size):
    """Pictures (count, 3, size, size) with large and small shapes."""
    import torch

    coarse = [torch.randn(count, 3, side, side) for side in (4, 16, 64)]
    return sum(torch.nn.functional.interpolate(each, size=(size, size), mode="bilinear") for each in coarse) / 2


def main(argv=None):
    """Runs one of them."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["pipelines"]:
        from scripts import bench_pipelines

        return bench_pipelines.main(words[1:])
    if words and words[0] in ("bits", "coarse", "small"):
        from scripts import bench_bits

        return bench_bits.main(words)
    what = {
        "merge": merge,
        "querybank": queries,
        "scale": scale,
        "export": exporting,
        "eval": evaluation,
        "cache": building,
        "quality": quality,
    }
    apart = {
        "train": training,
        "pictures": photographs,
        "latency": latency,
        "gpu": on_gpu,
    }  # they measure processes of their own, or train
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*what, *apart, "maxsim", "reduce", "help"])
    parser.add_argument("--runs", type=int, default=200, help="timed calls (200; the longer ones a part of it)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--wait", type=float, default=60, metavar="SECONDS", help="for a quiet machine, at most (60)")
    parser.add_argument("--json", default="", metavar="FILE", help="figures, and what they were measured on")
    parser.add_argument("--markdown", default="", metavar="FILE", help="the same as a page's table")
    parser.add_argument("--images", type=int, default=5000, help="maxsim: how many (5000)")
    parser.add_argument("--index", default="", help="maxsim: take images and captions of this index")
    parser.add_argument("--before", default="", metavar="CHECKOUT", help="maxsim: also this other SaMer")
    parser.add_argument("--fast-plaid", default="", metavar="PYTHON", help="maxsim: an interpreter that has fast-plaid")
    parser.add_argument("--tower", default="", help="reduce: folder of a vision tower (DINOv2-S's shape, random)")
    parser.add_argument("--size", type=int, default=448, help="reduce: pixels of a picture's side (448)")
    parser.add_argument("--batch", type=int, default=4, help="reduce: pictures a pass (4)")
    options = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    quiet, load = await_quiet(options.wait)
    if options.what == "help":
        return helps(options.runs)
    import torch

    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    words = ["PATH" if "/" in word else word for word in words]  # they are this machine's business
    about = {"command": " ".join(["python scripts/bench.py", *words]), "quiet": quiet, "load": load}
    about["machine"] = machine()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.what in apart:
        return keep(apart[options.what](options.runs) or [], about, options)
    with torch.no_grad():
        if options.what == "reduce":  # scripts/reduce.py reads its figures
            return reducing(max(5, options.runs // 40), options.tower, options.size, options.batch, options.json)
        tables = score(options.runs, options) if options.what == "maxsim" else what[options.what](options.runs)
        return keep(tables or [], about, options)


if __name__ == "__main__":
    run(main)
