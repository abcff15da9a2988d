"""An index of a fixed, large set of pictures, made job by job: in this process, or on the machines of a Ray cluster.

A chunk of a job becomes a shard, whose number follows from the job's, whoever makes it; what came of it is noted in
`<split>/jobs/<number>.json` beside the shards, so an interrupted run goes on. The manifest comes last. Of a folder of
pictures the index is the one that `samer.index.sync` makes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import chdir, closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from PIL.Image import Image

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig
from samer.data.pictures import PictureError, Skipped, limit_pixels, picture_of
from samer.data.records import ImageRecord
from samer.data.sources import Job, Source, find_source, rows_of, table_names
from samer.index.banks import GIVE, bank_for
from samer.index.manifest import SHARD_NAME, ExactFile, IndexSummary, Making, Shard, Split, stamp_of, summarise
from samer.index.merge import check_unique
from samer.index.parts import PartOfMany, check_parts, share_of
from samer.index.pictures import FOLDER_SPLIT, PICTURES_PER_SHARD
from samer.index.settings import Asked, settings_for
from samer.index.sync import NothingReadable
from samer.index.tensors import image_tensors, kept_part
from samer.index.write import IMAGES_PER_SHARD, check_settings, making_of, write_image_shard, writing
from samer.retrievers.banks import Bank
from samer.retrievers.base import Encoder, image_seeds
from samer.retrievers.identity import ModelIdentity
from samer.retrievers.stream import in_batches
from samer.runtime.commands import pick_device
from samer.runtime.files import file_hash, is_dir, is_file, listing, read_json, write_json
from samer.runtime.processes import print0, use_threads
from samer.runtime.progress import Progress, prefetched
from samer.runtime.signals import stop_here

CHUNKS = 10_000  # shards of a file, at most
NOTES = "jobs"  # the folder of what came of each chunk
_BYTES = 512 * 2**20  # of a file's pictures in a chunk


@dataclass(frozen=True)
class Task:
    """What a worker needs to know, in plain values that travel.

    Attributes:
        folder: of the index; every worker must reach it.
        asked: the settings, as the command line says them.
        bank: a query bank's file; empty: the index's, or the one beside the projector.
        batch_size: pictures per forward pass.
        device, threads: to compute on; None: torch's own number of threads.
        home: the folder that relative paths are under.
        compiled: have torch compile the model.
        kind: of the source.
        stamp: how the index is made, as `stamp_of` says it; empty: not checked yet.
    """

    folder: str
    asked: Asked
    bank: str = ""
    batch_size: int = 32
    device: str = "auto"
    threads: int | None = None
    compiled: bool = False
    home: str = ""
    kind: str = ""
    stamp: dict = field(default_factory=dict)

    def note(self, number: int) -> Path:
        """Where it is written what came of a chunk."""
        return Path(self.folder, FOLDER_SPLIT, NOTES, f"{number:05d}.json")

    def mark(self, job: Job) -> str:
        """What tells that a job would give something else now."""
        about = [job.place, job.names, job.state, self.batch_size, self.stamp]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Done:
    """What came of a chunk: its number, whether it is its job's last, the manifest's entry, and what was not taken."""

    number: int
    last: bool
    mark: str
    count: int
    shard: dict | None
    skipped: list[list] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """Pictures that become a shard: ids and files; or what came of them in an earlier run."""

    number: int
    last: bool
    mark: str
    names: list[str] = field(default_factory=list)
    files: list[bytes] = field(default_factory=list)
    skipped: list[list] = field(default_factory=list)
    done: dict | None = None


class Engine(Protocol):
    """Who works."""

    def open(self, task: Task) -> Opened:
        """How the index is made where the work is done."""

    def run(self, task: Task, jobs: Sequence[Job]) -> Iterator[Done]:
        """What comes of all chunks of the jobs, in any order."""


class _StandIn(Encoder):
    """What an index notes of an encoder, without its model."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder.name, encoder.base_projector)
        self.use_projector(encoder.current_projector())
        self.revision, self.origin, self.reduction = encoder.revision, encoder.origin, encoder.reduction
        self.processing = dict(encoder.processing)
        self._identity = encoder.identity

    @property
    def identity(self) -> ModelIdentity:
        return self._identity


@dataclass(frozen=True)
class Opened:
    """How an index is made, as a worker found it; travels.

    Attributes:
        encoder: knows what the model is, and encodes nothing.
        merge, making, bank: of the index.
        notes: lines for people on what was chosen for them.
    """

    encoder: Encoder
    merge: MergeConfig
    making: Making
    bank: Bank | None
    notes: tuple[str, ...]


