"""Stored vectors merged to K an image, as `samer.compressors` merges a retriever's, without the retriever.

Shape letters: B images, N vectors of an image, K merged ones, D embedding, P patches.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from samer.compressors import Compressor, make_compressor, settings_used
from samer.config import InputError, MergeConfig
from samer.coords import visual_coords
from samer.runtime.files import listing, only_writer
from samer.runtime.processes import print0
from samer.runtime.progress import Progress
from samer.runtime.shards import tensors_checksum
from samer.runtime.signals import stop_here, stoppable
from samer.scoring import pack_signs, quantise_images
from samer.tokens import MergedTokens, VisualTokens, regions_of_patches
from samer.vectors.parts import Parts, part_is_there, part_stamp, part_tensors, write_part
from samer.vectors.rows import OWN, Row, check_ids, check_vectors
from samer.vectors.stores import Plan, Store

TOGETHER = 32  # images merged at once
PART_BYTES = 2**26  # of vectors read for a part: what a kill can cost, and what is held in memory
PART_ROWS = 1024
COLPALI = (32, 32, 6)  # rows, columns, and the prompt tokens after them
FLOATS = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Grid:
    """Where vectors stand, as it is said for all images: a row-major grid, and vectors after it that stand nowhere.

    `prompt_tokens`: how many these are; None: none, but for ColPali's 6 after its 32 x 32.
    """

    rows: int
    columns: int
    prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        visual_coords(self.rows, self.columns, prompt_tokens=self.prompt_tokens or 0)

    def place(self, where: str, row: Row) -> Row:
        """A row with its grid, coordinates and patches by this grid.

        Raises:
            InputError: it has another number of vectors.
        """
        count, patches = len(row.vectors), self.rows * self.columns
        extra = self.prompt_tokens
        if extra is None:
            extra = COLPALI[2] if (self.rows, self.columns, count - patches) == COLPALI else 0
        if count != patches + extra:
            more = f" and {extra} prompt tokens" if extra else ""
            raise InputError(
                f"{where}: {count} vectors, but a grid of {self.rows} x {self.columns}{more} has {patches + extra}; "
                "correct it, or say with --rows, --columns and --prompt-tokens how many vectors follow the grid"
            )
        coords = visual_coords(self.rows, self.columns, prompt_tokens=extra)
        return replace(row, grid=(self.rows, self.columns), coords=coords, source=torch.arange(patches))


def placed(where: str, row: Row, grid: Grid | None) -> Row:
    """A row with coordinates, if they are known: by `grid`, else by its own coordinates, else by its own grid."""
    if grid is not None:
        return grid.place(where, row)
    if row.coords is not None or row.grid is None:
        return row
    if row.source is not None:
        return replace(row, coords=source_coords(len(row.vectors), row.grid, row.source))
    return Grid(*row.grid).place(where, row)


def source_coords(count: int, grid: tuple[int, int], source: Tensor) -> Tensor:
    """Where each of `count` vectors stands, (N, 2): the mean of its patches, (0.5, 0.5) without any."""
    cells = visual_coords(*grid)[: len(source)].double()
    real = source >= 0
    sums = torch.zeros(count, 2, dtype=torch.float64).index_add_(0, source[real], cells[real])
    sizes = torch.bincount(source[real], minlength=count)[:, None]
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), 0.5).float()


def id_seeds(ids: Sequence[str]) -> Tensor:
    """A number per image, (B,) long, that depends on its id alone; those of `samer.retrievers.base.image_seeds`."""
    digests = [hashlib.sha256(name.encode()).digest() for name in ids]
    return torch.tensor([int.from_bytes(digest[:8], "little", signed=True) for digest in digests])


def visual_tokens(rows: Sequence[Row]) -> VisualTokens:
    """Rows of the same N as a batch; vectors without coordinates stand at (0.5, 0.5)."""
    count = len(rows[0].vectors)
    nowhere = torch.full((count, 2), 0.5)
    coords = torch.stack([nowhere if row.coords is None else row.coords for row in rows])
    patches = torch.ones(len(rows), count, dtype=torch.bool)
    for number, row in enumerate(rows):
        if row.source is not None:
            patches[number] = torch.bincount(row.source[row.source >= 0], minlength=count) > 0
    return VisualTokens(
        torch.stack([row.vectors for row in rows]), coords, None, patches, id_seeds([r.id for r in rows])
    )


def renumbered(regions: Tensor, mask: Tensor) -> Tensor:
    """Regions, -1 for none, as they are numbered when those that are not filled, (K,) bool, are left out."""
    number = torch.where(mask, mask.long().cumsum(0) - 1, -1)
    return torch.where(regions >= 0, number[regions.clamp(min=0)], -1)


@torch.no_grad()
def merge_rows(compressor: Compressor, rows: Sequence[Row]) -> list[tuple[Tensor, Tensor]]:
    """Merged vectors (K, D) float32 and assignments (N,) of every row; images of one N are merged together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[len(row.vectors)].append(number)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for numbers in groups.values():
        for start in range(0, len(numbers), TOGETHER):
            own = numbers[start : start + TOGETHER]
            merged: MergedTokens = compressor(visual_tokens([rows[number] for number in own]))
            for place, number in enumerate(own):
                kept = merged.mask[place]
                found[number] = merged.tokens[place][kept], renumbered(merged.assignments[place], kept)
    return [found[number] for number in range(len(rows))]


