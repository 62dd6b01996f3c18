"""What a handle and the store say to each other; the same tuples in one process or two.

A request is ``(operation, name, options, args)``: ``("dict.set", "seen", None, (key,
value))``.  The object is made when it is first named.  On a connection, a request gets
one final reply, which a blocking operation may precede by a PARKED; with WITHDRAW the
client has enough of waiting, and gets TIMED_OUT unless the other reply was faster.
ACKNOWLEDGE says that what was waited for (an item of a queue, a lock, a permit) has arrived,
and gets no reply; what has not when the connection ends goes back.
"""

from __future__ import annotations

import queue
import threading
from typing import Any, TypeAlias

from taskrun.errors import ChannelClosed, StateError

Request: TypeAlias = tuple[str, str, Any, tuple[Any, ...]]
Reply: TypeAlias = tuple[int, Any]
Owner: TypeAlias = tuple[Any, ...]
"""Who holds locks: ``("attempt", call, attempt)``, or ``("client", random name)``."""

OK = 0  # (OK, what it returns)
ERROR = 1  # (ERROR, (name of the exception, its arguments))
PARKED = 2  # (PARKED, who holds what is waited for: (owner, place) | None)
TIMED_OUT = 3  # (TIMED_OUT, None)
CHANGE = 4  # (CHANGE, (name, kind, action, key, value))   to those who watch
MISSED = 5  # (MISSED, number of changes)   ... too slowly

WITHDRAW = "withdraw"
ACKNOWLEDGE = "acknowledge"

OPEN = "state"
"""The first request of a connection (see taskrun.manager) that is to speak this.  A server of
several runs is told by the keyword ``run`` which of them is meant."""

REFUSED = "#REFUSED"
"""How a server of several runs answers one that means none of them; with the reason."""

TAKING = frozenset(("queue.get", "channel.recv"))
"""Operations whose result is nowhere else: one that does not arrive is put back."""

LEASED = frozenset(("lock.acquire", "semaphore.acquire"))
"""Operations after which somebody holds something that others wait for."""

_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (KeyError, IndexError, ValueError, TypeError, RuntimeError, StateError,
                 ChannelClosed, queue.Empty, queue.Full, threading.BrokenBarrierError)
}  # fmt: skip


def refusal(error: Exception) -> Reply:
    """The reply that raises ``error`` on the other side."""
    kind = next((base for base in type(error).__mro__ if base.__name__ in _ERRORS), None)
    if kind is None:
        return ERROR, ("StateError", (f"{type(error).__name__}: {error}",))
    return ERROR, (kind.__name__, error.args)


def raised(content: Any) -> Exception:
    """The exception of an ERROR."""
    name, args = content
    return _ERRORS.get(name, StateError)(*args)
