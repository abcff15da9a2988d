"""Typed settings, whatever they are of: dataclasses <- plain values <- YAML that builds no object."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import reprlib
import types
import typing
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml


class InputError(ValueError):
    """Bad input from outside (a file, a key, a value): one line that names it and says what to do.

    Entry points print the message and exit with status 2; any other exception is a defect of SaMer.
    """


Budget = int | str  # K, or "1/16": the share of an image's N tokens that K is, in lowest terms
_SHARE = re.compile(r"([0-9]{1,9}) ?/ ?([0-9]{1,9})")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 120, 120


def shown(value: object) -> str:
    """A value as messages show it: short, however much it holds; nested YAML aliases can stand for gigabytes."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # more digits than Python writes
        return "a number too long to show"


def whole_number(key: str, value: object) -> int:
    """`value` as an int, where it is one exactly: 64.0 and numpy's numbers are, True and "64" are not.

    Raises:
        InputError: it is none; names it by `key`.
    """
    return _coerce(value, int, key)


def as_budget(key: str, value: object) -> Budget:
    """`value` as K, or as a share of N: 64 and 64.0, "1/16" and "2/32" are some; "64", 0.0625 and "16/16" are none.

    Raises:
        InputError: it is none; names it by `key`.
    """
    if isinstance(value, str) and (share := _SHARE.fullmatch(value.strip())):
        part, whole = map(int, share.groups())
        require(0 < part < whole, key, "a share above 0 and below 1, such as 1/16, or a whole number", value)
        return str(Fraction(part, whole))
    try:
        found = whole_number(key, value)
    except InputError as error:
        raise InputError(f"{error}; a share of an image's tokens is written as 1/16") from None
    require(found >= 1, key, "at least 1", found)
    return found


def vectors_of(regions: Budget, tokens: int) -> int:
    """K of an image of so many tokens: `regions` itself, or that share of them, rounded up."""
    return regions if isinstance(regions, int) else math.ceil(tokens * Fraction(regions))


def require(holds: bool, key: str, rule: str, value: object) -> None:
    if not holds:
        raise InputError(f"{key} must be {rule}; it is {shown(value)}")


def settle(settings: Any, prefix: str) -> None:
    """Gives every field of new settings its own type, whoever made them and of what: numpy's numbers, 64.0, a `Path`.

    Raises:
        InputError: a value that is not of its field's type; names it.
    """
    for name, kind in kinds_of(type(settings)).items():
        object.__setattr__(settings, name, _coerce(getattr(settings, name), kind, prefix + name))


@functools.cache
def kinds_of(settings: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(settings)


def _coerce(value: Any, kind: Any, key: str) -> Any:
    """`value` as type `kind`, or InputError; numbers written as text (PyYAML reads 5e-5 so) are read as numbers."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of numpy's or torch's
        value = value.item()
    if kind == Budget:
        return as_budget(key, value)
    if isinstance(kind, types.UnionType):
        inner = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if value is None else _coerce(value, inner[0], key)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else build_dataclass(kind, value, key)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if not isinstance(value, (list, tuple)):
            raise InputError(
                f"{key} must be a list{' of whole numbers' if inner == Budget else ''}; it is {shown(value)}"
            )
        return tuple(_coerce(item, inner, key) for item in value)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise InputError(f"{key} must be a mapping; it is {shown(value)}")
        return {str(name): _coerce(item, typing.get_args(kind)[1], f"{key}.{name}") for name, item in value.items()}
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is int and number and abs(value) < 2**63 and value == int(value):  # neither NaN nor infinity is below
        return int(value)
    if (kind is float and (number or isinstance(value, str))) or (kind is str and number):
        try:
            return kind(value)
        except (ValueError, OverflowError):  # no number, or more digits than a float holds or Python writes
            pass
    raise InputError(f"{key} must be {wanted}; it is {shown(value)}")


def build_dataclass(cls: type, values: Any, where: str, prefix: str = "") -> Any:
    """A dataclass from nested dicts, what they lack by its defaults; `where` names the file in messages.

    Raises:
        InputError: an unknown key, a wrong type, or a value out of range, named.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(
            f"{where}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys; it is {shown(values)}"
        )
    hints = kinds_of(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            name = name[:120] if isinstance(name, str) else shown(name)
            close = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(sorted(fields))}"
            raise InputError(f"{where}: unknown key {prefix}{name}; {hint}")
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = build_dataclass(hints[name], value, where, f"{prefix}{name}.")
        else:
            arguments[name] = _coerce(value, hints[name], f"{where}: {prefix}{name}")
    try:
        return cls(**arguments)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


class _OnceLoader(yaml.SafeLoader):
    """SafeLoader, which builds no objects, that also refuses a key given twice instead of taking the last."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"key {key.value!r} stands twice, {str(key.start_mark).strip()}")
                seen.add(key.value)
        return node


def parse_yaml(text: str) -> Any:
    """`text` as plain YAML values; whatever PyYAML raises on bad text comes out as `yaml.YAMLError`."""
    try:
        return yaml.load(text, Loader=_OnceLoader)
    except (ValueError, OverflowError, LookupError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(error) from error  # e.g. the date 2024-13-45, `!!int x`


def load_yaml(path: str | Path) -> Any:
    """Reads a YAML file without building any object from it.

    Raises:
        InputError: the file is missing, not UTF-8 or not YAML.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("not a regular file")
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name a YAML config, for example one from configs/") from None
    except OSError as error:
        raise InputError(
            f"{path}: can't be read ({error.strerror or error}); allow this user to read it, or name another"
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable YAML file ({' '.join(str(error).split())[:200]})") from None
