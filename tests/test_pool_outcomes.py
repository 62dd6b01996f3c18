"""What calls in own workers come to: odd outcomes, forks and threads, per_worker."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from workshop import (
    FORKING,
    Make,
    alive,
    gone,
)

from taskrun import messages as m

pytestmark = pytest.mark.timeout(120)


# -- outcomes -------------------------------------------------------------------------

AWKWARD = """
import threading

class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")

class Stubborn(Exception):
    def __reduce__(self): raise TypeError("I stay here")

@task
def odd(): raise Odd(1, 2)

@task
def stubborn(): raise Stubborn("no way")

@task
def quit_it(x): sys.exit(x)

@task
def interrupt(): raise KeyboardInterrupt

@task
def sink(): return sink()

@task
def hog(): raise MemoryError("no room")

@task
def lock(): return {"guard": threading.Lock()}

@task
def generate(x): yield from range(x)

@task
async def later(x):
    import asyncio
    await asyncio.sleep(0)
    return x * 2

@task
async def trickle(x):
    for item in range(x): yield item

class Fragile:
    def __reduce__(self): return (explode, ())

def explode(): raise ValueError("it does not survive the journey")
"""


@pytest.mark.parametrize(
    ("name", "args", "type_name", "words"),
    [
        ("odd", (), "chores.Odd", "1 and 2"),
        ("stubborn", (), "chores.Stubborn", "no way"),
        ("quit_it", (2,), "TaskExit", "sys.exit(2)"),
        ("interrupt", (), "TaskExit", "KeyboardInterrupt"),
        ("sink", (), "RecursionError", "recursion"),
        ("hog", (), "MemoryError", "no room"),
        ("lock", (), "ResultError", "lock returned what cannot travel"),
    ],
)
def test_whatever_a_task_raises_is_an_outcome_with_a_name(
    make: Make, name: str, args: tuple[Any, ...], type_name: str, words: str
) -> None:
    shop = make(AWKWARD)
    (worker,) = shop.workers()
    report = shop.report(shop.start(worker, name, *args))
    failure, _ = report.payload
    assert report.kind == "error"
    assert failure.type_name == type_name
    assert words in failure.message
    assert "workers/" not in failure.traceback
    assert shop.do(worker, "add", 1, 2) == 3


def test_generators_and_coroutines_are_run_to_their_end(make: Make) -> None:
    shop = make(AWKWARD)
    (worker,) = shop.workers()
    assert shop.do(worker, "generate", 3) == [0, 1, 2]
    assert [shop.do(worker, "later", number) for number in (1, 2)] == [2, 4]
    assert shop.do(worker, "trickle", 3) == [0, 1, 2]


# -- forks, threads, per_worker -------------------------------------------------------


def test_a_forked_child_that_returns_ends_and_reports_nothing(make: Make) -> None:
    shop = make(FORKING)
    (worker,) = shop.workers()
    call = shop.start(worker, "fork_and_return", 1)
    assert shop.value(call) == "parent"
    assert shop.written(call) == b"the child returns\n"
    assert shop.do(worker, "fork_and_exit", 7) == 7
    assert shop.do(worker, "through_multiprocessing", 3) == [3, 3]


def test_a_forked_child_that_raises_says_why_as_any_script_does(make: Make) -> None:
    shop = make(FORKING)
    (worker,) = shop.workers()
    exits = shop.start(worker, "fork_and_exit", "bye")
    assert (shop.value(exits), shop.written(exits, "stderr")) == (1, b"bye\n")
    raises = shop.start(worker, "fork_and_raise", ValueError("no"))
    assert shop.value(raises) == 1
    first, frame, *_, last = shop.written(raises, "stderr").decode().splitlines()
    assert first.startswith("Traceback") and "in fork_and_raise" in frame
    assert last == "ValueError: no"


@pytest.mark.parametrize("own_session", [False, True])
def test_a_forked_child_that_outlives_its_call_ends_with_the_engine(
    make: Make, own_session: bool
) -> None:
    shop = make(FORKING)
    (worker,) = shop.workers()
    child = shop.do(worker, "outlive", own_session)
    assert shop.do(worker, "add", 1, 2) == 3
    assert alive(child)
    shop.close()
    assert gone(child)


def test_a_forked_child_does_not_keep_the_end_of_its_worker_from_being_seen(make: Make) -> None:
    shop = make(FORKING)
    (worker,) = shop.workers()
    child = shop.do(worker, "outlive", True)
    call = shop.start(worker, "end_by", signal.SIGKILL)
    start = time.monotonic()
    assert shop.await_event(m.WorkerLost).executing == (call.id, 1)
    assert time.monotonic() - start < 2
    shop.close()
    assert gone(child)


def test_threads_that_never_end_do_not_keep_the_worker(make: Make) -> None:
    shop = make(FORKING)
    (worker,) = shop.workers()
    shop.do(worker, "endless_threads")
    start = time.monotonic()
    shop.close()
    assert gone(shop.pid(worker))
    assert time.monotonic() - start < 3


PER_WORKER = """
def connect():
    connection = []
    yield connection
    with open(os.environ["CHORES_LOG"], "a") as file: file.write(f"closed after {connection}\\n")

@task
def use(x, connection=per_worker(connect)):
    connection.append(x)
    return len(connection)
"""


@pytest.mark.parametrize("how", ["stop", "close"])
def test_what_per_worker_made_is_kept_and_finished_in_the_end(
    make: Make, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHORES_LOG", str(tmp_path / "log"))
    shop = make(PER_WORKER)
    (worker,) = shop.workers()
    assert [shop.do(worker, "use", number) for number in (5, 6)] == [1, 2]
    if how == "stop":
        shop.engine.perform(m.StopWorker(worker))
        shop.until(lambda: not alive(shop.pid(worker)))
        shop.until(lambda: not shop.engine._links)  # type: ignore[attr-defined]
        assert not shop.all(m.WorkerLost)
    else:
        shop.close()
    assert (tmp_path / "log").read_text() == "closed after [5, 6]\n"
