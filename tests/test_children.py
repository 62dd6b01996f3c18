"""Calls that make calls: futures as arguments and as values, waiting, failing, retrying."""

from __future__ import annotations

from typing import Any

import pytest
from scripts import (
    Behaviour,
    Cancel,
    Dies,
    Error,
    Held,
    Run,
    Script,
    Skipped,
    Submit,
    Value,
    WaitFor,
    a_task,
    by_index,
    tries,
)
from simulation import Simulation

from taskrun import messages as m
from taskrun.api import each, result
from taskrun.calls import Call
from taskrun.model import Failure

OK: Script = (Run(0.01), Value())
FAILS: Script = (Run(0.1), Error())
SLOW: Script = (Run(1.0), Value())

leaf = a_task("leaf")
other = a_task("other")
mid = a_task("mid")


def root(*steps: Any, sim: dict[str, Any] | None = None, **does: Behaviour) -> Simulation:
    """A run of one call ``root``, which makes others."""
    options: dict[str, Any] = {"policy": "stop", **(sim or {})}
    run = Simulation([a_task("root")], {"root": steps, **does}, **options)
    run.run()
    return run


# -- futures as arguments -------------------------------------------------------------


def test_a_future_as_an_argument_is_a_dependency_and_nobody_waits() -> None:
    sim = root(
        Submit("a", leaf), Submit("b", other, ("a",)), leaf=SLOW, sim={"slots": 1, "start": 0.0}
    )
    assert sim.order() == ["root", "leaf#0", "other#0"]
    assert sim.of(m.Waiting) == []
    assert sim.got("other#0") == (b"b", {b"a": "leaf#0"})


def test_a_future_that_has_ended_already_may_be_an_argument() -> None:
    sim = root(Submit("a", leaf), WaitFor(("a",)), Submit("b", other, ("a",)))
    assert sim.got("other#0") == (b"b", {b"a": "leaf#0"})


def test_a_call_whose_argument_failed_is_skipped_early_or_late() -> None:
    early = root(Submit("a", leaf), Submit("b", other, ("a",)), leaf=FAILS)
    late = root(
        Submit("a", leaf), WaitFor(("a",), catch=True), Submit("b", other, ("a",)), leaf=FAILS
    )
    assert early.states("other") == ["cancelled"]  # the failure stopped the run
    assert late.states("other") == ["skipped"]
    assert late.call("other#0").cause is late.call("leaf#0")


@pytest.mark.parametrize("wait", [(), (WaitFor(("a",), catch=True),)])
def test_a_submitted_always_call_gets_the_failure_of_its_argument(wait: Any) -> None:
    close = a_task("close", always=True)
    sim = root(Submit("a", leaf), *wait, Submit("b", close, ("a",)), leaf=FAILS)
    assert sim.states("close") == ["ok"]
    [failure] = sim.got("close#0")[1].values()
    assert isinstance(failure, Failure) and failure.headline == "ValueError: bad"


def test_a_resource_that_nobody_has_fails_a_submitted_call() -> None:
    sim = root(Submit("a", a_task("train", resources={"gpu": 1})), WaitFor(("a",), catch=True))
    assert sim.states("train") == ["failed"] and sim.scheduler.status == 0
    failure = sim.call("train#0").failure
    assert failure is not None and "needs gpu=1 (there is none): nobody here" in failure.message


# -- futures as values ----------------------------------------------------------------


def test_a_call_that_returns_a_future_ends_with_it_and_holds_no_worker() -> None:
    sim = root(Submit("a", leaf), Held(("a",)), leaf=SLOW, sim={"slots": 1, "wanted": ("root",)})
    assert sim.call("root").value == "leaf#0"
    assert sim.ended("root") == sim.ended("leaf#0")
    assert len(sim.of(m.WorkerReady)) == 1


def test_futures_inside_a_value_are_filled_in_and_each_of_its_items() -> None:
    held = a_task("held")
    taken = a_task("taken", {"item": each(held)})
    steps = (Submit("a", leaf), Submit("b", leaf), Held(("a", "b"), items=True))
    sim = Simulation([taken], {"held": steps}, wanted=("held",))
    sim.run()
    assert sim.call("held").value == (b"pickle", {b"a": "leaf#0", b"b": "leaf#1"})
    assert [sim.got(f"taken[{n}]") for n in (0, 1)] == [("leaf#0",), ("leaf#1",)]