def chunks_of(task: Task, job: Job) -> Iterator[Chunk]:
    """The chunks of a job in order, of which those that are finished are not read again if no other is to be.

    Raises:
        InputError: the job can't be read.
    """
    if finished := _all_finished(task, job):
        yield from (Chunk(done.number, done.last, done.mark, done=asdict(done)) for done in finished)
        return
    mark, waiting, chunk, room = task.mark(job), None, _empty(task, job, 0), 0
    size = PICTURES_PER_SHARD if task.kind == "pictures" else IMAGES_PER_SHARD
    for name, content in rows_of(task.kind, job):
        full = len(chunk.names) + len(chunk.skipped) >= size or (task.kind != "pictures" and room > _BYTES)
        if full:
            if waiting:
                yield _unless_done(task, waiting)
            waiting, chunk, room = chunk, _empty(task, job, chunk.number + 1), 0
            if chunk.number % CHUNKS == 0:
                raise InputError(f"{job.place}: more than {CHUNKS:,} shards' worth of pictures; divide it")
        if isinstance(content, PictureError):
            chunk.skipped.append(list(asdict(content.skipped(name)).values()))
        else:
            chunk.names.append(name)
            chunk.files.append(content)
            room += len(content)
    if waiting:
        yield _unless_done(task, waiting)
    yield _unless_done(task, Chunk(chunk.number, True, mark, chunk.names, chunk.files, chunk.skipped))


def _empty(task: Task, job: Job, number: int) -> Chunk:
    first = job.number if task.kind == "pictures" else job.number * CHUNKS
    return Chunk(number or first, False, task.mark(job))


def _unless_done(task: Task, chunk: Chunk) -> Chunk:
    done = finished(task, chunk.number, chunk.mark)
    return chunk if done is None else Chunk(chunk.number, done.last, chunk.mark, done=asdict(done))


def _all_finished(task: Task, job: Job) -> list[Done]:
    """What came of all chunks of a job; empty: some are not finished."""
    found, number = [], _empty(task, job, 0).number
    while done := finished(task, number, task.mark(job)):
        found.append(done)
        if done.last:
            return found
        number += 1
    return []


def finished(task: Task, number: int, mark: str) -> Done | None:
    """What came of a chunk if that is there, whole and of what is to be done now; else None."""
    path = task.note(number)
    if not is_file(path):
        return None
    try:
        done = Done(**read_json(path))
    except (InputError, TypeError):  # damaged
        return None
    if done.mark != mark:
        return None
    for file, checksum in shard_of(done).files() if done.shard else ():
        place = Path(task.folder, FOLDER_SPLIT, file)
        if not is_file(place) or file_hash(place) != checksum:
            return None
    return done


def shard_of(done: Done) -> Shard:
    """The manifest's entry of a chunk's shard."""
    exact = done.shard["exact"]
    return Shard(**{**done.shard, "exact": exact and ExactFile(**exact)})


@dataclass
class _Chunk:
    """A chunk at work: how many batches are left, and what came of the others."""

    chunk: Chunk
    left: int
    names: list[str] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    parts: list = field(default_factory=list)
    skipped: list[list] = field(default_factory=list)


