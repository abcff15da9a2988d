"""What the index and the feature store share on disk: shard files that know what they are, and a guarded manifest.

A shard is a safetensors file whose header holds one key, "samer": what it was made from (stamp), its manifest entry and
a checksum of its tensors. It is written atomically, so it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from samer.config import InputError
from samer.runtime import atomic_path, file_hash, rank, read_json, world_size


def check_manifest(path: Path, identity: dict, holds: str, remedy: str) -> dict | None:
    """The manifest at `path`, or None if there is none.

    Raises:
        InputError: it was made of something else than `identity`; names the first key that differs.
    """
    if not path.is_file():
        return None
    manifest = read_json(path)
    for key, value in identity.items():
        if manifest.get(key) != value:
            raise InputError(f"{path.parent} holds {holds} with {key}={manifest.get(key)!r}, now {value!r}; {remedy}")
    return manifest


def write_shard(path: Path, tensors: dict[str, Tensor], stamp: dict, facts: dict) -> dict:
    """Writes a shard and returns its manifest entry: file name, `facts` and SHA-256 of the file."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {"stamp": stamp, "entry": facts, "checksum": _checksum(tensors)}
    # one key only: safetensors writes several in an order that differs from run to run
    metadata = {"samer": json.dumps(header, ensure_ascii=False)}
    content = save(tensors, metadata=metadata)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return {"file": path.name, **facts, "sha256": hashlib.sha256(content).hexdigest()}


def load_shard(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A shard's tensors, mapped from the file, and its header (empty if the file is no shard).

    Raises:
        OSError, SafetensorError, ValueError: not readable; the caller says what to do about it.
    """
    with safe_open(path, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return tensors, json.loads((handle.metadata() or {}).get("samer", "{}"))


def finished_shard(path: Path, stamp: dict) -> dict | None:
    """The manifest entry of a complete, undamaged shard with this stamp, else None: then it is made anew."""
    try:
        tensors, header = load_shard(path)
        if header["stamp"] != stamp or header["checksum"] != _checksum(tensors):
            return None
        return {"file": path.name, **header["entry"], "sha256": file_hash(path)}
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def shared_out(jobs: Sequence) -> list[tuple[int, Any]]:
    """This process's share of the jobs, with their numbers."""
    return [(k, jobs[k]) for k in range(rank(), len(jobs), world_size())]


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