def test_a_value_that_holds_a_held_value_ends_with_it() -> None:
    sim = root(
        Submit("a", mid),
        Held(("a",)),
        mid=(Submit("x", leaf), Held(("x",))),
        leaf=SLOW,
        sim={"wanted": ("root",)},
    )
    assert sim.call("root").value == "leaf#0"


def test_the_failure_of_a_returned_future_fails_the_call_and_it_is_not_tried_again() -> None:
    holds = a_task("holds", retries=5)
    sim = Simulation([holds], {"holds": (Submit("a", leaf), Held(("a",))), "leaf": FAILS})
    assert sim.run() == 1
    assert sim.states("holds") == ["failed"] and sim.call("holds").attempt == 1
    assert sim.call("holds").cause is sim.call("leaf#0")


def test_a_future_of_another_call_cannot_be_returned() -> None:
    sim = root(Held(("stranger",)))
    failure = sim.call("root").failure
    assert sim.states("root") == ["failed"] and failure is not None
    assert failure.message == "root returned a future of another call"


def test_a_cancelled_held_call_is_cancelled_at_once() -> None:
    sim = Simulation([a_task("root")], {"root": (Submit("a", leaf), Held(("a",))), "leaf": SLOW})
    sim.at(0.5, lambda: sim.post(m.CancelCalls((0,))))
    sim.run()
    assert sim.states("root") == ["cancelled"] and sim.ended("root") == 0.5


# -- waiting --------------------------------------------------------------------------


def test_waiting_gives_the_outcomes_as_they_are() -> None:
    sim = root(
        Submit("a", leaf),
        Submit("b", other),
        WaitFor(("a", "b"), catch=True),
        other=FAILS,
    )
    outcomes: dict[bytes, Any] = {}
    for command in sim.of(m.Deliver):
        assert command.call == sim.call("root").id
        outcomes.update(command.outcomes)
    assert outcomes[b"a"] == "leaf#0" and isinstance(outcomes[b"b"], Failure)


def test_waiting_for_any_goes_on_with_the_first() -> None:
    sim = root(
        Submit("a", leaf),
        Submit("b", other),
        WaitFor(("a", "b"), any_of=True),
        leaf=(Run(9.0), Value()),
        other=OK,
        sim={"slots": 4},
    )
    assert sim.ended("root") < 1.0


def test_waiting_for_what_has_ended_takes_no_time() -> None:
    sim = root(Submit("a", leaf), Run(1.0), WaitFor(("a",)))
    assert sim.ended("root") == pytest.approx(1.0, abs=0.05)


def test_a_wait_may_end_because_time_is_up() -> None:
    sim = root(
        Submit("a", leaf), WaitFor(("a",), timeout=0.2), Run(0.1), Value(1), leaf=(Run(9.0),)
    )
    assert sim.ended("root") == pytest.approx(0.31, abs=0.02)
    assert sim.states("root") == ["ok"]


def test_after_a_wait_that_timed_out_the_same_future_can_be_waited_for_again() -> None:
    sim = root(Submit("a", leaf), WaitFor(("a",), timeout=0.2), WaitFor(("a",)), leaf=SLOW)
    assert sim.ended("root") >= sim.ended("leaf#0")


def test_a_waiting_call_lends_its_slot() -> None:
    sim = root(Submit("a", leaf), WaitFor(("a",)), leaf=SLOW, sim={"slots": 1})
    assert sim.states("root") == sim.states("leaf") == ["ok"]
    assert len(sim.of(m.WorkerReady)) == 2


