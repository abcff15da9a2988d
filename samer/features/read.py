"""A feature store that stands in for a retriever, and the one way to open either.

Shape letters: B images, N tokens, M query tokens, H hidden."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from samer.config import InputError, ReduceConfig
from samer.data.contents import check_contents, named
from samer.data.records import ImageRecord
from samer.data.stamps import FILE, Stamps
from samer.features.manifest import DTYPES, StoreManifest, read_store_manifest
from samer.reducers import settings_used
from samer.reducers.calibration import with_statistics
from samer.retrievers.attention import ATTENTION, NoSignals, check_signals
from samer.retrievers.base import NO_OFFSET, Encoder, image_seeds
from samer.retrievers.hf import Retriever, identify
from samer.retrievers.identity import ModelIdentity, fingerprint, model_folder
from samer.retrievers.projectors import load_projector, read_projector
from samer.runtime.files import is_dir, is_file, lookup
from samer.runtime.hub import model_name
from samer.runtime.processes import gather_objects, print0, rank, world_size
from samer.runtime.progress import Progress
from samer.runtime.shards import load_shard, unreadable
from samer.tokens import ImageLayout

MANY = 2000  # pictures to look at, from which on it shows how far it is


def open_encoder(
    name: str,
    device: torch.device | str,
    *,
    features: str | Path = "",
    adapter_path: str | Path = "",
    dtype: torch.dtype | None = None,
    local_files_only: bool = False,
    revision: str = "main",
    pictures: bool = True,
    reduce: ReduceConfig | None = None,
) -> Encoder:
    """The encoder of a run: a retriever, or the feature store at `features`, with the projector at `adapter_path`.

    Args:
        name: of the model, on the hub or a folder.
        device: to compute on.
        features: empty: load the model.
        adapter_path: a projector's folder, file or hub id; empty: the model's own projection.
        dtype: that the backbone computes in; None: bfloat16 on a GPU, else float32.
        local_files_only: don't ask the hub.
        revision: of the model on the hub.
        pictures: False: it is for texts alone, as in `Retriever.load`.
        reduce: how its vision tower runs on fewer tokens; a feature store says so itself, and may be asked for it.

    Raises:
        InputError: as `Retriever.load`, `Retriever.use_reduction`, `FeatureStore` and `load_projector`.
    """
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    encoder: Encoder
    if features:
        encoder = FeatureStore(features, name, device, revision=revision)
        check_reduction(encoder, reduce)
    else:
        where = {"local_files_only": local_files_only, "revision": revision}
        encoder = Retriever.load(name, dtype=dtype, device=device, pictures=pictures, **where)
        if reduce is not None and reduce.method != "none":
            encoder.use_reduction(reduce)
    if adapter_path:
        encoder.use_projector(load_projector(adapter_path, encoder, local_files_only=local_files_only))
    return encoder


def check_reduction(store: FeatureStore, asked: ReduceConfig | None) -> None:
    """Refuses a store whose vision tower was not reduced as asked; nothing asked, it is as it is.

    Raises:
        InputError: names both.
    """
    if asked is None or asked.method == "none":
        return
    held, wanted = settings_used(store.reduction), settings_used(with_statistics(asked))
    other = [name for name in wanted if held.get(name) != wanted[name]]
    if other:
        raise InputError(
            f"{store.folder}: its features were made with reduce.{other[0]}={held.get(other[0])}, asked for is "
            f"{wanted[other[0]]}; leave reduce out, or compute the features in another folder"
        )


class FeatureStore(Encoder):
    """A finished store that stands in for the retriever: the same tokens, without a backbone pass.

    Args:
        folder: made by `write_features`.
        model: the model that the features must come from (its name in the settings).
        device: to compute on.
        revision: of the model on the hub.

    Raises:
        InputError: no manifest, another format, features of another model or processor.
    """

    def __init__(
        self, folder: str | Path, model: str, device: torch.device | str = "cpu", *, revision: str = "main"
    ) -> None:
        self._open(lookup(folder), model, device, revision)
        if model != self.manifest.base_model or is_dir(model):
            self.name = model = model_name(model)  # the store's own may be gone by now
        now = _identity_now(model, revision, self.manifest.format_version)
        if now is None:
            made = self.manifest.base_model
            print0(f"note: {model} is not on this machine, so {self.folder} is taken at its word (made with {made})")
            return
        made = ModelIdentity(self.manifest.architecture, self.manifest.weights, self.manifest.processor)
        if stale := made.difference(now):
            raise InputError(
                f"{self.folder}: stale, its {stale} are not those of {model!r}; compute the features anew in another "
                "folder"
            )

    def __getstate__(self) -> tuple[Path, str, str]:
        return self.folder, self.name, self.revision  # a data loader's worker maps the files again; nothing is copied

    def __setstate__(self, state: tuple[Path, str, str]) -> None:
        folder, name, revision = state
        self._open(folder, name, "cpu", revision)

    def _open(self, folder: Path, model: str, device: torch.device | str, revision: str) -> None:
        self.folder = folder
        path = folder / "manifest.json"
        if not is_file(path):
            raise InputError(f"{folder}: no manifest.json; finish the features with bash/features.sh (it goes on)")
        self.manifest = read_store_manifest(path)
        path = folder / "base.safetensors"
        base = read_projector(path)
        if base.hash != self.manifest.base_projector:
            raise InputError(f"{path}: differs from the manifest's hash; it is damaged, compute the features anew")
        self._places: dict[str, dict[str, tuple[int, int]]] = {"images": {}, "texts": {}}
        self._shards: list[_Shard] = []
        for split, entry in self.manifest.splits.items():
            for kind in ("images", "texts"):
                for shard in getattr(entry, kind):
                    mapped = _map(self.folder / split / shard.file, kind, shard.count, self.manifest)
                    for row, name in enumerate(mapped.names):
                        self._places[kind].setdefault(name, (len(self._shards), row))
                    self._shards.append(mapped)
        super().__init__(
            model, base, grid=self._one_grid(), image_token_id=self.manifest.image_token_id or 0, device=device
        )
        self.revision = revision
        self.projection_layer = self.manifest.projection
        self.processing = self.manifest.processing
        self.origin = {"computed_in": self.manifest.computed_in, "stored_in": self.manifest.dtype}
        self.reduction = self.manifest.reduce

    def _one_grid(self) -> tuple[int, int] | None:
        """Rows and columns, if all stored images have the same."""
        if self.manifest.grid is not None:
            return self.manifest.grid, self.manifest.grid
        grids = [shard.tensors["grid"].unique(dim=0) for shard in self._shards if "grid" in shard.tensors]
        found = torch.cat(grids).unique(dim=0).tolist() if grids else []
        return tuple(found[0]) if len(found) == 1 else None

    @property
    def identity(self) -> ModelIdentity:
        """The model that made the features, by the manifest."""
        return self.manifest.identity

    def check_records(self, records: Sequence[ImageRecord]) -> None:
        """Refuses records whose image or captions are not stored, or whose picture was replaced since.

        A picture that is not there, is empty or can't be read is no matter: nothing reads it. Several processes share
        the work, so all of them must call this.
        """
        wanted = {
            "images": [record.image_id for record in records],
            "captions": [caption.text for record in records for caption in record.captions],
        }
        for what, names in wanted.items():
            places = self._places["images" if what == "images" else "texts"]
            missing = [name for name in dict.fromkeys(names) if name not in places]
            if missing:
                raise InputError(
                    f"{self.folder}: no features of {missing[0][:80]!r} and {len(missing) - 1:,} more {what} of "
                    f"{len(set(names)):,}; it holds the splits {', '.join(self.manifest.splits)}: run "
                    "bash/features.sh for the one you need"
                )
        places = self._places["images"]
        shards = {record.image_id: self._shards[places[record.image_id][0]] for record in records}
        replaced, unknown = self._replaced(records)
        if replaced:
            splits = ", ".join(dict.fromkeys(shards[name].path.parent.name for name in replaced))
            raise InputError(
                f"{self.folder}: {len(replaced):,} of {len(shards):,} pictures were replaced since their features were "
                f"computed ({named(replaced)}); run bash/features.sh again for {splits}: it computes those shards anew"
            )
        if unknown:
            print0(
                f"note: {self.folder} is taken at its word for {unknown:,} pictures, as earlier versions kept no "
                "content hashes; compute the features in another folder to have later changes seen"
            )

    def lacking(self, texts: Sequence[str]) -> list[str]:
        """The texts that are not stored."""
        return [text for text in texts if text not in self._places["texts"]]

    def _replaced(self, records: Sequence[ImageRecord]) -> tuple[list[str], int]:
        """Ids of images whose file now holds something else than the features are of, and of how many it's unknown."""
        unique = list({record.image_id: record for record in records}.values())
        stamps = {split: Stamps(self.folder / split / FILE) for split in self.manifest.splits}
        own: dict[str, list[str]] = {split: [] for split in stamps}  # looked at by this process
        replaced, share = [], unique[rank() :: world_size()]
        for record in Progress(share, "comparing pictures", unit="images") if len(share) > MANY else share:
            shard, row = self._places["images"][record.image_id]
            split, held = self._shards[shard].path.parent.name, self._shards[shard].contents[row]
            with suppress(InputError, OSError, ValueError):
                if held is not None and os.stat(record.image_path).st_size:
                    own[split].append(record.image_id)
                    if stamps[split].content(record.image_id, record.image_path) != held:
                        replaced.append(record.image_id)
        known = {split: {name: stamps[split].rows().get(name) for name in names} for split, names in own.items()}
        parts = gather_objects((replaced, known))
        for split in stamps if rank() == 0 else ():
            for _, rows in parts:
                stamps[split].merge({name: row for name, row in rows[split].items() if row})
            with suppress(InputError):  # it only saves reading them again
                stamps[split].write()
        found = {name for names, _ in parts for name in names}
        unknown = self.contents(unique, Stamps()).count(None)
        return [record.image_id for record in unique if record.image_id in found], unknown

    def contents(self, records: Sequence[ImageRecord], stamps: Stamps) -> list[str | None]:
        """The content hash of each picture that the features are of, None where the store does not say."""
        places = [self._places["images"].get(record.image_id) for record in records]
        return [place and self._shards[place[0]].contents[place[1]] for place in places]

    def _rows(self, kind: str, names: Sequence[str]) -> dict[str, Tensor]:
        missing = [name for name in names if name not in self._places[kind]]
        if missing:
            raise InputError(
                f"{self.folder}: no features of {missing[0]!r} ({kind}); it holds the splits "
                f"{', '.join(self.manifest.splits)}: run bash/features.sh for the one you need, or "
                "scripts/verify.py if it should be there"
            )
        parts: dict[str, list[Tensor]] = {}
        for name in names:
            shard, row = self._places[kind][name]
            for key, value in self._shards[shard].row(row).items():
                parts.setdefault(key, []).append(value)
        fill = {"offsets": NO_OFFSET, "source": -1, "coords": 0.5}
        rows = {
            key: torch.nn.utils.rnn.pad_sequence(row, batch_first=True, padding_value=fill.get(key, 0))
            for key, row in parts.items()
        }
        for key in ("input_ids", "offsets", "source", "grid"):
            if key in rows:
                rows[key] = rows[key].long()
        return rows

    def record_inputs(self, records: Sequence[ImageRecord], pictures: None = None) -> dict[str, Tensor]:
        """Stored hidden states of images (B, N, H), right-padded, with layout, attention (B, N, 3), mask, seeds."""
        rows = self._rows("images", [record.image_id for record in records])
        return {**rows, "seeds": image_seeds(records)}

    def query_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Stored hidden states of captions (B, M, H), right-padded, with offsets and mask."""
        return self._rows("texts", texts)

    def image_layout(self, inputs: dict[str, Tensor]) -> ImageLayout:
        """The layouts as they were stored; a store of format 3 has token ids instead, and one grid."""
        if "input_ids" in inputs:
            return super().image_layout(inputs)
        return ImageLayout(*(inputs[name] for name in ("coords", "patches", "grid", "source")))

    def hidden_states(self, inputs: dict[str, Tensor]) -> Tensor:
        """What `record_inputs` or `query_inputs` read, on the device."""
        hidden = inputs["hidden"].to(self.device)
        return hidden * inputs["scales"].to(self.device)[..., None] if "scales" in inputs else hidden

    def image_states(self, inputs: dict[str, Tensor], needs: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """What `record_inputs` read, hidden states and signals, on the device."""
        check_signals(needs)
        if others := [name for name in needs if name not in ATTENTION]:
            raise NoSignals(
                f"{self.folder}: a feature store holds no attention of layers {others[0]}; use the pictures"
            )
        attention = inputs["attention"].to(self.device) if needs else None
        if needs and bool(attention[inputs["attention_mask"].bool().to(self.device)].isnan().any()):
            if self.manifest.signals is not None:
                raise NoSignals(f"{self.folder}: its attention signals were not asked for (--no-signals)")
            raise NoSignals(f"{self.folder}: {self.manifest.base_model} gave no attention over the whole picture")
        return self.hidden_states(inputs), {name: attention[..., ATTENTION.index(name)] for name in needs}


class _Shard:
    """A shard's tensors, mapped from its file, and the names and, of images, the content hashes of its rows."""

    def __init__(self, path: Path, tensors: dict[str, Tensor], names: list[str], contents: list[str | None]) -> None:
        self.path, self.tensors, self.names, self.contents = path, tensors, names, contents
        self.starts = {"tokens": _starts(tensors["lengths"])}
        if "grid" in tensors:
            self.starts["patches"] = _starts(tensors["grid"].long().prod(1))

    def row(self, number: int) -> dict[str, Tensor]:
        """What is stored of one image or caption, and its `attention_mask`."""
        tokens = slice(*self.starts["tokens"][number : number + 2].tolist())
        found = {"attention_mask": torch.ones(tokens.stop - tokens.start, dtype=torch.long)}
        for name, tensor in self.tensors.items():
            if name == "grid":
                found[name] = tensor[number]
            elif name == "source":
                found[name] = tensor[slice(*self.starts["patches"][number : number + 2].tolist())]
                if found[name].min() < -1 or found[name].max() >= tokens.stop - tokens.start:
                    raise InputError(f"{self.path}: source of row {number} names no token; run scripts/verify.py")
            elif name != "lengths":
                found[name] = tensor[tokens]
        return found


