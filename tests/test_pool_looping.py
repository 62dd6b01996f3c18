"""The loop that a thread and its guests share: whoever runs it, callbacks get called."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from interrupting import Broken, at_each_step, interrupted_at
from waiting import until

from taskrun.errors import CallCancelled
from taskrun.pool import Pool
from taskrun.pooling.looping import Loop, Waitable, _event_of
from taskrun.reactor import Reactor

SECONDS = 10.0


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def forked(processes: int = 2) -> Pool:
    return Pool(processes, context=multiprocessing.get_context("fork"))


class _Delivered(Waitable):
    """Settled by a callback, which only the loop's thread calls."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        super().__init__()
        self.done = False

    def settled(self) -> bool:
        return self.done

    def deliver(self) -> None:
        self.done = True


def test_a_guest_that_comes_just_before_the_thread_takes_the_loop_gets_its_callback() -> None:
    loop = Loop(Reactor(), "loop under test")
    waitable = _Delivered()
    about_to_take, guest_is_in = threading.Event(), threading.Event()
    usual = loop._run_callbacks

    def slowly() -> None:
        usual()
        if threading.current_thread() is loop._thread and not about_to_take.is_set():
            about_to_take.set()
            assert guest_is_in.wait(SECONDS)

    def entered(waited_for: Waitable | None, timeout: float | None) -> None:
        if waited_for is waitable:  # the guest has the loop: the thread goes on only now
            loop.reactor.call_at(0.0, lambda: loop.call_back(waitable.deliver))
            guest_is_in.set()

    loop._run_callbacks = slowly  # type: ignore[method-assign]
    loop.entered = entered
    loop.start()
    try:
        assert about_to_take.wait(SECONDS)
        assert loop.wait(waitable, SECONDS)
    finally:
        loop.end()
        assert loop.finished.wait(SECONDS)


def test_a_thread_that_has_the_number_which_the_loops_own_had_may_join_the_pool() -> None:
    pool = forked(1)
    pool.terminate()
    assert pool._loop.finished.wait(SECONDS)
    pool._loop._thread = threading.current_thread()  # that is how it looks then
    pool.join()


def test_a_loop_may_be_asked_for_something_in_the_middle_of_being_asked() -> None:
    # As a signal handler does, or the end of an executor that the collector has found.
    loop = Loop(Reactor(), "loop under test")
    loop.start()
    asked: list[str] = []
    try:
        for ask in (lambda: loop.post(lambda: asked.append("posted")), loop.nudge, loop._need):
            assert at_each_step(ask, loop.nudge) > 1
            assert at_each_step(ask, lambda: loop.wait(_Delivered(), 0.0001)) > 1
        assert at_each_step(lambda: loop.wait(_Delivered(), 0.0001), loop.nudge) > 1
        assert at_each_step(lambda: loop.finished.wait(0.0001), lambda: loop.finished.wait(0)) > 1
    finally:
        loop.end()
        assert loop.finished.wait(SECONDS)
    assert asked


def test_a_loop_has_finished_whatever_its_last_callback_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)

    def last() -> None:
        raise Raised

    loop = Loop(Reactor(), "loop under test")
    loop.finish = lambda: loop.call_back(last)
    loop.start()
    loop.end()
    assert loop.finished.wait(SECONDS)
    loop._thread.join(SECONDS)
    assert [args.exc_type for args in shown] == [Raised]


def test_a_callback_that_is_left_as_the_thread_goes_is_called() -> None:
    loop = Loop(Reactor(), "loop under test")
    looked, left, called = threading.Event(), threading.Event(), threading.Event()
    usual = loop._run_callbacks

    def slowly() -> None:
        usual()
        if threading.current_thread() is loop._thread and loop._closed:  # for the last time
            looked.set()
            assert left.wait(SECONDS)

    loop._run_callbacks = slowly  # type: ignore[method-assign]
    loop.start()
    loop.end()
    assert looked.wait(SECONDS)
    loop.call_back(called.set)
    loop.nudge()
    left.set()
    assert loop.finished.wait(SECONDS)
    assert called.is_set()


