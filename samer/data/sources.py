"""Many pictures at a place: a folder, parquet files, tar files of webdataset, on this machine or in object storage.

A place is a path or an address that pyarrow knows (s3://, gs://, abfs://, hdfs://). A folder of .parquet or .tar
files, without pictures or folders beside them, is read as those, whose rows and members are named

    parquet   by the column id, _id, image_id, corpus-id or corpus_id, else FILE/NUMBER; the picture is in image or jpg
    tar       FILE/KEY, the key being the member's path without the picture's suffix

and any other by the paths of its pictures. Work is cut into jobs: so many pictures of a folder, or a file.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from samer.config import InputError
from samer.data.parquet import REMEDY
from samer.data.pictures import HEIC_SUFFIXES, SUFFIXES, PictureError, Skipped, file_bytes, find_pictures, one_line
from samer.runtime.files import is_dir, is_file, listing, trouble

IDS = ("id", "_id", "image_id", "corpus-id", "corpus_id")
IMAGES = ("image", "jpg")
_TARS = (".tar", ".tar.gz", ".tgz")
_ROWS = 64  # read at once


@dataclass(frozen=True)
class Job:
    """A piece of work.

    Attributes:
        number: of it, from 0.
        place: the folder, or the file.
        names: of its pictures below the folder; empty: all of the file.
        state: what tells that something there has changed.
        count: its pictures; 0: not known.
    """

    number: int
    place: str
    names: tuple[str, ...]
    state: str
    count: int


@dataclass(frozen=True)
class Source:
    """Jobs at a place.

    Attributes:
        place: as it was named; of a folder on this machine its real path.
        kind: pictures, parquet or tar.
        jobs: in order.
        skipped: what was not taken.
    """

    place: str
    kind: str
    jobs: tuple[Job, ...]
    skipped: tuple[Skipped, ...] = ()

    @property
    def root(self) -> str | None:
        """The folder that ids are paths under; None: it is not on this machine, or they are none."""
        return None if self.kind != "pictures" or "://" in self.place else self.place


def kind_of(name: str) -> str:
    """What a file holds, by its name: pictures, parquet or tar; else nothing."""
    lower = name.lower()
    if lower.endswith(".parquet"):
        return "parquet"
    if lower.endswith(_TARS):
        return "tar"
    return "pictures" if PurePosixPath(lower).suffix in SUFFIXES | HEIC_SUFFIXES else ""


def is_bulk(place: str) -> bool:
    """Whether a place is something else than a folder of pictures on this machine."""
    if "://" in place or is_file(place):
        return True
    inside = listing(place) if is_dir(place) else []
    kinds = {kind_of(path.name) for path in inside}
    return bool(kinds & {"parquet", "tar"}) and "pictures" not in kinds and not any(map(is_dir, inside))


def find_source(place: str, size: int) -> Source:
    """What is to be read at a place; files are listed, and of parquet files the ids are counted.

    Args:
        place: a folder, a file, or an address.
        size: the pictures of a job, of a folder.

    Raises:
        InputError: nothing there, or pictures and tables together.
    """
    if "://" not in place and not is_bulk(place):
        found = find_pictures(place)
        states = (os.stat(found.root / name) for name in found.paths)
        files = [(name, f"{about.st_size} {about.st_mtime_ns}") for name, about in zip(found.paths, states)]
        return Source(str(found.root), "pictures", _picture_jobs(str(found.root), files, size), tuple(found.skipped))
    base, files = _remote_files(place) if "://" in place else _local_files(place)
    kinds = {kind: [each for each in files if kind_of(each[0]) == kind] for kind in ("parquet", "tar", "pictures")}
    some = [kind for kind, each in kinds.items() if each]
    if not some:
        raise InputError(f"{place}: no pictures, parquet or tar files there")
    if len(some) > 1:
        raise InputError(f"{place}: holds {' and '.join(some)} files; name a folder that holds one kind")
    (kind,) = some
    if kind == "pictures":
        return Source(base, kind, _picture_jobs(base, files, size))
    jobs = []
    for name, state in kinds[kind]:
        path = f"{base.rstrip('/')}/{name}" if name else base
        jobs.append(Job(len(jobs), path, (), state, _row_count(path) if kind == "parquet" else 0))
    return Source(base, kind, tuple(jobs))


def _picture_jobs(base: str, files: Sequence[tuple[str, str]], size: int) -> tuple[Job, ...]:
    jobs = []
    for start in range(0, len(files), size):
        names, states = zip(*files[start : start + size])
        state = hashlib.blake2b(repr(states).encode(), digest_size=16).hexdigest()
        jobs.append(Job(len(jobs), base, names, state, len(names)))
    return tuple(jobs)


def _local_files(place: str) -> tuple[str, list[tuple[str, str]]]:
    """A folder, and the names and states of its files; of a file's own name, its folder."""
    path = Path(place).resolve()
    paths = [path] if path.is_file() else [each for each in listing(path) if is_file(each)]
    abouts = [(each, each.stat()) for each in paths if kind_of(each.name)]
    base = path.parent if path.is_file() else path
    return str(base), [(each.name, f"{about.st_size} {about.st_mtime_ns}") for each, about in abouts]


