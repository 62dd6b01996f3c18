"""What the coordinator asks of a worker while a call runs in it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from workshop import (
    INTERRUPTIBLE,
    Make,
    Workshop,
    await_file,
    cancelled,
    gone,
    interrupt,
)

from taskrun import messages as m
from taskrun.engines.pool import PoolEngine

pytestmark = pytest.mark.timeout(120)


# -- give-back and interrupts ---------------------------------------------------------


def test_calls_that_have_not_begun_are_given_back_while_one_runs(
    shop: Workshop, tmp_path: Path
) -> None:
    (worker,) = shop.workers()
    long = shop.make("touch_and_wait", str(tmp_path / "begun"))
    queued = [shop.make("same", number) for number in range(5)]
    shop.assign(worker, long, *queued[:3])
    shop.reactor.run_once(0)
    await_file(tmp_path / "begun")
    shop.assign(worker, *queued[3:])  # stays in the Pipe, which the main thread does not read
    shop.engine.perform(m.Reclaim(worker, 4))
    event = shop.await_event(m.GaveBack)
    assert event.calls == [(call.id, 1) for call in queued[1:]]
    began = shop.await_event(m.Began)
    assert (began.call, began.attempt, began.label) == (long.id, 1, None)
    shop.engine.perform(m.Reclaim(worker, 0))
    assert shop.await_event(m.GaveBack, 2).calls == []
    assert len(shop.all(m.Began)) == 1
    os.kill(shop.pid(worker), signal.SIGKILL)
    assert shop.await_event(m.WorkerLost).executing == (long.id, 1)


def test_an_idle_worker_answers_too(shop: Workshop) -> None:
    (worker,) = shop.workers()
    shop.engine.perform(m.Reclaim(worker, 3))
    assert shop.await_event(m.GaveBack).calls == []


def test_what_ended_before_a_long_call_is_known_while_that_runs(make: Make) -> None:
    shop = make(
        """
        @task
        def hold_everything(x): ctypes.PyDLL(None).usleep(x)
        """
    )
    (worker,) = shop.workers()
    quick = [shop.make("same", number) for number in range(10)]
    # In C code that lets no other thread run: the worker itself can tell nothing.
    shop.assign(worker, *quick, long := shop.make("hold_everything", 900_000))
    start = time.monotonic()
    assert [shop.value(call) for call in quick] == list(range(10))
    assert time.monotonic() - start < 0.5
    shop.report(long)


def test_began_is_told_at_once_where_the_recipe_wants_it(make: Make) -> None:
    shop = make(
        """
        @task(label="nap of {x} s")
        def doze(x, y=0): time.sleep(x)
        """
    )
    (worker,) = shop.workers()
    call = shop.start(worker, "doze", 0.2, flags=m.SAY_BEGAN)
    began = shop.await_event(m.Began)
    assert (began.call, began.label) == (call.id, "nap of 0.2 s")
    assert (call.id, 1) not in shop.reports
    shop.report(call)


@pytest.mark.parametrize("name", ["touch_and_wait", "spin", "tidy", "dream"])
def test_a_running_call_is_interrupted_and_the_worker_lives(
    make: Make, tmp_path: Path, name: str
) -> None:
    shop = make(INTERRUPTIBLE)
    (worker,) = shop.workers()
    call, after = shop.make(name, str(tmp_path / "begun")), shop.make("same", 7)
    shop.assign(worker, call, after)
    shop.reactor.run_once(0)
    await_file(tmp_path / "begun")
    interrupt(shop, worker, call)
    assert cancelled(shop, call)
    assert shop.value(after) == 7
    assert shop.do(worker, "pid") == shop.pid(worker)
    said = {"tidy": b"tidied up\n", "dream": b"woken\n"}.get(name, b"")
    assert shop.written(call) == said


def test_an_interrupt_ends_the_subprocesses_of_the_call(make: Make, tmp_path: Path) -> None:
    shop = make(INTERRUPTIBLE)
    (worker,) = shop.workers()
    call = shop.start(worker, "subprocesses", str(tmp_path / "begun"))
    shop.reactor.run_once(0)
    await_file(tmp_path / "begun")
    pids = [int(pid) for pid in (tmp_path / "begun").read_text().split()]
    below = psutil.Process(shop.pid(worker)).children(recursive=True)
    interrupt(shop, worker, call)
    assert cancelled(shop, call)
    assert gone(*pids, *[process.pid for process in below])
    assert shop.do(worker, "pid") == shop.pid(worker)


@pytest.mark.parametrize(("name", "by"), [("swallow", "SIGTERM"), ("immune", "SIGKILL")])
def test_a_call_that_does_not_heed_the_interrupt_is_ended_with_its_worker(
    make: Make, tmp_path: Path, name: str, by: str
) -> None:
    shop = make(INTERRUPTIBLE, grace=0.2)
    (worker,) = shop.workers()
    call = shop.start(worker, name, str(tmp_path / "begun"))
    shop.reactor.run_once(0)
    await_file(tmp_path / "begun")
    interrupt(shop, worker, call)
    lost = shop.await_event(m.WorkerLost)
    assert (lost.reason, lost.executing) == (f"killed by {by}", (call.id, 1))


def test_a_call_that_waits_in_the_queue_is_cancelled_and_the_running_one_is_not(
    shop: Workshop, tmp_path: Path
) -> None:
    (worker,) = shop.workers()
    running = shop.make("nap", 1)
    queued = [shop.make("same", number) for number in range(3)]
    shop.assign(worker, running, *queued)
    shop.reactor.run_once(0)
    interrupt(shop, worker, queued[1])
    assert cancelled(shop, queued[1])
    assert (running.id, 1) not in shop.reports
    assert shop.value(running) == 1
    assert [shop.value(queued[0]), shop.value(queued[2])] == [0, 2]


def test_a_call_is_cancelled_even_if_the_interrupt_overtakes_it(shop: Workshop) -> None:
    (worker,) = shop.workers()
    for number in range(50):
        call = shop.start(worker, "nap", 20)
        interrupt(shop, worker, call)  # on another Pipe, at the same time
        assert cancelled(shop, call), number


def test_interrupts_hit_the_call_they_are_meant_for_and_no_other(shop: Workshop) -> None:
    (worker,) = shop.workers()
    calls = [shop.make("nap", 0.0005) for _ in range(400)]
    shop.assign(worker, *calls)
    for call in calls[::3]:
        interrupt(shop, worker, call)
        shop.reactor.run_once(0.001)
    for number, call in enumerate(calls):
        if number % 3:
            assert shop.value(call) == 0.0005
        else:
            assert shop.report(call).kind == "value" or cancelled(shop, call)
    assert shop.do(worker, "pid") == shop.pid(worker)


def test_an_interrupt_of_a_call_that_has_ended_does_nothing(shop: Workshop) -> None:
    (worker,) = shop.workers()
    call = shop.start(worker, "same", 1)
    assert shop.value(call) == 1
    interrupt(shop, worker, call)
    assert shop.do(worker, "same", 2) == 2


def test_one_can_ask_where_a_worker_is(shop: Workshop, tmp_path: Path) -> None:
    (worker,) = shop.workers()
    shop.start(worker, "touch_and_wait", str(tmp_path / "begun"))
    shop.reactor.run_once(0)
    await_file(tmp_path / "begun")
    texts: list[str] = []
    assert isinstance(shop.engine, PoolEngine)
    shop.engine.stack(worker, texts.append)
    shop.until(lambda: texts)
    assert "in touch_and_wait" in texts[0]
    assert "execute.py" not in texts[0]
