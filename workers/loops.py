"""Event loops for ``async def`` tasks, kept from call to call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import asyncio


class Cancellable(Protocol):
    """An attempt; ``cancel`` ends its coroutine, ``on_end`` is called when that has ended."""

    cancel: Callable[[], object] | None
    on_end: Callable[[], object] | None

    def enter_user(self) -> None: ...


class Loops:
    """One event loop; more of them where calls are nested in one another."""

    def __init__(self) -> None:
        self._idle: list[asyncio.AbstractEventLoop] = []

    def run(self, coroutine: Coroutine[Any, Any, Any], running: Cancellable) -> Any:
        """Run a coroutine to its end, and end what it leaves behind."""
        import asyncio  # slow to import; only async tasks pay for it

        with standing_still():
            loop = self._idle.pop() if self._idle else asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            task = loop.create_task(coroutine)
            running.cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            try:
                running.enter_user()
                return loop.run_until_complete(task)
            finally:
                running.cancel = None
                _tidy(loop)
                if running.on_end is not None:
                    running.on_end()
                self._idle.append(loop)

    def close(self) -> None:
        """Close the loops; none may be running."""
        while self._idle:
            self._idle.pop().close()


@contextmanager
def standing_still() -> Iterator[None]:
    """Run other code in a callback of the loop that runs in this thread, if one does.

    That is how an attempt whose coroutines wait executes nested calls: its own loop stands
    still meanwhile, and is not entered again.
    """
    asyncio = sys.modules.get("asyncio")
    outer = asyncio._get_running_loop() if asyncio is not None else None
    if asyncio is None or outer is None:
        yield
        return
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio.set_event_loop(outer)
        asyncio._set_running_loop(outer)


def _tidy(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel the tasks that are left, as ``asyncio.run`` does."""
    import asyncio

    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
