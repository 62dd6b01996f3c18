"""Small calls of a Pool, which travel in bunches: each of them is a call all the same."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.pool import MaybeEncodingError  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from taskrun.errors import CallCancelled, WorkerLost
from taskrun.pool import AsyncResult, Pool

SECONDS = 30.0
WARM = 300  # calls after which the pool knows that they are small

# What calls do beside giving their argument back, by argument; inherited by the workers.
DEEDS: dict[int, Callable[[], Any]] = {}
LOG = -1


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    faulthandler.dump_traceback_later(90, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def log(tmp_path: Path) -> Iterator[Path]:
    """Where each call writes its argument when it begins."""
    global LOG
    LOG = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    yield tmp_path / "log"
    os.close(LOG)
    DEEDS.clear()


def act(x: int) -> Any:
    os.write(LOG, b"%d\n" % x)
    deed = DEEDS.get(x)
    return x if deed is None else deed()


def begun(log: Path) -> collections.Counter[int]:
    """How often calls have begun, by argument; those that warmed the pool are below zero."""
    return collections.Counter(x for x in map(int, log.read_text().split()) if x >= 0)


def warm(processes: int = 2, **options: Any) -> Pool:
    pool = Pool(processes, context=multiprocessing.get_context("fork"), **options)
    for result in [pool.apply_async(act, (-1 - number,)) for number in range(WARM)]:
        result.get(SECONDS)
    return pool


def submit(pool: Pool, count: int) -> list[AsyncResult]:
    return [pool.apply_async(act, (x,)) for x in range(count)]


def ended(result: AsyncResult) -> Any:
    """The value, or the class of the error."""
    try:
        return result.get(SECONDS)
    except Exception as error:
        return type(error)


def wait_for(path: Path) -> Callable[[], str]:
    def wait() -> str:
        while not path.exists():
            time.sleep(0.002)
        return "waited"

    return wait


def test_each_has_its_value_its_callback_and_its_outcome(log: Path) -> None:
    called: list[int] = []
    with warm() as pool:
        results = [pool.apply_async(act, (x,), callback=called.append) for x in range(5000)]
        assert [result.get(SECONDS) for result in results] == list(range(5000))
        pids = {worker.pid for worker in pool.workers()}
    assert sorted(called) == list(range(5000))
    assert begun(log) == collections.Counter(range(5000))
    outcomes = [result.outcome for result in results]
    assert {outcome.pid for outcome in outcomes if outcome} <= pids
    assert all(outcome and 0 < outcome.seconds < 10 for outcome in outcomes)
    assert all(outcome and abs(outcome.began - time.time()) < 60 for outcome in outcomes)


def test_threads_that_submit_at_once_each_get_their_own() -> None:
    found: dict[int, bool] = {}

    def work(pool: Pool, number: int) -> None:
        ours = range(number * 10_000, number * 10_000 + 2000)
        results = [pool.apply_async(act, (x,)) for x in ours]
        unordered = pool.imap_unordered(act, ours)
        found[number] = (
            [result.get(SECONDS) for result in results] == list(ours)
            and sorted(unordered) == list(ours)
            and list(pool.imap(act, ours)) == list(ours)
        )

    with warm() as pool:
        threads = [threading.Thread(target=work, args=(pool, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert found == dict.fromkeys(range(4), True)


def test_a_death_costs_the_one_that_was_executed(log: Path) -> None:
    for x in (70, 333):
        DEEDS[x] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    with warm() as pool:
        results = submit(pool, 500)
        found = [ended(result) for result in results]
        assert found == [WorkerLost if x in DEEDS else x for x in range(500)]
        with pytest.raises(WorkerLost, match="killed by SIGKILL"):
            results[70].get()
    assert begun(log) == collections.Counter(range(500))


@pytest.mark.parametrize("seed", range(4))
def test_kills_at_any_time_lose_nothing_that_ended_and_run_nothing_twice(
    log: Path, seed: int
) -> None:
    print("seed", seed)
    times, kills = random.Random(seed), 8
    with warm() as pool:
        results = submit(pool, 20_000)
        for _ in range(kills):
            time.sleep(times.uniform(0, 0.01))
            for worker in pool.workers()[:1]:
                with contextlib.suppress(ProcessLookupError):  # it was killed just before
                    os.kill(worker.pid, signal.SIGKILL)
        found = [ended(result) for result in results]
    lost = [x for x, value in enumerate(found) if value is WorkerLost]
    assert len(lost) <= kills
    assert all(value == x for x, value in enumerate(found) if x not in set(lost))
    counts = begun(log)
    assert max(counts.values()) == 1
    assert set(counts) >= set(range(20_000)) - set(lost)


def test_one_that_has_not_begun_is_cancelled_without_the_others(log: Path, tmp_path: Path) -> None:
    DEEDS[0] = wait_for(tmp_path / "go")
    with warm(1) as pool:
        results = submit(pool, 50)
        until(lambda: 0 in begun(log))
        assert results[25].cancel()
        assert results[49].cancel()
        assert ended(results[25]) is ended(results[49]) is CallCancelled
        (tmp_path / "go").touch()
        found = [ended(result) for result in results]
    assert found == ["waited"] + [CallCancelled if x in (25, 49) else x for x in range(1, 50)]
    assert begun(log) == collections.Counter(set(range(50)) - {25, 49})


def test_one_that_waits_for_its_turn_ends_when_it_is_cancelled(tmp_path: Path) -> None:
    DEEDS[0] = wait_for(tmp_path / "go")
    with warm(1) as pool:
        results = submit(pool, 20_000)  # more than the workers are given in advance
        single = pool.apply_async(sorted, ([3, 1, 2],))
        others = [results[-1], results[10_000], single]
        assert all([result.cancel() for result in others])
        assert [ended(result) for result in others] == [CallCancelled] * 3
        (tmp_path / "go").touch()
        assert ended(results[0]) == "waited"
        assert ended(results[-2]) == 19_998


def test_one_that_runs_is_cancelled_without_the_others(log: Path, tmp_path: Path) -> None:
    DEEDS[10] = wait_for(tmp_path / "never")
    with warm(1) as pool:
        results = submit(pool, 50)
        until(lambda: 10 in begun(log))
        pids = [worker.pid for worker in pool.workers()]
        assert results[10].cancel()
        found = [ended(result) for result in results]
        assert [worker.pid for worker in pool.workers()] == pids
    assert found == [CallCancelled if x == 10 else x for x in range(50)]
    assert begun(log) == collections.Counter(range(50))


def test_cancelling_all_at_once_ends_them_all(log: Path, tmp_path: Path) -> None:
    DEEDS[3] = wait_for(tmp_path / "never")
    with warm(2) as pool:
        results = submit(pool, 2000)
        until(lambda: 3 in begun(log))
        for result in results:
            result.cancel()
        found = [ended(result) for result in results]
        assert found[3] is CallCancelled
        assert all(value in (x, CallCancelled) for x, value in enumerate(found))
        assert pool.apply(act, (5,)) == 5
    assert max(begun(log).values()) <= 2


def test_none_waits_behind_a_long_one_while_a_worker_is_idle(tmp_path: Path) -> None:
    DEEDS[20] = wait_for(tmp_path / "go")
    with warm(2) as pool:
        results = submit(pool, 400)
        found = [ended(result) for result in results if result is not results[20]]
        assert found == [x for x in range(400) if x != 20]
        assert not results[20].ready()
        (tmp_path / "go").touch()
        assert results[20].get(SECONDS) == "waited"


def test_what_ended_before_a_long_one_is_known_while_that_runs(tmp_path: Path) -> None:
    DEEDS[20] = wait_for(tmp_path / "go")
    with warm(1) as pool:
        results = submit(pool, 40)
        assert [ended(result) for result in results[:20]] == list(range(20))
        assert not any(result.ready() for result in results[20:])
        (tmp_path / "go").touch()
        assert ended(results[39]) == 39


def test_errors_and_odd_results_are_those_of_one() -> None:
    DEEDS.update({
        5: lambda: 1 / 0,
        6: threading.Lock,
        7: lambda: b"x" * 300_000,
        8: lambda: {"a": [1, 2]},
        9: lambda: os.close(1 << 20),
        10: lambda: 1 << 100,
        11: lambda: "text",
        12: lambda: bytearray(2_000_000),
        13: lambda: exec("raise SystemExit(3)"),
    })  # fmt: skip
    with warm() as pool:
        results = submit(pool, 300)
        found = [ended(result) for result in results]
        with pytest.raises(ZeroDivisionError) as caught:
            results[5].get()
        assert "1 / 0" in str(caught.value.__cause__)
    assert found[5:7] == [ZeroDivisionError, MaybeEncodingError]
    assert found[7:10] == [b"x" * 300_000, {"a": [1, 2]}, OSError]
    assert found[10:13] == [1 << 100, "text", bytearray(2_000_000)]
    assert found[13].__name__ == "TaskExit"
    assert found[:5] + found[14:] == [*range(5), *range(14, 300)]


def test_a_worker_is_replaced_after_exactly_so_many() -> None:
    with warm(2, maxtasksperchild=10) as pool:
        results = submit(pool, 100)
        for result in results:
            result.get(SECONDS)
        pids = collections.Counter(result.outcome.pid for result in results if result.outcome)
        assert max(pids.values()) <= 10


def test_closing_waits_for_all_and_terminating_for_none(tmp_path: Path) -> None:
    pool = warm()
    results = submit(pool, 3000)
    pool.close()
    pool.join()
    assert [result.get(0) for result in results] == list(range(3000))
    DEEDS[1] = wait_for(tmp_path / "never")
    pool = warm()
    results = submit(pool, 3000)
    pool.terminate()
    assert all(ended(result) in (x, CallCancelled) for x, result in enumerate(results))
    assert ended(results[1]) is CallCancelled
