"""Ctrl-C and SIGTERM while a run goes on.

A signal comes between any two instructions, so it is only noted, and taken by the loop when
that gets to it.  ``noted`` is for those who may hold up the loop, writing to a reader that reads
nothing.  A loop that is stuck for good never gets to it: the next signal then ends the process
as if nobody had asked for it, and the workers with it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic
from types import FrameType
from typing import Any, Final, Protocol

from taskrun.reactor import Reactor

NUMBERS: Final = (signal.SIGINT, signal.SIGTERM)
STUCK: Final = 1.0  # seconds after which a signal that was not taken never will be


class Here(Protocol):
    """Who executes calls in the loop's own thread, and so keeps it from taking signals."""

    @property
    def takes_ctrl_c(self) -> bool:
        """Whether a KeyboardInterrupt may be raised now: it hits a call's own code."""

    def interrupt(self) -> None:
        """End the call that is being executed, if one is; may raise Interrupted in it."""


class Signals(AbstractContextManager[None]):
    """While it lasts, ``take(number)`` is called for each signal, on the loop's thread.

    ``noted`` is called by the signal's handler, in the middle of anything.  Where ``here``
    takes a Ctrl-C, that is what it gets.  In another thread than the main
    one, where Python handles no signals, nothing happens.
    """

    def __init__(
        self,
        reactor: Reactor,
        take: Callable[[int], None],
        here: Here | None = None,
        noted: Callable[[], object] = lambda: None,
    ) -> None:
        self._reactor = reactor
        self._take = take
        self._here = here
        self._tell_noted = noted
        self._before: dict[int, Any] = {}
        self._wakeup_fd = -1
        self._pid = os.getpid()
        self._noted: list[tuple[float, int]] = []  # when they came, and not taken yet

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        _handling.append(self)
        # One that comes just before the loop begins to wait would not end the waiting.
        self._wakeup_fd = signal.set_wakeup_fd(self._reactor.wakeup_fd, warn_on_full_buffer=False)
        for number in NUMBERS:
            # What nohup, or a shell that started us in the background, has us ignore stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)

    def __exit__(self, *_: object) -> None:
        if self in _handling:
            _handling.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup_fd)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A child that somebody has forked here.  Ctrl-C is for us to deal with; who wants
            # to end the child waits for its end.
            if number != signal.SIGINT:
                _end_by(number)
            return
        here = self._here
        if number == signal.SIGINT and here is not None and here.takes_ctrl_c:
            raise KeyboardInterrupt
        now = monotonic()
        if self._noted and now - self._noted[0][0] > STUCK:
            _end_by(number)
        self._noted.append((now, number))
        self._tell_noted()
        self._reactor.post(self.settle, first=True)
        if here is not None:
            here.interrupt()

    def leave_behind(self) -> None:
        """In a child that somebody has forked here: SIGTERM ends it.  A handler of Python's waits
        for the next step of Python code, which a child that just falls asleep makes much later."""
        if signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def settle(self) -> None:
        """Take what the loop has not got to."""
        while self._noted:
            self._take(self._noted.pop(0)[1])


_handling: list[Signals] = []  # that are entered


def _after_fork_in_child() -> None:
    for signals in _handling:
        signals.leave_behind()


os.register_at_fork(after_in_child=_after_fork_in_child)


@contextmanager
def postponed(number: int) -> Iterator[None]:
    """While it lasts, the signal is only noted, and its handler called afterwards: what that raises
    in a function of ``os.register_at_fork``, of logging's for one, is printed and lost."""
    handler = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    noted: list[int] = []
    signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield
    finally:
        signal.signal(number, handler)
        if noted:
            signal.raise_signal(number)


def _end_by(number: int) -> None:
    """End this process as if nobody had asked for the signal."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
