"""Why a call runs, waits, was skipped or retried: one sentence for each state."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
from scripts import (
    Again,
    Behaviour,
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
from taskrun.core.explain import explain
from taskrun.model import Limit

SLOW: Script = (Run(5.0), Value())
leaf = a_task("leaf")
fetch = a_task("fetch", {"url": each(["a", "b", "c", "d", "e"])})


def at_one_second(*tasks: Any, does: Mapping[str, Behaviour], **options: Any) -> Simulation:
    sim = Simulation(tasks, does, **{"policy": "keep-going", **options})
    sim.run(until=1.0)
    return sim


def at_the_end(*tasks: Any, does: Mapping[str, Behaviour], **options: Any) -> Simulation:
    sim = Simulation(tasks, does, **{"policy": "keep-going", **options})
    sim.run()
    return sim


# -- while it runs --------------------------------------------------------------------


def test_a_call_waits_for_a_call() -> None:
    words = a_task("words", {"page": each(fetch)})
    sim = at_one_second(words, does={"fetch": SLOW})
    assert sim.explain("words[1]") == "words[1] waits for fetch[1] (running)"


def test_a_call_waits_for_all_calls_of_a_task() -> None:
    total = a_task("total", {"pages": result(fetch)}, after=(leaf,))
    sim = at_one_second(total, does={"fetch": by_index({0: (Value(),)}, SLOW)}, slots=3)
    assert sim.explain("total") == "total waits for fetch (4 open)"


def test_a_call_waits_for_what_it_comes_after() -> None:
    sim = at_one_second(a_task("work", after=(leaf,)), does={"leaf": SLOW})
    assert sim.explain("work") == "work waits for leaf (1 open)"


def test_a_submitted_call_waits_for_its_arguments_of_which_three_are_named() -> None:
    keys = ("a", "b", "c", "d")
    steps = (*(Submit(key, leaf) for key in keys), Submit("x", a_task("join"), keys), Run(9.0))
    sim = at_one_second(a_task("root"), does={"root": steps, "leaf": SLOW}, slots=2)
    assert sim.explain("join#0") == (
        "join#0 waits for leaf#0 (running), leaf#1 (ready), leaf#2 (ready) and 1 more"
    )


def test_a_ready_call_waits_for_a_slot() -> None:
    sim = at_one_second(fetch, does={"fetch": SLOW})
    assert sim.explain("fetch[4]") == ("fetch[4] is ready and waits for a slot: 2 of 2 are taken")


def test_a_ready_call_waits_for_a_slot_and_for_its_limit() -> None:
    hourly = Limit(1, per=3600.0, identity="a")
    polite = a_task("polite", {"n": each([1, 2])}, limits=(hourly,))
    other = a_task("other", priority=1)
    sim = at_one_second(polite, other, does={"polite": SLOW, "other": SLOW}, slots=2)
    assert sim.states("polite") == ["running", "ready"]
    assert sim.explain("polite[1]") == (
        "polite[1] is ready and waits for a slot: 2 of 2 are taken, and until limit(1) per 3600 s "
        "lets it pass"
    )


def test_a_ready_call_waits_for_a_resource() -> None:
    train = a_task("train", {"n": each([1, 2])}, resources={"gpu": 1})
    sim = at_one_second(train, does={"train": SLOW}, resources={"gpu": 1})
    assert sim.explain("train[1]") == "train[1] is ready and waits until enough gpu is free"


def test_a_ready_call_leaves_alone_what_a_better_one_waits_for() -> None:
    first = a_task("first", resources={"gpu": 1})
    best = a_task("best", resources={"gpu": 2}, priority=1, after=(leaf,))
    last = a_task("last", {"x": result(leaf)}, resources={"gpu": 1})
    does = {"first": SLOW}
    sim = at_one_second(first, best, last, does=does, slots=4, resources={"gpu": 2})
    assert sim.explain("best") == "best is ready and waits until enough gpu is free"
    assert sim.explain("last") == "last is ready and waits for its turn"


def test_a_running_call_runs_in_a_worker() -> None:
    sim = at_one_second(leaf, does={"leaf": SLOW})
    assert sim.explain("leaf") == "leaf runs in worker w1, attempt 1"


def test_both_names_of_a_call_are_said_and_why_it_takes_part() -> None:
    sim = at_one_second(leaf, a_task("work", {"x": result(leaf)}), does={"leaf": SLOW})
    sim.call("leaf").label = "page 1"
    told = explain(sim.scheduler, sim.call("leaf"), sim.now, "needed by work")
    assert told == "page 1 (leaf) runs in worker w1, attempt 1 (needed by work)"
    assert sim.explain("work") == "work waits for leaf (1 open)"


def test_a_running_call_waits_for_calls_that_it_made() -> None:
    steps = (Submit("a", leaf), WaitFor(("a",)))
    sim = at_one_second(a_task("root"), does={"root": steps, "leaf": SLOW})
    assert sim.explain("root") == "root runs and waits for leaf#0 (running)"


@pytest.mark.parametrize(
    ("key", "what"),
    [
        (m.OUTSIDE, "shared state or a channel"),
        (m.OUTSIDE_ALONE, "a lock or a semaphore of the shared state"),
    ],
)
def test_a_running_call_waits_for_shared_state(key: bytes, what: str) -> None:
    sim = at_one_second(leaf, does={"leaf": SLOW})
    sim.post(m.Waiting(1, 0, 1, (key,), False))
    assert sim.explain("leaf") == f"leaf runs and waits for {what}"
    sim.post(m.Resumed(1, 0, 1))
    assert sim.explain("leaf") == "leaf runs in worker w1, attempt 1"


def test_a_call_that_returned_futures_waits_for_them() -> None:
    steps = (Submit("a", leaf), Held(("a",)))
    sim = at_one_second(a_task("root"), does={"root": steps, "leaf": SLOW})
    assert sim.explain("root") == "root returned futures and waits for leaf#0 (running)"


def test_a_sleeping_call_says_what_became_of_its_last_attempt() -> None:
    sim = at_one_second(a_task("work", retries=1, backoff=9), does={"work": (Error("bad row"),)})
    sim.now = 2.0  # it is due after 9 to 11.25 seconds
    said = re.fullmatch(
        r"work is tried again in (\d+\.\d) s \(attempt 2\); "
        "attempt 1 ended with ValueError: bad row",
        sim.explain("work"),
    )
    assert said is not None and 7.0 <= float(said[1]) <= 9.3


def test_a_call_that_is_tried_again_says_why() -> None:
    does = {"work": tries((Dies(),), SLOW)}
    sim = at_one_second(a_task("work", retries=1), does=does)
    assert sim.explain("work") == (
        "work runs in worker w2, attempt 2; attempt 1 ended with WorkerLost: the worker that "
        "executed work (attempt 1) was killed by SIGKILL"
    )


# -- afterwards -----------------------------------------------------------------------


def test_a_call_succeeded_perhaps_in_a_later_attempt() -> None:
    does = {"retried": tries((Error(),), (Value(),))}
    sim = at_the_end(leaf, a_task("retried", retries=1), does=does)
    assert sim.explain("leaf") == "leaf succeeded"
    assert sim.explain("retried") == "retried succeeded in attempt 2"


def test_a_call_failed_perhaps_in_a_later_attempt() -> None:
    does = {"leaf": (Error("bad"),), "retried": (Error("bad"),)}
    sim = at_the_end(leaf, a_task("retried", retries=1), does=does)
    assert sim.explain("leaf") == "leaf failed: ValueError: bad"
    assert sim.explain("retried") == "retried failed in attempt 2: ValueError: bad"


def test_a_call_was_skipped_because_of_the_root_failure() -> None:
    words = a_task("words", {"page": each(fetch)})
    total = a_task("total", {"words": result(words)})
    sim = at_the_end(total, does={"fetch": by_index({3: (Error(),)})})
    assert sim.explain("words[3]") == "words[3] was skipped, because fetch[3] failed"
    assert sim.explain("total") == "total was skipped, because fetch[3] failed"


def test_a_placeholder_was_skipped_because_nobody_can_count_its_items() -> None:
    urls = a_task("urls")
    sim = at_the_end(a_task("get", {"url": each(urls)}), does={"urls": (Error(),)})
    assert sim.explain("get[*]") == "get[*] was skipped, because urls failed"


def test_a_call_skipped_itself() -> None:
    sim = at_the_end(leaf, does={"leaf": (Skipped("it is Sunday"),)})
    assert sim.explain("leaf") == "leaf was skipped: it is Sunday"


@pytest.mark.parametrize("when", [0.005, 1.0])
def test_a_call_was_cancelled_for_a_reason(when: float) -> None:
    sim = Simulation([leaf], {"leaf": SLOW})
    sim.at(when, lambda: sim.post(m.CancelCalls((0,), "somebody said so")))
    sim.run()
    assert sim.explain("leaf") == "leaf was cancelled: somebody said so"


def test_a_call_was_cancelled_with_one_that_it_needs() -> None:
    sim = Simulation([a_task("work", {"x": result(leaf)})], {"leaf": SLOW})
    sim.at(1.0, lambda: sim.post(m.CancelCalls((0,))))
    sim.run()
    assert sim.explain("work") == "work was cancelled, because leaf was cancelled"


def test_a_call_was_cancelled_because_the_run_was_stopped() -> None:
    sim = at_the_end(fetch, does={"fetch": by_index({0: (Error(),)}, SLOW)}, policy="stop")
    assert sim.explain("fetch[4]") == (
        "fetch[4] was cancelled, because the run was stopped: fetch[0] failed"
    )


def test_a_running_call_was_interrupted_because_the_run_was_stopped() -> None:
    sim = Simulation([leaf], {"leaf": SLOW})
    sim.at(1.0, lambda: sim.post(m.Stop("Ctrl-C")))
    sim.run()
    assert sim.explain("leaf") == "leaf was cancelled, because the run was stopped: Ctrl-C"


def test_a_call_that_asked_to_be_tried_again_until_it_failed() -> None:
    sim = at_the_end(a_task("poll", retries=1), does={"poll": (Again(0.1),)})
    assert sim.explain("poll") == "poll failed in attempt 2: Retry: not yet"
