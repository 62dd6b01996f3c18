"""The static graph: which calls there are, with which arguments, and when they may begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from scripts import (
    Again,
    Behaviour,
    Error,
    Held,
    Run,
    Script,
    Skipped,
    Submit,
    Value,
    a_task,
    by_index,
    tries,
)
from simulation import Simulation

from taskrun.api import each, result
from taskrun.core import graph
from taskrun.errors import RunError
from taskrun.messages import STOPS, CallsAdded
from taskrun.model import Failure, Task

FAILS: Script = (Run(0.01), Error())


@pytest.fixture(params=[1, 2, graph.SLICE], autouse=True)
def a_slice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many calls of a fan-out are made at a time."""
    monkeypatch.setattr(graph, "SLICE", request.param)


def items(*values: Any) -> Script:
    return (Run(0.01), Value(items=values))


def run(
    tasks: list[Task], does: Mapping[str, Behaviour] | None = None, **options: Any
) -> Simulation:
    sim = Simulation(tasks, does, **{"policy": "keep-going", **options})
    sim.run()
    return sim


def names(sim: Simulation, task: str) -> list[str]:
    return sorted(call.name for call in sim.calls(task))


# -- one call per item ----------------------------------------------------------------


def test_each_over_literal_items_makes_one_call_per_item_in_order() -> None:
    sim = run([a_task("square", {"x": each([5, 6, 7])})])
    assert [sim.got(f"square[{n}]") for n in range(3)] == [(5,), (6,), (7,)]


def test_each_over_no_items_makes_no_call_and_its_result_is_an_empty_list() -> None:
    square = a_task("square", {"x": each([])})
    twice = a_task("twice", {"x": each(square)})
    total = a_task("total", {"squares": result(square), "twices": result(twice)})
    sim = run([total])
    assert sim.calls("square") == sim.calls("twice") == []
    assert sim.got("total") == ([], [])


def test_a_run_of_nothing_ends_at_once() -> None:
    sim = run([a_task("nothing", {"x": each([])})])
    assert sim.scheduler.over and sim.now == 0.0 and sim.scheduler.status == 0


def test_each_over_a_single_call_takes_the_items_of_its_value() -> None:
    urls = a_task("urls")
    sim = run([a_task("fetch", {"url": each(urls)})], {"urls": items("a", "b")})
    assert [sim.got("fetch[0]"), sim.got("fetch[1]")] == [("a",), ("b",)]


def test_each_over_a_single_call_without_items_makes_no_call() -> None:
    urls = a_task("urls")
    sim = run([a_task("fetch", {"url": each(urls)})], {"urls": items()})
    assert sim.calls("fetch") == []


def test_each_over_a_fan_out_makes_one_call_per_call() -> None:
    fetch = a_task("fetch", {"url": each(["a", "b"])})
    sim = run([a_task("words", {"page": each(fetch)})])
    assert [sim.got("words[0]"), sim.got("words[1]")] == [("fetch[0]",), ("fetch[1]",)]


def test_each_over_a_generator_makes_one_call_per_yield() -> None:
    def generator() -> Any:
        yield

    pages = a_task("pages")
    pages.function = generator
    sim = run([a_task("words", {"page": each(pages)})], {"pages": items(1, 2, 3, 4)})
    assert names(sim, "words") == [f"words[{n}]" for n in range(4)]


def test_each_flat_takes_the_lists_of_a_fan_out_apart() -> None:
    split = a_task("split", {"text": each(["x", "y", "z"])})
    count = a_task("count", {"word": each(split, flat=True)})
    does = {"split": by_index({0: items("a", "b"), 1: items(), 2: items("c")})}
    sim = run([count], does)
    assert names(sim, "count") == ["count[0,0]", "count[0,1]", "count[2,0]"]
    assert [sim.got(name) for name in names(sim, "count")] == [("a",), ("b",), ("c",)]


