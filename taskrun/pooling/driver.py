"""What a Pool is made of: a scheduler core, an engine of workers, and the loop they are on.

    submit, cancel --posts--> core --commands--> engine --events--> core --ends--> jobs

It is a run whose feed stays open.  Calls come in by ``submit``, in order, and are forgotten
when they have ended; a *job* is whoever wants to know.  Only who runs the loop touches the
core, the engine and ``_jobs``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from signal import SIGINT
from time import monotonic
from typing import Any, Final

from taskrun import messages as m
from taskrun.alarm import Alarm
from taskrun.blobs import Portable
from taskrun.bunch import Bunch
from taskrun.calls import FINAL, RUNNING
from taskrun.core.scheduler import Scheduler
from taskrun.engines.links import Link
from taskrun.errors import CallCancelled, RunError, TaskrunError
from taskrun.model import Failure, Plan, Recipe
from taskrun.observers import Observer
from taskrun.pooling.inbox import Entry, Inbox, Job, Owner, Row, Single, withdrawn
from taskrun.pooling.looping import Loop, Waitable
from taskrun.pooling.sharing import PoolState
from taskrun.pooling.starting import PoolWorkers, Supply
from taskrun.pooling.trips import Trips
from taskrun.reactor import Reactor
from taskrun.signals import postponed

CLOSE_SECONDS: Final = 5.0  # that workers may take to end by themselves
TERMINATE_SECONDS: Final = 2.0
END_SECONDS: Final = 20.0  # that somebody waits for the end, at most: a callback may hang
WINDOW: Final = 512  # calls for each worker that the core is given at a time
AHEAD: Final = 8  # bunches for each worker that it is given
ENOUGH: Final = 2  # ... and with which it does not wait for more that are not full
LAP: Final = 2048  # calls that somebody submits at a stretch, while they wait to be taken
LAP_SECONDS: Final = 0.003  # that he then waits for the loop, at most
START_SECONDS: Final = 30.0
GRACE: Final = 0.5  # seconds between interrupt, TERM and KILL of a call that is cancelled


class _Started(Waitable):
    """``at_all``: whether there are to be any."""

    def __init__(self, engine: PoolWorkers, at_all: bool) -> None:
        super().__init__()
        self._engine = engine
        self._at_all = at_all

    def settled(self) -> bool:
        # Asked while the loop goes on: in a moment in which none is about to start, perhaps none
        # is there yet.
        return self._engine.settled and bool(self._engine.started() or not self._at_all)


class _Unfinished(Waitable):
    """``found``: the answer, once there is one."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop
        self.found: list[Any] | None = None

    def settled(self) -> bool:
        return self.found is not None or self._loop.finished.is_set()

    def tell(self, found: list[Any]) -> None:
        self.found = found
        self.wake()


