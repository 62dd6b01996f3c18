"""The loop that a thread and its guests share: whoever runs it, callbacks get called."""

from __future__ import annotations

import threading

from interrupting import at_each_step

from taskrun.pooling.looping import Loop, Waitable, _event_of
from taskrun.reactor import Reactor

SECONDS = 10.0


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
