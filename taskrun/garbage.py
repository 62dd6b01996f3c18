"""How often the garbage collector looks for cycles while there are runs."""

from __future__ import annotations

import gc
import threading


class _CollectingRarely:
    """Has the garbage collector run seldom while there are runs, in whichever threads: what the
    core keeps of calls lives on, and to look for cycles in it again and again takes a fifth
    of the loop's time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = 0
        self._usual = gc.get_threshold()

    def __enter__(self) -> None:
        with self._lock:
            self._runs += 1
            if self._runs == 1:
                self._usual = gc.get_threshold()
                gc.set_threshold(self._usual[0] * 100, *self._usual[1:])

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._runs -= 1
            if self._runs == 0:
                gc.set_threshold(*self._usual)


collecting_rarely = _CollectingRarely()
