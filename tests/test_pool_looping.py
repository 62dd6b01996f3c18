"""The loop that a thread and its guests share: whoever runs it, callbacks get called."""

from __future__ import annotations

import threading

from taskrun.pooling.looping import Loop, Waitable
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
