"""Files: written whole or not at all, by one writer at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

import filelock

from samer.config import InputError
from samer.runtime.processes import check_joined, gather_objects, print0, rank
from samer.runtime.signals import held, stop_here

TEMPORARY = ".samer-tmp"  # ends the names of files that are being written
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # what some network file systems answer


# what a person can do about what the file system says, by its number
_ADVICE = {
    errno.EACCES: "allow this user to read it and to enter its folders, or run as its owner",
    errno.EPERM: "allow this user to do that, or run as its owner",
    errno.EROFS: "the file system is read-only; name a place on another",
    errno.ENOSPC: "the disk is full; make room, or name a place on another",
    errno.EDQUOT: "your share of the disk is full; make room, or name a place on another",
    errno.EFBIG: "files may not grow so large here; raise the limit (ulimit -f), or name a place on another disk",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ELOOP: "its links lead in a circle; repair them",
    errno.ESTALE: "its network drive was taken away or replaced; mount it again",
    errno.ENOTCONN: "its drive is no longer there; mount it again",
    errno.EHOSTDOWN: "the machine that holds it is down; check the connection",
    errno.EIO: "the disk or its connection fails; check it",
    errno.ETIMEDOUT: "its network drive does not answer; check the connection",
    errno.EMFILE: "too many files are open; allow more with ulimit -n",
    errno.ENFILE: "too many files are open on this machine; close some",
    errno.ENOMEM: "memory is used up, or too many files are mapped (vm.max_map_count); close what is not needed",
    errno.ENOENT: "restore it, or name another",
    errno.ENOTDIR: "a part of the path is a file; name another place",
    errno.ENOTEMPTY: "it is not empty; name another",
    errno.EISDIR: "it is a folder; name a file",
    errno.EEXIST: "something of that name is there; name another place",
    errno.EBUSY: "something else uses it; try again when that has ended",
    errno.EINVAL: "name a plain file",
}
_TO_WRITE = {  # where another advice is due
    errno.EACCES: "allow this user to write there, or name another place",
    errno.EPERM: "allow this user to write there, or name another place",
    errno.ENOENT: "name another place",
    errno.EINVAL: "name another place",
}
# what may be well again by itself: nothing is wrong with the files
TRANSIENT = (errno.ESTALE, errno.ENOTCONN, errno.EIO, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.EHOSTDOWN)


class DiskError(InputError):
    """What lies on the disk is at fault, not what was asked for."""


class FileTrouble(DiskError):
    """The file system refuses a file; nothing is known to be wrong with what the file holds."""


def trouble(path: str | Path, error: OSError, what: str = "read") -> FileTrouble:
    """One line for what the file system refused: the path, what can't be done, why, and what to do about it."""
    reason = error.strerror or " ".join(str(error).split())[:160] or type(error).__name__
    advice = (_TO_WRITE if what != "read" else {}).get(error.errno) or _ADVICE.get(error.errno, "look at it")
    return FileTrouble(f"{_shown(path)}: can't be {what} ({reason}); {advice}")


def _shown(path: str | Path) -> str:
    """A path as messages show it: its ends, where it is longer than the file system takes."""
    text = " ".join(str(path).splitlines())
    return text if len(text) <= 1000 else f"{text[:200]}...{text[-100:]}"


def about(path: str | Path) -> os.stat_result | None:
    """What the file system says of a path, links followed; None: nothing is there.

    All questions go through here: `Path.is_file` and its like raise for some of what goes wrong, answer no for the
    rest, and do so otherwise from one Python to the next.

    Raises:
        InputError: it can't say, so that nobody takes for missing what merely can't be reached.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a NUL in it
        return None
    except OSError as error:
        raise trouble(path, error) from None


def exists(path: str | Path) -> bool:
    """Whether something is there; raises as `about`."""
    return about(path) is not None


def is_file(path: str | Path) -> bool:
    """Whether a plain file is there; raises as `about`."""
    found = about(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_dir(path: str | Path) -> bool:
    """Whether a folder is there; raises as `about`."""
    found = about(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def lookup(path: str | Path) -> Path:
    """A path that the file system can be asked for, whether or not something is there; raises as `about`."""
    about(path)
    return Path(path)


def listing(folder: str | Path) -> list[Path]:
    """What a folder holds, in order of names; nothing where there is no such folder.

    Raises:
        InputError: it can't be listed (`Path.glob` would show an empty one).
    """
    try:
        return [Path(folder) / name for name in sorted(os.listdir(folder))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise trouble(folder, error) from None


def _check_plain(path: str | Path) -> None:
    """Raises OSError unless a plain file is there."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        number, words = (errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else (errno.EINVAL, "No regular file")
        raise OSError(number, words, str(path))


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """A file open for reading.

    Raises:
        OSError: it can't be opened, or is none: a folder, or what would be waited for (a pipe, a device).
    """
    _check_plain(path)
    with open(path, "rb") as handle:
        yield handle


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
        _check_target(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        name = _temporary(path)
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        temporary, mode = name, stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, mode)  # safetensors puts a file of its own in its place, for the owner only
        os.replace(temporary, path)
    except OSError as error:
        raise trouble(path, error, "written") from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # a disk that is gone; the next writer removes it
                temporary.unlink(missing_ok=True)


def _check_target(path: Path) -> None:
    """Raises OSError for what a file must not take the place of: a folder, a pipe, a device such as /dev/null."""
    with suppress(FileNotFoundError, NotADirectoryError):
        _check_plain(path)


def _temporary(path: Path) -> Path:
    """A name beside a file that nothing else has, no longer than the file system takes."""
    return path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}{TEMPORARY}"


def check_writable(path: str | Path) -> None:
    """Refuses a file that could not be written once the work for it is done; leaves nothing behind.

    Raises:
        InputError: a folder of that name, a name too long, a file as parent, no permission, a full disk.
    """
    path = Path(path)
    try:
        _check_target(path)
        place = next(each for each in path.absolute().parents if os.path.lexists(each))
        trial = _temporary(place / path.name)
        handle = os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.write(handle, bytes(4096))
        finally:
            os.close(handle)
            trial.unlink()
    except OSError as error:
        raise trouble(path, error, "written") from None


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
                    raise trouble(folder, error, "written") from None
                print0(f"note: {folder} can't be locked ({error.strerror}); let nothing else write to it")
                held_without_lock = True
        stop_here()
        yield
    finally:
        with held():
            if lock.is_locked or held_without_lock:
                own: list[Path] = []
                with suppress(OSError):  # a disk that is gone; what went wrong before is what is told
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
        with opened(path) as handle:
            value = json.loads(handle.read().decode("utf-8"))
    except FileNotFoundError:
        raise DiskError(f"{path}: no such file") from None
    except OSError as error:
        raise trouble(path, error) from None
    except (ValueError, RecursionError) as error:
        raise DiskError(f"{path}: not readable as JSON ({str(error)[:120]}); it may be damaged, make it anew") from None
    if not isinstance(value, dict):
        raise DiskError(f"{path}: expected a JSON object; it may be damaged, make it anew")
    return value


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal; raises as `opened`."""
    with opened(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
