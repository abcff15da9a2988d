"""Frozen hidden states, computed once and kept on disk; training, caching and evaluation read them instead of pixels.

    DIR/manifest.json                      what made it (stamp), written last; splits appear when they are complete
    DIR/base.safetensors                   the base's own projection: weight, bias
    DIR/<split>/images-00000.safetensors   hidden (sum N, H), input_ids (sum N,), lengths (n,), attention (sum N, 3),
                                           int8: scales (sum N,)
    DIR/<split>/texts-00000.safetensors    hidden (sum M, H), offsets (sum M, 2), lengths (t,) of distinct
                                           captions; int8: scales (sum M,)

Shards are mapped, never loaded whole: the page cache is the cache. Shape letters: B images, N tokens, M query tokens,
H hidden.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import safetensors
import tokenizers
import torch
import transformers
from safetensors.torch import save
from torch import Tensor

from samer.config import InputError
from samer.data import make_reader
from samer.features.manifest import DTYPES, FORMAT, FORMAT_VERSION, fingerprint
from samer.retrievers.attention import ATTENTION
from samer.retrievers.hf import Retriever
from samer.runtime.files import atomic_path, only_writer
from samer.runtime.processes import gather_objects, print0, rank
from samer.runtime.progress import Progress, batched
from samer.runtime.shards import check_identity, finished_shard, in_order, shared_out, write_manifest, write_shard
from samer.runtime.signals import stop_here, stoppable

IMAGES_PER_SHARD = 128  # 540 MB at 1,030 x 2,048 bfloat16: what a kill can cost, and what one process holds
TEXTS_PER_SHARD = 4096


def quantise(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, H) as int8 with one scale each: value = int8 * scale. The largest magnitude maps to 127.

    Returns:
        (n, H) int8 and (n,) float32.
    """
    values = hidden.float()
    scale = values.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (values / scale[:, None]).round().to(torch.int8), scale


