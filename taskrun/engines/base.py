"""What an engine is: the place where attempts execute.

The core decides, an engine carries out.  It is told by commands and tells by events;
it keeps no work of its own beyond what it was assigned, and what it was assigned in
advance can be taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from taskrun.messages import Command, Event
from taskrun.observers import Observer
from taskrun.reactor import Reactor


class Engine(Protocol):
    """Four methods; all are called on the reactor's thread."""

    def start(self, reactor: Reactor, post: Callable[[Event], None], observer: Observer) -> None:
        """Begin; from now on ``post`` events, on the reactor's thread, never from inside
        :meth:`perform`."""

    def perform(self, command: Command) -> None:
        """Carry out StartWorkers, StopWorker, Assign, Reclaim, Interrupt or Deliver."""

    def kill(self) -> None:
        """End every running attempt now; the second Ctrl-C."""

    def close(self, deadline: float) -> None:
        """End all workers and what they started, by ``deadline`` (monotonic seconds)."""