def test_item_by_item_there_is_no_barrier() -> None:
    fetch = a_task("fetch", {"url": each(["slow", "fast"])})
    words = a_task("words", {"page": each(fetch)})
    sim = run([words], {"fetch": by_index({0: (Run(5.0),), 1: (Run(0.1),)})})
    assert sim.began("words[1]")[0] < sim.ended("fetch[0]")


def test_items_of_a_fan_out_are_expanded_as_each_call_ends() -> None:
    split = a_task("split", {"text": each(["slow", "fast"])})
    count = a_task("count", {"word": each(split, flat=True)})
    sim = run([count], {"split": by_index({0: (Run(5.0), Value())})})
    assert sim.began("count[1,0]")[0] < sim.ended("split[0]")


# -- together, or the product ---------------------------------------------------------


def test_parameters_that_descend_from_one_fan_out_advance_together() -> None:
    fetch = a_task("fetch", {"url": each(["a", "b"])})
    words = a_task("words", {"page": each(fetch)})
    sim = run([a_task("compare", {"page": each(fetch), "count": each(words)})])
    assert names(sim, "compare") == ["compare[0]", "compare[1]"]
    assert sim.got("compare[1]") == ("fetch[1]", "words[1]")


def test_the_same_iterable_object_advances_together() -> None:
    sizes = [1, 2]
    sim = run([a_task("square", {"width": each(sizes), "height": each(sizes)})])
    assert [sim.got("square[0]"), sim.got("square[1]")] == [(1, 1), (2, 2)]


def test_equal_iterables_that_are_not_the_same_make_the_product() -> None:
    sim = run([a_task("cell", {"row": each([1, 2]), "column": each([1, 2])})])
    assert [sim.got(name) for name in names(sim, "cell")] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_items_of_two_single_calls_make_the_product() -> None:
    rows, columns = a_task("rows"), a_task("columns")
    cell = a_task("cell", {"row": each(rows), "column": each(columns)})
    does = {"rows": items("a", "b"), "columns": (Run(3.0), Value(items=(1, 2)))}
    sim = run([cell], does)
    assert [sim.got(name) for name in names(sim, "cell")] == [
        ("a", 1), ("a", 2), ("b", 1), ("b", 2),
    ]  # fmt: skip


def test_the_items_of_one_single_call_advance_together() -> None:
    urls = a_task("urls")
    fetch = a_task("fetch", {"url": each(urls)})
    both = a_task("both", {"url": each(urls), "page": each(fetch)})
    sim = run([both], {"urls": items("a", "b")})
    assert [sim.got("both[0]"), sim.got("both[1]")] == [("a", "fetch[0]"), ("b", "fetch[1]")]


def test_items_are_known_to_a_product_that_unfolds_when_they_have_been_used() -> None:
    items_, slow = a_task("items"), a_task("slow")
    square = a_task("square", {"x": each(items_)})
    pair = a_task("pair", {"s": each(slow), "q": each(square)})
    does = {"items": items(1, 2, 3), "slow": (Run(1.0), Value(items="ab"))}
    sim = run([pair], does)
    assert sim.began("square[2]")[0] < 1.0
    assert names(sim, "pair") == [f"pair[{s},{q}]" for s in range(2) for q in range(3)]


def test_items_are_known_to_those_who_come_after_others_that_are_all_skipped() -> None:
    rows, columns = a_task("rows"), a_task("columns")
    cell = a_task("cell", {"row": each(rows), "column": each(columns)})
    shown = a_task("shown", {"cell": each(cell)})
    total = a_task("total", {"all": result(shown)})
    sim = run([total], {"rows": (Run(1.0), Value(items="ab")), "columns": FAILS})
    assert names(sim, "cell") == ["cell[0,*]", "cell[1,*]"]
    assert names(sim, "shown") == ["shown[0,*]", "shown[1,*]"]
    assert sim.states("total") == ["skipped"]