def as_stored(values: Tensor, dtype: str) -> tuple[Tensor, float | None]:
    """Vectors (K, D) float32 as a dtype holds them, and the scale of int8."""
    if dtype == "int8":
        whole, scale = quantise_images(values[None])
        return whole[0], float(scale[0])
    if dtype == "binary":
        return pack_signs(values), None
    return values.to(FLOATS[dtype]), None


def compressor_for(merge: MergeConfig, places: bool, queries: Tensor | None = None) -> Compressor:
    """The compressor for stored vectors.

    Args:
        merge: settings; without `places` the place term of "samer" is off.
        places: whether coordinates are known.
        queries: (T, D) vectors of queries, for a compressor that learns from them.

    Raises:
        InputError: a compressor that needs what stored vectors don't have.
    """
    if not places and merge.compressor == "samer":
        merge = replace(merge, spatial_weight=0.0)
    found = make_compressor(merge)
    if found.needs or found.needs_corpus:
        raise InputError(
            f"compressor {merge.compressor!r} needs the model's attention, which stored vectors don't have; use samer, "
            "hpool, kmeans, querybank, grid, random or none"
        )
    if merge.global_view == "apart":
        raise InputError("merge.global_view=apart: stored vectors don't say which are of the whole page; leave it out")
    if not places and merge.compressor == "grid":
        raise InputError("compressor 'grid' pools by place; say where vectors stand with --rows and --columns")
    if found.needs_queries:
        if queries is None:
            raise InputError("compressor 'querybank' needs vectors of queries; name them with --queries")
        found.fit_queries(queries)
    return found


def checked_rows(store: Store, grid: Grid | None, normalise: bool) -> Iterator[Row]:
    """The rows of a store, checked and with coordinates.

    Raises:
        InputError: a row that can't be merged; names it.
    """
    width = None
    known: bool | None = None
    for number, row in enumerate(store.rows()):
        where = f"{store.place}: row {number} ({row.id[:80]})"
        vectors = check_vectors(where, row.vectors, width, normalise)
        width = vectors.shape[1]
        row = placed(where, replace(row, vectors=vectors), grid)
        if known not in (None, row.coords is not None):
            raise InputError(
                f"{where}: rows before have {'coordinates' if known else 'none'}; give all of them, or none"
            )
        known = row.coords is not None
        yield row


