"""Calls that make calls and wait for them, in own workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from workshop import (
    Call,
    Make,
    Workshop,
    cancelled,
    interrupt,
)

from taskrun import messages as m
from taskrun.values import encode_failure

pytestmark = pytest.mark.timeout(120)


# -- calls that make calls ------------------------------------------------------------

GROWING = """
@task
def grow(x):
    first = same.submit(x)
    second = add.submit(first, y=[first, 2])
    same.submit(x)
    return first.result() + second.result()

@task
def give(x): return {"future": same.submit(x), "plain": x}

@task
def patient(x):
    future = same.submit(x)
    try:
        return future.result(timeout=0.05)
    except TimeoutError:
        return "gave up"

@task
def fail_below():
    try:
        same.submit(1).result()
    except ValueError as error:
        return f"caught {error}"

@task
def drop(x): same.submit(x).cancel()

@task
async def gather(x):
    import asyncio
    return await asyncio.gather(*[same.submit(number) for number in range(x)])

@task
def wrong(): add.submit(1)

@task
def both(x):
    print("outer begins")
    value = shout.submit(x).result()
    print("outer ends")
    return value

@task
def deep(x): return 0 if not x else 1 + deep.submit(x - 1).result()

@task
async def adeep(x): return 0 if not x else 1 + await adeep.submit(x - 1)

