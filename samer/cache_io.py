"""The compressed index on disk: shards of image tokens and query tokens, and a manifest written last.

    DIR/manifest.json                what was built and from what; splits appear here when they are complete
    DIR/projector.safetensors        weight, bias: what queries must be projected with
    DIR/<split>/images-00000.safetensors    tokens (n, K, D) or (n, K, D / 8), mask (n, K) bool; ids in the header;
                                            optional: assignments (n, N) uint8, the region of each token, 255: none
    DIR/<split>/images-00000.exact.safetensors   only with 1-bit tokens: tokens (n, K, D) bfloat16, to re-rank with
    DIR/<split>/queries-00000.safetensors   tokens (sum M, D), lengths (q,), image (q,); valid tokens only
    each shard's header says what it was made from and holds a checksum (samer/shards.py)

Appending writes new shards, deleting notes rows in the manifest, compacting writes what is left into new shards, and
the manifest is replaced in one step, so a reader sees the index before or after, never a mixture (a split of a data set
that is built again from other data is replaced shard by shard; open it when that has ended). int8's scale is fixed by
the first images. No pickle anywhere; a reader maps the files. Bytes depend on the input, where its hidden states come
from, the projector and the batch size only, not on the number of processes, nor on when it was made.

Shape letters: I images, K regions, N tokens before compression, D embedding, Q queries, M tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from samer import flickr
from samer.colpali import Encoder, Projector, Retriever, image_seeds, read_projector
from samer.compressors import Compressor, make_compressor
from samer.config import InputError, MergeConfig
from samer.evaluation import compress_images, fitted_compressor
from samer.runtime import (
    Progress,
    atomic_path,
    gather_objects,
    lookup,
    only_writer,
    prefetched,
    rank,
    stop_here,
    stoppable,
)
from samer.scoring import StoredImages, maxsim, pack_signs, score_stored, search
from samer.shards import (
    bare_name,
    check_identity,
    finished_shard,
    in_order,
    load_header,
    load_shard,
    parts_of,
    read_manifest,
    shared_out,
    verify_shard,
    whole_number,
    write_manifest,
    write_shard,
)
from samer.tokens import MergedTokens, QueryTokens
from samer.train_data import batched

FORMAT = "samer_cache"
FORMAT_VERSION = 3  # 1 had no projector, no int8, no signs and no deletions, 2 no checksum of the manifest
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = (*FLOATS, "int8", "binary")
IMAGES_PER_SHARD = 1024
PICTURES_PER_SHARD = 256  # of a folder: what a kill can cost
QUERIES_PER_SHARD = 2048
FOLDER_SPLIT = "images"  # where pictures without captions go
SCALE_IMAGES = 64  # what int8's scale is taken from, evenly spaced
CLIPPED = 1e-4  # share of components that int8 may clip
CANDIDATES = 10  # 1-bit scores choose so many times the results asked for, at least 100, for exact re-ranking
NO_REGION = 255
SHARD_NAME = re.compile(r"(images|queries)-(\d{5,9})(\.exact)?\.safetensors")


@dataclass(frozen=True)
class CacheSummary:
    """What a split of a cache holds; `bytes_per_image` counts tokens and mask, as a search reads them."""

    split: str
    images: int
    queries: int
    regions: int
    bytes_per_image: float
    reused_shards: int


def build_cache(
    folder: str | Path,
    data_root: str | Path,
    splits: Sequence[str],
    retriever: Encoder,
    merge: MergeConfig,
    *,
    batch_size: int = 32,
    dtype: str = "bfloat16",
    limit_images: int | None = None,
    assignments: bool = False,
) -> list[CacheSummary]:
    """Encodes and compresses splits without boxes and writes them; finished shards of an earlier try are kept.

    Args:
        folder: the cache; made if missing.
        data_root: Flickr30k-Entities; its Annotations folder is never opened.
        splits: e.g. ["val", "test"].
        retriever: with the projector to use.
        merge: compressor, K and the other settings; the object prior plays no part here. A compressor that learns
            from a corpus is fitted on each split.
        batch_size: images, and captions, per forward pass.
        dtype: of the stored image tokens: float32, bfloat16, float16, int8 (one scale for all images) or binary
            (signs, and bfloat16 beside them to re-rank with). Queries are stored alike, in bfloat16 for the last two.
        limit_images: the first so many images of each split.
        assignments: keep the region of every token, a byte each.

    Raises:
        InputError: bad data, or a folder that holds a cache of another projector, model or setting, or is written to
            by another process.
    """
    folder = Path(folder)
    _check_settings(retriever, merge, batch_size, dtype, assignments)
    records = {split: flickr.load_split(data_root, split, boxes=False, limit_images=limit_images) for split in splits}
    with _writing(folder, retriever, merge, batch_size, dtype, assignments) as writer:
        summaries = []
        for split, rows in records.items():
            if any(writer.manifest["splits"].get(split, {}).get("deleted", {}).values()):
                raise InputError(f"{folder}: images of {split} were deleted; build it in another folder")
            compressor = fitted_compressor(retriever, rows, merge, batch_size)
            writer.corpus = [record.image_id for record in rows] if compressor.needs_corpus else None
            writer.choose_scale(rows, compressor)
            shards, reused = writer.write_images(split, rows, compressor)
            queries, kept = writer.write_queries(split, rows)
            writer.commit(split, {"images": shards, "queries": queries})
            summaries.append(_summary(split, writer.manifest["splits"][split], reused + kept))
    return summaries


def add_images(
    folder: str | Path,
    root: str | Path,
    paths: Sequence[str],
    retriever: Retriever,
    merge: MergeConfig,
    *,
    batch_size: int = 32,
    dtype: str = "int8",
    assignments: bool = False,
) -> tuple[CacheSummary, list[str]]:
    """Adds pictures without captions to an index, which is made if it is missing.

    A picture's id is its path under `root`; ids that the index holds are left out, deleted ones are not: a picture that
    is still in the folder comes back. After each shard the index on disk holds what is written so far, so an
    interrupted run loses at most `PICTURES_PER_SHARD` pictures' work.

    Args:
        folder: the index.
        root: the pictures' folder.
        paths: of pictures, relative to `root`.
        retriever, merge, batch_size, dtype, assignments: as in `build_cache`; the compressor must need no corpus.

    Returns:
        What the index holds now, and one line per picture that could not be read; those are skipped.

    Raises:
        InputError: as `build_cache`; no readable picture at all.
    """
    _check_settings(retriever, merge, batch_size, dtype, assignments)
    compressor = make_compressor(merge)
    if compressor.needs_corpus:
        raise InputError(f"{merge.compressor} learns from a whole corpus; an index that grows needs another compressor")
    skipped: list[str] = []

    def prepare(batch: Sequence[flickr.ImageRecord]) -> tuple[list[flickr.ImageRecord], dict[str, Tensor], list[str]]:
        good, images, bad = [], [], []
        for record in batch:
            try:
                record.image_id.encode()
                images.append(flickr.load_image(record.image_path))
                good.append(record)
            except UnicodeEncodeError:
                bad.append(f"{record.image_id!a}: its name is not UTF-8; rename it")
            except InputError as error:
                bad.append(str(error))
        return good, {**retriever.image_inputs(images), "seeds": image_seeds(good)} if good else {}, bad

    with _writing(Path(folder), retriever, merge, batch_size, dtype, assignments) as writer:
        split = writer.manifest["splits"].get(FOLDER_SPLIT, {"images": [], "queries": [], "root": str(root)})
        if split.get("root") != str(root):
            raise InputError(f"{folder} holds the pictures of {split.get('root')}; name another index for {root}")
        held = set(_ids(Path(folder) / FOLDER_SPLIT, split))
        fresh = [flickr.ImageRecord(path, Path(root) / path, ()) for path in dict.fromkeys(paths) if path not in held]
        with Progress(total=len(fresh), desc="images", unit="images") as progress:
            for chunk in batched(fresh, PICTURES_PER_SHARD):
                stop_here()
                records, parts = [], []
                for batch, (good, inputs, bad) in prefetched(prepare, batched(chunk, batch_size)):
                    skipped += bad
                    if good:
                        with torch.no_grad():
                            visual = retriever.encode_images(inputs, compressor.needs)
                            parts.append(writer.kept(compressor(visual)))
                        records += good
                    progress.update(len(batch))
                if not records:
                    continue
                writer.choose_scale_from(parts)
                number = 1 + max((_number(entry["file"]) for entry in split["images"]), default=-1)
                entry = writer.write_shard(FOLDER_SPLIT, number, records, parts)
                split = {**split, "images": [*split["images"], entry]}
                writer.commit(FOLDER_SPLIT, split)
        if not split["images"]:
            why = f"; first: {skipped[0]}" if skipped else ""
            raise InputError(f"{root}: not one readable picture among {len(paths)} files{why}")
    return _summary(FOLDER_SPLIT, split, 0), skipped


def delete_images(folder: str | Path, split: str, ids: Sequence[str]) -> int:
    """Takes images out of an index without rewriting a shard: their rows are noted in the manifest.

    Returns:
        How many images the split still holds.

    Raises:
        InputError: an id that the split does not hold.
    """
    folder = Path(folder)
    Cache(folder)  # nothing is made or locked where there is no index
    with only_writer(folder):
        cache = Cache(folder)
        entry = dict(cache._split(split))
        places = {}
        for shard in entry["images"]:
            gone = set(entry.get("deleted", {}).get(shard["file"], []))
            names = cache._header(split, shard)["stamp"]["ids"]
            places |= {name: (shard["file"], row) for row, name in enumerate(names) if row not in gone}
        missing = [name for name in ids if name not in places]
        if missing:
            raise InputError(f"{folder}: no image {missing[0]!r} in {split} ({len(missing)} such); nothing was deleted")
        deleted = {file: set(rows) for file, rows in entry.get("deleted", {}).items()}
        for name in ids:
            file, row = places[name]
            deleted.setdefault(file, set()).add(row)
        entry["deleted"] = {file: sorted(rows) for file, rows in sorted(deleted.items())}
        manifest = {**cache.manifest, "splits": {**cache.manifest["splits"], split: entry}}
        write_manifest(folder / "manifest.json", manifest)
    return len(places) - len(set(ids))


def _check_settings(retriever: Encoder, merge: MergeConfig, batch_size: int, dtype: str, assignments: bool) -> None:
    if dtype not in DTYPES:
        raise InputError(f"cache dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    make_compressor(merge)  # an unknown name is refused before any work
    if batch_size < 1:
        raise InputError(f"batch size must be at least 1; it is {batch_size}")
    if dtype == "binary" and retriever.embedding_dim % 8:
        raise InputError(f"cache dtype binary needs a width divisible by 8; it is {retriever.embedding_dim}")
    if assignments and merge.compressor == "none":
        raise InputError("all tokens are kept, each is its own region: leave --assignments out")
    if assignments and merge.num_regions > NO_REGION:
        raise InputError(f"assignments take a byte per token, so at most {NO_REGION} regions, not {merge.num_regions}")


def compact_images(folder: str | Path, split: str) -> int:
    """Rewrites a split's images without deleted ones, in shards of `PICTURES_PER_SHARD`; order and vectors stay.

    An index that pictures are added to and deleted from for long collects small shards and dead rows; this makes it
    what it would be if built at once with the same scale. New shards are written beside the old ones, and the manifest
    is replaced in one step; then the old ones go. A reader that has the index open goes on with what it has mapped.

    Returns:
        How many bytes of files it saved.

    Raises:
        InputError: damaged shards, no image left, or a split with captions, which say by number what they describe.
    """
    folder = Path(folder)
    Cache(folder)  # nothing is made or locked where there is no index
    with only_writer(folder), stoppable():
        cache = Cache(folder)
        entry = cache._split(split)
        if entry["queries"]:
            raise InputError(f"{folder}: {split} has captions, so it can't be compacted; build it anew instead")
        place = folder / split
        image_files = lambda: {file for file in place.glob("images-*") if SHARD_NAME.fullmatch(file.name)}
        files = image_files()
        before = sum(file.stat().st_size for file in files)
        number = 1 + max(_number(file.name) for file in files)
        rows = []
        for shard in entry["images"]:
            live = cache._live(split, shard)
            kept = range(shard["count"]) if live is None else live.nonzero().flatten().tolist()
            rows += [(shard, row) for row in kept]
        if not rows:
            raise InputError(f"{folder}: every image of {split} was deleted; remove the index instead")
        shards = []
        try:
            for chunk in batched(rows, PICTURES_PER_SHARD):
                stop_here()
                shards.append(_rewritten(cache, split, chunk, place / f"images-{number + len(shards):05d}.safetensors"))
            manifest = {**cache.manifest, "splits": {**cache.manifest["splits"]}}
            manifest["splits"][split] = {**{k: v for k, v in entry.items() if k != "deleted"}, "images": shards}
            write_manifest(folder / "manifest.json", manifest)
        finally:  # the old ones, or the new ones if it came to nothing, and those of a compaction that was killed
            entry = Cache(folder).manifest["splits"][split]
            named = {place / part["file"] for shard in entry["images"] for part in parts_of(shard)}
            for file in image_files() - named:
                file.unlink()
        return before - sum(file.stat().st_size for file in named)


def _number(name: str) -> int:
    """The number in a shard's name."""
    return int(SHARD_NAME.fullmatch(name)[2])