def blocks_of(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in parts of a bounded size; where a part ends depends on the rows only."""
    block: list[Row] = []
    size = 0
    for row in rows:
        block.append(row)
        size += row.vectors.nbytes
        if size >= PART_BYTES or len(block) == PART_ROWS:
            yield block
            block, size = [], 0
    if block:
        yield block


@dataclass(frozen=True)
class Done:
    """What a run wrote: rows, vectors read and written, bytes an image, whether places were known, parts found."""

    rows: int
    vectors_in: int
    vectors_out: int
    bytes_per_image: float
    places: bool
    reused: int


def stored_bytes(vectors: int, images: int, width: int, dtype: str) -> int:
    """Bytes of so many vectors of so many images."""
    each = {"float32": 4 * width, "int8": width, "binary": width // 8}.get(dtype, 2 * width)
    return vectors * each + (4 * images if dtype == "int8" else 0)


def compress_vectors(
    source: Store,
    target: Store,
    merge: MergeConfig,
    *,
    dtype: str = "float32",
    grid: Grid | None = None,
    normalise: bool = False,
    queries: Tensor | None = None,
) -> Done:
    """Merges the vectors of one place and writes them to another; killed, it goes on when it is called again.

    Memory: one part, some 64 MB of vectors, and the ids of all rows.

    Args:
        source, target: made by `samer.vectors.places.store_of`.
        merge: the compressor, K and the other settings.
        dtype: of what is written, one of `samer.vectors.stores.DTYPES`.
        grid: where vectors stand; None: as the rows say, and if they say nothing the place term is off.
        normalise: divide vectors by their lengths instead of refusing those that are not of unit length.
        queries: (T, D), for a compressor that learns from queries.

    Raises:
        InputError: bad rows or settings, a place that can't be read or written.
    """
    if Path(source.place).resolve() == Path(target.place).resolve():
        raise InputError(f"{target.place}: --in and --out are the same; name another place to write to")
    compressor_for(merge, True, queries)  # refused before any work
    plan = Plan(source, merge, dtype)
    target.check_target(plan)
    ids = list(source.ids())
    check_ids(source.place, ids)
    if source.left_out:
        print0(
            f"note: not carried along: {', '.join(source.left_out)}; only columns of texts, numbers, truth values and "
            f"dates are, by names other than {', '.join(OWN)}"
        )
    folder = parts_folder(target.place)
    with only_writer(folder), stoppable():
        settings = {**settings_used(merge), "dtype": dtype, "source": source.place}
        if queries is not None:
            settings["queries"] = tensors_checksum({"queries": queries})
        run = _Run(folder, settings, merge, "float32" if target.stores_itself else dtype, queries)
        with Progress(desc="merging", total=len(ids), unit="images") as bar:
            for block in blocks_of(checked_rows(source, grid, normalise)):
                stop_here()
                run.add(block)
                bar.update(len(block))
        if run.rows != len(ids):
            raise InputError(f"{source.place}: changed while it was read; run the same command again")
        parts = Parts(run.files, run.dtype, run.width)
        target.write(parts)
        for stray in listing(folder):
            if stray.name.startswith("part-"):
                stray.unlink()
        (folder / "sent.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    size = stored_bytes(parts.vectors, parts.count, run.width, dtype) / parts.count
    return Done(parts.count, run.vectors, parts.vectors, size, run.places, run.reused)


def parts_folder(place: str) -> Path:
    """Where what is merged waits until a place is written: beside it, or in the working folder for a server's."""
    if "://" in place:
        return Path("samer-" + hashlib.sha256(place.encode()).hexdigest()[:12] + ".parts")
    return Path(place.removeprefix("qdrant:").rstrip("/") + ".parts")


class _Run:
    """Parts as they are made."""

    def __init__(self, folder: Path, settings: dict, merge: MergeConfig, dtype: str, queries: Tensor | None) -> None:
        self.folder, self.settings, self.merge, self.dtype, self.queries = folder, settings, merge, dtype, queries
        self.compressor: Compressor | None = None
        self.files: list[Path] = []
        self.rows = self.vectors = self.width = self.reused = 0
        self.places = False

    def add(self, block: Sequence[Row]) -> None:
        """Merges rows and writes them as the next part, if it is not there."""
        if self.compressor is None:
            self.places, self.width = block[0].coords is not None, block[0].vectors.shape[1]
            self.compressor = compressor_for(self.merge, self.places, self.queries)
            if not self.places and self.merge.compressor == "samer":
                print0("note: where vectors stand is not known (--rows, --columns, or a column): the place term is off")
        path = self.folder / f"part-{len(self.files):05d}.safetensors"
        stamp = part_stamp({**self.settings, "places": self.places}, block)
        if part_is_there(path, stamp):
            self.reused += 1
        else:
            write_part(path, stamp, block, self._merged(block))
        self.files.append(path)
        self.rows += len(block)
        self.vectors += sum(len(row.vectors) for row in block)

    def _merged(self, block: Sequence[Row]) -> dict[str, Tensor]:
        found = merge_rows(self.compressor, block)
        stored = [as_stored(values, self.dtype) for values, _ in found]
        scales = [scale for _, scale in stored] if self.dtype == "int8" else None
        tensors = part_tensors([values for values, _ in stored], scales)
        none = torch.empty(0, dtype=torch.long)
        regions = [
            none if row.source is None else regions_of_patches(own[None], row.source[None])[0]
            for row, (_, own) in zip(block, found)
        ]
        tensors["regions"] = torch.cat(regions)
        tensors["patches"] = torch.tensor([(0, 0) if row.source is None else row.grid for row in block])
        return tensors
