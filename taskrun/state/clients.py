"""What a client of a store is, and what all clients have in common."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any, Protocol

from taskrun import context
from taskrun.errors import StateError
from taskrun.state.wire import ERROR, TIMED_OUT, Owner, Reply, Request, raised


class TimeUp(TimeoutError):
    """Raised where the time is over that a wait was given; it stays among handles and clients.
    Whatever other TimeoutError ends a wait is somebody else's, such as a signal handler's."""


class Client(Protocol):
    """The way to a store.  ``timeout`` is in seconds, None is for ever; when it is over,
    TimeUp is raised."""

    def call(self, request: Request) -> Any:
        """Have something done that takes no time; what it returns."""

    def wait(self, request: Request, timeout: float | None) -> Any:
        """Have something done that may have to wait."""

    async def wait_async(self, request: Request, timeout: float | None) -> Any:
        """The same for coroutines."""

    def watch(self, request: Request) -> Changes:
        """What the store tells, until it is gone or that is closed."""

    def watch_async(self, request: Request) -> AsyncIterator[Reply]:
        """The same for coroutines."""

    def owner(self) -> Owner:
        """Who holds what is acquired here and now."""


class Changes:
    """An iterator over what a store tells.  ``hang_up`` ends the waiting for more."""

    def __init__(self, replies: Generator[Reply], hang_up: Callable[[], object]) -> None:
        self._replies = replies
        self._hang_up = hang_up

    def __iter__(self) -> Changes:
        return self

    def __next__(self) -> Reply:
        return next(self._replies)

    def close(self) -> None:
        """End it, on any thread: whoever waits for the next one hears that there is none."""
        self._hang_up()
        try:
            self._replies.close()
        except ValueError:
            pass  # somebody does wait


def concluded(reply: Reply) -> Any:
    """What a final reply says, or raises."""
    kind, content = reply
    if kind == ERROR:
        raise raised(content)
    if kind == TIMED_OUT:
        raise TimeUp("the time is up")
    return content


def place() -> tuple[int, int, int]:
    """Process, thread (or greenlet) and coroutine, as numbers: whoever holds a lock is one of
    these."""
    task = None
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        task = asyncio.current_task()
    thread = threading.current_thread()
    return os.getpid(), _number_of(thread), 0 if task is None else _number_of(task)


# Python and the system give the numbers they have for these again to others that come later.
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_next = itertools.count(1)


def _number_of(one: Any) -> int:
    found = _numbers.get(one)
    return _numbers.setdefault(one, next(_next)) if found is None else found


def refuse_to_block(what: str, twin: str) -> None:
    """Raises RuntimeError where waiting would stop a running event loop."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is not None and asyncio._get_running_loop() is not None:
        raise RuntimeError(f"{what} would block the event loop: in an async task, {twin}")


def settle(future: Any) -> None:
    """End what waits for a future of an event loop."""
    if not future.done():
        future.set_result(None)


def refuse_deadlock(holder: Any) -> None:
    """Raises StateError where what is waited for is held by a call that cannot go on before
    the one that asks: one that waits beneath it in this worker."""
    if holder is None or holder[0][0] != "attempt":
        return
    if holder[0][1:] in context.active().beneath():
        raise StateError(
            "this lock is held by a call that waits for this one: they would wait for ever"
        )