def _starts(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])


def _identity_now(model: str, revision: str, format_version: int) -> ModelIdentity | None:
    """What a store of `format_version` would be stamped with if it were made now; None: the model is not here."""
    if format_version >= 4:
        return identify(model, revision)
    folder = model_folder(model, revision)
    found = fingerprint(folder) if folder else None
    return ModelIdentity(weights=found.weights, processor=found.processor) if found else None


def _map(path: Path, kind: str, count: int, manifest: StoreManifest) -> _Shard:
    """A shard whose tensors and names are what the manifest says.

    Raises:
        InputError: it is not; names the file.
    """
    try:
        tensors, header = load_shard(path)
        stamp, made = header["stamp"], manifest.stamp()
        other = [key for key in stamp if key not in ("names", "contents") and stamp[key] != made.get(key)]
        if other:
            raise ValueError(f"made with another {other[0]}")
        names, lengths, total = stamp["names"], tensors["lengths"], len(tensors["hidden"])
        right = isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names)
        right = right and lengths.dtype == torch.int64 and lengths.shape == (count,) and int(lengths.min()) >= 1
        right = right and int(lengths.sum()) == total
        wanted = {"hidden": (DTYPES[manifest.dtype], (total, manifest.hidden_size))}
        if manifest.dtype == "int8":
            wanted["scales"] = torch.float32, (total,)
        if kind == "texts":
            wanted["offsets"] = torch.int32, (total, 2)
        else:
            wanted["attention"] = torch.float32, (total, len(ATTENTION))
        if kind == "images" and manifest.format_version == 3:
            wanted["input_ids"] = torch.int32, (total,)
        elif kind == "images":
            grid = tensors["grid"]
            right = right and grid.dtype == torch.int32 and grid.shape == (count, 2) and int(grid.min()) >= 1
            patches = int(grid.long().prod(1).sum()) if right else 0
            wanted |= {"grid": (torch.int32, (count, 2)), "source": (torch.int32, (patches,))}
            wanted |= {"coords": (torch.float32, (total, 2)), "patches": (torch.bool, (total,))}
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items() if name != "lengths"}
        if not right or found != wanted:
            raise ValueError("its tensors or names are not what the manifest says")
        contents = stamp.get("contents", [None] * count)
        check_contents(contents, count)
        return _Shard(path, tensors, names, contents)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise unreadable(path, error, "run features again") from None
