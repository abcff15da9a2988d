"""SIGTERM ends a command between two units of work, never inside one."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from typing import Any

_ENDED = -1
_finishing = 0  # how many `stoppable` blocks this process is in; _ENDED: its work is over
_asked = False  # whether SIGTERM came


class Stopped(SystemExit):
    """SIGTERM came, and what was at work has come to an end; left alone, it ends a process with 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def listening():
    """A whole command: SIGTERM is heard in it, and after it changes nothing any more."""
    global _finishing, _asked
    _finishing, _asked = 0, False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield
    finally:
        _finishing = _ENDED


@contextmanager
def held():
    """A block that SIGTERM waits for, such as the taking of a lock; what comes after it must ask `stop_here`."""
    global _finishing
    _finishing += 1
    try:
        yield
    finally:
        _finishing -= 1


@contextmanager
def stoppable():
    """A block of many units of work: SIGTERM waits in it until `stop_here` or the block's end.

    Raises:
        Stopped: at the block's end, if SIGTERM came.
    """
    with held():
        yield
    stop_here()


def asked() -> bool:
    """Whether SIGTERM came to this process."""
    return _asked


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
