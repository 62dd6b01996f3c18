"""Actions to be done at a time; the time is told, never asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Timers:
    """What the scheduler is to do later, soonest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._ticket = 0

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Do ``action`` at ``when``."""
        self._ticket += 1
        heapq.heappush(self._heap, (when, self._ticket, action))

    def next(self) -> float | None:
        """When the soonest is due."""
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Callable[[], None] | None:
        """Take out an action that is due, if there is one."""
        if self._heap and self._heap[0][0] <= now:
            return heapq.heappop(self._heap)[2]
        return None
