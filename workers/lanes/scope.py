"""What a call among many reaches of its run; see ``workers.scope``.

Nothing is lent here and nothing executed on top: a call that waits is in nobody's way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import monotonic
from typing import Any

from taskrun.context import Future, Outside, left_until
from taskrun.messages import ALSO, PROGRESS, WAIT
from taskrun.model import Task
from taskrun.workers.execute import Running
from taskrun.workers.lanes.calls import LaneExecutor, LaneRunning
from taskrun.workers.scope import PROGRESS_SECONDS, Line, WorkerContext, resolve

ASK_SECONDS = 2e-5
"""For each call that is awaited: how long an answer is used before the rest is asked for."""


class LaneContext(WorkerContext):
    """A ``context.Context`` for calls that share one process."""

    def __init__(
        self, executor: LaneExecutor, line: Line, lock: Any, *, awaits: bool, **facts: Any
    ) -> None:
        """``awaits``: the calls are coroutines of one event loop."""
        super().__init__(executor, line, **facts)
        self._live = executor.live
        self._lock = lock
        self._awaits = awaits

    def submit(self, task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future:
        with self._lock:  # no SUBMIT comes behind the end of its call
            return super().submit(task, args, kwargs)

    def watch(self, future: Future) -> None:
        running = self._here("waiting for a call")
        assert isinstance(running, LaneRunning)
        if not self._awaits:
            raise RuntimeError("futures are awaited in async tasks only: here, use result()")
        if self._pending(running, [future]):
            if running.awaited is None:
                running.awaited = {}
            running.awaited[future] = None
            self._ask_soon(running)

    def _goes_on(self, running: Running) -> bool:
        return not running.done

    def lend(self, outside: Outside, deadline: float | None) -> bool:
        return outside.block(left_until(deadline))

    def lend_awaiting(self, *, alone: bool = False) -> Callable[[], None]:
        return _nothing_was_lent

    def beneath(self) -> list[tuple[int, int]]:
        return []

    def deliver(self, call: int | None, outcomes: dict[bytes, Any]) -> None:
        """Resolve futures of a call; an attempt that has ended does not want them any more."""
        running = None if call is None else self._live.get(call)
        if running is None or running.futures is None:
            return
        for key, outcome in outcomes.items():
            future = running.futures.get(key)
            if future is not None:
                resolve(future, outcome)
                del running.futures[key]  # not before: who asks meanwhile finds it in either
        running.wake()
        if running.awaited:
            self._ask_soon(running)

    def _give_up(self, running: Running) -> None:
        """The worker knows whether other threads of the call go on waiting."""

    def _refuse_to_block(self) -> None:
        asyncio = sys.modules.get("asyncio")
        if asyncio is not None and asyncio._get_running_loop() is not None:
            raise RuntimeError("this would block the event loop: in an async task, await futures")

    def _progress(self, running: Running, done: float, total: float | None) -> None:
        assert isinstance(running, LaneRunning)
        now = monotonic()
        finished = total is not None and done >= total
        if running.done or (now - running.progressed < PROGRESS_SECONDS and not finished):
            return
        running.progressed = now
        self._line.tell((PROGRESS, running.call, running.attempt, done, total))
        self._line.flush()

    # -- awaiting ---------------------------------------------------------------------

    def _ask_soon(self, running: LaneRunning) -> None:
        """A WAIT is over when one outcome was delivered, and names all that are awaited: the
        more there are, the more outcomes are let come together."""
        if running.asking:
            return
        running.asking = True
        import asyncio

        loop = asyncio.get_running_loop()
        loop.call_later(ASK_SECONDS * len(running.awaited or ()), self._ask, running)

    def _ask(self, running: LaneRunning) -> None:
        running.asking = False
        if running.done or running.awaited is None:
            return
        running.awaited = {f: None for f in running.awaited if not f.done()}
        if running.awaited:
            keys = tuple(dict.fromkeys(future.key for future in running.awaited))
            with self._lock:
                if running.waiting:  # in other threads
                    running.together = True
                    keys = (ALSO, *keys)
                self._line.tell((WAIT, running.call, running.attempt, keys, True))
            self._line.flush()


def _nothing_was_lent() -> None:
    """There is nothing to be taken back."""
