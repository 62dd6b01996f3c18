"""Actions to be done at a time; the time is told, never asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Timer:
    """An action that is to be done at a time, unless it is cancelled before."""

    __slots__ = ("action", "ticket", "when")

    def __init__(self, when: float, ticket: int, action: Callable[[], None]) -> None:
        self.when = when
        self.ticket = ticket
        self.action: Callable[[], None] | None = action

    def __lt__(self, other: Timer) -> bool:
        return (self.when, self.ticket) < (other.when, other.ticket)


class Timers:
    """What the scheduler is to do later, soonest first."""

    def __init__(self) -> None:
        self._heap: list[Timer] = []
        self._ticket = 0
        self._cancelled = 0

    def at(self, when: float, action: Callable[[], None]) -> Timer:
        """Do ``action`` at ``when``."""
        self._ticket += 1
        timer = Timer(when, self._ticket, action)
        heapq.heappush(self._heap, timer)
        return timer

    def cancel(self, timer: Timer) -> None:
        """Do it not, if it is not done yet."""
        if timer.action is None:
            return
        timer.action = None
        self._cancelled += 1
        if self._cancelled > len(self._heap) // 2:  # not one by one: they are anywhere
            self._heap = [each for each in self._heap if each.action is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def next(self) -> float | None:
        """When the soonest is due."""
        self._drop_cancelled()
        return self._heap[0].when if self._heap else None

    def due(self, now: float) -> Callable[[], None] | None:
        """Take out an action that is due, if there is one."""
        self._drop_cancelled()
        if not self._heap or self._heap[0].when > now:
            return None
        timer = heapq.heappop(self._heap)
        action, timer.action = timer.action, None
        return action

    def _drop_cancelled(self) -> None:
        while self._heap and self._heap[0].action is None:
            heapq.heappop(self._heap)
            self._cancelled -= 1