class Worker:
    """What makes shards of chunks: the model, opened once."""

    def __init__(self, task: Task) -> None:
        """Opens the model as the task says.

        Raises:
            InputError: no model, or another than the index is made by; no index's folder here.
        """
        if task.stamp and not is_dir(task.folder):
            raise InputError(
                f"{task.folder}: not there on {os.uname().nodename}; name a folder that all machines share"
            )
        if task.threads:
            use_threads(task.threads)
        with chdir(task.home if is_dir(task.home) else "."):
            settings = settings_for(task.folder, task.asked, "int8")
            limit_pixels(settings.config.data.max_megapixels)
            self.encoder = settings.open(pick_device(task.device), compiled=task.compiled)
            bank = bank_for(settings, self.encoder, task.bank)
        merge, how = settings.config.merge, (settings.dtype, settings.assignments)
        check_settings(self.encoder, merge, task.batch_size, *how)
        check_parts(merge)
        self.compressor = make_compressor(merge)
        if bank:
            self.compressor.load_state(bank.state)
        elif self.compressor.needs_queries:
            raise InputError(f"{merge.compressor} needs a query bank, and there is none beside the projector; {GIVE}")
        self.task, self.making = task, making_of(self.encoder, merge, *how, bank)
        self.opened = Opened(_StandIn(self.encoder), merge, self.making, bank, settings.notes)
        if task.stamp and stamp_of(self.making) != task.stamp:
            raise InputError(f"{os.uname().nodename}: its model is another than where this began; install the same")

    def encode(self, chunk: Chunk) -> Done:
        """Writes a chunk's shard, and what came of it; raises as `encode_all`."""
        return next(self.encode_all([chunk]))

    @torch.no_grad()
    def encode_all(self, chunks: Iterable[Chunk]) -> Iterator[Done]:
        """As `encode`, of many chunks in order; the pictures of one are read while those before are encoded.

        Raises:
            InputError: what stops all work; a picture that can't be read is skipped.
        """
        begun: deque[_Chunk] = deque()

        def batches() -> Iterator[list[tuple[str, bytes]]]:
            for chunk in chunks:
                rows = [] if chunk.done else list(zip(chunk.names, chunk.files))
                begun.append(_Chunk(chunk, -(-len(rows) // self.task.batch_size)))
                chunk.files.clear()
                while rows:  # files are held until their pictures are read
                    batch, rows = rows[: self.task.batch_size], rows[self.task.batch_size :]
                    yield batch

        with closing(in_batches(self._look, self._prepared, batches(), self.task.batch_size)) as stream:
            for _, (inputs, names, contents, skipped) in stream:
                while not begun[0].left:
                    yield self._finish(begun.popleft())
                chunk = begun[0]
                if names:
                    visual = self.encoder.encode_images(inputs, self.compressor.needs)
                    chunk.parts.append(kept_part(self.making, visual, self.compressor(visual)))
                chunk.names += names
                chunk.contents += contents
                chunk.skipped += skipped
                chunk.left -= 1
                if not chunk.left:
                    yield self._finish(begun.popleft())
        while begun:
            yield self._finish(begun.popleft())

    def _finish(self, made: _Chunk) -> Done:
        """Writes what came of a chunk."""
        chunk = made.chunk
        if chunk.done:
            return Done(**chunk.done)
        skipped = [*chunk.skipped, *made.skipped]
        entry = self._write(chunk.number, made.names, made.contents, made.parts) if made.names else None
        count = len(chunk.names) + len(chunk.skipped)
        done = Done(chunk.number, chunk.last, chunk.mark, count, entry and asdict(entry), skipped)
        write_json(self.task.note(chunk.number), asdict(done))
        return done

    def _look(self, row: tuple[str, bytes]) -> tuple[Image, str] | PictureError:
        """A picture and its file's content, or why there is none."""
        name, file = row
        try:
            return picture_of(name, file, getattr(self.encoder, "picture_size", None))
        except PictureError as error:
            return error

    def _prepared(
        self, rows: Sequence[tuple[str, bytes]], found: Sequence[tuple[Image, str] | PictureError]
    ) -> tuple[dict, list[str], list[str], list[list]]:
        """What the model needs of a batch, the ids and contents in it, and what can't be read."""
        images, names, contents, bad = [], [], [], []
        for (name, _), each in zip(rows, found):
            if isinstance(each, PictureError):
                bad.append(list(asdict(each.skipped(name)).values()))
                continue
            images.append(each[0])
            names.append(name)
            contents.append(each[1])
        if not names:
            return {}, names, contents, bad
        seeds = image_seeds([ImageRecord(name, Path(name), ()) for name in names])
        return {**self.encoder.image_inputs(images), "seeds": seeds}, names, contents, bad

    def _write(self, number: int, names: list[str], contents: list[str], parts: list) -> Shard:
        tensors, half = image_tensors(self.making, parts)
        stamp = {**stamp_of(self.making), "ids": names, "texts": [], "contents": contents}
        path = Path(self.task.folder, FOLDER_SPLIT, f"images-{number:05d}.safetensors")
        return write_image_shard(path, tensors, half, stamp)


class InProcess:
    """The engine that is this process."""

    def open(self, task: Task) -> Opened:
        """As `Engine.open`."""
        self._worker = Worker(task)
        return self._worker.opened

    def run(self, task: Task, jobs: Sequence[Job]) -> Iterator[Done]:
        """As `Engine.run`; in order."""
        self._worker.task = task
        with closing(self._worker.encode_all(_read_ahead(task, jobs))) as stream:
            for done in stream:
                yield done
                stop_here()


def _read_ahead(task: Task, jobs: Sequence[Job]) -> Iterator[Chunk]:
    """The chunks of all jobs, the next of which is read in a thread; nothing but that thread runs what reads them."""
    chunks = (chunk for job in jobs for chunk in chunks_of(task, job))

    def following(_: None) -> Chunk | None:
        return next(chunks, None)

    for _, chunk in prefetched(following, itertools.repeat(None)):
        if chunk is None:
            return
        yield chunk


def index_source(
    place: str, task: Task, engine: Engine, part: PartOfMany = (1, 1)
) -> tuple[IndexSummary, list[Skipped]]:
    """Makes the index of all pictures at a place, or goes on with it.

    Args:
        place: as in `samer.data.sources`.
        task: as the command line says it; its kind and stamp are filled in.
        engine: who works.
        part: only this part of the jobs, for `samer.index.merge`.

    Returns:
        What the index holds, and what was not taken.

    Raises:
        InputError: a source, settings or model that are not right, an index that was made or changed otherwise.
        NothingReadable: not one picture could be read.
    """
    source = find_source(place, PICTURES_PER_SHARD)
    jobs = share_of(source.jobs, part)
    if not jobs:
        size = f"{PICTURES_PER_SHARD} pictures" if source.kind == "pictures" else f"a {source.kind} file"
        raise InputError(
            f"{place}: part {part[0]}/{part[1]} is empty; parts are cut at {size}, which gives at most "
            f"{len(source.jobs):,} here"
        )
    if source.kind == "parquet":
        check_unique(lambda: ((job.place, table_names(job)) for job in jobs))
    task = replace(task, kind=source.kind)
    found = engine.open(task)
    for note in found.notes:
        print0(f"note: {note}")
    known = sum(job.count for job in jobs) if all(job.count for job in jobs) else None
    print0(f"{f'{known:,} ' if known else ''}pictures under {source.place}; writing the index to {task.folder}")
    making = found.making
    how = (found.encoder, found.merge, task.batch_size, making.dtype, making.assignments, found.bank)
    with writing(Path(task.folder), *how) as writer:
        held = writer.manifest.splits.get(FOLDER_SPLIT)
        _check_held(writer.folder, held)
        rows = []
        with Progress(total=known, desc="images", unit="images") as bar:
            for done in engine.run(replace(task, stamp=stamp_of(making)), jobs):
                rows.append(done)
                bar.update(done.count)
        split, skipped = _finish(source, rows)
        _remember(writer.folder, held, split)
        writer.commit(FOLDER_SPLIT, split)
        _remove_others(writer.folder / FOLDER_SPLIT, split, {done.number for done in rows})
    return summarise(FOLDER_SPLIT, split), skipped


def _finish(source: Source, rows: Sequence[Done]) -> tuple[Split, list[Skipped]]:
    rows = sorted(rows, key=lambda done: done.number)
    skipped = sorted([*source.skipped, *(Skipped(*each) for done in rows for each in done.skipped)], key=_path)
    shards = tuple(shard_of(done) for done in rows if done.shard)
    if not shards:
        why = f"; first: {skipped[0].detail}" if skipped else ""
        raise NothingReadable(f"{source.place}: not one readable picture{why}", skipped)
    return Split(shards, (), source.root), skipped


def _path(each: Skipped) -> str:
    return each.path


def _split_hash(split: Split) -> str:
    return hashlib.sha256(json.dumps(asdict(split), sort_keys=True).encode()).hexdigest()


def _check_held(folder: Path, held: Split | None) -> None:
    """Refuses an index whose pictures were written, added or deleted by other means: they would be lost."""
    path = folder / FOLDER_SPLIT / NOTES / "split.json"
    known = read_json(path).get("splits", []) if held and is_file(path) else []
    if held and _split_hash(held) not in known:
        raise InputError(
            f"{folder}: its pictures were indexed, or changed, without --engine; go on with it as before, or name "
            "another folder"
        )


def _remember(folder: Path, held: Split | None, split: Split) -> None:
    hashes = [_split_hash(each) for each in (held, split) if each]
    write_json(folder / FOLDER_SPLIT / NOTES / "split.json", {"splits": hashes})


def _remove_others(place: Path, split: Split, numbers: set[int]) -> None:
    """Removes shards and notes of an earlier state of the source."""
    kept = {file for shard in split.images for file, _ in shard.files()}
    for path in listing(place):
        if SHARD_NAME.fullmatch(path.name) and path.name not in kept:
            path.unlink()
    for path in listing(place / NOTES):
        if path.stem.isdigit() and int(path.stem) not in numbers:
            with suppress(OSError):
                path.unlink()
