"""Workers that execute many calls at a time, and items that come while a generator runs."""

from __future__ import annotations

from typing import Any

from scripts import Dies, Error, Run, Script, Submit, Value, WaitFor, Yield, a_task, by_index, tries
from simulation import Simulation

from taskrun import messages as m
from taskrun.api import each, result
from taskrun.calls import CANCELLED, FAILED, OK, SKIPPED

SLOW: Script = (Run(1.0), Value())
ASYNC = {"async": 1}


def waiting(count: int, **options: Any) -> Any:
    return a_task("t", {"x": each(range(count))}, lane="async", **options)


# -- many calls in one worker ---------------------------------------------------------


def test_a_worker_of_a_lane_gets_as_many_calls_as_it_has_slots() -> None:
    sim = Simulation([waiting(6)], {"t": SLOW}, slots=1, lanes=ASYNC)
    assert sim.run() == 0
    assert sim.of(m.StartWorkers) == [m.StartWorkers(1, "async")]
    assert 2.0 <= sim.now < 2.1  # three at a time


def test_workers_of_a_lane_start_only_where_the_graph_needs_them() -> None:
    sim = Simulation([a_task("t")], lanes={"async": 2, "thread": 1})
    sim.run()
    assert sim.of(m.StartWorkers) == [m.StartWorkers(1)]


def test_calls_that_wait_in_a_lane_take_no_slot_from_those_that_compute() -> None:
    compute = a_task("compute", {"x": each(range(4))})
    sim = Simulation([waiting(3), compute], {"t": SLOW, "compute": SLOW}, slots=2, lanes=ASYNC)
    sim.run()
    assert sim.now < 2.1


def test_a_lane_without_workers_of_its_own_is_executed_one_by_one() -> None:
    sim = Simulation([waiting(4)], {"t": SLOW}, slots=2)
    sim.run()
    assert 2.0 <= sim.now < 2.1


def test_the_calls_of_a_lost_worker_are_each_lost_or_tried_again() -> None:
    does = {"t": tries((Run(5.0),), SLOW)}
    sim = Simulation([waiting(3, retries=1)], does, lanes=ASYNC)
    sim.at(0.5, lambda: sim.kill(1))
    assert sim.run() == 0
    assert all(sim.outcomes(f"t[{n}]") == ["lost", "value"] for n in range(3))

    sim = Simulation([waiting(3)], does, lanes=ASYNC, policy="keep-going")
    sim.at(0.5, lambda: sim.kill(1))
    assert sim.run() == 1
    assert sim.states("t") == [FAILED] * 3


def test_what_had_ended_before_the_worker_died_is_not_lost() -> None:
    does = {"t": by_index({2: (Run(0.1), Dies())}, (Run(0.01), Value()))}
    sim = Simulation([waiting(3)], does, lanes=ASYNC, flushes=0.0, policy="keep-going")
    sim.run()
    assert sim.states("t") == [OK, OK, FAILED]


def test_a_call_that_waits_leaves_its_slot_to_those_it_waits_for() -> None:
    leaf = a_task("leaf", lane="async")
    does: dict[str, Script] = {"t": (Submit("c", leaf), WaitFor(("c",)), Value()), "leaf": SLOW}
    sim = Simulation([waiting(9)], does, lanes=ASYNC)
    assert sim.run() == 0
    assert sim.now < 4.0


def test_a_call_of_a_lane_with_workers_of_its_own_is_nested_in_no_other() -> None:
    leaf = a_task("leaf", lane="async")
    parent = a_task("parent", {"x": each(range(12))})
    does: dict[str, Script] = {
        "parent": (Submit("c", leaf), WaitFor(("c",)), Value()),
        "leaf": SLOW,
    }
    sim = Simulation([parent], does, lanes=ASYNC, slots=1)
    assert sim.run() == 0
    assert not [command for command in sim.of(m.Assign) if command.nested]
    given = [call.id for command in sim.of(m.Assign) for call in command.calls]
    assert len(given) == len(set(given)) == 24


def test_calls_that_wait_across_lanes_end_however_many_there_are() -> None:
    leaf, mid = a_task("leaf"), a_task("mid", lane="async")
    parent = a_task("parent", {"x": each(range(12))})
    does: dict[str, Script] = {
        "parent": (Submit("m", mid), WaitFor(("m",)), Value()),
        "mid": (Submit("l", leaf), WaitFor(("l",)), Value()),
    }
    sim = Simulation([parent], does, lanes={"async": 9}, slots=1)
    assert sim.run() == 0
    assert {call.recipe.name for command in sim.of(m.Assign) if command.nested
            for call in command.calls} == {"leaf"}  # fmt: skip


def test_a_retiring_worker_finishes_and_another_takes_its_place() -> None:
    sim = Simulation([waiting(6)], {"t": SLOW}, lanes=ASYNC)
    sim.at(0.5, lambda: sim.post(m.Retiring(1)))
    assert sim.run() == 0
    assert len(sim.of(m.StartWorkers)) == 2
    assert sim.of(m.StopWorker) == [m.StopWorker(1)]
    assert {command.worker for command in sim.of(m.Assign)} == {1, 2}


def test_a_retiring_worker_of_the_process_lane_gives_back_what_it_has_not_begun() -> None:
    task = a_task("t", {"x": each(range(4))})
    sim = Simulation([task], {"t": SLOW}, slots=1)
    sim.at(0.5, lambda: sim.post(m.Retiring(1)))
    assert sim.run() == 0
    assert sim.of(m.StopWorker)[0] == m.StopWorker(1)


