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

import gc
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import safetensors
import tokenizers
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from samer import flickr
from samer.colpali import (
    ATTENTION,
    NO_OFFSET,
    Encoder,
    Retriever,
    check_signals,
    image_seeds,
    load_projector,
    read_projector,
)
from samer.config import InputError
from samer.runtime import (
    Progress,
    atomic_path,
    file_hash,
    gather_objects,
    lookup,
    only_writer,
    print0,
    rank,
    read_json,
    stop_here,
    stoppable,
)
from samer.shards import (
    bare_name,
    check_identity,
    finished_shard,
    in_order,
    load_shard,
    read_manifest,
    shared_out,
    whole_number,
    write_manifest,
    write_shard,
)
from samer.train_data import batched

FORMAT = "samer_features"
FORMAT_VERSION = 3  # 1 had neither attention nor offsets, 2 no checksum of the manifest
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
IMAGES_PER_SHARD = 128  # 540 MB at 1,030 x 2,048 bfloat16: what a kill can cost, and what one process holds
TEXTS_PER_SHARD = 4096
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


def quantise(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, H) as int8 with one scale each: value = int8 * scale. The largest magnitude maps to 127.

    Returns:
        (n, H) int8 and (n,) float32.
    """
    values = hidden.float()
    scale = values.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (values / scale[:, None]).round().to(torch.int8), scale


def fingerprint(name: str) -> dict[str, str] | None:
    """Hashes of a model's weight files and of its processor's files, as they lie in a folder or the hub's cache.

    Returns:
        `{"weights": sha256, "processor": sha256}`, or None if the files are not on this machine.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=["*.json", "*.safetensors"]))
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            return None
    index = folder / "model.safetensors.index.json"
    weights = ["model.safetensors"]
    if index.is_file():
        files = read_json(index).get("weight_map", {})
        if not isinstance(files, dict) or not all(isinstance(file, str) and len(file) < 256 for file in files.values()):
            raise InputError(f"{index}: weight_map must map each weight to a file; it may be damaged, restore it")
        weights = sorted(set(files.values()))
    result = {}
    for part, names in (("weights", ["config.json", *weights]), ("processor", PROCESSOR_FILES)):
        digest = hashlib.sha256()
        for file in (folder / name for name in names):
            if file.is_file():
                digest.update(f"{file.name}\n{file_hash(file)}\n".encode())
        result[part] = digest.hexdigest()
    return result


