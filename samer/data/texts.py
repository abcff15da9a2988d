"""Text and JSON files of data sets: read whole, as lines or as values, or an error that names file and line."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.data.pictures import one_line, regular_file
from samer.runtime.files import is_dir, listing, lookup, trouble

LARGEST = 2**53  # of a number: floats hold all whole ones up to it, so that sums with it neither overflow nor round


def folder_of(root: str | Path, what: str) -> Path:
    """A data set's folder; a leading `~` is the home folder, which shells leave alone within data.root=~/coco.

    Raises:
        InputError: there is none.
    """
    root = lookup(os.path.expanduser(root))
    if not is_dir(root):
        raise InputError(f"{root}: not a folder; point DATA_ROOT at the {what}")
    return root


def read_bytes(path: str | Path) -> bytes:
    """A plain file's content.

    Raises:
        InputError: it can't be read, or is no plain file.
    """
    try:
        regular_file(path)
        return Path(path).read_bytes()
    except OSError as error:
        raise trouble(path, error) from None


def read_lines(path: str | Path) -> list[str]:
    """Lines of a UTF-8 text without their ends (LF, CRLF, or CR where there is no LF) and without blank last lines.

    str.splitlines would also cut at U+2028 and the like.
    """
    content = read_bytes(path)
    try:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
            raise InputError(f"{path}: UTF-16, or no text, but not UTF-8; save it as UTF-8")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({one_line(error)}); save it as UTF-8") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")] if "\n" in text else text.split("\r")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def read_object(path: str | Path, *, without: str = "") -> dict[str, Any]:
    """A JSON object.

    Args:
        path: of the file.
        without: a key that is dropped wherever it stands, as soon as it is read: COCO's outlines take gigabytes.

    Raises:
        InputError: no JSON, or no object.
    """
    content = read_bytes(path)

    def spare(found: dict) -> dict:
        found.pop(without, None)
        return found

    try:
        value = json.loads(content.decode("utf-8-sig"), object_hook=spare if without else None)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: malformed JSON ({one_line(error)[:120]}); restore the file") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object; restore the file")
    return value


def table(path: str | Path, value: dict[str, Any], name: str) -> list:
    """The list of that name in a file's object.

    Raises:
        InputError: there is none.
    """
    if not isinstance(value.get(name), list):
        raise InputError(f"{path}: no list {name!r}; restore the file")
    return value[name]


def field(where: str, row: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """A row's value of that name and kind; numbers are finite and at most `LARGEST`, True is none.

    Raises:
        InputError: `where`, which names file and row, has none.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object; correct it")
    value = row.get(name)
    wrong = not isinstance(value, kind) or isinstance(value, bool)
    if wrong or (isinstance(value, (int, float)) and not abs(value) <= LARGEST):  # NaN is not, either
        words = {str: "text", int: "a whole number", list: "a list", dict: "an object"}.get(kind, "a number")
        raise InputError(f"{where}: {name} must be {words}; it is {str(value)[:60]!r}; correct it")
    return value


def rows_of(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The values of a file of JSON lines, each with `where` it stands; None for a line that is none, to be refused.

    Raises:
        InputError: the file can't be read.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield f"{path}: line {number}", value


def pictures_in(folders: list[Path]) -> dict[str, Path]:
    """File name -> path in the first folder that has it; listed once: 100,000 questions are slow on a network disk."""
    found: dict[str, Path] = {}
    for folder in folders:
        if is_dir(folder):
            for path in listing(folder):
                found.setdefault(path.name, path)
    return found


def inside(root: Path, name: str, where: str) -> Path:
    """The file that a data set names by a path below its folder.

    Raises:
        InputError: the path leads out of it, or is none.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise InputError(f"{where}: {name[:80]!r} is no path below {root}; write one (a link there will do)")
    return root / name
