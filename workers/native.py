"""The interpreter's own threads, locks and waiting.

In a green worker gevent puts its own in the place of those in ``threading``, ``select`` and
``time``.  What a real thread of ours uses there, beside the one in which greenlets run, is
taken from here: this module is imported before anything is replaced.
"""

from __future__ import annotations

from _thread import RLock, get_ident, start_new_thread
from select import POLLIN, poll
from time import sleep

__all__ = ["POLLIN", "RLock", "get_ident", "is_readable", "poll", "sleep", "start_new_thread"]


def is_readable(fd: int) -> bool:
    """Whether a read of ``fd`` would not wait."""
    one = poll()
    one.register(fd, POLLIN)
    return bool(one.poll(0))
