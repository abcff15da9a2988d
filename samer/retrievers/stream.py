"""Batches of images on their way to an encoder: pictures are read by several threads, whole batches prepared by one.

All of a run's batches are one row, so that no thread waits at the end of a shard or a chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, TypeVar

from torch import Tensor

from samer.data.contents import Contents
from samer.data.records import ImageRecord
from samer.retrievers.base import Encoder
from samer.runtime.processes import threads
from samer.runtime.progress import prefetched, prepared

Item, Read, Ready = TypeVar("Item"), TypeVar("Read"), TypeVar("Ready")


def in_batches(
    read: Callable[[Item], Read],
    prepare: Callable[[Sequence[Item], list[Read]], Ready],
    batches: Iterable[Sequence[Item]],
    ahead: int,
) -> Iterator[tuple[Sequence[Item], Ready]]:
    """Pairs (batch, what `prepare` makes of it and of what was read for each of its items), in order.

    Whoever may stop before the end closes it: nothing more is read then.

    Args:
        read: of one item, in one of as many threads as `samer.runtime.processes.threads` says.
        prepare: of a batch, in a thread of its own, one batch at a time; an error of either is raised at its batch.
        batches: none is empty; they are asked for by the caller's thread.
        ahead: how many items are read ahead of the batch that is prepared meanwhile, such as those of one batch.
    """

    def attempt(item: Item) -> tuple[Read | None, BaseException | None]:
        try:
            return read(item), None
        except BaseException as error:  # raised at its batch: those before it are finished
            return None, error

    def make(group: tuple[Sequence[Item], list]) -> Ready:
        batch, rows = group
        for _, error in rows:
            if error is not None:
                raise error
        values = [value for value, _ in rows]
        rows.clear()  # pictures are held no longer than they must be
        return prepare(batch, values)

    begun: deque[Sequence[Item]] = deque()

    def every() -> Iterator[Item]:
        for batch in batches:
            begun.append(batch)
            yield from batch

    def groups(reading: Iterator) -> Iterator[tuple[Sequence[Item], list]]:
        for _, first in reading:
            batch = begun.popleft()
            yield batch, [first, *(value for _, value in islice(reading, len(batch) - 1))]

    with (
        closing(prepared(attempt, every(), threads(), ahead)) as reading,
        closing(prefetched(make, groups(reading))) as stream,
    ):
        for (batch, _), ready in stream:
            yield batch, ready


def read_images(
    encoder: Encoder, batches: Sequence[Sequence[ImageRecord]], contents: Contents | None = None
) -> Iterator[tuple[Sequence[ImageRecord], tuple[list[str | None], dict[str, Tensor]]]]:
    """Pairs (batch, (content hashes of its files, inputs as `Encoder.record_inputs`)); to be closed as `in_batches`.

    A file is hashed, where `contents` are given, before it is decoded: if it is replaced in between, the next run sees
    it.

    Raises:
        InputError: at its batch, a picture that can't be read or given to the model.
    """

    def read(record: ImageRecord) -> tuple[str | None, Any]:
        found = contents.of([record])[0] if contents else None
        return found, encoder.picture(record)

    def prepare(batch: Sequence[ImageRecord], rows: list[tuple[str | None, Any]]) -> tuple[list, dict[str, Tensor]]:
        hashes, pictures = [list(column) for column in zip(*rows)]
        rows.clear()
        given = () if None in pictures else (pictures,)
        return hashes, encoder.record_inputs(batch, *given)

    return in_batches(read, prepare, batches, max(map(len, batches), default=1))
