"""Frozen hidden states, computed once and kept on disk; training, caching and evaluation read them instead of pixels.

    DIR/manifest.json                      what made it (stamp), written last; splits appear when they are complete
    DIR/base.safetensors                   the base's own projection: weight, and bias where it has one
    DIR/<split>/images-00000.safetensors   hidden (sum N, H), lengths (n,), attention (sum N, 3), coords (sum N, 2),
                                           patches (sum N,), grid (n, 2), source (sum P,), int8: scales (sum N,)
    DIR/<split>/texts-00000.safetensors    hidden (sum M, H), offsets (sum M, 2), lengths (t,) of distinct
                                           captions, then, if asked for, phrases; int8: scales (sum M,)
    DIR/<split>/stamps.json                may be there: what saves hashing a picture again, as `samer.index.write` says

The header of a shard holds the stamp of the manifest, `names` of its images or its texts, and of images `contents`:
per image null or the hash of its file when it was read, as in an index. Earlier shards have no `contents`.

Shards are mapped, never loaded whole: the page cache is the cache. Shape letters: B images, N tokens, P patches,
M query tokens, H hidden.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import safetensors
import tokenizers
import torch
import transformers
from torch import Tensor

from samer.config import InputError
from samer.data import make_reader
from samer.data.contents import Contents
from samer.data.records import ImageRecord, phrase_texts
from samer.features.manifest import DTYPES, StoredShard, StoredSplit, StoreManifest, read_store_manifest
from samer.retrievers.attention import ATTENTION, NoSignals
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import write_projector
from samer.retrievers.stream import read_images
from samer.runtime.files import about, exists, is_dir, is_file, listing, only_writer
from samer.runtime.processes import print0, rank
from samer.runtime.progress import Progress, batched, prefetched
from samer.runtime.shards import finished_shard, in_order, shared_out, write_manifest, write_shard
from samer.runtime.signals import stop_here, stoppable

IMAGES_PER_SHARD = 128  # 540 MB at 1,030 x 2,048 bfloat16: what a kill can cost, and what one process holds
TEXTS_PER_SHARD = 4096
SAMPLE = 1024  # texts whose tokens are counted before anything is written


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
    reader: str = "",
    strict: bool = False,
    phrases: bool = False,
    signals: bool = True,
) -> dict[str, StoredSplit]:
    """Computes the hidden states of splits once and keeps them; complete shards of an earlier try are kept.

    A shard of which a picture was replaced since, or a caption changed, is computed anew. Bytes depend on the data, the
    model and the batch size, not on the number of processes or on interruptions.

    Args:
        folder: the store; made if missing.
        data_root: of the data set; its boxes are read for `phrases` only.
        splits: e.g. ["train", "val", "test"].
        retriever: the frozen model.
        batch_size: images, and captions, per forward pass.
        dtype: float32, bfloat16, float16, or int8 with a scale per token.
        limit_images: the first so many images of each split.
        reader: of the data set, a name in `samer.data.READERS`; empty: guessed.
        strict: refuse what a reader otherwise leaves out of the data and tells.
        phrases: also of the phrases that have boxes, as somebody types them (`Phrase.typed`), in shards of their own
            behind those of the captions.
        signals: also the attention that SAP compressors ask for; it is read while the model runs, and takes time. A
            store that has it keeps it.

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
    made = _made_now(retriever, dtype, signals)
    kind = make_reader(reader, data_root)
    records = {
        split: kind.load_split(data_root, split, boxes=phrases, limit_images=limit_images, strict=strict)
        for split in splits
    }
    texts = {split: _texts(rows) for split, rows in records.items()}
    _open_for_writing(folder, made)  # before anything is made in a foreign folder
    with only_writer(folder), stoppable():
        manifest = _open_for_writing(folder, made)
        made = replace(made, signals=manifest.signals)
        _announce(folder, records, texts, retriever, dtype)
        if rank() == 0:
            write_projector(folder / "base.safetensors", retriever.base_projector)
        for split, rows in records.items():
            contents = Contents(folder / split, retriever.contents)
            jobs = list(batched(rows, IMAGES_PER_SHARD))
            images = _write_shards(folder / split, jobs, retriever, batch_size, made, contents)
            contents.tell("their features were computed")
            jobs = [job for kind in texts[split] for job in batched(kind, TEXTS_PER_SHARD)]
            written = _write_shards(folder / split, jobs, retriever, batch_size, made)
            manifest = replace(manifest, splits={**manifest.splits, split: StoredSplit(images, written)})
            if rank() == 0:
                write_manifest(folder / "manifest.json", _as_written(manifest))
            contents.remember()  # no process goes on before the manifest is written
    for line in retriever.notes:
        print0(line)
    return {split: manifest.splits[split] for split in splits}


