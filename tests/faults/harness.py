"""Ways to spoil files, and the judgement on a reader: refused by name, right, or a defect.

SAMER_FAULT_CASES: about how many cases in all, shared out among the groups (1,500). SAMER_FAULT_LOG: a file that gets
one JSON line per group: {"group", "cases", "errors", "correct", "known", "seconds"}; a "known" case ended in a defect
that test_bytes.py's KNOWN names.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import struct
import time
import traceback
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from samer.config import InputError

TOTAL = int(os.environ.get("SAMER_FAULT_CASES", "1500"))
SECONDS, MEMORY = 60, 2 * 2**30  # what one reading may take: it takes milliseconds or, on a busy machine, a second
QUIET = {"deadline": None, "database": None, "derandomize": True, "phases": (Phase.explicit, Phase.generate)}


def examples(share):
    """Hypothesis settings for a group that gets this share of all cases."""
    return settings(max_examples=max(5, int(TOTAL * share)), suppress_health_check=list(HealthCheck), **QUIET)


# --- spoiling -------------------------------------------------------------------------------------------------------

PLACES = st.one_of(st.integers(0, 40), st.integers(-40, -1), st.integers(0, 2**22))
NUMBERS = st.sampled_from(
    [
        -1,
        0,
        1,
        2,
        3,
        7,
        255,
        10**4,
        2**31,
        10**12,
        2**63,
        -(2**63),
        10**30,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
    ]
)
WORDS = st.sampled_from(
    [
        "",
        "x",
        "\0",
        "é\n",
        "../../x",
        "/etc/passwd",
        "../..",
        ".",
        "a" * 300,
        "images-00000.safetensors",
        "int8",
        "none",
    ]
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=2)),
    max_leaves=4,
)
CHANGES = st.one_of(
    st.tuples(st.just("set"), VALUES),
    st.sampled_from([("drop",), ("twice",), ("wrap",), ("text",), ("more",), ("less",), ("negate",), ("huge",)]),
)


def byte_faults(names):
    """Faults of files as bytes; each is a tuple that `spoil` reads."""
    file = st.sampled_from(sorted(names))
    return st.one_of(
        st.tuples(st.just("cut"), file, PLACES),
        st.tuples(st.just("flip"), file, PLACES, st.integers(0, 7)),
        st.tuples(st.just("fill"), file, PLACES, st.integers(1, 300), st.integers(0, 255)),
        st.tuples(st.just("insert"), file, PLACES, st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("remove"), file, PLACES, st.integers(1, 9)),
        st.tuples(st.just("swap"), file, file),
        st.tuples(st.just("copy"), file, file),
        st.tuples(st.sampled_from(["gone", "folder", "loop", "dangling", "linked", "empty", "zeros"]), file),
    )


def json_faults(names):
    """Faults of JSON files: a value somewhere in them changed; sealed: a manifest with its own checksum made anew."""
    name = st.sampled_from(sorted(names))
    return st.tuples(st.just("json"), name, st.integers(0, 10**6), CHANGES, st.booleans())


def header_faults(names):
    """Faults of safetensors headers, of the tensors' descriptions and of our own metadata; sealed or not."""
    where = st.sampled_from(["tensors", "samer"])
    name = st.sampled_from(sorted(names))
    return st.tuples(st.just("header"), name, where, st.integers(0, 10**6), CHANGES, st.booleans())


def spots(value, path=()):
    """Every place in a JSON value, its inner nodes included."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from spots(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:6]):
            yield from spots(inner, (*path, number))


def changed(document, number, change):
    """`document` with the value at a place replaced, dropped, doubled, wrapped, turned to text or moved."""
    document = json.loads(json.dumps(document))
    places = list(spots(document))[1:]
    if not places:
        return change[1] if change[0] == "set" else []
    *way, last = places[number % len(places)]
    parent = document
    for step in way:
        parent = parent[step]
    old = parent[last]
    how = change[0]
    if how == "set":
        parent[last] = change[1]
    elif how == "drop":
        del parent[last]
    elif how == "twice":
        if isinstance(parent, list):
            parent.insert(last, old)
        else:
            parent[f"{last}2"] = old
    elif how == "wrap":
        parent[last] = [old]
    elif how == "text":
        parent[last] = old[:-1] if isinstance(old, str) else json.dumps(old)
    else:
        number = isinstance(old, (int, float))
        step = {"more": lambda v: v + 1, "less": lambda v: v - 1, "negate": lambda v: -v, "huge": lambda v: 10**12}
        parent[last] = step[how](old) if number else {"value": old}
    return document


def resealed(manifest):
    """A manifest's bytes with the checksum that belongs to what it says now."""
    if isinstance(manifest, dict):
        rest = {key: value for key, value in manifest.items() if key != "checksum"}
        manifest = {**rest, "checksum": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}
    return json.dumps(manifest).encode()


