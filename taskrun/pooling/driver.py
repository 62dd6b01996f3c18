"""What a Pool is made of: a scheduler core, an engine of workers, and the loop they are on.

    submit, cancel --posts--> core --commands--> engine --events--> core --ends--> jobs

It is a run whose feed stays open.  Calls come in by ``submit``, in order, and are forgotten
when they have ended; a *job* is whoever wants to know.  Only who runs the loop touches the
core, the engine and ``_jobs``.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from time import monotonic
from typing import Any, Final, Protocol

from taskrun import messages as m
from taskrun.blobs import Portable
from taskrun.core import Scheduler
from taskrun.errors import CallCancelled, RunError, TaskrunError
from taskrun.model import Plan, Recipe
from taskrun.observers import Observer
from taskrun.pooling.looping import Loop, Waitable
from taskrun.pooling.sharing import PoolState
from taskrun.pooling.starting import PoolWorkers, Starter
from taskrun.reactor import Reactor

CLOSE_SECONDS: Final = 5.0  # that workers may take to end by themselves
TERMINATE_SECONDS: Final = 2.0
WINDOW: Final = 512  # calls for each worker that the core is given at a time
START_SECONDS: Final = 30.0
GRACE: Final = 0.5  # seconds between interrupt, TERM and KILL of a call that is cancelled


class Job(Protocol):
    """Who wants to know how a call ends; called by who runs the loop.

    ``call``: its id in the core; None as long as it has none, negative if it will not get one.
    """

    call: int | None

    def ended(self, call: Any, last: m.AttemptEnded | None, pid: int | None) -> None:
        """The call has ended; ``last`` is its last attempt, in the process ``pid``."""

    def failed(self, error: BaseException) -> None:
        """The call will not end: the pool is over."""


class _Started(Waitable):
    def __init__(self, engine: PoolWorkers) -> None:
        super().__init__()
        self._engine = engine

    def settled(self) -> bool:
        return self._engine.settled


class Driver:
    """The workers of one Pool, and who drives them."""

    def __init__(
        self,
        processes: int,
        starter: Starter,
        most_calls: int | None,
        initializer_failed: Callable[[Any], BaseException | None],
    ) -> None:
        """Starts.  Raises RunError where no process can be started."""
        self.recipe_ids = itertools.count(1)
        self.processes = processes
        self.error: BaseException | None = None  # why the pool is broken
        self._starter = starter
        self._initializer_failed = initializer_failed
        self._jobs: dict[int, Job] = {}
        self._last: m.AttemptEnded | None = None
        self._inbox: deque[tuple[Recipe, Portable, Job]] = deque()
        self._added: list[Job] = []
        self._posted = False
        self._feeds = 0
        self._window = WINDOW * (processes + 1)
        self._low = self._window // 2
        self.waits_at_exit = False  # for the calls that there are then
        self.closing = self._killing = self._ended = False
        self._timer: Any = None
        self._timer_at: float | None = None
        self._lock = threading.Lock()
        self._core = Scheduler(
            Plan((), frozenset()),
            slots=processes,
            policy="keep-going",
            recipe_ids=self.recipe_ids,
            spare_factor=1,
            open_feed=True,
            keep=False,
            standing=processes,
            most_calls=most_calls,
        )
        self._reactor = Reactor()
        self._state = PoolState(self._reactor, starter.base, self._watch_attempts)
        self._engine = PoolWorkers(starter, self.recipe_ids, GRACE, self._state.address)
        self.loop = Loop(self._reactor, "taskrun-pool")
        self.loop.finish, self.loop.broken = self._finish, self._broken
        self._performers = self._make_performers()
        self._start()

    def _start(self) -> None:
        try:
            self._state.start()
        except BaseException:
            self._reactor.close()
            self._starter.close()
            raise
        try:
            self._engine.start(self._reactor, self._post, Observer())
            self._perform(self._core.begin(monotonic()))
        except BaseException:
            self._engine.close(monotonic())
            self._state.close()
            self._reactor.close()
            self._starter.close()
            raise
        self.loop.start()

    # -- from any thread --------------------------------------------------------------

    def submit(self, recipe: Recipe, blob: Portable, job: Job, *, waits: bool = False) -> None:
        """Have a call executed: ``blob`` is its pickled (args, kwargs).

        ``waits``: the caller goes on to wait, and so need not wake who runs the loop.
        """
        self._inbox.append((recipe, blob, job))
        if not self._posted:
            self._posted = True
            if waits:
                self._reactor.call_soon(self._take)
            else:
                self._to_loop(self._take)
        if self._ended:
            self._fail_inbox()

    def cancel(self, jobs: Callable[[], Iterable[Job]]) -> None:
        """Cancel the calls of the jobs that ``jobs`` gives when the loop asks."""
        self._to_loop(lambda: self._cancel(jobs()))

    def cancel_queued(self, cancel: Callable[[Job], None]) -> None:
        """Have ``cancel`` called, by the loop's thread, with each job whose call has not begun,
        nor is the next of a worker that is about to start."""

        def ask() -> None:
            waiting = [job for id, job in self._jobs.items() if not self._core.is_assigned(id)]
            begun = len(self._jobs) - len(waiting)
            waiting += [job for _, _, job in self._inbox]
            for job in waiting[max(0, self.processes - begun) :]:
                self.loop.call_back(partial(cancel, job))

        self._to_loop(ask)

    def open_feed(self) -> None:
        """More calls will come, after ``close`` as well."""
        with self._lock:
            self._feeds += 1

    def close_feed(self) -> None:
        """They have come."""
        with self._lock:
            self._feeds -= 1
        self._to_loop(self._close_if_fed)

    def close(self) -> None:
        """End when the calls that were submitted have."""
        self.closing = True
        self._to_loop(self._close_if_fed)

    def abandon(self) -> None:
        """End soon, and all calls and workers too; does not wait."""
        if self.loop.is_here:
            self._killing = True
            self.loop.end_soon()

    def terminate(self) -> None:
        """End now."""
        if self.loop.is_here:
            self._killing = True
            self.loop.end()
            if not self.loop.in_thread:
                self.loop.finished.wait()

    def post(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called on the loop, in turn with what was submitted."""
        if self._ended:
            callback()
        else:
            self.loop.post(callback)

    def await_start(self) -> None:
        """Wait until the workers that are wanted have started."""
        started = _Started(self._engine)
        deadline = monotonic() + START_SECONDS
        while not started.settled() and not self.loop.over and monotonic() < deadline:
            self.loop.wait(started, 0.05)

    def _to_loop(self, callback: Callable[[], object]) -> None:
        if not self._ended:
            self.loop.post(callback)

    def pids(self) -> dict[int, int]:
        """The pids of the workers that have started, by number."""
        return self._engine.pids()

    # -- on the loop ------------------------------------------------------------------

    def _take(self) -> None:
        """Feed what was submitted, in order; calls of one recipe in a row together.

        The core is given so many that it has always enough to do, and not more: the rest is
        cheaper here.
        """
        self._posted = False  # before taking, so that nothing is left without a post
        inbox = self._inbox
        room = self._window - len(self._jobs)
        while inbox and room > 0:
            recipe, self._added = inbox[0][0], []
            blobs: list[Portable] = []
            while inbox and inbox[0][0] is recipe and len(blobs) < room:
                _, blob, job = inbox.popleft()
                if job.call is None:
                    blobs.append(blob)
                    self._added.append(job)
                else:
                    job.failed(CallCancelled(f"{recipe.name} was cancelled: it was asked for"))
            room -= len(blobs)
            if blobs:
                self._post(m.Fed(recipe, blobs))
        self._close_if_fed()

    def _cancel(self, jobs: Iterable[Job]) -> None:
        known = []
        for job in jobs:
            if job.call is None:
                job.call = -1  # it will not be fed
            else:
                known.append(job.call)
        self._post(m.CancelCalls(tuple(known), "it was asked for"))

    def _close_if_fed(self) -> None:
        if self.closing and not (self._feeds or self._inbox or self._core.over):
            nothing = Recipe(0, "", b"")
            self._post(m.Fed(nothing, [], last=True))

    def _post(self, event: m.Event) -> None:
        self._perform(self._core.handle(event, monotonic()))

    def _perform(self, commands: list[m.Command]) -> None:
        performers = self._performers
        for command in commands:
            performers[type(command)](command)
        if self._inbox and not self._posted and len(self._jobs) < self._low:
            self._posted = True
            self._reactor.call_soon(self._take)
        deadline = self._core.deadline()
        if deadline != self._timer_at:
            self._set_timer(deadline)

    def _set_timer(self, deadline: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = None
        if deadline is not None:
            self._timer = self._reactor.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = self._timer_at = None
        self._post(m.Tick())

    def _make_performers(self) -> dict[type, Callable[[Any], None]]:
        engine = self._engine.perform
        return {
            m.StartWorkers: engine,
            m.StopWorker: engine,
            m.Assign: engine,
            m.Reclaim: engine,
            m.Interrupt: engine,
            m.Deliver: engine,
            m.CallsAdded: self._calls_added,
            m.AttemptEnded: self._attempt_ended,
            m.CallEnded: self._call_ended,
            m.RunEnded: self._run_ended,
        }

    def _calls_added(self, command: m.CallsAdded) -> None:
        ours = [call for call in command.calls if call.parent is None]
        for call, job in zip(ours, self._added, strict=False):
            self._jobs[call.id] = job
            job.call = call.id
        self._added = []

    def _attempt_ended(self, command: m.AttemptEnded) -> None:
        self._last = command

    def _watch_attempts(self) -> None:
        """State is used: from now on it is told of attempts that end."""
        self._performers[m.AttemptEnded] = self._stateful_attempt_ended

    def _stateful_attempt_ended(self, command: m.AttemptEnded) -> None:
        self._state.attempt_ended(command.call.id, command.attempt)
        self._last = command

    def _call_ended(self, command: m.CallEnded) -> None:
        call = command.call
        job = self._jobs.pop(call.id, None)
        if job is None:
            return
        last = self._last
        if last is not None and last.call is not call:
            last = None
        pid = None
        if last is not None and last.worker is not None:
            worker = self._core.worker(last.worker)
            pid = None if worker is None else worker.pid
        if call.failure is not None and self.error is None:
            self.error = self._initializer_failed(call)
            if self.error is not None:
                self.loop.end()
        if self.error is not None:
            job.failed(self.error)
        else:
            job.ended(call, last, pid)

    def _run_ended(self, command: m.RunEnded) -> None:
        if command.status == 3 and self.error is None:
            self.error = RunError(f"the pool cannot go on: {command.reason}")
        self.loop.end()

    # -- the end ----------------------------------------------------------------------

    def _finish(self) -> None:
        """Called once, by the loop's thread."""
        if not (self._killing or self.error):
            self._reactor.run_until(lambda: self._engine.settled or self._killing)
        self._ended = True
        self._fail_jobs(self.why_over())
        graceful = not (self._killing or self.error)
        self._engine.close(monotonic() + (CLOSE_SECONDS if graceful else TERMINATE_SECONDS))
        self._state.close()
        self._starter.close()
        self._fail_inbox()

    def why_over(self) -> BaseException:
        """What those get who wait for a call that will not end."""
        return self.error or CallCancelled("the pool was terminated before the call had ended")

    def _fail_jobs(self, error: BaseException) -> None:
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.failed(error)
        self._fail_inbox()

    def _fail_inbox(self) -> None:
        while self._inbox:
            try:
                _, _, job = self._inbox.popleft()
            except IndexError:  # another thread took it
                return
            job.failed(self.why_over())

    def _broken(self, error: BaseException) -> None:
        """A bug of ours left the loop: nobody is to wait for what cannot come."""
        if self.error is None:
            said = f"the pool failed in itself: {type(error).__name__}: {error}"
            self.error = TaskrunError(said)
            self.error.__cause__ = error
        self.loop.end()
        if self.loop.in_thread:
            self._ended = True
            self._fail_jobs(self.error)
            self._engine.kill()
