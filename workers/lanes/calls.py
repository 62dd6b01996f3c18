"""The calls of a worker that executes many at a time, and which of them runs just now."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from time import perf_counter
from typing import Any

from taskrun.errors import Interrupted
from taskrun.messages import BEGAN, ENDED
from taskrun.values import encode_failure
from taskrun.workers.execute import Executor, Outcome, Running
from taskrun.workers.items import Later
from taskrun.workers.outbox import Port
from taskrun.workers.recipes import Home, Known

RUNNING: ContextVar[LaneRunning | None] = ContextVar("taskrun_running")


class LaneRunning(Running):
    """One attempt among others.

    ``handle``: what executes it, for its lane to cancel.  ``helpers``: asyncio tasks or
    greenlets that it has started, but for those of what all calls use, which it is ``making``.
    ``awaited``: futures that its coroutines await.  ``waiters``: where its threads or greenlets
    wait, ``waiting`` of them; ``together``: the core was told of several.  ``rests``: of each
    stream and thread, what it wrote of a line so far.  ``progressed``: when it last told its
    progress.  ``warned``: it was said to block others.
    """

    __slots__ = (
        "asking", "awaited", "handle", "helpers", "making", "progressed", "rests", "started",
        "together", "waiters", "waiting", "warned",
    )  # fmt: skip

    def __init__(self, call: int, attempt: int, known: Known, index: Any, units: Any) -> None:
        super().__init__(call, attempt, known, index, units, None)
        self.handle: Any = None
        self.helpers: set[Any] | None = None
        self.making = False
        self.awaited: dict[Any, None] | None = None
        self.asking = False
        self.waiters: threading.Condition | None = None
        self.waiting = 0
        self.together = False
        self.rests: dict[tuple[int, int], bytes] | None = None
        self.progressed = 0.0
        self.started = 0.0
        self.warned = False

    def note(self, helper: Any) -> set[Any] | None:
        """It has started this; gives where that is noted, or None."""
        if self.done or self.making:
            return None
        if self.helpers is None:
            self.helpers = set()
        self.helpers.add(helper)
        return self.helpers

    def wake(self) -> None:
        """Something came that it may wait for."""
        waiters = self.waiters
        if waiters is not None:
            with waiters:
                waiters.notify_all()


class LaneExecutor(Executor):
    """Executes many calls at a time; ``live`` are those that have begun and not ended.

    ``found`` gives the attempt that the code which asks belongs to.  ``flush_output`` sends
    what an attempt wrote, before its end is told.
    """

    def __init__(
        self,
        port: Port,
        home: Home,
        lock: Any,
        found: Callable[[], LaneRunning | None],
        flush_output: Callable[[LaneRunning], None],
        later: Later,
    ) -> None:
        super().__init__(port, home, _Nowhere(), _Nowhere(), later=later)
        self.live: dict[int, LaneRunning] = {}
        self._lock = lock
        self._found = found
        self._flush_output = flush_output
        self._making_one = threading.RLock()

    @property
    def running(self) -> Running | None:  # type: ignore[override]
        """The attempt that the code which asks belongs to, unless that has ended."""
        running = self._found()
        return None if running is None or running.done else running

    def asking(self) -> Running | None:
        """See ``Executor``."""
        return self.running

    # -- an attempt begins and ends ---------------------------------------------------

    def begin(self, record: tuple[Any, ...]) -> LaneRunning | None:
        """Note that the attempt of a CALL record begins; None where it was cancelled before."""
        _, call, attempt, recipe, index, _, units = record
        if self.early and (reason := self.early.get((call, attempt))) is not None:
            self.refuse(record, reason)
            return None
        running = LaneRunning(call, attempt, self._known[recipe], index, units)
        running.started = perf_counter()
        self.live[call] = running
        return running

    def perform(self, running: LaneRunning, args: Any) -> None:
        """Execute a call to its end, in a thread or greenlet that is its own."""
        RUNNING.set(running)
        self.end(running, self._attempt(running, args))

    async def perform_async(self, running: LaneRunning, args: Any) -> None:
        """The same as a coroutine."""
        RUNNING.set(running)
        known = running.known
        try:
            made = self._made(running, args)
            if known.style == "async":
                value = await made
            else:
                value = await self._listed_async(running, made)
            if self.forked:
                self.leave(None)
            outcome = self._outcome(running, value)
        except BaseException as error:
            if self.forked:
                self.leave(error)
            outcome = self._failed(running, error)
        self.end(running, outcome)

    def end(self, running: LaneRunning, outcome: Outcome) -> bool:
        """Report how an attempt ended; False where that was told already."""
        seconds = perf_counter() - running.started
        with self._lock:
            if running.done:
                return False
            if running.rests:
                self._flush_output(running)
            self._port.tell((ENDED, running.call, running.attempt, *outcome, running.began,
                             seconds, False))  # fmt: skip
            running.done = True
            del self.live[running.call]
        return True

    def abandon(self, running: LaneRunning, error: BaseException) -> bool:
        """Report an attempt that does not end as cancelled; False where it has ended."""
        return self.end(running, ("error", (encode_failure(error, "cancelled"), False), None))

    # -- what is different from a call that has its process for itself ------------------

    def per_worker(self, make: Callable[[], Any]) -> Any:
        if make in self.made:
            return self.made[make]
        running = self._found()
        with self._making_one:
            if running is not None:
                running.making = True
            try:
                return super().per_worker(make)
            finally:
                if running is not None:
                    running.making = False

    def _grant(self, units: dict[str, Any]) -> dict[str, str | None]:
        return {}  # the environment is everybody's; current().resources tells the call

    def tell_began(self) -> None:
        """Say of every attempt that it has begun, where that was not said yet."""
        with self._lock:
            for running in self.live.values():
                if not running.told:
                    running.told = True
                    self._port.tell((BEGAN, running.call, running.attempt, running.began, None))


def interrupted(running: Running) -> Interrupted:
    """What an attempt that is to end is ended with."""
    return Interrupted(running.interrupt or "cancelled")


class _Nowhere:
    """Where many calls run at a time, none of them is the one that is being executed."""

    def begin(self, call: int, attempt: int, resumed: int = 0) -> None:
        return None

    def ended(self, call: int, attempt: int, *, ended: bool = True) -> bool:
        return False