def write_features(
    folder: str | Path,
    data_root: str | Path,
    splits: Sequence[str],
    retriever: Retriever,
    *,
    batch_size: int = 32,
    dtype: str = "bfloat16",
    limit_images: int | None = None,
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
    records = {split: flickr.load_split(data_root, split, boxes=False, limit_images=limit_images) for split in splits}
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
        "grid": retriever.grid,
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


def open_encoder(
    name: str,
    device: torch.device | str,
    *,
    features: str | Path = "",
    adapter_path: str | Path = "",
    dtype: torch.dtype | None = None,
    local_files_only: bool = False,
) -> Encoder:
    """The encoder of a run: a retriever, or the feature store at `features`, with the projector at `adapter_path`.

    Args:
        name: of the model, on the hub or a folder.
        device: to compute on.
        features: empty: load the model.
        adapter_path: empty: the model's own projection.
        dtype: that the backbone computes in; None: bfloat16 on a GPU, else float32.
        local_files_only: don't ask the hub.

    Raises:
        InputError: as `Retriever.load`, `FeatureStore` and `load_projector`.
    """
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    encoder: Encoder
    if features:
        encoder = FeatureStore(features, name, device)
    else:
        encoder = Retriever.load(name, dtype=dtype, device=device, local_files_only=local_files_only)
    if adapter_path:
        encoder.use_projector(load_projector(adapter_path, encoder))
    # a million objects of libraries and model stay for the whole run; each full collection over them takes 0.2 s
    gc.collect()
    gc.freeze()
    return encoder


class FeatureStore(Encoder):
    """A finished store that stands in for the retriever: the same tokens, without a backbone pass.

    Args:
        folder: made by `write_features`.
        model: the model that the features must come from (its name in the settings).

    Raises:
        InputError: no manifest, another format, features of another model or processor.
    """

    def __init__(self, folder: str | Path, model: str, device: torch.device | str = "cpu") -> None:
        now = fingerprint(model)
        self._open(lookup(folder), model, device)
        for part in ("weights", "processor") if now else ():
            if now[part] != self.manifest[part]:
                raise InputError(
                    f"{self.folder}: stale, its {part} are not those of {model!r}; "
                    "compute the features anew in another folder"
                )
        if now is None:
            made = self.manifest["base_model"]
            print0(f"note: {model} is not on this machine, so {self.folder} is taken at its word (made with {made})")

    def __getstate__(self) -> tuple[Path, str]:
        return self.folder, self.name  # a data loader's worker maps the files again; nothing is copied to it

    def __setstate__(self, state: tuple[Path, str]) -> None:
        self._open(*state, "cpu")

    def _open(self, folder: Path, model: str, device: torch.device | str) -> None:
        self.folder = folder
        path = folder / "manifest.json"
        if not path.is_file():
            raise InputError(f"{folder}: no manifest.json; finish the features with bash/features.sh (it goes on)")
        self.manifest = read_manifest(path, FORMAT, FORMAT_VERSION)
        check_manifest(path, self.manifest)
        path = folder / "base.safetensors"
        base = read_projector(path)
        if base.hash != self.manifest["base_projector"]:
            raise InputError(f"{path}: differs from the manifest's hash; it is damaged, compute the features anew")
        super().__init__(model, base, self.manifest["grid"], self.manifest["image_token_id"], device)
        self.source = {"computed_in": self.manifest["computed_in"], "stored_in": self.manifest["dtype"]}
        self._places: dict[str, dict[str, tuple[int, int]]] = {"images": {}, "texts": {}}
        self._shards: list[tuple[dict[str, Tensor], Tensor]] = []
        for split, entry in self.manifest["splits"].items():
            for kind in ("images", "texts"):
                for shard in entry[kind]:
                    tensors, names = self._map(self.folder / split / shard["file"], kind, shard["count"])
                    starts = torch.cat([torch.zeros(1, dtype=torch.long), tensors["lengths"].cumsum(0)])
                    for row, name in enumerate(names):
                        self._places[kind].setdefault(name, (len(self._shards), row))
                    self._shards.append((tensors, starts))

    def _map(self, path: Path, kind: str, count: int) -> tuple[dict[str, Tensor], list[str]]:
        """A shard's tensors, mapped from the file, and the names of its rows; both are what the manifest says."""
        try:
            tensors, header = load_shard(path)
            stamp = header["stamp"]
            other = [key for key in stamp if key != "names" and stamp[key] != self.manifest.get(key)]
            if other:
                raise ValueError(f"made with another {other[0]}")
            names, lengths, total = stamp["names"], tensors["lengths"], len(tensors["hidden"])
            right = isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names)
            right = right and lengths.dtype == torch.int64 and lengths.shape == (count,) and int(lengths.min()) >= 1
            right = right and int(lengths.sum()) == total
            wanted = {"hidden": (DTYPES[self.manifest["dtype"]], (total, self.manifest["hidden_size"]))}
            if self.manifest["dtype"] == "int8":
                wanted["scales"] = torch.float32, (total,)
            if kind == "images":
                wanted |= {"input_ids": (torch.int32, (total,)), "attention": (torch.float32, (total, len(ATTENTION)))}
            else:
                wanted["offsets"] = torch.int32, (total, 2)
            found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items() if name != "lengths"}
            if not right or found != wanted:
                raise ValueError("its tensors or names are not what the manifest says")
            return tensors, names
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: not readable ({str(error)[:120]}); remove it and run features again") from None

    def _rows(self, kind: str, names: Sequence[str]) -> dict[str, Tensor]:
        missing = [name for name in names if name not in self._places[kind]]
        if missing:
            raise InputError(
                f"{self.folder}: no features of {missing[0]!r} ({kind}); it holds the splits "
                f"{', '.join(self.manifest['splits'])}: run bash/features.sh for the one you need, or "
                "scripts/verify.py if it should be there"
            )
        parts: dict[str, list[Tensor]] = {}
        for name in names:
            shard, row = self._places[kind][name]
            tensors, starts = self._shards[shard]
            span = slice(int(starts[row]), int(starts[row + 1]))
            for key in ("hidden", "scales", "input_ids", "attention", "offsets"):
                if key in tensors:
                    parts.setdefault(key, []).append(tensors[key][span])
            parts.setdefault("attention_mask", []).append(torch.ones(span.stop - span.start, dtype=torch.long))
        fill = {"offsets": NO_OFFSET}
        rows = {
            key: torch.nn.utils.rnn.pad_sequence(row, batch_first=True, padding_value=fill.get(key, 0))
            for key, row in parts.items()
        }
        for key in ("input_ids", "offsets"):
            if key in rows:
                rows[key] = rows[key].long()
        return rows

    def record_inputs(self, records: Sequence[flickr.ImageRecord]) -> dict[str, Tensor]:
        """Stored hidden states of images (B, N, H), right-padded, with token ids, attention (B, N, 3), mask, seeds."""
        rows = self._rows("images", [record.image_id for record in records])
        return {**rows, "seeds": image_seeds(records)}

    def query_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Stored hidden states of captions (B, M, H), right-padded, with offsets and mask."""
        return self._rows("texts", texts)

    def hidden_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """What `record_inputs` or `query_inputs` read, on the device."""
        hidden = inputs["hidden"].to(self.device)
        return hidden * inputs["scales"].to(self.device)[..., None] if "scales" in inputs else hidden

    def image_states(self, inputs: dict[str, Tensor], needs: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """What `record_inputs` read, hidden states and signals, on the device."""
        check_signals(needs)
        attention = inputs["attention"].to(self.device) if needs else None
        return self.hidden_states(inputs), {name: attention[..., ATTENTION.index(name)] for name in needs}


def check_manifest(path: Path, manifest: dict) -> None:
    """Refuses a store's manifest that cannot be true, before anything believes it or opens what it names.

    Raises:
        InputError: names the manifest and what is wrong.
    """

    def check(right: bool, what: str) -> None:
        if not right:
            raise InputError(f"{path}: {what}; it is damaged, compute the features anew")

    dtype = manifest.get("dtype")
    check(isinstance(dtype, str) and dtype in DTYPES, f"dtype {str(dtype)[:40]!r} is unknown")
    for key in ("hidden_size", "grid", "image_token_id"):
        check(whole_number(manifest.get(key), 0 if key == "image_token_id" else 1), f"{key} is missing or no number")
    for key in ("weights", "processor", "base_projector", "base_model", "computed_in"):
        check(isinstance(manifest.get(key), str), f"{key} is missing or no text")
    check(isinstance(manifest.get("splits"), dict), "splits is missing or no mapping")
    for split, entry in manifest["splits"].items():
        check(bare_name(split) and isinstance(entry, dict), f"split {split[:40]!r} is no split")
        for kind in ("images", "texts"):
            check(isinstance(entry.get(kind), list), f"{kind} of {split} are missing or no list")
            for shard in entry[kind]:
                right = isinstance(shard, dict) and bare_name(shard.get("file")) and whole_number(shard.get("count"), 1)
                check(right and isinstance(shard.get("sha256"), str), f"an entry of {split}/{kind} can't be true")
