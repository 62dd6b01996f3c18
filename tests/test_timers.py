"""What is to be done later, in told time."""

from __future__ import annotations

from typing import Any

from scripts import Run, Value, a_task
from simulation import Simulation

from taskrun.api import each
from taskrun.core.timers import Timers


def do_all(timers: Timers, now: float) -> None:
    while (action := timers.due(now)) is not None:
        action()


def test_what_is_due_is_done_in_order_and_once() -> None:
    done: list[Any] = []
    timers = Timers()
    for when in (3.0, 1.0, 2.0, 1.0):
        timers.at(when, lambda when=when: done.append(when))
    do_all(timers, 2.0)
    assert done == [1.0, 1.0, 2.0]
    assert timers.next() == 3.0
    do_all(timers, 9.0)
    assert done == [1.0, 1.0, 2.0, 3.0] and timers.next() is None


def test_what_is_cancelled_is_not_done() -> None:
    done: list[Any] = []
    timers = Timers()
    first, second = (timers.at(n, lambda n=n: done.append(n)) for n in (1.0, 2.0))
    timers.cancel(first)
    timers.cancel(first)
    assert timers.next() == 2.0
    do_all(timers, 5.0)
    assert done == [2.0]
    timers.cancel(second)


def test_what_is_cancelled_takes_no_room() -> None:
    timers = Timers()
    kept = timers.at(1e9, lambda: None)
    for n in range(10_000):
        timers.cancel(timers.at(float(n), lambda: None))
    assert len(timers._heap) < 10
    assert timers.next() == kept.when


def test_the_timeouts_of_calls_that_have_ended_are_let_go() -> None:
    task = a_task("t", {"x": each(range(1000))}, timeout=3600.0)
    sim = Simulation([task], {"t": (Run(0.01), Value())}, audit=False)
    sim.run()
    assert not sim.scheduler._timeouts
    assert len(sim.scheduler._timers._heap) < 20