def chain(length: int) -> Behaviour:
    """Each call makes one more and waits for it."""

    def behave(call: Call) -> Script:
        depth = 0
        above = call.parent
        while above is not None:
            depth, above = depth + 1, above.parent
        if depth == length:
            return OK
        return (Submit("next", mid), WaitFor(("next",)), Run(0.01), Value())

    return behave


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_waiting_calls_take_up_to_four_workers_a_slot_and_then_nest(slots: int) -> None:
    sim = Simulation([mid], {"mid": chain(30)}, slots=slots)
    sim.run()
    assert sim.scheduler.status == 0
    assert len(sim.of(m.WorkerReady)) == 4 * slots
    nested = [command for command in sim.of(m.Assign) if command.nested]
    assert len(nested) == 30 + 1 - 4 * slots


@pytest.mark.parametrize("resources", [{"cpu": 2}, {"memory": 1}, {"gpu": 0.01}, {"cpu": 0.5}])
def test_calls_that_hold_resources_nest_too(resources: dict[str, float]) -> None:
    task = a_task("deep", resources=resources)

    def behave(call: Call) -> Script:
        if call.index == 20:
            return OK
        return (Submit("next", task), WaitFor(("next",)), Run(0.01), Value())

    sim = root(
        Submit("first", task),
        WaitFor(("first",)),
        deep=behave,
        sim={"slots": 2, "resources": {"memory": 100, "gpu": 1}},
    )
    assert sim.scheduler.status == 0 and set(sim.states("deep")) == {"ok"}


def test_two_trees_that_wait_nest_each_in_its_own() -> None:
    tree = a_task("tree")

    def behave(call: Call) -> Script:
        depth = 0 if call.parent is None else len(call.key)
        if depth == 5:
            return OK
        keys = ("l" * (depth + 1), "r" * (depth + 1))
        return (*(Submit(key, tree) for key in keys), WaitFor(keys), Run(0.001), Value())

    tops = a_task("tops", {"n": each([1, 2])})
    sim = Simulation([tops], {"tops": behave, "tree": behave}, slots=2, spare_factor=2)
    assert sim.run() == 0
    assert len(sim.calls("tree")) == 2 * (2**6 - 2)


def test_a_call_that_is_cancelled_while_it_waits_frees_its_worker() -> None:
    waits = a_task("waits", {"n": each([1, 2])})
    later = a_task("later", after=(), priority=-1)
    does = {
        "waits": (Submit("a", leaf), WaitFor(("a",))),
        "leaf": (Run(5.0), Value()),
    }
    sim = Simulation([waits, later], does, slots=1, policy="keep-going", spare_factor=2)
    sim.at(0.1, lambda: sim.post(m.CancelCalls((0, 1))))
    sim.run()
    assert sim.states("waits") == ["cancelled", "cancelled"] and sim.states("later") == ["ok"]


def test_a_timeout_counts_while_a_call_waits() -> None:
    work = a_task("work", timeout=0.5)
    does = {"work": (Submit("a", leaf), WaitFor(("a",))), "leaf": SLOW}
    sim = Simulation([work], does, slots=1)
    sim.run()
    assert sim.outcomes("work") == ["timeout"]


# -- calls that hold what they wait for -----------------------------------------------


def test_a_call_that_only_its_waiting_ancestors_block_fails_at_once_and_says_so() -> None:
    work, part = (a_task(name, resources={"gpu": 1}) for name in ("work", "part"))
    sim = Simulation(
        [work], {"work": (Submit("a", part), WaitFor(("a",)))}, resources={"gpu": 1}, slots=2
    )
    assert sim.run() == 1 and sim.now < 1.0
    failure = sim.call("part#0").failure
    assert failure is not None and failure.type_name == "CallBlocked"
    assert "part#0 needs gpu=1, which calls hold that wait for it" in failure.message


def test_a_call_that_its_ancestors_block_fails_also_where_no_worker_is_idle() -> None:
    work, part = (a_task(name, resources={"gpu": 1}) for name in ("work", "part"))
    does = {"work": (Submit("a", part), WaitFor(("a",), catch=True))}
    sim = Simulation([work], does, resources={"gpu": 1}, slots=1, spare_factor=1)
    assert sim.run() == 0
    assert sim.states("part") == ["failed"]