def write_features(
    folder: str | Path,
    data_root: str | Path,
    splits: Sequence[str],
    retriever: Retriever,
    *,
    batch_size: int = 32,
    dtype: str = "bfloat16",
    limit_images: int | None = None,
    reader: str = "flickr",
) -> dict[str, dict]:
    """Computes the hidden states of splits once and keeps them; complete shards of an earlier try are kept.

    Bytes depend on the data, the model and the batch size, not on the number of processes or on interruptions.

    Args:
        folder: the store; made if missing.
        data_root: Flickr30k-Entities; its Annotations folder is not opened.
        splits: e.g. ["train", "val", "test"].
        retriever: the frozen model.
        batch_size: images, and captions, per forward pass.
        dtype: float32, bfloat16, float16, or int8 with a scale per token.
        limit_images: the first so many images of each split.
        reader: of the data set, a name in `samer.data.READERS`.

    Returns:
        The manifest's entry of each split.

    Raises:
        InputError: bad data, too little disk, or a folder that holds a store of another model or setting, or is
            written to by another process.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise InputError(f"features dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    if batch_size < 1:
        raise InputError(f"batch size must be at least 1; it is {batch_size}")
    if len(set(splits)) != len(splits):
        raise InputError(f"splits {' '.join(splits)}: a split is named twice")
    stamp = _stamp(retriever, dtype)
    records = {
        split: make_reader(reader).load_split(data_root, split, boxes=False, limit_images=limit_images)
        for split in splits
    }
    _open_for_writing(folder, stamp, retriever.name)  # before anything is made in a foreign folder
    with only_writer(folder), stoppable():
        manifest = _open_for_writing(folder, stamp, retriever.name)
        _announce(folder, records, retriever, dtype)
        if rank() == 0:
            base = {"weight": retriever.base_projector.weight, "bias": retriever.base_projector.bias}
            with atomic_path(folder / "base.safetensors") as temporary:
                temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in base.items()}))
        for split, rows in records.items():
            images = _write_shards(
                folder / split, "images", list(batched(rows, IMAGES_PER_SHARD)), retriever, batch_size, dtype, stamp
            )
            texts = list(dict.fromkeys(caption.text for record in rows for caption in record.captions))
            captions = _write_shards(
                folder / split, "texts", list(batched(texts, TEXTS_PER_SHARD)), retriever, batch_size, dtype, stamp
            )
            manifest["splits"][split] = {"images": images, "texts": captions}
            if rank() == 0:
                write_manifest(folder / "manifest.json", manifest)
            gather_objects(None)
    return {split: manifest["splits"][split] for split in splits}


def _stamp(retriever: Retriever, dtype: str) -> dict:
    files = fingerprint(retriever.name)
    if files is None:
        raise InputError(
            f"model {retriever.name!r}: its files are not in a folder or the hub's cache; can't stamp a store"
        )
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **files,
        "base_projector": retriever.base_projector.hash,
        "computed_in": str(retriever.model.dtype).removeprefix("torch."),
        "dtype": dtype,
        "hidden_size": retriever.hidden_size,
        "grid": retriever.grid[0],
        "image_token_id": retriever.image_token_id,
        "libraries": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def _open_for_writing(folder: Path, stamp: dict, base_model: str) -> dict:
    remedy = "name another folder, or remove it to compute them anew"
    manifest = check_identity(folder / "manifest.json", stamp, "features", remedy)
    if manifest is not None:
        return manifest
    foreign = lambda entry: not (entry.is_dir() or entry.name == "base.safetensors" or entry.name.startswith("."))
    if folder.exists() and (not folder.is_dir() or any(map(foreign, folder.iterdir()))):
        raise InputError(f"{folder} is or holds what is no feature store; name another folder")
    return {**stamp, "base_model": base_model, "splits": {}}


def _announce(folder: Path, records: dict[str, list], retriever: Retriever, dtype: str) -> None:
    """Says what the store will take, and refuses to start where the disk has less than what is still missing."""
    first = next(iter(records.values()))[:1]
    per_image = retriever.record_inputs(first)["input_ids"].shape[1]
    images = sum(len(rows) for rows in records.values())
    texts = {caption.text for rows in records.values() for record in rows for caption in record.captions}
    lengths = 0
    for batch in batched(sorted(texts), 1024):
        lengths += int(retriever.query_inputs(batch)["attention_mask"].sum())
    width = retriever.hidden_size * DTYPES[dtype].itemsize + (4 if dtype == "int8" else 0)
    need = images * per_image * (width + 4 + 4 * len(ATTENTION)) + lengths * (width + 8)
    have = sum(file.stat().st_size for file in folder.glob("*/*.safetensors")) if folder.is_dir() else 0
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    print0(
        f"features of {images:,} images ({per_image:,} tokens each) and {len(texts):,} distinct captions in {dtype}: "
        f"{need / 1e9:.2f} GB in {folder} ({have / 1e9:.2f} GB there already, {free / 1e9:.1f} GB free)"
    )
    if need - have > free:
        raise InputError(
            f"{folder}: the features need {(need - have) / 1e9:.1f} GB more, the disk has {free / 1e9:.1f} GB free; "
            "name another disk, use int8, or limit the images"
        )


def _write_shards(folder: Path, kind: str, jobs: list, retriever: Retriever, batch_size: int, dtype: str, stamp: dict):
    """Writes this process's share of the shards and returns the manifest entries of all of them."""
    own = []
    for number, items in Progress(shared_out(jobs), f"{folder.name} {kind}", unit="shards"):
        stop_here()
        path = folder / f"{kind}-{number:05d}.safetensors"
        names = [item if kind == "texts" else item.image_id for item in items]
        mark = {**stamp, "names": names}
        entry = finished_shard(path, mark)
        if entry is None:
            prepare = retriever.query_inputs if kind == "texts" else retriever.record_inputs
            tensors = _encode(items, prepare, retriever, batch_size, dtype, kind)
            entry = write_shard(path, tensors, mark, {"count": len(names)})
        own.append((number, entry))
    return [entry for _, entry in in_order(own)]


def _encode(
    items: Sequence, prepare, retriever: Retriever, batch_size: int, dtype: str, kind: str
) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {}
    for batch in batched(items, batch_size):
        inputs = prepare(batch)
        mask = inputs["attention_mask"].bool()
        if kind == "images":
            hidden, attention = retriever.image_states(inputs, ATTENTION)
            per_token = {
                "input_ids": inputs["input_ids"].to(torch.int32),
                "attention": torch.stack([attention[name] for name in ATTENTION], dim=-1).cpu(),  # (B, N, 3)
            }
        else:
            hidden, per_token = retriever.hidden_states(inputs), {"offsets": inputs["offsets"].to(torch.int32)}
        per_token["hidden"] = hidden.cpu()
        for name, value in per_token.items():
            rows.setdefault(name, []).append(value[mask])  # (sum of the batch's tokens, ...)
        rows.setdefault("lengths", []).append(mask.sum(1))
    tensors = {name: torch.cat(parts) for name, parts in rows.items()}
    flat = tensors["hidden"]
    if dtype == "int8":
        tensors["hidden"], tensors["scales"] = quantise(flat)
    else:
        tensors["hidden"] = flat.to(DTYPES[dtype])
    return tensors