def _rewritten(cache: Cache, split: str, rows: Sequence[tuple[dict, int]], path: Path) -> dict:
    """Writes rows of several shards, each checked, as one shard, and returns its manifest entry."""
    found: dict[bool, dict[str, list[Tensor]]] = {False: {}, True: {}}
    ids: list[str] = []
    for _, group in itertools.groupby(rows, lambda pair: pair[0]["file"]):
        pairs = list(group)
        entry, picked = pairs[0][0], [row for _, row in pairs]
        for exact in (False, True) if "exact" in entry else (False,):
            tensors, stamp = cache._read(split, entry, exact)
            for name, tensor in tensors.items():
                found[exact].setdefault(name, []).append(tensor[picked])
        ids += [stamp["ids"][row] for row in picked]
    stamp = {**stamp, "ids": ids}
    tensors, half = (
        {name: _joined(parts, NO_REGION if name == "assignments" else 0) for name, parts in found[exact].items()}
        for exact in (False, True)
    )
    return _write_images(path, tensors, half, stamp)


def _joined(parts: Sequence[Tensor], fill: int = 0) -> Tensor:
    """Rows (n, K, ...) of several batches as one, padded to the widest."""
    width = max(part.shape[1] for part in parts)
    pad = lambda t: torch.nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (0, width - t.shape[1]), value=fill)
    return torch.cat([pad(part) for part in parts])


