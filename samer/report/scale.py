"""What an index of many images takes, computed from what was measured of few: the page assets/SCALE.md."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from samer.codes import COMPONENTS, ENTRIES, Codebook
from samer.config import InputError, MergeConfig
from samer.index.manifest import Making, stamp_of
from samer.index.tensors import Part, image_tensors
from samer.index.write import IMAGES_PER_SHARD, write_image_shard
from samer.retrievers.identity import ModelIdentity
from samer.runtime.files import listing

TOKENS, WIDTH, PATCHES = 1030, 128, 1024  # of ColPali
STORED = ("float16", "int8", "binary", "1bit")
MAPPED_FILES = 65_530  # vm.max_map_count, as Linux comes
NODE_GPUS = 8


@dataclass(frozen=True)
class Measured:
    """What was measured, and by what; change it where you measure something else.

    Attributes:
        encoded: images a second that one GPU turns into vectors.
        merged: seconds that it merges the vectors of one.
        read: images a second that one CPU thread reads and resizes, of large photographs.
        cpu_scan: seconds of a query among a million images in int8 on 2 cores.
        gpu_scan: likewise on a GPU.
        gpu_memory: bytes of it that an index may take.
    """

    encoded: float = 82.0
    merged: float = 0.59e-3
    read: float = 46.0
    cpu_scan: float = 1.0
    gpu_scan: float = 5e-3 * 5
    gpu_memory: float = 120e9

    @property
    def gpu_seconds(self) -> float:
        """Of one image, to a row of the index."""
        return 1 / self.encoded + self.merged


SOURCES = """\
| figure | value | measured by |
|---|---|---|
| 1,030 vectors of an image, 32 at a time | {encoded:g} images/s | `python scripts/bench.py gpu`, one H200, bfloat16 |
| merging them to 64 (farthest) | {merged_ms:.2f} ms an image | the same |
| reading and resizing it, one CPU thread | {read:g} images/s | the same |
| a query among 1,000,000 images, int8, 2 cores | {cpu_scan:g} s | `python scripts/bench.py scale` |
| the same on the GPU, from 200,000 images | {gpu_ms:g} ms | `python scripts/bench.py gpu` |
| memory of the GPU that an index may take | {gpu_gb:g} GB | taken, of an H200's 141 |
| bytes of an image | above | this script, which writes a shard of {count:,} images |
"""


def shard_bytes(dtype: str, regions: int, assignments: bool = True, count: int = IMAGES_PER_SHARD) -> float:
    """Bytes of files that an image takes in a shard of random ones; with "binary" both files.

    Raises:
        InputError: less than one vector.
    """
    if regions < 1:
        raise InputError(f"{regions} vectors an image: give at least 1")
    codebook = _codebook(COMPONENTS[dtype]) if dtype in COMPONENTS else None
    how = {"assignments": assignments, "codes": "0" * 64 if codebook else ""}
    making = Making(ModelIdentity("", "", "", ""), "0" * 64, MergeConfig(), dtype, WIDTH, **how)
    random = torch.Generator().manual_seed(0)
    tokens = F.normalize(torch.randn(count, regions, WIDTH, generator=random), dim=-1)
    cells = torch.zeros(count, PATCHES if assignments else 0, dtype=torch.long)
    mask, grids = torch.ones(count, regions, dtype=torch.bool), torch.full((count, 2), 32, dtype=torch.int32)
    tensors, half = image_tensors(making, [Part(tokens, mask, grids, cells)], codebook)
    stamp = {**stamp_of(making), "ids": [f"{k:09d}" for k in range(count)], "texts": [], "contents": ["0" * 32] * count}
    with tempfile.TemporaryDirectory() as folder:
        write_image_shard(Path(folder, "images-00000.safetensors"), tensors, half, stamp)
        return sum(path.stat().st_size for path in listing(folder)) / count


def _codebook(group: int) -> Codebook:
    """Tables of no use but to see how large what they make is; a byte of theirs stands for `group` components."""
    same = torch.eye(WIDTH)
    return Codebook(torch.zeros(WIDTH // group, ENTRIES, group, dtype=torch.int8), 1.0, same, same, torch.ones(WIDTH))


def scan_bytes(dtype: str, regions: int) -> int:
    """Bytes of an image that a search reads: vectors, mask, of int8 a scale; of 1bit codes, a base and its scale."""
    return {
        "float16": regions * (2 * WIDTH + 1),
        "int8": regions * (WIDTH + 1) + 4,
        "binary": regions * (WIDTH // 8 + 1),
        "1bit": regions * WIDTH // 8 + WIDTH + 4,
    }[dtype]


def size(value: float) -> str:
    """Bytes in the largest unit of which there is one."""
    for unit, least in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= least:
            return f"{value / least:,.3g} {unit}" if value < 1000 * least else f"{value / least:,.0f} {unit}"
    return f"{value:,.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds in a unit that people use."""
    for unit, length, least in (("years", 365 * 86400, 1), ("days", 86400, 2), ("hours", 3600, 1), ("minutes", 60, 1)):
        if seconds >= least * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{seconds * 1000:,.3g} ms"


def count_of(images: int) -> str:
    """A number of images in words."""
    for unit, least in (("B", 10**9), ("M", 10**6)):
        if images >= least:
            return f"{images / least:,.4g} {unit}"
    return f"{images:,}"