def test_a_timeout_ends_one_call_and_not_the_others() -> None:
    does = {"t": by_index({1: (Run(9.0), Value())}, SLOW)}
    sim = Simulation([waiting(3, timeout=2.0)], does, lanes=ASYNC, policy="keep-going")
    sim.run()
    assert sim.states("t") == [OK, FAILED, OK]
    assert sim.now < 2.5


def test_an_engine_gets_every_call_and_is_asked_for_no_worker() -> None:
    sim = Simulation([waiting(5), a_task("u")], {"t": SLOW}, engine=True)
    sim.at(0.0, lambda: sim.new_worker(slots=5))
    assert sim.run() == 0
    assert not sim.of(m.StartWorkers)
    assert sim.now < 2.1


def test_more_capacity_means_more_workers() -> None:
    sim = Simulation([a_task("t", {"x": each(range(8))})], {"t": SLOW}, slots=1)
    sim.at(0.5, lambda: sim.post(m.Capacity(4)))
    assert sim.run() == 0
    assert sim.now < 3.5


def test_machines_that_are_there_for_a_lane_alone_mean_more_workers_of_it() -> None:
    sim = Simulation([waiting(9)], {"t": SLOW}, slots=1, lanes=ASYNC)
    sim.at(0.5, lambda: sim.post(m.Capacity(1, lanes={"async": 2, "thread": 1})))
    assert sim.run() == 0
    assert 1.5 <= sim.now < 1.7  # three at a time, in three workers


def test_a_lane_has_all_its_workers_as_soon_as_the_first_is_not_idle() -> None:
    first, long = a_task("first"), a_task("long", lane="async")
    after = a_task("after", {"x": each(range(2))}, lane="async", after=[first])
    does = {"first": (Run(0.5), Value()), "long": (Run(3.0), Value())}
    sim = Simulation([first, long, after], does, slots=1, lanes={"async": 2})
    assert sim.run() == 0
    started = sum(each.count for each in sim.of(m.StartWorkers) if each.lane == "async")
    assert started == 2


# -- streams --------------------------------------------------------------------------

STREAM: Script = (Yield("ab"), Run(1.0), Yield("c"), Run(1.0), Value(items=("d",)))
source = a_task("source")
consume = a_task("consume", {"x": each(source)})
collect = a_task("collect", {"x": result(consume, errors="skip")})


def test_items_are_consumed_while_the_generator_runs() -> None:
    sim = Simulation([source, consume, collect], {"source": STREAM}, slots=2)
    assert sim.run() == 0
    assert [sim.began(f"consume[{n}]")[0] // 1.0 for n in range(4)] == [0, 0, 1, 2]
    assert [sim.got(f"consume[{n}]") for n in range(4)] == [("a",), ("b",), ("c",), ("d",)]
    assert sim.began("collect")[0] >= sim.ended("consume[3]")


def test_a_generator_that_is_tried_again_does_not_deliver_an_item_twice() -> None:
    does = {"source": tries((Yield("ab"), Run(0.5), Error()), STREAM)}
    again = a_task("source", retries=1)
    sim = Simulation([again, a_task("consume", {"x": each(again)})], does, slots=2)
    assert sim.run() == 0
    assert [sim.got(call.name) for call in sim.calls("consume")] == [
        ("a",), ("b",), ("c",), ("d",)
    ]  # fmt: skip
    assert all(len(sim.began(call.name)) == 1 for call in sim.calls("consume"))


def test_what_a_failed_generator_has_delivered_is_consumed_and_the_rest_skipped() -> None:
    does = {"source": (Yield("ab"), Run(0.5), Error())}
    sim = Simulation([source, consume, collect], does, slots=2, policy="keep-going")
    assert sim.run() == 0  # collect tolerates it
    assert [call.state for call in sim.scheduler.calls if call.recipe.name == "consume"] == [
        OK, OK, SKIPPED
    ]  # fmt: skip
    assert sim.got("collect") == (["consume[0]", "consume[1]"],)


def test_what_a_generator_yields_just_before_it_fails_is_consumed_too() -> None:
    does = {"source": (Yield("ab"), Run(0.5), Error(items="cd"))}
    sim = Simulation([source, consume, collect], does, slots=2, policy="keep-going")
    assert sim.run() == 0
    assert sim.got("collect") == ([f"consume[{n}]" for n in range(4)],)
    assert sim.got("consume[3]") == ("d",)
    again = a_task("source", retries=1)
    does = {"source": tries((Error(items="ab"),), STREAM)}
    sim = Simulation([again, a_task("consume", {"x": each(again)})], does, slots=2)
    assert sim.run() == 0
    assert [sim.got(f"consume[{n}]") for n in range(4)] == [("a",), ("b",), ("c",), ("d",)]


def test_a_stale_stream_is_ignored() -> None:
    sim = Simulation([source, consume], {"source": STREAM}, slots=2)
    sim.run(until=0.5)
    sim.post(m.Yielded(sim.call("source").id, 7, 2, ["x", "y"]))
    assert sim.run() == 0
    assert len(sim.calls("consume")) == 4


def test_a_stopped_run_consumes_nothing_more_of_a_stream() -> None:
    sim = Simulation([source, consume], {"source": STREAM}, slots=2)
    sim.run(until=0.5)
    sim.post(m.Stop("Ctrl-C"))
    sim.run()
    assert sim.call("source").state == CANCELLED
    assert not [call for call in sim.calls("consume")[2:] if call.state == OK]


def test_workers_that_are_starting_get_their_share() -> None:
    sim = Simulation([waiting(4)], {"t": SLOW}, lanes={"async": 2})
    sim.run()
    assert [len(command.calls) for command in sim.of(m.Assign)] == [2, 2]
    assert {command.worker for command in sim.of(m.Assign)} == {1, 2}
