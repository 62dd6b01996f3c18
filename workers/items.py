"""The items of a generator, on their way while it produces them.

Each is encoded at once.  They are sent in batches: at once where the last batch is some
time ago, else when a short time has passed, whatever the generator does meanwhile.  What
was not sent before the end goes with the report of it, and so does everything from the
first item on that holds futures, whose values are not known yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import takewhile
from time import monotonic
from typing import Any, Final

from taskrun.flag import Flag
from taskrun.messages import YIELDED
from taskrun.workers import native
from taskrun.workers.outbox import Port

SECONDS: Final = 0.02  # an item waits no longer than this
MOST: Final = 1000  # items in a batch

Later = Callable[[Callable[[], None]], None]
"""Calls something in ``SECONDS``, in whatever way the worker has for it."""


class Items:
    """The items that one attempt has produced so far.

    ``values`` is what the call's own value will be; it stays empty where nobody wants that.
    """

    def __init__(
        self, call: int, attempt: int, keeps: bool, port: Port, later: Later | None
    ) -> None:
        """``keeps``: whether the value is wanted.  ``later``: None where nothing is sent before
        the end."""
        self.values: list[Any] = []
        self.first = 0  # how many were sent
        self._attempt = call, attempt
        self._port = port
        self._later = later
        self._keeps = keeps
        self._rest: list[tuple[Any, Any]] = []
        self._lock = native.RLock()
        self._sent = 0.0
        self._is_due = False  # a batch will be sent soon

    def add(self, value: Any, held: tuple[Any, Any]) -> None:
        """Take the next item, and what it is encoded."""
        with self._lock:
            self._rest.append(held)
            if held[1]:  # it holds futures
                self._later, self._keeps = None, True
            if self._keeps:
                self.values.append(value)
            later = self._later
        if later is None:
            return
        if len(self._rest) >= MOST or monotonic() - self._sent > SECONDS:
            self.send()
        elif not self._is_due:
            self._is_due = True
            later(self.send)

    def send(self) -> None:
        """Send what was not sent yet."""
        with self._lock:
            self._is_due = False
            if self._later is None or not self._rest:
                return
            batch = [item for item, _ in self._rest]
            self._rest = []
            self._port.tell((YIELDED, *self._attempt, self.first, batch))
            self.first += len(batch)
            self._sent = monotonic()
        self._port.flush()

    def rest(self) -> list[tuple[Any, Any]]:
        """What is left for the report; nothing is sent from here on."""
        with self._lock:
            self._later = None
            return self._rest

    def known(self) -> list[Any]:
        """What is left where the generator fails: up to the first that holds futures, which
        end with it."""
        return [item for item, _ in takewhile(lambda held: not held[1], self.rest())]


class Flusher:
    """A thread that calls things a little later; it is started when there is something."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []
        self._some = Flag()
        self._started = False

    def later(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` in ``SECONDS``."""
        self._due.append(callback)
        if not self._started:
            self._started = True
            threading.Thread(target=self._run, name="taskrun items", daemon=True).start()
        self._some.set()

    def _run(self) -> None:
        try:
            while self._some.wait():
                native.sleep(SECONDS)
                self._some.clear()
                due, self._due = self._due, []
                for callback in due:
                    callback()
        except ConnectionError:
            pass  # the coordinator is gone, which the other threads find out as well
