"""Repositories of the Hugging Face hub, found as folders in its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from samer.config import InputError
from samer.runtime.files import lookup

# what a folder with a projector may hold: ours, the released ones, a PEFT adapter
PROJECTOR_FILES = (
    "projector.safetensors",
    "config.json",
    "projector.pt",
    "adapter_config.json",
    "adapter_model.safetensors",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository, owner/name."""
    return bool(_HUB_ID.fullmatch(name)) and len(name) <= 96


def hub_folder(name: str, patterns: Sequence[str], *, revision: str = "main", local_files_only: bool = False) -> Path:
    """The folder of a repository's files in the hub's cache, which are fetched first where they are not there.

    Args:
        name: owner/name.
        patterns: of the files wanted.
        revision: a branch, tag or commit.
        local_files_only: don't ask the hub.

    Raises:
        InputError: it can't be had; says why.
    """
    from huggingface_hub import snapshot_download

    try:
        place = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), local_files_only=local_files_only
        )
    except Exception as error:  # many types: no such name, no network, no right to it
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{name}: not to be had from the hub ({reason})") from None
    return Path(place)


def projector_place(path: str | Path, *, local_files_only: bool = False) -> Path:
    """Where a projector lies: the path itself, or for a hub id (owner/name) that is no path the files of the hub.

    Raises:
        InputError: neither.
    """
    if lookup(path).exists():
        return Path(path)
    remedy = "name the folder that scripts/train.py wrote, or a released projector on the hub (owner/name)"
    if not is_hub_id(str(path)):
        raise InputError(f"{path}: no such projector; {remedy}")
    try:
        return hub_folder(str(path), PROJECTOR_FILES, local_files_only=local_files_only)
    except InputError as error:
        reason = str(error).partition(": ")[2]
        raise InputError(f"{path}: no such projector here, and {reason}; {remedy}") from None