def _write_images(path: Path, tensors: dict[str, Tensor], half: dict[str, Tensor], stamp: dict) -> dict:
    """Writes a shard of images, with 1-bit tokens the exact ones beside it, and returns its manifest entry."""
    stored, mask = tensors["tokens"], tensors["mask"]
    facts = {"count": len(stored), "regions": stored.shape[1], "bytes": stored.nbytes + mask.nbytes}
    exact = {}
    if half:  # first, so that a shard with a manifest entry always has its exact file
        side = path.with_suffix(".exact.safetensors")
        exact = {"exact": write_shard(side, half, stamp, {"bytes": half["tokens"].nbytes})}
    return {**write_shard(path, tensors, stamp, facts), **exact}


@contextmanager
def _writing(folder: Path, retriever: Encoder, merge: MergeConfig, batch_size: int, dtype: str, assignments: bool):
    _check_folder(folder)
    with only_writer(folder), stoppable():
        yield _Writer(folder, retriever, merge, batch_size, dtype, assignments)


def _check_folder(folder: Path) -> None:
    """Refuses a folder that holds something else than a cache, or a cache that was never finished."""
    known = lambda entry: entry.is_dir() or entry.name == "projector.safetensors" or entry.name.startswith(".")
    folder = lookup(folder)
    if (folder / "manifest.json").is_file() or not folder.exists():
        return
    if not folder.is_dir() or not all(map(known, folder.iterdir())):  # a killed write leaves .*.samer-tmp
        raise InputError(f"{folder} is, or holds, files that are no SaMer cache; name another folder")


