"""When to look into the ledgers of workers that say nothing.

A worker that is busy with many calls sends what has ended every millisecond, but not
while a long one runs: what ended just before that waits in the ledger.  It is taken
from there, since the worker may be in C code that lets no other thread run.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Final, Generic, TypeVar

from taskrun.reactor import Reactor, Timer

SILENT: Final = 0.005  # seconds since a worker said something
MOST: Final = 0.04  # seconds until the next look, where the last ones were in vain

W = TypeVar("W")


class Silence(Generic[W]):
    """Calls ``look(worker)`` once a worker has been silent for a moment; it gives whether there
    was anything.  Where all calls take about as long there never is, and looking would wake
    us as often as the workers do: then it waits longer."""

    def __init__(self, reactor: Reactor, look: Callable[[W], bool]) -> None:
        self._reactor = reactor
        self._look = look
        self._heard: dict[W, float] = {}
        self._pause = SILENT
        self._timer: Timer | None = None

    def broken(self, worker: W) -> None:
        """It said something, and may soon keep to itself what it has to say."""
        self._heard[worker] = monotonic()
        if self._timer is None:
            self._look_later()

    def forget(self, worker: W) -> None:
        """It is gone."""
        self._heard.pop(worker, None)

    def close(self) -> None:
        """Look no more."""
        self._heard.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _look_later(self) -> None:
        self._timer = self._reactor.call_at(monotonic() + self._pause, self._look_at_silent)

    def _look_at_silent(self) -> None:
        self._timer = None
        before = monotonic() - SILENT
        silent = [worker for worker, heard in self._heard.items() if heard <= before]
        for worker in silent:
            del self._heard[worker]
        if silent:
            found = [self._look(worker) for worker in silent]
            self._pause = SILENT if any(found) else min(2 * self._pause, MOST)
        if self._heard and self._timer is None:
            self._look_later()
