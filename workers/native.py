"""The interpreter's own threads, locks and waiting.

In a green worker gevent puts its own in the place of those in ``threading``, ``select`` and
``time``.  What a real thread of ours uses there, beside the one in which greenlets run, is
taken from here: this module is imported before anything is replaced.
"""

from __future__ import annotations

from _thread import RLock, allocate_lock, get_ident, start_new_thread
from collections.abc import Callable
from select import POLLIN, poll
from time import sleep
from typing import Any, Final
from weakref import ref

__all__ = [
    "POLLIN", "RLock", "get_ident", "is_readable", "poll", "sleep", "start_new_thread",
    "start_thread",
]  # fmt: skip

_LOOK: Final = 0.05  # seconds between two looks whether a thread that does not begin is gone


class _Life:
    """A thread keeps it as long as it is there."""


def start_thread(run: Callable[[], None]) -> None:
    """Call ``run``, which never returns, in a new thread.  Raises RuntimeError where that does
    not begin: one without memory ends before, and ``threading`` would wait for it for ever."""
    begun = allocate_lock()
    begun.acquire()
    life = _Life()
    alive = ref(life)
    start_new_thread(_begin, (run, begun, life))
    del life
    while not begun.acquire(timeout=_LOOK):
        if alive() is None:
            raise RuntimeError("can't start new thread")


def _begin(run: Callable[[], None], begun: Any, life: _Life) -> None:
    begun.release()
    run()


def is_readable(fd: int) -> bool:
    """Whether a read of ``fd`` would not wait."""
    one = poll()
    one.register(fd, POLLIN)
    return bool(one.poll(0))