class _Writer:
    """An index open for writing: its settings, its manifest, and shards that are kept when they are finished."""

    def __init__(
        self, folder: Path, retriever: Encoder, merge: MergeConfig, batch_size: int, dtype: str, assignments: bool
    ) -> None:
        self.folder, self.retriever, self.batch_size, self.dtype = folder, retriever, batch_size, dtype
        self.assignments = assignments
        self.corpus: list[str] | None = None  # ids that a compressor with a codebook was fitted on
        self.projector = retriever.current_projector()
        identity = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base_projector": retriever.base_projector.hash,
            "hidden_states": retriever.source,
            "projector": self.projector.hash,
            "merge": asdict(merge),
            "dtype": dtype,
            "embedding_dim": retriever.embedding_dim,
            "assignments": assignments,
        }
        remedy = "name another cache folder, or remove it to build anew"
        manifest = check_identity(folder / "manifest.json", identity, "a cache", remedy)
        self.scale: float | None = manifest.get("scale") if manifest else None
        self.identity = identity
        self.manifest = manifest or {**identity, "scale": None, "base_model": retriever.name, "splits": {}}

    def choose_scale(self, records: Sequence[flickr.ImageRecord], compressor: Compressor) -> None:
        """Sets int8's scale from images evenly spaced over the records, if the index has none yet."""
        if self.dtype == "int8" and self.scale is None:
            steps = np.linspace(0, len(records) - 1, min(SCALE_IMAGES, len(records))).round().astype(int)
            sample = [records[k] for k in steps]
            batches = compress_images(self.retriever, batched(sample, self.batch_size), compressor)
            self.choose_scale_from([self.kept(merged) for _, merged in batches])

    def choose_scale_from(self, parts: Sequence[MergedTokens]) -> None:
        """The same from tokens at hand: all but a share of 1e-4 of the components fit into +-127."""
        if self.dtype == "int8" and self.scale is None:
            values = torch.cat([part.tokens[part.mask].abs().flatten().float().cpu() for part in parts])
            kept = max(1, round((1 - CLIPPED) * len(values)))
            self.scale = float(values.kthvalue(kept).values) / 127 or 1.0

    def _stamp(self, ids: Sequence[str], texts: Sequence[str] = ()) -> dict:
        """What a shard was made from; a shard with another stamp is made anew."""
        stamp = {**self.identity, "scale": self.scale, "ids": list(ids), "texts": list(texts)}
        return (
            stamp
            if self.corpus is None
            else {**stamp, "corpus": hashlib.sha256(repr(self.corpus).encode()).hexdigest()}
        )

    def commit(self, split: str, entry: dict) -> None:
        """Makes a split, or its new state, visible to readers."""
        self.manifest = {
            **self.manifest,
            "scale": self.scale,
            "splits": {**self.manifest["splits"], split: entry},
        }
        if rank() == 0:
            self._write_projector(self.folder / "projector.safetensors")
            write_manifest(self.folder / "manifest.json", self.manifest)
        gather_objects(None)  # no process goes on before the manifest is written

    def _write_projector(self, path: Path) -> None:
        """Writes the projector if it is not there, or damaged."""
        try:
            if read_projector(path).hash == self.projector.hash:
                return
        except InputError:
            pass
        tensors = {"weight": self.projector.weight.contiguous(), "bias": self.projector.bias.contiguous()}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(tensors))

    def write_images(
        self, split: str, records: Sequence[flickr.ImageRecord], compressor: Compressor
    ) -> tuple[list[dict], int]:
        shards = dict(shared_out(list(batched(records, IMAGES_PER_SHARD))))
        own = {number: self.finished(split, number, shard) for number, shard in shards.items()}
        reused = {number for number, entry in own.items() if entry is not None}
        jobs = {number: list(batched(shards[number], self.batch_size)) for number in shards if number not in reused}
        # one row of batches over all shards: reading ahead does not start anew with each
        batches = [batch for rows in jobs.values() for batch in rows]
        results = compress_images(self.retriever, batches, compressor)

        def encoded() -> Iterator[tuple[int, list[MergedTokens]]]:
            with Progress(desc=f"{split} images", total=len(batches), unit="batches") as bar:
                for number, ours in jobs.items():
                    stop_here()
                    parts = []
                    for _, merged in itertools.islice(results, len(ours)):
                        parts.append(self.kept(merged))
                        bar.update()
                    yield number, parts

        # a shard is written in a thread while the next is encoded
        for (number, _), entry in prefetched(
            lambda job: self.write_shard(split, job[0], shards[job[0]], job[1]), encoded()
        ):
            own[number] = entry
        return _collect([(number, entry, number in reused) for number, entry in own.items()])

    def kept(self, merged: MergedTokens) -> MergedTokens:
        """What a shard needs of a batch, on the CPU; N x K weights of a whole shard would take gigabytes."""
        regions = merged.assignments if self.assignments else merged.assignments[:, :0]
        tokens, mask, regions = (value.cpu().clone() for value in (merged.tokens, merged.mask, regions))
        return MergedTokens(tokens, tokens[..., :0], mask, tokens[..., :0], regions)

    def finished(self, split: str, number: int, records: Sequence[flickr.ImageRecord]) -> dict | None:
        """The manifest entry of a shard that is there, whole, made of these records."""
        stamp = self._stamp([record.image_id for record in records])
        entry = finished_shard(self.folder / split / f"images-{number:05d}.safetensors", stamp)
        if entry is not None and self.dtype == "binary":
            exact = finished_shard(self.folder / split / f"images-{number:05d}.exact.safetensors", stamp)
            return exact and {**entry, "exact": exact}
        return entry

    def write_shard(
        self, split: str, number: int, records: Sequence[flickr.ImageRecord], parts: Sequence[MergedTokens]
    ) -> dict:
        """Writes one shard of compressed images and returns its manifest entry."""
        tokens = _joined([part.tokens.float().cpu() for part in parts])
        tensors = {"tokens": self._encode(tokens), "mask": _joined([part.mask.cpu() for part in parts])}
        if self.assignments:
            regions = _joined([part.assignments.cpu() for part in parts], -1)
            tensors["assignments"] = regions.remainder(NO_REGION + 1).to(torch.uint8)  # -1 becomes 255
        half = {"tokens": tokens.to(torch.bfloat16)} if self.dtype == "binary" else {}
        stamp = self._stamp([record.image_id for record in records])
        return _write_images(self.folder / split / f"images-{number:05d}.safetensors", tensors, half, stamp)

    def _encode(self, tokens: Tensor) -> Tensor:
        if self.dtype == "int8":
            return (tokens / self.scale).round().clamp(-127, 127).to(torch.int8)
        if self.dtype == "binary":
            return pack_signs(tokens)
        return tokens.to(FLOATS[self.dtype])

    def write_queries(self, split: str, records: Sequence[flickr.ImageRecord]) -> tuple[list[dict], int]:
        rows = [(k, caption.text) for k, record in enumerate(records) for caption in record.captions]
        kind = FLOATS.get(self.dtype, torch.bfloat16)
        texts = lambda shard: [text for _, text in shard]
        path = lambda number: self.folder / split / f"queries-{number:05d}.safetensors"
        stamp = lambda shard: self._stamp([records[k].image_id for k, _ in shard], texts(shard))
        shards = dict(shared_out(list(batched(rows, QUERIES_PER_SHARD))))
        own = {number: finished_shard(path(number), stamp(shard)) for number, shard in shards.items()}
        reused = {number for number, entry in own.items() if entry is not None}

        def encoded() -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
            jobs = {k: list(batched(texts(shards[k]), self.batch_size)) for k in shards if k not in reused}
            inputs = prefetched(self.retriever.query_inputs, [batch for ours in jobs.values() for batch in ours])
            for number, ours in Progress(jobs.items(), f"{split} queries", unit="shards"):
                stop_here()
                flat, lengths = [], []
                for _, batch in itertools.islice(inputs, len(ours)):
                    with torch.no_grad():
                        query = self.retriever.encode_queries(batch)
                    flat.append(query.tokens[query.mask].to(kind).cpu())
                    lengths.append(query.mask.sum(1).cpu())
                yield number, flat, lengths

        def write(job: tuple[int, list[Tensor], list[Tensor]]) -> dict:
            number, flat, lengths = job
            image = torch.tensor([k for k, _ in shards[number]])
            tensors = {"tokens": torch.cat(flat), "lengths": torch.cat(lengths), "image": image}
            return write_shard(path(number), tensors, stamp(shards[number]), {"count": len(image)})

        for (number, *_), entry in prefetched(write, encoded()):
            own[number] = entry
        return _collect([(number, entry, number in reused) for number, entry in own.items()])