def read_header(data):
    """A safetensors file's header and its tensors' bytes."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(header, body):
    text = json.dumps(header, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def change_header(data, where, number, change):
    header, body = read_header(data)
    if where == "samer":
        own = header.get("__metadata__", {}).get("samer")
        if own is None:
            return data[:8] + data[9:]
        header["__metadata__"]["samer"] = json.dumps(changed(json.loads(own), number, change))
    else:
        inner = changed({k: v for k, v in header.items() if k != "__metadata__"}, number, change)
        header = {
            **{k: v for k, v in header.items() if k == "__metadata__"},
            **(inner if isinstance(inner, dict) else {}),
        }
    return write_header(header, body)


class Spoiled:
    """A working copy of a folder that is spoiled and restored; changed files are new ones, for others may be mapped."""

    def __init__(self, source, place, seal=None):
        self.folder, self.seal = Path(place), seal
        shutil.copytree(source, self.folder, symlinks=True)
        self.clean = {
            str(p.relative_to(source)): p.read_bytes() for p in sorted(Path(source).rglob("*")) if p.is_file()
        }

    @property
    def names(self):
        return sorted(self.clean)

    def path(self, name):
        return self.folder / name

    def write(self, name, data):
        path = self.path(name)
        self._clear(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def _clear(self, path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def restore(self):
        """Every file as it was, nothing beside them."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = str(path.relative_to(self.folder))
            if name not in self.clean and (path.is_symlink() or not path.is_dir()):
                path.unlink()
        for name, data in self.clean.items():
            path = self.path(name)
            if path.is_symlink() or not path.is_file() or path.read_bytes() != data:
                self.write(name, data)

    def spoil(self, fault):
        """Applies a fault; returns the names that a message may give."""
        kind, name, *rest = fault
        data = self.clean[name]
        at = lambda place: place % (len(data) + 1)
        if kind == "cut":
            self.write(name, data[: at(rest[0])])
        elif kind == "flip":
            place = rest[0] % max(1, len(data))
            self.write(name, data[:place] + bytes([data[place] ^ 1 << rest[1]]) + data[place + 1 :] if data else b"x")
        elif kind == "fill":
            place = at(rest[0])
            self.write(
                name, data[:place] + bytes([rest[2]]) * len(data[place : place + rest[1]]) + data[place + rest[1] :]
            )
        elif kind == "insert":
            self.write(name, data[: at(rest[0])] + rest[1] + data[at(rest[0]) :])
        elif kind == "remove":
            self.write(name, data[: at(rest[0])] + data[at(rest[0]) + rest[1] :])
        elif kind == "swap":
            self.write(name, self.clean[rest[0]])
            self.write(rest[0], data)
        elif kind == "copy":
            self.write(name, self.clean[rest[0]])
        elif kind == "json":
            number, change, sealed = rest
            document = changed(json.loads(data), number, change)
            sealed = sealed and name.endswith("manifest.json")
            self.write(name, resealed(document) if sealed else json.dumps(document).encode())
        elif kind == "header":
            where, number, change, sealed = rest
            self.write(name, change_header(data, where, number, change))
            if sealed and self.seal:
                self.seal(self, name)
        else:
            self._clear(self.path(name))
            if kind == "folder":
                self.path(name).mkdir()
            elif kind == "loop":
                self.path(name).symlink_to(self.path(name).name)
            elif kind == "dangling":
                self.path(name).symlink_to("nothing")
            elif kind == "linked":  # a link to the same content is as good as the file
                self.path(name + ".own").write_bytes(data)
                self.path(name).symlink_to(self.path(name + ".own"))
            elif kind == "empty":
                self.path(name).write_bytes(b"")
            elif kind == "zeros":
                self.path(name).write_bytes(bytes(len(data)))
        touched = [name, *[word for word in rest if kind in ("swap", "copy") and word in self.clean]]
        return [str(self.path(word)) for word in touched]


# --- judging --------------------------------------------------------------------------------------------------------


class Hang(Exception):
    """A reading took longer than `SECONDS`."""


def _ring(*_):
    raise Hang


@contextlib.contextmanager
def bounded(seconds=SECONDS, memory=MEMORY):
    """Ends a block that takes too long, and refuses it more address space than it may use."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, _ring)
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, before[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)


def frame_of(error):
    """`module.function` of the innermost frame of samer."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/samer/" in f.filename]
    return f"{Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else "?"


class Survey:
    """What came of all cases of a group; unknown defects are collected and told at the end."""

    def __init__(self, group, known):
        self.group, self.known, self.count, self.defects = group, known, Counter(), {}
        self.started = time.monotonic()

    def defect(self, signature, case):
        if any(re.match(pattern, " ".join(signature)) for pattern in self.known):
            self.count["known"] += 1
            return
        self.count["defects"] += 1
        self.defects.setdefault(signature, []).append(case)

    def judge(self, case, read, right, names):
        """One case: `read()` is refused with a message that holds one of `names`, or `right(value)` holds."""
        self.count["cases"] += 1
        try:
            with bounded():
                value = read()
        except InputError as error:
            words = str(error)
            if "can't allocate" in words or "an't allocate" in words or "Cannot allocate" in words:
                self.defect(("memory", frame_of(error)), (case, words))
            elif not any(name in words for name in names):
                self.defect(("unnamed", frame_of(error), words[:60]), (case, words))
            else:
                self.count["errors"] += 1
            return
        except Hang as error:
            self.defect(("hang", frame_of(error)), (case, ""))
            return
        except Exception as error:
            self.defect((type(error).__name__, frame_of(error)), (case, str(error)[:200]))
            return
        verdict = right(value)
        if verdict is True:
            self.count["correct"] += 1
        else:
            self.defect(("wrong", str(verdict)), (case, str(value)[:200]))

    def close(self):
        """Writes the log line; fails if there was an unknown defect."""
        seconds = round(time.monotonic() - self.started, 2)
        row = {"group": self.group, **{k: self.count[k] for k in ("cases", "errors", "correct", "known")}}
        if os.environ.get("SAMER_FAULT_LOG"):
            with open(os.environ["SAMER_FAULT_LOG"], "a") as log:
                log.write(json.dumps({**row, "seconds": seconds}) + "\n")
        lines = [f"{len(cases)} x {sig}\n      {cases[0]}" for sig, cases in self.defects.items()]
        assert not lines, f"{self.group}: {len(lines)} kinds of defects\n" + "\n".join(lines)
        assert self.count["cases"] > 0


@contextlib.contextmanager
def survey(group, known=()):
    """A survey that is closed when its block ends well."""
    result = Survey(group, list(itertools.chain(known)))
    yield result
    result.close()
