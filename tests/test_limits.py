"""Limits: how many calls run, or start in a time, wherever they run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Runs, started
from scripts import Error, Run, Script, Submit, Value, WaitFor, a_task, tries
from simulation import Simulation

from taskrun import limit
from taskrun import messages as m
from taskrun.api import each
from taskrun.calls import CANCELLED, FAILED, OK
from taskrun.model import Limit

SLOW: Script = (Run(1.0), Value())
QUICK: Script = (Run(0.01), Value())


def fanned(count: int, *limits: Limit, **options: Any) -> Any:
    return a_task("t", {"x": each(range(count))}, limits=limits, **options)


def most_at_once(sim: Simulation, name: str = "t") -> int:
    """How many calls of a task overlapped."""
    spans = [(sim.began(call.name)[-1], sim.ended(call.name)) for call in sim.calls(name)]
    return max(sum(begin <= when < end for begin, end in spans) for when, _ in spans)


def by_three(call: Any) -> tuple[int, ...]:
    return tuple([call.index % 3 for _ in call.recipe.limits])


def test_no_more_calls_than_a_limit_allows_run_at_once() -> None:
    sim = Simulation([fanned(9, Limit(2, identity="a"))], {"t": SLOW}, slots=5)
    assert sim.run() == 0
    assert most_at_once(sim) == 2


def test_tasks_share_a_limit() -> None:
    one = Limit(1, identity="a")
    tasks = [fanned(3, one), a_task("u", {"x": each(range(3))}, limits=(one,))]
    sim = Simulation(tasks, {"t": SLOW, "u": SLOW}, slots=4)
    sim.run()
    assert sim.now >= 6.0


def test_each_value_of_the_key_has_a_limit_of_its_own() -> None:
    limit = Limit(1, key=abs, identity="a")
    sim = Simulation([fanned(9, limit)], {"t": SLOW}, slots=9, limit_keys=by_three)
    sim.run()
    assert most_at_once(sim) == 3
    assert 3.0 <= sim.now < 3.5


def test_no_more_calls_start_in_a_time_than_a_limit_allows() -> None:
    sim = Simulation([fanned(7, Limit(2, per=1.0, identity="a"))], {"t": QUICK}, slots=4)
    sim.run()
    starts = sorted(sim.began(call.name)[0] for call in sim.calls("t"))
    assert all(
        later - earlier >= 1.0 - 1e-6 for earlier, later in zip(starts, starts[2:], strict=False)
    )
    assert sim.now < 3.2


def test_a_call_that_its_limit_keeps_back_holds_no_worker() -> None:
    tasks = [fanned(4, Limit(1, identity="a")), a_task("free", {"x": each(range(4))})]
    sim = Simulation(tasks, {"t": SLOW, "free": SLOW}, slots=2)
    sim.run()
    assert sim.now < 4.5  # both tasks side by side all the time


def test_a_call_that_is_tried_again_passes_its_limits_again() -> None:
    limit = Limit(1, per=1.0, identity="a")
    sim = Simulation(
        [fanned(1, limit, retries=2)], {"t": tries((Error(),), (Error(),), QUICK)}, slots=2
    )
    assert sim.run() == 0
    first, second, third = sim.began("t[0]")
    assert second - first >= 1.0 - 1e-6 and third - second >= 1.0 - 1e-6


def test_a_limit_that_only_the_calls_waiting_for_it_hold_fails_the_call_and_says_so() -> None:
    limit = Limit(1, identity="a")
    child = a_task("child", limits=(limit,))
    parent = a_task("parent", limits=(limit,))
    does = {"parent": (Submit("c", child), WaitFor(("c",), catch=True), Value())}
    sim = Simulation([parent], does, slots=2)
    assert sim.run() == 0
    assert sim.states("child") == [FAILED]
    assert "limit(1) at once" in sim.calls("child")[0].failure.message


def test_two_calls_that_wait_for_each_others_limits_do_not_wait_for_ever() -> None:
    first, second = Limit(1, identity="a"), Limit(1, identity="b")
    to_a, to_b = a_task("to_a", limits=(first,)), a_task("to_b", limits=(second,))
    does: dict[str, Script] = {
        "has_a": (Run(0.1), Submit("c", to_b), WaitFor(("c",), catch=True), Value()),
        "has_b": (Run(0.1), Submit("c", to_a), WaitFor(("c",), catch=True), Value()),
    }
    tasks = [a_task("has_a", limits=(first,)), a_task("has_b", limits=(second,))]
    sim = Simulation(tasks, does, slots=2)
    assert sim.run() == 0
    assert sorted(sim.states("to_a") + sim.states("to_b")) == [FAILED, OK]


def test_why_a_call_waits_names_its_limit() -> None:
    sim = Simulation([fanned(2, Limit(1, identity="a"))], {"t": SLOW}, slots=2)
    sim.run(until=0.5)
    assert sim.explain("t[1]") == "t[1] is ready and waits until limit(1) at once lets it pass"


def test_a_parked_call_can_be_cancelled_and_the_next_one_goes_on() -> None:
    sim = Simulation([fanned(3, Limit(1, identity="a"))], {"t": SLOW}, slots=2,
                     policy="keep-going")  # fmt: skip
    sim.run(until=0.5)
    sim.post(m.CancelCalls((sim.call("t[1]").id,)))
    sim.run()
    assert sim.states("t") == [OK, CANCELLED, OK]
    assert sim.now < 2.5


def test_what_is_parked_is_cancelled_when_the_run_is_stopped() -> None:
    sim = Simulation([fanned(3, Limit(1, identity="a"))], {"t": SLOW}, slots=2)
    sim.run(until=0.5)
    sim.post(m.Stop("Ctrl-C"))
    sim.run()
    assert sim.states("t")[1:] == [CANCELLED, CANCELLED]


def test_a_key_that_raises_fails_the_call_with_the_reason() -> None:
    def broken(call: Any) -> tuple[int, ...]:
        raise ValueError("no host in it")

    limit = Limit(1, key=abs, identity="a")
    sim = Simulation([fanned(1, limit)], limit_keys=broken)
    assert sim.run() == 1
    failure = sim.call("t[0]").failure
    assert failure is not None and failure.headline == (
        "ValueError: the key of a limit of t[0] cannot be had: no host in it"
    )


def test_gates_that_nobody_needs_any_more_are_let_go() -> None:
    limit = Limit(1, key=abs, identity="a")
    sim = Simulation([fanned(5000, limit)], {"t": (Value(),)}, audit=False,
                     limit_keys=lambda call: (call.index,))  # fmt: skip
    sim.run()
    assert len(sim.scheduler._limits._gates) < 2500


# -- in a task file -------------------------------------------------------------------

POLITE = """
from taskrun import limit
shared = limit(1)

