"""What the index and the feature store share on disk: shard files that know what they are, and a guarded manifest.

A shard is a safetensors file whose header holds one key, "samer": what it was made from (stamp), its manifest entry and
a checksum of its tensors. It is written atomically, so it is there whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from samer.config import InputError
from samer.runtime.files import DiskError, atomic_path, file_hash, opened, read_json, trouble, write_json
from samer.runtime.processes import gather_objects, rank, world_size

# of the kinds of numbers here the name in a safetensors file, in the order in which that library lays tensors out
_KINDS = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NUMBER = re.compile(r"\((?:os error )?(\d+)\)\s*$")  # ends what torch and safetensors say of a system call


def write_manifest(path: Path, manifest: dict) -> None:
    """Writes a manifest atomically, with a checksum of itself."""
    write_json(path, {**manifest, "checksum": _manifest_checksum(manifest)})


def read_manifest(path: Path, kind: str, version: int, *older: int) -> dict:
    """A manifest without its checksum, which holds; `version`, or one of the `older` that can be read.

    Raises:
        InputError: not readable, damaged, of another kind or version; names the file.
    """
    manifest = read_json(path)
    found = manifest.get("format"), manifest.get("format_version")
    if found[0] != kind or type(found[1]) is not int or found[1] not in (version, *older):
        versions = " and ".join(map(str, sorted((version, *older))))
        raise DiskError(
            f"{path}: format {found[0]!r} version {found[1]!r}; this SaMer reads {kind} {versions}: make it anew"
        )
    checksum = manifest.pop("checksum", None)
    if checksum != _manifest_checksum(manifest):
        raise DiskError(f"{path}: contents differ from their own checksum; it is damaged, make it anew")
    return manifest


def _manifest_checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def whole_number(value: Any, least: int) -> bool:
    """Whether a manifest's value is an integer of at least so much."""
    return type(value) is int and value >= least


def bare_name(name: Any) -> bool:
    """Whether a manifest may name a file or a split so: one step down, nowhere else."""
    right = isinstance(name, str) and 0 < len(name) < 256 and "\0" not in name
    return right and Path(name).name == name and name not in (".", "..")


def write_shard(path: Path, tensors: Mapping[str, Tensor | Sequence[Tensor]], stamp: dict, facts: dict) -> dict:
    """Writes a shard and returns its manifest entry: file name, `facts` and SHA-256 of the file.

    A tensor may be given as the parts (n, ...) that it is made of, which are never held as one.
    """
    parts = {name: [value] if isinstance(value, Tensor) else list(value) for name, value in tensors.items()}
    parts = {name: [part.contiguous() for part in own] for name, own in parts.items()}
    header = {"stamp": stamp, "entry": facts, "checksum": _checksum_of(parts)}
    # one key only: safetensors writes several in an order that differs from run to run
    head, order = _head(parts, {"samer": json.dumps(header, ensure_ascii=False)})
    digest = hashlib.sha256(head)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(head)
        for part in itertools.chain.from_iterable(parts[name] for name in order):
            content = memoryview(_bytes(part))
            digest.update(content)
            file.write(content)
    return {"file": path.name, **facts, "sha256": digest.hexdigest()}


