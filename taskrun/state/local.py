"""The client of a store in this very process: outside a run, and with ``--inline``."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from time import monotonic
from typing import Any, Final

from taskrun import context
from taskrun.errors import StateError
from taskrun.flag import Flag
from taskrun.state.clients import Changes, concluded, refuse_deadlock, settle
from taskrun.state.store import Store
from taskrun.state.waiting import Wait
from taskrun.state.wire import LEASED, MISSED, PARKED, TAKING, Owner, Reply, Request

MOST_CHANGES: Final = 10_000  # kept for one who watches
PATIENCE: Final = 5.0  # seconds until somebody who waits asks whether there is any hope


class Caller:
    """Somebody in this process who asks the store, and may have to wait for its answer."""

    acknowledges = False  # what is returned here has arrived

    def __init__(self, wake: Callable[[], object] = lambda: None) -> None:
        """``wake`` is called when there is an answer, perhaps on another thread."""
        self.wait: Wait | None = None
        self.undo: Callable[[], object] | None = None
        self.answers: deque[Reply] = deque()
        self._came = Flag()
        self._wake = wake
        self._missed = 0
        self.alone = False
        self.over = False

    def answer(self, reply: Reply) -> None:
        if len(self.answers) >= MOST_CHANGES:
            self._missed += 1
        else:
            self.answers.append(reply)
        self._came.set()
        self._wake()

    def end(self) -> None:
        """There is nothing more to wait for; on any thread."""
        self.over = True
        self._came.set()
        self._wake()

    def take(self) -> Reply:
        """The first answer that is there."""
        if not self.answers and self._missed:
            missed, self._missed = self._missed, 0
            return MISSED, missed
        return self.answers.popleft()

    # -- context.Outside --------------------------------------------------------------

    def ready(self) -> bool:
        return bool(self.answers or self._missed or self.over)

    def fileno(self) -> None:
        return None

    def block(self, timeout: float | None) -> bool:
        while not self.ready():
            self._came.clear()
            if not self.ready() and not self._came.wait(timeout):
                return False
        return True


class LocalClient:
    """A ``clients.Client`` of a store in this process.

    ``wake``: called when somebody's answer has come.  ``attempt`` gives the (call, attempt)
    that is being executed, if there is one.  ``is_deserted`` says whether nobody but the
    thread that asks could use the store: to wait without a timeout is an error then.
    """

    def __init__(
        self,
        store: Store,
        wake: Callable[[], object] = lambda: None,
        attempt: Callable[[], tuple[int, int] | None] = lambda: None,
        is_deserted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.store = store
        self._wake = wake
        self._attempt = attempt
        self._is_deserted = is_deserted
        self._caller = Caller()

    def owner(self) -> Owner:
        attempt = self._attempt()
        return ("client", "local") if attempt is None else ("attempt", *attempt)

    def call(self, request: Request) -> Any:
        return concluded(self.store.execute(request, self._caller))

    def wait(self, request: Request, timeout: float | None) -> Any:
        caller = Caller(self._wake)
        reply = self.store.execute(request, caller)
        if reply[0] == PARKED:
            try:
                came = self._block(request, reply[1], caller, timeout)
            except BaseException:
                self._take_back(request, caller)
                raise
            reply = (None if came else self.store.withdraw(caller)) or caller.take()
        return concluded(reply)

    def _block(self, request: Request, holder: Any, caller: Caller, timeout: float | None) -> bool:
        """Wait for the answer to a parked request; False when the time is up."""
        refuse_deadlock(holder)
        caller.alone = request[0] in LEASED
        if timeout is not None:
            return context.active().lend(caller, monotonic() + timeout)
        self._lend(request, caller)
        return True

    def _lend(self, request: Request, caller: Caller) -> None:
        """Wait until there is an answer.  Raises StateError where there can never be one."""
        while not context.active().lend(caller, monotonic() + PATIENCE):
            if self._is_deserted():
                raise _hopeless(request)

    def _take_back(self, request: Request, caller: Caller) -> None:
        """Whoever waited is interrupted: what it got meanwhile is not lost."""
        if self.store.withdraw(caller) is None:
            _undo(self, request, caller.take())

    async def wait_async(self, request: Request, timeout: float | None) -> Any:
        import asyncio

        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            loop.call_soon_threadsafe(settle, future)
            self._wake()

        caller = Caller(wake)
        reply = self.store.execute(request, caller)
        if reply[0] == PARKED:
            over = context.active().lend_awaiting(alone=request[0] in LEASED)
            try:
                refuse_deadlock(reply[1])
                if timeout is not None:
                    await asyncio.wait([future], timeout=timeout)
                else:
                    await self._answered(request, future)
            except BaseException:
                self._take_back(request, caller)
                raise
            finally:
                over()
            reply = self.store.withdraw(caller) or caller.take()
        return concluded(reply)

    async def _answered(self, request: Request, future: Any) -> None:
        """As :meth:`_lend`, for coroutines."""
        import asyncio

        while not (await asyncio.wait([future], timeout=PATIENCE))[0]:
            # Whether other coroutines of this loop would go on, nobody can tell.
            if len(asyncio.all_tasks()) == 1 and self._is_deserted():
                raise _hopeless(request)

    def watch(self, request: Request) -> Changes:
        caller = Caller(self._wake)
        concluded(self.store.execute(request, caller))

        def hang_up() -> None:
            self.store.left(caller, ("watcher", id(caller)))
            caller.end()

        return Changes(self._changes(request, caller, hang_up), hang_up)

    def _changes(
        self, request: Request, caller: Caller, hang_up: Callable[[], object]
    ) -> Generator[Reply]:
        try:
            while True:
                if not caller.ready():
                    self._lend(request, caller)
                if caller.over:
                    return
                yield caller.take()
        finally:
            hang_up()

    async def watch_async(self, request: Request) -> AsyncIterator[Reply]:
        import asyncio

        loop = asyncio.get_running_loop()
        came = asyncio.Event()
        caller = Caller(lambda: (loop.call_soon_threadsafe(came.set), self._wake()))
        concluded(self.store.execute(request, caller))
        try:
            while True:
                if not caller.ready():
                    came.clear()
                    over = context.active().lend_awaiting()
                    try:
                        await came.wait()
                    finally:
                        over()
                while caller.ready():
                    yield caller.take()
        finally:
            self.store.left(caller, ("watcher", id(caller)))


def _hopeless(request: Request) -> StateError:
    operation, name = request[:2]
    return StateError(
        f"{operation} of {name!r} would wait for ever: nobody else is there who could end it. "
        "Outside a run, and with --inline, one thing is done at a time: run it without --inline, "
        "say timeout=, or let a client in by --listen"
    )


def _undo(client: LocalClient, request: Request, reply: Reply) -> None:
    operation, name, options, args = request
    if reply[0] != 0:
        return
    if operation in TAKING:
        client.store.put_back(request, reply[1])
    elif operation.endswith(".acquire"):
        kind = operation.partition(".")[0]
        client.call((f"{kind}.release", name, options, args[:2]))


# -- outside a run --------------------------------------------------------------------

_own: tuple[int, LocalClient] | None = None


def own_client() -> LocalClient:
    """The client of this process's own store, which is made at first use; a forked child
    has its own."""
    global _own
    if _own is None or _own[0] != os.getpid():
        _own = os.getpid(), LocalClient(Store(), is_deserted=lambda: threading.active_count() == 1)
    return _own[1]


def forget() -> None:
    """Forget all objects of this process: the next test begins with none."""
    global _own
    _own = None
