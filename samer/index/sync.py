"""Brings the index of a folder of pictures up to what the folder holds now: new, changed, moved and gone pictures.

What is in the files decides, by the content hash that the index keeps of each; names, sizes and times only save reading
a file that nothing touched (`samer.data.stamps`). The work is bounded by what changed: the others are looked at, and
neither read nor encoded.

Shape letters: K regions, N tokens, D embedding."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from samer.compressors import Compressor, make_compressor
from samer.config import InputError, MergeConfig
from samer.data import stamps
from samer.data.pictures import Found, Picture, PictureError, Skipped, read_picture
from samer.data.records import ImageRecord
from samer.index import pictures
from samer.index.banks import GIVE, held_bank
from samer.index.columns import rename_columns
from samer.index.manifest import IndexSummary, Shard, Split, summarise
from samer.index.pictures import FOLDER_SPLIT, copy_rows
from samer.index.read import Index
from samer.index.tensors import kept_part
from samer.index.write import check_settings, writing
from samer.retrievers.banks import Bank
from samer.retrievers.base import Encoder, image_seeds
from samer.retrievers.family import RefusedPicture
from samer.retrievers.stream import in_batches
from samer.runtime.files import atomic_path, is_dir
from samer.runtime.progress import Progress, batched
from samer.runtime.signals import stop_here

NAMED = 3  # skipped files of a kind that are named; the others are counted
_MANY = 2000  # pictures that take a while to look at


@dataclass(frozen=True)
class Changes:
    """What a run found in a folder and did about it; a picture is counted once, but `skipped` has files of all kinds.

    Attributes:
        new: pictures that the index did not have.
        changed: whose file holds something else than the index knew; it has the new vectors instead.
        gone: that the index had and the folder has not.
        unchanged: whose file holds what it held, whatever its times.
        moved: that the index had under a name that is gone; it has them under their new one instead.
        skipped: files and folders that were not taken.
        unreadable: that the index had and that are there, but can't be read.
        waiting: as `unreadable`, but for a reason that may pass; the index keeps what it had of them.
        unknown: of the unchanged, those of which nobody noted what they held when they were indexed.
        removed: whether the gone and the unreadable were taken out; otherwise the index keeps them.
        left: the folder that they were under when the index was made, if it is another now; else "".
        dead: share of the index's rows that no picture belongs to any more.
    """

    new: int = 0
    changed: int = 0
    gone: int = 0
    unchanged: int = 0
    moved: int = 0
    skipped: Sequence[Skipped] = ()
    unreadable: int = 0
    waiting: int = 0
    unknown: int = 0
    removed: bool = False
    left: str = ""
    dead: float = 0.0

    def lines(self) -> list[str]:
        """What people are told: counts first, then whatever there is to know or to do."""
        counts = {key: getattr(self, key) for key in ("new", "changed", "gone", "unchanged", "moved")}
        counts |= {"skipped": len(self.skipped)} if self.skipped else {}
        lines = [", ".join(f"{count:,} {key}" for key, count in counts.items())]
        if self.left:
            lines.append(
                f"the pictures were under {self.left} when they were indexed; the index knows where they are now"
            )
        parts = {"gone": self.gone, "that can't be read any more": self.unreadable}
        out = " and ".join(f"{count:,} {what}" for what, count in parts.items() if count)
        if out and self.removed:
            lines.append(f"taken out of the index: {out}")
        elif out:
            lines.append(f"still in the index, as they were: {out}; --sync takes them out")
        if self.waiting:
            lines.append(f"still in the index, as they were: {self.waiting:,} that can't be reached just now")
        if self.unknown:
            lines.append(
                f"{self.unknown:,} of the unchanged were indexed by a SaMer that did not note what they held, so edits "
                "since then went unseen; a new index would see them"
            )
        lines += skipped_lines(self.skipped)
        if self.dead > 0.5:
            lines.append(f"{self.dead:.0%} of the index's rows belong to no picture any more; --compact takes them out")
        return lines


def skipped_lines(skipped: Sequence[Skipped]) -> list[str]:
    """A line per reason for which files were not taken, with the first few of them."""
    lines = []
    reasons: dict[str, list[Skipped]] = defaultdict(list)
    for each in skipped:
        reasons[each.reason].append(each)
    for reason, some in reasons.items():
        names = ", ".join(one_field(each.path) for each in some[:NAMED])
        more = f" and {len(some) - NAMED:,} more (--skipped FILE lists them)" if len(some) > NAMED else ""
        lines.append(f"skipped, {reason}: {len(some):,}: {names}{more}; {one_field(some[0].detail)}")
    return lines


class NothingReadable(InputError):
    """Of all the pictures of a folder not one could be read; `skipped` says why of each."""

    def __init__(self, words: str, skipped: Sequence[Skipped]) -> None:
        super().__init__(words)
        self.skipped = skipped


def update_images(
    folder: str | Path,
    found: Found,
    retriever: Encoder,
    merge: MergeConfig,
    *,
    batch_size: int = 32,
    dtype: str = "int8",
    assignments: bool = True,
    remove_gone: bool = False,
    bank: Bank | None = None,
) -> tuple[IndexSummary, Changes]:
    """Brings an index, which is made if it is missing, up to the pictures of a folder.

    A picture's id is its path under the folder. New pictures and those whose file holds something else are encoded; one
    whose content the index has, under whatever name, gets a copy of those vectors. A changed picture's old row and a
    moved one's old name go in the step that brings the new one. After each shard the index on disk holds what is
    written so far, so an interrupted run loses at most `PICTURES_PER_SHARD` pictures' work, and the next goes on.

    Args:
        folder: the index.
        found: its pictures, as `find_pictures` finds them. If they are under another folder than the index says, its
            pictures must be there with the same content; what differs counts as changed, what is missing as gone.
        retriever: with the projector to use; it has `image_inputs`, of pictures at hand.
        merge, batch_size, dtype, assignments: as in `build_index`; the compressor must need no corpus.
        remove_gone: take out pictures that are gone or can't be read any more, unless for a reason that may pass.
        bank: of queries, for a compressor that needs one; None: the index's own.

    Returns:
        What the index holds now, and what changed.

    Raises:
        InputError: as `build_index`; another folder, none of whose pictures the index holds.
        NothingReadable: not one readable picture.
    """
    check_settings(retriever, merge, batch_size, dtype, assignments)
    compressor = make_compressor(merge)
    if compressor.needs_corpus:
        raise InputError(f"{merge.compressor} learns from a whole corpus; an index that grows needs another compressor")
    if compressor.needs_queries:
        bank = bank or held_bank(Path(folder))
        if bank is None:
            raise InputError(f"{merge.compressor} needs a query bank, and there is none beside the projector; {GIVE}")
        compressor.load_state(bank.state)
    with writing(Path(folder), retriever, merge, batch_size, dtype, assignments, bank) as writer:
        update = _Update(writer, found, compressor)
        try:
            update.compare()
            update.fill()
            changes = update.finish(remove_gone)
        finally:
            update.remember()
    return summarise(FOLDER_SPLIT, update.split), changes


@dataclass(frozen=True)
class _Ready:
    """A batch of pictures: what the model needs of those to be encoded, and the contents to be copied, by name."""

    names: list[str]
    contents: list[str]
    inputs: dict[str, Tensor]
    copies: dict[str, str]
    skipped: list[Skipped]


class _Update:
    """One run over a folder: what the index held at its start, what it holds by now, and what is known of the rest."""

    def __init__(self, writer, found: Found, compressor: Compressor) -> None:  # of `writing`
        self.writer, self.compressor, self.root = writer, compressor, str(found.root)
        self.place = writer.folder / FOLDER_SPLIT
        self.listed = list(dict.fromkeys(found.paths))
        self.skipped = list(found.skipped)
        held = writer.manifest.splits.get(FOLDER_SPLIT)
        if held and held.root is None:
            raise InputError(
                f"{writer.folder} holds a data set's split {FOLDER_SPLIT!r}; name another index for pictures"
            )
        self.split = held or Split((), (), self.root)
        same = self.split.root == self.root or os.path.realpath(self.split.root) == os.path.realpath(self.root)
        self.left = "" if same else self.split.root
        self.stamps = stamps.Stamps(self.place / stamps.FILE)
        self.index = Index(writer.folder) if held else None
        self.known = self.index.contents(FOLDER_SPLIT) if held else {}
        self.rows: dict[str, tuple[Shard, int]] = {}  # of the pictures that are to stay, as the run knows by now
        self.sources: dict[str, tuple[Shard, int]] = {}  # content -> a row that was made of it, a dead one too
        for shard, stamp, here in self.index._named(FOLDER_SPLIT) if held else ():
            rows = enumerate(zip(stamp["ids"], here.tolist()))
            self.rows |= {name: (shard, row) for row, (name, live) in rows if live}
            for row, content in enumerate(stamp.get("contents", ())):
                if content and writer.making.merge.compressor != "random":  # what that keeps depends on the name
                    self.sources.setdefault(content, (shard, row))
        self.added: set[str] = set()
        self.unchanged = self.unknown = 0
        self.changed: set[str] = set()  # names that the index holds and whose file differs, or can't be read
        self.gone: set[str] = set()
        self.waiting: set[str] = set()
        self.counts: Counter[str] = Counter()

    def compare(self) -> None:
        """Looks at every picture that the index holds, and takes over another root if the pictures are those.

        Raises:
            InputError: not one is.
        """
        there = [name for name in self.listed if name in self.rows]
        for name in Progress(there, "comparing", unit="images") if len(there) > _MANY else there:
            stop_here()
            same = self._same(name)
            self.unchanged += same is not False
            self.unknown += same is None
            if same is False:
                self.changed.add(name)
        missing = self.rows.keys() - set(there)
        shaky = {each.path for each in self.skipped if each.transient}
        self.waiting = {name for name in missing if _is_below(name, shaky)} if shaky else set()
        self.gone = missing - self.waiting
        if not self.left:
            return
        if self.rows and self.unchanged == self.unknown:
            raise InputError(
                f"{self.writer.folder} holds the pictures of {self.left}; name another index for {self.root}, in which "
                "not one of them is as it was"
            )
        self.split = replace(self.split, root=self.root)
        if self.split.images:
            self.writer.commit(FOLDER_SPLIT, self.split)

    def _same(self, name: str) -> bool | None:
        """Whether a picture's file holds what the index knows; None where it knows nothing, False if it can't be read.

        Who reads it to encode it says what is wrong with it.
        """
        known, file = self.known[name], f"{self.root}/{name}"
        if isinstance(known, str):
            with suppress(InputError):
                return self.stamps.content(name, file) == known
            return False
        try:
            about = os.stat(file)
        except OSError:
            return False
        if not os.access(file, os.R_OK):
            return False
        return known and known == (about.st_size, about.st_mtime_ns)

    def fill(self) -> None:
        """Writes what is new or changed, a shard at a time."""
        moved: dict[str, list[str]] = defaultdict(list)  # content -> names that it had and that are gone
        for name in sorted(self.gone, reverse=True):
            if self.known[name] in self.sources:
                moved[self.known[name]].append(name)
        todo = [name for name in self.listed if name not in self.rows or name in self.changed]
        if not todo:
            return
        chunks = [list(batched(chunk, self.writer.batch_size)) for chunk in batched(todo, pictures.PICTURES_PER_SHARD)]
        every = [batch for chunk in chunks for batch in chunk]
        # nothing more is read if this is interrupted
        with (
            Progress(total=len(todo), desc="images", unit="images") as progress,
            closing(in_batches(self._look, self._prepared, every, self.writer.batch_size)) as stream,
        ):
            for chunk in chunks:
                stop_here()
                self._fill_shard(islice(stream, len(chunk)), moved, progress)

    def _fill_shard(self, stream: Iterable, moved: dict[str, list[str]], progress: Progress) -> None:
        """Encodes pictures, or looks up whose vectors they get, and writes them."""
        names, contents, parts, copies = [], [], [], {}
        for batch, ready in stream:
            if ready.names:
                with torch.no_grad():
                    visual = self.writer.retriever.encode_images(ready.inputs, self.compressor.needs)
                    parts.append(kept_part(self.writer.making, visual, self.compressor(visual)))
            names += ready.names
            contents += ready.contents
            copies |= ready.copies
            self.skipped += ready.skipped
            progress.update(len(batch))
        self._write(names, contents, parts, copies, moved)

    def _look(self, name: str) -> str | Picture | Skipped:
        """The content of a picture that the index has, or else the picture, or why there is none."""
        file = Path(self.root, name)
        try:
            name.encode()
            return self._held_content(name, file) or read_picture(
                file, getattr(self.writer.retriever, "picture_size", None)
            )
        except UnicodeEncodeError:
            return Skipped(name, "name is not UTF-8", f"{name!a}: its name is not UTF-8; rename it")
        except PictureError as error:
            return error.skipped(name)

    def _prepared(self, batch: Sequence[str], found: Sequence[str | Picture | Skipped]) -> _Ready:
        """What is to be done with pictures, by what is in their files."""
        ready, images = _Ready([], [], {}, {}, []), []
        for name, each in zip(batch, found):
            if isinstance(each, str):
                ready.copies[name] = each
            elif isinstance(each, Skipped):
                ready.skipped.append(each)
            else:
                self.stamps.note(name, each.about, each.content)
                images.append(each.image)
                ready.names.append(name)
                ready.contents.append(each.content)
        ready.inputs.update(self._inputs(ready, images))
        return ready

    def _inputs(self, ready: _Ready, images: list[Image]) -> dict[str, Tensor]:
        """What the model needs of pictures; one that it can't be given is skipped, and the others prepared again."""
        while images:
            try:
                inputs = self.writer.retriever.image_inputs(images)
            except RefusedPicture as error:
                name = ready.names.pop(error.number)
                del ready.contents[error.number], images[error.number]
                detail = f"{Path(self.root, name)}: it {error.reason}"
                ready.skipped.append(Skipped(name, "refused by the model", detail))
            else:
                return {**inputs, "seeds": image_seeds(self._records(ready.names))}
        return {}

    def _held_content(self, name: str, file: Path) -> str | None:
        """A file's content, if the index held a picture with that content when the run began."""
        if not self.sources:
            return None
        try:
            content = self.stamps.content(name, file)
        except InputError:  # reading it as a picture says why
            return None
        return content if content in self.sources else None

    def _records(self, names: Sequence[str]) -> list[ImageRecord]:
        return [ImageRecord(name, Path(self.root, name), ()) for name in names]

    def _write(self, names: list[str], contents: list[str], parts: list, copies: dict[str, str], moved: dict) -> None:
        """Writes a shard of what was encoded and one of what is copied; their old rows go in the same step."""
        shards, out = [], []
        number = 1 + max((shard.number for shard in self.split.images), default=-1)
        if names:
            shards.append(self.writer.write_shard(FOLDER_SPLIT, number, self._records(names), parts, contents))
        if copies:
            path = self.place / f"images-{number + len(shards):05d}.safetensors"
            rows = [self.sources[content] for content in copies.values()]
            shards.append(copy_rows(self.index, FOLDER_SPLIT, rows, path, list(copies)))
        renamed: dict[str, str] = {}
        for name in (*names, *copies):
            before = moved.get(copies.get(name))
            if name in self.rows:
                out.append(name)
                self.counts["changed"] += 1
            elif before:
                out.append(before.pop())
                renamed[out[-1]] = name
                self.gone.remove(out[-1])
                self.counts["moved"] += 1
            else:
                self.counts["new"] += 1
            self.added.add(name)
        if shards:
            self._commit(shards, out)
            rename_columns(self.writer.folder, FOLDER_SPLIT, renamed)

    def _commit(self, shards: Sequence[Shard], out: Iterable[str]) -> None:
        """Makes new shards visible, and old rows invisible, in one step."""
        rows: dict[str, set[int]] = defaultdict(set)
        for name in out:
            shard, row = self.rows.pop(name)
            rows[shard.file].add(row)
        deleted = dict(self.split.deleted)
        for file, more in rows.items():
            deleted[file] = tuple(sorted(more.union(deleted.get(file, ()))))
        images = (*self.split.images, *shards)
        self.split = replace(self.split, images=images, deleted=dict(sorted(deleted.items())))
        self.writer.commit(FOLDER_SPLIT, self.split)

    def finish(self, remove_gone: bool) -> Changes:
        """Takes out what is to go, and counts.

        Raises:
            NothingReadable: there was not one readable picture; nothing was changed then.
        """
        if not (self.unchanged or self.added):
            what = f"not one readable picture among {len(self.listed):,} files" if self.listed else "no pictures in it"
            why = f"; first: {self.skipped[0].detail}" if self.skipped else ""
            stays = f"; {self.writer.folder} keeps the {len(self.rows):,} that it has" if self.rows else ""
            raise NothingReadable(f"{self.root}: {what}{why}{stays}", self.skipped)
        self.skipped.sort(key=lambda each: each.path)
        lost = self.changed & self.rows.keys()
        self.waiting |= lost & {each.path for each in self.skipped if each.transient}
        places = {each.path for each in self.skipped}
        lost = (lost - self.waiting) | {name for name in self.gone if _is_below(name, places)}
        self.gone -= lost
        if remove_gone and (self.gone or lost):
            self._commit((), self.gone | lost)
        total = sum(shard.count for shard in self.split.images)
        return Changes(
            **self.counts,
            gone=len(self.gone),
            unchanged=self.unchanged,
            skipped=tuple(self.skipped),
            unreadable=len(lost),
            waiting=len(self.waiting),
            unknown=self.unknown,
            removed=remove_gone,
            left=self.left,
            dead=sum(map(len, self.split.deleted.values())) / total,
        )

    def remember(self) -> None:
        """Writes down which files need not be read again, as far as the run came; only time is lost without."""
        if is_dir(self.place):
            self.stamps.forget_others({*self.rows, *self.added})
            with suppress(InputError):
                self.stamps.write()


def _is_below(name: str, places: set[str]) -> bool:
    """Whether a path is one of these, or lies below one."""
    while name and name not in places:
        name = name.rpartition("/")[0]
    return bool(name)


def one_field(text: str) -> str:
    """Text as one field of a line that can be read back: a backslash doubled, what can't be printed escaped.

    `runtime.streams.printable` is for eyes only.
    """
    odd = lambda c: c == "\\" or not c.isprintable()
    return "".join(c.encode("unicode_escape", "backslashreplace").decode() if odd(c) else c for c in text)


def write_skipped(file: str | Path, skipped: Sequence[Skipped]) -> None:
    """Writes a line per file or folder that was not taken: path, reason and detail with tabs between; none: empty.

    Raises:
        InputError: it can't be written.
    """
    lines = ("\t".join(map(one_field, (each.path, each.reason, each.detail))) + "\n" for each in skipped)
    with atomic_path(file) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", newline="\n")
