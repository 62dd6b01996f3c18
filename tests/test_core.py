"""What becomes of attempts, calls and the run: histories as data."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, pairwise
from typing import Any

import pytest
from scripts import (
    Again,
    Behaviour,
    Dies,
    Error,
    Run,
    Script,
    Skipped,
    Value,
    a_task,
    by_index,
    tries,
)
from simulation import Simulation

from taskrun import messages as m
from taskrun.api import each, result
from taskrun.core.scheduler import Scheduler
from taskrun.model import Plan
from taskrun.recipes import make_recipe

OK: Script = (Run(0.01), Value())
FAILS: Script = (Run(0.1), Error())
SLOW: Script = (Run(1.0), Value())
DIES: Script = (Run(0.1), Dies())


def one(does: Behaviour, *, sim: dict[str, Any] | None = None, **options: Any) -> Simulation:
    """A run of one call of one task."""
    run = Simulation([a_task("work", **options)], {"work": does}, **(sim or {}))
    run.run()
    return run


def delays(sim: Simulation) -> list[float | None]:
    """In how many seconds each attempt of ``work`` was to be tried again."""
    return [end.again for end in sim.of(m.AttemptEnded)]


# -- after a failure ------------------------------------------------------------------


def three(policy: str) -> Simulation:
    tasks = [a_task("bad"), a_task("slow"), a_task("later")]
    sim = Simulation(tasks, {"bad": FAILS, "slow": SLOW}, policy=policy, start=0.0)
    assert sim.run() == 1
    return sim


def test_after_a_failure_nothing_new_starts_and_running_calls_end() -> None:
    sim = three("stop")
    assert [*sim.states("bad"), *sim.states("slow"), *sim.states("later")] == [
        "failed", "ok", "cancelled",
    ]  # fmt: skip
    assert sim.of(m.RunEnded) == [m.RunEnded(1, "bad failed")]


def test_keep_going_goes_on_with_all_that_does_not_depend_on_the_failure() -> None:
    sim = three("keep-going")
    assert sim.states("later") == ["ok"] and sim.states("slow") == ["ok"]


def test_fail_fast_ends_the_running_calls_too() -> None:
    sim = three("fail-fast")
    assert sim.states("slow") == ["cancelled"] and sim.ended("slow") < 0.2


def test_calls_in_a_workers_queue_have_not_started_and_do_not() -> None:
    quick = a_task("quick", {"n": each(list(range(200)))})
    bad = a_task("bad", priority=1)
    does = {"quick": (Run(0.001),), "bad": (Run(0.05), Error())}
    sim = Simulation([quick, bad], does, flushes=0.0)
    sim.run()
    executed = [name for name in sim.order() if name.startswith("quick")]
    assert sim.states("quick").count("ok") == len(executed) < 200
    assert sim.states("quick").count("cancelled") == 200 - len(executed)


# -- retries --------------------------------------------------------------------------


def test_retries_are_so_many_more_attempts() -> None:
    sim = one(FAILS, retries=3)
    assert sim.outcomes("work") == ["error"] * 4 and sim.states("work") == ["failed"]


def test_without_retries_a_call_has_one_attempt() -> None:
    assert one(FAILS).outcomes("work") == ["error"]


def test_a_later_attempt_may_succeed() -> None:
    sim = one(tries(FAILS, DIES, OK), retries=2)
    assert sim.outcomes("work") == ["error", "lost", "value"]
    assert sim.states("work") == ["ok"] and sim.scheduler.status == 0


def test_an_exception_that_retry_on_does_not_name_is_not_tried_again() -> None:
    assert one((Error(retryable=False),), retries=3).outcomes("work") == ["error"]


def test_the_pause_before_a_retry_doubles_and_has_jitter() -> None:
    sim = one(FAILS, retries=4, backoff=1.0)
    *pauses, last = delays(sim)
    assert last is None
    for number, pause in enumerate(pauses):
        assert pause is not None and 1.0 <= pause / 2.0**number <= 1.25
    assert len({pause / 2.0**number for number, pause in enumerate(pauses) if pause}) == 4
    began = sim.began("work")
    waited = [after - before - 0.1 for before, after in pairwise(began)]
    assert waited == pytest.approx(pauses)


def test_the_jitter_is_repeatable_by_its_seed() -> None:
    first, again, other = (
        delays(one(FAILS, retries=3, backoff=1.0, sim={"seed": seed})) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_call_that_asks_to_be_tried_again_may_ask_as_often_as_it_likes() -> None:
    sim = one(tries(*[(Again(),)] * 20, OK))
    assert sim.outcomes("work") == ["retry"] * 20 + ["value"]


def test_asking_to_be_tried_again_counts_against_retries() -> None:
    sim = one((Again(),), retries=2)
    assert sim.outcomes("work") == ["retry"] * 3 and sim.states("work") == ["failed"]


def test_an_error_after_asking_to_be_tried_again_is_not_retried_without_retries() -> None:
    assert one(tries((Again(),), FAILS)).outcomes("work") == ["retry", "error"]


def test_a_call_that_is_tried_again_later_holds_no_worker() -> None:
    tasks = [a_task("poll"), a_task("other")]
    sim = Simulation(tasks, {"poll": tries((Again(5.0),), OK)}, slots=1, start=0.0)
    sim.run()
    assert sim.order() == ["poll", "other", "poll"]
    assert sim.began("poll")[1] == pytest.approx(5.0)


def test_a_call_may_end_as_skipped() -> None:
    sim = one((Skipped("nothing to do"),))
    assert sim.states("work") == ["skipped"] and sim.scheduler.status == 0
    (ended,) = sim.of(m.AttemptEnded)
    failure = sim.call("work").failure
    assert failure is not None and failure.message == "nothing to do"
    assert ended.failure is failure


# -- lost workers ---------------------------------------------------------------------


def test_a_lost_worker_fails_its_call_and_says_so() -> None:
    sim = one(DIES)
    failure = sim.call("work").failure
    assert sim.states("work") == ["failed"] and failure is not None
    assert failure.type_name == "WorkerLost"
    assert "executed work (attempt 1) was killed by SIGKILL" in failure.message


def test_how_long_a_lost_attempt_took_is_known_though_it_told_nothing() -> None:
    (ended,) = one(DIES).of(m.AttemptEnded)
    assert ended.seconds == pytest.approx(0.1, abs=0.01)


def test_how_long_a_lost_attempt_took_counts_from_its_beginning_not_from_the_news_of_it() -> None:
    sim = Simulation([a_task("work")], {"work": (Run(60.0),)}, slots=1)
    sim.run(until=1.0)
    sim.post(m.Began(1, 0, 1, 0.0, age=0.7))
    sim.now = 1.5
    sim.post(m.WorkerLost(1, "killed by SIGKILL", (0, 1)))
    (ended,) = sim.of(m.AttemptEnded)
    assert ended.seconds == pytest.approx(1.2)


def test_a_call_that_kills_its_workers_is_given_up_after_its_limit() -> None:
    sim = one(DIES, retries=2)
    assert sim.outcomes("work") == ["lost"] * 3
    assert len(sim.of(m.WorkerReady)) >= 3


@pytest.mark.parametrize("retries", [None, 1])
def test_a_death_costs_only_the_call_that_was_executing(retries: int | None) -> None:
    quick = a_task("quick", {"n": each(list(range(300)))}, retries=retries)
    does = {"quick": by_index({150: (Dies(),)}, (Run(0.0001), Value()))}
    sim = Simulation([quick], does, slots=1, policy="keep-going", flushes=0.0)
    sim.run()
    lost = sim.call("quick[150]")
    assert lost.state == "failed" and lost.attempt == (retries or 0) + 1
    others = [call for call in sim.calls("quick") if call is not lost]
    assert {(call.state, call.attempt) for call in others} == {("ok", 1)}
    assert any(len(command.calls) > 10 for command in sim.of(m.Assign)), "there was no batch"


@pytest.mark.parametrize("when", [0.0, 0.011, 0.0121, 0.013, 0.015, 0.02, 0.05, 0.0999])
def test_nothing_is_lost_when_a_worker_dies_at_any_point(when: float) -> None:
    quick = a_task("quick", {"n": each(list(range(200)))}, retries=1)
    sim = Simulation([quick], {"quick": (Run(0.001), Value())}, flushes=0.1, latency=0.003)
    sim.at(when, lambda: sim.kill(*sim.workers))
    assert sim.run() == 0
    assert set(sim.states("quick")) == {"ok"}
    assert sum(call.attempt for call in sim.calls("quick")) <= 202


def test_a_run_gives_up_where_idle_workers_die_faster_than_can_be_explained() -> None:
    plan = Plan((a_task("work"),), frozenset(["work"]))
    scheduler = Scheduler(plan, slots=1, recipe_ids=count(1))
    scheduler.begin(0.0)
    scheduler.handle(m.WorkerReady(0), 0.0)  # has the one call
    ended: list[m.Command] = []
    for worker in range(1, 20):
        scheduler.handle(m.WorkerReady(worker), worker * 0.1)
        ended += scheduler.handle(m.WorkerLost(worker, "killed by SIGKILL", None), worker * 0.1)
        if scheduler.over:
            break
    assert worker == 12  # ten, one for the slot, and the one too many
    assert [c for c in ended if type(c) is m.RunEnded] == [
        m.RunEnded(3, "workers die while they are idle: killed by SIGKILL")
    ]


def test_a_worker_that_dies_before_it_was_ready_is_replaced() -> None:
    sim = Simulation([a_task("work")], slots=1, start=1.0)
    sim.begin()
    sim.post(m.WorkerLost(99, "exited with status 1", None))
    sim.run()
    assert sum(command.count for command in sim.of(m.StartWorkers)) == 2


# -- stale reports --------------------------------------------------------------------


def running() -> Simulation:
    """The second attempt of a call runs, in worker 2; the first was lost with worker 1."""
    sim = Simulation([a_task("work", retries=1)], {"work": tries(DIES, SLOW)}, slots=1)
    sim.run(until=0.5)
    assert sim.call("work").attempt == 2 and sim.call("work").worker == 2
    return sim


def report(attempt: int) -> tuple[Any, ...]:
    return (0, attempt, "value", "stale", None, 0.0, 0.1, False)


@pytest.mark.parametrize(
    "event",
    [
        m.Finished(1, [report(1)]),
        m.Finished(1, [report(2)]),
        m.Finished(2, [report(1)]),
        m.Finished(2, [report(3)]),
        m.Began(1, 0, 1, 0.0),
        m.GaveBack(1, [(0, 1)]),
        m.GaveBack(2, [(0, 1)]),
        m.WorkerLost(1, "killed by SIGKILL", (0, 2)),
        m.Submitted(0, 1, []),
        m.Waiting(1, 0, 1, (b"a",), False),
        m.Resumed(1, 0, 1),
        m.CancelChild(0, 1, b"a"),
    ],
)
def test_a_report_of_another_attempt_or_worker_changes_nothing(event: m.Event) -> None:
    sim = running()
    sim.post(event)
    call = sim.call("work")
    assert (call.state, call.attempt, call.worker) == ("running", 2, 2)
    sim.run()
    assert call.state == "ok" and sim.outcomes("work") == ["lost", "value"]


def test_reports_after_the_end_of_the_run_change_nothing() -> None:
    sim = one(OK)
    sim.post(m.Finished(1, [report(1)]))
    sim.post(m.Stop("Ctrl-C"))
    assert len(sim.of(m.RunEnded)) == 1


# -- timeouts -------------------------------------------------------------------------


def test_an_attempt_that_takes_too_long_is_interrupted() -> None:
    sim = one((Run(60.0),), timeout=2.0)
    assert sim.outcomes("work") == ["timeout"] and sim.states("work") == ["failed"]
    assert sim.ended("work") == pytest.approx(2.01, abs=0.01)
    failure = sim.call("work").failure
    assert failure is not None and failure.message == "work ran longer than 2 s"


def test_an_attempt_that_does_not_obey_is_killed_and_has_timed_out_all_the_same() -> None:
    sim = one((Run(60.0, deaf=True),), timeout=2.0)
    assert sim.outcomes("work") == ["timeout"]


def test_a_timeout_is_tried_again_where_there_are_retries() -> None:
    sim = one(tries((Run(60.0),), OK), timeout=2.0, retries=1)
    assert sim.outcomes("work") == ["timeout", "value"]


def test_a_timeout_is_not_tried_again_where_retry_on_does_not_cover_it() -> None:
    sim = one((Run(60.0),), timeout=2.0, retries=3, retry_on=(KeyError,))
    assert sim.outcomes("work") == ["timeout"]


def test_the_time_of_each_attempt_counts_for_itself() -> None:
    sim = one(tries((Run(1.5), Error()), (Run(1.5), Value())), timeout=2.0, retries=1)
    assert sim.outcomes("work") == ["error", "value"]


@pytest.mark.parametrize(("seconds", "outcome"), [(1.9, "value"), (2.1, "timeout")])
def test_a_value_that_crosses_the_interrupt_counts_if_it_was_in_time(
    seconds: float, outcome: str
) -> None:
    sim = Simulation([a_task("work", timeout=2.0)], {"work": (Run(60.0),)}, slots=1)
    sim.run(until=2.0)
    sim.post(m.Tick())
    sim.now = 2.05
    sim.post(m.Tick())
    assert len(sim.of(m.Interrupt)) == 1
    sim.post(m.Finished(1, [(0, 1, "value", 7, None, 0.0, seconds, False)]))
    assert sim.outcomes("work") == [outcome]


# -- cancelling -----------------------------------------------------------------------


def test_a_running_call_is_interrupted_when_it_is_cancelled() -> None:
    sim = Simulation([a_task("work")], {"work": SLOW})
    sim.at(0.5, lambda: sim.post(m.CancelCalls((0,), "not needed")))
    sim.run()
    assert sim.states("work") == ["cancelled"] and sim.ended("work") < 0.6
    failure = sim.call("work").failure
    assert failure is not None and failure.message == "work was cancelled: not needed"
    (ended,) = sim.of(m.AttemptEnded)
    assert ended.failure is failure


@pytest.mark.parametrize("policy", ["stop", "keep-going", "fail-fast"])
@pytest.mark.parametrize("when", [0.005, 0.5])
def test_a_cancelled_call_makes_status_1_and_stops_nothing(policy: str, when: float) -> None:
    work, deploy = a_task("work"), a_task("deploy", {"n": each([1, 2])})
    needs = a_task("needs", {"work": result(work)})
    sim = Simulation([work, needs, deploy], {"work": SLOW, "deploy": SLOW}, policy=policy)
    sim.at(when, lambda: sim.post(m.CancelCalls((sim.call("work").id,))))
    assert sim.run() == 1
    assert sim.states("needs") == ["cancelled"] and sim.states("deploy") == ["ok", "ok"]


def test_a_cancelled_call_whose_consumers_do_without_it_is_tolerated() -> None:
    work = a_task("work", {"n": each([1, 2])})
    total = a_task("total", {"all": result(work, errors="skip")})
    sim = Simulation([total], {"work": SLOW})
    sim.at(0.5, lambda: sim.post(m.CancelCalls((sim.call("work[1]").id,))))
    assert sim.run() == 0 and sim.states("total") == ["ok"]


def test_an_attempt_that_ends_with_the_run_says_so() -> None:
    sim = Simulation([a_task("work")], {"work": SLOW})
    sim.at(0.5, lambda: sim.post(m.Stop("Ctrl-C")))
    sim.run()
    (ended,) = sim.of(m.AttemptEnded)
    assert ended.failure is not None and ended.failure.kind == "cancelled"
    assert ended.failure.message == "work was cancelled, because the run was stopped: Ctrl-C"


def test_a_value_that_crosses_a_cancellation_is_not_taken() -> None:
    sim = Simulation([a_task("work")], {"work": SLOW}, latency=0.2, seed=3)
    sim.at(1.05, lambda: sim.post(m.CancelCalls((0,))))
    sim.run()
    assert sim.states("work") == ["cancelled"] and sim.call("work").value is None


def test_a_ready_a_waiting_and_a_sleeping_call_are_cancelled_at_once() -> None:
    first, second = a_task("first"), a_task("second")
    third = a_task("third", {"x": result(second)})
    sim = Simulation([first, third, a_task("fourth")], {"first": (Again(9.0),)}, slots=1)
    sim.run(until=0.0101)
    assert [sim.states(name)[0] for name in ("first", "second", "third")] == [
        "sleeping", "running", "waiting",
    ]  # fmt: skip
    sim.post(m.CancelCalls(tuple(call.id for call in sim.scheduler.calls)))
    sim.run()
    assert {call.state for call in sim.scheduler.calls} == {"cancelled"}
    assert sim.now < 1.0


def test_all_that_needs_a_cancelled_call_is_cancelled_with_it() -> None:
    a = a_task("a")
    b = a_task("b", {"a": result(a)})
    c = a_task("c", {"b": each(b)})
    sim = Simulation([c], {"a": SLOW})
    sim.at(0.5, lambda: sim.post(m.CancelCalls((0,))))
    sim.run()
    assert {call.state for call in sim.scheduler.calls} == {"cancelled"}


def test_a_cancelled_call_in_a_workers_queue_never_begins() -> None:
    quick = a_task("quick", {"n": each(list(range(200)))})
    does = {"quick": by_index({20: (Run(1.0),)}, (Run(0.001), Value()))}
    sim = Simulation([quick], does, slots=1, flushes=0.0)
    sim.run(until=0.08)
    queued = next(call for call in reversed(sim.calls("quick")) if call.state == "running")
    sim.post(m.CancelCalls((queued.id,)))
    sim.run()
    assert queued.state == "cancelled" and queued.name not in sim.order()


# -- stopping -------------------------------------------------------------------------


def stopped(does: Mapping[str, Behaviour], at: float = 0.5, **options: Any) -> Simulation:
    """``work`` and then ``close``, which is teardown; Ctrl-C in the midst of it."""
    work = a_task("work", {"n": each([1, 2, 3])}, **options)
    more = a_task("more", {"x": each(work)})
    close = a_task("close", after=(more,), always=True, retries=1)
    sim = Simulation([close], does, slots=2)
    sim.at(at, lambda: sim.post(m.Stop("Ctrl-C")))
    assert sim.run() == 1
    return sim


def test_stopping_interrupts_what_runs_cancels_the_rest_and_runs_teardown() -> None:
    sim = stopped({"work": SLOW})
    assert set(sim.states("work")) == set(sim.states("more")) == {"cancelled"}
    assert sim.states("close") == ["ok"]
    assert 0.5 <= sim.began("close")[0] < 0.6
    assert sim.of(m.RunEnded) == [m.RunEnded(1, "Ctrl-C")]


def test_teardown_has_its_retries_after_a_stop_and_others_have_not() -> None:
    sim = stopped({"work": SLOW, "close": tries(FAILS, OK)}, retries=5)
    assert sim.outcomes("close") == ["error", "value"] and sim.states("close") == ["ok"]
    assert set(sim.states("work")) == {"cancelled"}


def test_a_call_that_sleeps_until_its_retry_fails_when_the_run_stops() -> None:
    sim = stopped({"work": by_index({0: (Error(),)}, SLOW)}, retries=3, backoff=60.0)
    assert sim.states("work") == ["failed", "cancelled", "cancelled"]
    assert sim.states("close") == ["ok"] and sim.now < 2.0


def test_a_call_that_does_not_obey_is_killed_when_the_run_stops() -> None:
    sim = stopped({"work": (Run(60.0, deaf=True),)})
    assert set(sim.states("work")) == {"cancelled"} and sim.states("close") == ["ok"]


def test_ctrl_c_while_running_calls_end_after_a_failure_interrupts_them() -> None:
    tasks = [a_task("bad"), a_task("slow")]
    sim = Simulation(tasks, {"bad": FAILS, "slow": (Run(60.0),)})
    sim.at(1.0, lambda: sim.post(m.Stop("Ctrl-C")))
    assert sim.run() == 1
    assert sim.states("slow") == ["cancelled"] and sim.now < 3.0


def test_a_run_that_cannot_go_on_ends_at_once_with_status_3() -> None:
    sim = Simulation([a_task("work")], {"work": SLOW})
    sim.at(0.5, lambda: sim.post(m.GiveUp("20 workers died within 10 s")))
    assert sim.run() == 3
    assert sim.of(m.RunEnded) == [m.RunEnded(3, "20 workers died within 10 s")]


# -- calls from outside ---------------------------------------------------------------


def fed(**options: Any) -> Simulation:
    sim = Simulation([], {"line": OK}, open_feed=True, **options)
    recipe = make_recipe(a_task("line"), next(sim.recipes), names=None)
    sim.at(1.0, lambda: sim.post(m.Fed(recipe, [b"a", b"b"])))
    sim.at(2.0, lambda: sim.post(m.Fed(recipe, [b"c"], last=True)))
    return sim


def test_a_run_with_a_feed_ends_when_the_feed_has_ended() -> None:
    sim = fed()
    assert sim.run() == 0 and sim.now > 2.0
    assert [call.name for call in sim.calls("line")] == ["line#0", "line#1", "line#2"]
    assert sim.got("line#2") == (b"c", {})


def test_fed_values_are_kept_until_they_are_taken() -> None:
    sim = fed()
    sim.run()
    call = sim.call("line#0")
    assert call.value == "line#0"
    sim.scheduler.release(call)
    assert call.value is None


def test_stopping_ends_the_feed() -> None:
    sim = fed()
    sim.at(1.5, lambda: sim.post(m.Stop("Ctrl-C")))
    assert sim.run() == 1 and sim.states("line") == ["ok", "ok"]