def _texts(records: Sequence[ImageRecord]) -> tuple[list[str], list[str]]:
    """Distinct captions, in the order of their first use; and, where boxes were read, phrases that are none of them."""
    captions = dict.fromkeys(caption.text for record in records for caption in record.captions)
    return list(captions), [text for text in phrase_texts(records) if text not in captions]


def _made_now(retriever: Retriever, dtype: str, signals: bool) -> StoreManifest:
    """The manifest, without a split, of a store that is made by this retriever with the libraries that are here."""
    identity = retriever.identity
    if not (identity.weights and identity.processor):
        raise InputError(
            f"model {retriever.name!r}: its files are not in a folder or the hub's cache; can't stamp a store"
        )
    return StoreManifest(
        **asdict(identity),
        projection=retriever.projection_layer,
        computed_in=retriever.origin["computed_in"],
        dtype=dtype,
        hidden_size=retriever.hidden_size,
        libraries={
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
        base_model=retriever.name,
        revision=retriever.revision,
        processing=dict(retriever.processing),
        reduce=retriever.reduction,
        signals=None if signals else False,
    )


def _as_written(manifest: StoreManifest) -> dict:
    """A manifest's values for its file; left out are those of older formats only, and what is as it always was."""
    found = {**asdict(manifest), "reduce": manifest.reduced_by}
    return {name: value for name, value in found.items() if value is not None}


def _open_for_writing(folder: Path, made: StoreManifest) -> StoreManifest:
    """The manifest of the store in `folder`, or `made` where there is none yet.

    Raises:
        InputError: a store of another making, or something else is there.
    """
    path = folder / "manifest.json"
    if is_file(path):
        found = read_store_manifest(path)
        if found.format_version != made.format_version:
            raise InputError(
                f"{folder} holds features of format {found.format_version}, which are read but not added to; "
                "name another folder"
            )
        if made.signals is not None:  # not asked for; where they are, they stay
            made = replace(made, signals=found.signals)
        elif found.signals is not None:
            raise InputError(
                f"{folder} holds features without the attention that SAP compressors ask for (--no-signals); name "
                "another folder, or remove it to compute them anew"
            )
        before, after = found.stamp(), made.stamp()
        for key in {**after, **before}:
            if before.get(key) != (now := after.get(key)):
                raise InputError(
                    f"{folder} holds features with {key}={before.get(key)!r}, now {now!r}; "
                    "name another folder, or remove it to compute them anew"
                )
        return found
    if exists(folder) and (not is_dir(folder) or any(map(_is_foreign, listing(folder)))):
        raise InputError(f"{folder} is or holds what is no feature store; name another folder")
    return made


def _is_foreign(entry: Path) -> bool:
    """Whether a file or folder belongs to no feature store."""
    return not (is_dir(entry) or entry.name == "base.safetensors" or entry.name.startswith("."))


def _announce(
    folder: Path,
    records: dict[str, list[ImageRecord]],
    texts: dict[str, tuple[list[str], list[str]]],
    retriever: Retriever,
    dtype: str,
) -> None:
    """Says what the store will take, and refuses to start where the disk has less than what is still missing."""
    per_image, patches = _sizes_of(next(iter(records.values())), retriever)
    width = retriever.hidden_size * DTYPES[dtype].itemsize + (4 if dtype == "int8" else 0)
    beside = 4 * len(ATTENTION) + 8 + 1  # attention, coords and patches of a token
    need = have = missing = 0
    for split, rows in records.items():
        lengths = _tokens_of(sorted(itertools.chain(*texts[split])), retriever)
        wanted = len(rows) * (per_image * (width + beside) + 4 * patches) + lengths * (width + 8)
        held = [about(path) for path in listing(folder / split) if path.suffix == ".safetensors"]
        found = sum(each.st_size for each in held if each)
        need, have = need + wanted, have + found
        missing += max(0, wanted - found)  # what another split has is no progress of this one
    place = folder
    while not exists(place):
        place = place.parent
    free = shutil.disk_usage(place).free
    images = sum(len(rows) for rows in records.values())
    captions, phrases = (sum(map(len, kind)) for kind in zip(*texts.values()))
    print0(
        f"features of {images:,} images ({per_image:,} tokens each) and {captions:,} distinct captions"
        f"{f', and {phrases:,} phrases,' * (phrases > 0)} in {dtype}: "
        f"{need / 1e9:.2f} GB in {folder} ({have / 1e9:.2f} GB there already, {free / 1e9:.1f} GB free)"
    )
    if missing > free:
        raise InputError(
            f"{folder}: the features need {missing / 1e9:.1f} GB more, the disk has {free / 1e9:.1f} GB free; "
            "name another disk, use int8, or limit the images"
        )


def _tokens_of(texts: Sequence[str], retriever: Retriever) -> int:
    """Tokens of texts together; of many counted in some, as to prepare all takes a part of the whole work."""
    if not texts:
        return 0
    few = texts[:: -(-len(texts) // SAMPLE)]
    return round(int(retriever.query_inputs(few)["attention_mask"].sum()) * len(texts) / len(few))


def _sizes_of(records: Sequence[ImageRecord], retriever: Retriever) -> tuple[int, int]:
    """Tokens and patches of an image: the mean of a few, as the grids of some retrievers depend on the picture.

    One that can't be read is passed over: whichever process comes to it says so.
    """
    few = []
    for record in records[:: max(1, len(records) // 8)][:8]:
        with suppress(InputError):
            few.append(retriever.reduced(retriever.record_inputs([record])))
    if not few:
        few = [retriever.reduced(retriever.record_inputs(records[:1]))]
    tokens = sum(int(inputs["attention_mask"].sum()) for inputs in few)
    patches = sum(int(retriever.image_layout(inputs).grid.prod()) for inputs in few)
    return round(tokens / len(few)), round(patches / len(few))


def _write_shards(
    folder: Path,
    jobs: list,
    retriever: Retriever,
    batch_size: int,
    made: StoreManifest,
    contents: Contents | None = None,
) -> tuple[StoredShard, ...]:
    """Writes this process's share of the shards and returns the manifest entries of all of them.

    Pictures are read by threads ahead of the model, and a shard is written in one while the next is encoded. Jobs are
    of images, with their `contents`, or without of captions.
    """
    kind, shards, own = "images" if contents else "texts", dict(shared_out(jobs)), {}
    place = lambda number: folder / f"{kind}-{number:05d}.safetensors"
    names = lambda number: [item.image_id if contents else item for item in shards[number]]
    mark = lambda number: {**made.stamp(), "names": names(number)}
    left = {}
    for number, items in shards.items():
        stop_here()
        entry = finished_shard(place(number), mark(number), partial(_as_now, contents, items))
        if entry is None:
            left[number] = list(batched(items, batch_size))
        else:
            own[number] = entry

    def encoded(stream: Iterator) -> Iterator[tuple[int, list[dict[str, Tensor]], list[str | None]]]:
        bar = Progress(desc=f"{folder.name} {kind}", total=len(shards), initial=len(own), unit="shards")
        with bar:
            for number, batches in left.items():
                stop_here()
                parts, hashes = [], []
                for _, ready in itertools.islice(stream, len(batches)):
                    if contents:
                        hashes += ready[0]
                        found = _encode_images(ready[1], retriever, made.signals is None)
                    else:
                        found = _encode_texts(ready, retriever)
                    parts.append(_stored(found, made.dtype))
                yield number, parts, hashes
                bar.update()

    def write(job: tuple[int, list[dict[str, Tensor]], list[str | None]]) -> dict:
        number, parts, hashes = job
        stamp = {**mark(number), **({"contents": hashes} if contents else {})}
        tensors = {name: [part[name] for part in parts] for name in parts[0]}
        parts.clear()  # the shard is in memory once, and no longer than until it is written
        return write_shard(place(number), tensors, stamp, {"count": len(shards[number])})

    batches = [batch for rows in left.values() for batch in rows]
    ahead = read_images(retriever, batches, contents) if contents else prefetched(retriever.query_inputs, batches)
    with closing(ahead) as stream:
        for (number, *_), entry in prefetched(write, encoded(stream)):
            own[number] = entry
    rows = [(number, StoredShard(**entry)) for number, entry in own.items()]
    return tuple(entry for _, entry in in_order(rows))


def _as_now(contents: Contents | None, records: Sequence[ImageRecord], found: dict, mark: dict) -> bool:
    """Whether a shard's stamp says what one made now would, and its pictures are still the same."""
    if contents is None:
        return found == mark
    rest = {key: value for key, value in found.items() if key != "contents"}
    return rest == mark and contents.same(found.get("contents"), records)


def _encode_images(inputs: dict[str, Tensor], retriever: Retriever, signals: bool) -> dict[str, Tensor]:
    """What a shard holds of a batch of images: per token (sum N, ...), per patch (sum P,), per image (B, ...)."""
    inputs = retriever.reduced(inputs)
    attention = None
    if signals:
        with suppress(NoSignals):
            hidden, attention = retriever.image_states(inputs, ATTENTION)
    if attention is None:
        hidden = retriever.hidden_states(inputs)
        attention = dict.fromkeys(ATTENTION, torch.full(hidden.shape[:2], torch.nan, device=hidden.device))
    layout = retriever.image_layout(inputs)
    mask = inputs["attention_mask"].bool()
    # a token's number counts its own image's tokens: padding, which may stand on the left, is not stored
    number = (mask.cumsum(1) - 1).to(layout.source.device)
    source = torch.where(layout.source < 0, -1, number.gather(1, layout.source.clamp(min=0)))
    own = torch.arange(source.shape[1], device=source.device) < layout.grid.prod(1)[:, None]
    per_token = {
        "hidden": hidden,
        "attention": torch.stack([attention[name] for name in ATTENTION], dim=-1),  # (B, N, 3)
        "coords": layout.coords,
        "patches": layout.patches,
    }
    return {
        **{name: value.cpu()[mask.cpu()] for name, value in per_token.items()},
        "source": source[own].to(torch.int32).cpu(),
        "grid": layout.grid.to(torch.int32).cpu(),
        "lengths": mask.sum(1).cpu(),
    }


def _encode_texts(inputs: dict[str, Tensor], retriever: Retriever) -> dict[str, Tensor]:
    """What a shard holds of a batch of captions, per token (sum M, ...)."""
    mask = inputs["attention_mask"].bool().cpu()
    return {
        "hidden": retriever.hidden_states(inputs).cpu()[mask],
        "offsets": inputs["offsets"].to(torch.int32)[mask],
        "lengths": mask.sum(1),
    }


def _stored(batch: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """What a shard keeps of a batch: hidden states in `dtype`."""
    if dtype == "int8":
        hidden, scales = quantise(batch["hidden"])
        return {**batch, "hidden": hidden, "scales": scales}
    return {**batch, "hidden": batch["hidden"].to(DTYPES[dtype])}
