"""Round trips of small calls, the shortest way: whatever comes in between, nothing is lost."""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from interrupting import at_each_step, broken_off_at, interrupted_at
from waiting import until

from taskrun.errors import CallCancelled, WorkerLost
from taskrun.flag import Flag
from taskrun.pool import AsyncResult, Pool
from taskrun.pooling.looping import _event_of

SECONDS = 30.0


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    faulthandler.dump_traceback_later(90, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Opens what ``wait_for`` waits for."""
    path = tmp_path / "gate"
    os.environ["TRIPS_GATE"] = str(path)
    yield path.touch
    del os.environ["TRIPS_GATE"]


@pytest.fixture
def pool(gate: Any) -> Iterator[Pool]:
    with Pool(2, context=multiprocessing.get_context("fork")) as pool:
        yield pool


def double(x: int) -> int:
    return 2 * x


def fail(x: int) -> int:
    raise ValueError(x)


def long(x: int) -> bytes:
    return b"x" * x


def wait_for(x: int) -> int:
    path = os.environ["TRIPS_GATE"]
    Path(f"{path}.{x}").touch()
    end = time.monotonic() + SECONDS
    while not os.path.exists(path) and time.monotonic() < end:
        time.sleep(0.001)
    return x


def has_begun() -> bool:
    """Whether ``wait_for(5)`` has."""
    return os.path.exists(os.environ["TRIPS_GATE"] + ".5")


def on_trip(pool: Pool, function: Callable[[int], Any], argument: int) -> AsyncResult:
    """The result of a call that has gone directly to a worker, and is in nobody's books."""
    end = time.monotonic() + SECONDS
    warmers = [double] if function is wait_for else [double, function]
    while time.monotonic() < end:
        for warmer in warmers:
            pool.map(warmer, range(4), 1)
            pool.apply(warmer, (1,))
        result = pool.apply_async(function, (argument,))
        if pool._driver._trips.bunch is not None:
            return result
        result.cancel()
        result.wait(SECONDS)
        Path(os.environ["TRIPS_GATE"] + ".5").unlink(missing_ok=True)
    pytest.fail("no call went directly")


def test_trips_give_what_usual_calls_give(pool: Pool) -> None:
    for x in range(200):
        assert pool.apply(double, (x,)) == 2 * x
        assert pool.apply_async(double, (x,)).get(SECONDS) == 2 * x
        with pytest.raises(ValueError, match=str(x)):
            pool.apply(fail, (x,))
    for size in (0, 100, 5_000, 1_000_000):
        assert on_trip(pool, long, size).get(SECONDS) == b"x" * size


def test_the_outcome_of_a_trip_names_the_worker(pool: Pool) -> None:
    result = on_trip(pool, double, 4)
    before = time.time()
    assert result.get(SECONDS) == 8
    outcome = result.outcome
    assert outcome is not None and outcome.attempts == 1
    assert (outcome.worker, outcome.pid) in [(each.name, each.pid) for each in pool.workers()]
    assert abs(outcome.began - before) < SECONDS and 0 <= outcome.seconds < SECONDS


def test_a_trip_ends_though_nobody_waits(pool: Pool) -> None:
    result = on_trip(pool, double, 4)
    until(result.ready)
    assert result.get(0) == 8


def test_get_gives_up_in_time_and_succeeds_later(pool: Pool, gate: Callable[[], None]) -> None:
    result = on_trip(pool, wait_for, 5)
    start = time.monotonic()
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(0.05)
    assert 0.05 <= time.monotonic() - start < SECONDS / 2
    gate()
    assert result.get(SECONDS) == 5


@pytest.mark.parametrize("waits", [False, True])
def test_a_worker_that_is_killed_on_a_trip_costs_that_call(pool: Pool, waits: bool) -> None:
    result = on_trip(pool, wait_for, 5)
    pids = [worker.pid for worker in pool.workers()]

    def kill_all() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    until(has_begun)
    kill = threading.Timer(0.05 if waits else 0.0, kill_all)
    kill.start()
    if not waits:
        kill.join()
    with pytest.raises(WorkerLost):
        result.get(SECONDS)
    kill.join()
    assert pool.apply(double, (3,)) == 6


def test_a_worker_that_was_killed_before_its_trip_costs_nothing(pool: Pool) -> None:
    for _ in range(5):
        assert on_trip(pool, double, 1).get(SECONDS) == 2
        for worker in pool.workers():
            os.kill(worker.pid, signal.SIGKILL)
        assert pool.apply(double, (2,)) == 4


@pytest.mark.parametrize("waits", [False, True])
def test_a_trip_can_be_cancelled(pool: Pool, waits: bool) -> None:
    result = on_trip(pool, wait_for, 5)
    cancel = threading.Timer(0.05 if waits else 0.0, result.cancel)
    cancel.start()
    if not waits:
        cancel.join()
    with pytest.raises(CallCancelled):
        result.get(SECONDS)
    cancel.join()
    assert pool.apply(double, (3,)) == 6


def test_calls_beside_a_trip_run_on_the_other_worker(pool: Pool, gate: Callable[[], None]) -> None:
    first = on_trip(pool, wait_for, 5)
    assert [pool.apply(double, (x,)) for x in range(20)] == [2 * x for x in range(20)]
    assert not first.ready()
    gate()
    assert first.get(SECONDS) == 5


def test_close_waits_for_a_trip_and_terminate_ends_it(gate: Callable[[], None]) -> None:
    for end in ("close", "terminate"):
        pool = Pool(2, context=multiprocessing.get_context("fork"))
        result = on_trip(pool, wait_for, 5)
        getattr(pool, end)()
        if end == "close":
            gate()
        pool.join()
        if end == "close":
            assert result.get(SECONDS) == 5
        else:
            assert result.ready()


def test_many_threads_make_trips_at_once(pool: Pool) -> None:
    wrong: list[Any] = []

    def work(number: int) -> None:
        for x in range(number, number + 300):
            found = pool.apply(double, (x,)), pool.apply_async(double, (x,)).get(SECONDS)
            if found != (2 * x, 2 * x):
                wrong.append((x, found))

    threads = [threading.Thread(target=work, args=(1000 * n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not wrong and not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("size", [1, 300_000])
def test_an_interrupt_amid_a_submission_costs_no_other_call(pool: Pool, size: int) -> None:
    argument = b"x" * size
    steps = 0
    while broken_off_at(steps, lambda: pool.apply_async(len, (argument,))):
        assert pool.apply_async(double, (steps,)).get(SECONDS) == 2 * steps
        steps += 1
    assert steps > 10


def test_who_interrupts_a_submission_may_submit_and_wait(pool: Pool) -> None:
    # As a signal handler may; with a callback, since a trip puts signals off.
    found: list[int] = []

    def submit_and_wait() -> None:
        assert pool.apply_async(double, (21,), callback=found.append).get(SECONDS) == 42

    pool.apply(double, (1,))
    for arguments in ((1,), (b"x" * 10_000,)):
        action = partial(pool.apply_async, double, arguments, callback=found.append)
        assert at_each_step(action, submit_and_wait) > 10
    assert 42 in found


def test_who_interrupts_a_submission_may_wait_for_what_another_thread_submits(pool: Pool) -> None:
    def wait_for_the_feeding_thread() -> None:
        values = pool.imap_unordered(double, [21])
        assert values.next(SECONDS) == 42
        with pytest.raises(StopIteration):  # which that thread tells
            values.next(SECONDS)

    large, steps = b"x" * 10_000, 0
    action = partial(pool.apply_async, double, (large,))
    while interrupted_at(steps, action, wait_for_the_feeding_thread):
        assert pool.apply(double, (large,)) == 2 * large  # and what was submitted is taken
        steps += 1
    assert steps > 10


# Where it comes while a weak reference is let go of, it is only shown.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_amid_an_imap_keeps_nobody_from_joining_the_pool() -> None:
    steps = 0

    def begin() -> None:
        with suppress(RuntimeError):  # so says the standard library's lock, broken off
            pool.imap(double, itertools.repeat(1, 3))

    with Pool(2, context=multiprocessing.get_context("fork")) as pool:
        while broken_off_at(steps, begin):
            steps += 1
        pool.close()
        assert pool._driver.loop.finished.wait(SECONDS)
    assert steps > 10


def test_an_imap_that_could_not_begin_reads_no_more(pool: Pool) -> None:
    # Its thread may have started, and the interrupt come while that was waited for.
    started, read = threading.Event(), threading.Event()

    def endless() -> Iterator[int]:
        started.set()
        assert read.wait(SECONDS)
        yield from itertools.repeat(1)

    usual = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        usual(thread)
        assert started.wait(SECONDS)
        raise KeyboardInterrupt

    threading.Thread.start = start  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.imap(double, endless())
    finally:
        threading.Thread.start = usual  # type: ignore[method-assign]
        read.set()
    pool.close()
    assert pool._driver.loop.finished.wait(SECONDS)


def test_all_who_are_about_to_wait_for_a_result_wait_for_the_same(pool: Pool) -> None:
    result = AsyncResult(pool, None, None)
    events: list[Flag] = []

    def wait() -> None:
        events.append(_event_of(result))

    def wait_in_another_thread() -> None:
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        thread.join(SECONDS)

    steps = 0
    while interrupted_at(steps, wait, wait_in_another_thread):
        assert len(events) == 2 and events[0] is events[1] is result.event
        events.clear()
        result.event = None
        steps += 1
    assert steps > 3


@pytest.mark.parametrize(
    "submit", [partial(Pool.apply_async, args=(3,)), partial(Pool.map_async, iterable=range(6))]
)
def test_threads_that_get_one_result_at_once_get_the_same(
    pool: Pool, submit: Callable[[Pool, Any], AsyncResult]
) -> None:
    # Also where one of them is interrupted by who waits for another.
    found: list[Any] = []

    def get(result: AsyncResult) -> None:
        found.append(result.get(SECONDS))

    def get_in_another_thread(result: AsyncResult) -> None:
        thread = threading.Thread(target=get, args=(result,), daemon=True)
        thread.start()
        thread.join(SECONDS)

    for interrupt in (get, get_in_another_thread):
        steps = 0
        while True:
            result = submit(pool, long)
            result.wait(SECONDS)
            if not interrupted_at(steps, partial(get, result), partial(interrupt, result)):
                break
            assert len(found) == 2 and found[0] is found[1]
            found.clear()
            steps += 1
        assert steps > 10
        found.clear()


def test_threads_that_take_from_one_iterator_at_once_lose_nothing(pool: Pool) -> None:
    found: list[int] = []
    steps = 0
    while True:
        values = pool.imap(double, range(12), chunksize=3)
        until(lambda values=values: len(values._came) == 4)

        def take(values: Any = values) -> None:
            found.append(values.next(SECONDS))

        if not interrupted_at(steps, take, take):
            break
        assert sorted([*found, *values]) == [2 * x for x in range(12)]
        found.clear()
        steps += 1
    assert steps > 10


def test_an_interrupt_ends_a_trip_that_the_main_thread_waits_for(
    pool: Pool, gate: Callable[[], None]
) -> None:
    result = on_trip(pool, wait_for, 5)
    timer = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        result.get(SECONDS)
    timer.join()
    gate()
    assert result.get(SECONDS) == 5
    assert pool.apply(double, (3,)) == 6


def test_results_come_while_many_calls_are_being_submitted(pool: Pool) -> None:
    # Who submits keeps the interpreter to himself; yet the workers are to be at work meanwhile.
    came: list[int] = []
    pool.map(double, range(100))
    deadline = time.monotonic() + SECONDS
    while True:
        came.clear()
        results = [pool.apply_async(double, (n,), callback=came.append) for n in range(30_000)]
        early = len(came)
        results[-1].get(SECONDS)
        if early > 3_000:
            break
        assert time.monotonic() < deadline, f"{early} of {len(results)} calls had ended"
