"""Queries from a terminal, a file or a pipe."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TextIO

from samer.config import InputError
from samer.runtime.files import trouble

LONGEST_LINE = 100_000  # characters; more are not kept, as a file without line ends may be of any size
PROMPT = "query> "
_MARKS = {  # the longer first: UTF-32's begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_LETTER = "\udcff"  # stands for bytes that are no text; no text holds it
codecs.register_error("samer.no-letter", lambda error: (_NO_LETTER, error.end))


@dataclass(frozen=True)
class Asked:
    """A query as it was asked: `text`; `place`, such as "line 3", or ""; `problem`: why it can't be read, or ""."""

    text: str
    place: str = ""
    problem: str = ""


def typed_queries() -> Iterator[Asked]:
    """Queries from standard input: on a terminal until an empty line or Ctrl-D, else to its end, empty lines left out.

    Raises:
        InputError: standard input is closed, or can't be read.
    """
    if sys.stdin is None:
        raise InputError("standard input is closed; give the queries as arguments")
    return _from_terminal() if sys.stdin.isatty() else _from_lines()


def _from_terminal() -> Iterator[Asked]:
    both = sys.stdout.isatty()
    if both:  # else readline would write to what is no terminal
        with suppress(ImportError):
            import readline  # noqa: F401  input() then edits lines and knows those before
    while True:
        try:
            line = input(PROMPT) if both else _plain_line()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)  # the shell's prompt, and what is said of it, begin a line
            raise
        except UnicodeDecodeError:
            yield Asked("", problem=f"what was typed is not {sys.stdin.encoding}; set the terminal's encoding, or LANG")
            continue
        if not line.strip():
            return
        yield Asked(line.strip())


def _plain_line() -> str:
    """A line of the terminal, with the prompt on standard error, as standard output goes elsewhere."""
    print(PROMPT, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _from_lines() -> Iterator[Asked]:
    stream, number = _decoded(sys.stdin), 0
    try:
        while part := stream.readline(LONGEST_LINE):
            number += 1
            place, whole = f"line {number}", part.endswith("\n") or len(part) < LONGEST_LINE
            text = part.lstrip("\ufeff").strip()  # files that were joined hold a mark within
            while not part.endswith("\n") and (part := stream.readline(LONGEST_LINE)):
                pass
            if not whole:
                yield Asked("", place, f"more than {LONGEST_LINE:,} characters; a query is a line of its own")
            elif _NO_LETTER in text:
                yield Asked("", place, f"not {stream.encoding}; save it as UTF-8, or set LANG to its encoding")
            elif text:
                yield Asked(text, place)
    except OSError as error:
        raise trouble("standard input", error) from None
    finally:
        if stream is not sys.stdin:
            stream.detach()  # it would close standard input


def _decoded(stream: TextIO) -> TextIO:
    """The stream read by the mark that its first bytes are, else by its own encoding; see `_NO_LETTER`."""
    buffer = getattr(stream, "buffer", None)
    if buffer is None:  # text already
        return stream
    try:
        start = buffer.peek(4)[:4]
    except OSError as error:
        raise trouble("standard input", error) from None
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), stream.encoding)
    return io.TextIOWrapper(buffer, encoding=encoding, errors="samer.no-letter")
