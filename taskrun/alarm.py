"""Has the core told of the time when it wants to be."""

from __future__ import annotations

from collections.abc import Callable

from taskrun import messages as m
from taskrun.core.scheduler import Scheduler
from taskrun.reactor import Reactor, Timer


class Alarm:
    """A timer on the reactor, at the core's deadline."""

    def __init__(
        self, reactor: Reactor, core: Scheduler, post: Callable[[m.Event], object]
    ) -> None:
        self.at: float | None = None  # monotonic seconds; None: nothing is due
        self._reactor = reactor
        self._core = core
        self._post = post
        self._timer: Timer | None = None

    def follow(self) -> None:
        """The core has done something: its deadline may be another one."""
        deadline = self._core.deadline()
        if deadline != self.at:
            self._set(deadline)

    def _set(self, deadline: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.at = deadline
        self._timer = None
        if deadline is not None:
            self._timer = self._reactor.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._timer = self.at = None
        self._post(m.Tick())