@task
def nested_sleep(x): return nap.submit(x).result()
"""


def deliver(shop: Workshop, worker: int, call: Any, values: dict[bytes, Any]) -> None:
    shop.engine.perform(m.Deliver(worker, values, call.id))


def test_submitted_calls_are_told_in_order_and_what_they_become_is_delivered(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "grow", 4)
    waiting = shop.await_event(m.Waiting)
    submitted = [one for event in shop.all(m.Submitted) for one in event.calls]
    (key1, recipe1, _, keys1), (key2, recipe2, _, keys2), (key3, recipe3, _, _) = submitted
    assert [recipe1.name, recipe2.name] == ["same", "add"]
    assert recipe1 is recipe3 and recipe1.names is None and recipe1.id != recipe2.id
    assert (keys1, keys2) == ((), (key1,))
    assert len({key1, key2, key3}) == 3
    assert (waiting.call, waiting.keys, waiting.any_of) == (call.id, (key1,), False)
    deliver(shop, worker, call, {key1: 40})
    assert shop.await_event(m.Waiting, 2).keys == (key2,)
    deliver(shop, worker, call, {key2: 2})
    assert shop.value(call) == 42


def test_the_same_submission_by_another_attempt_has_the_same_key(make: Make) -> None:
    shop = make(GROWING)
    first, second = shop.workers(2)
    keys = []
    for worker in (first, second):
        shop.start(worker, "patient", 3)
        shop.await_event(m.Resumed, len(keys) + 1)
        keys.append(shop.all(m.Submitted)[-1].calls[0][0])
    assert keys[0] == keys[1]


def test_a_submitted_call_is_executed_with_its_futures_filled_in(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "grow", 4)
    shop.await_event(m.Waiting)
    key1, recipe1, blob1, _ = shop.all(m.Submitted)[0].calls[0]
    _, recipe2, blob2, _ = [one for event in shop.all(m.Submitted) for one in event.calls][1]
    (other,) = shop.workers()
    child = Call(5000, recipe1, (blob1, {}))
    shop.assign(other, child)
    assert shop.value(child) == 4
    joined = Call(5001, recipe2, (blob2, {key1: 4}))
    shop.assign(other, joined)
    assert "unsupported operand" in str(shop.error(joined))  # 4 + [4, 2], as it says
    os.kill(shop.pid(worker), signal.SIGKILL)
    assert shop.await_event(m.WorkerLost).executing == (call.id, 1)


def test_futures_in_a_value_are_held_and_not_waited_for(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    report = shop.report(shop.start(worker, "give", 3))
    key = shop.await_event(m.Submitted).calls[0][0]
    assert report.kind == "held"
    assert report.payload[1] == (key,)


def test_waiting_ends_when_the_time_is_up(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "patient", 3)
    assert shop.await_event(m.Resumed).call == call.id
    assert shop.value(call) == "gave up"


def test_a_failed_call_raises_where_its_future_is_asked(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "fail_below")
    (key,) = shop.await_event(m.Waiting).keys
    deliver(shop, worker, call, {key: encode_failure(ValueError("it was no good"))})
    assert shop.value(call) == "caught it was no good"


def test_a_future_can_be_cancelled(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "drop", 1)
    shop.report(call)
    key = shop.await_event(m.Submitted).calls[0][0]
    assert shop.await_event(m.CancelChild) == m.CancelChild(call.id, 1, key)


def test_arguments_that_do_not_fit_are_refused_where_they_are_submitted(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    error = shop.error(shop.start(worker, "wrong"))
    assert isinstance(error, TypeError)
    assert "add.submit(): missing argument 'y'" in str(error)
    assert not shop.all(m.Submitted)


def test_calls_in_advance_are_given_back_when_one_waits(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    waiter = shop.make("both", 1)
    queued = [shop.make("same", number) for number in range(3)]
    shop.assign(worker, waiter, *queued)
    gave_back = shop.await_event(m.GaveBack)
    waiting = shop.await_event(m.Waiting)
    assert sorted(gave_back.calls) == [(call.id, 1) for call in queued]
    assert shop.events.index(gave_back) < shop.events.index(waiting)
    late = shop.start(worker, "same", 9)  # sent before the core knew of the wait
    assert shop.await_event(m.GaveBack, 2).calls == [(late.id, 1)]
    deliver(shop, worker, waiter, {waiting.keys[0]: 1})
    assert shop.value(waiter) == 1


def nested(shop: Workshop, worker: int) -> Callable[[m.Event], None]:
    """A core that lets the worker that waits run what it waits for."""
    children: dict[bytes, Any] = {}
    parents: dict[int, tuple[Any, bytes]] = {}
    ids = iter(range(10_000, 20_000))

    def soon(command: m.Command) -> None:
        shop.reactor.call_soon(lambda: shop.engine.perform(command))

    def on_event(event: m.Event) -> None:
        if isinstance(event, m.Submitted):
            for key, recipe, blob, _ in event.calls:
                children[event.parent, key] = Call(next(ids), recipe, (blob, {}))  # type: ignore
        elif isinstance(event, m.Waiting):
            for key in event.keys:
                child = children.pop((event.call, key), None)  # type: ignore
                if child is not None:
                    parents[child.id] = (event.call, key)
                    soon(m.Assign(worker, [child], nested=True))
        elif isinstance(event, m.Finished):
            for id, _, kind, payload, *_ in event.reports:
                if id in parents:
                    assert kind == "value"
                    parent, key = parents[id]
                    soon(m.Deliver(worker, {key: payload}, parent))

    return on_event


def test_a_waiting_worker_executes_nested_calls_and_output_stays_apart(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    shop.on_event = nested(shop, worker)
    call = shop.start(worker, "both", 5)
    assert shop.value(call) == 5
    assert shop.written(call) == b"outer begins\nouter ends\n"
    (inner,) = [id for id, stream in shop.watcher.written if id and id >= 10_000][:1]
    assert shop.watcher.written[inner, "stdout"] == b"5\n"


@pytest.mark.parametrize(("name", "depth"), [("deep", 1), ("deep", 300), ("adeep", 50)])
def test_nested_calls_go_as_deep_as_they_want(make: Make, name: str, depth: int) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    shop.on_event = nested(shop, worker)
    assert shop.do(worker, name, depth) == depth


def test_a_nested_call_for_one_who_does_not_wait_any_more_is_given_back(shop: Workshop) -> None:
    (worker,) = shop.workers()
    call = shop.make("same", 1)
    shop.assign(worker, call, nested=True)
    assert shop.await_event(m.GaveBack).calls == [(call.id, 1)]


def test_a_waiting_call_is_interrupted(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "both", 5)
    shop.await_event(m.Waiting)
    interrupt(shop, worker, call)
    assert cancelled(shop, call)
    assert shop.do(worker, "same", 1) == 1


def test_a_call_below_a_nested_one_is_interrupted_when_that_has_ended(make: Make) -> None:
    shop = make(GROWING, grace=0.1)
    (worker,) = shop.workers()
    shop.on_event = nested(shop, worker)
    call = shop.start(worker, "nested_sleep", 0.5)
    shop.await_event(m.Waiting)
    link = shop.engine._links[worker]  # type: ignore[attr-defined]
    shop.until(lambda: link.executing and link.executing[0] >= 10_000)
    interrupt(shop, worker, call)
    assert cancelled(shop, call)
    inner = next(report for (id, _), report in shop.reports.items() if id >= 10_000)
    assert inner.payload == 0.5
    assert shop.do(worker, "same", 1) == 1


def test_an_async_task_awaits_many_futures_at_once(make: Make) -> None:
    shop = make(GROWING)
    (worker,) = shop.workers()
    call = shop.start(worker, "gather", 5)
    seen: set[bytes] = set()
    for number in range(5):
        waiting = shop.await_event(m.Waiting, number + 1)
        assert waiting.any_of and len(waiting.keys) == 5 - number
        key = waiting.keys[0]
        seen.add(key)
        deliver(shop, worker, call, {key: number})
    assert sorted(shop.value(call)) == list(range(5))
    assert len(seen) == 5
