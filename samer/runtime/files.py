"""Files: written whole or not at all, by one writer at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.runtime.processes import gather_objects, print0, rank

TEMPORARY = ".samer-tmp"  # ends the names of files that are being written


@contextmanager
def atomic_path(path: str | Path):
    """Yields a temporary path beside `path`; it replaces `path` when the block ends well and is removed otherwise.

    Raises:
        InputError: the file can't be written: a folder of that name, a file as parent, no permission, a full disk.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror or error}); name another place") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def lookup(path: str | Path) -> Path:
    """A path that the file system can be asked for.

    Raises:
        InputError: a name too long for it.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the caller says what it misses
        pass
    except OSError as error:
        raise InputError(f"{path}: can't be looked up ({error.strerror})") from None
    return Path(path)


@contextmanager
def only_writer(folder: str | Path):
    """Holds a folder for one writer at a time, on the first process of a job; the others wait until it is held.

    Removes what a killed writer left half written. The lock goes with the process, and a folder that stays empty goes
    too.

    Raises:
        InputError: another process holds it, or it can't be written to.
    """
    folder = Path(folder)
    with _locked(folder) if rank() == 0 else nullcontext():
        gather_objects(None)
        yield


@contextmanager
def _locked(folder: Path):
    made = [place for place in (folder, *folder.parents) if not place.exists()]  # innermost first
    before = set() if made else set(folder.iterdir()) if folder.is_dir() else set()
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{folder}: can't be written ({error.strerror}); name another folder") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink == 0:  # the one before took its file away between our two calls
                raise BlockingIOError
        except BlockingIOError:
            raise InputError(f"{folder}: another process is writing to it; wait until it ends") from None
        except OSError as error:  # some network file systems have no locks
            print0(f"note: {folder} can't be locked ({error.strerror}); let nothing else write to it")
        _locks.add(handle)
        try:
            inner = [place for place in folder.iterdir() if place.is_dir() and not os.path.exists(place / ".lock")]
            for place in (folder, *inner):  # a folder with a lock of its own has a writer of its own
                for stray in place.glob(f".*{TEMPORARY}"):
                    stray.unlink(missing_ok=True)
            yield
        finally:
            path.unlink(missing_ok=True)
            own = [entry for entry in folder.iterdir() if entry.is_dir() and entry not in before]
            for empty in [*own, *made]:  # a run that failed leaves no empty folders of its own
                if not any(empty.iterdir()):
                    empty.rmdir()
    finally:
        _locks.discard(handle)
        os.close(handle)


_locks: set[int] = set()  # open lock files; a forked worker must not keep them when its parent is killed


def _leave_locks() -> None:
    for handle in _locks:
        os.close(handle)
    _locks.clear()


os.register_at_fork(after_in_child=_leave_locks)


def write_json(path: str | Path, value: Any) -> None:
    """Writes indented JSON atomically; keys keep their order."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict:
    """Reads a JSON object.

    Raises:
        InputError: missing, unreadable or not an object; names the file.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not readable as JSON ({str(error)[:120]}); it may be damaged, make it anew"
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object; it may be damaged, make it anew")
    return value


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
