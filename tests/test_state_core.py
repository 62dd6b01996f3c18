"""Waits for what is no call: the slot is lent, and the call says itself when it goes on."""

from __future__ import annotations

from itertools import count
from typing import Any

from scripts import a_task

from taskrun import messages as m
from taskrun.core.scheduler import Scheduler
from taskrun.model import Plan, Recipe


def scheduler(*tasks: Any, **options: Any) -> Scheduler:
    plan = Plan(tasks, frozenset(task.name for task in tasks))
    made = Scheduler(plan, recipe_ids=count(1), **{"slots": 1, **options})
    made.begin(0.0)
    return made


def of(commands: list[m.Command], kind: type) -> list[Any]:
    return [command for command in commands if type(command) is kind]


def assigned(commands: list[m.Command]) -> list[tuple[int, str, bool]]:
    return [(one.worker, call.name, one.nested) for one in of(commands, m.Assign)
            for call in one.calls]  # fmt: skip


def finished(worker: int, call: int) -> m.Finished:
    return m.Finished(worker, [(call, 1, "value", None, None, 0.0, 0.1, False)])


def test_a_wait_for_something_outside_lends_the_slot_until_it_is_over() -> None:
    core = scheduler(a_task("a"), a_task("b"))
    assert assigned(core.handle(m.WorkerReady(1), 0.0)) == [(1, "a", False)]
    waiting = core.handle(m.Waiting(1, 0, 1, (m.OUTSIDE,), False), 0.1)
    assert of(waiting, m.StartWorkers) == [m.StartWorkers(1)]
    assert assigned(core.handle(m.WorkerReady(2), 0.2)) == [(2, "b", False)]
    core.handle(m.Resumed(1, 0, 1), 0.3)
    assert core.placement.busy_cpu == 2  # for a moment, until b has ended
    core.handle(finished(2, 1), 0.4)
    assert of(core.handle(finished(1, 0), 0.5), m.RunEnded) == [m.RunEnded(0, "")]


def test_past_all_spare_workers_a_waiting_one_executes_any_call() -> None:
    core = scheduler(a_task("a"), a_task("b"), spare_factor=1)
    core.handle(m.WorkerReady(1), 0.0)
    waiting = core.handle(m.Waiting(1, 0, 1, (m.OUTSIDE,), False), 0.1)
    assert assigned(waiting) == [(1, "b", True)]


def test_where_no_spare_worker_can_be_had_a_waiting_one_executes_any_call() -> None:
    core = scheduler(a_task("a"), a_task("b"))
    core.handle(m.WorkerReady(1), 0.0)
    core.handle(m.Waiting(1, 0, 1, (m.OUTSIDE,), False), 0.1)
    core.handle(m.NoMoreWorkers("process", 1), 0.2)
    assert assigned(core.handle(m.WorkerLost(2, "not started", None), 0.2)) == [(1, "b", True)]


def test_whoever_waits_for_a_lock_executes_nothing_meanwhile() -> None:
    core = scheduler(a_task("a"), a_task("b"), spare_factor=1)
    core.handle(m.WorkerReady(1), 0.0)
    assert not core.handle(m.Waiting(1, 0, 1, (m.OUTSIDE_ALONE,), False), 0.1)
    core.handle(m.Resumed(1, 0, 1), 0.2)
    assert assigned(core.handle(finished(1, 0), 0.3)) == [(1, "b", False)]


def test_a_call_that_lacks_what_a_waiting_one_holds_is_not_failed() -> None:
    core = scheduler(
        a_task("a", resources={"gpu": 1}), a_task("b", resources={"gpu": 1}), resources={"gpu": 1}
    )
    core.handle(m.WorkerReady(1), 0.0)
    assert not of(core.handle(m.Waiting(1, 0, 1, (m.OUTSIDE,), False), 0.1), m.CallEnded)
    core.handle(m.Resumed(1, 0, 1), 0.2)
    assert assigned(core.handle(finished(1, 0), 0.3)) == [(1, "b", False)]


def test_threads_of_a_call_wait_side_by_side_until_all_have_what_they_wait_for() -> None:
    core = scheduler(a_task("a", lane="async"), lanes={"async": 1})
    core.handle(m.WorkerReady(1, lane="async", slots=9), 0.0)
    leaf = Recipe(9, "leaf", ("module", "leaf"), lane="async")
    keys = [b"1" * 12, b"2" * 12, b"3" * 12]
    core.handle(m.Submitted(0, 1, [(key, leaf, b"", ()) for key in keys]), 0.1)
    core.handle(m.Waiting(1, 0, 1, tuple(keys[:2]), True), 0.2)
    core.handle(m.Waiting(1, 0, 1, (m.ALSO, keys[2]), False), 0.2)
    for call, key in zip((3, 1, 2), (keys[2], keys[0], keys[1]), strict=True):
        told = of(core.handle(finished(1, call), 0.3), m.Deliver)
        assert [list(one.outcomes) for one in told] == [[key]]


def test_only_the_current_attempt_of_a_call_is_running() -> None:
    core = scheduler(a_task("a"))
    assert not core.is_running(0, 1)
    core.handle(m.WorkerReady(1), 0.0)
    assert core.is_running(0, 1) and not core.is_running(0, 2) and not core.is_running(9, 1)
    core.handle(finished(1, 0), 0.1)
    assert not core.is_running(0, 1)
