"""Threads that work ahead of their caller: order, bounds, errors, and what becomes of work when somebody stops."""

import gc
import itertools
import subprocess
import sys
import threading

import pytest

from samer.runtime.progress import prefetched, prepared


def ended():
    """Waits for all threads of pools."""
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(60)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_their_items(workers):
    """Every item waits for the one behind it, as far as the pool is wide: results are ready in another order."""
    events = [threading.Event() for _ in range(41)]
    events[40].set()

    def work(number):
        if number % workers != workers - 1:
            assert events[number + 1].wait(60)
        events[number].set()
        return number * number

    found = list(prepared(work, range(40), workers, ahead=workers))
    assert found == [(number, number * number) for number in range(40)]


def test_so_many_work_at_once_and_no_further_ahead_is_read():
    at_work, most, lock, together = 0, 0, threading.Lock(), threading.Barrier(3, timeout=60)
    given = itertools.count()
    read = []

    def items():
        for number in given:
            read.append(number)
            yield number

    def work(number):
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        if number < 3:
            together.wait()  # passes only where three are at work
        with lock:
            at_work -= 1
        return number

    stream = prepared(work, items(), 3, ahead=7)
    for number in range(50):
        assert next(stream) == (number, number)
        assert len(read) == number + 8
    stream.close()
    ended()
    assert most == 3


def test_an_error_is_raised_at_its_item_and_what_has_not_begun_is_dropped():
    begun, go_on, found = [], threading.Event(), []

    def work(number):
        begun.append(number)
        if number == 2:
            raise ValueError("two")
        if number > 2:
            assert go_on.wait(60)
        return number

    def collect():
        for item, _ in prepared(work, range(1000), 2, ahead=20):
            found.append(item)
            if item == 1:
                go_on.set()

    with pytest.raises(ValueError, match="two"):
        collect()
    ended()
    assert found == [0, 1]
    assert len(begun) <= 23


def test_what_was_given_is_finished_where_the_items_fail():
    """As a shard that is being written while the next is encoded, and that fails."""
    done, go_on = [], threading.Event()

    def items():
        yield from range(3)
        threading.Timer(0.05, go_on.set).start()
        raise OSError("the next one")

    def write(number):
        assert go_on.wait(60)
        done.append(number)

    with pytest.raises(OSError, match="the next one"):
        list(prepared(write, items(), 1, ahead=10))
    assert done == [0, 1, 2]


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_closed_early_it_waits_for_no_thread_and_begins_nothing_more(how):
    entered, go_on, done = threading.Barrier(3, timeout=60), threading.Event(), []

    def slow(number):
        if number:
            entered.wait()
            assert go_on.wait(60)
        done.append(number)

    stream = prepared(slow, range(100), 2, ahead=30)
    assert next(stream) == (0, None)
    entered.wait()
    if how == "closed":
        stream.close()  # would not return before `go_on`
    else:
        del stream
        gc.collect()
    assert done == [0]
    go_on.set()
    ended()
    assert sorted(done) == [0, 1, 2]


def test_a_stream_within_a_stream_ends_with_it():
    """Both are run by the caller's thread, so closing the outer one closes the inner one, whatever threads do."""
    state, read = [], []

    def inner():
        try:
            for number in range(100):
                read.append(number)
                yield number
        finally:
            state.append("closed")

    pictures = prepared(str, inner(), 2, ahead=4)
    groups = (list(itertools.islice(pictures, 2)) for _ in range(50))
    outer = prefetched(len, groups)
    assert next(outer) == ([(0, "0"), (1, "1")], 2)
    outer.close()
    del outer, groups, pictures
    gc.collect()
    assert state == ["closed"]
    assert len(read) < 20


def test_a_result_is_held_by_its_caller_only():
    class Large:
        alive = 0

        def __init__(self, _):
            Large.alive += 1

        def __del__(self):
            Large.alive -= 1

    most = 0
    for _, large in prepared(Large, range(50), 1, ahead=3):
        most = max(most, Large.alive)
        del large
    ended()
    assert most <= 5
    assert Large.alive == 0


def test_an_interpreter_ends_while_threads_are_ahead():
    """At its end Python waits for threads: of a stream that was closed, only for what has begun."""
    code = """
import time
from contextlib import closing
from samer.runtime.progress import prepared

def slow(number):
    if number:
        time.sleep(0.5)
    return number

stream = prepared(slow, range(10_000), 2, ahead=5_000)
with closing(stream):
    assert next(stream) == (0, 0)
    raise KeyboardInterrupt
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stderr.strip().endswith("KeyboardInterrupt")
