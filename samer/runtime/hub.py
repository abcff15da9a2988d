"""Repositories of the Hugging Face hub, found as folders in its cache."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from samer.config import InputError
from samer.runtime.files import FileTrouble, about, exists, trouble

# what a folder with a projector may hold: ours with its query bank, the released ones, a PEFT adapter
PROJECTOR_FILES = (
    "projector.safetensors",
    "config.json",
    "bank.safetensors",
    "projector.pt",
    "adapter_config.json",
    "adapter_model.safetensors",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
_WORD = re.compile(r"[A-Za-z0-9][\w.-]*")  # the hub has a few models without an owner
NAME_A_MODEL = "name a ColPali in transformers format, such as vidore/colpali-v1.3-hf, or a folder that holds one"


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a repository, owner/name."""
    return bool(_HUB_ID.fullmatch(name)) and len(name) <= 96


def model_name(name: str) -> str:
    """A model's name as indexes and projectors keep it: a folder's real path, else the hub's name as it is.

    A folder goes before a repository of that name, and "~" is a home folder. Nothing is asked of the hub here.

    Raises:
        InputError: no such folder, and no name that the hub could know: it is never asked for a path.
    """
    place = os.path.expanduser(name)
    found = about(place)
    if found is None:
        if is_hub_id(name) or (_WORD.fullmatch(name) and len(name) <= 96):
            return name
        raise InputError(f"model {name!r} can't be loaded (no such folder); {NAME_A_MODEL}")
    if not stat.S_ISDIR(found.st_mode):
        raise InputError(f"model {name!r} can't be loaded (it is a file); name the folder that it lies in")
    place = os.path.realpath(place)
    try:
        place.encode()
    except UnicodeEncodeError:
        raise InputError(f"model {name!a} can't be kept by name (its path is not UTF-8); rename the folder") from None
    return place


def refused_file(error: BaseException) -> FileTrouble | None:
    """The file that the file system refused, where that is behind another library's error."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, OSError) and error.errno and isinstance(error.filename, str):
            written = error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT)
            return trouble(error.filename, error, "written" if written else "read")
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None


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
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.file_download import repo_folder_name

    if is_hub_id(name):  # a cache that can't be entered is none for the hub's client
        about(Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots" / "main")
    try:
        place = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), local_files_only=local_files_only
        )
    except Exception as error:  # many types: no such name, no network, no right to it
        if found := refused_file(error):
            raise found from None
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{name}: not to be had from the hub ({reason})") from None
    return Path(place)


def projector_place(path: str | Path, *, local_files_only: bool = False) -> Path:
    """Where a projector lies: the path itself, or for a hub id (owner/name) that is no path the files of the hub.

    Raises:
        InputError: neither.
    """
    if exists(place := os.path.expanduser(path)):
        return Path(place)
    remedy = "name the folder that scripts/train.py wrote, or a released projector on the hub (owner/name)"
    if not is_hub_id(str(path)):
        raise InputError(f"{path}: no such projector; {remedy}")
    try:
        return hub_folder(str(path), PROJECTOR_FILES, local_files_only=local_files_only)
    except FileTrouble:
        raise
    except InputError as error:
        reason = str(error).partition(": ")[2]
        raise InputError(f"{path}: no such projector here, and {reason}; {remedy}") from None