def test_a_product_and_one_of_its_factors_share_that_factor() -> None:
    row = a_task("row", {"r": each(["a", "b"])})
    cell = a_task("cell", {"row": each(row), "c": each([1, 2])})
    sim = run([a_task("check", {"row": each(row), "cell": each(cell)})])
    assert len(sim.calls("check")) == 4
    assert sim.got("check[1,0]") == ("row[1]", "cell[1,0]")


def test_flat_items_and_the_calls_that_they_come_from_advance_together() -> None:
    split = a_task("split", {"text": each(["x", "y"])})
    pair = a_task("pair", {"whole": each(split), "part": each(split, flat=True)})
    sim = run([pair], {"split": by_index({0: items("a"), 1: items("b", "c")})})
    assert [sim.got(name) for name in names(sim, "pair")] == [
        ("split[0]", "a"), ("split[1]", "b"), ("split[1]", "c"),
    ]  # fmt: skip


def test_the_result_of_a_product_is_in_item_order_whatever_ended_first() -> None:
    rows = a_task("rows")
    cell = a_task("cell", {"c": each([1, 2]), "row": each(rows)})
    total = a_task("total", {"cells": result(cell)})
    does = {"rows": items(1, 2), "cell": by_index({(0, 0): (Run(4.0),)})}
    sim = run([total], does, slots=4)
    assert sim.got("total") == (["cell[0,0]", "cell[0,1]", "cell[1,0]", "cell[1,1]"],)


def test_a_large_fan_out_begins_before_all_of_its_calls_are_made() -> None:
    step = graph.SLICE
    square = a_task("square", {"x": each(list(range(3 * step + 1)))})
    twice = a_task("twice", {"x": each(square)})
    sim = Simulation([square, twice], start=0.0)
    sim.begin()
    assert [len(sim.calls("square")), len(sim.calls("twice"))] == [step, step]
    (added,) = sim.of(CallsAdded)
    assert len(added.calls) == 2 * step and added.to_come == 2 * (2 * step + 1)
    sim.run()
    assert sim.states("twice") == ["ok"] * (3 * step + 1)
    assert sim.of(CallsAdded)[-1].to_come == 0


def test_many_expansions_can_wait_for_one_call() -> None:
    columns = a_task("columns")
    cell = a_task("cell", {"row": each(list(range(3000))), "column": each(columns)})
    sim = run([cell], {"columns": items(1)}, audit=False, slots=8)
    assert set(sim.states("cell")) == {"ok"} and len(sim.calls("cell")) == 3000


# -- results of failed calls ----------------------------------------------------------


def fan_in(errors: str, does: Mapping[str, Behaviour] | None = None, **options: Any) -> Simulation:
    fetch = a_task("fetch", {"url": each(["a", "b", "c"])})
    total = a_task("total", {"pages": result(fetch, errors=errors)})  # type: ignore[arg-type]
    return run([total], does or {"fetch": by_index({1: FAILS})}, **options)


def test_a_consumer_of_the_whole_result_is_skipped_if_a_call_failed() -> None:
    sim = fan_in("fail")
    assert sim.states("total") == ["skipped"]
    assert sim.states("fetch") == ["ok", "failed", "ok"]
    assert sim.scheduler.status == 1


def test_errors_skip_takes_what_succeeded_in_order() -> None:
    sim = fan_in("skip")
    assert sim.got("total") == (["fetch[0]", "fetch[2]"],)
    assert sim.scheduler.status == 0


def test_errors_keep_puts_the_failure_in_its_place() -> None:
    sim = fan_in("keep")
    [pages] = sim.got("total")
    assert pages[::2] == ["fetch[0]", "fetch[2]"]
    assert isinstance(pages[1], Failure) and pages[1].headline == "ValueError: bad"


@pytest.mark.parametrize(("errors", "got"), [("skip", None), ("keep", Failure)])
def test_a_tolerant_consumer_of_a_single_call_gets_none_or_the_failure(
    errors: str, got: Any
) -> None:
    one = a_task("one")
    total = a_task("total", {"one": result(one, errors=errors)})  # type: ignore[arg-type]
    [value] = run([total], {"one": FAILS}).got("total")
    assert value is got if got is None else isinstance(value, got)