def _collect(own: list[tuple[int, dict, bool]]) -> tuple[list[dict], int]:
    rows = in_order(own)
    return [entry for _, entry, _ in rows], sum(reused for _, _, reused in rows)


def _ids(folder: Path, split: dict) -> list[str]:
    """Ids of the images that a split holds, deleted ones left out."""
    found = []
    for entry in split["images"]:
        gone = set(split.get("deleted", {}).get(entry["file"], []))
        path = folder / entry["file"]
        try:
            header = load_header(path)
            found += [name for row, name in enumerate(header["stamp"]["ids"]) if row not in gone]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: not readable ({str(error)[:120]}); build the index anew") from None
    return found


def _summary(split: str, entry: dict, reused: int) -> CacheSummary:
    images = sum(shard["count"] for shard in entry["images"])
    size = sum(shard["bytes"] for shard in entry["images"]) / images
    regions = max(shard["regions"] for shard in entry["images"])
    live = images - sum(len(rows) for rows in entry.get("deleted", {}).values())
    return CacheSummary(split, live, sum(shard["count"] for shard in entry["queries"]), regions, size, reused)


def check_manifest(path: Path, manifest: dict) -> None:
    """Refuses a manifest that cannot be true, before anything believes its counts or opens what it names.

    Raises:
        InputError: names the manifest and what is wrong.
    """

    def check(right: bool, what: str) -> None:
        if not right:
            raise InputError(f"{path}: {what}; it is damaged: remove the cache and build it anew")

    whole, bare = whole_number, bare_name
    dtype, scale, width = manifest.get("dtype"), manifest.get("scale"), manifest.get("embedding_dim")
    check(dtype in DTYPES if isinstance(dtype, str) else False, f"dtype {str(dtype)[:40]!r} is unknown")
    check(scale is None or (type(scale) is float and 0 < scale < float("inf")), f"scale {str(scale)[:40]} is no scale")
    check((scale is not None) == (dtype == "int8"), "a scale belongs to int8, and to it only")
    check(whole(width, 1), f"embedding_dim {str(width)[:40]} is no width")
    for key in ("base_model", "base_projector", "projector"):
        check(isinstance(manifest.get(key), str), f"{key} is missing or no text")
    check(isinstance(manifest.get("merge"), dict), "merge is missing or no mapping")
    check(isinstance(manifest.get("assignments"), bool), "assignments is neither true nor false")
    check(isinstance(manifest.get("splits"), dict), "splits is missing or no mapping")
    stored = {"binary": width // 8, "int8": width}.get(dtype) or width * FLOATS.get(dtype, torch.int8).itemsize
    for split, entry in manifest["splits"].items():
        check(bare(split) and isinstance(entry, dict), f"split {split[:40]!r} is no split")
        check(isinstance(entry.get("root", ""), str), f"root of {split} is no text")
        counts: dict[str, int] = {}
        for kind in ("images", "queries"):
            check(isinstance(entry.get(kind), list), f"{kind} of {split} are missing or no list")
            for shard in entry[kind]:
                name = shard.get("file") if isinstance(shard, dict) else None
                match = SHARD_NAME.fullmatch(name) if isinstance(name, str) else None
                right = match and match[1] == kind and not match[3] and name not in counts
                check(bool(right), f"a shard of {split} has no name, or another's")
                right = whole(shard.get("count"), 1) and isinstance(shard.get("sha256"), str)
                if kind == "images":
                    right = right and whole(shard.get("regions"), 1) and whole(shard.get("bytes"), 1)
                    right = right and shard["bytes"] == shard["count"] * shard["regions"] * (stored + 1)
                right = right and ("exact" in shard) == (kind == "images" and dtype == "binary")
                if right and "exact" in shard:
                    exact = shard["exact"]
                    right = isinstance(exact, dict) and exact.get("file") == name.replace(".", ".exact.", 1)
                    right = right and whole(exact.get("bytes"), 1) and isinstance(exact.get("sha256"), str)
                check(
                    right and (kind == "images") == ("regions" in shard), f"the entry of {split}/{name} can't be true"
                )
                counts[name] = shard["count"]
        check(bool(entry["images"]), f"{split} has no shard of images")
        deleted, names = entry.get("deleted", {}), {shard["file"] for shard in entry["images"]}
        check(isinstance(deleted, dict) and set(deleted) <= names, f"deleted of {split} names no shard")
        for name, rows in deleted.items():
            right = isinstance(rows, list) and all(type(row) is int and 0 <= row < counts[name] for row in rows)
            check(right and len(set(rows)) == len(rows), f"deleted rows of {split}/{name} are not there")


class Cache:
    """A finished cache, opened for reading as it is now; shards are mapped, not loaded."""

    def __init__(self, folder: str | Path) -> None:
        """Opens `folder`.

        Raises:
            InputError: no manifest, another format or version.
        """
        self.folder = lookup(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise InputError(
                f"{self.folder}: no manifest.json; this is no finished cache. Build it with bash/cache.sh "
                "(run it again if it was interrupted: it goes on)"
            )
        self.manifest = read_manifest(path, FORMAT, FORMAT_VERSION)
        check_manifest(path, self.manifest)
        self._mapped: dict[tuple[str, str], tuple[dict[str, Tensor], dict]] = {}
        self._uploaded: dict[tuple[str, str, str], Tensor] = {}  # tokens on a device, once they were asked for there
        self._checked: set[tuple[str, str]] = set()
        self._numbered: dict[str, dict[str, int]] = {}

    def projector(self) -> Projector:
        """What queries must be projected with.

        Raises:
            InputError: missing, damaged, or not the one that the index was made with.
        """
        path = self.folder / "projector.safetensors"
        projector = read_projector(path)
        if projector.hash != self.manifest["projector"]:
            raise InputError(
                f"{path}: not the projector that this cache was made with; remove the cache and build it anew"
            )
        return projector

    def check_model(self, encoder: Encoder) -> None:
        """Refuses an encoder of another model than the index was made with, as its untouched projection tells."""
        if encoder.base_projector.hash != self.manifest["base_projector"]:
            raise InputError(f"{encoder.name} is not the model that {self.folder} was made with")

    def _split(self, split: str) -> dict:
        splits = self.manifest.get("splits", {})
        if split not in splits:
            held = ", ".join(sorted(splits)) or "none"
            raise InputError(f"{self.folder}: no split {split!r} in this cache; it holds: {held}")
        return splits[split]

    def _map(self, split: str, entry: dict, exact: bool = False) -> tuple[dict[str, Tensor], dict]:
        """A shard's tensors, mapped, and its header; each file is opened, and held against the manifest, once.

        Args:
            split: of the index.
            entry: the manifest's, of images or queries.
            exact: the shard beside it, with the exact vectors of 1-bit ones.
        """
        file = entry["exact"]["file"] if exact else entry["file"]
        path = self.folder / split / file
        if (split, file) not in self._mapped:
            try:
                tensors, header = load_shard(path)
                self._check_shard(split, entry, tensors, header, exact)
                self._mapped[split, file] = tensors, header
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                if self.manifest != read_manifest(self.folder / "manifest.json", FORMAT, FORMAT_VERSION):
                    raise InputError(f"{self.folder}: rewritten since it was opened; open it again") from None
                raise InputError(
                    f"{path}: not readable ({str(error)[:120]}); remove it and build the cache again"
                ) from None
        return self._mapped[split, file]

    def _check_shard(self, split: str, entry: dict, tensors: dict[str, Tensor], header: dict, exact: bool) -> None:
        """Raises ValueError or KeyError for a shard that is not what the manifest says."""
        stamp = header.get("stamp") if isinstance(header, dict) else None
        if not isinstance(stamp, dict):
            raise ValueError("no header of a cache's shard")
        if stamp["projector"] != self.manifest["projector"]:
            raise ValueError("made with another projector")
        for key in ("dtype", "scale", "merge", "assignments"):
            if key in stamp and stamp[key] != self.manifest.get(key):
                raise ValueError(f"made with another {key}")
        count, width = entry["count"], self.manifest["embedding_dim"]
        own = header.get("entry", {})
        if not isinstance(own, dict) or own.get("count", count) != count:
            raise ValueError("made with another count")
        tokens, names = tensors["tokens"], stamp["texts" if "regions" not in entry else "ids"]
        if "regions" not in entry:  # queries
            lengths, image = tensors["lengths"], tensors["image"]
            right = tokens.ndim == 2 and tokens.shape[1] == width and tokens.is_floating_point()
            right &= all(t.dtype == torch.int64 and t.shape == (count,) for t in (lengths, image))
            right = right and int(lengths.min()) >= 1 and int(lengths.sum()) == len(tokens)
            images = sum(shard["count"] for shard in self._split(split)["images"])
            right = right and int(image.min()) >= 0 and int(image.max()) < images
        else:
            kind = FLOATS.get(self.manifest["dtype"], torch.int8 if self.manifest["dtype"] == "int8" else torch.uint8)
            stored = width // 8 if kind == torch.uint8 else width
            kind, stored = (torch.bfloat16, width) if exact else (kind, stored)
            right = tokens.dtype == kind and tokens.shape == (count, entry["regions"], stored)
            if not exact:
                mask = tensors["mask"]
                right &= mask.dtype == torch.bool and mask.shape == (count, entry["regions"])
            if self.manifest.get("assignments") and not exact:
                regions = tensors["assignments"]
                right &= regions.dtype == torch.uint8 and regions.ndim == 2 and len(regions) == count
            right = right and isinstance(names, list) and len(set(map(str, names))) == count
        right = right and isinstance(names, list) and len(names) == count and all(isinstance(n, str) for n in names)
        if not right:
            raise ValueError("its tensors or names are not what the manifest says")

    def _header(self, split: str, entry: dict) -> dict:
        return self._map(split, entry)[1]

    def _read(self, split: str, entry: dict, exact: bool = False) -> tuple[dict[str, Tensor], dict]:
        """As `_map`, of a shard whose checksum holds: all of it is read, once."""
        own = entry["exact"] if exact else entry
        path = self.folder / split / own["file"]
        if (split, own["file"]) not in self._checked:
            verify_shard(path, own["sha256"])
        tensors, header = self._map(split, entry, exact)
        self._checked.add((split, own["file"]))
        return tensors, header["stamp"]

    def _live(self, split: str, entry: dict) -> Tensor | None:
        """(n,) bool, False at deleted rows; None if there are none."""
        rows = self._split(split).get("deleted", {}).get(entry["file"])
        if not rows:
            return None
        live = torch.ones(entry["count"], dtype=torch.bool)
        live[rows] = False
        return live

    def images(self, split: str) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Shards of a split in order, checked: ids, tokens (n, K, D) as stored, mask (n, K) bool; no deleted image."""
        for entry in self._split(split)["images"]:
            tensors, stamp = self._read(split, entry)
            live = self._live(split, entry)
            if live is None:
                yield stamp["ids"], tensors["tokens"], tensors["mask"]
            elif live.any():
                ids = [name for name, here in zip(stamp["ids"], live.tolist()) if here]
                yield ids, tensors["tokens"][live], tensors["mask"][live]

    def stored(self, split: str, device: torch.device | str = "cpu") -> Iterator[tuple[list[str], StoredImages]]:
        """Shards of a split in order, mapped and unchecked, for scanning; deleted images are marked, not taken out."""
        for entry in self._split(split)["images"]:
            tensors, header = self._map(split, entry)
            mask, live = tensors["mask"], self._live(split, entry)
            full = header.setdefault("full", bool(mask.all()))  # asked once
            yield (
                header["stamp"]["ids"],
                StoredImages(
                    self._tokens_on(device, split, entry["file"], tensors["tokens"]),
                    self.manifest.get("scale"),
                    None if full else mask.to(device),
                    None if live is None else live.to(device),
                ),
            )

    def _tokens_on(self, device: torch.device | str, split: str, file: str, tokens: Tensor) -> Tensor:
        """Mapped tokens, or their copy on a device, which holds the index from its first search there on."""
        if torch.device(device).type == "cpu":
            return tokens
        key = (str(device), split, file)
        if key not in self._uploaded:
            self._uploaded[key] = tokens.to(device)
        return self._uploaded[key]

    def assignments(self, split: str) -> Iterator[tuple[list[str], Tensor]]:
        """Ids and (n, N) uint8, the region of every token, 255 where it has none.

        Raises:
            InputError: a cache built without them.
        """
        if not self.manifest["assignments"]:
            raise InputError(f"{self.folder}: built without assignments; build it with --assignments")
        for entry in self._split(split)["images"]:
            tensors, stamp = self._read(split, entry)
            live = self._live(split, entry)
            rows = torch.ones(entry["count"], dtype=torch.bool) if live is None else live
            yield [name for name, here in zip(stamp["ids"], rows.tolist()) if here], tensors["assignments"][rows]

    def numbers(self, split: str) -> dict[str, int]:
        """Number of every image by id: its row in the index, counted over all shards; deleted ones are left out.

        Adding and deleting images leave the numbers of the others as they are.
        """
        if split not in self._numbered:
            found, start = {}, 0
            for entry in self._split(split)["images"]:
                live = self._live(split, entry)
                ids = self._header(split, entry)["stamp"]["ids"]
                found |= {name: start + row for row, name in enumerate(ids) if live is None or live[row]}
                start += entry["count"]
            self._numbered[split] = found
        return self._numbered[split]

    def _place(self, split: str, number: int) -> tuple[dict, int]:
        """The manifest entry and the row of an image by its number."""
        for entry in self._split(split)["images"]:
            if number < entry["count"]:
                return entry, number
            number -= entry["count"]
        raise IndexError(number)

    def image_id(self, split: str, number: int) -> str | None:
        """Id of an image by its number; None where there is none, or it was deleted."""
        if number < 0 or number >= sum(entry["count"] for entry in self._split(split)["images"]):
            return None
        entry, row = self._place(split, number)
        live = self._live(split, entry)
        return self._header(split, entry)["stamp"]["ids"][row] if live is None or live[row] else None

    def vectors(self, split: str, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """One image as the index stores it: what its score is made of, and what its vectors stand for.

        Args:
            split: of the index.
            number: from `numbers`.

        Returns:
            tokens (K, D) float32 (int8 times its scale; with 1-bit tokens those of the exact file), mask (K,) bool,
            assignments (N,) uint8 or None where the index holds none.
        """
        entry, row = self._place(split, number)
        tensors, _ = self._map(split, entry)
        exact = self._map(split, entry, exact=True)[0] if "exact" in entry else tensors
        tokens = exact["tokens"][row].float()
        if exact["tokens"].dtype == torch.int8:
            tokens = tokens * self.manifest["scale"]
        regions = tensors["assignments"][row] if "assignments" in tensors else None
        return tokens, tensors["mask"][row], regions

    def queries(self, split: str, block: int = 1024) -> Iterator[tuple[QueryTokens, Tensor, list[str]]]:
        """Blocks of queries in order: padded `QueryTokens`, the image each describes (q,), and their texts."""
        for entry in self._split(split)["queries"]:
            tensors, stamp = self._read(split, entry)
            parts = tensors["tokens"].split(tensors["lengths"].tolist())
            for rows in batched(range(len(parts)), block):
                padded = torch.nn.utils.rnn.pad_sequence([parts[k] for k in rows], batch_first=True)
                lengths = tensors["lengths"][rows.start : rows.stop]
                mask = torch.arange(padded.shape[1]) < lengths[:, None]
                texts = stamp["texts"][rows.start : rows.stop]
                yield QueryTokens(padded, mask), tensors["image"][rows.start : rows.stop], texts

    def size(self, split: str) -> tuple[int, int, int, float]:
        """(images, queries, regions, bytes per image) of a split."""
        summary = _summary(split, self._split(split), 0)
        return summary.images, summary.queries, summary.regions, summary.bytes_per_image

    def scores(self, split: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Every query against every image: scores (Q, I) float32 and the image that each query describes (Q,).

        With 1-bit tokens each query's best candidates are scored exactly and rank above the others.

        Raises:
            InputError: a damaged shard, or a split with deletions, whose queries may describe nothing.
        """
        if any(self._split(split).get("deleted", {}).values()):
            raise InputError(f"{self.folder}: images of {split} were deleted; its captions can't be evaluated any more")
        blocks = [(QueryTokens(q.tokens.to(device), q.mask.to(device)), image) for q, image, _ in self.queries(split)]
        columns = []
        for entry, (_, images) in zip(self._split(split)["images"], self.stored(split, device)):
            self._read(split, entry)  # an evaluation checks what it reads
            if "exact" in entry:
                self._read(split, entry, exact=True)
            columns.append(torch.cat([score_stored(query, images).cpu() for query, _ in blocks]))
        scores = torch.cat(columns, dim=1)
        if self.manifest["dtype"] == "binary":
            tokens = torch.cat([self._map(split, e, exact=True)[0]["tokens"] for e in self._split(split)["images"]])
            masks = torch.cat([self._map(split, e)[0]["mask"] for e in self._split(split)["images"]])
            queries = [(tokens, mask) for query, _ in blocks for tokens, mask in zip(query.tokens, query.mask)]
            count = min(CANDIDATES * 10, scores.shape[1])
            chosen = scores.topk(count, dim=1).indices  # (Q, candidates)
            scores -= 4  # below any exact score of unit tokens
            for row, (query, query_mask) in enumerate(queries):
                exact = maxsim(
                    query[query_mask][None], tokens[chosen[row]].to(device), None, masks[chosen[row]].to(device)
                )
                scores[row, chosen[row]] = exact[0].cpu()
        return scores, torch.cat([image for _, image in blocks])

    def search(
        self, queries: QueryTokens, split: str, top: int, device: torch.device | str = "cpu"
    ) -> list[list[tuple[str, float]]]:
        """The best images of each query: at most `top` pairs (id, score), best first, ties by id.

        One pass over the mapped shards; with 1-bit tokens the `CANDIDATES` * top best, at least 100, are then scored
        exactly from the second file.
        """
        if self.manifest["dtype"] != "binary":
            return search(queries, self.stored(split, device), top)
        found = search(queries, self.stored(split, device), max(100, CANDIDATES * top))
        numbers = self.numbers(split)
        result = []
        for number, candidates in enumerate(found):
            query = queries.tokens[number][queries.mask[number]][None]
            names = [name for name, _ in candidates]
            if not names:  # every image was deleted
                result.append([])
                continue
            tokens, masks, _ = zip(*(self.vectors(split, numbers[name]) for name in names))
            pad = torch.nn.utils.rnn.pad_sequence
            mask = pad(masks, batch_first=True).to(device)
            exact = maxsim(query, pad(tokens, batch_first=True).to(device), None, mask)[0].tolist()
            result.append(sorted(zip(names, exact), key=lambda pair: (-pair[1], pair[0]))[:top])
        return result


def describe(summary: CacheSummary, folder: str | Path) -> str:
    """One line on a written split."""
    again = f", {summary.reused_shards} shards kept from an earlier try" if summary.reused_shards else ""
    where = Path(folder) / summary.split
    return (
        f"{summary.split}: {summary.images:,} images x at most {summary.regions} vectors "
        f"({summary.bytes_per_image:,.0f} bytes per image), {summary.queries:,} queries -> {where}{again}"
    )
