"""Calls in this very process: the same outcomes, nothing captured, waiting runs the loop."""

from __future__ import annotations

import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workshop import Call, Workshop, task_file

from taskrun import messages as m
from taskrun.engines.inline import InlineEngine
from taskrun.loading import import_file

pytestmark = pytest.mark.timeout(60)

CHORES = """
import asyncio, os

@task
def pid(): return os.getpid()

@task
def add(x, y): return x + y

@task
def fail(x): raise ValueError(x)

@task
def abort(): raise KeyboardInterrupt

@task
def fib(x):
    if x < 2: return x
    first, second = fib.submit(x - 1), fib.submit(x - 2)
    return first.result() + second.result()

@task
async def afib(x):
    if x < 2: return x
    return sum(await asyncio.gather(afib.submit(x - 1), afib.submit(x - 2)))

@task
def patient():
    future = add.submit(1, 2)
    try: return future.result(timeout=0.05)
    except TimeoutError: return "gave up"

def make():
    yield []
    made.append("closed")

made = []

@task
def use(x, things=per_worker(make)):
    things.append(x)
    return len(things)

@task
def talk(x): print("said", x)
"""


@pytest.fixture
def chores(tmp_path: Path) -> Iterator[types.ModuleType]:
    module, file = task_file(tmp_path, CHORES, "inline_chores")
    yield import_file(file, module)
    sys.modules.pop(module)
    sys.path.remove(str(tmp_path))


@pytest.fixture
def shop(chores: Any) -> Iterator[Workshop]:
    made = Workshop(InlineEngine(), "inline_chores")
    yield made
    made.close()


def test_calls_are_executed_in_this_process(shop: Workshop) -> None:
    (worker,) = shop.workers()
    assert shop.do(worker, "pid") == os.getpid()
    calls = [shop.make("add", number, 1) for number in range(20)]
    shop.assign(worker, *calls)
    assert [shop.value(call) for call in calls] == list(range(1, 21))
    assert isinstance(shop.error(shop.start(worker, "fail", "no")), ValueError)


def test_there_is_one_worker_however_many_are_wanted(shop: Workshop) -> None:
    shop.engine.perform(m.StartWorkers(1))
    shop.engine.perform(m.StartWorkers(3))
    shop.await_event(m.WorkerReady)
    shop.reactor.run_once(0)
    assert len(shop.all(m.WorkerReady)) == 1


def test_nothing_is_captured(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    (worker,) = shop.workers()
    call = shop.start(worker, "talk", 3)
    assert not shop.report(call).wrote
    assert capsys.readouterr().out == "said 3\n"
    assert not shop.watcher.written


def test_ctrl_c_that_ends_a_call_is_told(chores: Any) -> None:
    told: list[str] = []
    shop = Workshop(InlineEngine(on_ctrl_c=lambda: told.append("Ctrl-C")), "inline_chores")
    try:
        (worker,) = shop.workers()
        report = shop.report(shop.start(worker, "abort"))
        assert report.payload[0].kind == "cancelled"
        assert told == ["Ctrl-C"]
    finally:
        shop.close()


def test_calls_that_have_not_begun_are_given_back_and_cancelled(shop: Workshop) -> None:
    (worker,) = shop.workers()
    calls = [shop.make("add", number, 1) for number in range(4)]
    shop.assign(worker, *calls)
    shop.engine.perform(m.Interrupt(worker, calls[2].id, 1, "cancelled"))
    shop.engine.perform(m.Reclaim(worker, 1))
    assert shop.report(calls[2]).payload[0].kind == "cancelled"
    assert shop.await_event(m.GaveBack).calls in ([(calls[3].id, 1)], [])


def core(shop: Workshop, worker: int) -> Callable[[m.Event], None]:
    """Sends the worker that waits what it waits for."""
    calls: dict[tuple[int, bytes], Any] = {}
    parents: dict[int, tuple[int, bytes]] = {}

    def on_event(event: m.Event) -> None:
        if isinstance(event, m.Submitted):
            for key, recipe, blob, _ in event.calls:
                id = 1000 + len(calls)
                calls[event.parent, key] = Call(id, recipe, (blob, {}))
                parents[id] = (event.parent, key)
        elif isinstance(event, m.Waiting):
            for key in event.keys:
                call = calls[event.call, key]
                if (call.id, 1) in shop.reports:
                    deliver(call.id, shop.reports[call.id, 1].payload)
                elif call.attempt == 1 and not getattr(call, "sent", False):
                    call.sent = True
                    shop.engine.perform(m.Assign(worker, [call], nested=True))
        elif isinstance(event, m.Finished):
            for id, _, kind, payload, *_ in event.reports:
                if id in parents:
                    assert kind == "value"
                    deliver(id, payload)

    def deliver(id: int, payload: Any) -> None:
        parent, key = parents[id]
        shop.engine.perform(m.Deliver(worker, {key: payload}, parent))

    return on_event


@pytest.mark.parametrize("name", ["fib", "afib"])
def test_a_call_that_waits_runs_what_it_waits_for(shop: Workshop, name: str) -> None:
    (worker,) = shop.workers()
    shop.on_event = core(shop, worker)
    assert shop.do(worker, name, 7) == 13


def test_waiting_ends_when_the_time_is_up(shop: Workshop) -> None:
    (worker,) = shop.workers()
    start = time.monotonic()
    assert shop.do(worker, "patient") == "gave up"
    assert time.monotonic() - start < 5
    assert shop.all(m.Resumed)


def test_what_per_worker_made_is_finished_in_the_end(shop: Workshop, chores: Any) -> None:
    (worker,) = shop.workers()
    assert [shop.do(worker, "use", number) for number in (1, 2)] == [1, 2]
    assert chores.made == []
    shop.engine.close(time.monotonic() + 1)
    assert chores.made == ["closed"]
