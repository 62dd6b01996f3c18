"""The lane ``async``: thousands of coroutines on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from taskrun.workers import native
from taskrun.workers.items import SECONDS
from taskrun.workers.lanes.base import LaneWorker
from taskrun.workers.lanes.calls import RUNNING, LaneRunning, interrupted
from taskrun.workers.lanes.stacks import Place, walk_awaits


class AsyncWorker(LaneWorker):
    """A worker whose calls are coroutines; its home thread is the loop's."""

    awaits = True

    def prepare(self) -> None:
        """See ``base``."""
        self._thread = native.get_ident()
        self._loop = asyncio.new_event_loop()
        self._about_to_flush = False
        self._error: BaseException | None = None
        asyncio.set_event_loop(self._loop)
        self._loop.set_task_factory(self._make_task)

    def serve(self) -> None:
        """See ``base``."""
        self._loop.add_reader(self._fd, self._on_readable)
        self._loop.run_forever()
        if self.executor.forked:
            self.executor.leave(RuntimeError("the event loop does not go on in a forked child"))
        self._loop.remove_reader(self._fd)
        if self._error is not None:
            raise self._error

    def _on_readable(self) -> None:
        try:
            self.read()
        except BaseException as error:
            self._error = error
            self._loop.stop()
        self._stop_if_over()

    def _stop_if_over(self) -> None:
        if self.is_over:
            self._loop.stop()

    # -- calls ------------------------------------------------------------------------

    def begin(self, running: LaneRunning, args: Any) -> None:
        """See ``base``."""
        running.handle = asyncio.Task(self._perform(running, args), loop=self._loop)

    async def _perform(self, running: LaneRunning, args: Any) -> None:
        running.user = True
        await self.executor.perform_async(running, args)
        self.flush()
        if running.helpers:
            self._end_tasks(running)
        if self.quitting:
            self._stop_if_over()

    def cancel(self, running: LaneRunning) -> None:
        """See ``base``."""
        running.handle.cancel()
        if running.user:
            running.raised = True
            self._loop.call_later(self.grace, self._abandon, running)
        else:  # it has not begun, and so it never does
            self.executor.abandon(running, interrupted(running))
            self.flush()
            self._stop_if_over()

    def _abandon(self, running: LaneRunning) -> None:
        if not running.done:
            self.give_up(running, "goes on although it was cancelled")
            self._stop_if_over()

    def frames_of(self, running: LaneRunning) -> Iterable[Place] | None:
        """See ``base``."""
        coroutine = running.handle.get_coro()
        return None if coroutine.cr_running else list(walk_awaits(coroutine))

    def leave_others(self) -> None:
        """See base.  Where the coroutine that forked goes on to wait, the child ends: its loop
        has all other calls in it, and shares with the parent what it polls."""
        for handle in getattr(self._loop, "_ready", ()):
            handle.cancel()
        self._loop.stop()

    # -- the tasks that calls start ---------------------------------------------------

    def _make_task(self, loop: Any, coroutine: Any, **options: Any) -> Any:
        """A task factory: notes whose the task is."""
        task = asyncio.Task(coroutine, loop=loop, **options)
        running = RUNNING.get(None)
        noted = None if running is None else running.note(task)
        if noted is not None:
            task.add_done_callback(noted.discard)
        return task

    def _end_tasks(self, running: LaneRunning) -> None:
        """Cancel what a call has left behind, as ``asyncio.run`` does."""
        for task in list(running.helpers or ()):
            task.cancel()

    # -- around -----------------------------------------------------------------------

    def post(self, callback: Callable[[], None]) -> None:
        """See ``base``."""
        self._loop.call_soon_threadsafe(callback)

    def later(self, callback: Callable[[], None]) -> None:
        """See ``base``."""
        self._loop.call_later(SECONDS, callback)

    def flush(self) -> None:
        """See ``base``.  At the end of this turn of the loop, with all that is told in it."""
        if native.get_ident() != self._thread:
            self.outbox.flush()
        elif not self._about_to_flush:
            self._about_to_flush = True
            self._loop.call_soon(self._flush)
        else:
            self.flush_if_large()

    def _flush(self) -> None:
        self._about_to_flush = False
        self.outbox.flush()

    def close(self) -> None:
        """See ``base``."""
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.wait(left, timeout=self.grace))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