def test_a_call_that_skips_itself_has_no_value_for_its_consumers() -> None:
    sim = fan_in("fail", {"fetch": by_index({0: (Skipped(),)})})
    assert sim.states("fetch") == ["skipped", "ok", "ok"]
    assert sim.states("total") == ["skipped"]
    assert sim.scheduler.status == 0


def test_item_by_item_only_the_consumers_of_the_failed_call_are_skipped() -> None:
    fetch = a_task("fetch", {"url": each(["a", "b"])})
    words = a_task("words", {"page": each(fetch)})
    sim = run([words], {"fetch": by_index({0: FAILS})})
    assert sim.states("words") == ["skipped", "ok"]
    assert sim.call("words[0]").cause is sim.call("fetch[0]")


def test_the_cause_of_a_skipped_call_is_the_root_failure() -> None:
    a = a_task("a")
    b = a_task("b", {"a": result(a)})
    c = a_task("c", {"b": result(b)})
    sim = run([c], {"a": FAILS})
    assert sim.states("b") == sim.states("c") == ["skipped"]
    assert sim.call("c").cause is sim.call("a")


# -- fan-outs over what failed --------------------------------------------------------


def test_one_placeholder_stands_for_the_items_of_a_failed_call() -> None:
    urls = a_task("urls")
    fetch = a_task("fetch", {"url": each(urls)})
    words = a_task("words", {"page": each(fetch)})
    sim = run([a_task("total", {"words": result(words)})], {"urls": FAILS})
    assert names(sim, "fetch") == ["fetch[*]"] and names(sim, "words") == ["words[*]"]
    assert {call.state for call in sim.scheduler.calls[1:]} == {"skipped"}


def test_a_placeholder_is_left_out_of_what_succeeded_and_kept_as_a_failure() -> None:
    urls = a_task("urls")
    fetch = a_task("fetch", {"url": each(urls)})
    some = a_task("some", {"pages": result(fetch, errors="skip")})
    all_ = a_task("all", {"pages": result(fetch, errors="keep")})
    sim = run([some, all_], {"urls": FAILS})
    assert sim.got("some") == ([],)
    [[kept]] = sim.got("all")
    assert isinstance(kept, Failure) and "because urls failed" in kept.message


def test_the_failure_of_a_generator_stands_behind_what_it_has_yielded() -> None:
    split = a_task("split", {"text": each(["x", "y"])})
    count = a_task("count", {"word": each(split, flat=True)})
    kept = a_task("kept", {"counts": result(count, errors="keep")})
    does = {"split": by_index({0: (Error(items="ab"),), 1: items("c")})}
    [[first, second, failure, last]] = run([kept], does).got("kept")
    assert [first, second, last] == ["count[0,0]", "count[0,1]", "count[1,0]"]
    assert isinstance(failure, Failure) and "because split[0] failed" in failure.message


def test_a_failed_factor_of_a_product_leaves_a_placeholder_per_other_item() -> None:
    columns = a_task("columns")
    cell = a_task("cell", {"row": each([1, 2]), "column": each(columns)})
    sim = run([cell], {"columns": FAILS})
    assert names(sim, "cell") == ["cell[0,*]", "cell[1,*]"]
    assert sim.states("cell") == ["skipped", "skipped"]


def test_a_failed_first_factor_leaves_one_placeholder_for_the_whole_product() -> None:
    rows = a_task("rows")
    cell = a_task("cell", {"row": each(rows), "column": each([1, 2])})
    assert names(run([cell], {"rows": FAILS}), "cell") == ["cell[*]"]