def test_several_may_look_for_the_callbacks_that_are_left_and_each_is_called_once() -> None:
    loop = Loop(Reactor(), "loop under test")
    left, called = 0, []

    def leave() -> None:
        nonlocal left
        left += 1
        loop.call_back(partial(called.append, left))
        loop._run_callbacks()

    try:
        assert at_each_step(leave, loop._run_callbacks) > 1
    finally:
        loop.reactor.close()
    assert called == [*range(1, left + 1)]


def test_all_who_begin_to_wait_for_the_same_at_the_same_time_are_woken_by_one_event() -> None:
    waited_for = [_Delivered()]
    found: list[object] = []

    def another_begins() -> None:
        thread = threading.Thread(target=lambda: found.append(_event_of(waited_for[-1])))
        threads.append(thread)
        thread.start()
        thread.join(0.01)  # it may have to wait for this one

    def begin() -> None:
        waited_for.append(_Delivered())
        mine = _event_of(waited_for[-1])
        while threads:
            threads.pop().join(SECONDS)
            assert found[-1] in (mine, waited_for[-2].event)

    threads: list[threading.Thread] = []
    assert at_each_step(begin, another_begins) > 3


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals whose handlers were called: those that ``handle`` was given."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield _handled
    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, handler)
        elif signal.getsignal(number) is not handler and callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _handled.clear()


_handled: list[int] = []


class Raised(Exception):
    """By the handler of a signal."""


def handle(number: int, raises: type[BaseException] | None = None) -> None:
    """Have a handler for that signal."""

    def handler(number: int, frame: object) -> None:
        _handled.append(number)
        if raises is not None:
            raise raises(number)

    signal.signal(number, handler)


def have_it_come_amid_a_turn(pool: Pool, *numbers: int) -> threading.Timer:
    """While the main thread waits and runs the loop."""

    def come() -> None:
        for number in numbers:
            signal.raise_signal(number)

    timer = threading.Timer(0.05, pool._driver.post, [come])
    timer.start()
    return timer


def at_the_end_of_the_stack(action: Callable[[], object]) -> None:
    """Do ``action`` with ever less room on the stack, until there is none."""
    action()
    at_the_end_of_the_stack(action)


@pytest.mark.parametrize(
    "use",
    [
        lambda pool: pool.apply(abs, (1,)),
        lambda pool: pool.map(abs, [1, 2]),
        lambda pool: list(pool.imap(abs, [1])),
        lambda pool: pool.apply_async(abs, (1,)).get(),
    ],
    ids=["apply", "map", "imap", "apply_async"],
)
def test_a_recursion_error_in_who_waits_is_his_own(use: Callable[[Pool], object]) -> None:
    with forked() as pool:
        with pytest.raises(RecursionError):
            at_the_end_of_the_stack(lambda: use(pool))
        assert pool.map_async(abs, range(4)).get(SECONDS) == [0, 1, 2, 3]