def test_calls_that_block_each_others_children_do_not_hang() -> None:
    work = a_task("work", {"n": each([1, 2])}, resources={"gpu": 1})
    part = a_task("part", resources={"gpu": 1})
    does = {
        "work": (Run(0.1), Submit("a", part), WaitFor(("a",), catch=True), Run(0.1)),
        "part": OK,
    }
    sim = Simulation([work], does, resources={"gpu": 2}, slots=4, start=0.0)
    assert sim.run() == 0
    # One of them has to give way; then the other one's can run.
    assert sorted(sim.states("part")) == ["failed", "ok"]


@pytest.mark.parametrize(
    "then",
    [
        (Held(("a",)),),
        (Run(1.0), Value()),
        (Submit("b", leaf), WaitFor(("b",)), Value()),
        (Submit("b", leaf), WaitFor(("a", "b"), any_of=True), Value()),
    ],
)
def test_a_call_is_not_blocked_by_a_parent_that_does_not_wait_for_it(then: Script) -> None:
    work, part = (a_task(name, resources={"gpu": 1}) for name in ("work", "part"))
    does: dict[str, Behaviour] = {"work": (Submit("a", part), Run(0.5), *then), "leaf": SLOW}
    sim = Simulation([work], does, resources={"gpu": 1}, slots=3, start=0.0)
    assert sim.run() == 0
    assert sim.states("work") == sim.states("part") == ["ok"]


def test_a_call_is_not_blocked_while_something_runs_that_may_make_room() -> None:
    work, holds = a_task("work", resources={"gpu": 1}), a_task("holds", resources={"gpu": 1})
    part = a_task("part", resources={"gpu": 1})
    does = {
        "work": (Submit("a", part), WaitFor(("a",))),
        "holds": (Run(3.0), Value()),
    }
    sim = Simulation([work, holds], does, resources={"gpu": 2}, slots=4)
    assert sim.run() == 0 and sim.states("part") == ["ok"]


# -- failures of children -------------------------------------------------------------


def test_a_failure_that_its_parent_catches_is_tolerated() -> None:
    sim = root(Submit("a", leaf), WaitFor(("a",), catch=True), Run(1.0), Value(), leaf=FAILS)
    assert sim.scheduler.status == 0 and sim.states("root") == ["ok"]
    assert sim.call("leaf#0").tolerated


def test_a_failure_that_its_parent_does_not_catch_fails_the_run() -> None:
    sim = root(Submit("a", leaf), WaitFor(("a",)), leaf=FAILS)
    assert sim.states("root") == sim.states("leaf") == ["failed"]
    assert sim.scheduler.status == 1 and not sim.call("leaf#0").tolerated


def test_a_failure_that_nobody_asked_about_fails_the_run_when_its_parent_ends() -> None:
    sim = root(Submit("a", leaf), Run(1.0), Value(), leaf=FAILS, sim={"start": 0.0})
    assert sim.states("root") == ["ok"] and sim.scheduler.status == 1


def test_a_failure_after_its_parents_end_fails_the_run() -> None:
    sim = root(Submit("a", leaf), Value(), leaf=FAILS)
    assert sim.states("root") == ["ok"] and sim.scheduler.status == 1


def test_a_failure_that_went_through_a_call_and_was_caught_above_it_is_tolerated() -> None:
    sim = root(
        Submit("a", mid),
        WaitFor(("a",), catch=True),
        Run(1.0),
        Value(),
        mid=(Submit("x", leaf), WaitFor(("x",))),
        leaf=FAILS,
    )
    assert sim.states("mid") == sim.states("leaf") == ["failed"]
    assert sim.scheduler.status == 0 and sim.states("root") == ["ok"]
    assert sim.call("leaf#0").tolerated and sim.call("mid#0").tolerated


def test_a_failure_that_went_through_a_returned_future_and_was_caught_is_tolerated() -> None:
    sim = root(
        Submit("a", mid),
        WaitFor(("a",), catch=True),
        mid=(Submit("x", leaf), Held(("x",))),
        leaf=FAILS,
    )
    assert sim.scheduler.status == 0 and sim.call("leaf#0").tolerated


