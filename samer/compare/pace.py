"""What is left of a comparison, and about how long it takes by what was timed so far."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from samer.runtime.processes import print0

Job = tuple[str, int]  # name of a projector, and seed


class Pace:
    """Counts trainings and measurements down, and times them; what was there already is not timed."""

    def __init__(self, trainings: Mapping[Job, int], measurements: Mapping[Job, int]) -> None:
        """What is to be done.

        Args:
            trainings: 1 for every projector that is not there yet.
            measurements: how many compressions are to be measured with a projector.
        """
        self.left = {"trainings": dict(trainings), "measurements": dict(measurements)}
        self.seconds = {"trainings": 0.0, "measurements": 0.0}
        self.done = {"trainings": 0, "measurements": 0}
        self.expected: float | None = None  # seconds of a training, by its first steps

    def expect(self, seconds: float) -> None:
        """Says, by the first steps of the first training, how long all of them take."""
        count = 1 + sum(self.left["trainings"].values())
        if self.expected is None and not self.done["trainings"] and count > 1:
            self.expected = seconds
            print0(
                f"trainings: about {spoken(seconds)} each by its first steps, so {count} take {spoken(count * seconds)}"
            )

    @contextmanager
    def timed(self, kind: str, job: Job) -> Iterator[None]:
        """Times a job of `trainings` or `measurements`; after the first of its kind says how long the rest takes."""
        started, count = time.monotonic(), self.left[kind].pop(job, 0)
        yield
        if not count:
            return
        first = not self.done[kind]
        self.seconds[kind] += time.monotonic() - started
        self.done[kind] += count
        if first and self.left[kind]:
            each = self.seconds[kind] / self.done[kind]
            rest = sum(self.left[kind].values())
            print0(f"{kind}: {spoken(each)} each, so {rest} more take about {spoken(rest * each)}")

    def __str__(self) -> str:
        left = {kind: sum(jobs.values()) for kind, jobs in self.left.items()}
        words = " and ".join(f"{count} {kind[: -1 if count == 1 else None]}" for kind, count in left.items() if count)
        if not words:
            return "nothing left to train or measure"
        timed = [kind for kind, count in left.items() if count and self.done[kind]]
        if len(timed) < sum(map(bool, left.values())):
            return f"{words} to go"
        seconds = sum(left[kind] * self.seconds[kind] / self.done[kind] for kind in timed)
        return f"{words} to go, about {spoken(seconds)}"


def spoken(seconds: float) -> str:
    """A time as people say it: 8.2 s, 14 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
