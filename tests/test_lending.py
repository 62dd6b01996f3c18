"""How a server shares out resources: who is planned what, who has what, and whose turn it is."""

from __future__ import annotations

from typing import Any

import pytest
from fleet import Fleet, Member
from scripts import Run, Script, Submit, Value, WaitFor, a_task
from test_core_machine import World

from taskrun.api import each
from taskrun.demand import HERE

GPU = {"gpu": 1.0}
PAIR = {"gpu": 2.0}


def calls(name: str, count: int, resources: dict[str, float], **options: Any) -> Any:
    return a_task(name, {"n": each(range(count))}, resources=resources, **options)


def lasting(seconds: float) -> dict[str, Script]:
    return dict.fromkeys(("t", "u"), (Run(seconds), Value()))


def server(slots: int = 8, **stock: float) -> Fleet:
    return Fleet({HERE: stock}, {HERE: slots})


def began(member: Any, name: str) -> list[float]:
    return sorted(when for call in member.calls(name) for when in member.began(call.name))


def test_one_that_is_alone_has_all_that_it_can_use() -> None:
    fleet = server(gpu=4)
    alone = fleet.add("a", [calls("t", 8, GPU)], lasting(1.0))
    fleet.run()
    assert fleet.now < 3.0 and alone.scheduler.status == 0


def test_those_that_need_the_same_have_the_same() -> None:
    fleet = server(gpu=4)
    both = [fleet.add(name, [calls("t", 8, GPU)], lasting(1.0)) for name in "ab"]
    fleet.run(until=3.0)
    assert [len(began(each, "t")) for each in both] == [6, 6]


def test_what_one_does_not_need_is_for_the_others() -> None:
    fleet = server(gpu=4)
    few, many = (
        fleet.add(name, [calls("t", count, GPU)], lasting(1.0))
        for name, count in (("a", 1), ("b", 9))
    )
    fleet.run(until=2.9)
    assert (len(began(few, "t")), len(began(many, "t"))) == (1, 9)


def test_they_take_turns_where_there_is_not_enough_for_all() -> None:
    fleet = server(gpu=1)
    both = [fleet.add(name, [calls("t", 100, GPU)], lasting(0.1)) for name in "ab"]
    fleet.run(until=12.0)
    counts = [len(began(each, "t")) for each in both]
    assert min(counts) > 40 and max(counts) - min(counts) < 25
    fleet.run()


@pytest.mark.parametrize("first", ["a", "b"])
def test_one_that_needs_all_at_once_gets_its_turn(first: str) -> None:
    fleet = server(gpu=2)
    wants = {"a": GPU, "b": PAIR}
    for name in sorted(wants, key=lambda name: name != first):
        fleet.add(name, [calls("t", 60, wants[name])], lasting(0.3))
    fleet.run(until=9.0)
    assert len(began(fleet.members["b"], "t")) > 6 and len(began(fleet.members["a"], "t")) > 12
    fleet.run()


def test_no_call_is_cut_short_for_somebody_elses_turn() -> None:
    fleet = server(gpu=1)
    long = fleet.add("a", [calls("t", 2, GPU)], lasting(30.0))
    fleet.run(until=1.0)
    short = fleet.add("b", [calls("u", 1, GPU)], lasting(0.1))
    fleet.run()
    assert 30.0 < began(short, "u")[0] < 31.0
    assert began(long, "t")[1] > began(short, "u")[0]


def test_two_that_need_two_kinds_at_once_do_not_wait_for_each_other() -> None:
    fleet = server(gpu=1, licence=1)
    both = [fleet.add(name, [calls("t", 20, {"gpu": 1.0, "licence": 1.0})], lasting(0.5))
            for name in "ab"]  # fmt: skip
    fleet.run()
    assert [each.scheduler.status for each in both] == [0, 0]


