"""Reads everything that has a checksum and says what is damaged: indexes, feature stores, training runs, measurements.

Opening a store checks its manifest, its projection and every shard's header; the shards' contents are checked as they
are read, or by this, all at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from samer.config import InputError
from samer.features import manifest as store_manifest
from samer.index import manifest as index_manifest
from samer.index.codes import FILE as CODES
from samer.index.columns import FILE as METADATA
from samer.index.columns import read_columns
from samer.retrievers.banks import FILE as BANK
from samer.retrievers.projectors import read_projector
from samer.runtime.files import about, exists, is_dir, is_file, read_json, trouble
from samer.runtime.progress import Progress
from samer.runtime.shards import (
    bare_name,
    load_header,
    load_shard,
    tensors_checksum,
    unreadable,
    verify_shard,
)
from samer.training.checkpoints import CHECKSUMS

STORES = (index_manifest.FORMAT, store_manifest.FORMAT)


@dataclass(frozen=True)
class Verified:
    """What came of verifying a path: how many files and bytes were read, and a line per damaged or missing file.

    What can't be read has a line, too, which says so.
    """

    files: int
    bytes: int
    damages: list[str]


def verify(path: str | Path) -> Verified:
    """Reads every file under `path` that something vouches for, and compares its checksum.

    A store's files are vouched for by its manifest, a training checkpoint's by its checksums.json, a projector by the
    config.json beside it, any other shard (of an unfinished store, or a measurement) by its own header. All damages are
    listed, not only the first.

    Args:
        path: a folder, or one file.

    Raises:
        InputError: no such path, or nothing there has a checksum.
    """
    path = Path(path)
    if not exists(path):
        raise InputError(f"{path}: no such file or folder")
    files, damages = _files_under(path)
    found = dict.fromkeys(file for file in files if file.suffix == ".safetensors")  # in order
    checks: dict[Path, tuple[str, str]] = {}  # file -> how it is vouched for, checksum
    vouchers = 0
    for manifest in (file for file in files if file.name == "manifest.json" and path != file):
        try:
            content = read_json(manifest)
            kind = str(content.get("format"))
            if kind not in STORES and not content.keys() & {"format_version", "splits", "checksum"}:
                continue  # of something else
            vouchers += 1
            if kind not in STORES:
                raise InputError(f"{manifest}: format {kind[:40]!r} is none of {', '.join(STORES)}")
            for file, *how in _listed(manifest, kind):
                checks[file] = tuple(how)
                found.setdefault(file)
        except InputError as error:
            damages.append(str(error))
    for sums in (file for file in files if file.name == CHECKSUMS and path != file):
        try:
            for name, checksum in read_json(sums).items():
                if not bare_name(name):
                    raise InputError(f"{sums}: names {name[:40]!r}, which is no file beside it")
                checks[sums.parent / name] = "bytes", str(checksum)
                found.setdefault(sums.parent / name)
        except InputError as error:
            damages.append(str(error))
    total = read = 0
    for file in Progress(found, f"verify {path}", unit="files", leave=False):
        try:
            how, checksum = checks.get(file) or _own_voucher(file)
            if how == "nothing":
                continue
            total += _check(file, how, checksum)
            read += 1
        except InputError as error:
            damages.append(str(error))
    if not (read or damages or vouchers):
        raise InputError(f"{path}: nothing here has a checksum; name an index, a feature store or a projector")
    return Verified(read + vouchers, total, damages)


def _files_under(path: Path) -> tuple[list[Path], list[str]]:
    """Every file under a path in order, or the one that it is, and a line per folder that can't be listed."""
    if not is_dir(path):
        return [path], []
    refused: list[str] = []
    walk = os.walk(path, onerror=lambda error: refused.append(str(trouble(error.filename, error))))
    return sorted(Path(place) / name for place, _, names in walk for name in names), refused


def _listed(path: Path, kind: str) -> Iterator[tuple[Path, str, str]]:
    """Every file that a store's manifest vouches for: path, "bytes", "projector", "header" or "metadata", checksum."""
    folder = path.parent
    if kind == index_manifest.FORMAT:
        index = index_manifest.read_index_manifest(path)
        yield folder / "projector.safetensors", "projector", index.projector
        if index.bank:
            yield folder / BANK, "header", index.bank
        if index.codes:
            yield folder / CODES, "header", index.codes
        yield from ((folder / file, "bytes", checksum) for file, checksum in index_manifest.files_of(index))
        told = (folder / split / METADATA for split in index.splits)
        yield from ((file, "metadata", "") for file in told if exists(file))
        return
    store = store_manifest.read_store_manifest(path)
    yield folder / "base.safetensors", "projector", store.base_projector
    for split, entry in store.splits.items():
        for shard in (*entry.images, *entry.texts):
            yield folder / split / shard.file, "bytes", shard.sha256


def _own_voucher(file: Path) -> tuple[str, str]:
    """How a file that is in no manifest is vouched for: by its header, by config.json, or by nothing."""
    try:
        header = load_header(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(file, error, "run what made it again") from None
    if header:
        return "header", str(header.get("checksum"))
    if file.name == "projector.safetensors" and is_file(file.parent / "config.json"):
        return "projector", str(read_json(file.parent / "config.json").get("projector"))
    return "nothing", ""


def _check(file: Path, how: str, checksum: str) -> int:
    """Bytes of a file whose checksum holds."""
    if how == "bytes":
        return verify_shard(file, checksum)
    if how == "metadata":
        read_columns(file.parent.parent, file.parent.name)
        return file.stat().st_size
    if how == "projector":
        found = read_projector(file).hash
    else:
        try:
            found = tensors_checksum(load_shard(file)[0])
        except (OSError, SafetensorError, ValueError) as error:
            raise unreadable(file, error, "run what made it again") from None
    if found != checksum:
        raise InputError(f"{file}: contents differ from their checksum")
    size = about(file)
    return size.st_size if size else 0
