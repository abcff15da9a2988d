"""A feature store that stands in for a retriever, and the one way to open either.

Shape letters: B images, N tokens, M query tokens, H hidden."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from samer.config import InputError
from samer.data.records import ImageRecord
from samer.features.manifest import DTYPES, FORMAT, FORMAT_VERSION, check_manifest, fingerprint
from samer.retrievers.attention import ATTENTION, check_signals
from samer.retrievers.base import NO_OFFSET, Encoder, image_seeds
from samer.retrievers.colpali import Retriever
from samer.retrievers.projectors import load_projector, read_projector
from samer.runtime.files import lookup
from samer.runtime.processes import print0
from samer.runtime.shards import load_shard, read_manifest


def open_encoder(
    name: str,
    device: torch.device | str,
    *,
    features: str | Path = "",
    adapter_path: str | Path = "",
    dtype: torch.dtype | None = None,
    local_files_only: bool = False,
    revision: str = "main",
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
        side = self.manifest["grid"]
        super().__init__(model, base, grid=(side, side), image_token_id=self.manifest["image_token_id"], device=device)
        self.origin = {"computed_in": self.manifest["computed_in"], "stored_in": self.manifest["dtype"]}
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

    def record_inputs(self, records: Sequence[ImageRecord]) -> dict[str, Tensor]:
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