def engine_for(images: int, regions: int, measured: Measured) -> str:
    """What searches so many: the first that answers in a second from where the index fits."""
    bytes_read = images * scan_bytes("int8", regions)
    million = images / 1e6 * regions / 64
    if measured.cpu_scan * million <= 1:
        return f"`scripts/search.py`, 2 cores: {duration(measured.cpu_scan * million)}"
    gpus = -(-bytes_read // int(measured.gpu_memory))
    if gpus == 1 and measured.gpu_scan * million <= 1:
        return f"`scripts/search.py`, a GPU: {duration(measured.gpu_scan * million)}"
    return "a cluster by `scripts/export.py`: Qdrant, Milvus, Vespa, or LanceDB on object storage"


def page(counts: Sequence[int], regions: int = 64, measured: Measured | None = None) -> str:
    """The page, in Markdown.

    Args:
        counts: of images.
        regions: K.
        measured: what it is computed from.
    """
    measured = measured or Measured()
    files = {dtype: shard_bytes(dtype, regions) for dtype in STORED}
    whole = TOKENS * WIDTH * 2
    memory = size(measured.gpu_memory)
    heads = [count_of(count) for count in counts]
    rows = [
        ("all 1,030 vectors, float16", [size(count * whole) for count in counts]),
        *((f"{regions} vectors, {dtype}", [size(count * files[dtype]) for count in counts]) for dtype in STORED),
        ("of int8, what a search reads", [size(count * scan_bytes("int8", regions)) for count in counts]),
        ("of binary, what a search reads first", [size(count * scan_bytes("binary", regions)) for count in counts]),
        ("of 1bit, what a search reads", [size(count * scan_bytes("1bit", regions)) for count in counts]),
        (f"shards of {IMAGES_PER_SHARD:,}", [f"{-(-count // IMAGES_PER_SHARD):,}" for count in counts]),
        ("GPU hours, encoding and merging", [_hours(count * measured.gpu_seconds) for count in counts]),
        *(
            (f"on {gpus:,} GPU{'s' * (gpus > 1)}", [duration(count * measured.gpu_seconds / gpus) for count in counts])
            for gpus in (1, NODE_GPUS, 64, 1024)
        ),
        ("parts of a job array, a day on one GPU each", [f"{_parts(count, measured):,}" for count in counts]),
        *(
            (f"GPUs that hold it in {dtype}, {memory} each", [_gpus(dtype, each, regions, measured) for each in counts])
            for dtype in ("int8", "1bit")
        ),
        ("searched by", [engine_for(count, regions, measured) for count in counts]),
    ]
    table = [f"| images | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    table += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    threads = -(-measured.encoded // measured.read)
    given = {
        "merged_ms": measured.merged * 1e3,
        "gpu_ms": measured.gpu_scan * 1e3,
        "gpu_gb": measured.gpu_memory / 1e9,
        "count": IMAGES_PER_SHARD,
    }
    sources = SOURCES.format(**{**vars(measured), **given})
    return _PAGE.format(
        table="\n".join(table),
        sources=sources,
        threads=f"{threads:.0f}",
        maps=f"{MAPPED_FILES:,}",
        most=count_of(MAPPED_FILES * IMAGES_PER_SHARD // 10**6 * 10**6),
        regions=regions,
        times=TOKENS / regions,
        **{f"of_{dtype}": f"{files[dtype]:,.0f}" for dtype in STORED},
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.0f}" if seconds >= 360_000 else f"{seconds / 3600:.3g}"


def _parts(count: int, measured: Measured) -> int:
    return max(1, -(-int(count * measured.gpu_seconds) // 86400))


def _gpus(dtype: str, count: int, regions: int, measured: Measured) -> str:
    return f"{-(-count * scan_bytes(dtype, regions) // int(measured.gpu_memory)):,}"


_PAGE = """\
# How far it goes

Written by `python scripts/scale.py --out assets/SCALE.md`, which computes it from what was measured on 2 cores and
on one GPU: nothing of more than 1,000,000 images has been run. Encoding, merging and exact search are linear in them.

{table}

Bytes are those of files: {of_float16}, {of_int8}, {of_binary} and {of_1bit} an image (float16, int8, binary with the
bfloat16 that it re-ranks from, and 1bit, the codes of `scripts/recode.py`, whose quality is on
[bits.md](results/bits.md)), a byte per patch, ids and content hashes among them. GPU hours are of the model's own work:
every GPU wants {threads} CPU threads that read pictures, else it waits (the whole `scripts/index.py` made 43 a second
on that GPU), and pictures that come over a network want that as well.

## What it is computed from

{sources}
## How it is made

- **One machine**: `python scripts/index.py --images PLACE --cache-dir INDEX`; a place is a folder, parquet or tar
  files, or an address in object storage. Interrupted, it goes on.
- **A Ray cluster**: the same with `--engine ray`. An actor per GPU encodes what Ray's tasks have read; a worker that
  is lost costs the shards in its hands. All machines share the index's folder.
- **A SLURM job array**:
  `IMAGES=PLACE CACHE_DIR=INDEX sbatch --array=0-99 --gpus=1 --wrap='bash bash/index.sh'`: each task makes the index of
  its part, and `python scripts/index.py --cache-dir ALL --merge-indexes INDEX/part-*` joins them, by links where the
  disk has them. Nobody waits for anybody, and a task that failed is run again alone. Parts are cut at 256 pictures of a
  folder, or at a file.
- **Machines that wait for each other** (data sets with captions, feature stores, training):
  `srun --ntasks-per-node=1 bash bash/cache.sh`, or `NNODES`, `NODE_RANK`, `MASTER_ADDR` by hand.

An index of more than {most} images has more files than Linux maps for one process ({maps}, `vm.max_map_count`): raise
that, or leave the parts apart and export each. Where one machine's scan no longer answers in a second, an engine made
for many must: `scripts/export.py` writes {regions} vectors an image there, {times:.3g} times fewer than all of them.
"""
