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

from collections.abc import Callable
from typing import Any

from taskrun import messages as m
from taskrun.bunch import Bunch
from taskrun.calls import (
    CANCELLED,
    FAILED,
    FINAL,
    HELD,
    READY,
    RUNNING,
    SKIPPED,
    SLEEPING,
    WAITING,
    Call,
)
from taskrun.core.bunches import Bunches, has_begun
from taskrun.core.children import note_refused
from taskrun.core.claims import Impossible
from taskrun.core.workforce import Worker
from taskrun.errors import RunError
from taskrun.failures import encode_failure, guarded
from taskrun.model import Failure

RESTARTS = 10  # workers that may die without a call, beside one a slot ...
RESTART_PERIOD = 10.0  # ... within so many seconds, before the run gives up
MAKE_DO = 30.0  # seconds for which no more workers are wanted where none could be started


class Scheduler(Bunches):
    """The whole of it: one run, its calls, its workers, and what is to happen next.

    What it is made with: see :class:`books.Books`.
    """

    def _make_handlers(self) -> dict[type, Callable[[Any], None]]:
        return {
            m.WorkerReady: self.on_worker_ready,
            m.WorkerLost: self.on_worker_lost,
            m.Retiring: self.on_retiring,
            m.Capacity: self.on_capacity,
            m.Lent: self.on_lent,
            m.NoMoreWorkers: self.on_no_more_workers,
            m.Began: self.on_began,
            m.Finished: self.on_finished,
            m.Items: self.on_items,
            m.Yielded: self.on_yielded,
            m.GaveBack: self.on_gave_back,
            m.Submitted: self.on_submitted,
            m.Fed: self.on_fed,
            m.Sent: self.on_sent,
            m.Waiting: self.on_waiting,
            m.Resumed: self.on_resumed,
            m.CancelCalls: self.on_cancel_calls,
            m.CancelItems: self.on_cancel_items,
            m.CancelChild: self.on_cancel_child,
            m.Stop: self.on_stop,
            m.Pause: self.on_pause,
            m.GiveUp: self.on_give_up,
            m.Tick: self.on_tick,
        }

    # -- the one door -----------------------------------------------------------------

    def begin(self, now: float) -> list[m.Command]:
        """Start the run.  Raises RunError if a task needs a resource that nobody has."""
        if (unmet := self.unmet()) and not self.growing:
            lacking = unmet[0].partition(" needs ")[2].split("=")[0]
            offer = "-j N" if lacking == "cpu" else f"--resource {lacking}=N"
            raise RunError(
                f"{unmet[0]}: offer it with {offer}, or ask for less in @task(resources=)"
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
        if self.over:
            return None
        if self.graph.growing:
            return self._now  # next, but others have their turn before
        return self._timers.next()

    def _settle(self) -> list[m.Command]:
        self._follow()
        while not self.over and (action := self._timers.due(self._now)) is not None:
            action()
            self._follow()
        while not self.over and not self._schedule():
            self._follow()
        if not (self.over or self._live or self._feeding or self.graph.growing):
            self._finish()
        out = self._out[:]
        self._out.clear()
        return out

    def _schedule(self) -> bool:
        """Assign what can be assigned; False where a call cannot start, and was failed."""
        if not self._starts:
            return True
        homes = self._busy_homes
        try:
            for home in homes:
                home.schedule(self._now)
            if any(home.ready.count for home in homes) or self._limits.parked_count:
                self._look_for_deadlock(patient=self._claims.borrows)
        except Impossible as impossible:
            self._fail_blocked(impossible)
            return False
        return True

    def _look_for_deadlock(self, *, patient: bool) -> None:
        if all(home.is_idle() for home in self._busy_homes):
            ready = [call for home in self._busy_homes for call in home.ready]
            if stuck := self._claims.deadlocked(ready, patient=patient):
                raise Impossible(stuck)

    def _finish(self) -> None:
        self.over = True
        self._out.append(m.RunEnded(self.status, self.stopping))

    # -- workers ----------------------------------------------------------------------

    def on_worker_ready(self, event: m.WorkerReady) -> None:
        home = self._homes[event.lane]
        home.join(Worker(event.worker, event.pid, home, event.slots, self._now, event.node))

    def on_retiring(self, event: m.Retiring) -> None:
        worker = self._workers.get(event.worker)
        if worker is not None:
            worker.home.retire(worker)

    def on_capacity(self, event: m.Capacity) -> None:
        self.placement.slots = event.slots
        # A call that needs more than is left waits for the node that left to come back.
        capacity = self.resources.capacity
        capacity["cpu"] = max(capacity["cpu"], event.slots)
        self._claims.set_nodes(event.slots, event.nodes, event.places)
        for home in self._homes.values():
            home.offered = event.lanes.get(home.lane, 0)

    def on_lent(self, event: m.Lent) -> None:
        self._claims.lend(event.loan)
        if event.loan.last:
            self._given_up += 1
            try:
                self._look_for_deadlock(patient=False)
            except Impossible as impossible:
                self._fail_blocked(impossible)

    def on_no_more_workers(self, event: m.NoMoreWorkers) -> None:
        home = self._homes[event.lane]
        home.make_do(event.workers)
        self._timers.at(self._now + MAKE_DO, home.want_all)

    def on_worker_lost(self, event: m.WorkerLost) -> None:
        known = self._workers.get(event.worker)
        home = known.home if known is not None else self._homes[event.lane]
        worker = home.leave(event.worker)
        if worker is None:
            return
        if not worker.given and self._die_too_often():
            self.on_give_up(m.GiveUp(f"workers die while they are idle: {event.reason}"))
            return
        executing = self._current(*event.executing) if event.executing else None
        begun = [
            call
            for call in worker.calls.values()
            if home.begins_at_once or call is executing or has_begun(call)
        ]
        for call in begun:
            del worker.calls[call.id]
            if call.began is None:  # nor has anything else ended there since
                call.began = worker.heard
        inner = begun[-1] if begun and not home.begins_at_once else None
        for call in begun:
            self._lost(call, event, inner if call.id in worker.waits else None)
        self._requeue(list(worker.calls.values()))

    def _die_too_often(self) -> bool:
        """Whether replacing workers is pointless that die before they have executed a call.
        Others are not counted: the attempts of their calls bound them, and they got some done."""
        deaths = self._idle_deaths
        deaths.append(self._now)
        while self._now - deaths[0] > RESTART_PERIOD:
            deaths.popleft()
        return len(deaths) > RESTARTS + self.placement.slots

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
        if event.cut is not None:
            self._cut_off(worker, *event.cut)
        for call in list(worker.calls.values()):
            if type(call.blob) is Bunch and call.blob.unwanted:
                self._cancel_begun(call)
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
                if type(call.blob) is Bunch and not self._weed(call.recipe, call.blob):
                    self._end(call, CANCELLED)
                else:
                    ready.append(call)
        self._consider_again(ready)

    # -- how calls end ----------------------------------------------------------------

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
        if call.is_to_blame and not call.tolerated:
            self._judge(call)
        self._out.append(m.CallEnded(call))
        self.graph.ended(call)
        call.worker = call.began = call.blob = None

    def _judge(self, call: Call) -> None:
        """A failure, or a cancelled call, that nobody tolerates: what does it mean for the run?"""
        parent = call.parent
        if parent is not None and parent.children is not None:
            return  # the parent may yet catch it; this is judged again when that ends
        self.status = max(self.status, 1)
        if call.state is FAILED and self.policy != "keep-going" and not self.stopping:
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
            root = call.cause = cause.cause or cause
            call.value = None
            call.failure = cause.ended_as()
            note_refused(cause)
            # A future that was skipped for a failure fails the call as its result() would.
            skipped_for_it = cause.state is SKIPPED and root.state is FAILED
            self._end(call, FAILED if skipped_for_it else cause.state)

    def _fail_blocked(self, impossible: Impossible) -> None:
        call = impossible.call
        self._take_out(call)
        if impossible.why is not None:
            call.failure = _failure_of_key(call, impossible.why)
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

    def on_pause(self, event: m.Pause) -> None:
        self.paused = event.paused
        if event.paused:
            self._take_back()

    def _take_back(self) -> None:
        """Workers give back what they have not begun."""
        for worker in self._workers.values():
            if worker.home is self.placement and worker.ahead > 0:
                self.placement.reclaim(worker, worker.ahead + 1)

    def on_give_up(self, event: m.GiveUp) -> None:
        self.status = 3
        self.stopping = event.reason
        self.graph.grow_up()
        self._announce()
        self._finish()

    def on_tick(self, event: m.Tick) -> None:
        """Time has passed: large fan-outs grow; timers fire in :meth:`_settle`."""
        self.graph.grow()

    def _stop(self, reason: str, *, interrupt: bool) -> None:
        """Start nothing more but teardown; take back what has not begun."""
        first, self.stopping = not self.stopping, self.stopping or reason
        self._feeding = False
        if interrupt:
            self._interrupt_all()
        else:
            self._take_back()
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

    def _interrupt_all(self) -> None:
        for worker in self._workers.values():
            for call in worker.calls.values():
                if not call.ending and not call.teardown:
                    self._interrupt(call, "cancelled")

    def _clear_ready(self) -> None:
        """Nothing that is ready starts, but teardown."""
        ready = [call for home in self._busy_homes for call in home.ready.clear()]
        for call in [*self._limits.clear(), *ready]:
            if call.teardown:
                self._ready[call.recipe.lane].add(call)
            else:
                self._end(call, CANCELLED)

    def release(self, call: Call) -> None:
        """Whoever fed a call has taken its value."""
        self.graph.release(call)


def _failure_of_key(call: Call, error: BaseException) -> Failure:
    said = f"the key of a limit of {call.title} cannot be had"
    error.add_note(f"{said}, so it did not start")
    return encode_failure(error, message=f"{said}: {guarded(error, str)}")
