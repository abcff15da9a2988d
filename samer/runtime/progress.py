"""Long work: progress, batches, and reading ahead in a thread."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from samer.runtime.processes import rank


class Progress(tqdm):
    """A progress bar on a terminal; in a log, or on one that moves no cursor, plain lines: first, half-minutely, last.

    Takes what tqdm takes. Only the first process shows it.
    """

    def __init__(self, *words: Any, **settings: Any) -> None:
        self.plain = sys.stderr is None or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
        if self.plain:
            line = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} since the start, about {remaining} to go"
            settings |= {"mininterval": 30, "maxinterval": 30, "miniters": 1, "bar_format": line}
        super().__init__(*words, **settings, disable=rank() != 0 or sys.stderr is None)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Shows the current state, as tqdm asks for it."""
        if self.plain:
            print(self, file=sys.stderr, flush=True)
        else:
            super().display(msg, pos)

    def close(self) -> None:
        """Shows the last state; tqdm would move a cursor that a log has not."""
        if self.plain and not self.disable:
            self.display()
            self.disable = True
        super().close()


def prefetched(function: Callable[[Any], Any], items: Iterable) -> Iterator[tuple[Any, Any]]:
    """Pairs (item, function(item)) in order; the next result is computed in a thread while the caller uses this one.

    Also the other way round: where `items` is the work, `function` may store each result while the next is made. For
    what waits or releases Python's lock, such as decoding images; an error is raised at its item.
    """
    return prepared(function, items, 1)


def prepared(
    function: Callable[[Any], Any], items: Iterable, workers: int, ahead: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """Pairs (item, function(item)) in order, computed by a pool of threads while the caller uses those before.

    An error of `function` is raised at its item, and what has not begun by then is dropped. Where `items` itself fails,
    all that it gave before is finished first. `items` is only ever run by the caller's thread.

    Args:
        function: what is done with an item; waits, or releases Python's lock.
        items: may be endless; read no further than `ahead`.
        workers: threads, at least 1.
        ahead: how many results beyond the one in the caller's hands may be there or at work; None: one a thread.
    """
    pool = ThreadPoolExecutor(max_workers=workers)
    ahead = workers if ahead is None else max(ahead, workers)
    waiting: deque[tuple[Any, Future]] = deque()
    wait, drop = True, False
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            del item  # it may be large, and the caller's by then
            if len(waiting) > ahead:
                drop = True
                yield _first(waiting)
                drop = False
        drop = True
        while waiting:
            yield _first(waiting)
    except GeneratorExit:
        wait = False
        raise
    finally:
        # Closed early, perhaps by the garbage collector, which may run where a thread is being started and locks are
        # held: to wait for a thread there would be to wait for ever. Each ends by itself after the item it is at.
        pool.shutdown(wait=wait, cancel_futures=drop)


def _first(waiting: deque[tuple[Any, Future]]) -> tuple[Any, Any]:
    """The longest waiting item and its result, which are held nowhere else then."""
    item, future = waiting.popleft()
    return item, future.result()


def batched(items: Sequence, size: int) -> Iterable[Sequence]:
    """Consecutive slices of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))