def test_flat_items_of_the_calls_that_succeeded_are_there_beside_a_placeholder() -> None:
    split = a_task("split", {"text": each(["x", "y"])})
    count = a_task("count", {"word": each(split, flat=True)})
    total = a_task("total", {"counts": result(count, errors="skip")})
    sim = run([total], {"split": by_index({0: FAILS, 1: items("a", "b")})})
    assert names(sim, "count") == ["count[0,*]", "count[1,0]", "count[1,1]"]
    assert sim.got("total") == (["count[1,0]", "count[1,1]"],)


def test_an_always_task_cannot_fan_out_over_items_that_nobody_knows() -> None:
    urls = a_task("urls")
    close = a_task("close", {"url": each(urls)}, always=True)
    assert run([close], {"urls": FAILS}).states("close") == ["skipped"]


# -- order without data, and teardown -------------------------------------------------


def test_after_waits_for_all_calls_of_a_task_and_pulls_it_in() -> None:
    setup = a_task("setup", {"n": each([1, 2, 3])})
    sim = run([a_task("work", after=(setup,))], {"setup": by_index({2: (Run(2.0),)})})
    assert sim.began("work")[0] >= sim.ended("setup[2]")


def test_a_task_after_a_failed_one_is_skipped() -> None:
    setup = a_task("setup")
    assert run([a_task("work", after=(setup,))], {"setup": FAILS}).states("work") == ["skipped"]


def test_an_always_task_runs_however_its_inputs_ended_and_gets_the_failure() -> None:
    work = a_task("work", {"n": each([1, 2])})
    close = a_task("close", {"works": result(work)}, always=True)
    per_call = a_task("per_call", {"work": each(work)}, always=True)
    sim = run([close, per_call], {"work": by_index({0: FAILS})}, policy="stop")
    [works] = sim.got("close")
    assert sim.states("close") == ["ok"] and isinstance(works[0], Failure)
    assert sim.states("per_call") == ["ok", "ok"]
    assert isinstance(sim.got("per_call[0]")[0], Failure)


def test_an_always_task_waits_for_its_inputs_like_any_other() -> None:
    work = a_task("work")
    sim = run([a_task("close", after=(work,), always=True)], {"work": (Run(3.0), Error())})
    assert sim.began("close")[0] >= 3.0


# -- tolerated failures ---------------------------------------------------------------


def test_a_failure_that_all_consumers_tolerate_neither_stops_the_run_nor_sets_its_status() -> None:
    fetch = a_task("fetch", {"url": each(["a", "b", "c", "d"])})
    total = a_task("total", {"pages": result(fetch, errors="skip")})
    sim = run([total], {"fetch": by_index({0: FAILS})}, policy="stop", slots=1)
    assert sim.scheduler.status == 0
    assert sim.states("fetch") == ["failed", "ok", "ok", "ok"]
    assert sim.states("total") == ["ok"]
    assert sim.call("fetch[0]").tolerated


@pytest.mark.parametrize("policy", ["stop", "fail-fast", "keep-going"])
def test_workers_know_whose_failures_stop_the_run(policy: str) -> None:
    fetch, other = a_task("fetch", {"x": each([1, 2])}), a_task("other")
    sim = run([a_task("kept", {"x": result(fetch, errors="keep")}), other], policy=policy)
    stops = [bool(sim.call(name).recipe.flags & STOPS) for name in ("fetch[0]", "kept", "other")]
    assert stops == ([False] * 3 if policy == "keep-going" else [False, True, True])


def test_a_failure_is_tolerated_through_consumers_that_are_skipped_for_it() -> None:
    fetch = a_task("fetch", {"url": each(["a", "b"])})
    words = a_task("words", {"page": each(fetch)})
    total = a_task("total", {"counts": result(words, errors="skip")})
    sim = run([total], {"fetch": by_index({0: FAILS})}, policy="stop")
    assert sim.scheduler.status == 0 and sim.call("fetch[0]").tolerated
    assert sim.got("total") == (["words[1]"],)


