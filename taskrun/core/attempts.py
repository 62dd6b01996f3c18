"""How attempts begin and end: values, errors, timeouts, lost workers, and trying again."""

from __future__ import annotations

from typing import Any

from taskrun import messages as m
from taskrun.calls import CANCELLED, FAILED, OK, READY, RUNNING, SKIPPED, SLEEPING, Call
from taskrun.core.books import Books
from taskrun.core.workforce import Worker
from taskrun.model import Encoded, Failure


class Attempts(Books):
    """The layer that knows of attempts."""

    # -- how they begin ---------------------------------------------------------------

    def on_began(self, event: m.Began) -> None:
        call = self._current(event.call, event.attempt)
        if call is None or call.state is not RUNNING or call.worker != event.worker:
            return
        call.label = event.label or call.label
        call.wall = event.wall
        self._has_begun(call)
        assert call.began is not None
        # How long it took counts from its beginning; its timeout from when that was known.
        call.began = min(call.began, self._now - event.age)

    def _has_begun(self, call: Call) -> None:
        if call.began is not None:
            return
        call.began = self._now
        if call.recipe.timeout is not None:
            attempt = call.attempt
            due = self._now + call.recipe.timeout
            timer = self._timers.at(due, lambda: self._time_is_up(call, attempt))
            self._timeouts[call.id] = timer

    def _time_is_up(self, call: Call, attempt: int) -> None:
        if call.attempt == attempt and call.state is RUNNING and not call.ending:
            self._interrupt(call, "timeout")

    def _interrupt(self, call: Call, reason: str) -> None:
        assert call.worker is not None
        call.ending = reason
        self._out.append(m.Interrupt(call.worker, call.id, call.attempt, reason))

    # -- how attempts end -------------------------------------------------------------

    def on_finished(self, event: m.Finished) -> None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return
        calls, queue = worker.calls, None
        ready = self.placement.ready
        plain: list[Call] = []
        for id, attempt, kind, payload, items, wall, seconds, _ in event.reports:
            call = calls.get(id)
            if call is None or call.attempt != attempt:
                continue  # stale
            del calls[id]
            call.seconds = seconds
            call.wall = wall
            recipe = call.recipe
            if queue is None or queue.recipe.id != recipe.id:
                ready = self._ready[recipe.lane]
                queue = ready.queue(recipe)
            if queue.learn(seconds):
                ready.move_up(queue)
            if worker.waits:
                worker.end_wait(call)
            if kind == "value" and items is None and is_plain(call):
                call.value = payload
                plain.append(call)
                continue
            if plain:
                self._all_succeeded(worker, plain)
                plain = []
            if kind == "value" and call.ending is None:
                self._succeeded(call, payload, items)
            else:
                self._ended_otherwise(call, kind, payload, items)
        if plain:
            self._all_succeeded(worker, plain)
        worker.home.heard(worker, self._now)
        self._follow()
        if not self.paused:
            worker.home.top_up(worker, self._now)

    def _all_succeeded(self, worker: Worker, calls: list[Call]) -> None:
        """Attempts of plain calls gave their values: what :meth:`_succeeded` and ``_end`` do,
        without what does not concern these."""
        self._live -= len(calls)
        for call in calls:
            call.state = OK
            call.worker = call.began = call.blob = None
        if not self._keep:
            for call in calls:
                del self._open[call.id]
        self._out.append(m.Succeeded(worker.id, calls))
        self.graph.all_ended_well(calls)

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
        if items and kind not in ("value", "held"):  # what a generator yielded before it failed
            self._take_items(call, self._yielded.get(call.id, 0), items)
            self.graph.streamed(call)
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
            self._attempt_ended(call, "skip", call.failure, None)
            self._put_down(call)
            self._end(call, SKIPPED)
        else:
            failure, retryable = payload
            if failure.kind == "cancelled":
                self._interrupted(call)
            else:
                # An engine tells of what became of its own workers as an error of theirs.
                outcome = failure.kind if failure.kind in ("lost", "timeout") else "error"
                self._attempt_failed(call, failure, outcome, retryable=retryable)

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
        self._note_cancelled(call)
        self._attempt_ended(call, "cancelled", call.failure, None)
        self._yielded.pop(call.id, None)
        self._put_down(call)
        self._end(call, CANCELLED)

    def _note_cancelled(self, call: Call) -> None:
        if call.failure is None or call.failure.kind != "cancelled":
            why = f", because the run was stopped: {self.stopping}" if self.stopping else ""
            said = f"{call.title} was cancelled{why}"
            call.failure = Failure("cancelled", "CallCancelled", said)

    def _end_untried(self, call: Call) -> None:
        """It is not tried again, since the run is being stopped.  To have asked for that is
        no failure."""
        if call.failure is not None and call.failure.kind == "retry":
            self._note_cancelled(call)
            self._end(call, CANCELLED)
        else:
            self._end(call, FAILED)

    def _lost(self, call: Call, event: m.WorkerLost, inner: Call | None) -> None:
        """``inner``: what its worker executed while ``call`` waited."""
        call.seconds = self._now - call.began if call.began is not None else 0.0
        if call.ending:
            self._interrupted(call)
            return
        said = f"; its last output:\n{event.last_output.rstrip()}" if event.last_output else ""
        there = f" in {inner.title}, while {call.title} waited" if inner not in (None, call) else ""
        failure = Failure(
            "lost",
            "WorkerLost",
            f"the worker that executed {call.title} (attempt {call.attempt}) "
            f"{_was(event.reason)}{there}{said}",
        )
        self._attempt_failed(call, failure, "lost", retryable=True)

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
        self._wakings[call.id] = due = self._now + delay
        self._timers.at(due, lambda: self._wake(call, attempt))

    def _backoff(self, call: Call) -> float:
        doubled = call.recipe.backoff * 2.0 ** min(call.attempt - 1, 30)
        return doubled * self._random.uniform(1.0, 1.25)

    def _wake(self, call: Call, attempt: int) -> None:
        self._wakings.pop(call.id, None)
        if call.state is SLEEPING and call.attempt == attempt:
            self._queue_again(call)

    def _queue_again(self, call: Call) -> None:
        call.state = READY
        self._ready[call.recipe.lane].add(call)

    def _attempt_ended(
        self, call: Call, outcome: str, failure: Failure | None, again: float | None
    ) -> None:
        if call.recipe.timeout is not None and call.id in self._timeouts:
            self._timers.cancel(self._timeouts.pop(call.id))
        self._out.append(
            m.AttemptEnded(
                call, call.attempt, outcome, failure, call.wall, call.seconds, call.worker, again
            )
        )

    def _put_down(self, call: Call) -> None:
        """The attempt is over: what it held is free."""
        if call.units is not None:
            self._claims.put_down(call, call.recipe.resources)


def is_plain(call: Call) -> bool:
    """Whether nothing follows from its end but that it has ended, and what the graph knows."""
    return (
        call.ending is None
        and call.units is None
        and call.items is None
        and call.watchers is None
        and call.children is None
        and call.recipe.timeout is None
    )


def _was(reason: str) -> str:
    return reason if reason.startswith("exited") else f"was {reason}"
