"""SIGTERM ends a command between two units of work, never inside one; Ctrl-C (SIGINT) ends it at once."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress

from samer.runtime.early import INTERRUPTED

_ENDED = -1
_finishing = 0  # how many `stoppable` blocks this process is in; _ENDED: its work is over
_holding = 0  # how many `held` blocks this process is in
_asked = False  # whether SIGTERM came
_interrupted = False  # whether SIGINT came
_waiting = False  # whether it came to a `held` block, whose end will raise it
_told = False  # whether that was said
_plain_lost = sys.unraisablehook  # what was there before `_on_lost`
_owner = 0  # the process that listens; its forked children leave SIGINT to it, and end at SIGTERM


class Stopped(SystemExit):
    """SIGTERM came, and what was at work has come to an end; left alone, it ends a process with 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def listening():
    """A whole command: SIGTERM and SIGINT are heard in it; after it SIGTERM changes nothing any more.

    A second SIGINT ends the process at once, as does one that comes after the command or while modules are imported. A
    process that was told to ignore SIGINT, as shells tell their background jobs, goes on ignoring it.
    """
    global _finishing, _holding, _asked, _interrupted, _waiting, _told, _owner, _plain_lost
    _finishing, _holding, _owner = 0, 0, os.getpid()
    _asked = _interrupted = _waiting = _told = False
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, _on_sigint)
            atexit.unregister(_be_deaf)
            atexit.register(_be_deaf)  # before others', so it is called after them
        signal.signal(signal.SIGTERM, _on_sigterm)
        if sys.unraisablehook is not _on_lost:
            _plain_lost, sys.unraisablehook = sys.unraisablehook, _on_lost
    try:
        yield
    finally:
        _finishing = _ENDED


@contextmanager
def held():
    """A block that signals wait for, such as the taking of a lock; what comes after it must ask `stop_here`.

    Raises:
        KeyboardInterrupt: at the block's end, if SIGINT came in it.
    """
    global _holding, _waiting
    _holding += 1
    try:
        with _unfinished():
            yield
    finally:
        _holding -= 1
    if _waiting and not _holding:
        _waiting = False
        raise KeyboardInterrupt


@contextmanager
def stoppable():
    """A block of many units of work: SIGTERM waits in it until `stop_here` or the block's end; SIGINT does not wait.

    Raises:
        Stopped: at the block's end, if SIGTERM came.
    """
    with _unfinished():
        yield
    stop_here()


@contextmanager
def _unfinished():
    global _finishing
    _finishing += 1
    try:
        yield
    finally:
        _finishing -= 1


def asked() -> bool:
    """Whether SIGTERM came to this process."""
    return _asked


def interrupted() -> bool:
    """Whether SIGINT came to this process, whatever became of the KeyboardInterrupt that it raised."""
    return _interrupted


def stop_here() -> None:
    """Ends this process between two units of work if a signal asked it to.

    Raises:
        Stopped: if SIGTERM did.
        KeyboardInterrupt: if SIGINT did, and what it raised was lost on the way.
    """
    if _interrupted:
        raise KeyboardInterrupt
    if _asked:
        raise Stopped


def tell_interrupted() -> None:
    """Says once, on the first process of a job, that it was interrupted."""
    global _told
    if not _told and os.environ.get("RANK", "0") == "0":
        _told = True
        print(INTERRUPTED.decode(), end="", file=sys.stderr, flush=True)


def _on_sigterm(number: int, frame: object) -> None:
    global _asked
    if os.getpid() != _owner:
        os._exit(128 + number)  # a worker, whose owner has no more use for it: raised in it, it would be a traceback
    first, _asked = not _asked, True
    if _finishing == _ENDED:
        return
    if not _finishing:
        raise Stopped
    if first:  # os.write: a handler may interrupt a print
        os.write(2, b"SIGTERM: stopping as soon as what is at work is finished\n")


def _on_sigint(number: int, frame: object) -> None:
    global _interrupted, _waiting
    if os.getpid() != _owner:
        return  # a worker: a terminal interrupts its owner as well, who ends it
    again, _interrupted = _interrupted, True
    if again or _finishing == _ENDED or _in_import(frame):
        _leave()
    if _holding:
        _waiting = True
    else:
        raise KeyboardInterrupt


def _be_deaf() -> None:
    """Once Python has waited for all threads and processes, it takes its handlers away, and SIGINT would kill it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_import(frame) -> bool:
    """Whether a module is being imported; extensions that are interrupted in it print and raise what they like."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _leave() -> None:
    """Ends this process now; what it was writing is removed by the next writer, as after a kill."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # it may be what was interrupted
            stream.flush()
    if not _told and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # os.write: a handler may interrupt a print
            os.write(2, INTERRUPTED)
    os._exit(128 + signal.SIGINT)


def _on_lost(unraisable) -> None:
    """An interrupt that Python could raise nowhere (in a destructor, a callback) ends the process all the same."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt) and _interrupted:
        _leave()
    if not isinstance(unraisable.exc_value, Stopped):  # it waits for the next `stop_here`
        _plain_lost(unraisable)
