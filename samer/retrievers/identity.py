"""What a model is, whatever it is called: hashes of its files, and what indexes, stores and projectors record of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.runtime.files import DiskError, FileTrouble, file_hash, is_dir, is_file, opened, read_json, trouble
from samer.runtime.hub import hub_folder

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelIdentity:
    """A retriever by what its tokens depend on; "" where it is not known.

    Attributes:
        architecture: the model's class in transformers.
        weights: hash of the weight files and config.json.
        processor: hash of the processor's files and of what is fixed beside them, such as the picture backend.
        base_projector: hash of the untouched projection.
    """

    architecture: str = ""
    weights: str = ""
    processor: str = ""
    base_projector: str = ""

    def difference(self, other: ModelIdentity) -> str | None:
        """The name of the first part that differs where both are known; None: no difference is known."""
        for part in fields(self):
            ours, theirs = getattr(self, part.name), getattr(other, part.name)
            if ours and theirs and ours != theirs:
                return part.name
        return None


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 over a model's files: config.json and the weights, and those of the processor."""

    weights: str
    processor: str


def model_folder(name: str, revision: str = "main") -> Path | None:
    """The folder with a model's files, itself or in the hub's cache; None: they are not on this machine.

    Raises:
        InputError: the file system can't say.
    """
    if is_dir(name):
        return Path(name)
    try:
        return hub_folder(name, ["*.json", "*.safetensors"], revision=revision, local_files_only=True)
    except FileTrouble:
        raise
    except InputError:
        return None


def check_files(folder: Path, *, whole: bool) -> None:
    """Refuses a model of which a file is there that can't be read.

    transformers says of such weights that there are none, and goes on without such a tokenizer.

    Args:
        folder: of the model.
        whole: refuse what is missing, too, where nothing fetches it: a link that leads nowhere, as the hub's cache
            has after a clean-up, and weights that are listed.

    Raises:
        InputError: names the file.
    """
    weights = _weights(folder)
    for name in ("config.json", *weights, *PROCESSOR_FILES):
        file = folder / name
        try:
            with opened(file):
                pass
        except FileNotFoundError:
            if whole and os.path.islink(file):
                raise DiskError(
                    f"{file}: its link leads nowhere ({os.readlink(file)}); restore that file, or fetch the model again"
                ) from None
            if whole and len(weights) > 1 and name in weights:
                raise DiskError(f"{file}: no such file, and the model's list of weights names it; restore it") from None
        except OSError as error:
            raise trouble(file, error) from None


def _weights(folder: Path) -> list[str]:
    """Names of the files with a model's weights.

    Raises:
        InputError: weights listed by something that is no list of weights.
    """
    index = folder / "model.safetensors.index.json"
    if not is_file(index):
        return ["model.safetensors"]
    files = read_json(index).get("weight_map", {})
    if not isinstance(files, dict) or not all(isinstance(file, str) and len(file) < 256 for file in files.values()):
        raise InputError(f"{index}: weight_map must map each weight to a file; it may be damaged, restore it")
    return sorted(set(files.values()))


def fingerprint(folder: Path) -> Fingerprint:
    """Hashes of a model's files in `folder`.

    Raises:
        InputError: weights listed by something that is no list of weights.
    """
    weights = _weights(folder)
    there = all(is_file(folder / name) for name in weights)  # else they are somewhere on their way
    return Fingerprint(_digest(folder, ["config.json", *weights]) if there else "", _digest(folder, PROCESSOR_FILES))


def processor_hash(files: str, settings: Mapping[str, Any]) -> str:
    """The processor's part of an identity: its files' hash, and what is fixed beside them."""
    return hashlib.sha256(f"{files}\n{json.dumps(dict(settings), sort_keys=True)}".encode()).hexdigest()


def _digest(folder: Path, names: list[str] | tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for file in (folder / name for name in names):
        if is_file(file):
            digest.update(f"{file.name}\n{content_hash(file)}\n".encode())
    return digest.hexdigest()


_BLOB = re.compile(r"[0-9a-f]{64}")
_known: dict[tuple[str, int, int], str] = {}  # of this process's files, by path, size and time of change


def content_hash(file: Path) -> str:
    """SHA-256 of a file, without reading it where that is known.

    The hub's cache names a large file's blob by its SHA-256, and links to it; a small file's blob has another name (the
    SHA-1 of git, 40 digits) and is read. Other files are read once by a process, and again when they have changed.

    Raises:
        InputError: it can't be read.
    """
    target = Path(os.path.realpath(file))
    if file.is_symlink() and target.parent.name == "blobs" and _BLOB.fullmatch(target.name):
        return target.name
    try:
        found = os.stat(target)
        key = str(target), found.st_size, found.st_mtime_ns
        if key not in _known:
            _known[key] = file_hash(target)
    except OSError as error:
        raise trouble(file, error) from None
    return _known[key]