def _remote_files(place: str) -> tuple[str, list[tuple[str, str]]]:
    """An address without its last slash, and the names and states of all files below it."""
    fs, path, kind = _file_system(place)
    with _told(place):
        found = fs.get_file_info(path)
        if found.type == kind.FileType.NotFound:
            raise InputError(f"{place}: nothing is there; name a folder or a file")
        whole = found.type == kind.FileType.File
        infos = [found] if whole else fs.get_file_info(kind.FileSelector(path, recursive=True))
    root = path.rpartition("/")[0] if whole else path
    base = place.rstrip("/")
    files = [(info.path[len(root) :].strip("/"), info) for info in infos if info.is_file]
    return (base.rpartition("/")[0] if whole else base), sorted(
        (name, f"{info.size} {info.mtime_ns}") for name, info in files if kind_of(name)
    )


def _file_system(place: str) -> tuple[Any, str, Any]:
    """The file system of an address, the path in it, and pyarrow's module for them."""
    try:
        from pyarrow import fs
    except ModuleNotFoundError:
        raise InputError(f"{place}: can't be reached without pyarrow; {REMEDY}") from None
    with _told(place):
        return *fs.FileSystem.from_uri(place), fs


@contextmanager
def _told(place: str) -> Iterator[None]:
    """What goes wrong within is told in one line that names the place."""
    try:
        from pyarrow import ArrowException as damaged
    except ModuleNotFoundError:  # nothing within asks it
        damaged = tarfile.TarError
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise trouble(place, error) from None
        raise InputError(f"{place}: can't be read ({one_line(error)[:160]}); look at it, and run this again") from None
    except (damaged, tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{place}: can't be read ({one_line(error)[:160]}); restore it") from None


@contextmanager
def _opened(place: str) -> Iterator[BinaryIO]:
    """A file on this machine or elsewhere, open for reading."""
    if "://" in place:
        fs, path, _ = _file_system(place)
        with _told(place), fs.open_input_file(path) as handle:
            yield handle
    else:
        with _told(place), open(place, "rb") as handle:
            yield handle


@contextmanager
def _table(place: str) -> Iterator[tuple[Any, str | None, str]]:
    """A parquet file, and its columns of ids, if it has one, and of pictures."""
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise InputError(f"{place}: can't be read without pyarrow; {REMEDY}") from None
    with _opened(place) as handle:
        table = parquet.ParquetFile(handle)
        names = table.schema_arrow.names
        images = next((name for name in IMAGES if name in names), None)
        if images is None:
            raise InputError(
                f"{place}: no column {' or '.join(IMAGES)} (it has {', '.join(names)}); rename the one of the pictures"
            )
        yield table, next((name for name in IDS if name in names), None), images


def _row_count(place: str) -> int:
    with _table(place) as (table, _, _):
        return table.metadata.num_rows


def table_names(job: Job) -> list[str]:
    """The ids of a parquet file's rows; pictures are not read.

    Raises:
        InputError: it can't be read, or a row has no id.
    """
    with _table(job.place) as (table, ids, _):
        if ids is None:
            return [_numbered(job.place, row) for row in range(job.count)]
        column = [str(value) for batch in table.iter_batches(columns=[ids]) for value in _values(job, batch, ids)]
    return column


def _values(job: Job, batch: Any, ids: str) -> list:
    values = batch.column(ids).to_pylist()
    if any(value is None or value == "" for value in values):
        raise InputError(f"{job.place}: a row has no {ids}; fill it in, or leave the column out")
    return values


def _numbered(place: str, row: int) -> str:
    return f"{PurePosixPath(place).stem}/{row}"


def rows_of(kind: str, job: Job) -> Iterator[tuple[str, bytes | PictureError]]:
    """The pictures of a job in order: ids, and the bytes of their files, or what is wrong with them.

    Raises:
        InputError: a table can't be read.
    """
    if kind == "pictures":
        for name in job.names:
            yield name, _picture_bytes(f"{job.place}/{name}")
        return
    seen: set[str] = set()
    for name, content in (_parquet_rows if kind == "parquet" else _tar_rows)(job):
        if name in seen:
            content = PictureError(f"{job.place}: {name} comes twice in it", "id comes twice")
        elif not content:
            content = PictureError(f"{job.place}: {name} holds no picture", "no picture")
        seen.add(name)
        yield name, content


def _picture_bytes(place: str) -> bytes | PictureError:
    try:
        if "://" not in place:
            return file_bytes(place)
        with _opened(place) as handle:
            return handle.read()
    except PictureError as error:
        return error
    except InputError as error:
        return PictureError(str(error), "can't be read", transient=True)


def _parquet_rows(job: Job) -> Iterator[tuple[str, Any]]:
    number = 0
    with _table(job.place) as (table, ids, images):
        columns = [name for name in (ids, images) if name]
        for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
            pictures = batch.column(images).to_pylist()
            names = [_numbered(job.place, number + row) for row in range(len(pictures))]
            if ids is not None:
                names = [str(value) for value in _values(job, batch, ids)]
            for name, value in zip(names, pictures):
                yield name, value.get("bytes") if isinstance(value, dict) else value
            number += len(names)


def _tar_rows(job: Job) -> Iterator[tuple[str, Any]]:
    stem = PurePosixPath(job.place).name
    stem = stem[: -len(next(suffix for suffix in _TARS if stem.lower().endswith(suffix)))]
    with _opened(job.place) as handle, tarfile.open(fileobj=handle, mode="r|*") as tar:
        for member in tar:
            if member.isfile() and kind_of(member.name) == "pictures":
                yield f"{stem}/{PurePosixPath(member.name).with_suffix('')}", tar.extractfile(member).read()
