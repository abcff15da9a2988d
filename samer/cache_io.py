"""The compressed index on disk: shards of merged image tokens and query tokens, and a manifest written last.

    DIR/manifest.json                what was built and from what; splits appear here when they are complete
    DIR/<split>/images-00000.safetensors    tokens (n, K, D), mask (n, K) bool; ids in the header
    DIR/<split>/queries-00000.safetensors   tokens (sum M, D), lengths (q,), image (q,); valid tokens only
    each shard's header says what it was made from and holds a checksum (samer/shards.py)

No pickle anywhere; a reader maps the files. Bytes depend on the input, where its hidden states come from, the projector
and the batch size only, not on the number of processes, nor on when it was made.

Shape letters: I images, K regions, D embedding, Q queries, M tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from samer import flickr
from samer.colpali import Encoder
from samer.compressors import Compressor, make_compressor
from samer.config import InputError, MergeConfig
from samer.evaluation import compress_images, encode_texts, fitted_compressor
from samer.runtime import file_hash, gather_objects, rank, read_json, write_json
from samer.scoring import maxsim
from samer.shards import check_manifest, finished_shard, load_shard, shared_out, write_shard
from samer.tokens import QueryTokens
from samer.train_data import batched

FORMAT = "samer_cache"
FORMAT_VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IMAGES_PER_SHARD = 1024
QUERIES_PER_SHARD = 8192


@dataclass(frozen=True)
class CacheSummary:
    """What a split of a cache holds; `bytes_per_image` counts tokens and mask."""

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
) -> list[CacheSummary]:
    """Encodes and merges splits without boxes and writes them; finished shards of an earlier try are kept.

    Args:
        folder: the cache; made if missing.
        data_root: Flickr30k-Entities; its Annotations folder is never opened.
        splits: e.g. ["val", "test"].
        retriever: with the projector to use.
        merge: compressor, K and the other settings; the object prior plays no part here. A compressor that learns
            from a corpus is fitted on each split.
        batch_size: images, and captions, per forward pass.
        dtype: of the stored tokens: float32, bfloat16 or float16.
        limit_images: the first so many images of each split.

    Raises:
        InputError: bad data, or a folder that holds a cache of another projector, model or setting.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise InputError(f"cache dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    make_compressor(merge)  # an unknown name is refused before any work
    if batch_size < 1:
        raise InputError(f"batch size must be at least 1; it is {batch_size}")
    identity = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base_projector": retriever.base_projector.hash,
        "hidden_states": retriever.source,
        "projector": retriever.current_projector().hash,
        "merge": asdict(merge),
        "dtype": dtype,
        "embedding_dim": retriever.embedding_dim,
    }
    records = {split: flickr.load_split(data_root, split, boxes=False, limit_images=limit_images) for split in splits}
    manifest = _open_for_writing(folder, identity, retriever.name)
    summaries = []
    for split, rows in records.items():
        compressor = fitted_compressor(retriever, rows, merge, batch_size)
        shards, reused = _write_images(folder / split, rows, retriever, compressor, batch_size, dtype, identity)
        queries, kept = _write_queries(folder / split, rows, retriever, batch_size, dtype, identity)
        if rank() == 0:
            manifest["splits"][split] = {"images": shards, "queries": queries}
            write_json(folder / "manifest.json", manifest)
        gather_objects(None)  # no process goes on before the manifest is written
        regions = max(shard["regions"] for shard in shards)
        size = sum(shard["bytes"] for shard in shards) / len(rows)
        count = sum(shard["count"] for shard in queries)
        summaries.append(CacheSummary(split, len(rows), count, regions, size, reused + kept))
    return summaries


def _open_for_writing(folder: Path, identity: dict, base_model: str) -> dict:
    """The manifest to add to; a folder of another making is refused, one without a manifest is started."""
    remedy = "name another cache folder, or remove it to build anew"
    manifest = check_manifest(folder / "manifest.json", identity, "a cache", remedy)
    if manifest is None:
        foreign = lambda entry: not entry.is_dir() and not entry.name.startswith(".")  # a killed write leaves .*.tmp
        if folder.exists() and (not folder.is_dir() or any(map(foreign, folder.iterdir()))):
            raise InputError(f"{folder} is, or holds, files that are no SaMer cache; name another folder")
        manifest = {**identity, "base_model": base_model, "splits": {}}
    return manifest


def _stamp(identity: dict, ids: Sequence[str], texts: Sequence[str] = ()) -> dict:
    """What a shard was made from; a shard with another stamp is made anew."""
    return {**identity, "ids": list(ids), "texts": list(texts)}


def _collect(own: list[tuple[int, dict, bool]]) -> tuple[list[dict], int]:
    rows = sorted((row for part in gather_objects(own) for row in part), key=lambda row: row[0])
    return [entry for _, entry, _ in rows], sum(reused for _, _, reused in rows)


