"""What a Pool has beyond the standard library's: memory limits, shared state in its calls."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from waiting import until

from taskrun import Pool, state
from taskrun.errors import WorkerLost
from taskrun.pooling.memory import Limits, limits, used
from taskrun.state.local import forget

pytestmark = pytest.mark.timeout(120)

METHODS = ["fork", "forkserver", "spawn"]
SECONDS = 60
MB = 1_000_000


# -- memory ---------------------------------------------------------------------------

kept: list[mmap.mmap] = []


def fresh(size: int) -> mmap.mmap:
    """So much memory more: not such as this process has had before, and may have left."""
    block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, mmap.PAGESIZE):
        block[at] = 1
    return block


def used_in_a_worker() -> int:
    """Less than what this process uses, of which a worker that is forked has not all."""
    with Pool(1) as pool:
        return int(pool.apply(used))


def keep(size: int) -> int:
    kept.append(fresh(size))
    return os.getpid()


def take(size: int) -> None:
    with fresh(size):
        time.sleep(SECONDS)


def pid(_: Any = None) -> int:
    return os.getpid()


def test_a_worker_that_uses_more_than_maxrss_is_replaced_after_its_call() -> None:
    with Pool(1, maxrss=used_in_a_worker() + 50 * MB) as pool:
        first = pool.apply(pid)
        assert pool.apply(keep, (MB,)) == first
        assert pool.apply(keep, (80 * MB,)) == first  # the call itself ends well
        until(lambda: pool.apply(pid) != first)
        second = pool.apply(pid)
        assert [pool.apply(pid) for _ in range(5)] == [second] * 5


def test_no_call_is_lost_where_workers_are_replaced_again_and_again() -> None:
    with Pool(2, maxrss=used_in_a_worker() + 20 * MB) as pool:
        pids = pool.map(keep, [15 * MB] * 12, chunksize=1)
    assert len(pids) == 12 and len(set(pids)) > 2


def test_a_call_that_takes_more_than_the_hard_limit_is_lost_and_says_why() -> None:
    here = used_in_a_worker()
    with Pool(2, maxrss=(None, here + 100 * MB)) as pool:
        greedy = pool.apply_async(take, (300 * MB,))
        assert pool.apply(keep, (MB,)) > 0
        with pytest.raises(WorkerLost, match=r"used \d+ MB of memory and maxrss is \d+ MB"):
            greedy.get(SECONDS)
        assert len(set(pool.map(pid, range(8), chunksize=1))) <= 3


@pytest.mark.parametrize(
    ("said", "means"),
    [
        (None, Limits()),
        (1000, Limits(1000)),
        ("2G", Limits(2_000_000_000)),
        (("1Gi", "2Gi"), Limits(1 << 30, 1 << 31)),
        ((None, 5), Limits(None, 5)),
    ],
)
def test_how_a_limit_is_said(said: Any, means: Limits) -> None:
    assert limits(said) == means


def test_a_limit_that_is_none_says_so() -> None:
    with pytest.raises(ValueError, match=r"maxrss: .*much"):
        Pool(1, maxrss="much")


# -- shared state ---------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    forget()
    yield
    forget()


def count(number: int) -> int:
    return state.counter("calls").add(number)


def note(number: int) -> None:
    state.dict("seen")[number] = os.getpid()


def wait_for(name: str) -> Any:
    return state.queue(name).get(timeout=SECONDS)


def put(number: int) -> None:
    state.queue(f"q{number}").put(number)


def hold(name: str) -> None:
    state.lock(name).acquire()


def hold_and_die(name: str) -> None:
    state.lock(name).acquire()
    os._exit(3)


def add_slowly(_: int) -> None:
    with state.lock("slow"):
        found = state.dict("sum").get("n", 0)
        time.sleep(0.001)
        state.dict("sum")["n"] = found + 1


def nested(number: int) -> int:
    with Pool(1) as pool:
        return sum(pool.map(count, [number] * 3)) and os.getpid()


@pytest.mark.parametrize("method", METHODS)
def test_calls_share_state_with_each_other_and_with_the_parent(method: str) -> None:
    with Pool(2, context=multiprocessing.get_context(method)) as pool:
        pool.map(count, range(10), chunksize=1)
        pool.map(note, range(4), chunksize=1)
    assert state.counter("calls").get() == 45
    assert sorted(state.dict("seen")) == [0, 1, 2, 3]


def test_the_parent_sends_through_a_queue_while_it_waits_for_the_call() -> None:
    with Pool(2) as pool:
        result = pool.apply_async(wait_for, ("q",))
        sender = threading.Timer(0.2, lambda: state.queue("q").put("hello"))
        sender.start()
        assert result.get(SECONDS) == "hello"
        sender.join()


def test_a_callback_may_use_state_that_a_call_waits_for() -> None:
    with Pool(2) as pool:
        waits = pool.apply_async(wait_for, ("q",))
        pool.apply_async(pid, callback=lambda value: state.queue("q").put(value))
        assert waits.get(SECONDS) > 0


def test_a_short_call_that_those_before_it_wait_for_is_not_kept_back() -> None:
    with Pool(2) as pool:
        for _ in range(8):  # so that it is known how long one takes
            pool.apply_async(put, (0,)).get(SECONDS)
        waiting = [pool.apply_async(wait_for, ("q1",)) for _ in range(4)]
        for _ in waiting:
            pool.apply_async(put, (1,)).get(SECONDS / 3)
        assert [result.get(SECONDS) for result in waiting] == [1] * 4


def test_a_lock_excludes_calls_of_two_pools() -> None:
    with Pool(2) as one, Pool(2) as other:
        results = [pool.map_async(add_slowly, range(20), chunksize=1) for pool in (one, other)]
        for result in results:
            result.get(SECONDS)
    assert state.dict("sum")["n"] == 40


@pytest.mark.parametrize("function", [hold, hold_and_die])
def test_what_a_call_holds_is_free_when_it_has_ended(function: Any) -> None:
    with Pool(2) as pool:
        result = pool.apply_async(function, ("held",))
        result.wait(SECONDS)
        pool.apply(hold, ("held",), timeout=SECONDS)


def test_a_pool_in_a_call_has_the_state_of_the_call() -> None:
    with Pool(2) as pool:
        pool.map(nested, [1, 2], chunksize=1)
    assert state.counter("calls").get() == 9