def test_a_failure_of_a_child_is_tolerated_with_its_parents() -> None:
    work = a_task("work")
    total = a_task("total", {"work": result(work, errors="skip")})
    does = {"work": (Submit("a", leaf), WaitFor(("a",))), "leaf": FAILS}
    sim = Simulation([total], does)
    assert sim.run() == 0
    assert sim.states("work") == ["failed"] and sim.states("total") == ["ok"]
    assert sim.call("leaf#0").tolerated


def test_the_failure_behind_a_skipped_call_is_caught_with_it() -> None:
    sim = root(
        Submit("a", leaf),
        Submit("b", other, ("a",)),
        WaitFor(("b",), catch=True),
        leaf=FAILS,
    )
    assert sim.states("other") == ["skipped"]
    assert sim.scheduler.status == 0 and sim.call("leaf#0").tolerated


def test_a_returned_future_that_was_skipped_for_a_failure_fails_the_call_and_the_run() -> None:
    steps = (Submit("a", leaf), Submit("b", other, ("a",)), Held(("b",)))
    sim = root(*steps, leaf=FAILS)
    assert sim.states("other") == ["skipped"] and sim.states("root") == ["failed"]
    assert sim.scheduler.status == 1 and not sim.call("leaf#0").tolerated
    sim = root(Submit("a", mid), WaitFor(("a",), catch=True), mid=steps, leaf=FAILS)
    assert sim.states("mid") == ["failed"] and sim.states("root") == ["ok"]
    assert sim.scheduler.status == 0 and sim.call("leaf#0").tolerated


def test_a_returned_future_that_was_skipped_for_a_skip_skips_the_call() -> None:
    skips = (Run(0.1), Skipped("nothing to do"))
    sim = root(Submit("a", leaf), Submit("b", other, ("a",)), Held(("b",)), leaf=skips)
    assert sim.states("root") == sim.states("other") == sim.states("leaf") == ["skipped"]
    assert sim.scheduler.status == 0


def test_a_parent_that_skips_itself_over_a_failure_has_caught_it() -> None:
    sim = root(Submit("a", leaf), WaitFor(("a",), catch=True), Skipped("leaf is bad"), leaf=FAILS)
    assert sim.states("root") == ["skipped"] and sim.scheduler.status == 0


# -- cancelling -----------------------------------------------------------------------


def test_a_future_can_be_cancelled_before_and_while_it_runs() -> None:
    sim = root(
        Submit("a", leaf),
        Submit("b", leaf),
        Submit("c", other, ("b",)),
        Run(0.1),
        Cancel("a"),
        Cancel("b"),
        WaitFor(("a", "b", "c"), catch=True),
        leaf=SLOW,
    )
    assert sim.states("leaf") == ["cancelled", "cancelled"] and sim.states("other") == ["cancelled"]
    assert sim.now < 1.0 and sim.scheduler.status == 0


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ((WaitFor(("a",), catch=True), Value()), 0),
        ((WaitFor(("a",)), Value()), 1),
        ((Held(("a",)),), 1),
        ((Run(1.0), Value()), 1),
    ],
    ids=["caught", "raised", "returned", "unasked"],
)
def test_a_child_cancelled_from_outside_counts_unless_its_parent_takes_it(
    then: tuple[Any, ...], status: int
) -> None:
    sim = Simulation([a_task("root")], {"root": (Submit("a", leaf), *then), "leaf": SLOW})
    sim.at(0.5, lambda: sim.post(m.CancelCalls((sim.call("leaf#0").id,))))
    assert sim.run() == status
    assert sim.states("leaf") == ["cancelled"]


def test_a_child_that_its_parent_cancels_and_forgets_does_not_count() -> None:
    sim = root(Submit("a", leaf), Run(0.1), Cancel("a"), Run(0.1), leaf=SLOW)
    assert sim.states("leaf") == ["cancelled"] and sim.scheduler.status == 0


# -- retries of the parent ------------------------------------------------------------


def retried(second: Script, **options: Any) -> Simulation:
    """The first attempt makes a, b and c and dies; ``second`` is what the next one does."""
    submits = tuple(Submit(key, leaf) for key in "abc")
    does = {
        "work": tries((*submits, Run(0.1), Dies()), second),
        "leaf": (Run(0.3), Value()),
    }
    sim = Simulation([a_task("work", retries=1)], does, slots=5, start=0.0, **options)
    sim.run()
    return sim


