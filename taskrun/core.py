"""The scheduler: events in, commands out, and nothing else.

The theory.  A run is a set of calls that grows.  A call is ready when its inputs are
there; ready calls go to workers that have room; what a worker reports about the current
attempt of a call moves that call on, and any other report is stale and ignored.  A call
ends once, and its end readies, dooms or creates others.  The run is over when nothing is
open.  There is no clock, no socket and no thread here: the time comes with each event,
and what is to be done goes out as commands.

``graph`` knows what follows from the end of a call, ``placement`` which call goes to
which worker; this module knows what an event means for a call, and for the run.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from taskrun import messages as m
from taskrun.calls import (
    CANCELLED,
    FAILED,
    FINAL,
    HELD,
    OK,
    READY,
    RUNNING,
    SKIPPED,
    SLEEPING,
    WAITING,
    Call,
)
from taskrun.claims import Claims, Impossible
from taskrun.crowd import Crowd
from taskrun.errors import RunError
from taskrun.graph import Graph
from taskrun.limits import Keys, Limits
from taskrun.model import LANES, Encoded, Failure, Plan, Recipe
from taskrun.placement import Placement
from taskrun.resources import Resources
from taskrun.timers import Timers
from taskrun.workforce import Home, Wait, Worker

PROCESS = "process"
SPARE_FACTOR = 4  # workers a slot, when calls lend theirs
RESTARTS = 10  # idle workers that may die, beside one a slot ...
RESTART_PERIOD = 10.0  # ... within so many seconds, before the run gives up


class Scheduler:
    """One run: its calls, its workers, and what is to happen next.

    ``slots`` is ``-j``.  ``policy``: ``stop`` (after a failure start nothing new),
    ``keep-going`` or ``fail-fast`` (interrupt what runs, too).  ``wanted`` names the tasks
    whose values are kept.  ``open_feed``: calls will come by ``Fed``.  ``keep``: whether
    calls are remembered when they have ended.  ``standing``: so many workers are wanted even
    while there is nothing to do.  ``most_calls``: how many a worker executes before another
    takes its place.  ``lanes``: those that have workers of their own, and how many at most;
    the calls of the others are executed as those of the lane ``process``.  ``engine``: these
    go to workers that come by themselves and execute many at a time.  ``limit_keys`` gives
    the value of each of a call's limits' keys.  ``seed`` makes the jitter of retries
    repeatable.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        slots: int,
        recipe_ids: Iterator[int],
        policy: str = "stop",
        resources: dict[str, float] | None = None,
        wanted: Collection[str] = (),
        spare_factor: int = SPARE_FACTOR,
        ahead: bool = True,
        open_feed: bool = False,
        keep: bool = True,
        standing: int = 0,
        most_calls: int | None = None,
        lanes: Mapping[str, int] | None = None,
        engine: bool = False,
        limit_keys: Callable[[Call], Keys] | None = None,
        seed: int | None = None,
    ) -> None:
        self.policy = policy
        self.calls: list[Call] = []
        self._keep = keep
        self._open: dict[int, Call] = {}  # where none are kept: those that have not ended
        self._made = 0
        self.status = 0
        self.stopping = ""  # why
        self.over = False
        self.resources = Resources({"cpu": slots, **(resources or {})})
        self.graph = Graph(plan, self._new_call, recipe_ids, wanted)
        self._timers = Timers()
        self._out: list[m.Command] = []
        self._workers: dict[int, Worker] = {}
        self._limits = Limits(self._timers, limit_keys or _no_keys, self._consider_again)
        self._claims = Claims(self.resources, self._limits, self._workers)
        self.placement = Placement(
            slots, spare_factor, ahead, self._claims, self._timers, self._workers, self._out
        )
        self.placement.standing = standing
        self.placement.most_calls = most_calls
        self._homes = self._make_homes(lanes or {}, engine)
        self._ready = {lane: home.ready for lane, home in self._homes.items()}
        self._busy_homes = list(dict.fromkeys(self._homes.values()))
        self._random = random.Random(seed)
        self._live = 0  # calls that have not ended
        self._feeding = open_feed
        self._ordinals: dict[int, int] = {}
        self._idle_deaths: deque[float] = deque()
        self._yielded: dict[int, int] = {}  # how many items the current attempts have delivered
        self._now = 0.0
        self._handlers: dict[type, Callable[[Any], None]] = {
            m.WorkerReady: self.on_worker_ready,
            m.WorkerLost: self.on_worker_lost,
            m.Retiring: self.on_retiring,
            m.Capacity: self.on_capacity,
            m.Began: self.on_began,
            m.Finished: self.on_finished,
            m.Yielded: self.on_yielded,
            m.GaveBack: self.on_gave_back,
            m.Submitted: self.on_submitted,
            m.Fed: self.on_fed,
            m.Waiting: self.on_waiting,
            m.Resumed: self.on_resumed,
            m.CancelCalls: self.on_cancel_calls,
            m.CancelChild: self.on_cancel_child,
            m.Stop: self.on_stop,
            m.GiveUp: self.on_give_up,
            m.Tick: self.on_tick,
        }

    def _make_homes(self, lanes: Mapping[str, int], engine: bool) -> dict[str, Home]:
        """Who gives each lane's calls to workers."""
        process: Home = self.placement
        if engine:
            process = Crowd(PROCESS, 0, self._claims, self._workers, self._out)
        homes = dict.fromkeys(LANES, process)
        for lane, most in lanes.items():
            homes[lane] = Crowd(lane, most, self._claims, self._workers, self._out)
        return homes

    # -- the one door -----------------------------------------------------------------

    def begin(self, now: float) -> list[m.Command]:
        """Start the run.  Raises RunError if a task needs a resource that nobody has."""
        for family in self.graph.families.values():
            if lacking := self.resources.missing(family.recipe.resources):
                raise RunError(
                    f"{family.name} needs {lacking}: offer it with --resource "
                    f"{lacking.split('=')[0]}=N, or ask for less in @task(resources=)"
                )
        self._now = now
        self.graph.begin()
        return self._settle()

    def handle(self, event: m.Event, now: float) -> list[m.Command]:
        """Take one event; gives the commands that follow from it."""
        self._now = now
        if not self.over:
            self._handlers[type(event)](event)
        return self._settle()

    def deadline(self) -> float | None:
        """When the next Tick is due, if no event comes before."""
        return None if self.over else self._timers.next()

    def _settle(self) -> list[m.Command]:
        self._follow()
        while not self.over and (action := self._timers.due(self._now)) is not None:
            action()
            self._follow()
        while not self.over and not self._schedule():
            self._follow()
        if not self.over and not self._live and not self._feeding:
            self._finish()
        out = self._out[:]
        self._out.clear()
        return out

    def _schedule(self) -> bool:
        """Assign what can be assigned; False where a call cannot start, and was failed."""
        homes = self._busy_homes
        try:
            for home in homes:
                home.schedule(self._now)
            if any(home.ready.count for home in homes) or self._limits.parked_count:
                self._look_for_deadlock()
        except Impossible as impossible:
            self._fail_blocked(impossible)
            return False
        return True

    def _look_for_deadlock(self) -> None:
        if all(home.is_idle() for home in self._busy_homes):
            ready = [call for home in self._busy_homes for call in home.ready]
            if stuck := self._claims.deadlocked(ready):
                raise Impossible(stuck)

    def _finish(self) -> None:
        self.over = True
        self._out.append(m.RunEnded(self.status, self.stopping))

    # -- workers ----------------------------------------------------------------------

    def on_worker_ready(self, event: m.WorkerReady) -> None:
        self._homes[event.lane].join(event.worker, event.pid, event.slots, self._now)

    def on_retiring(self, event: m.Retiring) -> None:
        worker = self._workers.get(event.worker)
        if worker is not None:
            worker.home.retire(worker)

    def on_capacity(self, event: m.Capacity) -> None:
        self.placement.slots = event.slots
        self.resources.capacity["cpu"] = event.slots

    def on_worker_lost(self, event: m.WorkerLost) -> None:
        known = self._workers.get(event.worker)
        home = known.home if known is not None else self._homes[event.lane]
        worker = home.leave(event.worker)
        if worker is None:
            return
        if not worker.calls and self._die_too_often():
            self.on_give_up(m.GiveUp(f"workers die while they are idle: {event.reason}"))
            return
        executing = self._current(*event.executing) if event.executing else None
        begun = [
            call
            for call in worker.calls.values()
            if home.begins_at_once or call is executing or call.began is not None
        ]
        for call in begun:
            del worker.calls[call.id]
        for call in begun:
            self._lost(call, event)
        self._requeue(list(worker.calls.values()))

    def _die_too_often(self) -> bool:
        """Whether replacing idle workers is pointless.  Those that die in a call are not
        counted: the attempts of the call bound them."""
        deaths = self._idle_deaths
        deaths.append(self._now)
        while self._now - deaths[0] > RESTART_PERIOD:
            deaths.popleft()
        return len(deaths) > RESTARTS + self.placement.slots

    def _lost(self, call: Call, event: m.WorkerLost) -> None:
        call.seconds = self._now - call.began if call.began is not None else 0.0
        if call.ending:
            self._interrupted(call)
            return
        said = f"; its last output:\n{event.last_output.rstrip()}" if event.last_output else ""
        failure = Failure(
            "lost",
            "WorkerLost",
            f"the worker that executed {call.title} (attempt {call.attempt}) "
            f"{_was(event.reason)}{said}",
        )
        self._attempt_failed(call, failure, "lost", retryable=True)

    def on_began(self, event: m.Began) -> None:
        call = self._current(event.call, event.attempt)
        if call is None or call.state is not RUNNING or call.worker != event.worker:
            return
        call.label = event.label or call.label
        call.wall = event.wall
        self._has_begun(call)

    def _has_begun(self, call: Call) -> None:
        if call.began is not None:
            return
        call.began = self._now
        if call.recipe.timeout is not None:
            attempt = call.attempt
            due = self._now + call.recipe.timeout
            self._timers.at(due, lambda: self._time_is_up(call, attempt))

    def _time_is_up(self, call: Call, attempt: int) -> None:
        if call.attempt == attempt and call.state is RUNNING and not call.ending:
            self._interrupt(call, "timeout")

    def _interrupt(self, call: Call, reason: str) -> None:
        assert call.worker is not None
        call.ending = reason
        self._out.append(m.Interrupt(call.worker, call.id, call.attempt, reason))

    def on_gave_back(self, event: m.GaveBack) -> None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return
        back = []
        for id, attempt in event.calls:
            call = self._current(id, attempt)
            if call is not None and worker.calls.pop(id, None) is call:
                back.append(call)
        worker.given -= len(back)
        self._requeue(back)
        worker.home.heard(worker, self._now)

    def _requeue(self, calls: list[Call]) -> None:
        """They were assigned, but never begun: no attempt is counted."""
        ready = []
        for call in calls:
            self._put_down(call)
            call.attempt -= 1
            cancelled, call.ending = call.ending == "cancelled", None
            if cancelled or (self.stopping and not call.teardown):
                self._end(call, CANCELLED)
            else:
                call.state = READY
                call.worker = call.began = None
                ready.append(call)
        self._consider_again(ready)

    def _consider_again(self, calls: list[Call]) -> None:
        """They are next in their queues."""
        for call in reversed(calls):
            self._ready[call.recipe.lane].put_back([call])

    # -- how attempts end -------------------------------------------------------------

    def on_finished(self, event: m.Finished) -> None:
        worker = self._workers.get(event.worker)
        find = self._find
        queue = None
        ready = self.placement.ready
        for id, attempt, kind, payload, items, wall, seconds, _ in event.reports:
            call = find(id)
            if (
                call is None
                or call.attempt != attempt
                or call.state is not RUNNING
                or call.worker != event.worker
            ):
                continue  # stale
            call.seconds = seconds
            call.wall = wall
            if queue is None or queue.recipe is not call.recipe:
                ready = self._ready[call.recipe.lane]
                queue = ready.queue(call.recipe)
            if queue.learn(seconds):
                ready.move_up(queue)
            if worker is not None:
                worker.calls.pop(id, None)
                if worker.waits:
                    worker.end_wait(call)
            if kind == "value" and call.ending is None:
                self._succeeded(call, payload, items)
            else:
                self._ended_otherwise(call, kind, payload, items)
        if worker is not None:
            worker.home.heard(worker, self._now)
            self._follow()
            worker.home.top_up(worker, self._now)

    def on_yielded(self, event: m.Yielded) -> None:
        call = self._current(event.call, event.attempt)
        if call is not None and call.state is RUNNING:
            self._take_items(call, event.first, event.items)
            self._yielded[call.id] = event.first + len(event.items)
            self.graph.streamed(call)

    def _take_items(self, call: Call, first: int, items: list[Encoded]) -> None:
        """Items of a generator from place ``first`` on.  Those that an earlier attempt has
        delivered stay as they are."""
        call.items = known = call.items or []
        known += items[max(0, len(known) - first) :]

    def _succeeded(self, call: Call, value: Encoded, items: list[Encoded] | None) -> None:
        call.value = value
        if call.items is None:
            call.items = items
        else:
            self._take_items(call, self._yielded.pop(call.id, 0), items or [])
        self._attempt_ended(call, "value", None, None)
        if call.units is not None:
            self._put_down(call)
        self._end(call, OK)

    def _ended_otherwise(self, call: Call, kind: str, payload: Any, items: Any) -> None:
        timeout = call.recipe.timeout
        if call.ending == "timeout" and kind == "value" and timeout and call.seconds <= timeout:
            call.ending = None  # it made it: the interrupt came after the end
        if call.ending:
            self._interrupted(call)
        elif kind == "value":
            self._succeeded(call, payload, items)
        elif kind == "held":
            self._hold(call, payload, items)
        elif kind == "retry":
            after, failure = payload
            self._attempt_failed(call, failure, "retry", retryable=True, asked=after)
        elif kind == "skip":
            call.failure = Failure("skipped", "Skip", str(payload))
            self._attempt_ended(call, "skip", None, None)
            self._put_down(call)
            self._end(call, SKIPPED)
        else:
            failure, retryable = payload
            if failure.kind == "cancelled":
                self._interrupted(call)
            else:
                self._attempt_failed(call, failure, "error", retryable=retryable)

    def _interrupted(self, call: Call) -> None:
        """A running attempt that was interrupted has ended."""
        reason, call.ending = call.ending or "cancelled", None
        if reason == "timeout":
            failure = Failure(
                "timeout", "CallTimeout", f"{call.title} ran longer than {call.recipe.timeout:g} s"
            )
            retryable = call.recipe.retry_timeouts
            self._attempt_failed(call, failure, "timeout", retryable=retryable)
            return
        self._attempt_ended(call, "cancelled", None, None)
        self._yielded.pop(call.id, None)
        self._put_down(call)
        self._end_cancelled(call)

    def _end_cancelled(self, call: Call) -> None:
        if call.failure is None or call.failure.kind != "cancelled":
            why = f", because the run was stopped: {self.stopping}" if self.stopping else ""
            said = f"{call.title} was cancelled{why}"
            call.failure = Failure("cancelled", "CallCancelled", said)
        self._end(call, CANCELLED)

    def _end_untried(self, call: Call) -> None:
        """It is not tried again, since the run is being stopped.  To have asked for that is
        no failure."""
        if call.failure is not None and call.failure.kind == "retry":
            self._end_cancelled(call)
        else:
            self._end(call, FAILED)

    def _attempt_failed(
        self,
        call: Call,
        failure: Failure,
        outcome: str,
        *,
        retryable: bool,
        asked: float | None = None,
    ) -> None:
        """``asked``: the task itself asked to be tried again, after so many seconds."""
        call.failure = failure
        self._yielded.pop(call.id, None)
        self._put_down(call)
        retries = call.recipe.retries
        allowed = retries if retries is not None else (0 if asked is None else call.attempt)
        final = self.stopping and not call.teardown
        if final or not retryable or call.attempt > allowed:
            self._attempt_ended(call, outcome, failure, None)
            if final and call.attempt <= allowed:
                self._end_untried(call)
            else:
                self._end(call, FAILED)
            return
        delay = asked if asked is not None else self._backoff(call)
        self._attempt_ended(call, outcome, failure, delay)
        call.worker = call.began = None
        call.wall = 0.0
        if delay <= 0:
            self._queue_again(call)
            return
        call.state = SLEEPING
        attempt = call.attempt
        self._timers.at(self._now + delay, lambda: self._wake(call, attempt))

    def _backoff(self, call: Call) -> float:
        doubled = call.recipe.backoff * 2.0 ** min(call.attempt - 1, 30)
        return doubled * self._random.uniform(1.0, 1.25)

    def _wake(self, call: Call, attempt: int) -> None:
        if call.state is SLEEPING and call.attempt == attempt:
            self._queue_again(call)

    def _queue_again(self, call: Call) -> None:
        call.state = READY
        self._ready[call.recipe.lane].add(call)

    def _attempt_ended(
        self, call: Call, outcome: str, failure: Failure | None, again: float | None
    ) -> None:
        self._out.append(
            m.AttemptEnded(
                call, call.attempt, outcome, failure, call.wall, call.seconds, call.worker, again
            )
        )

    def _put_down(self, call: Call) -> None:
        """The attempt is over: what it held is free."""
        if call.units is not None:
            self._claims.put_down(call, call.recipe.resources)

    # -- calls that make calls, and wait for them -------------------------------------

    def on_submitted(self, event: m.Submitted) -> None:
        parent = self._current(event.parent, event.attempt)
        if parent is None or parent.state is not RUNNING:
            return
        if parent.children is None:
            parent.children = {}
        new = []
        for key, recipe, blob, keys in event.calls:
            known = parent.children.get(key)
            if known is not None and not self._is_spent(known, parent):
                known.generation = parent.attempt  # a retry takes over what is there
                continue
            call = self._submitted(recipe, parent, key, blob)
            call.generation = parent.attempt
            parent.children[key] = call
            new.append((call, keys))
        self._announce()
        for call, keys in new:
            self._depend(call, parent, keys)
            self._admit(call)

    def _is_spent(self, child: Call, parent: Call) -> bool:
        """Whether a retried parent's child ended without a value in an earlier attempt: it is
        made anew, or the retry could not help."""
        if child.generation == parent.attempt or child.state not in FINAL or child.state is OK:
            return False
        _note_refused(child)  # the parent's earlier attempt has answered for it
        self.graph.release(child)
        return True

    def on_fed(self, event: m.Fed) -> None:
        calls = [self._submitted(event.recipe, None, b"", blob) for blob in event.arguments]
        self._announce()
        for call in calls:
            self._admit(call)
        self._feeding = self._feeding and not event.last

    def _submitted(self, recipe: Recipe, parent: Call | None, key: bytes, blob: Any) -> Call:
        ordinal = self._ordinals.get(recipe.id, 0)
        self._ordinals[recipe.id] = ordinal + 1
        call = self._new_call(recipe, ordinal, None, parent, key)
        call.blob = blob
        call.users = 1  # the parent, or whoever fed it, may ask for the value
        self.graph.created.append(call)
        return call

    def _depend(self, call: Call, holder: Call, keys: tuple[bytes, ...]) -> None:
        """``call`` needs the values of these futures, which ``holder`` holds."""
        if not keys:
            return
        call.inputs = {}
        for key in keys:
            used = _find_child(holder, key)
            if used is None:
                continue  # whoever decodes the arguments will miss it and say so
            call.inputs[key] = used
            used.users += 1
            if used.state not in FINAL:
                call.needs += 1
                used.dependants = used.dependants or []
                used.dependants.append(call)
            elif used.state is not OK and not (call.recipe.always and call.state is WAITING):
                self.graph.doomed.append((call, used))

    def _admit(self, call: Call) -> None:
        """A submitted call joins the run."""
        lacking = self.resources.missing(call.recipe.resources)
        if self.stopping and not call.teardown:
            self._end(call, CANCELLED)
        elif lacking:
            call.failure = Failure(
                "blocked", "CallBlocked", f"{call.title} needs {lacking}: nobody here has it"
            )
            self._end(call, FAILED)
        elif not call.needs:
            self.graph.ready.append(call)

    def on_waiting(self, event: m.Waiting) -> None:
        worker = self._workers.get(event.worker)
        call = self._current(event.call, event.attempt)
        if worker is None or call is None or call.worker != event.worker:
            return
        self._has_begun(call)
        wait = worker.home.wait(worker, call, event.any_of)
        wait.hosts = m.OUTSIDE in event.keys
        wait.outside = wait.hosts or m.OUTSIDE_ALONE in event.keys
        for key in event.keys:
            if key in (m.OUTSIDE, m.OUTSIDE_ALONE):
                continue
            child = _find_child(call, key)
            if child is None:
                self._refuse_stranger(worker, call, key)
                continue
            wait.watch(child)
        for child in [child for child in wait.pending.values() if child.state in FINAL]:
            self._deliver(wait, child)
        if not wait.pending and not wait.outside:
            wait.over = True
        if call.recipe.limits:
            self._limits.consider_again(call)
        worker.home.go_on(wait)

    def _refuse_stranger(self, worker: Worker, call: Call, key: bytes) -> None:
        failure = Failure(
            "blocked", "CallBlocked", f"{call.title} waits for a future of another call"
        )
        self._out.append(m.Deliver(worker.id, {key: failure}, call.id))

    def on_resumed(self, event: m.Resumed) -> None:
        worker = self._workers.get(event.worker)
        call = self._current(event.call, event.attempt)
        if worker is not None and call is not None:
            worker.home.resumed(worker, call)

    def _deliver(self, wait: Wait, child: Call) -> None:
        """``child`` has ended, and a waiting attempt is told."""
        wait.ended(child)
        if child.state is not OK:
            _note_refused(child)
        outcome = child.value if child.state is OK else child.ended_as()
        self._out.append(m.Deliver(wait.worker.id, {child.key: outcome}, wait.call.id))

    def on_cancel_child(self, event: m.CancelChild) -> None:
        parent = self._current(event.parent, event.attempt)
        if parent is not None and parent.children and event.key in parent.children:
            self._cancel(parent.children[event.key], "its parent cancelled it")

    def _hold(
        self, call: Call, payload: tuple[bytes | None, tuple[bytes, ...]], items: Any
    ) -> None:
        """The function returned futures: the call ends when they do, and holds no worker."""
        if any(_find_child(call, key) is None for key in payload[1]):
            said = f"{call.title} returned a future of another call"
            failure = Failure("error", "ResultError", said)
            self._attempt_failed(call, failure, "error", retryable=False)
            return
        call.value = (payload, items)
        self._attempt_ended(call, "value", None, None)
        self._put_down(call)
        self.graph.let_inputs_go(call)
        call.state = HELD
        call.worker = None
        call.needs = 0
        self._depend(call, call, payload[1])
        if not call.needs:
            self.graph.ready.append(call)

    def _link(self, call: Call) -> None:
        """All futures in a held value have ended well: put their values in."""
        values = {key: child.value for key, child in (call.inputs or {}).items()}
        payload, items = call.value
        call.value = _linked(payload, values)
        if items is not None:
            linked = [_linked(item, values) if item[1] else item[0] for item in items]
            self._take_items(call, self._yielded.pop(call.id, 0), linked)
        self._end(call, OK)

    # -- how calls end ----------------------------------------------------------------

    def _new_call(
        self,
        recipe: Recipe,
        index: Any,
        family: Any,
        parent: Call | None = None,
        key: bytes = b"",
    ) -> Call:
        call = Call(self._made, recipe, index, family, parent, key)
        self._made += 1
        if self._keep:
            self.calls.append(call)
        else:
            self._open[call.id] = call
        self._live += 1
        return call

    def _find(self, id: int) -> Call | None:
        if not self._keep:
            return self._open.get(id)
        return self.calls[id] if 0 <= id < len(self.calls) else None

    def is_running(self, id: int, attempt: int) -> bool:
        """Whether that attempt of a call is being executed, or about to be."""
        call = self._current(id, attempt)
        return call is not None and call.state is RUNNING

    def is_assigned(self, id: int) -> bool:
        """Whether a worker has that call."""
        call = self._find(id)
        return call is not None and call.state is RUNNING

    def _current(self, id: int, attempt: int) -> Call | None:
        """The call, if ``attempt`` is the one that counts."""
        call = self._find(id)
        return call if call is not None and call.attempt == attempt else None

    def _end(self, call: Call, state: str) -> None:
        """The one way into a final state."""
        if call.state in FINAL:
            raise AssertionError(f"{call!r} cannot become {state}: it has ended")
        call.state = state
        self._live -= 1
        if not self._keep:
            del self._open[call.id]
        if call.watchers is not None:
            watchers, call.watchers = call.watchers, None
            for wait in watchers:
                self._deliver(wait, call)
                wait.worker.home.go_on(wait)
        if call.children is not None:
            self._let_children_go(call)
        if state is FAILED and not call.tolerated:
            self._judge(call)
        self._out.append(m.CallEnded(call))
        self.graph.ended(call)
        call.worker = call.began = call.blob = None

    def _let_children_go(self, parent: Call) -> None:
        """A call that submitted others has ended: nobody asks for their values any more."""
        children, parent.children = parent.children or {}, None
        for child in children.values():
            self.graph.release(child)
            if parent.state is OK and child.generation != parent.attempt:
                self._cancel(child, "its parent was retried and did not ask for it again")
        for child in children.values():
            # What the parent was told of, and has failed in turn, is judged with the parent.
            told = child.refused and parent.state is FAILED
            if child.state is FAILED and not child.tolerated and not told:
                self._judge(child)

    def _judge(self, call: Call) -> None:
        """A failure that nobody tolerates: what does it mean for the run?"""
        parent = call.parent
        if parent is not None and parent.children is not None:
            return  # the parent may yet catch it; this is judged again when that ends
        self.status = max(self.status, 1)
        if self.policy != "keep-going" and not self.stopping:
            self._stop(f"{call.title} failed", interrupt=self.policy == "fail-fast")

    def _follow(self) -> None:
        """What follows from ended calls, until nothing more does."""
        graph = self.graph
        while graph.created or graph.ready or graph.doomed:
            self._announce()
            doomed, graph.doomed = graph.doomed, []
            for call, cause in doomed:
                self._doom(call, cause)
            ready, graph.ready = graph.ready, []
            for call in ready:
                self._make_ready(call)

    def _announce(self) -> None:
        if self.graph.created:
            self._out.append(m.CallsAdded(self.graph.created))
            self.graph.created = []

    def _make_ready(self, call: Call) -> None:
        if call.state is HELD:
            self._link(call)
        elif call.state is WAITING:
            if self.stopping and not call.teardown:
                self._end(call, CANCELLED)
            else:
                call.state = READY
                self._ready[call.recipe.lane].add(call)

    def _doom(self, call: Call, cause: Call) -> None:
        """An input of ``call`` is not coming."""
        if call.state is WAITING:
            call.cause = cause.cause or cause
            self._end(call, CANCELLED if cause.state is CANCELLED else SKIPPED)
        elif call.state is HELD:
            call.cause = cause.cause or cause
            call.value = None
            call.failure = cause.ended_as()
            _note_refused(cause)
            self._end(call, cause.state)

    def _fail_blocked(self, impossible: Impossible) -> None:
        call = impossible.call
        self._take_out(call)
        if impossible.why is not None:
            error = impossible.why
            said = f"the key of a limit of {call.title} cannot be had: {error}"
            call.failure = Failure("error", type(error).__name__, said)
        else:
            needs = [f"{name}={amount:g}" for name, amount in call.recipe.resources.items()]
            needs += [str(bound) for bound in call.recipe.limits]
            call.failure = Failure(
                "blocked",
                "CallBlocked",
                f"{call.title} needs {', '.join(needs)}, which calls hold that wait for it: "
                f"they would wait for ever",
            )
        self._end(call, FAILED)

    def _take_out(self, call: Call) -> None:
        """A ready call is not going to start."""
        if not (call.recipe.limits and self._limits.give_up(call)):
            self._ready[call.recipe.lane].discard(call)

    # -- cancelling and stopping ------------------------------------------------------

    def on_cancel_calls(self, event: m.CancelCalls) -> None:
        for id in event.calls:
            call = self._find(id)
            if call is not None:
                self._cancel(call, event.reason)

    def _cancel(self, call: Call, reason: str) -> None:
        if call.state in FINAL:
            return
        if call.state is RUNNING and call.ending:
            return
        call.failure = Failure(
            "cancelled", "CallCancelled", f"{call.title} was cancelled: {reason}"
        )
        if call.state is RUNNING:
            self._interrupt(call, "cancelled")
            return
        if call.state is READY:
            self._take_out(call)
        self._end(call, CANCELLED)

    def on_stop(self, event: m.Stop) -> None:
        self.status = max(self.status, 1)
        self._stop(event.reason, interrupt=True)

    def on_give_up(self, event: m.GiveUp) -> None:
        self.status = 3
        self.stopping = event.reason
        self._finish()

    def on_tick(self, event: m.Tick) -> None:
        """Time has passed; timers fire in :meth:`_settle`."""

    def _stop(self, reason: str, *, interrupt: bool) -> None:
        """Start nothing more but teardown; take back what has not begun."""
        first, self.stopping = not self.stopping, self.stopping or reason
        self._feeding = False
        for worker in list(self._workers.values()):
            if interrupt:
                for call in worker.calls.values():
                    if not call.ending and not call.teardown:
                        self._interrupt(call, "cancelled")
            elif worker.home is self.placement and worker.running > 1:
                self.placement.reclaim(worker, len(worker.calls))
        if not first:
            return
        self._clear_ready()
        for call in self.calls if self._keep else list(self._open.values()):
            if call.teardown:
                continue
            if call.state is SLEEPING:
                self._end_untried(call)
            elif call.state is WAITING and call.family is None:
                self._end(call, CANCELLED)

    def _clear_ready(self) -> None:
        """Nothing that is ready starts, but teardown."""
        ready = [call for home in self._busy_homes for call in home.ready.clear()]
        for call in [*self._limits.clear(), *ready]:
            if call.teardown:
                self._ready[call.recipe.lane].add(call)
            else:
                self._end(call, CANCELLED)

    def worker(self, id: int) -> Worker | None:
        """A worker that is here."""
        return self._workers.get(id)

    def parked_at(self, call: Call) -> str | None:
        """The limit that keeps a ready call, for people."""
        return self._limits.why(call)

    def wait_of(self, call: Call) -> Wait | None:
        """For what a running call waits, if it does."""
        worker = self._workers.get(call.worker or 0)
        return worker.waits.get(call.id) if worker is not None else None

    def running(self) -> int:
        """How many calls run that do not wait, one a worker where they come one by one."""
        one_by_one = self.placement.running()
        return one_by_one + sum(
            worker.running for worker in self._workers.values() if worker.home is not self.placement
        )

    def release(self, call: Call) -> None:
        """Whoever fed a call has taken its value."""
        self.graph.release(call)


def _no_keys(call: Call) -> Keys:
    raise LookupError("nobody here can tell the keys of its limits")


def _was(reason: str) -> str:
    return reason if reason.startswith("exited") else f"was {reason}"


def _find_child(holder: Call, key: bytes) -> Call | None:
    """A call by the key of its future, which ``holder`` or one above it has."""
    above: Call | None = holder
    while above is not None:
        if above.children is not None and key in above.children:
            return above.children[key]
        above = above.parent
    return None


def _note_refused(child: Call) -> None:
    """Its parent knows that ``child`` did not succeed: what follows is up to the parent."""
    child.refused = True
    if child.cause is not None:
        child.cause.refused = True


def _linked(encoded: Any, values: dict[bytes, Encoded]) -> Encoded:
    """An encoded value with futures in it, now that these have values."""
    blob, keys = encoded
    if blob is None:
        return values[keys[0]]
    return (blob, {key: values[key] for key in keys})
