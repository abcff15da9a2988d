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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from samer.compressors import Compressor, make_compressor
from samer.config import InputError, MergeConfig
from samer.data import make_reader
from samer.data.records import ImageRecord
from samer.evaluation import compress_images, fitted_compressor
from samer.index.manifest import DTYPES, FLOATS, FORMAT, FORMAT_VERSION, NO_REGION, IndexSummary, _summary
from samer.retrievers.base import Encoder
from samer.retrievers.projectors import read_projector
from samer.runtime.files import atomic_path, lookup, only_writer
from samer.runtime.processes import gather_objects, rank
from samer.runtime.progress import Progress, batched, prefetched
from samer.runtime.shards import check_identity, finished_shard, in_order, shared_out, write_manifest, write_shard
from samer.runtime.signals import stop_here, stoppable
from samer.scoring import pack_signs
from samer.tokens import MergedTokens

IMAGES_PER_SHARD = 1024
QUERIES_PER_SHARD = 2048
SCALE_IMAGES = 64  # what int8's scale is taken from, evenly spaced
CLIPPED = 1e-4  # share of components that int8 may clip


def build_index(
    folder: str | Path,
    data_root: str | Path,
    splits: Sequence[str],
    retriever: Encoder,
    merge: MergeConfig,
    *,
    batch_size: int = 32,
    dtype: str = "bfloat16",
    limit_images: int | None = None,
    reader: str = "flickr",
    assignments: bool = False,
) -> list[IndexSummary]:
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
        reader: of the data set, a name in `samer.data.READERS`.
        assignments: keep the region of every token, a byte each.

    Raises:
        InputError: bad data, or a folder that holds a cache of another projector, model or setting, or is written to
            by another process.
    """
    folder = Path(folder)
    _check_settings(retriever, merge, batch_size, dtype, assignments)
    records = {
        split: make_reader(reader).load_split(data_root, split, boxes=False, limit_images=limit_images)
        for split in splits
    }
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
            "hidden_states": retriever.origin,
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

    def choose_scale(self, records: Sequence[ImageRecord], compressor: Compressor) -> None:
        """Sets int8's scale from images evenly spaced over the records, if the index has none yet."""
        if self.dtype == "int8" and self.scale is None:
            steps = np.linspace(0, len(records) - 1, min(SCALE_IMAGES, len(records))).round().astype(int)
            sample = [records[k] for k in steps]
            batches = compress_images(self.retriever, batched(sample, self.batch_size), compressor)
            self.choose_scale_from([self.kept(merged) for _, _, merged in batches])

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
        tensors = self.projector.tensors()
        with atomic_path(path) as temporary:
            temporary.write_bytes(save(tensors))

    def write_images(
        self, split: str, records: Sequence[ImageRecord], compressor: Compressor
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
                    for _, _, merged in itertools.islice(results, len(ours)):
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

    def finished(self, split: str, number: int, records: Sequence[ImageRecord]) -> dict | None:
        """The manifest entry of a shard that is there, whole, made of these records."""
        stamp = self._stamp([record.image_id for record in records])
        entry = finished_shard(self.folder / split / f"images-{number:05d}.safetensors", stamp)
        if entry is not None and self.dtype == "binary":
            exact = finished_shard(self.folder / split / f"images-{number:05d}.exact.safetensors", stamp)
            return exact and {**entry, "exact": exact}
        return entry

    def write_shard(
        self, split: str, number: int, records: Sequence[ImageRecord], parts: Sequence[MergedTokens]
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

    def write_queries(self, split: str, records: Sequence[ImageRecord]) -> tuple[list[dict], int]:
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
