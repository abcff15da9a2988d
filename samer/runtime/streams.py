"""Standard input, output and error as a command may find them: closed, full, left by their reader, of few letters.

What is printed is never worth the work: a stream that can't be written to any more takes the rest without a word, and
the command's end says so by its status (`spoiled`).
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress


class Lasting(io.TextIOWrapper):
    """Text to a descriptor that, once it can't be written to, leads to nothing; `error` is the reason."""

    error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.error = self.error or error
        _open_on_nothing(self.fileno())


def take_streams() -> None:
    """Readies the standard streams of a process that runs a command; in a test's place of its own it changes nothing.

    Closed ones are opened on nothing, so that no file of the work gets their numbers and the messages meant for them.
    What a terminal's encoding has no letters for is written with backslashes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # somebody else's
        if not _is_open(number):
            _open_on_nothing(number)
        if number == 0:
            sys.stdin = stream or open(number, encoding="utf-8", closefd=False)  # noqa: SIM115
            continue
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
        os.set_blocking(number, True)  # another program on the same terminal or pipe may have changed it
        errors = getattr(stream, "errors", "strict")
        fresh = Lasting(
            io.BufferedWriter(io.FileIO(number, "w", closefd=False)),
            encoding=getattr(stream, "encoding", "utf-8"),
            errors="backslashreplace" if errors == "strict" else errors,
            line_buffering=number == 2 or os.isatty(number),
        )
        setattr(sys, name, fresh)
        setattr(sys, f"__{name}__", fresh)


def spoiled() -> OSError | None:
    """Why standard output has lost something that was printed; None: everything arrived."""
    if not isinstance(sys.stdout, Lasting):
        return None  # somebody else's
    sys.stdout.flush()
    return sys.stdout.error


def heard() -> bool:
    """Whether somebody still reads standard output; what only prints has no reason to go on otherwise."""
    return spoiled() is None


def printable(text: object) -> str:
    """Text as one line of a terminal: characters that move, colour or turn it, and bytes that are no text, escaped."""
    return "".join(map(_escaped, str(text)))


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    turns = code in (0x061C, 0x200E, 0x200F) or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    if code < 0x20 or 0x7F <= code < 0xA0 or code in (0x2028, 0x2029) or turns or 0xD800 <= code <= 0xDFFF:
        return letter.encode("unicode_escape", "surrogatepass").decode()
    return letter


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _open_on_nothing(number: int) -> None:
    """/dev/null under a number, in place of what it stands for."""
    handle = os.open(os.devnull, os.O_RDWR)
    if handle != number:
        os.dup2(handle, number)
        os.close(handle)
    os.set_inheritable(number, True)
