"""An event that may be used in the middle of its own use.

A signal handler interrupts the main thread between any two steps, and the garbage collector
any thread.  A handler that ends a pool, or the end of an object that does, may so come while
its thread is inside ``threading.Event``, whose lock is not reentrant: it would wait for itself.
Here is no lock to be held: each who waits has one of its own, which whoever sets the flag
releases.
"""

from __future__ import annotations

import threading
from contextlib import suppress


class Flag:
    """Like ``threading.Event``."""

    __slots__ = ("_set", "_waiting")

    def __init__(self) -> None:
        self._set = False
        self._waiting: list[threading.Lock] = []

    def is_set(self) -> bool:
        """Whether it is."""
        return self._set

    def set(self) -> None:
        """Set it, and wake all who wait."""
        self._set = True
        if self._waiting:
            for lock in self._waiting[:]:
                with suppress(RuntimeError):  # it was woken already
                    lock.release()

    def clear(self) -> None:
        """Undo :meth:`set`."""
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, at most ``timeout`` seconds; whether it was."""
        if self._set:
            return True
        lock = threading.Lock()
        lock.acquire()
        self._waiting.append(lock)
        try:
            # It may have been set before we were enlisted.
            return self._set or lock.acquire(True, -1 if timeout is None else max(0.0, timeout))
        finally:
            self._waiting.remove(lock)