def host(url): return url.split("/")[0]

def starts(url):
    return host(url), time.time()

@task(limits=[limit(2, per="1s", key=host)])
def fetch(url=each(["a/1", "a/2", "a/3", "b/1", "b/2"])): return starts(url)

@task
def show(fetched=result(fetch)):
    first = min(at for _, at in fetched)
    print([(name, round(at - first) >= 1) for name, at in fetched])

@task(limits=shared)
def one(n=each(range(2))): return alone(n)

@task(limits=[shared])
def other(n=each(range(2))): return alone(n)

def alone(n):
    import os
    os.mkdir("alone")
    time.sleep(0.05)
    os.rmdir("alone")

@task(limits=limit(1, key=lambda word, size: word * size))
def submitted(word, size=2): return alone(word)

@task
def submits(): return [submitted.submit("x"), submitted.submit("x"), submitted.submit("xx", 1)]

@task(limits=[limit(1, key=host)])
def broken(n=each([1])): return n

def leaves(n): raise SystemExit(n)

@task(limits=[limit(1, key=leaves)])
def unkeyed(n=each([3])): return n

class Mute(Exception):
    def __str__(self): raise ValueError

def silent(n): raise Mute

@task(limits=[limit(1, key=silent)])
def muted(n=each([3])): return n

def all_of_it(**arguments): return str(arguments)
def by_place(size, /): return size

@task(limits=[limit(1, key=all_of_it), limit(1, key=by_place)])
def widely(word=each(["a", "b"]), size=3): return alone(word)
"""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    yield from started(tmp_path)


def test_a_polite_task_file_is_polite(runs: Runs) -> None:
    ended = runs.exec(POLITE, "show", "-j", "4")
    assert ended.status == 0, ended.err
    a, b = [("a", False), ("a", False), ("a", True)], [("b", False), ("b", False)]
    assert f"{a + b}" in ended.out


def test_a_limit_that_tasks_share_is_one_limit(runs: Runs) -> None:
    ended = runs.exec(POLITE, "one", "other", "-j", "4")
    assert ended.status == 0, ended.err


def test_submitted_calls_keep_to_their_limits(runs: Runs) -> None:
    ended = runs.exec(POLITE, "submits", "-j", "4")
    assert ended.status == 0, ended.err


def test_a_key_that_fails_in_a_task_file_is_the_calls_failure(runs: Runs) -> None:
    ended = runs.exec(POLITE, "broken", "-j", "2")
    assert ended.status == 1
    assert "the key of a limit of broken[0] cannot be had" in ended.out + ended.err
    assert 'return url.split("/")[0]' in ended.out + ended.err  # where in the key it was


@pytest.mark.parametrize(
    ("name", "says"), [("unkeyed", "SystemExit(3)"), ("muted", "Mute"), ("widely", "")]
)
def test_no_key_ends_the_coordinator(runs: Runs, name: str, says: str) -> None:
    ended = runs.exec(POLITE, name, "show", "-k")
    assert ended.status == bool(says)
    assert says in ended.err
    assert "[('a', False)" in ended.out  # the rest of the run goes on


@pytest.mark.parametrize(
    ("per", "seconds"), [("1s", 1.0), ("500ms", 0.5), ("2m", 120.0), ("h", 3600.0), (2.5, 2.5)]
)
def test_times_can_be_written_with_their_unit(per: Any, seconds: float) -> None:
    assert limit(1, per=per).per == seconds


async def asleep(n: int) -> int:
    return n


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"count": 0}, ValueError, "1 call or more"),
        ({"count": "3"}, TypeError, "a whole number of calls"),
        ({"count": 1, "per": "soon"}, ValueError, "a time such as"),
        ({"count": 1, "per": -1}, ValueError, "more than 0"),
        ({"count": 1, "key": "host"}, TypeError, "a function"),
        ({"count": 1, "key": asleep}, TypeError, "asleep is async"),
    ],
)
def test_what_is_no_limit_is_refused(options: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        limit(**options)