def test_a_run_that_is_killed_gives_back_what_it_had() -> None:
    fleet = server(gpu=1)
    fleet.add("a", [calls("t", 1, GPU)], lasting(1000.0))
    fleet.run(until=1.0)
    other = fleet.add("b", [calls("u", 1, GPU)], lasting(1.0))
    fleet.run(until=5.0)
    assert not began(other, "u")
    fleet.kill("a")
    fleet.run()
    assert 7.0 <= began(other, "u")[0] < 7.5


def test_memory_is_shared_out_as_well() -> None:
    fleet = server(memory=10.0)
    both = [fleet.add(name, [calls("t", 6, {"memory": 4.0})], lasting(1.0)) for name in "ab"]
    fleet.run()
    assert [each.scheduler.status for each in both] == [0, 0]


def test_parts_of_a_unit_are_for_calls_of_one_run() -> None:
    fleet = server(gpu=1)
    both = [fleet.add(name, [calls("t", 40, {"gpu": 0.5})], lasting(0.5)) for name in "ab"]
    fleet.run()
    assert [each.scheduler.status for each in both] == [0, 0]
    assert fleet.now < 23.0  # two at a time


def test_a_run_gets_its_slot_where_its_gpu_is() -> None:
    fleet = Fleet({HERE: {}, "lab": {"gpu": 1.0}}, {HERE: 4, "lab": 1})
    plain = fleet.add("a", [calls("t", 40, {})], lasting(1.0))
    fleet.run(until=1.5)
    needs = fleet.add("b", [calls("u", 3, GPU)], lasting(0.5))
    fleet.run(until=6.0)
    assert len(began(needs, "u")) == 3
    fleet.run()
    assert plain.scheduler.status == 0


def test_who_waits_for_a_call_of_its_own_gets_what_that_needs_before_one_that_needs_all() -> None:
    child = a_task("child", resources=GPU)
    does = {"t": (Submit("c", child), WaitFor(("c",)), Value()), "child": (Run(0.2), Value())}
    fleet = server(gpu=2, desk=1)
    parents = fleet.add("a", [calls("t", 40, {**GPU, "desk": 1.0})], does)
    all_of_it = fleet.add("b", [calls("u", 5, PAIR)], lasting(0.2))
    fleet.run()
    assert [parents.scheduler.status, all_of_it.scheduler.status] == [0, 0]
    assert began(all_of_it, "u")[0] < began(parents, "t")[-1]  # a stream of them keeps nobody out
    assert not fleet.verdicts


def test_of_runs_that_hold_what_the_others_wait_for_the_last_one_is_told() -> None:
    child = a_task("child", resources=GPU)
    does = {"t": (Run(0.5), Submit("c", child), WaitFor(("c",), catch=True), Value())}
    fleet = server(gpu=2)
    both = [fleet.add(name, [a_task("t", resources=GPU)], does) for name in "ab"]
    fleet.run()
    assert fleet.verdicts[:1] == ["b"]
    assert [each.states("child") for each in both] == [["ok"], ["failed"]]
    assert [each.states("t") for each in both] == [["ok"], ["ok"]]


@pytest.mark.parametrize("seed", [*range(40), 80, 83, 107, 287, 469, 477, 500, 551])
def test_whatever_runs_do_nobody_holds_what_another_one_holds_and_all_end(seed: int) -> None:
    nodes = seed % 2
    stock = {"gpu": 2.0, "memory": 8.0}
    places = {HERE: {"memory": 8.0}, "x": stock, "y": {"gpu": 2.0}} if nodes else {HERE: stock}
    fleet = Fleet(places, {HERE: 2, "x": 2, "y": 1} if nodes else {HERE: 4}, seed=seed)
    for number, name in enumerate("abc"):
        world = World(100 * seed + number)
        options = {"places": places, "lanes": {}, "spare_factor": 4}
        fleet.members[name] = world.simulation(make=Member, **options)
        fleet.admit(name)
        fleet.run(until=fleet.now + 0.7)
    if seed % 3 == 0 and not fleet.members["b"].scheduler.over:
        fleet.kill("b")
    fleet.run()
