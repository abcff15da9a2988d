"""What every entry point shares: ranks and their calls, printing once, atomic files, one writer, signals, exit status.

Shape letters: B rows of this process, W processes.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from samer.config import Config, InputError, load_config

TEMPORARY = ".samer-tmp"  # ends the names of files that are being written


def rank() -> int:
    """This process's number among the launched ones; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes were launched; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def print0(*words: object) -> None:
    """Prints on the first process only, at once."""
    if rank() == 0:
        print(*words, flush=True)


class Progress(tqdm):
    """A progress bar on a terminal; in a log one plain line at the start, every half minute and at the end.

    Takes what tqdm takes. Only the first process shows it.
    """

    def __init__(self, *words: Any, **settings: Any) -> None:
        self.plain = not sys.stderr.isatty()
        if self.plain:
            line = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} since the start, about {remaining} to go"
            settings |= {"mininterval": 30, "maxinterval": 30, "miniters": 1, "bar_format": line}
        super().__init__(*words, **settings, disable=rank() != 0)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Shows the current state, as tqdm asks for it."""
        if self.plain:
            print(self, file=sys.stderr, flush=True)
        else:
            super().display(msg, pos)

    def close(self) -> None:
        """Shows the last state; tqdm would move a cursor that a log has not."""
        if self.plain and not self.disable:
            self.display()
            self.disable = True
        super().close()


@contextmanager
def process_group():
    """Joins the processes that torchrun launched (nccl with CUDA, else gloo); nothing to do for one process."""
    started = world_size() > 1 and not dist.is_initialized()
    if started:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        if started:
            dist.barrier()  # a process that leaves while another still takes leave aborts it
    except RuntimeError as error:
        if not started or not any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer")):
            raise
        stop_here()  # all were asked to stop, this one came last
        raise InputError(
            f"process {rank()} of {world_size()}: another process of this job has ended, its own message says why "
            f"(here: {' '.join(str(error).split())[:200]}); run the same command again to go on"
        ) from None
    finally:
        if started and dist.is_initialized():
            dist.destroy_process_group()


def pick_device(name: str | None = None) -> torch.device:
    """The device to compute on: as named, else this process's GPU, else the CPU.

    Raises:
        InputError: a name that torch does not know or that is not there.
    """
    if name in (None, "", "auto"):
        return (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} can't be used here ({str(error).splitlines()[0][:120]})") from None
    return device


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """Adds --device and --threads, which `compute_device` reads."""
    parser.add_argument("--device", default="auto", help="e.g. cpu, cuda:0; default: a GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all, or OMP_NUM_THREADS)")


def compute_device(options: argparse.Namespace) -> torch.device:
    """The device that the options ask for, with the threads they ask for.

    Raises:
        InputError: a device that is not there, or less than one thread.
    """
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads is {options.threads}; it must be at least 1")
        torch.set_num_threads(options.threads)
    return pick_device(options.device)


class _Gather(torch.autograd.Function):
    """Rows of all processes; in the backward pass each process sums what all of them have for its own rows."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        ctx.count = len(tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.count
        return gradient[start : start + ctx.count]


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Rows of all processes in rank order, (W * B, ...); gradient flows back to the process each row came from.

    Every process must hold the same shape. Without processes the tensor itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    return _Gather.apply(tensor.contiguous())


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process in rank order; small Python values only."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


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


def prefetched(function: Callable[[Any], Any], items: Iterable) -> Iterator[tuple[Any, Any]]:
    """Pairs (item, function(item)) in order; the next result is computed in a thread while the caller uses this one.

    Also the other way round: where `items` is the work, `function` may store each result while the next is made. For
    what waits or releases Python's lock, such as decoding images; an error is raised at its item.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: tuple[Any, Future] | None = None
        for item in items:
            upcoming = item, pool.submit(function, item)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = upcoming
        if waiting:
            yield waiting[0], waiting[1].result()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def adapter_config(adapter_path: str, config_path: str | None, overrides: Sequence[str]) -> Config:
    """Settings of a trained projector: from the config file if given, else from its config.json; overrides win.

    Raises:
        InputError: no projector there, or one that says nothing of its model and merge.
    """
    folder = Path(adapter_path)
    if adapter_path and not folder.exists():
        raise InputError(f"{adapter_path}: no such projector; name the folder that scripts/train.py wrote")
    if adapter_path and not config_path and (folder / "projector.safetensors").is_file():
        trained = read_json(folder / "config.json")
        name, merge = trained.get("base_model"), trained.get("merge")
        if not (isinstance(name, str) and isinstance(merge, dict)):
            raise InputError(f"{adapter_path}/config.json: no base_model or no merge settings; give --config")
        overrides = [f"model.name={name}", *(f"merge.{key}={value}" for key, value in merge.items()), *overrides]
    return load_config(config_path, overrides)


def split_words(parser: argparse.ArgumentParser, splits: Sequence[str], overrides: Sequence[str]):
    """Splits and overrides told apart: section.key=value right after --splits is taken for a split by argparse.

    Returns:
        (split names, overrides); no split left is a usage error.
    """
    names = [word for word in splits if "=" not in word]
    if not names:
        parser.error("argument --splits: expected at least one split")
    return names, [*(word for word in splits if "=" in word), *overrides]


class Stopped(SystemExit):
    """SIGTERM came, and what was at work has come to an end; left alone, it ends a process with 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


_ENDED = -1
_finishing = 0  # how many `stoppable` blocks this process is in; _ENDED: its work is over
_asked = False  # whether SIGTERM came


@contextmanager
def stoppable():
    """A block of many units of work: SIGTERM waits in it until `stop_here` or the block's end.

    Raises:
        Stopped: at the block's end, if SIGTERM came.
    """
    global _finishing
    _finishing += 1
    try:
        yield
    finally:
        _finishing -= 1
    stop_here()


def stop_asked() -> bool:
    """Whether SIGTERM asked some process of this job to stop; all of them must ask, and get the same answer."""
    return any(gather_objects(_asked))


def stop_here() -> None:
    """Ends this process between two units of work if SIGTERM asked it to.

    Raises:
        Stopped: if so.
    """
    if _asked:
        raise Stopped


def _on_sigterm(number: int, frame: Any) -> None:
    global _asked
    first, _asked = not _asked, True
    if _finishing == _ENDED:
        return
    if not _finishing:
        raise Stopped
    if first:  # os.write: a handler may interrupt a print
        os.write(2, b"SIGTERM: stopping as soon as what is at work is finished\n")


def _on_unraisable(unraisable: Any) -> None:
    """A SIGTERM that came while an object was taken down, where no exception can be raised, comes again soon."""
    if isinstance(unraisable.exc_value, Stopped):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        sys.__unraisablehook__(unraisable)


def run(main: Callable[[], Any]) -> None:
    """Runs an entry point: bad input prints one line and exits with 2, SIGINT exits with 130, SIGTERM with 143."""
    global _finishing, _asked
    _finishing, _asked = 0, False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)
        sys.unraisablehook = _on_unraisable
    try:
        try:
            main()
        finally:
            _finishing = _ENDED
    except Stopped:
        print("stopped; run the same command again to go on", file=sys.stderr, flush=True)
        raise
    except InputError as error:
        # a data loader's worker hands its whole traceback over as the message, the error's own words at its end
        words = str(error).rpartition(f"{InputError.__module__}.{InputError.__qualname__}: ")[2]
        print("error:", " ".join(words.split()), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        sys.exit(130)