def _head(parts: Mapping[str, list[Tensor]], metadata: dict[str, str]) -> tuple[bytes, list[str]]:
    """What stands before the tensors in a safetensors file, and their order in it, as that library's `save` has them.

    That is: by their kinds, then by name; and the header filled up with blanks to a multiple of 8 bytes.
    """
    order = sorted(parts, key=lambda name: (list(_KINDS).index(parts[name][0].dtype), name))
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        first, start = parts[name][0], end
        end += sum(part.nbytes for part in parts[name])
        shape = [sum(map(len, parts[name])), *first.shape[1:]] if first.dim() else []
        entries[name] = {"dtype": _KINDS[first.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _bytes(tensor: Tensor) -> Any:
    """A tensor's bytes, as numpy sees them."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


@contextmanager
def mapped(path: Path) -> Iterator[Any]:
    """A safetensors file open for its tensors, which stay mapped when it is closed.

    safetensors itself says of whatever it can't open that there is no such file, and waits for a pipe.

    Raises:
        OSError: the file system refuses it, by its number. SafetensorError, ValueError: it is damaged.
    """
    try:
        with opened(path):
            pass
        with safe_open(path, framework="pt") as handle:  # it checks that the file is as long as its header says
            yield handle
    except FileNotFoundError as error:
        if error.errno is None:  # of safetensors, of a file that has just been open
            os.stat(path)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path)) from None
        raise
    except (OSError, RuntimeError) as error:  # the latter of torch: it can't map the file, or see bytes as that type
        said = _NUMBER.search(str(error))
        if isinstance(error, OSError) and (error.errno is not None or not said):
            raise
        if said:
            raise OSError(int(said[1]), os.strerror(int(said[1])), str(path)) from None
        raise ValueError(str(error).splitlines()[0]) from None


def load_shard(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A shard's tensors, mapped from the file, and its header (empty if the file is no shard).

    Raises:
        OSError, SafetensorError, ValueError: as `mapped`; the caller tells them by `unreadable`.
    """
    with mapped(path) as handle:
        # safetensors 0.8.0 loses 45 bytes at every get_tensor; an index that is reopened a million times notices
        return {name: handle.get_tensor(name) for name in handle.offset_keys()}, _header(handle)


def load_header(path: Path) -> dict:
    """A shard's header alone; raises as `load_shard`."""
    with mapped(path) as handle:
        return _header(handle)


def unreadable(path: Path, error: Exception, remedy: str) -> InputError:
    """What to say of a file that can't be read, or that holds what it should not.

    Args:
        path: of the file.
        error: OSError: the file system refuses it, and nothing need be made again for that; others: it is damaged.
        remedy: what makes a file anew that is missing or damaged.
    """
    if isinstance(error, FileNotFoundError):
        return DiskError(f"{path}: not readable (there is no such file); restore it, or {remedy}")
    if isinstance(error, OSError):
        return trouble(path, error)
    return DiskError(f"{path}: not readable ({' '.join(str(error).split())[:120]}); remove it and {remedy}")


def _header(handle: Any) -> dict:
    header = json.loads((handle.metadata() or {}).get("samer", "{}"))
    if not isinstance(header, dict) or not isinstance(header.get("stamp", {}), dict):
        raise ValueError("its header is not that of a shard")
    return header


def finished_shard(path: Path, stamp: dict, same: Callable[[dict, dict], bool] = operator.eq) -> dict | None:
    """The manifest entry of a complete, undamaged shard with this stamp, else None: then it is made anew.

    `same(found, stamp)` says whether the stamp found is as good; it may raise ValueError, KeyError or TypeError.

    Raises:
        InputError: something is there that can't be read now: hours of work may be in it.
    """
    try:
        tensors, header = load_shard(path)
        if not same(header["stamp"], stamp) or header["checksum"] != tensors_checksum(tensors):
            return None
        return {"file": path.name, **header["entry"], "sha256": file_hash(path)}
    except (FileNotFoundError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    except OSError as error:
        raise trouble(path, error) from None


def read_finished(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard that a run has found finished, or has just written.

    Raises:
        InputError: it can't be read any more; names the file.
    """
    try:
        return load_shard(path)[0]
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(path, error, "run again") from None


def verify_shard(path: Path, sha256: str) -> int:
    """Reads a whole shard and compares its checksum; returns its bytes.

    Raises:
        InputError: missing, unreadable or changed; names the file.
    """
    try:
        found = file_hash(path)
        size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error, "run what made it again") from None
    if found != sha256:
        raise DiskError(f"{path}: contents differ from their checksum; remove it and run what made it again")
    return size


def shared_out(jobs: Sequence) -> list[tuple[int, Any]]:
    """This process's share of the jobs, with their numbers."""
    return [(k, jobs[k]) for k in range(rank(), len(jobs), world_size())]


def in_order(own: list[tuple]) -> list[tuple]:
    """What all processes made of their shares, each (number, ...), by number."""
    return sorted((row for part in gather_objects(own) for row in part), key=lambda row: row[0])


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the contents of tensors, in the order of their names."""
    return _checksum_of({name: [tensor.contiguous()] for name, tensor in tensors.items()})


def _checksum_of(parts: Mapping[str, list[Tensor]]) -> str:
    digest = hashlib.sha256()
    for part in itertools.chain.from_iterable(parts[name] for name in sorted(parts)):
        digest.update(_bytes(part))
    return digest.hexdigest()


def joined(parts: Sequence[Tensor], fill: int = 0) -> Tensor:
    """Rows (n, K, ...) of several batches as one, padded to the widest."""
    width = max(part.shape[1] for part in parts)
    room = [(0, 0) * (part.dim() - 2) + (0, width - part.shape[1]) for part in parts]
    return torch.cat([torch.nn.functional.pad(part, sides, value=fill) for part, sides in zip(parts, room)])


def rows_of(parts: Sequence[Tensor], numbers: Tensor) -> Tensor:
    """Rows (n, K, ...) by their numbers, (n,) long, counted over all batches and in any order; others are not read."""
    ends = torch.tensor([len(part) for part in parts]).cumsum(0)
    which, order = torch.bucketize(numbers, ends, right=True).sort(stable=True)
    places = numbers[order] - ends[which] + torch.tensor([len(part) for part in parts])[which]
    own, counts = which.unique_consecutive(return_counts=True)
    found = [parts[k][rows] for k, rows in zip(own.tolist(), places.split(counts.tolist()))]
    return joined(found)[order.argsort()]
