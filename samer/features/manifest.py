"""What a feature store's manifest says."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from samer.config import InputError, ReduceConfig
from samer.reducers import settings_used
from samer.retrievers.identity import ModelIdentity
from samer.runtime.shards import bare_name, read_manifest
from samer.settings import build_dataclass

FORMAT = "samer_features"
FORMAT_VERSION = 4  # 1 had neither attention nor offsets, 2 no checksum of the manifest, 3 one square grid for all
READABLE = (FORMAT_VERSION, 3)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class StoredShard:
    """A file of a split: its name there, how many images or captions it holds, SHA-256 of it."""

    file: str = ""
    count: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class StoredSplit:
    """The shards of a split, in order."""

    images: tuple[StoredShard, ...] = ()
    texts: tuple[StoredShard, ...] = ()


@dataclass(frozen=True)
class StoreManifest:
    """What made a store, and what is in it; its shards carry all but `base_model` to `processing`, and `splits`, too.

    Attributes:
        architecture, weights, processor, base_projector: as in `ModelIdentity`. In format 3 there is no architecture,
            and `processor` is a hash of its files alone.
        projection: dotted name of the projection layer in the model.
        computed_in, dtype: what hidden states were computed and are stored in.
        hidden_size: H.
        libraries: versions of what computed them, by name; compared when a store is written to, not when it is read.
        grid, image_token_id: format 3 only: patches per side, and what stands at them in `input_ids`.
        base_model, revision: name of the model.
        processing: as `Family.processing` says.
        reduce: how the vision tower ran on fewer tokens.
        signals: False where no attention signals were asked for (they are NaN then), else None.
        splits: by name; a split appears when it is complete.
    """

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    architecture: str = ""
    weights: str = ""
    processor: str = ""
    base_projector: str = ""
    projection: str = "embedding_proj_layer"
    computed_in: str = ""
    dtype: str = ""
    hidden_size: int = 0
    libraries: dict[str, str] = field(default_factory=dict)
    grid: int | None = None
    image_token_id: int | None = None
    base_model: str = ""
    revision: str = "main"
    processing: dict[str, str] = field(default_factory=dict)
    reduce: ReduceConfig = field(default_factory=ReduceConfig)
    signals: bool | None = None
    splits: dict[str, StoredSplit] = field(default_factory=dict)

    @property
    def identity(self) -> ModelIdentity:
        """The model that made it, as far as it is known: format 3 does not know the picture backend."""
        processor = self.processor if self.format_version >= 4 else ""
        return ModelIdentity(self.architecture, self.weights, processor, self.base_projector)

    @property
    def reduced_by(self) -> dict[str, Any] | None:
        """The settings of its reduction that are used; None where there is none, as in all earlier stores."""
        if self.reduce.method == "none":
            return None
        return {key: list(v) if isinstance(v, tuple) else v for key, v in settings_used(self.reduce).items()}

    def stamp(self) -> dict[str, Any]:
        """What made it, as its shards carry it."""
        values = {**asdict(self), "reduce": self.reduced_by}
        for name in ("base_model", "revision", "processing", "splits"):
            del values[name]
        return {name: value for name, value in values.items() if value is not None}


def read_store_manifest(path: Path) -> StoreManifest:
    """The manifest of a store, of this format or an older one that can be read; refuses what cannot be true.

    Raises:
        InputError: not readable, damaged, or of another format; names the file.
    """
    values = read_manifest(path, FORMAT, *READABLE)
    remedy = "it is damaged, compute the features anew"
    try:
        manifest = build_dataclass(StoreManifest, values, str(path))
    except InputError as error:
        raise InputError(f"{str(error)[:300]}; {remedy}") from None

    def check(right: bool, what: str) -> None:
        if not right:
            raise InputError(f"{path}: {what}; {remedy}")

    check(manifest.dtype in DTYPES, f"dtype {manifest.dtype[:40]!r} is unknown")
    check(manifest.hidden_size >= 1, "hidden_size is missing or no number")
    if manifest.format_version == 3:
        right = manifest.grid is not None and manifest.grid >= 1 and manifest.image_token_id is not None
        check(right, "grid or image_token_id is missing or no number")
    else:
        check(bool(manifest.architecture), "architecture is missing or no text")
    for key in ("weights", "processor", "base_projector", "computed_in"):
        check(bool(getattr(manifest, key)), f"{key} is missing or no text")
    for split, entry in manifest.splits.items():
        check(bare_name(split), f"split {split[:40]!r} is no split")
        for shard in (*entry.images, *entry.texts):
            right = bare_name(shard.file) and shard.count >= 1 and bool(shard.sha256)
            check(right, f"an entry of {split} can't be true")
    return manifest
