"""Every way to crash at every place where a Pool runs code of its user's.

The matrix is loky's: what crashes, times where, times how many workers, times how they
start.  Afterwards the pool works, ``get()`` has said what happened, and nothing is left.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.pool import MaybeEncodingError
from typing import Any

import psutil
import pytest

from taskrun import Pool, places
from taskrun.errors import ArgumentError, ResultError, RunError, TaskExit, WorkerLost

pytestmark = pytest.mark.timeout(180)

SECONDS = 60.0
SOAK = bool(os.environ.get("TASKRUN_SOAK"))
CONFIGURATIONS = (
    [(count, method) for count in (1, 2, 5, 13) for method in ("fork", "forkserver", "spawn")]
    if SOAK
    else [(1, "fork"), (2, "forkserver")]
)
PAYLOAD = 1_000_000  # bytes: large enough for shared memory


class Boom(Exception):
    """What the bombs raise."""


def exit_at_once() -> None:
    os._exit(3)


def exit_politely() -> None:
    sys.exit(3)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(SECONDS)


def segfault() -> None:
    import ctypes

    faulthandler.disable()
    ctypes.string_at(0)


def fail() -> None:
    raise Boom("boom")


Fault = Callable[[], None]
DEADLY: dict[Fault, str] = {
    exit_at_once: "exited with status 3",
    kill: "killed by SIGKILL",
    segfault: "killed by SIGSEGV",
}
MILD: list[Fault] = [exit_politely, fail]  # in the parent these only


class Bomb:
    """Goes off in one place.  ``home``: the pid of the parent."""

    def __init__(self, place: str, fault: Fault, home: int, payload: bytes | None = None) -> None:
        self.place, self.fault, self.home = place, fault, home
        self.payload = bytes(PAYLOAD) if payload is None else payload

    def is_at(self, place: str, *, in_worker: bool) -> bool:
        return self.place == place and (os.getpid() != self.home) == in_worker

    def __reduce__(self) -> Any:
        if self.is_at("argument pickled", in_worker=False) or self.is_at(
            "result pickled", in_worker=True
        ):
            self.fault()
        return rebuilt, (self.place, self.fault, self.home, self.payload)

    def __del__(self) -> None:
        if self.is_at("argument collected", in_worker=True) or self.is_at(
            "result collected", in_worker=True
        ):
            self.fault()


class Result(Bomb):
    """A bomb that is made in the worker."""


def rebuilt(place: str, fault: Fault, home: int, payload: bytes) -> Bomb:
    made = Bomb(place, fault, home, payload)
    if made.is_at("argument unpickled", in_worker=True) or made.is_at(
        "result unpickled", in_worker=False
    ):
        made.place = "nowhere"
        fault()
    return made


def take(bomb: Bomb) -> int:
    if bomb.place == "in the call":
        bomb.fault()
    return len(bomb.payload)


def give(place: str, fault: Fault, home: int) -> Result:
    return Result(place, fault, home)


def twice(x: int) -> int:
    return 2 * x


# -- what there is before and after ---------------------------------------------------


def resources() -> dict[str, set[Any]]:
    """What must not become more: descriptors, threads, children, files of shared memory."""
    own = psutil.Process()
    there = {
        "descriptors": set(descriptors()),
        "threads": {thread.name for thread in threading.enumerate()},
        "children": {child.pid for child in own.children(recursive=True)},
        "blobs": set(),
    }
    for folder in places.own().folders:
        if os.path.isdir(folder):
            there["blobs"] |= set(os.listdir(folder))
    return there


def descriptors() -> Iterator[tuple[str, str]]:
    for fd in os.listdir("/proc/self/fd"):
        try:
            yield fd, os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            pass  # it was that of the folder itself


def left_over(before: dict[str, set[Any]]) -> dict[str, set[Any]]:
    return {name: more for name, now in resources().items() if (more := now - before[name])}


@pytest.fixture(params=CONFIGURATIONS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., Pool]]:
    """Makes the pool; afterwards it must work and leave nothing."""
    count, method = request.param
    resource_tracker.ensure_running()  # stays, and is not the pool's
    gc.collect()
    before = resources()
    made: list[Pool] = []

    def make(**options: Any) -> Pool:
        made.append(Pool(count, context=multiprocessing.get_context(method), **options))
        return made[0]

    yield make
    made.pop().terminate()
    deadline = time.monotonic() + SECONDS
    while left_over(before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert left_over(before) == {}


def works(pool: Pool) -> bool:
    return pool.map_async(twice, range(20), 1).get(SECONDS) == [2 * x for x in range(20)]


def outcome(act: Callable[[], Any]) -> BaseException | Any:
    """What an action returns or raises."""
    try:
        return act()
    except BaseException as error:
        return error


def check(found: Any, kind: type[BaseException], said: str) -> None:
    assert type(found) is kind or isinstance(found, kind), repr(found)
    assert said in str(found)


# -- in the worker --------------------------------------------------------------------

IN_WORKER = ["argument unpickled", "in the call", "result pickled"]
NAMED = {
    ("argument unpickled", fail): (ArgumentError, "Boom: boom"),
    ("argument unpickled", exit_politely): (ArgumentError, "SystemExit: 3"),
    ("in the call", fail): (Boom, "boom"),
    ("in the call", exit_politely): (TaskExit, "sys.exit(3)"),
    ("result pickled", fail): (MaybeEncodingError, "boom"),
    ("result pickled", exit_politely): (TaskExit, "sys.exit(3)"),
}


@pytest.mark.parametrize("fault", [*DEADLY, *MILD], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("place", IN_WORKER)
def test_a_crash_in_a_worker_is_the_error_of_its_call(
    start: Callable[..., Pool], place: str, fault: Fault
) -> None:
    pool = start()
    home = os.getpid()
    if place == "result pickled":
        results = [pool.apply_async(give, (place, fault, home)) for _ in range(2)]
    else:
        results = [pool.apply_async(take, (Bomb(place, fault, home),)) for _ in range(2)]
    kind, said = (WorkerLost, DEADLY[fault]) if fault in DEADLY else NAMED[place, fault]
    for result in results:
        check(outcome(lambda result=result: result.get(SECONDS)), kind, said)
    assert works(pool)


@pytest.mark.parametrize("fault", [*DEADLY, *MILD], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("place", ["argument collected", "result collected"])
def test_a_crash_while_a_worker_collects_concerns_that_call_alone(
    start: Callable[..., Pool], place: str, fault: Fault
) -> None:
    pool = start()
    home = os.getpid()
    if place == "argument collected":
        result = pool.apply_async(take, (Bomb(place, fault, home),))
    else:
        result = pool.apply_async(give, (place, fault, home))
    found = outcome(lambda: result.get(SECONDS))
    if isinstance(found, BaseException):  # it was collected before the call had ended
        assert fault in DEADLY
        check(found, WorkerLost, DEADLY[fault])
    else:
        assert getattr(found, "payload", b"") == bytes(PAYLOAD) or found == PAYLOAD
    assert works(pool)


@pytest.mark.parametrize("fault", [*DEADLY, *MILD], ids=lambda fault: fault.__name__)
def test_a_crash_in_the_initializer_is_what_every_call_gets(
    start: Callable[..., Pool], fault: Fault
) -> None:
    pool = start(initializer=fault)
    found = [outcome(lambda: pool.apply_async(twice, (1,)).get(SECONDS)) for _ in range(3)]
    for error in found:
        if fault in DEADLY:
            check(error, RunError, DEADLY[fault])
        else:
            check(error, Boom if fault is fail else SystemExit, "boom" if fault is fail else "3")


# -- in the parent --------------------------------------------------------------------


@pytest.mark.parametrize("fault", MILD, ids=lambda fault: fault.__name__)
def test_a_crash_while_an_argument_is_pickled_is_raised(
    start: Callable[..., Pool], fault: Fault
) -> None:
    pool = start()
    bombs = [Bomb("argument pickled", fault, os.getpid())]
    reference = weakref.ref(bombs[0])
    found = outcome(lambda: pool.apply_async(take, (bombs.pop(),)).get(SECONDS))
    assert isinstance(found, Boom if fault is fail else SystemExit)
    del found
    gc.collect()
    assert reference() is None
    assert works(pool)


@pytest.mark.parametrize("fault", MILD, ids=lambda fault: fault.__name__)
def test_a_crash_while_a_result_is_unpickled_is_raised_by_its_get(
    start: Callable[..., Pool], fault: Fault
) -> None:
    pool = start()
    result = pool.apply_async(give, ("result unpickled", fault, os.getpid()))
    found = outcome(lambda: result.get(SECONDS))
    check(found, *((Boom, "boom") if fault is fail else (ResultError, "SystemExit(3)")))
    assert works(pool)


@pytest.mark.parametrize("fault", MILD, ids=lambda fault: fault.__name__)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_in_a_callback_is_raised_by_its_get(
    start: Callable[..., Pool], fault: Fault
) -> None:
    pool = start()
    results = [
        pool.apply_async(twice, (1,), callback=lambda value: fault()),
        pool.apply_async(fail, error_callback=lambda error: fault()),
    ]
    for result in results:
        found = outcome(lambda result=result: result.get(SECONDS))
        assert isinstance(found, Boom if fault is fail else SystemExit)
    assert works(pool)


# -- what the parent ignores ----------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_parent_that_ignores_the_ends_of_children_can_have_a_pool(method: str) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Pool(1, context=multiprocessing.get_context(method)) as pool:
            assert pool.apply_async(twice, (2,)).get(SECONDS) == 4
            assert pool.apply_async(os.system, ("exit 3",)).get(SECONDS) == 3 << 8
            pool.close()
            pool.join()
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCHLD, before)