def _write_images(
    folder, records, retriever, compressor: Compressor, batch_size, dtype, identity
) -> tuple[list[dict], int]:
    own = []
    jobs = list(batched(records, IMAGES_PER_SHARD))
    for number, shard in shared_out(jobs, f"{folder.name} images"):
        path = folder / f"images-{number:05d}.safetensors"
        stamp = _stamp(identity, [record.image_id for record in shard])
        entry = finished_shard(path, stamp)
        reused = entry is not None
        if entry is None:
            parts = []
            batches = compress_images(retriever, shard, compressor, batch_size)
            total = -(-len(shard) // batch_size)
            for _, merged in tqdm(batches, total=total, desc=path.name, disable=True if rank() else None, leave=False):
                parts.append((merged.tokens.to(DTYPES[dtype]).cpu(), merged.mask.cpu()))
            width = max(mask.shape[1] for _, mask in parts)
            pad = lambda t, w=width: torch.nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (0, w - t.shape[1]))
            tokens = torch.cat([pad(part[0]) for part in parts])
            mask = torch.cat([pad(part[1]) for part in parts])
            facts = {"count": len(shard), "regions": width, "bytes": tokens.nbytes + mask.nbytes}
            entry = write_shard(path, {"tokens": tokens, "mask": mask}, stamp, facts)
        own.append((number, entry, reused))
    return _collect(own)


def _write_queries(folder, records, retriever, batch_size, dtype, identity) -> tuple[list[dict], int]:
    rows = [(k, caption.text) for k, record in enumerate(records) for caption in record.captions]
    own = []
    for number, shard in shared_out(list(batched(rows, QUERIES_PER_SHARD)), f"{folder.name} queries"):
        path = folder / f"queries-{number:05d}.safetensors"
        stamp = _stamp(identity, [records[k].image_id for k, _ in shard], [text for _, text in shard])
        entry = finished_shard(path, stamp)
        reused = entry is not None
        if entry is None:
            flat, lengths = [], []
            for query in encode_texts(retriever, [text for _, text in shard], batch_size):
                flat.append(query.tokens[query.mask].to(DTYPES[dtype]).cpu())
                lengths.append(query.mask.sum(1).cpu())
            tensors = {
                "tokens": torch.cat(flat),
                "lengths": torch.cat(lengths),
                "image": torch.tensor([k for k, _ in shard]),
            }
            entry = write_shard(path, tensors, stamp, {"count": len(shard)})
        own.append((number, entry, reused))
    return _collect(own)


class Cache:
    """A finished cache, opened for reading; shards are mapped, not loaded."""

    def __init__(self, folder: str | Path) -> None:
        """Opens `folder`.

        Raises:
            InputError: no manifest, another format or version.
        """
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise InputError(
                f"{self.folder}: no manifest.json; this is no finished cache. Build it with bash/cache.sh "
                "(run it again if it was interrupted: it goes on)"
            )
        self.manifest = read_json(path)
        found = (self.manifest.get("format"), self.manifest.get("format_version"))
        if found != (FORMAT, FORMAT_VERSION):
            raise InputError(
                f"{path}: format {found[0]!r} version {found[1]!r}; this SaMer reads {FORMAT} {FORMAT_VERSION}"
            )

    def _split(self, split: str) -> dict:
        splits = self.manifest.get("splits", {})
        if split not in splits:
            held = ", ".join(sorted(splits)) or "none"
            raise InputError(f"{self.folder}: no split {split!r} in this cache; it holds: {held}")
        return splits[split]

    def _read(self, split: str, entry: dict) -> tuple[dict[str, Tensor], dict]:
        path = self.folder / split / entry["file"]
        try:
            if path.stat().st_size and file_hash(path) != entry["sha256"]:
                raise InputError(
                    f"{path}: contents differ from the manifest's checksum; remove it and build the cache again"
                )
            tensors, header = load_shard(path)
            return tensors, header["stamp"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path}: not readable ({str(error)[:120]}); remove it and build the cache again"
            ) from None

    def images(self, split: str) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Shards of a split in order: ids, tokens (n, K, D) as stored, mask (n, K) bool."""
        for entry in self._split(split)["images"]:
            tensors, stamp = self._read(split, entry)
            yield stamp["ids"], tensors["tokens"], tensors["mask"]

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
        entry = self._split(split)
        count = sum(shard["count"] for shard in entry["images"])
        total = sum(shard["bytes"] for shard in entry["images"])
        regions = max(shard["regions"] for shard in entry["images"])
        return count, sum(shard["count"] for shard in entry["queries"]), regions, total / count

    def scores(self, split: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Every query against every image: scores (Q, I) float32 and the image that each query describes (Q,)."""
        blocks = list(self.queries(split))
        columns = []
        for _, tokens, mask in self.images(split):
            tokens, mask = tokens.to(device), mask.to(device)
            columns.append(
                torch.cat([maxsim(q.tokens.to(device), tokens, q.mask.to(device), mask).cpu() for q, _, _ in blocks])
            )
        return torch.cat(columns, dim=1), torch.cat([image for _, image, _ in blocks])


def describe(summary: CacheSummary, folder: str | Path) -> str:
    """One line on a written split."""
    again = f", {summary.reused_shards} shards kept from an earlier try" if summary.reused_shards else ""
    where = Path(folder) / summary.split
    return (
        f"{summary.split}: {summary.images:,} images x at most {summary.regions} vectors "
        f"({summary.bytes_per_image:,.0f} bytes per image), {summary.queries:,} queries -> {where}{again}"
    )
