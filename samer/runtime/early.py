"""Ctrl-C before a command has begun, while Python still reads it: one line, as later."""

import _signal  # what `signal` wraps; that one takes as long to import as all that comes before a script's first line
import os

INTERRUPTED = b"interrupted; run the same command again to go on\n"


def heed_interrupts() -> None:
    """Ends this process on SIGINT with one line, until `samer.runtime.signals.listening` takes over.

    A process that was told to ignore it goes on ignoring it.
    """
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _leave)


def _leave(number: int, frame: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, INTERRUPTED)
    os._exit(128 + number)
