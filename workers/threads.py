"""Threads that a call starts work for it: what they ask and print is their call's.

New threads begin without context variables, so what says whose they are is handed on to
them, and with each thing that is given to a pool of threads: such a pool may be everybody's.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

Owner = Any
"""The attempt that a thread works for; None: nobody's."""


class Calls(Protocol):
    """The calls of a worker, as far as their threads are concerned."""

    def found(self) -> Owner:
        """The attempt that the code which asks belongs to."""

    def owner(self) -> Owner:
        """The same, where threads that are started now are its own, and not everybody's."""

    def run_for(self, owner: Owner, function: Callable[..., Any], /, *args: Any, **kw: Any) -> Any:
        """Call a function, in another thread, for an attempt."""


def follow_calls(calls: Calls) -> None:
    """From now on threads know their call."""
    _following.append(calls)
    if len(_following) > 1:
        return
    threading.Thread.start = _start  # type: ignore[assignment, method-assign]
    _follow_into_pools()


def leave_calls(calls: Calls) -> None:
    """Threads that are started from now on are not theirs."""
    _following.remove(calls)
    if not _following and threading.Thread.start is _start:
        threading.Thread.start = _original_start  # type: ignore[method-assign]


_following: list[Calls] = []
_original_start = threading.Thread.start
_original_submit: Any = None


def _start(thread: threading.Thread) -> None:
    _follow_into_pools()
    for calls in _following:
        owner = calls.owner()
        if owner is not None:
            thread.run = partial(calls.run_for, owner, thread.run)  # type: ignore[method-assign]
            break
    _original_start(thread)


def _follow_into_pools() -> None:
    """See to pools of threads as well, once they are imported: few tasks have any.  What came
    before goes by the thread that is started for it."""
    global _original_submit
    module = sys.modules.get("concurrent.futures.thread")
    pools = getattr(module, "ThreadPoolExecutor", None)
    if _original_submit is None and pools is not None:
        _original_submit = pools.submit
        pools.submit = _submit


def _submit(pool: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    for calls in _following:
        function = partial(calls.run_for, calls.found(), function)
    return _original_submit(pool, function, *args, **kwargs)