def test_a_retried_parent_takes_over_its_children_by_their_keys() -> None:
    sim = retried((*(Submit(key, leaf) for key in "abc"), WaitFor(("a", "b", "c"))))
    assert len(sim.calls("leaf")) == 3 and set(sim.states("leaf")) == {"ok"}
    assert sim.scheduler.status == 0
    assert [end.attempt for end in sim.of(m.AttemptEnded) if end.call.name == "leaf#0"] == [1]


def test_children_that_a_retried_parent_does_not_ask_for_again_are_cancelled() -> None:
    sim = retried((Submit("b", leaf), Run(0.05), Value()))
    assert sorted(sim.states("leaf")) == ["cancelled", "cancelled", "ok"]
    assert sim.call("leaf#1").state == "ok" and sim.scheduler.status == 0


def test_a_retried_parent_may_ask_for_more() -> None:
    sim = retried((*(Submit(key, leaf) for key in "abcd"), WaitFor(("d",))))
    assert len(sim.calls("leaf")) == 4


def test_a_retried_parent_makes_a_child_that_failed_anew() -> None:
    sim = Simulation(
        [a_task("root", retries=1)],
        {"root": (Submit("a", leaf), WaitFor(("a",))), "leaf": by_index({0: FAILS}, OK)},
        policy="stop",
    )
    sim.run()
    assert sim.states("leaf") == ["failed", "ok"] and sim.states("root") == ["ok"]
    assert sim.scheduler.status == 0


def test_the_children_of_teardown_run_though_the_run_is_being_stopped() -> None:
    close = a_task("close", always=True)
    sim = Simulation(
        [a_task("bad"), close],
        {"bad": FAILS, "close": (Run(0.2), Submit("a", leaf), WaitFor(("a",)))},
        policy="stop",
    )
    sim.run()
    assert sim.states("leaf") == ["ok"] and sim.states("close") == ["ok"]


def test_a_call_whose_returned_future_skips_itself_is_skipped_too() -> None:
    sim = root(Submit("a", leaf), Held(("a",)), leaf=(Run(0.1), Skipped()))
    assert sim.states("root") == ["skipped"] and sim.scheduler.status == 0


# -- letting values go ----------------------------------------------------------------


def test_a_submitted_value_is_let_go_when_its_parent_has_ended() -> None:
    sim = Simulation([a_task("root")], {"root": (Submit("a", leaf), Run(1.0)), "leaf": OK})
    sim.run(until=0.5)
    assert sim.call("leaf#0").value == "leaf#0"
    sim.run()
    assert sim.call("leaf#0").value is None


def test_the_value_of_a_call_that_outlives_its_parent_is_let_go_at_once() -> None:
    sim = root(Submit("a", leaf), Value(), leaf=SLOW)
    assert sim.states("leaf") == ["ok"] and sim.call("leaf#0").value is None


def test_the_value_of_an_argument_is_kept_for_a_consumer_that_outlives_the_parent() -> None:
    consumer = a_task("consumer", retries=1)
    sim = root(
        Submit("a", leaf),
        Submit("b", consumer, ("a",)),
        WaitFor(("a",)),
        consumer=tries((Run(1.0), Error()), OK),
    )
    assert sim.arguments[(sim.call("consumer#0").id, 2)] == (b"b", {b"a": "leaf#0"})
    assert sim.call("leaf#0").value is None


def test_the_arguments_of_a_call_that_returned_futures_are_let_go() -> None:
    sim = Simulation(
        [a_task("root")],
        {
            "root": (Submit("a", leaf), Submit("b", mid, ("a",)), Value()),
            "mid": (Submit("x", other), Held(("x",))),
            "other": SLOW,
        },
    )
    sim.run(until=0.5)
    assert sim.states("mid") == ["held"] and sim.call("leaf#0").value is None
    sim.run()
    assert all(call.value is None for call in sim.scheduler.calls)