def test_what_a_pool_does_at_its_end_is_done_whatever_of_it_fails() -> None:
    pool = forked(1)
    pid = pool.apply(os.getpid)
    result = pool.apply_async(time.sleep, (SECONDS,))

    def fail(*args: object) -> None:
        raise RuntimeError("a bug of ours")

    shown: list[object] = []
    usual, threading.excepthook = threading.excepthook, shown.append
    try:
        pool._driver._settle_down = fail  # type: ignore[method-assign]
        pool._driver._close_engine = fail  # type: ignore[method-assign]
        pool.terminate()
    finally:
        threading.excepthook = usual
    with pytest.raises(CallCancelled):
        result.get(SECONDS)
    assert shown
    until(lambda: not os.path.exists(f"/proc/{pid}"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGQUIT", "SIGVTALRM", "SIGWINCH"])
def test_what_the_handler_of_any_signal_raises_costs_no_call(handled: list[int], name: str) -> None:
    number = int(getattr(signal, name))
    handle(number, Raised)
    with forked() as pool:
        result = pool.apply_async(time.sleep, (0.3,))
        timer = have_it_come_amid_a_turn(pool, number)
        with pytest.raises(Raised):
            result.get(SECONDS)
        timer.join()
        assert result.get(SECONDS) is None
        assert pool.apply(abs, (-1,)) == 1
    assert handled == [number]


class _Interrupted:
    """A poller in which something comes, once, while the main thread waits there."""

    def __init__(self, poller: Any, come: Callable[[], object]) -> None:
        self._poller = poller
        self._come: Callable[[], object] | None = come

    def __getattr__(self, name: str) -> Any:
        return getattr(self._poller, name)

    def poll(self, timeout: float | None, most: int) -> Any:
        come = self._come
        if come is not None and threading.current_thread() is threading.main_thread():
            self._come = None
            come()
        return self._poller.poll(timeout, most)


def test_what_is_raised_in_who_waits_from_outside_costs_no_call(handled: list[int]) -> None:
    main = ctypes.c_ulong(threading.get_ident())
    handle(signal.SIGRTMIN, Raised)

    def raise_by_signal() -> None:
        signal.raise_signal(signal.SIGRTMIN)

    def raise_by_thread() -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(Raised))

    with forked() as pool:
        reactor = pool._driver.loop.reactor
        poller = reactor._poller
        for come in (raise_by_signal, raise_by_thread):
            result = pool.apply_async(time.sleep, (0.1,))
            reactor._poller = _Interrupted(poller, come)
            with pytest.raises(Raised):
                result.get(SECONDS)
            assert result.get(SECONDS) is None
            assert pool.apply(abs, (-1,)) == 1


def test_of_signals_that_come_together_each_is_handled(handled: list[int]) -> None:
    numbers = [signal.SIGUSR2, signal.SIGUSR1, signal.SIGHUP]
    for number in numbers:
        handle(number, None if number is signal.SIGUSR1 else Raised)
    with forked() as pool:
        result = pool.apply_async(time.sleep, (SECONDS,))
        timer = have_it_come_amid_a_turn(pool, *numbers)
        with pytest.raises(Raised) as raised:
            result.get(SECONDS)
        timer.join()
    assert handled == numbers
    assert str(raised.value.__context__) == str(int(numbers[0]))


def test_a_signal_is_handled_once_wherever_it_comes_and_no_handler_is_lost(
    handled: list[int],
) -> None:
    handle(signal.SIGUSR1, Broken)
    handle(signal.SIGUSR2)
    loop = Loop(Reactor(), "loop under test")
    loop.start()
    most = 5 * len(signal.valid_signals())
    try:
        for step in range(most):
            came = interrupted_at(
                step,
                lambda: loop._visit_from_main(lambda noted: None),
                lambda: signal.raise_signal(signal.SIGUSR1),
            )
            signal.raise_signal(signal.SIGUSR2)
            assert handled == [signal.SIGUSR1, signal.SIGUSR2][not came :]
            handled.clear()
        assert not came
    finally:
        loop.end()
        assert loop.finished.wait(SECONDS)


AMID_A_FORK = """
import os, signal
from multiprocessing import get_context
import psutil
from taskrun import Pool

came = []

def come():
    if not came:
        came.append(os.kill(os.getpid(), signal.SIGINT))

os.register_at_fork(after_in_parent=come)
try:
    Pool(1, context=get_context("fork"))
except KeyboardInterrupt:
    print("interrupted", psutil.Process().children())
with Pool(1, context=get_context("fork")) as pool:
    print(pool.apply(abs, (-1,)))
"""


def test_a_ctrl_c_that_comes_amid_the_fork_of_a_pool_is_not_lost(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AMID_A_FORK], cwd=tmp_path,
        capture_output=True, text=True, timeout=SECONDS * 3, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("interrupted []\n1\n", "")