def test_one_consumer_that_does_not_tolerate_a_failure_is_enough() -> None:
    fetch = a_task("fetch", {"url": each(["a", "b"])})
    tolerant = a_task("tolerant", {"pages": result(fetch, errors="keep")})
    strict = a_task("strict", {"pages": result(fetch)})
    sim = run([tolerant, strict], {"fetch": by_index({0: FAILS})})
    assert sim.scheduler.status == 1 and not sim.call("fetch[0]").tolerated


def test_a_failure_that_nobody_consumes_is_not_tolerated() -> None:
    assert run([a_task("alone")], {"alone": FAILS}).scheduler.status == 1


def test_teardown_has_no_say_in_what_is_tolerated() -> None:
    work = a_task("work")
    close = a_task("close", after=(work,), always=True)
    total = a_task("total", {"work": result(work, errors="skip")})
    assert run([close], {"work": FAILS}).scheduler.status == 1
    assert run([close, total], {"work": FAILS}).scheduler.status == 0


# -- letting values go ----------------------------------------------------------------


def test_a_value_is_let_go_when_its_last_consumer_has_ended() -> None:
    fetch = a_task("fetch", {"url": each(["a", "b"])})
    words = a_task("words", {"page": each(fetch)})
    sim = Simulation([words], {"words": by_index({1: (Run(5.0),)})})
    sim.run(until=1.0)
    assert sim.states("words") == ["ok", "running"]
    assert [call.value for call in sim.calls("fetch")] == [None, "fetch[1]"]
    sim.run()
    assert all(call.value is None for call in sim.scheduler.calls)


def test_a_value_is_kept_for_the_retry_of_its_consumer() -> None:
    one = a_task("one")
    two = a_task("two", {"one": result(one)}, retries=1)
    sim = run([two], {"two": tries((Error(),), (Again(2.0),), (Value(),))})
    assert sim.arguments[(sim.call("two").id, 2)] == ("one",)
    assert sim.call("one").value is None


def test_values_are_kept_while_the_whole_result_may_be_asked_for() -> None:
    fetch = a_task("fetch", {"url": each(["a", "b"])})
    late = a_task("late")
    total = a_task("total", {"pages": result(fetch), "late": result(late)})
    sim = Simulation([total], {"late": (Run(5.0),)}, slots=4)
    sim.run(until=1.0)
    assert [call.value for call in sim.calls("fetch")] == ["fetch[0]", "fetch[1]"]
    sim.run()
    assert [call.value for call in sim.calls("fetch")] == [None, None]


def test_values_that_nobody_takes_are_let_go_at_once_unless_wanted() -> None:
    one, two = a_task("one"), a_task("two")
    sim = run([one, two], wanted=("two",))
    assert sim.call("one").value is None
    assert sim.call("two").value == "two"


def test_items_are_let_go_with_the_value_after_the_last_of_their_calls() -> None:
    urls = a_task("urls")
    fetch = a_task("fetch", {"url": each(urls)})
    sim = Simulation([fetch], {"fetch": by_index({2: (Run(5.0),)})}, slots=3)
    sim.run(until=1.0)
    assert sim.call("urls").items is not None
    sim.run()
    assert sim.call("urls").items is None


def test_a_failed_consumer_lets_go_of_its_inputs_too() -> None:
    one = a_task("one")
    sim = run([a_task("two", {"one": result(one)})], {"two": FAILS})
    assert sim.call("one").value is None


def test_a_static_call_that_returned_futures_lets_go_of_their_values() -> None:
    work, leaf = a_task("work"), a_task("leaf")
    sim = run([work], {"work": (Submit("a", leaf), Held(("a",)))})
    assert sim.states("work") == ["ok"]
    assert sim.call("leaf#0").value is None


# -- before anything runs -------------------------------------------------------------


def test_a_resource_that_nobody_has_is_an_error_before_anything_runs() -> None:
    sim = Simulation([a_task("train", resources={"gpu": 1})])
    with pytest.raises(RunError, match=r"train needs gpu=1 .* with --resource gpu=N"):
        sim.run()
