"""What every command shares: options, devices, signals and the exit status.

Importing it imports neither torch nor anything else that takes long: commands read their arguments first, and Ctrl-C is
heard by then.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

from samer.runtime.signals import Stopped, interrupted, listening, tell_interrupted
from samer.runtime.streams import printable, spoiled, take_streams

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    import torch

DATA_KINDS = "kind of data set: flickr, coco, imagecode, vidore, captions or jsonl (guessed)"  # help of an option
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)  # what torch's allocators say


def is_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, of the machine or of a GPU."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def wait_quietly() -> None:
    """Has torch's threads sleep while they have nothing to do, if torch is not imported yet and the user set nothing.

    By default they wait busily, so that a query beside another process that computes waits for threads which only
    wait themselves. A short look before they sleep, which GNU's OpenMP counts, makes a query alone as fast as that: see
    `python scripts/bench.py latency`. Intel's and LLVM's read OMP_WAIT_POLICY, older ones KMP_BLOCKTIME only.
    """
    if not WAITING.keys() & os.environ.keys():
        os.environ.update(WAITING)


def pick_device(name: str | None = None) -> torch.device:
    """The device to compute on: as named, else this process's GPU, else the CPU.

    Raises:
        InputError: a name that torch does not know or that is not there.
    """
    import torch

    from samer.config import InputError

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


COMPUTED = ("float32", "bfloat16", "float16")


def add_compute_options(parser: argparse.ArgumentParser, dtype: str = "") -> None:
    """Adds --device and --threads, which `compute_device` reads, and what `compute_dtype` reads.

    `dtype` is the name of the latter, "--dtype" unless that says what is stored; empty: the command opens no model.
    """
    parser.add_argument("--device", default="auto", help="e.g. cpu, cuda:0; default: a GPU if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all, or OMP_NUM_THREADS)")
    if dtype:
        words = f"that the model computes in: {', '.join(COMPUTED)} (default: bfloat16 on a GPU, else float32)"
        parser.add_argument(dtype, dest="computed_in", choices=COMPUTED, metavar="DTYPE", help=words)


def add_gpu_memory(parser: argparse.ArgumentParser) -> None:
    """Adds --gpu-memory, which `gpu_budget` reads."""
    words = "of a GPU that the index takes at most, what is beyond is read anew by each search (80 %% of what is free)"
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help=words)


def gpu_budget(options: argparse.Namespace) -> int | None:
    """Bytes that --gpu-memory asks for; None: nothing.

    Raises:
        InputError: no number above 0.
    """
    asked = options.gpu_memory
    if asked is not None and not 0 < asked < float("inf"):
        from samer.config import InputError

        raise InputError(f"--gpu-memory is {asked}; it must be a number of GB above 0")
    return None if asked is None else int(asked * 1e9)


def compute_dtype(options: argparse.Namespace) -> torch.dtype | None:
    """The dtype that the options ask to compute in; None: none."""
    import torch

    return getattr(torch, options.computed_in) if options.computed_in else None


def add_compile_option(parser: argparse.ArgumentParser) -> None:
    """Adds --compile, which a script hands to the model that it opens."""
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model: pays on large sets; needs a C++ compiler"
    )


def add_also_computed_in(parser: argparse.ArgumentParser) -> None:
    """Adds --also-computed-in, which `samer.index.settings` reads."""
    words = "go on with an index in another dtype than its own; it says then that it holds both"
    parser.add_argument("--also-computed-in", choices=COMPUTED, metavar="DTYPE", help=words)


def compute_device(options: argparse.Namespace) -> torch.device:
    """The device that the options ask for, with the threads they ask for.

    Raises:
        InputError: a device that is not there, or less than one thread.
    """
    if options.threads is not None:
        if options.threads < 1:
            from samer.config import InputError

            raise InputError(f"--threads is {options.threads}; it must be at least 1")
        from samer.runtime.processes import use_threads

        use_threads(options.threads)
    return pick_device(options.device)


def split_words(parser: argparse.ArgumentParser, splits: Sequence[str], overrides: Sequence[str]):
    """Splits and overrides told apart: section.key=value right after --splits is taken for a split by argparse.

    Returns:
        (split names, overrides); no split left is a usage error.
    """
    names = [word for word in splits if "=" not in word]
    if not names:
        parser.error("argument --splits: expected at least one split")
    return names, [*(word for word in splits if "=" in word), *overrides]


def run(main: Callable[[], Any], *, shared: bool = False) -> None:
    """Runs an entry point and ends the process as it should: at most one line on standard error says why.

    Exit status: 0; 2 for bad input, for what the file system refused, for too little memory, and where standard output
    could not be written; 130 after SIGINT (Ctrl-C); 143 after SIGTERM; 141 where the reader of standard output went
    away before the end (`| head -1`), as a shell shows for other programs, but not before the work is done: only what
    is printed is lost. Anything else is a defect and keeps its traceback.

    Args:
        main: the entry point.
        shared: whether it shares its work between the processes of a job; otherwise several processes are bad input.
    """
    take_streams()
    try:
        with listening():
            if not shared:
                _check_alone()
            _check_words(sys.argv[1:])
            main()
    except Stopped:
        print("stopped; run the same command again to go on", file=sys.stderr, flush=True)
        raise
    except SystemExit as end:
        if not end.code:  # --help
            _end_of_output()
        raise
    except KeyboardInterrupt:
        _end_interrupted()
    except Exception as error:
        if interrupted():  # whatever became of it on its way
            _end_interrupted()
        words = _reason(error)
        if words is None:
            raise
        print("error:", printable(" ".join(words.split())), file=sys.stderr, flush=True)
        sys.exit(2)
    _end_of_output()


def _check_alone() -> None:
    """Refuses to be one of several processes, each of which would do the whole work."""
    from samer.config import InputError
    from samer.runtime.processes import world_size

    if world_size() > 1:
        raise InputError(
            f"this command runs in one process, and WORLD_SIZE is {world_size()}; start it without torchrun "
            "(unset WORLD_SIZE): only train, align, features, cache, compare and SEPS share it between processes"
        )


def _check_words(words: Sequence[str]) -> None:
    """Refuses arguments that are no text: JSON holds no such path, and safetensors opens none."""
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            from samer.config import InputError

            raise InputError(f"{printable(word)}: not UTF-8, as paths and queries must be; rename it: mv, or convmv")


def _end_interrupted() -> None:
    spoiled()  # what was printed before goes out first
    tell_interrupted()
    sys.exit(130)


def _end_of_output() -> None:
    """Ends the process by a status of its own if standard output has lost something."""
    lost = spoiled()
    if isinstance(lost, BrokenPipeError):
        sys.exit(141)
    if lost is not None:
        from samer.runtime.files import trouble

        print("error:", trouble("standard output", lost, "written"), file=sys.stderr, flush=True)
        sys.exit(2)


def _reason(error: Exception) -> str | None:
    """What to say of an error that a person can do something about; None: a defect."""
    from samer.config import InputError

    if isinstance(error, InputError):
        # a data loader's worker hands its whole traceback over as the message, the error's own words at its end
        return str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2]
    if isinstance(error, OSError):
        if error.errno is None:  # of a library, or of a worker, whose traceback comes first
            return f"{(str(error).strip().splitlines() or ['a file or device can not be used'])[-1]}; look at it"
        from samer.runtime.files import trouble

        return str(trouble(error.filename or "a file or device", error, "used"))
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        around = error.object[max(0, error.start - 80) : error.end + 40]
        return f"{around}: holds a name that is not UTF-8, which can't be written; rename it"
    if is_memory(error):
        last = (str(error).strip().splitlines() or [""])[-1]
        more = f" ({last[:160]})" if last else ""
        return f"out of memory{more}; make the batches smaller, or end what else runs on this machine or GPU"
    return None
