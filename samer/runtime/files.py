"""Files: written whole or not at all, by one writer at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import filelock

from samer.config import InputError
from samer.runtime.processes import check_joined, gather_objects, print0, rank
from samer.runtime.signals import held, stop_here

TEMPORARY = ".samer-tmp"  # ends the names of files that are being written
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # what some network file systems answer


@contextmanager
def atomic_path(path: str | Path):
    """Yields a temporary path beside `path`; it replaces `path` when the block ends well and is removed otherwise.

    The new file's permissions are those that the umask leaves.

    Raises:
        InputError: the file can't be written: a folder of that name, a file as parent, no permission, a full disk.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.parent / f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}"
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        temporary, mode = name, stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, mode)  # safetensors puts a file of its own in its place, for the owner only
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
        InputError: another process holds it, it can't be written to, or this is one of several processes that were
            launched together and have not joined (`process_group`).
    """
    folder = Path(folder)
    check_joined(folder)
    with _locked(folder) if rank() == 0 else nullcontext():
        gather_objects(None)
        yield


@contextmanager
def _locked(folder: Path):
    """The lock is filelock's, which a forked child leaves; its file goes with the lock, so that nothing is left over.

    filelock itself leaves the file. Removing it is safe while the lock is held: who has just opened it finds no link
    to it any more and is refused.
    """
    path = folder / ".lock"
    lock = filelock.FileLock(path, blocking=False, fallback_to_soft=False)  # a soft lock outlives a killed process
    made: list[Path] = []  # folders of this run, innermost first
    before: set[Path] = set()
    there = held_without_lock = False
    try:
        with held():  # a SIGTERM between the file and the lock would leave the file
            try:
                made = [place for place in (folder, *folder.parents) if not place.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                there = True
                lock.acquire()
                before = {entry for entry in folder.iterdir() if entry.is_dir()}
                _remove_strays(folder)
            except filelock.Timeout:
                raise InputError(f"{folder}: another process is writing to it; wait until it ends") from None
            except OSError as error:
                if there and isinstance(error, FileNotFoundError):  # the one before has just taken the folder away
                    raise InputError(f"{folder}: another process is writing to it; wait until it ends") from None
                if error.errno not in _NO_LOCKS:
                    reason = error.strerror or error
                    raise InputError(f"{folder}: can't be written ({reason}); name another folder") from None
                print0(f"note: {folder} can't be locked ({error.strerror}); let nothing else write to it")
                held_without_lock = True
        stop_here()
        yield
    finally:
        with held():
            if lock.is_locked or held_without_lock:
                path.unlink(missing_ok=True)
                own = [entry for entry in folder.iterdir() if entry.is_dir() and entry not in before]
                for empty in [*own, *made]:  # a run that failed leaves no empty folders of its own
                    with suppress(OSError):  # not empty, or gone
                        empty.rmdir()
            lock.release()


def _remove_strays(folder: Path) -> None:
    """Removes what a killed writer left half written, but not from a folder within that has a writer of its own."""
    inner = [place for place in folder.iterdir() if place.is_dir() and not os.path.exists(place / ".lock")]
    for place in (folder, *inner):
        for stray in place.glob(f".*{TEMPORARY}"):
            stray.unlink(missing_ok=True)


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