class Driver:
    """The workers of one Pool, and who drives them."""

    def __init__(
        self,
        processes: int,
        starter: Supply,
        most_calls: int | None,
        initializer_failed: Callable[[Failure], BaseException | None],
    ) -> None:
        """Starts.  ``processes``: how many workers there are; where they are lent, at first.
        Raises RunError where no process can be started, and RuntimeError where no thread can."""
        self.recipe_ids = itertools.count(1)
        self.processes = processes
        self.error: BaseException | None = None  # why the pool is broken
        self._starter = starter
        self._initializer_failed = initializer_failed
        self._jobs: dict[int, Job | Bunch] = {}
        self._last: m.AttemptEnded | None = None
        self._inbox = Inbox(bunches=most_calls is None)
        self._waiting = self._inbox.entries
        self._put = self._waiting.append
        self._added: list[Job] = []
        self._due = False  # whether _take will be called: it was posted, or see _low
        self._asking = False  # whether it is not known that _take was posted
        self._feeds: set[object] = set()  # to add and discard is one step, without a lock
        self._low = 0  # with fewer calls than these more are taken, once some were left
        self._waits = False  # whether a call has waited, perhaps for another
        # Whether small calls may go to an idle worker directly.
        self._direct = self._inbox.bunches and not starter.lent
        self.waits_at_exit = False  # for the calls that there are then
        self.closing = self._killing = self._ended = False
        slots = 0 if starter.lent else processes  # how many there are just now
        self._core = Scheduler(
            Plan((), frozenset()),
            slots=slots,
            policy="keep-going",
            recipe_ids=self.recipe_ids,
            spare_factor=1,
            open_feed=True,
            keep=False,
            standing=slots,
            most_calls=most_calls,
        )
        self._reactor = Reactor()
        self._alarm = Alarm(self._reactor, self._core, self._post)
        self._state = PoolState(self._reactor, starter.base, self._watch_attempts)
        self._engine = starter.workers(self.recipe_ids, GRACE, self._state.address)
        self._engine.resized = self._resized
        self.loop = Loop(self._reactor, "taskrun-pool")
        self.loop.finish, self.loop.broken = self._finish, self._broken
        self.loop.entered = self._entered
        self._trips = Trips(self._reactor, self._core, self._engine, self._post)
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
            # To reach a server may take long; to fork does not.
            with nullcontext() if self._starter.lent else postponed(SIGINT):
                self._engine.start(self._reactor, self._post, Observer())
            self._perform(self._core.begin(monotonic()))
        except BaseException:
            self._close_unstarted()
            raise
        try:
            self.loop.start()
        except RuntimeError:  # there is no thread; who is interrupted here may have started it
            self._close_unstarted()
            raise

    def _close_unstarted(self) -> None:
        self._engine.close(monotonic())
        self._state.close()
        self._reactor.close()
        self._starter.close()

    # -- from any thread --------------------------------------------------------------

    def own_singles(self, owner: Owner) -> None:
        """From now on ``owner`` hears of Singles that are submitted."""
        self._inbox.singles = owner

    def submit(self, recipe: Recipe, blob: Portable, job: Job, *, waits: bool = False) -> None:
        """Have a call executed: ``blob`` is its pickled (args, kwargs).

        ``waits``: the caller goes on to wait, and so need not wake who runs the loop.
        """
        if waits:
            self._put((recipe, blob, None, job))
            self._reactor.call_soon(self._take)
            self._fail_if_ended()
        else:
            self.submit_entry((recipe, blob, None, job))

    def submit_small(self, recipe: Recipe, args: Any, owner: Owner, token: Any) -> None:
        """Have a call executed, with others in a bunch; ``args``: see ``Bunch.items``.  For
        recipes without timeout and retries."""
        self._put((recipe, args, owner, token))
        if not self._due or self._ended or self._asking:
            self._was_put()

    def submit_entry(self, entry: Entry | Single) -> None:
        """Have a call executed as the entry says, perhaps with others in a bunch."""
        self._put(entry)
        if not self._due or self._ended or self._asking:
            self._was_put()
        if len(self._waiting) % LAP == LAP - 1:  # not of few: 0 and 1 are usual
            self.loop.give_way(LAP_SECONDS)

    def _was_put(self) -> None:
        """Ask the loop to take what was put in, unless somebody has."""
        # The handler of a signal may come in between, submit as well and wait, or wait for
        # another thread that does: they have to ask themselves.  Or it ends us here: then the
        # next one asks.
        if self._asking or not self._due:
            try:
                self._asking = self._due = True
                self._to_loop(self._take)
            except BaseException:
                self._due = False
                raise
            finally:
                self._asking = False
        self._fail_if_ended()

    def _fail_if_ended(self) -> None:
        if self._ended:
            self._inbox.fail(self.why_over())
            self.loop.nudge()

    def submit_direct(
        self, recipe: Recipe, args: Any, owner: Owner, token: Any, *, waits: bool = False
    ) -> bool:
        """The same, by the shortest way; False where another way has to be taken.

        ``waits``: the caller goes on to wait, and may do so here.
        """
        begun = False

        def begin() -> None:
            nonlocal begun
            if not (self._inbox or self._trips.bunch or self._ended):
                begun = self._trips.begin(recipe, Bunch(owner, (token,), [args]))
                if begun and waits:
                    self._entered(token, None)

        return self._direct and self.loop.borrow(begin) and begun

    def runs(self, job: Job) -> bool:
        """Whether a worker has its call; also where that has just ended, and the job is told in
        a moment."""
        if job.call is None:
            return False
        call = self._core.find(job.call)
        return call is None or call.state is RUNNING or call.state in FINAL

    def unfinished(self) -> list[Any]:
        """The jobs and tokens of calls that have not ended, or whose callbacks are not over, and
        the feeds that are open.  None in a forked process."""
        answer = _Unfinished(self.loop)

        def ask() -> None:
            found = [*self._feeds, *self._inbox.tokens()]
            for job in self._jobs.values():
                found += job.tokens[job.done :] if isinstance(job, Bunch) else [job]
            self.loop.call_back(partial(answer.tell, found))  # behind the callbacks that are due

        self._to_loop(ask)
        while self.loop.is_here and not answer.settled():
            self.loop.wait(answer, 0.05)  # once the loop is over nobody would wake us
        return answer.found or []

    def cancel(self, jobs: Callable[[], Iterable[Job]]) -> None:
        """Cancel the calls of the jobs that ``jobs`` gives when the loop asks."""
        self._to_loop(lambda: self._cancel(jobs()))

    def cancel_queued(self, cancel: Callable[[Job], None]) -> None:
        """Have ``cancel`` called, by the loop's thread, with each job whose call has not begun,
        nor is the next of a worker that is about to start."""

        def ask() -> None:
            waiting: list[Any] = []
            begun = 0
            for id, job in self._jobs.items():
                if self._core.is_assigned(id):
                    begun += 1
                else:
                    waiting += job.tokens if isinstance(job, Bunch) else [job]
            waiting += self._inbox.tokens()
            for job in waiting[max(0, self.processes - begun) :]:
                self.loop.call_back(partial(cancel, job))

        self._to_loop(ask)

    def open_feed(self, feed: object) -> None:
        """More calls will come, after ``close`` as well, until :meth:`close_feed`."""
        self._feeds.add(feed)

    def is_fed_by(self, feed: object) -> bool:
        """Whether it is open."""
        return feed in self._feeds

    def close_feed(self, feed: object) -> None:
        """They have come, or will not; it may have been closed before."""
        self._feeds.discard(feed)
        self._to_loop(self._close_if_fed)

    def close(self) -> None:
        """End when the calls that were submitted have."""
        self.closing = True
        if self.loop.is_here:  # in a forked child, nobody may be there to leave its lock
            self._to_loop(self._close_if_fed)

    def abandon(self) -> None:
        """End soon, and all calls and workers too; does not wait."""
        if self.loop.is_here:
            self._killing = True
            self.loop.end()

    def terminate(self) -> None:
        """End now.  Who runs the loop, or its thread, does not wait for that; nor for ever who
        waits for a user's callback to return first."""
        if self.loop.is_here:
            self._killing = True
            self.loop.end()
            if not (self.loop.in_thread or self.loop.is_run_here):
                self.loop.finished.wait(END_SECONDS)

    def forget(self, recipe: int) -> None:
        """No calls of it are left, nor will there be any.  The collector calls this."""
        if self.loop.is_here:  # a forked child has none of the workers
            self._to_loop(partial(self._forget, recipe))

    def post(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called on the loop, in turn with what was submitted."""
        if self._ended:
            callback()
        else:
            self.loop.post(callback)

    def await_start(self) -> None:
        """Wait until the workers that are wanted have started; not in a forked process."""
        started = _Started(self._engine, at_all=not self._starter.lent and self.error is None)
        deadline = monotonic() + START_SECONDS
        while self.loop.is_here and not (started.settled() or self.loop.over):
            if monotonic() >= deadline:
                break
            self.loop.wait(started, 0.05)

    def _to_loop(self, callback: Callable[[], object]) -> None:
        if not self._ended:
            self.loop.post(callback)

    def started(self) -> list[tuple[Link, int]]:
        """The workers that have started, with their pids."""
        found = [(link, link.pid or self._pid_of(link.id)) for link in self._engine.started()]
        return sorted(((link, pid) for link, pid in found if pid), key=lambda row: row[0].id)

    # -- on the loop ------------------------------------------------------------------

    def _resized(self, processes: int, standing: int) -> None:
        self.processes = processes
        self._core.placement.standing = standing

    def _entered(self, waitable: Waitable | None, timeout: float | None) -> None:
        """Somebody comes to run the loop: end the trip that is under way."""
        bunch = self._trips.bunch
        if bunch is None:
            return
        if waitable is not bunch.tokens[0]:
            self._trips.enter()
        elif (answer := self._trips.end(timeout)) is not None:
            row = Row(answer.worker, answer.pid, 1, answer.wall, [answer.seconds])
            bunch.owner.items_ended(bunch.tokens, [answer.value], row)

    def _take(self) -> None:
        """Feed what was submitted, in order; calls of one recipe in a row together."""
        self._due = False  # before taking, so that nothing is left without a post
        self._low = 0
        inbox = self._inbox
        while inbox:
            recipe, owner = inbox.first()
            window = WINDOW * (self.processes + 1)
            most = window if self._waits or owner is None else AHEAD * self.processes
            room = most - len(self._jobs)
            enough = ENOUGH * self.processes
            # Not once calls have waited: it may be for one of these.
            has_time = not self._waits and len(self._jobs) >= enough and inbox.are_few(recipe)
            if room <= 0 or has_time:
                self._low = most // 2 if room <= 0 else enough
                self._due = True  # they are taken when there is room, or need
                break
            if owner is None:
                fed: list[Portable] | list[Bunch]
                fed, self._added = inbox.next_calls(recipe, room)
            else:
                fed = inbox.next_bunches(recipe, owner, room, self.processes)
            if fed:
                self._post(m.Fed(recipe, fed))
        self._close_if_fed()

    def _forget(self, recipe: int) -> None:
        self._inbox.forget(recipe)
        self._core.placement.ready.forget(recipe)
        self._engine.forget(recipe)

    def _cancel(self, jobs: Iterable[Job]) -> None:
        known = []
        for job in jobs:
            if job.call is not None:
                known.append(job.call)
            elif (call := self._bunch_of(job)) is not None:
                self._post(m.CancelItems(call, [job]))
            else:
                self._inbox.withdraw(job)
        self._reactor.call_soon(self._inbox.tell_withdrawn)  # those of many cancels together
        self._post(m.CancelCalls(tuple(known), "it was asked for"))

    def _bunch_of(self, token: Any) -> int | None:
        """The call in which an item is."""
        for id, job in self._jobs.items():
            if type(job) is Bunch and any(token is other for other in job.tokens):
                return id
        return None

    def _close_if_fed(self) -> None:
        if self.closing and not (self._feeds or self._inbox or self._core.over):
            nothing = Recipe(0, "", b"")
            self._post(m.Fed(nothing, [], last=True))

    def _post(self, event: m.Event) -> None:
        if type(event) is m.Waiting and not self._waits:
            self._waits = True  # perhaps for calls that come later: those are to be known
            self._reactor.call_soon(self._take)
        self._perform(self._core.handle(event, monotonic()))

    def _perform(self, commands: list[m.Command]) -> None:
        performers = self._performers
        for command in commands:
            performers[type(command)](command)
        if len(self._jobs) < self._low:
            self._low = 0
            self._reactor.call_soon(self._take)
        self._alarm.follow()

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
            m.ItemsEnded: self._items_ended,
            m.ItemsCancelled: self._items_cancelled,
            m.AttemptEnded: self._attempt_ended,
            m.CallEnded: self._call_ended,
            m.Succeeded: self._succeeded,
            m.RunEnded: self._run_ended,
        }

    def _calls_added(self, command: m.CallsAdded) -> None:
        added = iter(self._added)
        for call in command.calls:
            if call.parent is not None:
                continue
            if type(call.blob) is Bunch:
                self._jobs[call.id] = call.blob
            else:
                job: Any = next(added)
                self._jobs[call.id] = job
                job.call = call.id
        self._added = []

    def _items_ended(self, command: m.ItemsEnded) -> None:
        recipe, bunch, first, event, pid = command
        tokens = bunch.tokens[first : first + len(event.values)]
        seconds = event.seconds
        self._inbox.learn(recipe, seconds)
        if Failure in map(type, event.values):
            for value in event.values:
                if type(value) is Failure:
                    self._look_at_failure(value)
            if self.error is not None:
                bunch.owner.items_failed(tokens, self.error)
                return
        row = Row(event.worker, pid, event.attempt, event.wall, seconds)
        bunch.owner.items_ended(tokens, event.values, row)

    def _items_cancelled(self, command: m.ItemsCancelled) -> None:
        recipe, bunch, tokens = command
        bunch.owner.items_failed(tokens, withdrawn(recipe))

    def _attempt_ended(self, command: m.AttemptEnded) -> None:
        self._last = command

    def _watch_attempts(self) -> None:
        """State is used: from now on it is told of attempts that end."""
        self._performers[m.AttemptEnded] = self._stateful_attempt_ended
        self._direct = False  # of those no attempt is told

    def _stateful_attempt_ended(self, command: m.AttemptEnded) -> None:
        self._state.attempt_ended(command.call.id, command.attempt)
        self._last = command

    def _succeeded(self, command: m.Succeeded) -> None:
        attempt_ended = self._performers[m.AttemptEnded]
        for call in command.calls:
            attempt_ended(command.attempt(call))
            self._call_ended(m.CallEnded(call))

    def _call_ended(self, command: m.CallEnded) -> None:
        call = command.call
        job = self._jobs.pop(call.id, None)
        if job is None:
            return
        if call.failure is not None:
            self._look_at_failure(call.failure)
        if type(job) is Bunch:
            if job.left:
                job.owner.items_failed(job.tokens[job.done :], self.error or call.ended_as())
            return
        assert not isinstance(job, Bunch)
        last = self._last
        if last is not None and last.call is not call:
            last = None
        if self.error is not None:
            job.failed(self.error)
        else:
            job.ended(call, last, self._pid_of(None if last is None else last.worker))

    def _pid_of(self, worker: int | None) -> int | None:
        found = None if worker is None else self._core.worker(worker)
        return None if found is None else found.pid

    def _look_at_failure(self, failure: Failure) -> None:
        """Whether the pool cannot go on, because its initializer raised."""
        if self.error is None:
            self.error = self._initializer_failed(failure)
            if self.error is not None:
                self.loop.end()

    def _run_ended(self, command: m.RunEnded) -> None:
        if command.status == 3 and self.error is None:
            self.error = RunError(f"the pool cannot go on: {command.reason}")
        self.loop.end()

    # -- the end ----------------------------------------------------------------------

    def _finish(self) -> None:
        """Called once, by the loop's thread."""
        _each([
            self._settle_down,
            self._fail_jobs,
            self._close_engine,
            self._state.close,
            self._starter.close,
            lambda: self._inbox.fail(self.why_over()),
        ])  # fmt: skip

    def _settle_down(self) -> None:
        try:
            if not (self._killing or self.error):
                self._reactor.run_until(lambda: self._engine.settled or self._killing)
        finally:
            self._ended = True

    def _close_engine(self) -> None:
        graceful = not (self._killing or self.error)
        self._engine.hurries = not graceful
        self._engine.close(monotonic() + (CLOSE_SECONDS if graceful else TERMINATE_SECONDS))

    def why_over(self) -> BaseException:
        """What those get who wait for a call that will not end."""
        return self.error or CallCancelled("the pool was terminated before the call had ended")

    def _fail_jobs(self) -> None:
        error = self.why_over()
        jobs, self._jobs = [*self._jobs.values()], {}
        if (bunch := self._trips.give_up()) is not None:
            jobs.append(bunch)
        _each([partial(_fail, job, error) for job in jobs])
        self._inbox.fail(error)

    def _broken(self, error: BaseException) -> None:
        """A bug of ours left the loop: nobody is to wait for what cannot come."""
        if self.error is None:
            said = f"the pool failed in itself: {type(error).__name__}: {error}"
            self.error = TaskrunError(said)
            self.error.__cause__ = error
        self.loop.end()
        if self.loop.in_thread:
            self._ended = True
            _each([self._fail_jobs, self._engine.kill])


def _fail(job: Job | Bunch, error: BaseException) -> None:
    if not isinstance(job, Bunch):
        job.failed(error)
    elif job.left:
        job.owner.items_failed(job.tokens[job.done :], error)


def _each(steps: Iterable[Callable[[], object]]) -> None:
    """Take each step, whatever those before it have raised; then raise the first of that."""
    failed: BaseException | None = None
    for step in steps:
        try:
            step()
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed
