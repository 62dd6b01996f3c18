"""Which call goes where, and when: order, resources, batches, and what is taken back."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from scripts import Dies, Error, Run, Script, Value, a_task, by_index
from simulation import Simulation

from taskrun import messages as m
from taskrun.api import each, result
from taskrun.core.placement import BATCH_CALLS
from taskrun.core.ready import Queue
from taskrun.core.resources import Resources
from taskrun.recipes import make_recipe

QUICK: Script = (Run(0.0001), Value())
SLOW: Script = (Run(1.0), Value())


def overlap(sim: Simulation, name: str) -> int:
    """How many calls of a task were executed at once, at most."""
    times = []
    for call in sim.calls(name):
        times += [(sim.began(call.name)[-1], 1), (sim.ended(call.name), -1)]
    most = now = 0
    for _, change in sorted(times):
        now += change
        most = max(most, now)
    return most


def many(name: str, count: int, **options: Any) -> Any:
    return a_task(name, {"n": each(list(range(count)))}, **options)


# -- workers --------------------------------------------------------------------------


@pytest.mark.parametrize(("slots", "calls", "workers"), [(1, 5, 1), (4, 2, 2), (4, 9, 4)])
def test_as_many_workers_start_as_there_are_slots_and_calls(
    slots: int, calls: int, workers: int
) -> None:
    sim = Simulation([many("work", calls)], {"work": SLOW}, slots=slots)
    sim.run()
    assert len(sim.of(m.WorkerReady)) == workers == overlap(sim, "work")


def test_a_lost_worker_is_replaced_only_if_there_is_work_for_another() -> None:
    sim = Simulation([many("work", 2)], {"work": by_index({0: (Dies(),)}, SLOW)}, slots=2)
    sim.run()
    assert len(sim.of(m.WorkerReady)) == 2


# -- order ----------------------------------------------------------------------------


def test_higher_priority_starts_first_and_within_it_first_come_first_served() -> None:
    tasks = [many("low", 2), many("high", 2, priority=5), many("less", 2, priority=-1)]
    sim = Simulation(tasks, slots=1)
    sim.run()
    assert sim.order() == ["high[0]", "high[1]", "low[0]", "low[1]", "less[0]", "less[1]"]


def test_what_is_known_to_take_longest_starts_first() -> None:
    tasks = [many("quick", 4), many("slow", 4)]
    sim = Simulation(tasks, {"quick": (Run(0.1),), "slow": (Run(5.0),)}, slots=1)
    sim.run()
    # One of each teaches what the rest will take.
    assert sim.order()[:2] == ["quick[0]", "slow[0]"]
    assert sim.order()[2:] == [*(f"slow[{n}]" for n in (1, 2, 3)),
                               *(f"quick[{n}]" for n in (1, 2, 3))]  # fmt: skip


def test_a_task_that_turns_out_to_take_longer_moves_up() -> None:
    tasks = [many("first", 9), many("second", 60)]
    does = {
        "first": by_index({0: (Run(0.1),)}, (Run(20.0), Value())),
        "second": (Run(1.0), Value()),
    }
    sim = Simulation(tasks, does, slots=2)
    sim.run()
    assert sim.order()[:4] == ["first[0]", "first[1]", "second[0]", "second[1]"]
    assert sim.began("first[2]")[0] == pytest.approx(20.0, abs=0.2)


def test_a_call_that_is_given_back_is_the_next_one_again() -> None:
    work = many("work", 400)
    sim = Simulation([work], {"work": by_index({50: SLOW}, QUICK)}, slots=2)
    sim.run()
    order = [int(name[5:-1]) for name in sim.order()]
    furthest = accumulate(order, max)
    assert all(far - n <= 2 * BATCH_CALLS for far, n in zip(furthest, order, strict=True))


# -- resources ------------------------------------------------------------------------


def test_a_call_gets_the_units_that_nobody_else_has() -> None:
    sim = Simulation([many("train", 4, resources={"gpu": 1})], {"train": SLOW},
                     slots=4, resources={"gpu": 2})  # fmt: skip
    sim.run(until=0.5)
    units = [call.units for call in sim.calls("train") if call.units]
    assert units == [{"gpu": [0]}, {"gpu": [1]}]
    sim.run()
    assert overlap(sim, "train") == 2


def test_parts_of_a_unit_share_it_and_leave_others_whole() -> None:
    tasks = [many("half", 2, resources={"gpu": 0.5}), a_task("whole", resources={"gpu": 1})]
    sim = Simulation(tasks, {"half": SLOW, "whole": SLOW}, slots=3, resources={"gpu": 2})
    sim.run(until=0.5)
    assert [call.units for call in sim.calls("half")] == [{"gpu": [0]}, {"gpu": [0]}]
    assert sim.call("whole").units == {"gpu": [1]}
    sim.run()


def test_memory_is_counted() -> None:
    sim = Simulation([many("load", 6, resources={"memory": 4e9})], {"load": SLOW},
                     slots=6, resources={"memory": 10e9})  # fmt: skip
    sim.run()
    assert overlap(sim, "load") == 2


def test_a_call_may_take_several_slots_or_a_part_of_one_or_none() -> None:
    def together(cpu: float) -> int:
        work = many("work", 12, resources={"cpu": cpu})
        sim = Simulation([work], {"work": SLOW}, slots=2)
        sim.run()
        return overlap(sim, "work")

    assert together(2) == 1
    assert together(0.5) == 4
    assert together(0) == 8  # as many as there may be workers
    assert together(0.3) == 6


def test_sums_of_fractions_leave_nothing_behind_that_keeps_a_call_out() -> None:
    parts = [many(f"part{n}", 7, resources={"cpu": n / 10}) for n in (1, 2, 3, 7)]
    whole = a_task("whole", {"parts": result(parts[0])}, resources={"cpu": 1}, priority=-1)
    sim = Simulation([*parts, whole], {"part1": (Run(0.3),)}, slots=1, spare_factor=9)
    assert sim.run() == 0
    assert sim.scheduler.placement.busy_cpu == 0.0


def test_a_call_that_needs_many_slots_is_not_starved_by_small_ones() -> None:
    small = many("small", 40)
    big = a_task("big", resources={"cpu": 2}, priority=1, after=(a_task("first"),))
    sim = Simulation([small, big], {"small": (Run(0.1),), "first": (Run(0.35),)}, slots=2)
    sim.run()
    assert sim.began("big")[0] < 0.8


def test_a_call_that_needs_several_units_is_not_starved_by_those_that_need_one() -> None:
    small = many("small", 40, resources={"gpu": 1})
    big = a_task("big", resources={"gpu": 2}, priority=1, after=(a_task("first"),))
    does = {
        "small": by_index({0: (Run(0.15),)}, (Run(0.1), Value())),
        "first": (Run(0.3), Value()),
    }
    sim = Simulation([small, big], does, slots=3, resources={"gpu": 2})
    sim.run()
    assert sim.began("big")[0] < 0.8


def test_calls_that_need_none_of_what_is_scarce_overtake() -> None:
    train = many("train", 3, resources={"gpu": 1}, priority=1)
    plain = many("plain", 3)
    sim = Simulation([train, plain], {"train": SLOW, "plain": SLOW}, slots=2, resources={"gpu": 1})
    sim.run()
    assert sim.began("plain[0]")[0] < sim.ended("train[0]")


def test_resources_are_free_again_after_every_kind_of_end() -> None:
    work = many("work", 6, resources={"gpu": 1, "memory": 3}, retries=1, timeout=5.0)
    ends: list[Script] = [(Error(),), (Dies(),), (Run(60.0),), (Run(60.0, deaf=True),)]
    does = {"work": by_index(dict(enumerate(ends)))}
    sim = Simulation([work], does, slots=3, policy="keep-going",
                     resources={"gpu": 2, "memory": 8})  # fmt: skip
    sim.run()
    assert [sim.scheduler.resources.used(name) for name in ("gpu", "memory")] == [0, 0]


def test_what_is_missing_is_named() -> None:
    resources = Resources({"cpu": 4, "gpu": 2})
    assert resources.missing({"gpu": 3}) == "gpu=3 (of 2)"
    assert resources.missing({"tpu": 1}) == "tpu=1 (there is none)"
    assert resources.missing({"cpu": 4, "gpu": 0.5}) is None


# -- batches --------------------------------------------------------------------------


def depths(seconds: float, **options: Any) -> list[int]:
    sim = Simulation([many("work", 3000)], {"work": (Run(seconds), Value())}, slots=1,
                     flushes=0.0, audit=False, **options)  # fmt: skip
    sim.run()
    return [len(command.calls) for command in sim.of(m.Assign)]


def test_the_first_call_of_a_task_goes_alone_and_then_batches_are_a_few_milliseconds() -> None:
    sizes = depths(0.0005)
    assert sizes[0] == 1 and max(sizes) == 2 + 8


def test_the_smallest_calls_go_in_batches_of_bounded_length() -> None:
    assert max(depths(0.000001)) == BATCH_CALLS


def test_long_calls_are_not_sent_in_advance() -> None:
    assert set(depths(0.2)) == {1}


def test_nothing_is_sent_in_advance_where_the_engine_does_not_want_it() -> None:
    assert set(depths(0.0005, ahead=False)) == {1}


@pytest.mark.parametrize("lane", ["process", "thread"])
def test_workers_that_could_not_be_had_are_asked_for_again_after_a_while(lane: str) -> None:
    task = many("work", 400, lane=lane)
    sim = Simulation([task], {"work": (Run(1.0),)}, slots=4, lanes={"thread": 4})
    usual, denied = sim.new_worker, []

    def new_worker(lane: str, **how: Any) -> Any:
        if sim.workers and sim.now < 20.0:
            denied.append(sim.now)
            sim.post(m.NoMoreWorkers(lane, 1))
            sim.post(m.WorkerLost(1000 + len(denied), "not started", None, "", lane))
            return None
        return usual(lane, **how)

    sim.new_worker = new_worker  # type: ignore[method-assign]
    assert sim.run() == 0
    assert len(denied) == 3  # those that were asked for together
    assert len(sim.workers) == 4 and sim.now > 30.0


def test_every_worker_gets_a_share_of_few_calls() -> None:
    sim = Simulation([many("work", 44)], {"work": QUICK}, slots=4, flushes=0.0)
    sim.run()
    assert max(len(command.calls) for command in sim.of(m.Assign)) <= 40 // 8


def test_calls_that_hold_resources_are_not_sent_in_advance() -> None:
    work = many("work", 100, resources={"memory": 1})
    sim = Simulation([work], {"work": QUICK}, slots=2, resources={"memory": 9})
    sim.run()
    assert {len(command.calls) for command in sim.of(m.Assign)} == {1}


# -- taking back ----------------------------------------------------------------------


def test_calls_behind_a_long_one_are_given_back_to_an_idle_worker() -> None:
    work = many("work", 300)
    sim = Simulation([work], {"work": by_index({150: (Run(5.0), Value())}, QUICK)}, slots=2)
    sim.run()
    assert any(event.calls for event in sim.of(m.GaveBack))
    others = [sim.ended(call.name) for call in sim.calls("work") if call.index != 150]
    assert max(others) < 0.2
    assert {call.attempt for call in sim.calls("work")} == {1}


def test_calls_behind_a_long_one_are_given_back_though_others_wait_for_a_resource() -> None:
    train = many("train", 3, resources={"gpu": 1})
    work = many("work", 300)
    does = {
        "train": (Run(9.0), Value()),
        "work": by_index({150: (Run(5.0), Value())}, QUICK),
    }
    sim = Simulation([train, work], does, slots=3, resources={"gpu": 1})
    sim.run()
    others = [sim.ended(call.name) for call in sim.calls("work") if call.index != 150]
    assert max(others) < 0.5


def test_a_worker_that_is_silent_for_long_is_asked_what_it_does() -> None:
    work = many("work", 100)
    sim = Simulation([work], {"work": by_index({50: (Run(5.0), Value())}, QUICK)},
                     slots=1, flushes=0.0)  # fmt: skip
    sim.run(until=2.0)
    assert sim.of(m.Reclaim)
    running = sim.call("work[50]")
    assert running.began is not None
    # What ended before it is known, though the batch is not over.
    assert sim.calls("work")[49].state == "ok"
    # And what comes after it waits in no queue of a worker.
    assert sim.calls("work")[51].state == "ready"
    sim.run()


def test_what_waits_behind_a_long_call_is_next_although_nobody_is_idle() -> None:
    work = many("work", 1000)
    does = {"work": by_index({50: (Run(5.0), Value()), 51: (Run(2.0), Value())},
                             (Run(0.005), Value()))}  # fmt: skip
    sim = Simulation([work], does, slots=2)
    sim.run()
    ((first,), (second,)) = sim.began("work[50]"), sim.began("work[51]")
    assert second - first < 0.2 and sim.ended("work[51]") < sim.ended("work[50]")
    assert max(sim.ended(call.name) for call in sim.calls("work")) < 6.1  # of 6.0 at best


def test_a_silent_worker_with_a_single_call_is_left_alone() -> None:
    sim = Simulation([many("work", 2)], {"work": (Run(9.0),)}, slots=2)
    sim.run()
    assert sim.of(m.Reclaim) == []


# -- estimates ------------------------------------------------------------------------


def test_the_estimate_follows_recent_attempts() -> None:
    queue = Queue(make_recipe(a_task("work"), 1, names=None), 0)
    queue.learn(1.0)
    assert queue.mean == 1.0
    for _ in range(50):
        queue.learn(3.0)
    assert queue.mean == pytest.approx(3.0, rel=0.01)
